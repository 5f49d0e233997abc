"""Calibration against held-out samples: where the error of a pruned model stops being the error that it was trained on."""

from __future__ import annotations

from typing import Any

import pandas as pd

TRAINED = ("calibration", "extra")
WATCH, OVERFITTING = 1.75, 3.0
"""Held-out over calibration NMSE of the final block. Masks chosen on the calibration samples alone give about 1.1 to 1.6
(statistics of few tokens fit them best); each further technique adds to it, and an error three times as large on new
text says that most of what reconstruction won there was won on the calibration samples only."""
RISING = 0.02
"A held-out loss counts as rising when it ends this much (relative) above its lowest epoch."
MANY = 0.25
"Share of the windows whose held-out loss must rise for a remark."


def ratios(errors: pd.DataFrame) -> pd.DataFrame:
    """Per block and held-out source: block, source, nmse, calibration (its NMSE), ratio."""
    calibration = errors[errors.source == "calibration"].set_index("block").nmse
    held = errors[~errors.source.isin(TRAINED)].copy()
    held["calibration"] = held.block.map(calibration)
    held["ratio"] = held.nmse / held.calibration
    return held[["block", "source", "nmse", "calibration", "ratio"]].reset_index(drop=True)


def rising(training: pd.DataFrame) -> list[str]:
    """Windows whose mean held-out loss ended above its lowest epoch while the training loss fell."""
    found = []
    for window, part in training.groupby("window", sort=False):
        held = part[~part.source.isin(TRAINED)].groupby("epoch").loss.mean()
        own = part[part.source == "calibration"].set_index("epoch").loss
        if len(held) > 1 and held.iloc[-1] > (1 + RISING) * held.min() and own.iloc[-1] < own.iloc[0]:
            found.append(str(window))
    return found


def verdict(run_or_result: Any) -> tuple[str, list[str]]:
    """("fine" | "watch" | "overfitting", reasons) from a run's or a result's `errors` and `training`.

    Only the error relative to its stream and the held-out losses are looked at; a low error that holds on new text is fine
    however low it is.
    """
    errors, training = run_or_result.errors, run_or_result.training
    if errors.empty:
        return "fine", ["nothing was pruned"]
    table = ratios(errors)
    if table.empty:
        return "watch", ["no held-out samples were measured, so nothing can be said"]
    final = table[table.block == table.block.max()]
    if final[["nmse", "calibration"]].isna().any(axis=None):
        return "watch", ["the final error is not a number, so nothing can be said"]
    if (final.nmse == 0).all():
        return "fine", ["the final error is zero"]
    worst = final.loc[final.ratio.idxmax()]
    said = f"the final error on {worst.source} is {worst.ratio:.2f} times that on the calibration samples"
    up, windows = rising(training), training.window.nunique()
    reasons = [said]
    if windows and len(up) >= MANY * windows:
        reasons.append(f"the held-out loss rose again in {len(up)} of {windows} windows (first: {up[0]})")
    if worst.ratio >= OVERFITTING:
        return "overfitting", reasons
    return ("watch", reasons) if worst.ratio >= WATCH or len(reasons) > 1 else ("fine", reasons)
