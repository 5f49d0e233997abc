"""The command line: words, exit statuses, sentences instead of tracebacks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from reconkit import cli, config

ROOT = Path(__file__).parent.parent
RULES = str(ROOT / "papermill_runs" / "alerts.toml")
TINY = ["--model", "tiny", "--corpus", "pydocs", "--count", "4", "--length", "32"]
WORDS = {
    "prune": [],
    "selfgen": [],
    "evaluate": [],
    "suite": ["run", "status", "publish", "new"],
    "runs": ["list", "show", "compare", "best", "tag", "check", "export"],
    "report": [],
    "watch": [],
    "data": [],
}


def status(*words: str) -> int:
    """The exit status as a shell would see it."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)


def in_a_process(*words: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = ["-c", code] if code else ["-m", "reconkit", *words]
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom reconkit import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'pandas', 'matplotlib', 'datasets'} & set(sys.modules)))"
    )
    assert in_a_process(code=code).stdout.splitlines()[-1] == "[]"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = in_a_process("--help")
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0 and all(word in done.stdout for word in WORDS)
    assert min(seconds) < 1


@pytest.mark.parametrize("words", [[w] for w in WORDS] + [[w, v] for w, more in WORDS.items() for v in more], ids=" ".join)
def test_each_word_has_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*words, "--help") == 0
    assert f"usage: reconkit {' '.join(words)}" in capsys.readouterr().out


def test_prune_has_the_defaults_of_its_configuration() -> None:
    a = cli.parser().parse_args(["prune", "--model", "tiny", "--plan"])
    made = config.PruneConfig(**{flag: getattr(a, flag) for flag in cli.PRUNE_FLAGS}, layers=a.layers[0], recompute=a.recompute, seed=a.seed)
    assert made == config.PruneConfig()
    assert (a.corpus, a.count, a.length, a.held_out, a.seed) == ("wiki", 64, 256, [], 0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "required"),
        (["prun"], "invalid choice"),
        (["prune", "--model", "tiny"], "--out --plan"),
        (["prune", "--model", "tiny", "--plan", "--out", "x"], "not allowed"),
        (["prune", *TINY, "--plan", "--sparsity", "much"], "invalid float"),
        (["prune", *TINY, "--plan", "--sparsity", "1.5"], "sparsity is 1.5"),
        (["prune", *TINY, "--plan", "--criterion", "guess"], "magnitude, wanda, sparsegpt"),
        (["prune", *TINY, "--plan", "--technique", "BR+XX"], "BR+GP+CR"),
        (["prune", *TINY, "--plan", "--pattern", "4:2"], "2:4 or 4:8"),
        (["prune", *TINY, "--plan", "--count", "0"], "count is 0"),
        (["prune", *TINY, "--plan", "--device", "tpu"], "auto, cuda, mps or cpu"),
        (["prune", *TINY, "--plan", "--layers", "head"], "matches none of"),
        (["prune", *TINY, "--plan", "--model", "no-such-model"], "smollm2-135m"),
        (["prune", *TINY, "--plan", "--corpus", "no-such-text"], "wiki"),
        (["prune", *TINY, "--plan", "--held-out", "no-such-text"], "wiki"),
        (["prune", *TINY, "--plan", "--extra", "missing.jsonl"], "missing.jsonl"),
        (["evaluate", "no-such-model"], "smollm2-135m"),
        (["evaluate", "tiny", "--perplexity", "no-such-text"], "wiki"),
        (["evaluate", "tiny", "--perplexity", "pydocs", "--length", "1"], "length is 1"),
        (["runs", "show", "no-such-run"], "no-such-run"),
        (["runs", "compare", "no-such-run", "other"], "no-such-run"),
        (["watch", "no-such-run"], "no-such-run"),
        (["selfgen", "--model", "tiny", "--out", "text.txt"], "a .jsonl file"),
        (["selfgen", "--model", "tiny", "--out", "t.jsonl", "--length", "3"], "from 6 to"),
        (["data", "--clear", "everything"], "invalid choice"),
        (["suite", "run", "missing.toml"], "missing.toml"),
        (["suite", "run", "missing.toml", "--on", "moon"], "invalid choice"),
        (["suite", "run", "missing.toml", "--address", "auto"], "needs --on ray"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_word_is_one_sentence_and_status_2(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*words) == 2
    said = capsys.readouterr().err
    assert said.startswith("reconkit: ") and said.count("\n") == 1
    assert says in said


def test_a_wrong_word_in_a_process_of_its_own() -> None:
    done = in_a_process("prune", "--model", "no-such-model", "--out", "x")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("reconkit: ")


def test_out_must_be_new_or_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "model"):
        assert status("prune", *TINY, "--out", str(out)) == 2
        assert "--out" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("error", "expected", "says"),
    [
        (config.ConfigError("No model is called 'x'."), 2, "reconkit: No model is called 'x'.\n"),
        (RuntimeError("Out of memory\nin block 3."), 1, "reconkit: Out of memory in block 3.\n"),
        (OSError(28, "No space left on device", "model.safetensors"), 1, "reconkit: model.safetensors: No space left on device\n"),
        (KeyError("block"), 1, "reconkit: KeyError: 'block' (RECONKIT_DEBUG=1 shows where)\n"),
        (KeyboardInterrupt(), 130, "reconkit: interrupted.\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_failing_work_ends_in_a_sentence(
    error: BaseException, expected: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "watch", fails)
    assert status("watch") == expected
    assert capsys.readouterr().err == says


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "watch", lambda _: {}["missing"])
    monkeypatch.setenv("RECONKIT_DEBUG", "1")
    with pytest.raises(KeyError):
        cli.main(["watch"])


def test_a_closed_pipe_is_no_failure() -> None:
    shell = f"{sys.executable} -m reconkit runs list | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0" and not done.stderr


def test_an_empty_history_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    asked = (["runs", "list"], ["runs", "best", "--metric", "perplexity/wiki"], ["runs", "check", "--rules", RULES])
    for words in (*asked, ["report", "--out", str(page)], ["watch"]):
        assert status(*words) == 0
        assert "No run is recorded yet" in capsys.readouterr().out
    assert not page.exists()


def test_plan_prints_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert status("prune", *TINY, "--plan", "--technique", "BR+GP+CR", "--sparsity", "0.25", "--epochs", "3", "--held-out", "pydocs") == 0
    said = capsys.readouterr().out
    hidden, inner, keys = 64, 160, 32
    weights = 4 * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
    assert f"{0.25 * weights / 1e6:.1f}M of {weights / 1e6:.1f}M weights in 28 matrices" in said
    assert "5 windows of up to 2 blocks, 3 optimiser steps each" in said and "4 samples of 32 tokens of pydocs" in said
    assert not list(tmp_path.iterdir())


def test_prune_saves_a_model_that_transformers_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "pruned"
    assert status("prune", *TINY, "--out", str(out), "--technique", "LR", "--criterion", "wanda", "--held-out", "pydocs") == 0
    said = capsys.readouterr().out
    assert "calibration" in said and "pydocs" in said and "verdict" in said and str(out) in said
    weight = AutoModelForCausalLM.from_pretrained(out).model.layers[3].mlp.up_proj.weight
    assert (weight == 0).float().mean() == 0.5
    assert status("prune", *TINY, "--out", str(out)) == 2, "a second model never replaces the first"


def test_prune_reads_blocks_from_disk_and_gives_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from reconkit import models

    models.save_model(*models.load_model("tiny"), tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), *TINY[2:], "--epochs", "1"]
    assert TINY[0] == "--model" and status("prune", *words, "--out", str(tmp_path / "whole")) == 0
    assert status("prune", *words, "--plan", "--offload") == 0 and "weights in" in capsys.readouterr().out
    assert status("prune", *words, "--out", str(tmp_path / "blocks"), "--offload") == 0
    sums = {name: models.weights_sum(models.load_model(str(tmp_path / name))[0]) for name in ("whole", "blocks")}
    assert sums["whole"] == sums["blocks"]
    assert {p.name for p in tmp_path.iterdir()} == {"model", "whole", "blocks"}, "nothing is left"
    assert status("prune", *TINY, "--out", str(tmp_path / "more"), "--offload") == 2


def test_selfgen_writes_text_that_prune_takes_as_extra(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "self.jsonl"
    assert status("selfgen", "--model", "tiny", "--count", "2", "--length", "32", "--seed", "3", "--out", str(file)) == 0
    assert len(file.read_text().splitlines()) == 2 and str(file) in capsys.readouterr().out
    assert status("prune", *TINY, "--out", str(tmp_path / "out"), "--technique", "BR", "--epochs", "1", "--extra", str(file)) == 0
    assert "extra" in capsys.readouterr().out


def test_an_unknown_task_is_refused_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from reconkit import models

    monkeypatch.setattr(models, "load_model", lambda *args, **options: pytest.fail("loaded first"))
    assert status("evaluate", "tiny", "--tasks", "chess") == 2
    assert "boolq" in capsys.readouterr().err


@pytest.mark.parametrize("more", [(), ("--against", "tiny"), ("--perplexity", "self"), ("--cloze",)])
def test_evaluate_beyond_the_context_is_refused_before_weights_are_read(
    more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from reconkit import models

    folder = models.save_model(*models.load_model("tiny"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(models, "load_model", lambda *args, **options: pytest.fail("loaded first"))
    assert status("evaluate", str(folder), "--perplexity", "pydocs", "--length", "513", *more) == 2
    assert capsys.readouterr().err == "reconkit: --length: the test text has 513 tokens a sample, more than the model's context of 512.\n"


def test_a_bos_token_goes_through_every_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers.processors import TemplateProcessing

    from reconkit import models

    model, tokenizer = models.load_model("tiny")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    folder, file, out = str(models.save_model(model, tokenizer, tmp_path / "model")), str(tmp_path / "self.jsonl"), tmp_path / "record.json"
    bos = ("--count", "4", "--length", "24", "--bos", "auto")
    assert status("selfgen", "--model", folder, "--out", file, "--batch-size", "8", *bos) == 0
    assert [len(json.loads(line)["tokens"]) for line in Path(file).read_text().splitlines()] == [23] * 4
    words = ("--corpus", "pydocs", "--technique", "LR", "--extra", file, "--held-out", "pydocs", "--out", str(tmp_path / "pruned"))
    assert status("prune", "--model", folder, *words, *bos) == 0
    records = []
    for more in ((), bos[-2:]):
        assert status("evaluate", folder, "--perplexity", "pydocs", "self", *bos[:-2], *more, "--out", str(out)) == 0
        records.append(json.loads(out.read_text()))
    plain, begun = records
    assert plain["fingerprint"] != begun["fingerprint"]
    assert all(
        a["length"] == b["length"] == 24 and a["samples"] != b["samples"] for a, b in zip(plain["perplexity"], begun["perplexity"], strict=True)
    )
    assert status("evaluate", folder, "--bos", "always") == 2 and "--bos" in capsys.readouterr().err


def test_evaluate_on_text_of_the_dense_models_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "own.json"
    words = ("evaluate", "tiny", "--against", "tiny", "--perplexity", "pydocs", "self", "--count", "4", "--length", "32", "--out", str(out))
    assert status(*words) == 0
    record = json.loads(out.read_text())
    assert [row["corpus"] for row in record["perplexity"]] == ["pydocs", "self"] and record["perplexity"][1]["split"] == "given"
    assert [row["ratio"] for row in record["perplexity"]] == [1, 1] and "self" in capsys.readouterr().out
    assert status("evaluate", "tiny", "--perplexity", "pydocs", "--cloze", "--length", "32") == 2
    assert "0 blanks" in capsys.readouterr().err
    assert status("evaluate", "tiny", "--perplexity", "self", "--cloze") == 2
    assert "--perplexity" in capsys.readouterr().err


def test_data_writes_tasks_for_lm_evals_own_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    from reconkit import data

    items = tmp_path / "items.jsonl"
    items.write_text("".join(f'{{"n": {i}}}\n' for i in range(9)))
    monkeypatch.setattr(data, "task_data", lambda task: items)
    assert status("data", "--lm-eval", str(tmp_path / "tasks"), "--limit", "4") == 0
    assert f"--include_path {tmp_path / 'tasks'} --tasks reconkit" in capsys.readouterr().out
    assert len((tmp_path / "tasks" / "boolq.jsonl").read_text().splitlines()) == 4
    assert len(json.loads((tmp_path / "tasks" / "reconkit.yaml").read_text())["task"]) == 7


def test_evaluate_writes_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "record.json"
    assert status("evaluate", "tiny", "--perplexity", "pydocs", "--count", "4", "--length", "32", "--out", str(out)) == 0
    assert "pydocs" in capsys.readouterr().out
    record = json.loads(out.read_text())
    [row] = record["perplexity"]
    assert row["corpus"] == "pydocs" and row["low"] <= row["value"] <= row["high"] and record["model"] == "tiny"
    assert {"fingerprint", "size", "cost"} <= set(record)


def test_a_record_is_written_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "record.json"
    out.write_text("old")
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(cli.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        cli._write(out, "new")
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]
    cli._write(out, "new")
    assert out.read_text() == "new" and list(tmp_path.iterdir()) == [out]
    cli._write(Path(os.devnull), "new")
    assert not Path(os.devnull).is_file()


@pytest.fixture
def two_runs() -> list[str]:
    """Two small runs in the history, the dense model and a pruned one."""
    from reconkit import runs

    small = {"corpus": "pydocs", "count": 4, "length": 32, "held_out": ("pydocs",), "test": ("pydocs",), "test_count": 4}
    dense = runs.run(config.RunConfig("tiny", prune=None, **small))
    pruned = runs.run(config.RunConfig("tiny", prune=config.PruneConfig(technique="LR", criterion="magnitude"), **small))
    return [dense.id, pruned.id]


def test_runs_words(two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, pruned = two_runs
    assert status("runs", "list") == 0
    said = capsys.readouterr().out
    assert all(run in said for run in two_runs)
    assert status("runs", "tag", dense, "original") == 0
    capsys.readouterr()
    assert status("runs", "show", "original") == 0
    said = capsys.readouterr().out
    assert dense in said and "perplexity/pydocs" in said and "original" in said
    assert status("runs", "compare", "original", pruned) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert "original" in header and any(pruned in row and "perplexity pydocs" in row for row in rows)
    assert status("runs", "list", "--last", "1") == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert status("runs", "best", "--metric", "perplexity/pydocs", "--limit", "1") == 0
    assert "1 of 1 pruned versions are beaten by none" in capsys.readouterr().out
    assert status("runs", "best", "--metric", "beauty") == 2
    assert "perplexity/pydocs" in capsys.readouterr().err
    assert status("runs", "export", "--out", str(tmp_path / "runs.csv")) == 0
    assert status("runs", "export", "--out", str(tmp_path / "runs.parquet")) == 0
    assert status("runs", "export", "--out", str(tmp_path / "runs.txt")) == 2
    for table in (pd.read_csv(tmp_path / "runs.csv"), pd.read_parquet(tmp_path / "runs.parquet")):
        assert set(table.version) == set(two_runs)
        assert {"parent", "model", "configuration", "commit", "metric", "test_set", "value", "unit", "direction", "n", "stderr"} <= set(table)
        assert {"hardware", "created", "seconds", "cost"} <= set(table)
    shutil.rmtree(Path(os.environ["RECONKIT_CACHE"]) / "runs" / pruned)
    capsys.readouterr()
    assert status("runs", "show", pruned) == 0
    assert "from the history" in capsys.readouterr().out
    assert status("report", "--out", str(tmp_path / "page.html")) == 0
    assert all(run in (tmp_path / "page.html").read_text() for run in two_runs)


def test_runs_check(two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    dense, pruned = two_runs
    rules, sent = tmp_path / "rules.toml", tmp_path / "sent.jsonl"
    rules.write_text("[[rule]]\nname = 'never off'\nmetric = 'nmse'\ntest_set = 'calibration'\nlimit = 0\n")
    words = ["runs", "check", "--rules", str(rules)]
    keep = f"import sys, pathlib; pathlib.Path({str(sent)!r}).open('a').write(sys.stdin.read())"
    assert status(*words, pruned[:8], "--send", f"{sys.executable} -c {shlex.quote(keep)}") == 1
    said = capsys.readouterr().out
    assert f"Version {pruned}" in said and "error    never off: nmse/calibration is " in said and "::error" not in said
    assert [json.loads(line)["version"] for line in sent.read_text().splitlines()] == [pruned]
    assert status(*words, "--github", "--send", f"{sys.executable} -c {shlex.quote(keep)}") == 1  # the newest; its alert is not new
    assert "\n::error title=reconkit%3A never off::" in capsys.readouterr().out and len(sent.read_text().splitlines()) == 1
    assert status(*words, dense) == 0
    assert "never off: nmse/calibration: not measured for this version" in capsys.readouterr().out
    assert status(*words, "--all") == 1
    said = capsys.readouterr().out
    assert said.index(dense) < said.index(pruned)
    rules.write_text(rules.read_text() + "severity = 'warning'\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert status(*words) == 0
    assert "::warning title=" in capsys.readouterr().out
    for more, says in ((["nobody"], "nobody"), (["--all", pruned], "--all"), (["--send", ""], "--send"), (["--rules", "none.toml"], "none.toml")):
        assert status(*words, *more) == 2
        assert says in capsys.readouterr().err
    rules.write_text("[[rule]]\nname = 'gone'\nmetric = 'nmse'\nagainst = 'v0'\nrelative = 0.1\n")
    assert status(*words) == 2
    assert "rule 'gone': against is 'v0'" in capsys.readouterr().err


def test_alerts_are_said_where_they_cannot_be_sent(two_runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "rules.toml"
    rules.write_text("[[rule]]\nname = 'r'\nmetric = 'nmse'\ntest_set = 'calibration'\nlimit = 0\nseverity = 'warning'\n")
    assert status("runs", "check", "--rules", str(rules), "--send", "no-such-command") == 1
    said = capsys.readouterr()
    assert "warning  r: nmse/calibration is " in said.out
    why = "no-such-command cannot be started (No such file or directory). They are kept in the history."
    assert said.err == f"reconkit: The alerts were not sent on: {why}\n"


def test_data_shows_and_clears(cache: Path, two_runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status("data") == 0
    said = capsys.readouterr().out
    assert str(cache) in said and "runs" in said and "limit" in said
    assert status("data", "--clear", "runs") == 0
    capsys.readouterr()
    assert status("runs", "list") == 0
    assert all(run in capsys.readouterr().out for run in two_runs[:1]), "the history stays"
    (cache / "history.sqlite").unlink()
    assert status("runs", "list") == 0
    assert "No run is recorded yet" in capsys.readouterr().out
    assert os.path.isdir(cache)


def test_a_prune_on_a_read_only_cache_works(read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reconkit import data, reconstruct

    monkeypatch.setattr(data, "_docstrings", lambda: {f"module {i}": "Some words that are long enough. " * 40 for i in range(9)})
    monkeypatch.setattr(reconstruct, "_cpu", lambda: "a processor that nobody measured")
    reconstruct._bf16_pays.cache_clear()
    before = sorted(read_only.rglob("*"))
    assert status("prune", *TINY, "--technique", "BR", "--epochs", "1", "--out", str(tmp_path / "out")) == 0
    reconstruct._bf16_pays.cache_clear()
    assert (tmp_path / "out" / "model.safetensors").is_file() and sorted(read_only.rglob("*")) == before


@pytest.mark.parametrize("options", [(), ("--offload",), ("--checkpoint", "state")])
def test_a_full_disk_is_one_sentence(options: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    from reconkit import data, models, offload

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def cut(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    models.save_model(*models.load_model("tiny"), tmp_path / "tiny")
    monkeypatch.setattr(data, "_docstrings", lambda: {f"module {i}": "Some words that are long enough. " * 40 for i in range(9)})
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    monkeypatch.setattr(offload, "save_file", full)
    monkeypatch.setattr(torch, "save", cut)
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tmp_path / "tiny"), *TINY[2:], "--technique", "LR", "--out", str(tmp_path / "out")]
    assert status("prune", *words, *options) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"reconkit: {tmp_path}" if "state" not in options else "reconkit: state/")
    assert "cannot be written (" in last and "make room" in last and "Traceback" not in last
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*")), "nothing is left"
