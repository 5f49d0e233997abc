"""Verdicts on made tables, and on a real result."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reconkit import overfit, pruning
from reconkit.config import ConfigError, OverfitConfig, PruneConfig, RunConfig, SelfGenConfig


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
    assert list(table.columns) == ["block", "source", "nmse", "calibration", "ratio", "token_ratio"]
    assert table.ratio.tolist() == pytest.approx([1.5, 1.5]) and table.token_ratio.isna().all(), "an old record has no token NMSE"
    assert overfit.rising(result(1, {"wiki": 1}, [1.0, 0.7, 0.9]).training) == ["0", "1"]
    assert overfit.rising(result(1, {"wiki": 1}, [1.0, 0.7, 0.5]).training) == []


def test_facts_say_where_and_when_it_turns() -> None:
    made = result(1.0, {"wiki": 2.0}, [1.0, 0.7, 0.9])
    made.errors.loc[(made.errors.block == 0) & (made.errors.source == "wiki"), "nmse"] = 0.11
    found = overfit.facts(made)
    assert found["ratio"] == 2 and np.isnan(found["token_ratio"]) and found["source"] == "wiki"
    assert found["block"] == 1, "the first block from which the ratio stays above the threshold"
    assert found["growth"] == pytest.approx(2 / 1.1)
    assert (found["windows"], found["up"], found["window"], found["epoch"]) == (2, 2, "0", 1)
    assert found["transfer"] == pytest.approx(np.log(1 / 0.9) / np.log(1 / 0.6))


def test_the_token_ratio_stands_beside_the_ratio_and_decides_nothing() -> None:
    made = result(1.0, {"wiki": 2.5, "news": 1.1})
    made.errors["token_nmse"] = [0.02, 0.03, 0.05, 0.1, 0.125, 0.9]
    assert overfit.ratios(made.errors).token_ratio.tolist() == pytest.approx([1.5, 2.5, 1.25, 9.0])
    found = overfit.facts(made)
    assert (found["source"], found["ratio"], found["token_ratio"]) == ("wiki", 2.5, pytest.approx(1.25))
    word, reasons = overfit.verdict(made)
    assert word == "watch" and reasons[0] == "the final error ratio on wiki is 2.50, by token NMSE 1.25 (held-out over calibration NMSE)"
    assert reasons[1] == "the error ratio is 2 or more from block 0 on"
    assert "token" not in overfit.verdict(result(1.0, {"wiki": 2.5}))[1][0]


def test_thresholds_are_configuration() -> None:
    made = result(1.0, {"wiki": 2.0})
    assert overfit.verdict(made)[0] == "watch"
    assert overfit.verdict(made, OverfitConfig(watch=2.5, overfitting=3.0))[0] == "fine"
    assert overfit.verdict(made, OverfitConfig(watch=1.5, overfitting=1.9))[0] == "overfitting"
    made.config = PruneConfig(overfit=OverfitConfig(watch=2.5))
    assert overfit.verdict(made)[0] == "fine", "a result's own thresholds count"
    with pytest.raises(ConfigError, match="watch"):
        OverfitConfig(watch=4.0)


def test_reasons_name_the_gain_that_does_not_hold_and_what_to_try() -> None:
    made = result(1.0, {"wiki": 1.3}, [1.0, 0.99, 0.98])
    made.per_parameter = 0.02
    word, reasons = overfit.verdict(made)
    assert word == "watch"
    assert any("4% holds" in reason for reason in reasons)
    assert any("0.02 calibration scalars" in reason for reason in reasons)
    assert reasons[-1].startswith("try ") and "more calibration samples" in reasons[-1]
    assert overfit.verdict(result(1.0, {"wiki": 1.3}))[1][-1].startswith("the final error ratio"), "nothing to try where all is fine"


def test_what_early_stopping_threw_away_does_not_count() -> None:
    made = result(1.0, {"wiki": 1.2}, [1.0, 0.7, 0.9])
    assert overfit.verdict(made)[0] == "watch"
    made.config = PruneConfig(early_stopping=1)
    assert overfit.verdict(made)[0] == "fine"
    assert overfit.facts(made)["transfer"] == pytest.approx(np.log(1 / 0.7) / np.log(1 / 0.8))


def test_live_says_each_thing_once_and_the_moment_it_turns() -> None:
    live = overfit.Live(OverfitConfig())
    errors, training = [], []
    said = []
    for block, ratio in enumerate([2.4, 1.2, 2.1, 2.2, 2.3, 3.5, 3.6, 3.7]):
        errors += [(block, "calibration", 1.0, 1.0), (block, "wiki", ratio, ratio)]
        losses = [1.0, 0.7, 0.9] if block >= 2 else [1.0, 0.9, 0.8]
        training += [(str(block), e, "wiki", v) for e, v in enumerate(losses)] + [(str(block), e, "calibration", 1 - e / 4) for e in range(3)]
        said.append(live.look(errors, training))
    assert [len(s) for s in said] == [0, 0, 1, 0, 1, 0, 0, 1], "one block above a threshold is not yet a warning"
    assert "1 of the 3 windows" in said[2][0]
    assert "block 4" in said[4][0] and "is 2.30 (held-out" in said[4][0] and "watch from 2" in said[4][0]
    assert "block 7" in said[7][0] and "overfitting from 3" in said[7][0]
    assert live.look(errors, training) == []
    again = overfit.Live(OverfitConfig())
    again.replay(errors, training)
    assert again.look([*errors, (8, "calibration", 1.0, 1.0), (8, "wiki", 3.6, 3.6)], training) == [], "what was said before a stop is not said again"


def test_a_walk_warns_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    config = PruneConfig(technique="BR+GP", epochs=40, batch_size=2, learning_rate=2e-3, overfit=OverfitConfig(watch=1.05, overfitting=1.1))
    samples, new = families.tokens(2, 8), {"new": families.tokens(8, 8, 1)}
    found = pruning.prune(families.build("llama"), samples, config, held_out=new)
    warned = [note for note in found.notes if note.startswith("Overfitting?")]
    assert warned and warned[0] in capsys.readouterr().err
    quiet = pruning.prune(
        families.build("llama"), samples, replace(config, technique="LR", overfit=OverfitConfig(watch=900, overfitting=900)), held_out=new
    )
    assert not [note for note in quiet.notes if note.startswith("Overfitting?")]


def run(technique: str, nll: list[float], held: float = 1.2, seed: int = 0, samples: str = "same", articles: Any = None) -> SimpleNamespace:
    made = result(1.0, {"wiki": held})
    made.id, made.config = f"{technique}-{seed}", RunConfig("tiny", seed=seed, prune=PruneConfig(technique=technique))
    row = {"corpus": "wiki", "nll": nll, "samples": samples, **({} if articles is None else {"articles": articles})}
    made.record = {"evaluation": {"perplexity": [row]}}
    made.metrics = {}
    return made


def test_only_what_decides_a_number_is_part_of_the_question() -> None:
    """Two records of one question, one of which was asked for with settings that it did not use."""
    a, b = run("LR", [3.0, 3.1]), run("BR", [3.2, 3.3])
    for made in (a, b):
        made.record["made_from"] = {"model": "m", "configuration": {"draw": 0, "prune": {"technique": made.config.prune.technique, "sparsity": 0.5}}}
    b.config = replace(b.config, selfgen=SelfGenConfig(batch_size=3))
    assert len(overfit.outcomes([a, b], ["wiki"])) == 1


def test_one_seed_tells_of_its_text_and_nothing_of_the_technique() -> None:
    base = [3.0, 3.1, 2.9, 3.0]
    better, worse, noisy = ([b + d for b, d in zip(base, ds, strict=True)] for ds in ([-0.1] * 4, [0.1, 0.11, 0.1, 0.09], [0.9, -0.8, 0.9, -0.8]))
    table = overfit.outcomes([run("LR", base), run("BR", better), run("BR+GP", worse), run("BR+GP+CR", noisy), run("BR", worse, seed=1)], ["wiki"])
    assert overfit.outcomes([run("LR", base), run("BR", worse, samples="others")], ["wiki"]).empty, "other sequences are no pairs"
    assert set(table.verdict) == {"fine"} and set(overfit.FACTS) < set(table.columns)
    table = table.set_index("technique")
    assert list(table.index) == ["BR", "BR+GP", "BR+GP+CR"], "the simplest has nothing simpler, and another seed is another question"
    assert table.against.to_dict() == {"BR": "LR", "BR+GP": "BR", "BR+GP+CR": "BR"}
    assert table.worse_on_text.to_dict() == {"BR": False, "BR+GP": True, "BR+GP+CR": False} and not table.worse.any()
    assert (table.n == 1).all() and (table.low == -1).all() and (table.high == np.inf).all() and (table.text_n == 4).all()
    difference = np.subtract(worse, better)
    ends = np.exp([difference.mean(), *stats.ttest_1samp(difference, 0).confidence_interval()]) - 1
    assert table.loc["BR+GP", ["text_change", "text_low", "text_high"]].tolist() == pytest.approx(ends.tolist())
    assert table.loc["BR+GP", "change"] == pytest.approx(ends[0])


def test_windows_of_one_article_are_one_observation() -> None:
    own, other = [3.3, 3.31, 3.29, 3.3], [3.0, 3.0, 3.0, 3.0]
    for articles, n, worse in (([0, 1, 2, 3], 4, True), ([0, 0, 0, 0], 1, False)):
        [row] = overfit.outcomes([run("LR", other, articles=articles), run("BR", own, articles=articles)], ["wiki"]).to_dict("records")
        assert (row["text_n"], row["worse_on_text"]) == (n, worse)


def test_over_seeds_a_technique_is_worse_beyond_the_interval_of_the_seeds() -> None:
    """Each seed has its own test text; the interval is Student's over the log ratios of its pairs. A seed without a pair has no row."""
    draw = np.random.default_rng(0)
    made, logs = [], {"BR": [0.1, 0.12, 0.11], "BR+GP": [0.5, -0.3, 0.1]}
    for seed in range(3):
        text = draw.normal(3, 0.5, 8)
        made.append(run("LR", text.tolist(), seed=seed, samples=f"text {seed}"))
        made += [run(technique, (text + of[seed]).tolist(), seed=seed, samples=f"text {seed}") for technique, of in logs.items()]
    made.append(run("BR", [1.0, 2.0], seed=7))
    table = overfit.outcomes(made, ["wiki"])
    assert table.groupby("technique").seed.apply(list).to_dict() == {"BR": [0, 1, 2], "BR+GP": [0, 1, 2]}
    assert set(table.against) == {"LR"}, "of the simpler ones the best over all seeds"
    for technique, worse in (("BR", True), ("BR+GP", False)):
        part = table[table.technique == technique]
        ends = np.exp([np.mean(logs[technique]), *stats.ttest_1samp(logs[technique], 0).confidence_interval()]) - 1
        assert part[["change", "low", "high"]].to_numpy() == pytest.approx(np.tile(ends, (3, 1)))
        assert part.n.tolist() == [3] * 3 and part.worse.tolist() == [worse] * 3
        assert part.text_change.tolist() == pytest.approx((np.exp(logs[technique]) - 1).tolist())
    assert table[table.technique == "BR+GP"].worse_on_text.tolist() == [True, False, True], "one draw says so, and the next does not"


def test_runs_that_were_trained_otherwise_are_arms_of_their_own() -> None:
    base = [3.0, 3.1, 2.9, 3.0]
    short, long = run("BR", [x + 0.1 for x in base]), run("BR", [x - 0.1 for x in base])
    long.id, long.config = "long", replace(long.config, prune=replace(long.config.prune, epochs=99))
    table = overfit.outcomes([run("LR", base), short, long, run("BR+GP", base)], ["wiki"])
    assert table.against.tolist() == ["LR", "LR", "BR"] and (table.n == 1).all()
    assert table.change.tolist() == pytest.approx([np.expm1(0.1), np.expm1(-0.1), np.expm1(0.1)])


def test_against_a_simpler_run_the_text_has_the_last_word() -> None:
    simple, better, worse = run("BR+GP", [3.0, 3.1, 2.9]), run("BR+GP+CR", [2.9, 3.0, 2.8]), run("BR+GP+CR", [3.1, 3.21, 3.0])
    for made, calibration in ((simple, 1.0), (better, 0.9), (worse, 0.9)):
        made.final = pd.Series({"calibration": calibration, "wiki": 1.2})
    assert overfit.verdict(better, against=simple)[0] == "fine" == overfit.verdict(worse)[0]
    word, reasons = overfit.verdict(worse, against=simple)
    low, high = np.exp(stats.ttest_1samp([0.1, 0.11, 0.1], 0).confidence_interval()) - 1
    interval = f"(95 % interval {low:+.1%} to {high:+.1%}, n = 3)"
    assert word == "overfitting" and reasons[0] == f"the perplexity on wiki is 10.9% above that of the BR+GP run {interval}"
    worse.final["calibration"] = 1.1
    assert overfit.verdict(worse, against=simple)[0] == "fine", "worse in every respect is not overfitting"


def test_agreement_and_the_best_threshold() -> None:
    ratio, worse = pd.Series([1.0, 1.5, 2.0, 3.0, 4.0]), pd.Series([False, False, True, False, True])
    cut = overfit.best_threshold(ratio, worse)
    assert 1.5 < cut < 2.0
    assert overfit.agreement(ratio > cut, worse) == {"hits": 2, "misses": 0, "false alarms": 1, "quiet": 2}
    assert overfit.best_threshold(ratio, worse & False) == np.inf


def test_a_handful_of_samples_trained_for_long_is_called_overfitting() -> None:
    model = families.build("llama")
    config = PruneConfig(technique="BR+GP+CR", epochs=150, batch_size=2, learning_rate=2e-3)
    found = pruning.prune(model, families.tokens(2, 8), config, held_out={"new": families.tokens(8, 8, 1)}, progress=False)
    assert overfit.verdict(found)[0] == "overfitting"
