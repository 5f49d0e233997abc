"""Calibration against held-out samples: where the error of a pruned model stops being the error that it was trained on.

Everything here is a function of two tables, `errors` (block, source, mse, nmse, and token_nmse where it was measured) and `training`
(window, epoch, source, loss), so that it works while `prune` runs, on its result, and on any record. The error ratio is the held-out
error divided by the calibration error: of the NMSE, which decides the verdict, and beside it of the median token NMSE.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from . import statistics
from .config import OverfitConfig, PruneConfig, to_dict

TRAINED = ("calibration", "extra")
HELD = 3  # blocks in a row on which the ratio must hold before it is warned of: one block's error may be tiny and its ratio anything
FIRST = 3  # windows before the share of those that turned up says anything
TRY = {
    "masks": "more calibration samples",
    "data": "more calibration samples, or self-generated ones (extra)",
    "epochs": "early_stopping=1, or fewer epochs",
    "freedom": "windows of one block (without CR)",
}


def ratios(errors: pd.DataFrame) -> pd.DataFrame:
    """Error ratios per block and held-out source: block, source, nmse, calibration (its NMSE), ratio (nmse / calibration), token_ratio
    (the same of the token NMSE; NaN where it was not measured)."""
    calibration = errors[errors.source == "calibration"].set_index("block").reindex(columns=["nmse", "token_nmse"])
    held = errors[~errors.source.isin(TRAINED)].reindex(columns=["block", "source", "nmse", "token_nmse"])
    held["calibration"] = held.block.map(calibration.nmse)
    held["ratio"] = held.nmse / held.calibration
    held["token_ratio"] = held.token_nmse / held.block.map(calibration.token_nmse)
    return held[["block", "source", "nmse", "calibration", "ratio", "token_ratio"]].reset_index(drop=True)


def turns(training: pd.DataFrame, rising: float = OverfitConfig.rising, *, kept_best: bool = False) -> pd.DataFrame:
    """Per window: window, best (epoch of the lowest mean held-out loss), last (epoch whose weights were kept), rise (relative, of
    its held-out loss above the lowest), gained and held (log of the loss before training over the loss after it, calibration and
    held-out), up (whether the held-out loss turned).

    Args:
        kept_best: the best epoch's weights were kept (early stopping), so that what came after it does not count.
    """
    rows = []
    for window, part in training.groupby("window", sort=False):
        held = part[~part.source.isin(TRAINED)].groupby("epoch").loss.mean()
        own = part[part.source == "calibration"].set_index("epoch").loss
        if kept_best:
            held, own = held.loc[: held.idxmin()], own.loc[: held.idxmin()]
        if not len(held) or part.epoch.nunique() < 2:
            continue
        rise = held.iloc[-1] / held.min() - 1 if held.min() else 0.0
        up = bool(rise > rising and own.iloc[-1] < own.iloc[0])
        rows.append((str(window), int(held.idxmin()), int(held.index[-1]), rise, _gain(own), _gain(held), up))
    return pd.DataFrame(rows, columns=["window", "best", "last", "rise", "gained", "held", "up"])


def rising(training: pd.DataFrame, config: OverfitConfig | None = None, *, kept_best: bool = False) -> list[str]:
    """Windows whose mean held-out loss ended above its lowest epoch while the training loss fell."""
    found = turns(training, (config or OverfitConfig()).rising, kept_best=kept_best)
    return list(found[found.up.astype(bool)].window)


FACTS = ("ratio", "token_ratio", "source", "growth", "block", "windows", "up", "window", "epoch", "transfer")


def facts(run_or_result: Any, config: OverfitConfig | None = None) -> dict[str, Any]:
    """What a verdict rests on.

    Returns:
        ratio: held-out NMSE of the last block over the calibration's, of the worst source; token_ratio: the same of its median token
        NMSE; source: its name; growth: that ratio over the first block's; block: the first one whose ratio reaches `watch`, and stays there, or
        None; windows and up: how many were trained, and in how many the held-out loss turned up; window and epoch: the first of
        those and the median epoch of its lowest loss; transfer: share of training's gain on calibration samples, in log loss,
        that holds on held-out ones (NaN where nothing was trained).
        Missing figures are NaN or None.
    """
    config = config or _thresholds(run_or_result)
    table, training = ratios(run_or_result.errors), run_or_result.training
    found: dict[str, Any] = {"ratio": math.nan, "token_ratio": math.nan, "growth": math.nan, "source": None, "block": None}
    if not table.empty:
        final = table[table.block == table.block.max()]
        known = final.dropna(subset=["nmse", "calibration"])
        worst = (known if len(known) else final).fillna({"ratio": 1.0}).sort_values("ratio").iloc[-1]
        line = table[table.source == worst.source].sort_values("block")
        found |= {"ratio": float(worst.ratio), "token_ratio": float(worst.token_ratio), "source": worst.source}
        found["growth"] = float(worst.ratio / line.ratio.iloc[0]) if line.ratio.iloc[0] else math.nan
        below = line[~(line.ratio >= config.watch)].block
        above = line[line.block > (below.max() if len(below) else -1)].block
        found["block"] = int(above.iloc[0]) if len(above) else None
    how = _prune_config(run_or_result)
    turned = turns(training, config.rising, kept_best=how is not None and how.early_stopping is not None)
    up = turned[turned.up.astype(bool)]
    found |= {"windows": len(turned), "up": len(up)}
    found |= {"window": up.window.iloc[0] if len(up) else None, "epoch": int(up.best.median()) if len(up) else None}
    gained = turned.gained.sum()
    found["transfer"] = float(turned.held.sum() / gained) if gained > 0 else math.nan
    return found


def verdict(run_or_result: Any, config: OverfitConfig | None = None, *, against: Any = None) -> tuple[str, list[str]]:
    """("fine" | "watch" | "overfitting", reasons) from a run's or a result's `errors` and `training`; the last reason says what to try.

    Only the error relative to its stream and the held-out losses are looked at; a low error that holds on new text is fine
    however low it is.

    Args:
        config: the thresholds; None takes those of the run's own configuration, else the defaults.
        against: a recorded run with a simpler technique; where this one has a higher perplexity on a test text than that one, beyond
            the paired 95 % interval over its articles, although its calibration error is lower, it is "overfitting" whatever the
            errors say. That is about these two runs; of their techniques only several calibration seeds tell, see `outcomes`.
    """
    config = config or _thresholds(run_or_result)
    errors = run_or_result.errors
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
    word, reasons = _judge(facts(run_or_result, config), _per_parameter(run_or_result), config, _prune_config(run_or_result))
    worse = _reads_worse(run_or_result, against) if against is not None else []
    return ("overfitting", [*worse, *reasons]) if worse else (word, reasons)


def _judge(found: dict[str, Any], per_parameter: float | None, config: OverfitConfig, how: PruneConfig | None) -> tuple[str, list[str]]:
    by_token = "" if math.isnan(found["token_ratio"]) else f", by token NMSE {found['token_ratio']:.2f}"
    reasons = [f"the final error ratio on {found['source']} is {found['ratio']:.2f}{by_token} (held-out over calibration NMSE)"]
    advice = []
    if found["ratio"] >= config.watch:
        reasons.append(f"the error ratio is {config.watch:g} or more from block {found['block']} on")
        advice.append("data")
    if found["up"] and found["up"] >= config.many * found["windows"]:
        reasons.append(
            f"the held-out loss rose again in {found['up']} of {found['windows']} windows (first: {found['window']}; "
            f"lowest after epoch {found['epoch']})"
        )
        advice.append("epochs")
    if found["transfer"] < config.transfer:
        reasons.append(f"of what training gained on the calibration samples, {found['transfer']:.0%} holds on held-out ones")
        advice += [word for word in ("data", "freedom") if word not in advice and (word == "data" or how is None or how.window_blocks > 1)]
    word = "overfitting" if found["ratio"] >= config.overfitting else "watch" if advice else "fine"
    if advice and per_parameter is not None and per_parameter < 1:
        reasons.append(f"there are {per_parameter:.2g} calibration scalars (samples × tokens × hidden) for each weight that a window trains")
    trained = bool(found["windows"])
    if advice:
        reasons.append("try " + "; or ".join(TRY["masks" if word == "data" and not trained else word] for word in advice))
    return word, reasons


def _reads_worse(run: Any, simpler: Any) -> list[str]:
    """Test texts on which `run` has the higher perplexity beyond the interval, although its calibration error is lower."""
    if not run.final["calibration"] < simpler.final["calibration"]:
        return []
    said = []
    for row in run.record["evaluation"]["perplexity"]:
        found = _compared(row, _row(simpler, row["corpus"]))
        if found is not None and _above(found):
            interval = f"95 % interval {found.low - 1:+.1%} to {found.high - 1:+.1%}, n = {found.n}"
            said.append(
                f"the perplexity on {row['corpus']} is {found.value - 1:.1%} above that of the {simpler.config.prune.technique} run ({interval})"
            )
    return said


def _compared(own: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> statistics.Ratio | None:
    """The ratio of two rows' perplexities over the articles of the same sequences; None where they are not the same."""
    if own is None or other is None or own["samples"] != other["samples"]:
        return None
    return statistics.perplexity_ratio(own["nll"], other["nll"], own.get("articles") or other.get("articles"))


class Live:
    """Follows a walk and says the moment it turns: once when the ratio has held above each threshold for three blocks, and once when
    the losses of many windows turned up."""

    def __init__(self, config: OverfitConfig, *, kept_best: bool = False) -> None:
        self.config, self.kept_best, self.said = config, kept_best, set[str]()
        self.turned: dict[str, bool] = {}
        "Windows whose training was seen: whether the held-out loss turned up."

    def look(self, errors: Iterable[tuple[int, str, float, float]], training: Iterable[tuple[str, int, str, float]]) -> list[str]:
        """New warnings, given all rows so far; of a window the rows come together, after its training."""
        measured = pd.DataFrame([row[:4] for row in errors], columns=["block", "source", "mse", "nmse"])
        table = ratios(measured[measured.block > measured.block.max() - HELD])
        found = []
        if table.block.nunique() >= HELD:
            held = table.groupby("source").ratio.min().max()  # of the source on which it held best
            last = table[table.block == table.block.max()].sort_values("ratio").iloc[-1]
            for word in ("overfitting", "watch"):
                if held >= getattr(self.config, word) and not self.said & {word, "overfitting"}:
                    self.said |= {word}
                    found.append(
                        f"Overfitting? After block {last.block} the error ratio on {last.source} is {last.ratio:.2f} "
                        f"(held-out over calibration NMSE; {word} from {getattr(self.config, word):g})."
                    )
        rows = pd.DataFrame(training, columns=["window", "epoch", "source", "loss"])
        rows = rows[~rows.window.isin(self.turned)]
        self.turned |= dict.fromkeys(rows.window, False) | dict.fromkeys(rising(rows, self.config, kept_best=self.kept_best), True)
        up, trained = [window for window, turned in self.turned.items() if turned], len(self.turned)
        if trained >= FIRST and up and len(up) >= self.config.many * trained and "up" not in self.said:
            self.said |= {"up"}
            found.append(f"Overfitting? The held-out loss turned up in {len(up)} of the {trained} windows trained so far, the last one {up[-1]}.")
        return found

    def replay(self, errors: Sequence[tuple[int, str, float, float]], training: Sequence[tuple[str, int, str, float]]) -> None:
        """Go through what was seen before a walk was stopped, so that nothing is said twice."""
        for block in sorted({row[0] for row in errors}):
            self.look([row for row in errors if row[0] <= block], [])
        self.look([], training)


def per_parameter(samples: int, tokens: int, hidden: int, parameters: int) -> float:
    """Scalars of the training samples for each weight that a window trains: samples × tokens × hidden / parameters."""
    return samples * tokens * hidden / parameters


TECHNIQUES = ("LR", "BR", "BR+GP", "BR+GP+CR")
"From the simplest on."
OUTCOME = (
    "id", "group", "technique", "seed", "corpus", "against", "change", "low", "high", "n", "worse",
    "text_change", "text_low", "text_high", "text_n", "worse_on_text", "verdict", *FACTS,
)  # fmt: skip


def outcomes(runs: Iterable[Any], corpora: Iterable[str]) -> pd.DataFrame:
    """What became of each run's perplexity on test text, beside that of the best simpler technique.

    Simpler are the runs of the same question (model, text, count, criterion, pattern) with a technique earlier in LR, BR, BR+GP,
    BR+GP+CR and the same calibration seed. The draw of the calibration text decides more than that of the test text, so that a technique
    is called worse over seeds only. One seed says which of two pruned models has the higher perplexity, and nothing of their techniques.

    Returns:
        id, group (what the runs share), technique, seed, corpus, against (technique); change, low, high: relative change of perplexity
        with its 95 % interval over the n calibration seeds (`statistics.ratio`; the same in the rows of all these seeds, and without
        bounds for one), worse (bool): above no change beyond that interval; text_change, text_low, text_high: the same of this seed's
        two runs over the text_n articles of the test text (`statistics.perplexity_ratio`), worse_on_text (bool): beyond that one;
        verdict (the word), and the columns of `facts`.
    """
    groups: dict[str, dict[str, dict[int, Any]]] = {}
    for run in runs:
        if run.config.prune is not None and run.config.prune.technique in TECHNIQUES and len(run.errors):
            group, arm = _question(run)
            groups.setdefault(group, {}).setdefault(arm, {})[run.config.seed] = run
    rows, corpora = [], list(corpora)
    for group, arms in groups.items():
        for own in arms.values():
            simpler = [other for other in arms.values() if TECHNIQUES.index(_technique(other)) < TECHNIQUES.index(_technique(own))]
            said = {seed: {"verdict": verdict(run)[0], **facts(run)} for seed, run in own.items()} if simpler else {}
            for corpus in corpora:
                rows += [{"group": group, **row, **said[row["seed"]]} for row in _against_best(own, simpler, corpus)]
    return pd.DataFrame(rows, columns=list(OUTCOME)).astype({"worse": bool, "worse_on_text": bool})


def _technique(by_seed: Mapping[int, Any]) -> str:
    return next(iter(by_seed.values())).config.prune.technique


def _against_best(own: Mapping[int, Any], simpler: Iterable[Mapping[int, Any]], corpus: str) -> list[dict[str, Any]]:
    """A row a seed of `outcomes`, against the simpler runs that share most seeds and of these have the lowest perplexity."""
    found = []
    for other in simpler:
        seeds = [seed for seed in own if seed in other]
        ratios = {s: ratio for s in seeds if (ratio := _compared(_row(own[s], corpus), _row(other[s], corpus))) is not None}
        if ratios:
            found.append((_technique(other), ratios, statistics.ratio([r.value for r in ratios.values()], [1.0] * len(ratios))))
    if not found:
        return []
    against, ratios, over = max(found, key=lambda each: (len(each[1]), each[2].value))
    about = {"technique": _technique(own), "corpus": corpus, "against": against, **_changed(over), "n": over.n, "worse": _above(over)}
    return [
        {"id": own[seed].id, "seed": seed, **about, **_changed(text, "text_"), "text_n": text.n, "worse_on_text": _above(text)}
        for seed, text in ratios.items()
    ]


def _changed(ratio: statistics.Ratio, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}change": ratio.value - 1, f"{prefix}low": ratio.low - 1, f"{prefix}high": ratio.high - 1}


def _above(ratio: statistics.Ratio) -> bool:
    return ratio.resolved and ratio.value > 1


def agreement(said: pd.Series, worse: pd.Series) -> dict[str, int]:
    """hits (said and worse), misses (worse, not said), false alarms (said, not worse), quiet (neither)."""
    return {
        "hits": int((said & worse).sum()),
        "misses": int((~said & worse).sum()),
        "false alarms": int((said & ~worse).sum()),
        "quiet": int((~said & ~worse).sum()),
    }


def best_threshold(values: pd.Series, worse: pd.Series) -> float:
    """The value above which "worse" is said with the best balance (mean of the shares of hits and of quiet ones); infinite
    where one of the two never happens, for then nothing can be chosen."""
    if worse.all() or not worse.any():
        return math.inf
    seen = sorted(values.dropna().unique())
    cuts = [math.inf, *[(a + b) / 2 for a, b in zip(seen, seen[1:], strict=False)]]
    return max(cuts, key=lambda cut: ((values > cut) & worse).sum() / worse.sum() + (~(values > cut) & ~worse).sum() / (~worse).sum())


def _gain(losses: pd.Series) -> float:
    """log of the loss before training over the loss after it."""
    return math.log(losses.iloc[0] / losses.iloc[-1]) if losses.iloc[0] > 0 and losses.iloc[-1] > 0 else 0.0


def _prune_config(run_or_result: Any) -> PruneConfig | None:
    """A result has it as its configuration, a run as a part of it."""
    config = getattr(run_or_result, "config", None)
    return config if isinstance(config, PruneConfig) else getattr(config, "prune", None)


def _thresholds(run_or_result: Any) -> OverfitConfig:
    how = _prune_config(run_or_result)
    return how.overfit if how is not None else OverfitConfig()


def _per_parameter(run_or_result: Any) -> float | None:
    """From a result's own figure, or from a run's measurement."""
    known = getattr(run_or_result, "per_parameter", None)
    return known if known is not None else getattr(run_or_result, "metrics", {}).get("data per parameter")


TRAINING = frozenset(
    (
        "technique reconstruction_input epochs steps learning_rate batch_size micro_batch recompute precision gradient_clip early_stopping "
        "seed overfit"
    ).split()
)
"What of a PruneConfig says how, and not what, is reconstructed."
SEEDS = ("seed", "test_seed", "draw")


def _question(run: Any) -> tuple[str, str]:
    """What runs share whose techniques can be compared, everything that decides their numbers but how they were trained and the seeds; and
    how this one was trained."""
    made_from = run.record.get("made_from", {})
    known = made_from.get("configuration") or {**to_dict(run.config), "draw": run.config.draw}
    prune = {name: value for name, value in known["prune"].items() if name not in TRAINING}
    trained = {name: value for name, value in known["prune"].items() if name in TRAINING - {"seed", "overfit"}}
    rest = {name: value for name, value in known.items() if name not in ("prune", "tag", "keep_model", *SEEDS)}
    return repr((made_from.get("model"), sorted(rest.items()), sorted(prune.items()))), repr(sorted(trained.items()))


def _row(run: Any, corpus: str) -> Mapping[str, Any] | None:
    return next((row for row in run.record["evaluation"]["perplexity"] if row["corpus"] == corpus), None)
