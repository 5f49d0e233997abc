"""Words on the command line, one call each.

Exit status: 0 done; 1 the work failed or an alert of severity error fired; 2 what can be known before work starts was wrong; 130 interrupted.
Heavy libraries are imported by the words that need them, so that `reconkit --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .config import (
    CRITERIA,
    LAYERS,
    PRECISIONS,
    SELF,
    TECHNIQUES,
    ConfigError,
    Faults,
    PruneConfig,
    RunConfig,
    SelfGenConfig,
    check_one_process,
    require,
)


def _switch(word: str) -> bool | str:
    """true and false as booleans, any other word as it is."""
    return {"true": True, "false": False}.get(word.lower(), word)


# Flag of `prune` → how its word is read, and its help; defaults are those of `PruneConfig`.
PRUNE_FLAGS: dict[str, tuple[Any, str]] = {
    "criterion": (str, f"what chooses the mask: {', '.join(CRITERIA)}"),
    "pattern": (str, "unstructured, or N:M such as 2:4"),
    "sparsity": (float, "share of the weights that goes"),
    "technique": (str, f"{', '.join(TECHNIQUES)}, or BR followed by any of +GP and +CR"),
    "epochs": (int, "passes over the samples in each window"),
    "steps": (int, "optimiser steps in each window; overrides --epochs"),
    "learning_rate": (float, "peak learning rate"),
    "batch_size": (int, "samples in one optimiser step"),
    "micro_batch": (int, "samples in one forward and backward, for small GPUs"),
    "precision": (str, f"of the reconstruction: {', '.join(PRECISIONS)}"),
    "keep_zeros": (_switch, "whether zeros of an earlier pruning stay zero: true, false, or auto (where they are many or in a pattern)"),
    "early_stopping": (int, "stop a window after so many epochs without a lower held-out loss"),
}
CACHED = ("assets", "models", "runs", "answers", "tasks", "testsets", "text")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"reconkit: {message}; see {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        arguments = parser().parse_args(argv)
        return arguments.call(arguments) or 0
    except KeyboardInterrupt:
        print("reconkit: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("RECONKIT_DEBUG") == "1":
            raise
        print(f"reconkit: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def sentence(error: Exception) -> str:
    """An exception in one line, or a line for each of several faults; one that nobody wrote for a reader keeps its type's name."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join([*(str(f) for f in (error.filename,) if f), error.strerror])
    if isinstance(error, Faults):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, OSError, ArithmeticError)) and text:
        return text
    return f"{type(error).__name__}: {text} (RECONKIT_DEBUG=1 shows where)"


def parser() -> Parser:
    top = Parser(prog="reconkit", description="Prune language models, reconstruct them block by block, and measure what it was worth.")
    top.add_argument("--version", action="version", version=f"reconkit {__version__}")
    words = top.add_subparsers(metavar="WORD", required=True)
    _prune_words(_word(words, "prune", prune, "prune a model and save it as a plain Hugging Face folder"))
    _selfgen_words(_word(words, "selfgen", selfgen, "let the model write its own calibration text"))
    _evaluate_words(_word(words, "evaluate", evaluate, "measure a model: perplexity, zero-shot accuracy, speed, size"))
    _suite_words(words.add_parser("suite", help="run notebooks by papermill from a manifest"))
    _runs_words(words.add_parser("runs", help="look at the recorded runs"))
    page = _word(words, "report", report, "write the dashboard: one HTML page of the whole history")
    page.add_argument("--out", default="report.html", metavar="FILE.html", help="default: %(default)s")
    monitor = _word(words, "watch", watch, "follow the running prunes in the terminal")
    named = "a process number, the id or tag of a run that is under way, or a recorded run; default: all that is running"
    monitor.add_argument("run", nargs="?", metavar="RUN", help=named)
    cached = _word(words, "data", data, "show, fetch or clear what is cached: offline assets, models, runs")
    cached.add_argument("--fetch", action="store_true", help="fetch every offline asset now")
    cached.add_argument("--lm-eval", metavar="DIR", help="write the zero-shot tasks there, for lm-eval's own command line")
    cached.add_argument("--limit", type=int, default=RunConfig.limit, help="items of each task, a seeded draw; 0: all; default: %(default)s")
    cached.add_argument("--seed", type=int, default=0, help="of that draw; default: %(default)s")
    cached.add_argument("--clear", choices=(*CACHED, "all"), help="delete that part of the cache")
    return top


def _word(words: Any, name: str, call: Any, help: str) -> argparse.ArgumentParser:
    word = words.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    word.set_defaults(call=call)
    return word


def _prune_words(word: argparse.ArgumentParser) -> None:
    word.add_argument("--model", required=True, help="smollm2-135m, tiny, a folder, a .gguf file or a hub id")
    where = word.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="DIR", help="new or empty folder for the pruned model")
    where.add_argument("--plan", action="store_true", help="print what would be done, and what time, memory and disk it takes by a look of seconds")
    word.add_argument(
        "--corpus",
        default=RunConfig.corpus,
        help="calibration text: wiki, news, pydocs, c4, wikitext2, ptb, a .txt or .jsonl file; default: %(default)s",
    )
    word.add_argument("--count", type=int, default=RunConfig.count, help="calibration samples; default: %(default)s")
    word.add_argument("--length", type=int, default=RunConfig.length, help="tokens in a sample; default: %(default)s")
    _config_words(word, PruneConfig, PRUNE_FLAGS)
    word.add_argument(
        "--layers", nargs="+", default=[PruneConfig.layers], help=f"{', '.join(LAYERS)}, or name patterns such as 'mlp.*'; default: all"
    )
    word.add_argument("--bos", choices=["auto"], default=False, help=BOS)
    word.add_argument("--recompute", action="store_true", help="recompute activations in the backward pass: less memory, more time")
    word.add_argument("--seed", type=int, default=PruneConfig.seed, help="of the draw and the order of samples; default: %(default)s")
    word.add_argument("--extra", metavar="FILE.jsonl", help="text that only trains, such as `reconkit selfgen` writes")
    word.add_argument("--held-out", nargs="+", default=[], metavar="NAME", help="corpora on which the error is measured, block by block")
    word.add_argument("--price-per-hour", type=float, metavar="MONEY", help="of this machine, for --plan")
    word.add_argument("--offload", action="store_true", help="read blocks from disk one at a time, for models larger than memory")
    word.add_argument("--checkpoint", metavar="DIR", help="keep the state after every window; the same command continues from it")
    _machine_words(word)


BOS = "auto: samples start with the BOS token of a tokenizer that puts one before a text, such as Gemma's; default: none, as in the paper"


def _machine_words(word: argparse.ArgumentParser) -> None:
    word.add_argument("--device", default=RunConfig.device, help="auto, cuda, mps or cpu; default: %(default)s")
    word.add_argument("--dtype", default=RunConfig.dtype, help="float32, bfloat16 or float16; default: %(default)s")


# Flag of `selfgen` → how its word is read, and its help; defaults are those of `SelfGenConfig`.
SELFGEN_FLAGS: dict[str, tuple[Any, str]] = {
    "start": (str, "token (the paper's recipe: a random one, then greedy ones), or prefix (a few tokens of --prefixes)"),
    "greedy": (int, "greedy tokens after the random one"),
    "prefix_length": (int, "tokens of real text that a text starts with"),
    "temperature": (float, "of the sampling"),
    "written": (int, "tokens written of each text, of which a random crop is kept; default: --length"),
    "batch_size": (int, "texts written at once; another size gives other text"),
    "language": (str, "kept if detected as this language: en and the like, any, or auto (en, except for the tiny model)"),
    "symbols": (float, "largest share of characters that code is full of, such as 0.05"),
    "distinct": (float, "smallest share of distinct runs of four tokens, such as 0.8"),
    "unlikely": (float, "share of the texts that is dropped as the most unlikely ones"),
}


def _selfgen_words(word: argparse.ArgumentParser) -> None:
    word.add_argument("--model", required=True, help="smollm2-135m, tiny, a folder, a .gguf file or a hub id")
    word.add_argument("--count", type=int, default=RunConfig.count, help="texts; default: %(default)s")
    word.add_argument("--length", type=int, default=RunConfig.length, help="tokens in a text; default: %(default)s")
    word.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    word.add_argument("--bos", choices=["auto"], default=False, help=BOS)
    word.add_argument("--out", required=True, metavar="FILE.jsonl", help="for --extra of `reconkit prune`; an interrupted file goes on")
    word.add_argument("--prefixes", default=RunConfig.corpus, metavar="CORPUS", help="real text for --start prefix; default: %(default)s")
    _config_words(word, SelfGenConfig, SELFGEN_FLAGS)
    _machine_words(word)


def _config_words(word: argparse.ArgumentParser, kind: type, flags: dict[str, tuple[Any, str]]) -> None:
    """A flag for each field of a configuration, with its default."""
    for flag, (read, text) in flags.items():
        default = getattr(kind, flag)
        said = text + (f"; default: {default}" if default is not None and "default:" not in text else "")
        word.add_argument(f"--{flag.replace('_', '-')}", type=read, default=default, help=said)


def _evaluate_words(word: argparse.ArgumentParser) -> None:
    word.add_argument("model", metavar="MODEL", help="smollm2-135m, tiny, a folder, a .gguf file or a hub id")
    word.add_argument("--against", metavar="DENSE", help="the model it is compared with, item by item")
    word.add_argument(
        "--perplexity", nargs="*", default=list(RunConfig.test), metavar="CORPUS", help="self: text that DENSE writes; default: %(default)s"
    )
    word.add_argument("--cloze", action="store_true", help="fill 500 blanks in the first corpus, which DENSE must fill well above chance")
    word.add_argument("--split", choices=("train", "validation", "test"), default="test", help="default: %(default)s")
    word.add_argument("--count", type=int, default=RunConfig.test_count, help="samples of each corpus; 0: the whole split; default: %(default)s")
    word.add_argument("--length", type=int, default=RunConfig.length, help="tokens in a sample; default: %(default)s")
    word.add_argument("--bos", choices=["auto"], default=False, help=BOS)
    word.add_argument("--tasks", nargs="*", default=[], metavar="TASK", help=f"zero-shot tasks: {', '.join(RunConfig.tasks)}")
    word.add_argument("--limit", type=int, default=RunConfig.limit, help="items of each task, a seeded draw; 0: all; default: %(default)s")
    word.add_argument("--speed", action="store_true", help="time generation as well, in turns with --against")
    word.add_argument("--packed", action="store_true", help="measure the size as bitmasks and values, really written and read back")
    word.add_argument("--price-per-hour", type=float, metavar="MONEY", help="of this machine: what measuring and a million tokens cost")
    word.add_argument("--speed-batches", type=int, nargs="+", default=[1, 8], metavar="N", help="prompts at once; default: %(default)s")
    word.add_argument("--seed", type=int, default=0, help="of the draws; default: %(default)s")
    word.add_argument("--out", metavar="FILE.json", help="write the whole record there")
    _machine_words(word)


def _suite_words(word: argparse.ArgumentParser) -> None:
    words = word.add_subparsers(metavar="WORD", required=True)
    start = _word(words, "run", suite_run, "run the notebooks of a manifest; what is unchanged costs nothing")
    start.add_argument("manifest", metavar="NAME.toml")
    start.add_argument("--only", metavar="GLOB", help="only the entries whose name matches")
    start.add_argument("--jobs", type=int, help="notebooks at once; default: 2 on a CPU, 1 on a GPU; on Ray only what decides the threads of each")
    start.add_argument("--on", choices=["ray"], help="run them on Ray, one GPU each where there are GPUs; default: on this machine")
    start.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster, or auto; default: a Ray is started here for the while")
    start.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and run nothing")
    start.add_argument("--force", action="store_true", help="run what is unchanged, too")
    _word(words, "status", suite_status, "show the state of each entry of a manifest").add_argument("manifest", metavar="NAME.toml")
    shown = _word(words, "publish", suite_publish, "copy normalised notebooks, figures and data to papermill_runs/published/")
    shown.add_argument("manifest", metavar="NAME.toml")
    shown.add_argument("--only", metavar="GLOB", help="only the entries whose name matches; the others stay published as they are")
    bound = _word(words, "book", suite_book, "make a static HTML book with search of the executed notebooks")
    bound.add_argument("manifest", metavar="NAME.toml")
    bound.add_argument("--out", metavar="DIR", help="its folder, which is replaced; default: papermill_runs/book/NAME")
    new = _word(words, "new", suite_new, "write a manifest to start from, or one with every combination of a grid")
    new.add_argument("manifest", metavar="NAME.toml")
    new.add_argument("grid", nargs="*", metavar="NAME=VALUES", help='such as criterion=wanda,sparsegpt \'technique=["LR", "BR"]\' seed=0,1,2')
    new.add_argument("--notebook", default="00_start_here", help="that is swept; default: %(default)s")


def _runs_words(word: argparse.ArgumentParser) -> None:
    words = word.add_subparsers(metavar="WORD", required=True)
    run = "a run's id, the beginning of it, or its tag"
    shown = _word(words, "list", runs_list, "list the versions of the history, newest first")
    shown.add_argument("--last", type=int, metavar="N", help="only so many")
    _word(words, "show", runs_show, "show a run: configuration, measurements, notes").add_argument("run", metavar="RUN", help=run)
    compare = _word(words, "compare", runs_compare, "show what changed from one version to others, and where they begin to write something else")
    compare.add_argument("first", metavar="A", help=f"{run}: what the others are compared with, such as the dense model")
    compare.add_argument("others", metavar="B", nargs="+", help=run)
    compare.add_argument("--out", metavar="FILE.html", help="a page with the pictures")
    best = _word(words, "best", runs_best, "show which versions no other one beats in quality and cost, with how they were pruned")
    best.add_argument("--metric", required=True, help="the quality, such as perplexity/wiki")
    best.add_argument("--cost", default="seconds/prune", metavar="METRIC", help="the cost, of which less is better; default: %(default)s")
    best.add_argument("--limit", type=int, default=20, help="versions shown; default: %(default)s")
    tag = _word(words, "tag", runs_tag, "give a run a name")
    tag.add_argument("run", metavar="RUN", help=run)
    tag.add_argument("tag", metavar="TAG")
    check = _word(words, "check", runs_check, "hold a version against the rules; exit status 1 when an error fires")
    check.add_argument("run", nargs="?", metavar="RUN", help=f"{run}; default: the newest")
    check.add_argument("--all", action="store_true", help="every version, in order")
    check.add_argument("--rules", default="papermill_runs/alerts.toml", metavar="FILE.toml", help="default: %(default)s")
    check.add_argument("--github", action="store_true", help="print the alerts as annotations, too; always where GITHUB_ACTIONS is true")
    check.add_argument("--send", metavar="COMMAND", help="give each new alert to this command, as a line of JSON on its standard input")
    export = _word(words, "export", runs_export, "write every measurement of every version as CSV or Parquet")
    export.add_argument("--out", metavar="FILE.csv", help="a .csv or .parquet file; default: standard output, as CSV")
    export.add_argument("--salvage", action="store_true", help="of a damaged history: the rows that can still be read")


def prune(a: argparse.Namespace) -> None:
    layers = a.layers[0] if len(a.layers) == 1 and a.layers[0] in LAYERS else tuple(a.layers)
    config = PruneConfig(**{flag: getattr(a, flag) for flag in PRUNE_FLAGS}, layers=layers, recompute=a.recompute, seed=a.seed)
    options = {"extra": a.extra, "seed": a.seed, "device": a.device, "dtype": a.dtype, "price_per_hour": a.price_per_hour, "bos": a.bos}
    job = RunConfig(a.model, a.corpus, a.count, a.length, tuple(a.held_out), config, **options)
    check_one_process()
    _check_texts([a.corpus, *a.held_out, *([a.extra] if a.extra else [])])
    _check_models([a.model])
    if a.out:
        _check_folder(Path(a.out))
        inside = a.checkpoint is not None and Path(a.checkpoint).absolute().is_relative_to(Path(a.out).absolute())
        require(not inside, "--checkpoint", a.checkpoint, "a folder outside of --out, which takes the model alone")
    import torch

    from . import models, plan, report

    options = {"dtype": getattr(torch, a.dtype), "device": a.device}
    beside = Path(a.out).absolute().parent if a.out else None  # so that finished blocks need not be copied
    if beside:
        beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reconkit-", dir=beside) if a.offload else nullcontext() as folder:
        found = plan.estimate(job, offload=a.offload) if a.plan else None
        model, tokenizer = models.open_model(a.model, folder, **options) if folder else models.load_model(a.model, **options)
        if found:
            return print(plan.describe(model, job, found, checkpoint=a.checkpoint is not None, price_per_hour=a.price_per_hour))
        result = _prune(a, job, config, model, tokenizer)
        models.save_model(model, tokenizer, a.out)
    print(report.summary(result))
    print(f"Saved in {a.out}; transformers' from_pretrained loads it.")


def _prune(a: argparse.Namespace, job: RunConfig, config: PruneConfig, model: Any, tokenizer: Any) -> Any:
    from . import data, pruning

    options = {"length": a.length, "seed": a.seed, "bos": a.bos}
    samples = data.load_samples(a.corpus, tokenizer, count=a.count, **options)
    extra = data.load_samples(a.extra, tokenizer, count=None, **options) if a.extra else None
    held_out = {name: data.load_samples(name, tokenizer, count=job.held_out_count, split="validation", **options) for name in a.held_out}
    return pruning.prune(model, samples, config, extra=extra, held_out=held_out, checkpoint=a.checkpoint)


def _check_models(names: Sequence[str]) -> None:
    from .models import check_model

    for name in names:
        check_model(name)


def _check_texts(names: Sequence[str]) -> None:
    from .data import check_corpus

    for name in names:
        check_corpus(name)


def _check_tasks(names: Sequence[str]) -> None:
    if names:
        from .evaluation import check_tasks

        check_tasks(names)


def _check_folder(folder: Path) -> None:
    """A folder that can be made, or an empty one that can be written."""
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "--out", str(folder), "a new or an empty folder")
    _check_writable(folder)


def _check_writable(path: Path) -> None:
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    require(there.is_dir() or there == path.absolute(), "--out", str(path), f"below a folder, and {there} is a file")
    require(os.access(there, os.W_OK), "--out", str(path), f"where you may write, and {there} is read-only")


def selfgen(a: argparse.Namespace) -> None:
    settings = {flag: getattr(a, flag) for flag in SELFGEN_FLAGS}
    config = SelfGenConfig(**{**settings, "language": None if a.language == "any" else a.language})
    RunConfig(a.model, count=a.count, length=a.length, seed=a.seed, device=a.device, dtype=a.dtype, selfgen=config)
    require(a.out.endswith(".jsonl") and not Path(a.out).is_dir(), "--out", a.out, "a .jsonl file")
    _check_models([a.model])
    if config.start == "prefix":
        _check_texts([a.prefixes])
    _check_writable(Path(a.out).parent)
    import torch

    from . import assets, data, models
    from . import selfgen as room

    model, tokenizer = models.load_model(a.model, dtype=getattr(torch, a.dtype), device=a.device)
    prefixes = None
    if config.start == "prefix":
        prefixes = data.prefixes(a.prefixes, tokenizer, length=config.prefix_length, seed=a.seed)
    try:
        with assets.disk(Path(a.out).absolute()):
            options = {"count": a.count, "length": a.length, "seed": a.seed, "bos": a.bos}
            found = room.write(a.out, model, tokenizer, config=config, prefixes=prefixes, **options)
    except KeyboardInterrupt:
        print(f"\nStopped; the same command goes on from {a.out}.partial.", file=sys.stderr)
        raise
    print(f"Wrote {len(found.tokens)} texts of {a.length} tokens to {a.out}: {room.told(found.counts)}.")


def evaluate(a: argparse.Namespace) -> None:
    RunConfig(a.model, count=a.count or 1, length=a.length, limit=a.limit or None, seed=a.seed, device=a.device, dtype=a.dtype)
    _check_models([a.model, *([a.against] if a.against else [])])
    real = [corpus for corpus in a.perplexity if corpus != SELF]
    _check_texts(real)
    _check_tasks(a.tasks)
    require(not a.cloze or len(real) > 0, "--perplexity", a.perplexity, "a list with a corpus in it, from which --cloze makes blanks")
    require(all(n >= 1 for n in a.speed_batches), "--speed-batches", a.speed_batches, "whole numbers of at least 1")
    require(a.price_per_hour is None or a.price_per_hour >= 0, "--price-per-hour", a.price_per_hour, "a price, or nothing")
    if a.out:
        require(not Path(a.out).is_dir(), "--out", a.out, "a file")
        _check_writable(Path(a.out).parent)
    import torch

    from . import evaluation, models, report, testsets

    for name in (a.model, a.against or a.model):  # before weights are read
        models.check_length(models.config_of(name), a.length if a.perplexity or a.cloze else 0, "--length: the test text")
    options = {"dtype": getattr(torch, a.dtype), "device": a.device}
    model, tokenizer = models.load_model(a.model, **options)
    other = models.load_model(a.against, **options)[0] if a.against else None
    dense = model if other is None else other
    sets = {"length": a.length, "seed": a.seed, "bos": a.bos}
    record = evaluation.evaluate(
        model,
        tokenizer,
        perplexity=real,
        texts={SELF: testsets.own_test(dense, tokenizer, count=a.count or RunConfig.test_count, **sets)} if SELF in a.perplexity else None,
        blanks=testsets.cloze_of(dense, tokenizer, real[0], **sets) if a.cloze else None,
        split=a.split,
        count=a.count or None,
        length=a.length,
        tasks=a.tasks,
        limit=a.limit or None,
        against=other,
        speed=a.speed,
        speed_batches=a.speed_batches,
        packed=a.packed,
        price_per_hour=a.price_per_hour,
        seed=a.seed,
        bos=a.bos,
    )
    print(report.evaluation(record))
    if a.out:
        _write(Path(a.out), json.dumps({**record, "model": a.model}, indent=2, default=float) + "\n")


def _write(file: Path, text: str) -> None:
    """Aside first, so that a broken write leaves what was there; a pipe or a device is written as it is."""
    if file.exists() and not file.is_file():
        file.write_text(text, encoding="utf-8")
        return
    from .assets import writing

    with writing(file.absolute()) as partial:
        partial.write_text(text, encoding="utf-8")


def suite_run(a: argparse.Namespace) -> int:
    from . import suite

    return suite.run(a.manifest, only=a.only, jobs=a.jobs, dry_run=a.dry_run, force=a.force, on=a.on, address=a.address)


def suite_status(a: argparse.Namespace) -> None:
    from . import suite

    print(suite.status(a.manifest))


def suite_publish(a: argparse.Namespace) -> None:
    from . import suite

    suite.publish(a.manifest, a.only)


def suite_book(a: argparse.Namespace) -> None:
    from . import suite

    suite.book(a.manifest, a.out)


def suite_new(a: argparse.Namespace) -> None:
    from . import suite

    suite.new(a.manifest, a.grid, notebook=a.notebook)


def runs_list(a: argparse.Namespace) -> None:
    from . import report, runs

    require(a.last is None or a.last >= 1, "--last", a.last, "a whole number of at least 1")
    history = runs.history()
    print(report.EMPTY if history.empty else report.text_table(report.arrange(history.tail(a.last or len(history)))))


def runs_show(a: argparse.Namespace) -> None:
    from . import report, runs

    run = runs.recorded(id := runs.version_of(a.run))
    print(report.describe(run) if run else report.remembered(runs.history(), id))


def runs_compare(a: argparse.Namespace) -> None:
    require(a.out is None or a.out.endswith(".html"), "--out", a.out, "a .html file")
    if a.out:
        _check_writable(Path(a.out).parent)
    from . import comparison, runs

    against, others = runs.find(a.first), [runs.find(name) for name in a.others]
    found = comparison.table(others, against)
    print(comparison.in_terminal(found, others, against))
    if a.out:
        _write(Path(a.out), comparison.page(found, others, against))


def runs_best(a: argparse.Namespace) -> None:
    from . import report, runs

    history = runs.history()
    print(report.EMPTY if history.empty else report.best(history, a.metric, a.cost, a.limit))


def runs_tag(a: argparse.Namespace) -> None:
    from . import runs

    runs.tag(a.run, a.tag)


def runs_check(a: argparse.Namespace) -> int:
    from . import alerts, report, runs

    require(not (a.all and a.run), "--all", a.run, "given without a RUN")
    command = None if a.send is None else alerts.command(a.send)
    with runs.open_history() as store:
        history = store.versions(), store.measurements()
        rules = alerts.load_rules(a.rules, history[1])
        if history[0].empty:
            print(report.EMPTY)
            return 0
        asked = [int(number) for number in history[0].number] if a.all else [a.run]
        reports = [alerts.check(history, version, rules) for version in asked]
        new = [alert for found in reports for alert in store.add_alerts(found.fired)]
    print("\n\n".join(map(alerts.describe, reports)))
    if a.github or os.environ.get("GITHUB_ACTIONS") == "true":
        print("\n".join(filter(None, map(alerts.annotations, reports))))
    if command and new:
        alerts.send(command, new)
    return int(any(found.failed for found in reports))


def runs_export(a: argparse.Namespace) -> None:
    from . import assets, history, runs

    kind = Path(a.out).suffix if a.out else ".csv"
    require(kind in (".csv", ".parquet"), "--out", a.out, "a .csv or a .parquet file")
    if a.out:
        _check_writable(Path(a.out).parent)
    if a.salvage:
        table = history.salvaged(history.path())
    else:
        with runs.open_history() as store:
            table = history.joined(store)
    if not a.out:
        table.to_csv(sys.stdout, index=False)
        return
    with assets.writing(Path(a.out).absolute()) as partial:
        table.to_parquet(partial, index=False) if kind == ".parquet" else table.to_csv(partial, index=False)


def report(a: argparse.Namespace) -> None:
    from . import dashboard
    from . import report as room

    _check_writable(Path(a.out).parent)
    written = dashboard.report(a.out)
    print(f"Wrote {written}." if written else room.EMPTY)


def watch(a: argparse.Namespace) -> None:
    from . import monitor

    monitor.watch(a.run)


def data(a: argparse.Namespace) -> None:
    from . import assets, report

    for part in CACHED if a.clear == "all" else (a.clear,) if a.clear else ():
        shutil.rmtree(assets.cache_dir() / part, ignore_errors=True)
    if a.fetch:
        for name in assets.NAMES:
            assets.asset(name)
    if a.lm_eval:
        from . import zeroshot

        require(a.limit >= 0, "--limit", a.limit, "a whole number of at least 0")
        zeroshot.write_tasks(a.lm_eval, RunConfig.tasks, limit=a.limit or None, seed=a.seed)
        print(f"lm_eval --model hf --model_args pretrained=MODEL,dtype=float32 --include_path {a.lm_eval} --tasks {zeroshot.GROUP}")
        return
    print(report.test_sets())
    print(report.cached())
