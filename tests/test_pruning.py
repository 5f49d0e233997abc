"""The walk: order, targets, windows, what is left alone, every family."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import families
import pytest
import reference
import torch
from torch import nn

from reconkit import criteria, models, prunable, pruning, streams
from reconkit.config import ConfigError, PruneConfig
from reconkit.pruning import prune, windows

QUICK: dict[str, Any] = {"epochs": 2, "batch_size": 4}


def quick(**values: Any) -> PruneConfig:
    return PruneConfig(**{**QUICK, **values})


def samples(count: int = 8, length: int = 16, seed: int = 0) -> torch.Tensor:
    return families.tokens(count, length, seed)


def pruned(name: str = "llama", **values: Any) -> tuple[nn.Module, pruning.PruneResult]:
    model = families.build(name)
    return model, prune(model, samples(), quick(**values), held_out={"other": samples(4, seed=1)}, progress=False)


def views(model: nn.Module) -> list[models.WeightView]:
    return [v for block in models.blocks(model)[1] for v in models.weight_views(block)[0]]


@pytest.mark.parametrize(
    ("width", "overlap", "expected"),
    [
        (1, 0, [[0], [1], [2], [3]]),
        (2, 1, [[0], [0, 1], [1, 2], [2, 3], [3]]),
        (2, 0, [[0, 1], [2, 3]]),
        (3, 0, [[0, 1, 2], [3]]),
        (3, 2, [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3], [3]]),
    ],
)
def test_windows(width: int, overlap: int, expected: list[list[int]]) -> None:
    assert [list(w) for w in windows(4, width, overlap)] == expected


def inputs_of(modules: dict[str, nn.Module], work: Any) -> dict[str, torch.Tensor]:
    """What flows into each module (tokens, columns) while `work` runs."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        return modules[name].register_forward_pre_hook(lambda _, args: seen.__setitem__(name, args[0].detach().flatten(0, -2)))

    handles = [watch(name) for name in modules]
    work()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_lr_equals_the_same_steps_by_hand(criterion: str) -> None:
    """Block by block: inputs from the pruned blocks before, one forward of the dense block, then all its matrices at once."""
    model, by_hand = families.build("llama"), families.build("llama")
    result = prune(model, samples(), quick(technique="LR", criterion=criterion), progress=False)
    layers = models.blocks(by_hand)[1]
    runner = streams.Runner(by_hand, layers)
    dense = sparse = runner.embed(samples(), 8)
    for i, block in enumerate(layers):
        dense = runner.advance([i], dense, 8)
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        inputs = inputs_of(linears, lambda sparse=sparse, i=i: runner.advance([i], sparse, 8))
        for name, module in linears.items():
            w = module.weight.detach()
            if criterion == "magnitude":
                new = w * reference.magnitude_mask(w, 0.5)
            elif criterion == "wanda":
                new = w * reference.wanda_mask(w, inputs[name], 0.5)
            else:
                new = reference.sparsegpt(w, inputs[name], 0.5)[0].float()
            module.weight.data.copy_(new)
        sparse = runner.advance([i], sparse, 8)
        row = result.errors[(result.errors.block == i) & (result.errors.source == "calibration")].iloc[0]
        assert (row.mse, row.nmse, row.token_nmse, row.token_nmse_90) == pytest.approx(reference.error(dense, sparse), rel=1e-3)
    for (name, a), b in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), name
        assert torch.equal(a == 0, b == 0), name


@pytest.mark.parametrize("technique", ["LR", "BR", "BR+GP", "BR+GP+CR", "BR+CR"])
@pytest.mark.parametrize("criterion", ["magnitude", "sparsegpt"])
def test_masked_weights_stay_zero_and_the_rest_is_untouched(technique: str, criterion: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    before = families.build("llama")
    model, result = pruned(technique=technique, criterion=criterion)
    inside = {id(p) for p in models.blocks(model)[1].parameters()}
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if id(new) not in inside:
            assert torch.equal(new, old), name
    for view in views(model):
        weight = view.get()
        group = weight.shape[1] * weight.shape[0]
        assert int((weight == 0).sum()) == round(0.5 * group), view.name
    assert result.sparsity == 0.5
    assert [(n, p.dtype, p.device, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.dtype, p.device, p.requires_grad) for n, p in before.named_parameters()
    ]
    assert list(model.state_dict()) == list(before.state_dict()) and not model.training
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    _, tokenizer = models.load_model("tiny")
    models.save_model(model, tokenizer, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(loaded(samples()).logits, model(samples()).logits)
    assert all(int((v.get() == 0).sum()) == round(0.5 * v.get().numel()) for v in views(loaded)), "in the saved folder too"


def test_norms_and_biases_are_trained_too() -> None:
    before = families.build("opt (biases, learned positions)")
    model, _ = pruned("opt (biases, learned positions)", technique="BR")
    changed = {n for (n, a), b in zip(model.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)}
    assert all(any(part in name for name in changed) for part in ("q_proj.bias", "fc1.bias", "self_attn_layer_norm.weight", "final_layer_norm.bias"))


@pytest.mark.parametrize("technique", ["LR", "BR", "BR+GP", "BR+GP+CR"])
def test_nothing_pruned_is_nothing_changed(technique: str) -> None:
    before = families.build("llama")
    model, result = pruned(technique=technique, criterion="sparsegpt", sparsity=0.0)
    for (name, new), old in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.allclose(new, old, atol=1e-7), name
    assert result.sparsity == 0 and result.errors.nmse.max() < 1e-10


def test_training_lowers_a_blocks_own_loss() -> None:
    _, result = pruned(technique="BR", epochs=8, criterion="magnitude")
    losses = result.training[result.training.source == "calibration"].groupby("window").loss
    assert (losses.last() < losses.first()).all()
    assert set(result.training.epoch) == set(range(9)) and set(result.training.source) == {"calibration", "other"}


@pytest.mark.parametrize(("technique", "stream"), [("BR", "sparse"), ("BR+GP", "dense")])
def test_the_target_is_the_dense_block_on_its_own_stream(technique: str, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GP's target for block 1 is the dense block on dense input, BR's is the dense block on sparse input; the two differ."""
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = pruning.Trainer.fit

    def spy(self: Any, training: Any, *rest: Any) -> Any:
        given.append(tuple(t.clone() for t in training["calibration"]))
        return real(self, training, *rest)

    monkeypatch.setattr(pruning.Trainer, "fit", spy)
    model, dense_model = families.build("llama"), families.build("llama")
    prune(model, samples(), quick(technique=technique), progress=False)
    dense, sparse = (streams.Runner(m, models.blocks(m)[1]) for m in (dense_model, model))
    x_dense = dense.advance([0], dense.embed(samples(), 4), 4)
    x_sparse = sparse.advance([0], sparse.embed(samples(), 4), 4)
    on_dense, on_sparse = dense.advance([1], x_dense, 4), dense.advance([1], x_sparse, 4)
    assert not torch.allclose(on_dense, on_sparse, atol=1e-3)
    inputs, target = given[1]
    assert torch.allclose(inputs, x_sparse, atol=1e-6)
    assert torch.allclose(target, on_dense if stream == "dense" else on_sparse, atol=1e-6)


@pytest.mark.parametrize("technique", ["BR+GP+CR", "BR+CR"])
def test_windows_of_two_train_every_block_twice_prune_it_once_and_advance_once(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, prunings, targets = [], [], []
    real_train, real_prune = pruning.Pruning._train, pruning.Pruning._prune_block
    dense_model = families.build("llama")
    model = families.build("llama")

    def train(self: Any, window: range, given: Any) -> None:
        trained.append([*window])
        targets.append((self.state.sparse["calibration"].clone(), given["calibration"].clone()))
        real_train(self, window, given)

    def prune_block(self: Any, window: range, index: int) -> None:
        prunings.append((index, self.state.position))
        real_prune(self, window, index)

    monkeypatch.setattr(pruning.Pruning, "_train", train)
    monkeypatch.setattr(pruning.Pruning, "_prune_block", prune_block)
    result = prune(model, samples(), quick(technique=technique), progress=False)
    assert trained == [[0], [0, 1], [1, 2], [2]]
    assert prunings == [(0, 0), (1, 0), (2, 1)], "a window prunes its newest block, from statistics of the stream before the window"
    assert list(result.errors.block) == [0, 1, 2]
    dense = streams.Runner(dense_model, models.blocks(dense_model)[1])
    for window, (inputs, target) in zip(trained, targets, strict=True):
        start = dense.embed(samples(), 4) if "GP" in technique else inputs
        for i in range(0 if "GP" in technique else window[0], window[-1] + 1):
            start = dense.advance([i], start, 4)
        assert torch.allclose(target, start, atol=1e-6), "the target passes through dense blocks only"


def test_statistics_of_a_windows_second_block_come_through_the_pruned_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, torch.Tensor] = {}
    real, expected = pruning.Pruning._statistics, {}

    def spy(self: Any, window: range, index: int, groups: Any) -> Any:
        found, runner = real(self, window, index, groups), self.runner
        x = self.state.sparse["calibration"]
        with torch.no_grad():
            for i in range(window.start, index):
                x = runner.call(i, x)
            x = runner.blocks[index].input_layernorm(x)
        expected[index] = x.reshape(-1, x.shape[-1]).double().square().sum(0)
        seen[index] = found["self_attn.q_proj"].square_sum
        return found

    monkeypatch.setattr(pruning.Pruning, "_statistics", spy)
    pruned(technique="BR+GP+CR", criterion="wanda")
    assert set(seen) == {0, 1, 2}
    for index in seen:
        assert torch.allclose(seen[index], expected[index], rtol=1e-5)


def test_layers_that_read_one_tensor_share_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = criteria.Statistics

    class Counted(real):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(criteria, "Statistics", Counted)
    pruned(technique="LR")
    assert len(made) == 3 * 4, "q/k/v, o, gate/up and down in each of three blocks"


def test_shared_statistics_equal_separate_ones_to_the_bit() -> None:
    model = families.build("llama")
    _, layers = models.blocks(model)
    runner = streams.Runner(model, layers)
    states = runner.embed(samples(), 4)
    group = [v for v in models.weight_views(layers[0])[0] if v.name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")]
    apart = {v.name: criteria.Statistics(32, hessian=True) for v in group}
    with torch.no_grad(), streams.InputTap(group, lambda view, x, _: apart[view.name].add(x.flatten(0, 1))):
        for batch in states.split(4):
            runner.call(0, batch)
    q, k, v = apart.values()
    assert q.count == samples().numel() and torch.equal(q.hessian, k.hessian) and torch.equal(q.hessian, v.hessian)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_every_group_of_a_pattern_keeps_exactly_n(pattern: str, criterion: str) -> None:
    model, result = pruned(technique="BR", criterion=criterion, pattern=pattern)
    kept, group = map(int, pattern.split(":"))
    for view in views(model):
        assert ((view.get().reshape(-1, group) != 0).sum(1) == kept).all(), view.name
    assert result.sparsity == 1 - kept / group


@pytest.mark.parametrize(("layers", "chosen"), [("attention", "attn"), ("feed-forward", "mlp"), (("mlp.up_proj",), "up_proj")])
def test_only_chosen_layers_are_pruned(layers: Any, chosen: str) -> None:
    model, result = pruned(technique="BR+GP", layers=layers)
    for view in views(model):
        assert bool((view.get() == 0).any()) == (chosen in view.name), view.name
    assert 0 < result.sparsity < 0.5


def test_sparsity_by_layer() -> None:
    model, _ = pruned(technique="LR", criterion="wanda", layer_sparsity={"*.1.*.down_proj": 0.25, "*.mlp.*": 0.75})
    for i, block in enumerate(models.blocks(model)[1]):
        for view in models.weight_views(block)[0]:
            expected = 0.25 if i == 1 and "down" in view.name else 0.75 if "mlp" in view.name else 0.5
            assert (view.get() == 0).float().mean() == expected


@pytest.mark.parametrize("name", families.ALL)
@pytest.mark.parametrize("technique", ["LR", "BR+GP+CR"])
def test_every_family(name: str, technique: str) -> None:
    model, result = pruned(name, technique=technique, criterion="sparsegpt", epochs=1)
    assert result.sparsity == pytest.approx(0.5, abs=0.02)
    zeros = sum(int((v.get() == 0).sum()) for v in views(model)) / sum(v.get().numel() for v in views(model))
    assert zeros == pytest.approx(result.sparsity)
    final = result.errors[result.errors.block == 2]
    assert (final.nmse > 0).all() and (final.nmse < 1.5).all()
    if "moe" in name or "mixtral" in name:
        assert any("router" in note or "gate" in note for note in result.notes), "routers stay dense, and that is said"


def test_an_expert_with_few_tokens_is_pruned_by_magnitude_and_named() -> None:
    model = families.build("mixtral (experts)")
    result = prune(model, samples(1, 8), quick(technique="LR", criterion="sparsegpt"), progress=False)
    assert any("expert" in note and "magnitude" in note for note in result.notes)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    a, b, c = (pruned(technique="BR+GP", seed=seed)[0] for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_the_callers_random_state_is_left_alone() -> None:
    model = families.build("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prune(model, samples(), quick(technique="BR"), progress=False)
    assert torch.equal(torch.rand(3), expected)


def test_extra_samples_train_and_never_choose_the_mask() -> None:
    def first_matrix(extra: torch.Tensor | None) -> torch.Tensor:
        model = families.build("llama")
        prune(model, samples(), quick(technique="BR", criterion="wanda", layers=("self_attn.q_proj",)), extra=extra, progress=False)
        return models.blocks(model)[1][0].self_attn.q_proj.weight

    plain, with_extra = first_matrix(None), first_matrix(samples(8, seed=9))
    assert torch.equal(plain == 0, with_extra == 0) and not torch.equal(plain, with_extra)
    model = families.build("llama")
    result = prune(model, samples(), quick(technique="BR"), extra=samples(8, seed=9), progress=False)
    assert set(result.errors.source) == {"calibration", "extra"}


def test_switches_choose_the_streams() -> None:
    errors = {
        name: pruned(technique="BR", criterion="wanda", **switch)[1].errors.query("source == 'calibration'").mse.tolist()
        for name, switch in {
            "plain": {},
            "target": {"target": "dense"},
            "inputs": {"reconstruction_input": "dense"},
            "statistics": {"statistics_input": "dense"},
            "wide": {"window": 2, "overlap": 0},
        }.items()
    }
    assert len({tuple(e) for e in errors.values()}) == len(errors), "every switch changes the result"
    assert errors["target"] == pruned(technique="BR+GP", criterion="wanda")[1].errors.query("source == 'calibration'").mse.tolist()


def test_half_precision_models_stay_half() -> None:
    model = families.build("llama").to(torch.bfloat16)
    result = prune(model, samples(), quick(technique="BR+GP"), progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and result.sparsity == 0.5


@pytest.mark.parametrize("values", [{"micro_batch": 3}, {"batch_size": 5, "micro_batch": 2}])
def test_half_precision_models_train_in_batches_of_every_size(values: dict[str, Any]) -> None:
    model = families.build("llama").to(torch.bfloat16)
    config = quick(technique="BR", precision="fp32", **values)
    prune(model, samples(), config, extra=samples(3, seed=7), held_out={"other": samples(5, 12, seed=1)}, progress=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_training_that_never_helps_on_held_out_samples_is_not_kept() -> None:
    model = families.build("llama")
    first = models.blocks(model)[1][0]
    before = {n: p.detach().clone() for n, p in first.named_parameters()}
    config = PruneConfig(technique="BR", criterion="magnitude", sparsity=0.0, epochs=3, batch_size=4, early_stopping=1)
    prune(model, samples(), config, held_out={"other": samples(4, seed=1)}, progress=False)
    assert all(torch.equal(before[n], p) for n, p in first.named_parameters()), "the loss was zero before training"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": torch.zeros(2, 8)}, "token ids"),
        ({"samples": torch.zeros(0, 8, dtype=torch.long)}, "token ids"),
        ({"samples": torch.full((2, 8), families.VOCABULARY)}, "vocabulary"),
        ({"samples": families.tokens(2, 80)}, "context"),
        ({"held_out": {"calibration": families.tokens(2, 8)}}, "cannot be called"),
        ({"held_out": {"own": torch.cat([families.tokens(1, 8), families.tokens(2, 8, 1)])}}, r"1 of the 3 samples of held_out\[own\] are"),
        ({"extra": families.tokens(2, 8, 1), "held_out": {"own": families.tokens(2, 8, 1)}}, "2 of the 2 samples"),
        ({"extra": families.tokens(2, 9)}, "must agree"),
        ({"config": PruneConfig(early_stopping=1)}, "early_stopping"),
        ({"config": PruneConfig(pattern="3:7")}, "does not divide"),
        ({"config": PruneConfig(layers=("nothing",))}, "matches none"),
        ({"config": PruneConfig(layers=("mlp.*", "mpl.*"))}, "layers has the pattern 'mpl.*', which matches none of: self_attn.q_proj"),
        ({"config": PruneConfig(layer_sparsity={"*mlp*": 0.2, "mlp.*": 0.3})}, "layer_sparsity.*'mlp.*'.*model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_block(change: dict[str, Any], says: str) -> None:
    model = families.build("llama")
    before = copy.deepcopy(model.state_dict())
    arguments = {"samples": families.tokens(4, 8), "config": quick(), **change}
    with pytest.raises(ConfigError, match=says):
        prune(model, arguments.pop("samples"), arguments.pop("config"), progress=False, **arguments)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_finding_keeps_the_inputs_of_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama")
    place = {v.parameter: i for i, block in enumerate(models.blocks(model)[1]) for v in models.weight_views(block)[0]}
    inputs: dict[int, list[Any]] = {}

    class Watched(streams.InputTap):
        def __init__(self, views: Any, seen: Any) -> None:
            def watch(view: models.WeightView, x: torch.Tensor, straight: bool) -> None:
                block = place[view.parameter]
                seen(view, x, straight)
                inputs.setdefault(block, []).append(weakref.ref(x))
                assert not [ref for i, refs in inputs.items() if i < block for ref in refs if ref() is not None]

            super().__init__(views, watch)

    monkeypatch.setattr(prunable, "InputTap", Watched)
    found = prunable.find(streams.Runner(model, models.blocks(model)[1]), samples(), quick())
    assert set(inputs) == {0, 1, 2} and [[len(g) for g in groups] for groups in found.groups] == [[3, 1, 2, 1]] * 3


def test_not_a_number_stops_with_its_place() -> None:
    model = families.build("llama")
    models.blocks(model)[1][1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="block 1"):
        prune(model, samples(), quick(technique="LR"), progress=False)
    model = families.build("llama")
    models.blocks(model)[1][0].mlp.down_proj.weight.data.mul_(1e25)  # finite activations whose squared error overflows
    with pytest.raises(FloatingPointError, match="block 0.*epoch"):
        prune(model, samples(), quick(technique="BR", criterion="magnitude"), progress=False)


@pytest.mark.gpu
def test_gpu_and_cpu_agree() -> None:
    on_cpu, a = pruned(technique="LR", criterion="wanda")
    model = families.build("llama").to("cuda")
    b = prune(model, samples(), quick(technique="LR", criterion="wanda"), held_out={"other": samples(4, seed=1)}, progress=False)
    assert b.errors.nmse.tolist() == pytest.approx(a.errors.nmse.tolist(), rel=1e-3)
    assert b.peak_memory["gpu"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("technique", ["BR+GP", "BR+GP+CR"])
def test_streams_in_pinned_ram_give_what_streams_on_the_gpu_give(technique: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for fits in (True, False):
        if not fits:
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
        model = families.build("llama").to("cuda")
        result = prune(model, samples(), quick(technique=technique, micro_batch=1), held_out={"other": samples(4, seed=1)}, progress=False)
        found.append((result, model))
    (there, a), (away, b) = found
    assert away.errors.equals(there.errors) and away.training.equals(there.training)
    assert models.weights_sum(a) == models.weights_sum(b)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"technique": "BR+GP", "batch_size": 8}, "set micro_batch=4, which is now 8"),
        ({"technique": "BR+GP", "batch_size": 8, "micro_batch": 2}, "set micro_batch=1, which is now 2"),
        ({"technique": "BR+GP+CR", "batch_size": 1}, "set recompute=True"),
        ({"technique": "BR+GP", "batch_size": 1, "recompute": True}, "let blocks stay on disk"),
        ({"technique": "LR"}, "let blocks stay on disk"),
    ],
    ids=lambda v: str(v),
)
def test_out_of_memory_names_the_setting_and_its_value(values: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(pruning.Pruning, "_prune_block", full)
    with pytest.raises(RuntimeError, match=f"Out of memory in blocks 0; {said}"):
        pruned(**values)
    monkeypatch.setattr(pruning.Pruning, "_prune_block", lambda *_: [][0])
    with pytest.raises(IndexError):
        pruned(**values)
