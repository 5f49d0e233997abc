"""Models of unusual kinds are pruned right, or refused in one sentence before any work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

import reconkit as rk
from reconkit import cli, criteria, models, reconstruct
from reconkit.config import ConfigError, PruneConfig

VOCABULARY = families.VOCABULARY
CRITERIA = ("magnitude", "wanda", "sparsegpt")
LLAMA4 = {
    **families.GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1,
}  # fmt: skip
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3, "expand": 2, "time_step_rank": 4}
ZAMBA = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "attention_hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "attention_head_dim": 32, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2,
    "use_mamba_kernels": False, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
}  # fmt: skip
GEMMA3N = {
    **families.GROUPED, "head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4,
    "altup_num_inputs": 2, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 3, "activation_sparsity_pattern": [0.0] * 3,
}  # fmt: skip
GEMMA4 = {**families.GROUPED, "head_dim": 8}


def build(kind: str, values: dict[str, Any], auto: Any = transformers.AutoModelForCausalLM) -> nn.Module:
    torch.manual_seed(0)
    model = auto.from_config(getattr(transformers, kind)(**values)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=0.15)
    return model


def ids(count: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def quick(**values: Any) -> PruneConfig:
    return PruneConfig(**{"technique": "LR", "epochs": 1, "batch_size": 4, "precision": "fp32", **values})


def prune(model: nn.Module, samples: torch.Tensor | None = None, **values: Any) -> Any:
    return rk.prune(model, ids() if samples is None else samples, quick(**values), progress=False)


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


def last_states(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the last block returns inside the model's own forward."""
    caught: list[torch.Tensor] = []
    handle = models.blocks(model)[1][-1].register_forward_hook(lambda _, __, out: caught.append(out if isinstance(out, torch.Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    return caught[0].double()


# Arguments, shapes and calls of blocks


def separate_zamba() -> nn.Module:
    """Zamba whose hybrid blocks own their transformer, so that only the token-dependent argument is left."""
    model = build("ZambaConfig", ZAMBA)
    model.model.layers[3].shared_transf = copy.deepcopy(model.model.layers[3].shared_transf)
    return model


@pytest.mark.parametrize("make", [separate_zamba, lambda: build("Gemma4TextConfig", GEMMA4)])
@pytest.mark.parametrize("technique", ["LR", "BR+GP"])
def test_block_arguments_that_depend_on_the_tokens_are_refused(make: Any, technique: str) -> None:
    model = make()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ConfigError, match=r"Block \d of \w+ gives other hidden states inside the model.*the tokens decide its"):
        prune(model, technique=technique)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_argument_that_depends_on_the_held_out_length_only_is_refused() -> None:
    """Recorded for the held-out length with calibration tokens, it differs on the held-out ones."""
    model = families.build("llama")
    block = models.blocks(model)[1][1]
    plain = block.forward

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        out = plain(hidden_states, **kwargs)
        return out * kwargs["scale"] if kwargs.get("scale") is not None else out

    def scaled(_: nn.Module, args: Any, kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        scale = 1 + hidden.detach().abs().mean() if hidden.shape[1] == 20 else None
        return args, {**kwargs, "scale": scale}

    block.forward = forward
    block.register_forward_pre_hook(scaled, with_kwargs=True)
    prune(model, ids(6, 24))
    with pytest.raises(ConfigError, match="Block 1 of .*the tokens decide its scale"):
        rk.prune(model, ids(6, 24), quick(), held_out={"other": ids(4, 20, 1)}, progress=False)


@pytest.mark.parametrize("source", ["calibration", "extra", "other"])
def test_an_argument_that_a_rare_token_decides_is_refused(source: str) -> None:
    """A mask that hides one token, which a single sample holds, far from those that are compared first."""
    model = families.build("llama")

    def masked(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": (kwargs["input_ids"] != 1).long()}

    model.model.register_forward_pre_hook(masked, with_kwargs=True)
    sources = {"calibration": ids(12, 16), "extra": ids(12, 16, 1), "other": ids(12, 16, 2)}
    rk.prune(copy.deepcopy(model), sources["calibration"], quick(), extra=sources["extra"], held_out={"other": sources["other"]}, progress=False)
    sources[source][5, 7] = 1
    with pytest.raises(ConfigError, match="Block 0 of LlamaForCausalLM is called otherwise for some samples .the tokens decide its attention_mask"):
        rk.prune(model, sources["calibration"], quick(), extra=sources["extra"], held_out={"other": sources["other"]}, progress=False)


def test_work_between_the_blocks_is_refused() -> None:
    model = families.build("llama")
    models.blocks(model)[1][2].register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    with pytest.raises(ConfigError, match="more between blocks 1 and 2 than hand on"):
        prune(model)


def test_blocks_that_are_called_out_of_order_are_refused() -> None:
    model = families.build("llama")
    layers = model.model.layers
    model.model.layers = nn.ModuleList([layers[0], layers[2], layers[1]])
    plain = layers[2].forward

    def twice(hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        return plain(layers[0](hidden_states, **kwargs), **kwargs)

    layers[2].forward = twice
    with pytest.raises(ConfigError, match="calls them in the order 0, 1, 0"):
        prune(model)


def test_hidden_states_of_four_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"are of shape \(2, 4, 24, 32\), and not \(samples, tokens, hidden\)"):
        prune(build("Gemma3nTextConfig", GEMMA3N))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_passes_the_comparison(dtype: torch.dtype) -> None:
    model = families.build("llama").to(dtype)
    dense = copy.deepcopy(model)
    result = prune(model, criterion="wanda")
    a, b = last_states(dense, ids()), last_states(model, ids())
    told = result.errors[result.errors.block == 2].nmse.iloc[0]
    assert told == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=0.05)


# Which blocks


def vision_model(text: int, vision: int) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    values = {
        "text_config": {**families.GROUPED, "num_hidden_layers": text, "rope_parameters": rope},
        "vision_config": {
            "depth": vision, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
    }  # fmt: skip
    return build("Qwen2_5_VLConfig", values, transformers.AutoModelForImageTextToText)


@pytest.mark.parametrize(("text", "vision"), [(3, 2), (2, 3), (2, 2)])
def test_the_text_decoder_is_pruned_and_the_vision_tower_is_not(text: int, vision: int) -> None:
    model = vision_model(text, vision)
    dense = copy.deepcopy(model)
    result = prune(model, criterion="wanda", technique="BR+GP")
    assert sorted(set(result.errors.block)) == [*range(text)]
    a, b = last_states(dense, ids()), last_states(model, ids())
    assert result.errors.nmse.iloc[-1] == pytest.approx(float((a - b).square().sum() / a.square().sum()), rel=1e-3)
    for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
        if "visual" in name:
            assert torch.equal(p, q), name
        elif name.endswith("_proj.weight"):
            assert zeros(p) == pytest.approx(0.5, abs=0.02), name


def test_parameters_that_blocks_share_are_refused() -> None:
    model = families.build("llama")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.\w+\.weight and model\.layers\.2\.mlp\.\w+\.weight are one parameter"):
        prune(model)
    tied = families.build("llama")
    tied.model.layers[1].mlp.up_proj.weight = tied.model.layers[1].mlp.gate_proj.weight  # inside one block: pruned once
    prune(tied, criterion="magnitude", technique="BR+GP")
    assert tied.model.layers[1].mlp.up_proj.weight is tied.model.layers[1].mlp.gate_proj.weight
    assert zeros(tied.model.layers[1].mlp.up_proj.weight) == 0.5


# Adapters and computed weights


def with_adapters() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(families.build("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.05)
    return model.eval()


def test_adapters_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    model = with_adapters()
    tokenizer = rk.load_model("tiny")[1]
    for refused in (lambda: prune(model), lambda: rk.save_model(model, tokenizer, tmp_path / "adapters")):
        with pytest.raises(ConfigError, match=r"PEFT adapters.*model = model\.merge_and_unload\(\)"):
            refused()
    assert not (tmp_path / "adapters").exists()
    merged = model.merge_and_unload()
    prune(merged, technique="BR+GP")
    rk.save_model(merged, tokenizer, tmp_path / "pruned")
    saved = load_file(tmp_path / "pruned" / "model.safetensors")
    assert all(zeros(w) == pytest.approx(0.5, abs=0.02) for name, w in saved.items() if name.endswith("_proj.weight"))


def test_adapters_inside_a_plain_model_are_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), families.build("llama"))
    with pytest.raises(ConfigError, match=r"PEFT adapters \(model\.layers\.0\.self_attn\.q_proj.*PeftModel\.from_pretrained"):
        prune(model)


def test_weights_that_are_computed_are_refused_and_the_way_out_works() -> None:
    from torch.nn.utils import prune as torch_prune

    model = families.build("llama")
    layer = model.model.layers[1].mlp.up_proj
    torch_prune.l1_unstructured(layer, "weight", amount=0.5)
    with pytest.raises(ConfigError, match=r"mlp\.up_proj\.weight is computed by Linear.*prune\.remove"):
        prune(model)
    torch_prune.remove(layer, "weight")
    before = layer.weight == 0
    prune(model, technique="BR+GP", layers=("self_attn.*",))
    assert (layer.weight[before] == 0).all(), "and its zeros stay"


# Experts and other products


def groups_kept(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The most weights left in a group of `size` along the input, (..., in, out)."""
    return (weight.unflatten(-2, (-1, size)) != 0).sum(-2).max()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", [("Llama4TextConfig", LLAMA4), ("GptOssConfig", {**LLAMA4, "num_experts_per_tok": 2})])
def test_experts_stored_as_in_out_are_pruned_along_their_inputs(criterion: str, kind: tuple[str, dict[str, Any]]) -> None:
    model = build(*kind)
    prune(model, ids(40, 32), criterion=criterion, pattern="2:4")
    for block in models.blocks(model)[1]:
        experts = next(m for m in block.modules() if type(m).__name__.endswith("Experts"))
        for weight in (experts.gate_up_proj, experts.down_proj):
            assert groups_kept(weight, 4) == 2 and zeros(weight) == 0.5


def test_wanda_of_batched_experts_uses_the_inputs_of_each_expert() -> None:
    model = build("Llama4TextConfig", LLAMA4)
    experts, samples, caught = model.model.layers[0].feed_forward.experts, ids(40, 32), []
    dense = experts.gate_up_proj.detach().clone()  # (experts, in, out)
    handle = experts.register_forward_pre_hook(lambda _, args: caught.append(args[0].view(4, -1, 32)))
    with torch.no_grad():
        model(input_ids=samples, use_cache=False)
    handle.remove()
    scores = dense.abs() * caught[0].square().sum(1).sqrt()[:, :, None]
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :16], True)  # half of each output's inputs
    prune(model, samples, criterion="wanda", batch_size=8)
    assert ((experts.gate_up_proj == 0) == expected).float().mean() > 0.999


def test_mambas_left_product_has_its_statistics() -> None:
    model, samples = build("MambaConfig", MAMBA), ids()
    mixer, caught = model.backbone.layers[0].mixer, []
    dense = mixer.dt_proj.weight.detach().clone()
    handle = mixer.x_proj.register_forward_hook(lambda _, __, out: caught.append(out[..., :4].reshape(-1, 4)))
    with torch.no_grad():
        model(input_ids=samples, use_cache=False)
    handle.remove()
    scores = dense.abs() * caught[0].square().sum(0).sqrt()
    expected = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :2], True)
    prune(model, samples, criterion="wanda")
    assert torch.equal(mixer.dt_proj.weight == 0, expected)


class Hidden(nn.Linear):
    """A linear layer whose product cannot be watched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


def with_hidden_product() -> nn.Module:
    model = families.build("llama")
    for block in model.model.layers:
        old = block.mlp.up_proj
        block.mlp.up_proj = Hidden(old.in_features, old.out_features, bias=False)
        block.mlp.up_proj.weight = old.weight
    return model


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_product_that_cannot_be_watched_is_refused_and_the_advice_works(criterion: str) -> None:
    model = with_hidden_product()
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.up_proj is not used in a matrix product.*layers=") as raised:
        prune(model, criterion=criterion)
    layers = eval(str(raised.value).split("layers=")[1].rstrip("."))
    prune(model, criterion=criterion, layers=layers, technique="BR+GP")
    assert zeros(model.model.layers[0].mlp.up_proj.weight) == 0 and zeros(model.model.layers[0].mlp.down_proj.weight) == pytest.approx(0.5, abs=0.02)


class InTwoParts(nn.Linear):
    """A linear layer that multiplies with slices of its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half = len(self.weight) // 2
        return torch.cat([torch.nn.functional.linear(x, self.weight[:half]), torch.nn.functional.linear(x, self.weight[half:])], -1)


def test_a_layer_that_is_used_in_slices_keeps_its_layout() -> None:
    model = families.build("llama")
    for block in model.model.layers:
        old = block.mlp.up_proj
        block.mlp.up_proj = InTwoParts(old.in_features, old.out_features, bias=False)
        block.mlp.up_proj.weight = old.weight
    prune(copy.deepcopy(model), criterion="magnitude", pattern="2:4")
    pruned = copy.deepcopy(model)
    prune(pruned, criterion="magnitude", pattern="2:4")
    assert groups_kept(pruned.model.layers[0].mlp.up_proj.weight.T, 4) == 2
    with pytest.raises(ConfigError, match=r"up_proj is not used in a matrix product that can be watched.*layers="):
        prune(model, criterion="wanda")


def test_magnitude_needs_no_inputs() -> None:
    model = with_hidden_product()
    prune(model, criterion="magnitude", pattern="2:4")
    assert groups_kept(model.model.layers[0].mlp.up_proj.weight.T, 4) == 2


class Experts(nn.Module):
    """Experts in linear layers of their own; the last two never get a token."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = (x.sum(-1, keepdim=True) > 0).to(x.dtype)
        return first * self.experts[0](x) + (1 - first) * self.experts[1](x)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("technique", ["LR", "BR+GP"])
def test_linear_experts_without_a_token_are_pruned_by_magnitude(criterion: str, technique: str) -> None:
    model = families.build("llama")
    for block in model.model.layers:
        block.mlp = Experts(block.mlp)
    expected = criteria.magnitude_mask(model.model.layers[0].mlp.experts[3].up_proj.weight.detach(), 0.5)
    result = prune(model, criterion=criterion, technique=technique)
    for block in model.model.layers:
        for expert in block.mlp.experts:
            assert all(zeros(getattr(expert, name).weight) == pytest.approx(0.5, abs=0.02) for name in ("up_proj", "gate_proj", "down_proj"))
    assert torch.equal(model.model.layers[0].mlp.experts[3].up_proj.weight != 0, expected)
    said = "Block 0, mlp.experts.3.up_proj: 0 tokens for 32 columns, so its mask is by magnitude."
    assert (said in result.notes) == (criterion != "magnitude")


def test_experts_whose_layout_nothing_shows_are_refused_where_it_matters() -> None:
    model = build("MixtralConfig", {**families.GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2})
    for block in model.model.layers:
        block.mlp.experts.forward = lambda hidden, *_: hidden
    for values in ({"criterion": "wanda"}, {"criterion": "magnitude", "pattern": "2:4"}):
        with pytest.raises(ConfigError, match=r"experts\.\w+\.0 is not used in a matrix product.*layers="):
            prune(model, **values)
    prune(model, criterion="magnitude")
    assert zeros(model.model.layers[0].mlp.experts.down_proj) == 0.5


# Zeros of an earlier pruning


def two_stages(tmp_path: Path, first: dict[str, Any], second: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The second result, and the saved tensors after both prunings, through the files as a user has them."""
    model, tokenizer = rk.load_model("tiny", device="cpu")
    samples = torch.randint(3, 250, (8, 32), generator=torch.Generator().manual_seed(0))
    rk.prune(model, samples, quick(technique="BR+GP", **first), progress=False)
    rk.save_model(model, tokenizer, tmp_path / "first")
    model, _ = rk.load_model(str(tmp_path / "first"), device="cpu")
    result = rk.prune(model, samples, quick(technique="BR+GP", **second), progress=False)
    rk.save_model(model, tokenizer, tmp_path / "second")
    return result, load_file(tmp_path / "second" / "model.safetensors")


def share(weights: dict[str, torch.Tensor], part: str) -> float:
    found = [w for name, w in weights.items() if part in name and w.ndim == 2]
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("first", [{"pattern": "2:4"}, {"pattern": "3:4"}, {"sparsity": 0.4}])
def test_zeros_stay_in_matrices_that_this_call_does_not_prune(criterion: str, first: dict[str, Any], tmp_path: Path) -> None:
    result, weights = two_stages(tmp_path, {"layers": "attention", **first}, {"layers": "feed-forward", "criterion": criterion})
    asked = {"2:4": 0.5, "3:4": 0.25}.get(first.get("pattern", ""), 0.4)
    assert share(weights, "self_attn") == pytest.approx(asked, abs=0.01) and share(weights, ".mlp.") == pytest.approx(0.5, abs=0.01)
    assert any("Zeros of an earlier pruning stay zero in 16 matrices" in note for note in result.notes)
    total = sum(int((w == 0).sum()) for name, w in weights.items() if "layers" in name and w.ndim == 2)
    assert result.sparsity == pytest.approx(total / sum(w.numel() for name, w in weights.items() if "layers" in name and w.ndim == 2), abs=1e-3)


def test_zeros_change_where_that_is_asked_for(tmp_path: Path) -> None:
    first = {"layers": "attention", "pattern": "2:4"}
    _, weights = two_stages(tmp_path, first, {"layers": "feed-forward", "keep_zeros": False})
    assert share(weights, "self_attn") < 0.01
    model = families.build("llama")
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight.data[torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.1] = 0  # few, and in no pattern
    before = layer.weight == 0
    for keep in (True, "auto"):
        trained = copy.deepcopy(model)
        prune(trained, technique="BR", layers="feed-forward", keep_zeros=keep)
        after = trained.model.layers[0].self_attn.q_proj.weight[before] == 0
        assert after.all() if keep is True else not after.any()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("technique", ["LR", "BR+GP+CR"])
def test_earlier_zeros_count_towards_the_group_and_more_of_them_all_stay(criterion: str, technique: str) -> None:
    model = families.build("llama")
    layer = model.model.layers[1].mlp.up_proj
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.rand(layer.weight.shape, generator=generator) < p for p in (0.35, 0.7))
    for earlier, at_least in ((few, 0.5), (many, float(many.float().mean()))):
        again = copy.deepcopy(model)
        weight = again.model.layers[1].mlp.up_proj.weight
        weight.data[earlier] = 0
        result = prune(again, criterion=criterion, technique=technique)
        assert (weight[earlier] == 0).all()
        spread = 0.02 if earlier is few and criterion == "wanda" else 0.001
        assert zeros(weight) >= at_least - 1e-6 and (earlier is many or zeros(weight) <= 0.5 + 0.1 + spread)
        assert result.sparsity >= 0.5 - 1e-6


@pytest.mark.parametrize("criterion", CRITERIA)
def test_earlier_zeros_inside_a_pattern(criterion: str) -> None:
    model = families.build("llama")
    weight = model.model.layers[0].mlp.down_proj.weight
    weight.data[:, 0::4] = 0
    prune(model, criterion=criterion, pattern="2:4", technique="BR+GP")
    weight = model.model.layers[0].mlp.down_proj.weight
    assert (weight[:, 0::4] == 0).all() and groups_kept(weight.T, 4) == 2 and zeros(weight) == 0.5


def test_zeros_of_matrices_that_are_never_pruned_stay_too() -> None:
    model = build("MixtralConfig", {**families.GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2})
    router = model.model.layers[0].mlp.gate.weight
    router.data[:, ::2] = 0
    prune(model, technique="BR+GP", criterion="magnitude")
    assert (router[:, ::2] == 0).all() and (router[:, 1::2] != 0).all()


def test_what_counts_as_pruned_before() -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    assert not criteria.pruned_before(weight)
    for m in (2, 4, 8, 16, 3):
        pattern = weight.clone()
        pattern[:, ::m] = 0
        assert criteria.pruned_before(pattern), f"{m - 1}:{m}"
    quantised = (weight * 4).round()  # one step of a 4-bit format: about a tenth is zero
    assert 0.05 < zeros(quantised) < 0.2 and not criteria.pruned_before(quantised)
    dense_column = weight.clone()
    dense_column[:, :20] = 0
    assert not criteria.pruned_before(dense_column)


# What comes in


def test_what_is_no_configuration_and_no_mapping_is_refused() -> None:
    model = families.build("llama")
    with pytest.raises(ConfigError, match=r"config is a dict; it must be a PruneConfig, such as rk\.PruneConfig\(\*\*values\)"):
        rk.prune(model, ids(), {"criterion": "wanda"}, progress=False)
    with pytest.raises(ConfigError, match=r'held_out is a Tensor; it must be a mapping of names to samples, such as \{"wiki": samples\}'):
        rk.prune(model, ids(), quick(), held_out=ids(2), progress=False)


def test_several_processes_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="torchrun's number of processes is 2; it must be 1: one process prunes one model"):
        prune(families.build("llama"))
    assert cli.main(["prune", "--model", "tiny", "--corpus", "pydocs", "--out", str(tmp_path / "out")]) == 2
    assert "torchrun" in capsys.readouterr().err and not (tmp_path / "out").exists()


def overflowing() -> nn.Module:
    model = families.build("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(3e3)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(3e3)
    return model


@pytest.mark.parametrize("technique", ["LR", "BR+GP"])
def test_float16_that_overflows_is_told_what_helps(technique: str) -> None:
    for values in ({}, {"precision": "fp32"}, {"learning_rate": 1e-9}):
        with pytest.raises(FloatingPointError, match="load the model in float32 or bfloat16"):
            prune(overflowing().half(), technique=technique, criterion="wanda", **values)
    for dtype in (torch.float32, torch.bfloat16):
        assert prune(overflowing().to(dtype), technique=technique, criterion="wanda").errors.nmse.notna().all()


@pytest.mark.parametrize(
    ("epoch", "precision", "dtype", "way"),
    [
        (0, "fp32", torch.float16, "load the model in float32 or bfloat16, whose range is larger than float16's."),
        (0, "fp32", torch.float32, "look at the model's weights and at the samples."),
        (0, "fp16", torch.float32, "use precision bf16 or fp32."),
        (3, "fp16", torch.float32, "use precision bf16 or fp32, and lower learning_rate."),
        (3, "fp32", torch.float32, "lower learning_rate."),
    ],
)
def test_the_advice_for_a_loss_that_is_not_finite_fits_its_cause(epoch: int, precision: str, dtype: torch.dtype, way: str) -> None:
    with pytest.raises(FloatingPointError) as raised:
        reconstruct._finite([(epoch, "calibration", float("inf"))], "block 1", precision, dtype)
    assert str(raised.value) == f"The loss on calibration of block 1 is inf in epoch {epoch}; {way}"
