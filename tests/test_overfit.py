"""Verdicts on made tables, and on a real result."""

from __future__ import annotations

from types import SimpleNamespace

import families
import pandas as pd
import pytest

from reconkit import overfit, pruning
from reconkit.config import PruneConfig


def result(calibration: float, held_out: dict[str, float], held_losses: list[float] | None = None) -> SimpleNamespace:
    rows = [(b, s, v, v / 10 * (b + 1)) for b in (0, 1) for s, v in {"calibration": calibration, **held_out}.items()]
    losses = held_losses or [1.0, 0.9, 0.8]
    training = [(w, e, s, v) for w in "01" for s, seq in (("calibration", [1.0, 0.8, 0.6]), ("wiki", losses)) for e, v in enumerate(seq)]
    return SimpleNamespace(
        errors=pd.DataFrame(rows, columns=["block", "source", "mse", "nmse"]),
        training=pd.DataFrame(training, columns=["window", "epoch", "source", "loss"]),
    )


@pytest.mark.parametrize(
    ("held_out", "losses", "word"),
    [
        ({"wiki": 1.2}, None, "fine"),
        ({"wiki": 1.2, "news": 2.0}, None, "watch"),
        ({"wiki": 1.2, "news": 3.5}, None, "overfitting"),
        ({"wiki": 1.2}, [1.0, 0.7, 0.9], "watch"),
        ({"wiki": 0.9}, [1.0, 0.7, 0.705], "fine"),
    ],
)
def test_verdict(held_out: dict[str, float], losses: list[float] | None, word: str) -> None:
    found, reasons = overfit.verdict(result(1.0, held_out, losses))
    assert found == word
    worst = max(held_out, key=held_out.get)
    assert worst in reasons[0] and f"{held_out[worst]:.2f}" in reasons[0]


def test_a_low_error_that_holds_is_fine_however_low() -> None:
    assert overfit.verdict(result(1e-6, {"wiki": 1.1e-6}))[0] == "fine"


def test_errors_of_zero_and_errors_that_are_no_numbers_have_a_verdict() -> None:
    assert overfit.verdict(result(0.0, {"wiki": 0.0})) == ("fine", ["the final error is zero"])
    for calibration, wiki in ((float("nan"), 1.0), (1.0, float("nan"))):
        word, [reason] = overfit.verdict(result(calibration, {"wiki": wiki}))
        assert word == "watch" and "not a number" in reason


def test_without_held_out_samples_nothing_can_be_said() -> None:
    found, [reason] = overfit.verdict(result(1.0, {}))
    assert found == "watch" and "no held-out samples" in reason


def test_a_dense_run_is_fine() -> None:
    empty = SimpleNamespace(
        errors=pd.DataFrame(columns=["block", "source", "mse", "nmse"]), training=pd.DataFrame(columns=["window", "epoch", "source", "loss"])
    )
    assert overfit.verdict(empty) == ("fine", ["nothing was pruned"])


def test_ratios_and_rising_windows() -> None:
    table = overfit.ratios(result(2.0, {"wiki": 3.0}).errors)
    assert list(table.columns) == ["block", "source", "nmse", "calibration", "ratio"] and table.ratio.tolist() == pytest.approx([1.5, 1.5])
    assert overfit.rising(result(1, {"wiki": 1}, [1.0, 0.7, 0.9]).training) == ["0", "1"]
    assert overfit.rising(result(1, {"wiki": 1}, [1.0, 0.7, 0.5]).training) == []


def test_a_handful_of_samples_trained_for_long_is_called_overfitting() -> None:
    model = families.build("llama")
    config = PruneConfig(technique="BR+GP+CR", epochs=150, batch_size=2, learning_rate=2e-3)
    found = pruning.prune(model, families.tokens(2, 8), config, held_out={"new": families.tokens(8, 8, 1)}, progress=False)
    assert overfit.verdict(found)[0] == "overfitting"
