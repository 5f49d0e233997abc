"""Records: the same question twice, what changes a fingerprint, the history, the limit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from reconkit import cost, data, models, progress, pruning, runs, versions
from reconkit.config import ConfigError, OverfitConfig, PruneConfig, RunConfig, SelfGenConfig


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
    monkeypatch.setattr(runs, "_compute", None)
    second = runs.run(config())
    assert (first.cached, second.cached) == (False, True)
    assert second.metrics == first.metrics and second.errors.equals(first.errors) and second.training.equals(first.training)
    assert second.config == config() and second.id == runs.fingerprint(config())
    assert list(first.errors.columns) == ["block", "source", "mse", "nmse", "token_nmse", "token_nmse_90"]
    assert set(first.errors.source) == {"calibration", "pydocs"}
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


def test_blocks_on_disk_and_a_checkpoint_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = tmp_path / "model", tmp_path / "state"
    models.save_model(*models.load_model("tiny"), folder)
    how = {"model": str(folder), "prune": PruneConfig(technique="BR", epochs=1, precision="fp32")}
    first = runs.run(config(**how))
    monkeypatch.setenv("RECONKIT_CACHE", str(tmp_path / "other"))
    again = runs.run(config(**how, offload=True, checkpoint=str(state)))
    assert again.id == first.id and not again.cached
    assert again.errors.equals(first.errors) and again.metrics["perplexity/pydocs"] == first.metrics["perplexity/pydocs"]
    assert not any(state.iterdir()), "the state of a finished run is of no use"


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = PruneConfig(technique="BR", epochs=2, precision="fp32")
    whole = runs.run(config(prune=how))
    monkeypatch.setenv("RECONKIT_CACHE", str(tmp_path / "other"))
    asked = config(prune=how, checkpoint=str(tmp_path / "state"))
    monkeypatch.setattr(cost, "apart", lambda work, *args: work(*args))
    with monkeypatch.context() as broken:
        broken.setattr(runs.evaluation, "evaluate", lambda *args, **options: 1 / 0)  # after the pruning
        with pytest.raises(ZeroDivisionError):
            runs.run(asked)
    assert (tmp_path / "state" / whole.id).is_dir()
    monkeypatch.setattr(pruning.Trainer, "fit", lambda *args, **options: pytest.fail("a window that was done is trained again"))
    assert runs.run(asked).errors.equals(whole.errors)


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


def test_a_read_only_cache_answers_from_its_records_and_says_what_it_cannot_do(request: pytest.FixtureRequest) -> None:
    first = runs.run(config())
    request.getfixturevalue("read_only")
    again = runs.run(config())
    assert again.cached and again.metrics == first.metrics
    with pytest.raises(OSError, match="cannot be written .*RECONKIT_CACHE"):
        runs.run(config(seed=1))


def test_a_full_disk_at_the_end_of_a_run_names_the_record(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cost, "apart", full)
    with pytest.raises(OSError, match="cannot be written .No space left on device.*RECONKIT_CACHE") as raised:
        runs.run(config())
    assert raised.value.filename == str(cache / "runs" / runs.fingerprint(config()))
    assert [p.suffix for p in (cache / "runs").iterdir()] == [".lock"]


def test_what_decides_none_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    known = runs.fingerprint(config())
    assert runs.fingerprint(config(tag="mine", keep_model=True)) == known
    monkeypatch.setattr(runs.torch, "get_num_threads", lambda: 63)
    assert runs.fingerprint(config()) == known, "threads, like processors, only sum in another order"


def test_a_run_is_identified_by_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, dense = runs.fingerprint(config()), runs.fingerprint(config(prune=None))
    written = runs.fingerprint(config(self_generated=2))
    explicit = config(prune=PruneConfig(technique="BR", epochs=1, sparsity=0.5, damping=0.01, keep_zeros="auto"))
    assert runs.fingerprint(explicit) == plain, "a default that is written out is the default"
    monkeypatch.setattr(runs.platform, "python_version", lambda: "3.99")
    monkeypatch.setattr(runs, "_version", lambda _: "99.0")
    assert runs.fingerprint(config()) == plain, "versions are kept in the record, and do not name it"
    monkeypatch.setitem(runs.RESULTS, "self-generation", 2)
    assert (runs.fingerprint(config()), runs.fingerprint(config(prune=None))) == (plain, dense)
    assert runs.fingerprint(config(self_generated=2)) != written
    monkeypatch.setitem(runs.RESULTS, "reconstruction", 2)
    assert runs.fingerprint(config()) != plain and runs.fingerprint(config(prune=None)) == dense


def test_a_model_is_identified_by_its_files_content(tmp_path: Path) -> None:
    models.save_model(*models.load_model("tiny"), tmp_path / "m")
    known = runs.fingerprint(config(model=str(tmp_path / "m")))
    weights = tmp_path / "m" / "model.safetensors"
    os.utime(weights, (1, 1))
    assert runs.fingerprint(config(model=str(tmp_path / "m"))) == known
    shutil.copytree(tmp_path / "m", tmp_path / "elsewhere" / "m")
    assert runs.fingerprint(config(model=str(tmp_path / "elsewhere" / "m"))) == known
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert runs.fingerprint(config(model=str(tmp_path / "m"))) != known


def test_committed_records_answer_first(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = runs.run(config())
    shutil.move(cache / "runs" / made.id, tmp_path / "records" / made.id)
    record = tmp_path / "records" / made.id / "record.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps({**facts, "environment": {**facts["environment"], "torch": "0.1"}}))
    monkeypatch.setenv("RECONKIT_RECORDS", str(tmp_path / "records"))
    found = runs.run(config())
    assert found.cached and found.folder == record.parent and found.metrics == made.metrics
    assert f"Some records were made elsewhere: torch 0.1 (here {torch.__version__})." in capsys.readouterr().out
    assert [r.id for r in runs.records()] == [made.id] and runs.find(made.id[:6]).id == made.id
    assert runs.run(config(tag="mine")).config.tag == "mine"
    runs.tag(made.id, "another")
    assert runs.find("another").id == made.id
    runs.tag(made.id, "mine")
    assert sorted(file.name for file in record.parent.iterdir()) == ["errors.csv", "record.json", "training.csv"]
    assert runs.find("mine").folder.parent == cache / "runs"
    assert runs.run(config(tag="other")).config.tag == "other" and runs.run(config(seed=1, tag="new")).config.tag == "new"


def test_a_model_that_was_pruned_before_is_measured(tmp_path: Path) -> None:
    """Zeros that no mask of this call put there are counted where the model is checked before it is scored."""
    model, tokenizer = models.load_model("tiny")
    samples = torch.randint(3, 250, (4, 16), generator=torch.Generator().manual_seed(0))
    for first, values in (({"sparsity": 0.25}, {}), ({"pattern": "2:4", "layers": "attention"}, {"layers": "feed-forward", "keep_zeros": False})):
        pruned = models.load_model("tiny")[0]
        pruning.prune(pruned, samples, PruneConfig(criterion="magnitude", technique="LR", **first), progress=False)
        folder = models.save_model(pruned, tokenizer, tmp_path / repr(len(values)))
        how = PruneConfig(criterion="magnitude", technique="LR", **{"layers": "attention", **values})
        found = runs.run(config(model=str(folder), prune=how))
        assert found.record["evaluation"]["size"]["zeros"] > found.metrics["sparsity"]


def test_one_question_has_one_id_and_two_have_two() -> None:
    def id(**how: Any) -> str:
        return runs.fingerprint(config(prune=PruneConfig(**{"technique": "BR", "epochs": 1, **how})))

    assert id(technique="BR+GP+CR") == id(technique="BR+CR+GP", target="dense", window=2, overlap=1)
    assert id(gradient_clip=1) == id(gradient_clip=1.0) != id()
    assert id(steps=4) == id(steps=4, epochs=7) and id(technique="LR") == id(technique="LR", learning_rate=1e-3, epochs=9)
    assert runs.fingerprint(config(device="cpu")) == runs.fingerprint(config()) == runs.fingerprint(config(tasks=("boolq",), limit=7))
    first, second = {"*q_proj": 0.3, "*": 0.6}, {"*": 0.6, "*q_proj": 0.3}
    assert id(layer_sparsity=first) != id(layer_sparsity=second), "the first match wins"
    dense = config(prune=None)
    assert runs.fingerprint(replace(dense, bos="auto")) != runs.fingerprint(dense)


def test_a_tagged_run_that_is_made_again_keeps_its_tag() -> None:
    for _ in range(2):
        made = runs.run(config(tag="mine"))
        assert made.config.tag == "mine" and not made.cached
        shutil.rmtree(made.folder)


def test_a_damaged_record_is_named_and_computed_again(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = runs.run(config())
    (made.folder / "record.json").write_text("null")
    assert runs.records() == []
    (made.folder / "record.json").write_text("{")
    again = runs.run(config())
    assert not again.cached and again.metrics["nmse/pydocs"] == made.metrics["nmse/pydocs"]
    assert f"The record {made.folder} is damaged (JSONDecodeError), and is computed again." in capsys.readouterr().err


def test_the_last_blocks_errors_and_an_old_record_without_token_nmse() -> None:
    found = runs.run(config())
    last = found.errors[found.errors.block == found.errors.block.max()].set_index("source")
    assert list(found.final_errors.columns) == ["mse", "nmse", "token_nmse", "token_nmse_90"]
    assert found.final_errors.equals(last[["mse", "nmse", "token_nmse", "token_nmse_90"]]) and found.final_errors.nmse.equals(found.final)
    assert found.final_errors.token_nmse.to_dict() == {s: found.metrics[f"token_nmse/{s}"] for s in last.index}
    file = found.folder / "errors.csv"
    pd.read_csv(file, dtype=str)[["block", "source", "mse", "nmse"]].to_csv(file, index=False)
    old = runs.recorded(found.id)
    assert old.final.equals(found.final) and old.final_errors[["token_nmse", "token_nmse_90"]].isna().all(axis=None)
    assert "by token NMSE" in runs.verdict(found)[1][0] and "by token NMSE" not in runs.verdict(old)[1][0]


def test_a_dense_run_has_no_errors_and_no_zeros() -> None:
    dense = runs.run(config(prune=None))
    assert dense.errors.empty and dense.training.empty and dense.metrics["sparsity"] == 0 and dense.record["verdict"] == "fine"
    assert dense.metrics["perplexity/pydocs"] > 1


def test_a_sparsity_of_zero_is_a_run_like_any_other() -> None:
    run = runs.run(config(prune=PruneConfig(technique="LR", sparsity=0.0)))
    assert run.metrics["nmse/calibration"] == 0 and run.record["verdict"] == "fine"


def test_an_unknown_task_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_compute", None)
    with pytest.raises(ConfigError, match="chess"):
        runs.run(config(evaluate=("zero_shot",), tasks=("chess",)))


def test_extra_and_self_generated_text_only_train(tmp_path: Path) -> None:
    file = tmp_path / "more.jsonl"
    file.write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(3)))
    run = runs.run(config(extra=str(file), self_generated=2))
    assert set(run.errors.source) == {"calibration", "extra", "pydocs"} and "nmse/extra" in run.metrics
    assert str(tmp_path) not in json.dumps(run.metrics)


def test_what_only_trains_never_touches_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same statistics with a file's, with more real and with self-generated text; the first samples stay the calibration."""
    monkeypatch.setattr(runs.cost, "apart", lambda work, *args: work(*args))
    seen, prune = [], runs.pruning.prune

    def watched(model: Any, samples: Any, *args: Any, **options: Any) -> Any:
        seen.append((samples, options["extra"]))
        return prune(model, samples, *args, **options)

    monkeypatch.setattr(runs.pruning, "prune", watched)
    for text in ({}, {"more": 3}, {"self_generated": 2}, {"more": 1, "self_generated": 2}):
        runs.run(config(**text))
    (alone, nothing), (a, more), (b, own), (c, both) = seen
    assert nothing is None and all(torch.equal(alone, samples) for samples in (a, b, c))
    assert (len(more), len(own), len(both)) == (3, 2, 3)
    assert torch.equal(both, torch.cat([more[:1], own])), "the control's text and the model's own are the same in every run"
    tokens = models.load_model("tiny")[1]
    assert torch.equal(torch.cat([alone, more]), data.load_samples("pydocs", tokens, count=7, length=32))


def test_calibration_on_self_generated_text_alone() -> None:
    run = runs.run(config(corpus="self"))
    assert set(run.errors.source) == {"calibration", "pydocs"}
    assert run.record["made_from"]["texts"]["corpus"] == ["self"]
    for wrong in ({"corpus": "self", "more": 1}, {"held_out": ("self",)}):
        with pytest.raises(ConfigError, match="self"):
            runs.run(config(**wrong))


def test_the_dense_models_own_text_and_cloze_are_test_sets() -> None:
    run, dense = runs.run(config(test=("pydocs", "self"))), runs.run(config(test=("pydocs", "self"), prune=None))
    assert run.metrics["perplexity/self"] > 0 and set(run.perplexity.corpus) == {"pydocs", "self"}
    table = runs.changes(run, dense).set_index("set")
    assert list(table.index) == ["pydocs", "self"] and (table.low <= table.value).all() and (table.value <= table.high).all()
    assert table.value["self"] == pytest.approx(run.metrics["perplexity/self"] / dense.metrics["perplexity/self"] - 1)
    with pytest.raises(ConfigError, match="0 blanks"):
        runs.run(config(evaluate=("cloze",)))  # single bytes make no words


def test_a_cloze_score_is_recorded_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.cost, "apart", lambda work, *args: work(*args))
    items = torch.stack([torch.arange(20) % 4, torch.arange(20) + 2, *(torch.randint(3, 200, (20,)) for _ in range(4))], 1)
    monkeypatch.setattr(runs.testsets, "cloze_set", lambda *args, **options: items)
    run, dense = runs.run(config(evaluate=("cloze",))), runs.run(config(evaluate=("cloze",), prune=None))
    assert 0 <= run.metrics["accuracy/cloze"] <= 1 and {"accuracy/cloze/low", "accuracy/cloze/high"} <= set(run.metrics)
    [row] = runs.changes(run, dense).to_dict("records")
    assert row["set"] == "cloze" and row["value"] == pytest.approx(run.metrics["accuracy/cloze"] - dense.metrics["accuracy/cloze"])


def test_a_dense_model_is_one_run_whatever_others_are_calibrated_with() -> None:
    dense = config(prune=None, test_length=32)
    assert runs.fingerprint(dense) == runs.fingerprint(replace(dense, count=9, length=16, more=2, self_generated=4, held_out=()))
    assert runs.fingerprint(dense) != runs.fingerprint(replace(dense, test_count=5))
    assert runs.fingerprint(config()) != runs.fingerprint(config(count=9))


def test_how_text_is_written_counts_where_text_is_written() -> None:
    cool = SelfGenConfig(temperature=0.5)
    assert runs.fingerprint(config(selfgen=cool)) == runs.fingerprint(config())
    assert runs.fingerprint(config(selfgen=cool, self_generated=1)) != runs.fingerprint(config(self_generated=1))


def test_one_draw_of_test_samples_for_runs_of_several_seeds() -> None:
    a, b, c = (runs.run(config(seed=seed, test_seed=test)) for seed, test in ((0, None), (1, 0), (1, None)))
    nll = [r.record["evaluation"]["perplexity"][0]["nll"] for r in (a, b, c)]
    assert b.config.draw == 0 and c.config.draw == 1 and len({a.id, b.id, c.id}) == 3
    dense = [runs.fingerprint(config(prune=None, seed=seed, test_seed=test)) for seed, test in ((0, None), (1, 0), (1, None))]
    assert dense[0] == dense[1] != dense[2]
    assert list(runs.changes(b, a).set) == ["pydocs"] and runs.changes(c, a).empty, "other sequences are no pairs"
    assert nll[1] != nll[2]


def test_thresholds_of_the_verdict_decide_no_number() -> None:
    strict = PruneConfig(technique="BR", epochs=1, overfit=OverfitConfig(watch=0.1, overfitting=0.2))
    assert runs.fingerprint(config()) == runs.fingerprint(config(prune=strict))
    run = runs.run(config(prune=strict))
    assert run.record["verdict"] == "overfitting" and any(note.startswith("Overfitting?") for note in run.notes)
    block = models.blocks(models.load_model("tiny")[0])[1][0]
    left = sum(p.numel() / (2 if p.ndim == 2 else 1) for p in block.parameters())
    assert run.metrics["data per parameter"] == pytest.approx(4 * 32 * 64 / left, rel=0.01)
    lenient = runs.run(config(prune=PruneConfig(technique="BR", epochs=1, overfit=OverfitConfig(watch=900, overfitting=900, many=1, transfer=0))))
    assert lenient.cached and lenient.id == run.id and lenient.record["verdict"] == "fine", "the same record, seen by other thresholds"


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
    assert [run.id for run in runs.records()] == [b.id]
    assert a.id in capsys.readouterr().err
    assert list(runs.history().id) == [a.id, b.id], "its measurements are in the history"


def test_wrong_words_are_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_compute", None)
    for change in ({"model": "no-such"}, {"corpus": "no-such"}, {"held_out": ("no-such",)}, {"test": "no-such"}, {"extra": "missing.jsonl"}):
        with pytest.raises(ConfigError):
            runs.run(config(**change))


def test_nothing_half_written_is_left(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(runs.evaluation, "evaluate", fails)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
        patch.setattr(runs.cost, "apart", lambda work, *args: work(*args))  # so that what breaks is broken there
        runs.run(config())
    monkeypatch.setattr(runs, "_compute", killed)
    with pytest.raises(RuntimeError, match="SIGKILL"):
        runs.run(config())
    assert [p.name for p in (cache / "runs").iterdir() if p.is_dir()] == [] and runs.history().empty


def killed(config: RunConfig, id: str, parts: dict[str, Any], folder: Path) -> None:
    """Stands in for the work, half done."""
    folder.mkdir()
    os.kill(os.getpid(), signal.SIGKILL)


def test_only_work_on_the_cpu_has_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(*_: Any) -> None:
        raise InterruptedError

    def apart(work: Any, *_: Any) -> None:
        raise ChildProcessError

    monkeypatch.setattr(runs, "_compute", here)
    monkeypatch.setattr(runs.cost, "apart", apart)
    with pytest.raises(ChildProcessError):
        runs.run(config(device="cpu"))
    monkeypatch.setattr(runs.models, "resolve_device", lambda device: "mps")
    with pytest.raises(InterruptedError):
        runs.run(config())


def test_what_the_caller_freed_before_hides_no_memory(cache: Path) -> None:
    one = config(device="cpu")
    first = runs.run(one)
    shutil.rmtree(first.folder)
    blocks = [bytes(1000) for _ in range(300_000)]
    last = blocks[-1]  # what lies above the freed memory keeps it with the process
    del blocks
    again = runs.run(one)
    assert not again.cached and len(last) == 1000
    assert again.metrics["memory/rss"] == pytest.approx(first.metrics["memory/rss"], rel=0.5)  # in this process it would be near zero


def test_a_run_with_a_bos_token_reads_it_before_every_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = models.load_model("tiny")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    models.save_model(model, tokenizer, tmp_path / "model")
    read: list[Any] = []

    def noted(where: Any, name: str) -> None:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, **more: read.extend([args[1], *more.get("held_out", {}).values()]) or real(*args, **more))

    monkeypatch.setattr(runs.cost, "apart", lambda work, *args: work(*args))
    noted(runs.evaluation, "sequence_nll")
    noted(runs.pruning, "prune")
    selfgen = SelfGenConfig(batch_size=8)
    values = {"model": str(tmp_path / "model"), "test": ("pydocs", "self"), "self_generated": 2, "selfgen": selfgen}
    with_bos, without = runs.run(config(**values, bos="auto")), runs.fingerprint(config(**values))
    assert with_bos.id != without and with_bos.config.bos == "auto"
    assert len(read) >= 4 and all((ids[:, 0] == 1).all() and not (ids[:, 1:] == 1).any() for ids in read)
    with pytest.raises(ConfigError, match="bos is True; it must be False or auto"):
        config(bos=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [({"length": 513, "test_length": 32}, "The calibration text has 513"), ({"test_length": 513}, "The test text has 513")],
)
def test_text_beyond_the_context_is_refused_before_the_pruning(values: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs.cost, "apart", lambda work, *args: work(*args))
    monkeypatch.setattr(runs.pruning, "prune", lambda *args, **options: pytest.fail("pruned first"))
    with pytest.raises(ConfigError, match=f"{named} tokens a sample, more than the model's context of 512"):
        runs.run(config(**values))


def test_texts_of_one_name_are_refused_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "_compute", None)
    files = [tmp_path / folder / "mine.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("words " * 2000)
    for field in ("held_out", "test"):
        with pytest.raises(ConfigError, match=f"{field}.*a/mine.txt.*b/mine.txt.*rename"):
            runs.run(config(**{field: ("pydocs", *map(str, files))}))


def test_a_file_is_not_both_trained_on_and_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "_compute", None)
    file = tmp_path / "mine.txt"
    file.write_text("words " * 2000)
    for field in ("held_out", "test"):
        with pytest.raises(ConfigError, match=f"{field} is .*mine.txt'; it must be files that are not trained on"):
            runs.run(config(corpus=str(file), **{field: ("pydocs", str(file))}))
    assert runs.fingerprint(config(corpus=str(file), held_out=("pydocs",), test=("pydocs",)))


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
    assert [run.id for run in runs.records()] == [new.id] and list(runs.history().id) == [old.id, new.id]
    with pytest.raises(ConfigError, match="only in the history"):
        runs.find(old.id)
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
    unknown = [{**rows[0], "holds": holds, "why": "because"} for holds in (None, float("nan"), pd.NA, np.float64("nan"))]
    assert runs.save_claims(tmp_path, unknown).holds.tolist() == ["not resolvable"] * 4
    assert all(row["why"] == "because" for row in runs.saved(tmp_path / "claims.json"))
    runs.save_metrics("", {"a": 1})
    runs.save_metrics(tmp_path, {"a": 1, "b": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1.0}
    runs.save_claims(tmp_path, rows)
    assert pd.read_json(tmp_path / "claims.json").claim.tolist() == ["a"]


def test_a_claim_may_name_the_papers_and_a_reason_stays_only_where_it_fails(tmp_path: Path) -> None:
    told = {"claim": "a", "paper": "1", "expected here": "2", "measured": "3"}
    rows = [{**told, "holds": np.bool_(True), "of": 3, "why": "never said"}, {**told, "holds": False, "why": "because"}]
    assert runs.save_claims(tmp_path, rows).columns.tolist() == runs.CLAIM
    first, second = json.loads((tmp_path / "claims.json").read_text())
    assert first["of"] == 3 and "why" not in first and first["holds"] == "yes"
    assert second["why"] == "because" and "of" not in second and second["holds"] == "no"
    assert replace(config(), tag="x") != config()


def test_a_price_is_set_on_what_a_run_took_and_decides_no_number() -> None:
    asked = config(evaluate=("perplexity", "speed"))
    free, dear = runs.run(asked), runs.run(replace(asked, price_per_hour=36.0))
    assert dear.cached and dear.id == free.id and not any(name.startswith("money/") for name in free.metrics)
    assert dear.metrics["money/prune"] == pytest.approx(free.metrics["seconds/prune"] / 100)
    assert dear.metrics["money/evaluate"] == pytest.approx(free.metrics["seconds/evaluate"] / 100)
    assert dear.metrics["money/million tokens/8"] == pytest.approx(1e4 / free.metrics["speed/decode_tokens_per_second/8"])
    with pytest.raises(ConfigError, match="price_per_hour is -1"):
        config(price_per_hour=-1)


def test_changes_pair_the_same_items_of_zero_shot_tasks_only() -> None:
    def answered(right: list[float], items: str, metric: str = "acc") -> Any:
        rows = [{"task": "rte", "metric": metric, "right": right, "items": items}]
        name = "accuracy/rte" + ("" if metric == "acc" else " (acc_norm)")
        return SimpleNamespace(record={"evaluation": {"perplexity": [], "zero_shot": rows}}, metrics={name: sum(right) / len(right)})

    dense, pruned = answered([1, 1, 0, 1], "a"), answered([1, 0, 0, 0], "a")
    [row] = runs.changes(pruned, dense).to_dict("records")
    half = 3.182446 * (1 / 3) ** 0.5 / 2  # Student, 3 degrees of freedom
    assert (row["set"], row["measure"], row["lower_is_better"]) == ("rte", "zero-shot", False)
    assert (row["value"], row["low"], row["high"]) == pytest.approx((-0.5, -0.5 - half, -0.5 + half))
    for other in (answered([1, 0], "b"), answered([1, 0, 0, 0], "a", "acc_norm")):
        assert runs.changes(other, dense).empty


def test_every_run_is_in_the_history_once() -> None:
    first = runs.run(config(tag="good"))
    assert runs.run(config()).cached and list(runs.history().id) == [first.id]
    follows = runs.run(config(prune=None, parent="good"))
    table = runs.history().set_index("id")
    assert table.parent[follows.id] == first.id and table.tag[first.id] == "good" and list(table.index) == [first.id, follows.id]
    assert runs.version_of("good") == runs.version_of(first.id[:5]) == first.id
    with runs.open_history() as store:
        blocks = store.blocks([1])
        assert blocks.nmse.tolist() == first.errors.nmse.tolist() and list(blocks.source) == list(first.errors.source)


def test_the_commit_is_that_of_the_code_that_ran(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    found = runs.run(config())
    assert found.record["commit"] == versions.commit()
    file = found.folder / "record.json"
    file.write_text(json.dumps({**found.record, "commit": "0123abc"}))
    (cache / "history.sqlite").unlink()
    assert runs.history().commit.tolist() == ["0123abc"], "and not of the code that remembers"


def test_a_process_that_ran_something_is_not_taken_for_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(config: RunConfig, id: str, parts: dict[str, Any], folder: Path) -> None:
        progress.ABOUT.update(run=id)
        raise RuntimeError("broken")

    monkeypatch.setattr(runs, "_compute", compute)
    monkeypatch.setattr(runs.models, "resolve_device", lambda _: "mps")
    with pytest.raises(RuntimeError, match="broken"):
        runs.run(config(device="cpu"))
    assert progress.ABOUT == {}


def test_an_unknown_parent_is_refused_before_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_compute", None)
    with pytest.raises(ConfigError, match="No versions are called 'nobody'; the last ones are: none yet"):
        runs.run(config(parent="nobody"))


def test_a_history_that_cannot_be_written_loses_no_run(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "history.sqlite").write_bytes(b"something else" * 1000)
    found, said = runs.run(config(tag="mine")), capsys.readouterr().err
    assert (found.folder / "record.json").is_file() and runs.find("mine").id == found.id
    assert f"The run {found.id} is recorded, but not in the history" in said and f"The run {found.id} is called mine, but not" in said
    (cache / "history.sqlite").unlink()
    assert list(runs.history().id) == [found.id], "a new history begins from the records"
