"""Text that a model writes itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reconkit import data, models, selfgen
from reconkit.config import ConfigError


@pytest.fixture
def tiny() -> tuple:
    return models.load_model("tiny")


def test_shape_seed_and_the_callers_random_state(tiny: tuple) -> None:
    state = torch.get_rng_state()
    a, b, c = (selfgen.self_generate(*tiny, count=5, length=20, seed=seed, batch_size=4, progress=False) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert a.shape == (5, 20) and a.dtype == torch.long
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert not set(a.flatten().tolist()) & set(tiny[1].all_special_ids), "texts that ended early are dropped"


def test_four_tokens_are_greedy_and_the_rest_is_sampled(tiny: tuple) -> None:
    model, _ = tiny
    found = selfgen.self_generate(*tiny, count=8, length=16, batch_size=8, progress=False)
    with torch.no_grad():
        best = model(found).logits.argmax(-1)
    assert torch.equal(found[:, 1:5], best[:, :4])
    assert not torch.equal(found[:, 5:], best[:, 4:-1])
    assert len(set(found[:, 0].tolist())) > 1, "first tokens are drawn from the vocabulary"


def test_what_keep_refuses_is_written_anew_and_giving_up_is_said(tiny: tuple) -> None:
    free = selfgen.self_generate(*tiny, count=4, length=12, batch_size=4, progress=False)
    refused = tiny[1].decode(free[0])
    found = selfgen.self_generate(*tiny, count=4, length=12, batch_size=4, keep=lambda text: text != refused, progress=False)
    assert torch.equal(found[:3], free[1:])
    with pytest.raises(RuntimeError, match="only 0 of 2"):
        selfgen.self_generate(*tiny, count=2, length=12, batch_size=2, keep=lambda text: False, progress=False)


@pytest.mark.parametrize(("count", "length"), [(0, 20), (2, 5), (2, 10_000)])
def test_impossible_sizes(tiny: tuple, count: int, length: int) -> None:
    with pytest.raises(ConfigError):
        selfgen.self_generate(*tiny, count=count, length=length, progress=False)


def test_a_file_of_it_loads_as_the_same_samples(tiny: tuple, tmp_path: Path) -> None:
    model, tokenizer = tiny
    samples = selfgen.self_generate(model, tokenizer, count=4, length=16, batch_size=4, progress=False)
    file = selfgen.write_jsonl(tmp_path / "new" / "self.jsonl", samples, tokenizer)
    assert [p.name for p in file.parent.iterdir()] == ["self.jsonl"]
    assert torch.equal(data.load_samples(str(file), tokenizer, count=None, length=16), samples)
