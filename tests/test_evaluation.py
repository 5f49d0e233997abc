"""Measurements against their slow twins."""

from __future__ import annotations

import math
import statistics

import families
import pytest
import reference
import torch

from reconkit import evaluation, models, pruning, zeroshot
from reconkit.config import ConfigError, PruneConfig


@pytest.fixture
def tiny() -> tuple:
    return models.load_model("tiny")


def tokens(count: int = 6, length: int = 20) -> torch.Tensor:
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(0))


def test_perplexity_equals_its_twin_and_does_not_depend_on_batches(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny
    expected = reference.perplexity(model, tokens())
    for batch_size in (1, 4, 8):
        assert evaluation.perplexity(model, tokens(), batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(evaluation, "LOGITS", 1)
    assert evaluation.perplexity(model, tokens()) == pytest.approx(expected, rel=1e-5)


COHERE = ("CohereConfig", {**families.GROUPED, "logit_scale": 0.3})
CAPPED = ("Gemma2Config", {**families.GROUPED, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0})
SLICED = [
    "llama", "capped", "cohere", "granite", "gemma3 (sliding and full layers)", "gpt2 (Conv1D)", "opt (biases, learned positions)", "bloom (alibi)",
    *families.STATES,
]  # fmt: skip


@pytest.fixture
def sliced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple:
    """A model, and how many logits its output embedding returned in each call; seven tokens' may be held."""
    monkeypatch.setitem(families.ALL, "cohere", COHERE)
    monkeypatch.setitem(families.ALL, "capped", CAPPED)
    model, seen = families.build(request.param), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: seen.append(logits.numel()))
    monkeypatch.setattr(evaluation, "LOGITS", 7 * families.VOCABULARY)
    return model, seen


@pytest.mark.parametrize("sliced", SLICED, indirect=True)
def test_logits_are_computed_in_slices_that_equal_one_forward(sliced: tuple) -> None:
    model, seen = sliced
    ids = families.tokens(3, 20)
    with torch.no_grad():
        expected = [torch.nn.functional.cross_entropy(model(row[None], use_cache=False).logits[0, :-1].double(), row[1:]) for row in ids]
    seen.clear()
    assert torch.allclose(evaluation.sequence_nll(model, ids), torch.stack(expected), atol=1e-6)
    assert len(seen) == 9 and max(seen) == evaluation.LOGITS


@pytest.mark.parametrize("sliced", ["llama", "capped", "bamba"], indirect=True)
def test_cloze_computes_the_logits_of_its_blanks_alone(sliced: tuple) -> None:
    model, seen = sliced
    generator = torch.Generator().manual_seed(0)
    ids, at = families.tokens(4, 20), torch.stack([torch.arange(44) % 3, torch.randint(1, 20, (44,), generator=generator)], 1)
    items = torch.cat([at, torch.randint(3, families.VOCABULARY, (44, 4), generator=generator)], 1)
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits[items[:, 0], items[:, 1] - 1].gather(1, items[:, 2:])
    expected = scores.argmax(1) == 0
    seen.clear()
    assert torch.equal(evaluation.cloze(model, ids, items), expected) and 0 < expected.sum() < 44
    assert sum(seen) == 44 * families.VOCABULARY and max(seen) <= evaluation.LOGITS, "and no forward for the sample without a blank"


@pytest.mark.parametrize("sliced", ["llama"], indirect=True)
def test_a_model_that_calls_no_output_embedding_is_read_by_one_plain_forward(sliced: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = sliced
    expected = evaluation.sequence_nll(model, families.tokens(3, 20))
    seen.clear()
    for head in (None, torch.nn.Linear(32, families.VOCABULARY)):
        monkeypatch.setattr(model, "get_output_embeddings", lambda head=head: head)
        assert torch.allclose(evaluation.sequence_nll(model, families.tokens(3, 20)), expected, atol=1e-6)
    assert seen == [20 * families.VOCABULARY] * 6


@pytest.mark.parametrize("family", ["llama", "gemma3 (sliding and full layers)", *families.STATES])
def test_what_a_model_writes_on_is_what_it_finds_likeliest(family: str) -> None:
    """Each token has the largest logit of a forward over all tokens before it, whatever the family keeps between tokens."""
    model, prompts = families.build(family), families.tokens(2, 8)
    model.generation_config.eos_token_id = None
    for prompt, row in zip(prompts, evaluation.generations(model, models.load_model("tiny")[1], prompts, tokens=6), strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, torch.tensor(row["tokens"])])[None], use_cache=False).logits[0, 7:-1]
        assert logits.argmax(1).tolist() == row["tokens"]


@pytest.mark.parametrize("family", families.STATES)
def test_every_family_is_timed(family: str) -> None:
    found = evaluation.latency({"it": families.build(family)}, batch_sizes=(2,), length=8, tokens=3, repeats=1)
    assert (found.value > 0).all() and len(found) == 3


def test_interval_is_that_of_the_mean_over_sequences() -> None:
    nll = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4 + 3
    low, high = evaluation.perplexity_interval(nll)
    half = 1.959964 * float(nll.std()) / 20
    assert (low, high) == pytest.approx((math.exp(float(nll.mean()) - half), math.exp(float(nll.mean()) + half)), rel=0.005)
    assert evaluation.perplexity_interval(nll) == (low, high), "resamples are seeded"
    assert evaluation.perplexity_interval(nll[:1]) == (0, math.inf), "one sequence says nothing about the spread"


def test_bootstrap_follows_the_skew_of_the_sequences() -> None:
    low, high = evaluation.bootstrap(torch.tensor([1.0] * 15 + [9.0]))
    assert low == 1 and high - 1.5 > 1.5 - low


def test_a_paired_ratio_is_narrower_than_two_intervals() -> None:
    nll = torch.linspace(2, 5, 20, dtype=torch.float64)
    ratio, low, high = evaluation.perplexity_ratio(nll + 0.1, nll)
    assert (ratio, low, high) == pytest.approx((math.exp(0.1),) * 3)


def test_a_broken_model_has_an_infinite_perplexity() -> None:
    nll = torch.tensor([10.0, 2000.0], dtype=torch.float64)
    assert evaluation.perplexity_interval(nll) == (pytest.approx(math.exp(10)), math.inf)
    assert evaluation.perplexity_ratio(nll, nll - 1000) == (math.inf,) * 3


def test_too_short_sequences_are_refused(tiny: tuple) -> None:
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        evaluation.perplexity(tiny[0], tokens(3, 1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"perplexity": ["pydocs"], "length": 513}, "The test text has 513 tokens a sample, more than the model's context of 512"),
        ({"texts": {"own": tokens(2, 600)}}, r"texts\[own\] has 600"),
        ({"blanks": (tokens(2, 600), tokens(2, 6))}, "The text of the cloze items has 600"),
        ({"prompts": tokens(2, 500)}, "written after it has 548"),
    ],
)
def test_text_beyond_the_context_is_refused_before_anything_is_measured(
    options: dict, named: str, tiny: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "size", lambda model: pytest.fail("measured first"))
    with pytest.raises(ConfigError, match=named):
        evaluation.evaluate(*tiny, **{"perplexity": [], **options})


@pytest.mark.parametrize("family", ["llama", "gpt2 (Conv1D)", "opt (biases, learned positions)"])
def test_every_reader_refuses_text_beyond_the_context(family: str, tiny: tuple) -> None:
    model, items = families.build(family), torch.tensor([[0, 4, 5, 6]])
    readers = (
        lambda ids: evaluation.sequence_nll(model, ids),
        lambda ids: evaluation.perplexity(model, ids),
        lambda ids: evaluation.cloze(model, ids, items),
        lambda ids: evaluation.generations(model, tiny[1], ids, tokens=0),
    )
    for read in readers:
        with pytest.raises(ConfigError, match="has 65 tokens a sample, more than the model's context of 64"):
            read(families.tokens(2, 65))
    assert float(evaluation.sequence_nll(model, families.tokens(2, 64)).mean()) > 0
    with pytest.raises(ConfigError, match="speed measurement has 160 tokens"):
        evaluation.evaluate(model, tiny[1], perplexity=[], speed=True)


def test_the_record_refuses_before_it_measures(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "sequence_nll", lambda *args, **options: pytest.fail("measured first"))
    with pytest.raises(ConfigError, match="chess"):
        evaluation.evaluate(*tiny, perplexity=["pydocs"], count=2, length=16, tasks=["chess"])
    monkeypatch.setattr(zeroshot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"reconkit\[eval\]"):
        evaluation.evaluate(*tiny, perplexity=["pydocs"], count=2, length=16, tasks=["boolq"])


def test_size_counts_zeros_and_promises_no_byte(tiny: tuple) -> None:
    model, _ = tiny
    before = evaluation.size(model)
    for view in models.weight_views(models.blocks(model)[1][0])[0]:
        view.get().zero_()
    after = evaluation.size(model)
    assert before["zeros"] == 0 and after["zeros"] == 0.25 and after["bytes"] == before["bytes"] == 4 * before["parameters"]


def test_the_record_holds_everything_that_was_asked_for(tiny: tuple) -> None:
    model, tokenizer = tiny
    record = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32, against=model, speed=True, speed_batches=(1, 2))
    [row] = record["perplexity"]
    assert row["low"] < row["value"] < row["high"] and len(row["nll"]) == 5 and row["tokens"] == 5 * 31
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (1, 1, 1)
    assert {(r["model"], r["batch"]) for r in record["speed"]} == {(m, b) for m in ("this", "against") for b in (1, 2)}
    assert (row["dtype"], row["device"]) == ("float32", model.device.type) and row["data"].startswith("pydocs test")
    assert record["zero_shot"] == [] and record["cost"]["seconds"] > 0
    same = evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32)
    assert same["speed"] == [] and same["fingerprint"] == record["fingerprint"]
    model.lm_head.weight.data[0, 0] += 1
    assert evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=5, length=32)["fingerprint"] != record["fingerprint"]


def test_the_wrong_model_is_never_scored(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    result = pruning.prune(model, tokens(4, 16), PruneConfig(technique="LR"), progress=False)
    evaluation.evaluate(model, tokenizer, perplexity=["pydocs"], count=2, length=16, sparsity=result.sparsity)
    monkeypatch.setattr(evaluation, "sequence_nll", lambda *args, **options: pytest.fail("scored"))
    for other, sparsity in ((models.load_model("tiny")[0], 0.5), (model, 0.2)):
        with pytest.raises(RuntimeError, match="another model, or its masks"):
            evaluation.evaluate(other, tokenizer, perplexity=["pydocs"], count=2, length=16, sparsity=sparsity)


def test_the_packed_size_and_what_a_million_tokens_cost(tiny: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    pruning.prune(model, tokens(4, 16), PruneConfig(technique="LR", sparsity=0.75), progress=False)
    options = {"perplexity": [], "packed": True, "speed": True, "speed_batches": (2,), "price_per_hour": 3.6}
    record = evaluation.evaluate(model, tokenizer, **options)
    assert record["size"]["packed_bytes"] < 0.6 * record["size"]["plain_bytes"]
    speed = next(r["value"] for r in record["speed"] if r["measure"] == "decode_tokens_per_second")
    assert record["cost"]["million_tokens/2"] == pytest.approx(1e6 / speed * 0.001)
    assert record["cost"]["money"] == pytest.approx(record["cost"]["seconds"] * 0.001)
    monkeypatch.setattr(evaluation.packing, "unpack", lambda file: {})
    with pytest.raises(RuntimeError, match="came back changed"):
        evaluation.evaluate(model, tokenizer, perplexity=[], packed=True)


def test_mean_interval_is_students() -> None:
    mean, low, high = evaluation.mean_interval([1.0, 2.0, 4.0])
    half = 4.302653 * statistics.stdev([1.0, 2.0, 4.0]) / 3**0.5
    assert (mean, low, high) == pytest.approx((7 / 3, 7 / 3 - half, 7 / 3 + half), rel=1e-6)
    assert evaluation.mean_interval([2.0]) == (2.0, -math.inf, math.inf)
