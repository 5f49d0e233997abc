"""Records: the same question twice, what changes a fingerprint, the history, the limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reconkit import pruning, runs
from reconkit.config import ConfigError, PruneConfig, RunConfig


def config(**values: Any) -> RunConfig:
    small = {
        "model": "tiny",
        "corpus": "pydocs",
        "count": 4,
        "length": 32,
        "held_out": ("pydocs",),
        "held_out_count": 2,
        "test": ("pydocs",),
        "test_count": 4,
    }
    return RunConfig(**{**small, "prune": PruneConfig(technique="BR", epochs=1), **values})


def test_the_second_time_costs_nothing_and_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first = runs.run(config())
    monkeypatch.setattr(pruning, "prune", None)
    second = runs.run(config())
    assert (first.cached, second.cached) == (False, True)
    assert second.metrics == first.metrics and second.errors.equals(first.errors) and second.training.equals(first.training)
    assert second.config == config() and second.id == runs.fingerprint(config())
    assert list(first.errors.columns) == ["block", "source", "mse", "nmse"] and set(first.errors.source) == {"calibration", "pydocs"}
    assert first.training.window.tolist()[0] == "0" and first.metrics["sparsity"] == 0.5
    assert {"perplexity/pydocs", "perplexity/pydocs/low", "nmse/pydocs", "mse/calibration", "seconds/prune", "memory/rss", "size/parameters"} <= set(
        first.metrics
    )


def test_the_same_configuration_gives_the_same_numbers(cache: Path) -> None:
    first = runs.run(config())
    for file in first.folder.iterdir():
        file.unlink()
    again = runs.run(config())
    assert not again.cached and again.errors.equals(first.errors) and again.training.equals(first.training)
    timed = ("seconds/", "memory/", "speed/")
    assert {k: v for k, v in again.metrics.items() if not k.startswith(timed)} == {k: v for k, v in first.metrics.items() if not k.startswith(timed)}


@pytest.mark.parametrize(
    "change",
    [
        {"count": 5}, {"length": 33}, {"seed": 1}, {"held_out_count": 3}, {"test_count": 5}, {"evaluate": ()}, {"corpus": "wiki"},
        {"prune": None}, {"prune": PruneConfig(technique="BR", epochs=1, seed=1)}, {"prune": PruneConfig(technique="BR", epochs=1, damping=0.02)},
    ],
    ids=str,
)  # fmt: skip
def test_what_decides_a_number_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert runs.fingerprint(config(**change)) != runs.fingerprint(config())


def test_what_decides_none_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    known = runs.fingerprint(config())
    assert runs.fingerprint(config(tag="mine", keep_model=True)) == known
    monkeypatch.setattr(runs.torch, "get_num_threads", lambda: 63)
    assert runs.fingerprint(config()) != known, "sums in another order"


def test_sources_of_deciding_rooms_are_hashed_and_others_are_not() -> None:
    rooms = {p.stem for p in Path(runs.__file__).parent.glob("*.py")}
    assert set(runs.ROOMS) < rooms
    assert not set(runs.ROOMS) & {"plots", "report", "cli", "suite", "progress", "cost"}


def test_a_dense_run_has_no_errors_and_no_zeros() -> None:
    dense = runs.run(config(prune=None))
    assert dense.errors.empty and dense.training.empty and dense.metrics["sparsity"] == 0 and dense.record["verdict"] == "fine"
    assert dense.metrics["perplexity/pydocs"] > 1


def test_a_sparsity_of_zero_is_a_run_like_any_other() -> None:
    run = runs.run(config(prune=PruneConfig(technique="LR", sparsity=0.0)))
    assert run.metrics["nmse/calibration"] == 0 and run.record["verdict"] == "fine"


def test_an_unknown_task_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.models, "load_model", lambda *args, **options: pytest.fail("loaded first"))
    with pytest.raises(ConfigError, match="chess"):
        runs.run(config(evaluate=("zero_shot",), tasks=("chess",)))


def test_extra_and_self_generated_text_only_train(tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(3)))
    run = runs.run(config(extra=str(file), self_generated=2))
    assert set(run.errors.source) == {"calibration", "extra", "pydocs"} and "nmse/extra" in run.metrics
    assert str(tmp_path) not in json.dumps(run.metrics)


def test_keep_model_keeps_a_folder_and_makes_it_where_it_is_missing() -> None:
    from reconkit import models

    first = runs.run(config())
    assert not (first.folder / "model").exists()
    kept = runs.run(config(keep_model=True))
    assert not kept.cached and kept.id == first.id
    assert models.load_model(str(kept.folder / "model"))[0].config.hidden_size == 64
    assert runs.run(config(keep_model=True)).cached and runs.run(config()).cached


def test_history_find_and_tag() -> None:
    assert runs.history().empty
    a, b = runs.run(config(tag="first")), runs.run(config(prune=None))
    table = runs.history().set_index("id")
    assert set(table.index) == {a.id, b.id} and table.loc[a.id, "technique"] == "BR" and table.loc[b.id, "technique"] == "dense"
    assert table.loc[a.id, "perplexity/pydocs"] == a.metrics["perplexity/pydocs"]
    assert runs.find("first").id == runs.find(a.id[:6]).id == a.id
    runs.tag(b.id, "first")
    assert runs.find("first").id == b.id and runs.find(a.id).config.tag is None
    with pytest.raises(ConfigError, match=a.id):
        runs.find("nothing")
    with pytest.raises(ConfigError, match="2 runs"):
        runs.find("")
    with pytest.raises(ConfigError, match="letters"):
        runs.tag(a.id, "a/b")


def test_a_damaged_record_is_skipped_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = runs.run(config()), runs.run(config(prune=None))
    (a.folder / "record.json").write_text("{")
    assert list(runs.history().id) == [b.id]
    assert a.id in capsys.readouterr().err


def test_wrong_words_are_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_compute", None)
    for change in ({"model": "no-such"}, {"corpus": "no-such"}, {"held_out": ("no-such",)}, {"test": "no-such"}, {"extra": "missing.jsonl"}):
        with pytest.raises(ConfigError):
            runs.run(config(**change))


def test_nothing_half_written_is_left(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(runs.evaluation, "evaluate", fails)
    with pytest.raises(RuntimeError, match="broken"):
        runs.run(config())
    assert [p.name for p in (cache / "runs").iterdir() if p.is_dir()] == [] and runs.history().empty


def test_no_room_on_the_disk_is_said_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "NEEDED", 10**18)
    monkeypatch.setattr(runs, "_compute", None)
    with pytest.raises(OSError, match="make room"):
        runs.run(config())


def test_the_oldest_runs_go_when_the_cache_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    old = runs.run(config())
    past = time.time() - 1000
    os.utime(old.folder / "record.json", (past, past))
    (old.folder / "ballast").write_bytes(bytes(3_000_000))
    monkeypatch.setenv("RECONKIT_CACHE_LIMIT", "2MB")
    new = runs.run(config(prune=None))
    assert list(runs.history().id) == [new.id]
    monkeypatch.setenv("RECONKIT_CACHE_LIMIT", "much")
    with pytest.raises(ConfigError, match="20GB"):
        runs.cache_limit()


def test_two_processes_that_ask_the_same_compute_once(cache: Path) -> None:
    code = (
        "from reconkit import runs\nfrom reconkit.config import *\n"
        "print(runs.run(RunConfig('tiny', 'pydocs', 4, 32, held_out=(), test='pydocs', test_count=4, prune=PruneConfig(technique='LR'))).cached)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(p.communicate(timeout=120)[0].strip() for p in both) == ["False", "True"]


def test_environment_names_versions_and_no_place() -> None:
    said = json.dumps(runs.environment())
    assert runs.environment()["torch"] and str(Path.home()) not in said


def test_metrics_and_claims_are_kept_only_where_asked(tmp_path: Path) -> None:
    rows = [{"claim": "a", "paper": 1, "expected here": "less", "measured": 0.5, "holds": True}]
    assert runs.save_claims("", rows).holds.tolist() == ["yes"]
    runs.save_metrics("", {"a": 1})
    runs.save_metrics(tmp_path, {"a": 1, "b": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.0}
    runs.save_claims(tmp_path, rows)
    assert pd.read_json(tmp_path / "claims.json").claim.tolist() == ["a"]
    assert replace(config(), tag="x") != config()
