"""Results stay what they were: the committed guard values, within what processors round differently."""

from __future__ import annotations

import json

import guard
import numpy as np
import pytest

VALUES = json.loads(guard.VALUES.read_text())


@pytest.mark.parametrize("case", guard.CASES, ids=guard.name)
def test_a_pruning_gives_its_guard_values(case: tuple[str, str, str]) -> None:
    model, result = guard.prune(case)
    found, expected = guard.values(model, result), VALUES[guard.name(case)]
    assert found["zeros"] == expected["zeros"]
    for name in ("nmse", "token_nmse", "loss", "perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name
    if case in guard.MASKED:
        with np.load(guard.MASKS) as masks:
            kept = guard.mask(model)
            assert (np.unpackbits(masks[guard.name(case)], count=kept.size).astype(bool) == kept).mean() >= 0.999
