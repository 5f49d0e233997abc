"""A run: load, prune, evaluate, record. The only room that reads or writes run records.

A record is a folder `<cache>/runs/<id>/` of record.json, errors.csv and training.csv (and the model, where it was asked
for). The id is a sum over everything that decides the numbers, so that the same question is answered from the record.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from filelock import FileLock

from . import assets, cost, data, evaluation, models, progress, pruning, testsets, versions
from . import history as store_of
from .config import RESULTS, SELF, ConfigError, OverfitConfig, PruneConfig, RunConfig, from_dict, require, to_dict
from .overfit import verdict
from .reconstruct import cpu_name, resolve_precision
from .streams import Errors

OUTSIDE = ("__main__", "assets", "book", "cli", "cluster", "dashboard", "monitor", "report", "suite", "sweep")
"Modules that no executed notebook depends on."
LIBRARIES = ("torch", "transformers", "numpy", "tokenizers", "datasets", "lm_eval", "py3langid")
NEEDED = 10**9  # free bytes without which no run begins
DEFAULT_LIMIT = "20GB"
DENSE = ("model", "prune", "evaluate", "test", "test_count", "test_length", "tasks", "limit", "draw", "device", "dtype", "bos")
"What of a configuration decides the measurements of a dense model."
NAMES = ("model", "corpus", "held_out", "test", "extra")
"What of a configuration names a model or a text, which is identified by its content."
TRAINING_ONLY = (
    "epochs", "steps", "learning_rate", "micro_batch", "recompute", "precision", "gradient_clip", "early_stopping", "target",
    "reconstruction_input", "seed",
)  # fmt: skip
"Fields of a PruneConfig that LR does not use."
NO_MATTER = ("tag", "parent", "keep_model", "test_seed", "price_per_hour", "offload", "checkpoint", "device")
"What of a configuration decides none; `draw` stands for the seed of the tests."
PROMPTS, PROMPT = 4, 16  # prompts of the generations, and tokens in each
SPENT = ("gpu_hours", "joules")
"What a part of a run takes besides seconds and memory, where there is a GPU."
ERRORS = ["block", "source", *Errors._fields]
TRAINING = ["window", "epoch", "source", "loss"]
CLAIM = ["claim", "paper", "expected here", "measured", "holds"]


@dataclass(frozen=True)
class Run:
    """A recorded run."""

    id: str
    folder: Path
    config: RunConfig
    metrics: dict[str, float]
    "Flat names: perplexity/wiki, nmse/calibration, accuracy/boolq, sparsity, seconds/prune, memory/rss, …"
    errors: pd.DataFrame
    "block, source, mse, nmse, token_nmse, token_nmse_90"
    training: pd.DataFrame
    "window, epoch, source, loss"
    notes: list[str]
    record: dict[str, Any]
    "The whole record: environment, per-sequence figures, what the id was made from."
    cached: bool = False
    "It was there already."

    @property
    def perplexity(self) -> pd.DataFrame:
        """corpus, value, low, high, n (independent units of the interval): one row a test corpus."""
        return pd.DataFrame(self.record["evaluation"]["perplexity"], columns=["corpus", "value", "low", "high", "n"])

    @property
    def final_errors(self) -> pd.DataFrame:
        """The last block's errors by source: mse, nmse, token_nmse, token_nmse_90; NaN where an old record has none."""
        return self.errors[self.errors.block == self.errors.block.max()].set_index("source").reindex(columns=list(Errors._fields))

    @property
    def final(self) -> pd.Series:
        """The last block's NMSE by source."""
        return self.errors[self.errors.block == self.errors.block.max()].set_index("source").nmse


def run(run_config: RunConfig) -> Run:
    """The record of a run; what was computed before costs nothing.

    Raises:
        ConfigError: a model, corpus or value that no source knows, before any work.
        OSError: the disk has no room for a record.
        RuntimeError: the process that did the work on the CPU was killed, for want of memory say.
    """
    require(isinstance(run_config, RunConfig), "run_config", type(run_config).__name__, "a RunConfig, such as rk.RunConfig(**values)")
    for corpus in _corpora(run_config):
        data.check_corpus(corpus)
    for field in ("held_out", "test"):
        check_names(field, getattr(run_config, field))
    if "zero_shot" in run_config.evaluate:
        evaluation.check_tasks(run_config.tasks)
    cache_limit()
    if run_config.tag:
        _check_tag(run_config.tag)
    parent = version_of(run_config.parent) if run_config.parent else None
    parts = _parts(run_config)
    id = _id(parts)
    found = None if run_config.keep_model else committed(id)
    if found is None:
        found = _made(run_config, parts)
    _say_differences(found)
    if run_config.tag:
        tag(id, run_config.tag)
        found = replace(found, config=replace(found.config, tag=run_config.tag))
    found = priced(found, run_config.price_per_hour)
    _remember_or_say(found, parent)
    return _judged(found, run_config.prune.overfit) if run_config.prune else found


def _made(run_config: RunConfig, parts: dict[str, Any]) -> Run:
    """The record in the cache, made where there is none or a damaged one."""
    id, folder = _id(parts), _folder()
    if not _is_whole(folder / id, run_config):
        assets.writable(folder)
    with FileLock(folder / f".{id}.lock") if os.access(folder, os.W_OK) else nullcontext():
        whole = _is_whole(folder / id, run_config)
        if not whole:
            free = shutil.disk_usage(folder).free
            if free < NEEDED:
                raise OSError(
                    28,
                    f"a run needs {NEEDED / 1e9:.0f} GB for a while and {free / 1e9:.1f} GB are free; make room, or set RECONKIT_CACHE",
                    str(folder),
                )
            with assets.disk(folder / id), tempfile.TemporaryDirectory(prefix=f".{id}-", dir=folder, ignore_cleanup_errors=True) as staging:
                task = (run_config, id, parts, Path(staging) / "new")
                if models.resolve_device(run_config.device) == "cpu":  # memory that was freed before would hide a peak
                    if (made := _made_before(run_config)) is not None and not made.is_file():
                        cost.apart(_make_sets, run_config)
                        made.touch()
                    cost.apart(_compute, *task)
                else:
                    try:
                        _compute(*task)
                    finally:  # what this process prunes next is no part of this run
                        progress.ABOUT.clear()
                if (folder / id / "tag").is_file():
                    shutil.copy(folder / id / "tag", Path(staging) / "new" / "tag")
                shutil.rmtree(folder / id, ignore_errors=True)
                os.replace(Path(staging) / "new", folder / id)
            _keep_within_limit(folder, id)
    return _read(folder / id, cached=whole)


def _is_whole(folder: Path, run_config: RunConfig) -> bool:
    """Whether a record is there and can be read, with its model where that is asked for."""
    return _whole(folder) is not None and (not run_config.keep_model or (folder / "model").is_dir())


def _whole(folder: Path) -> Run | None:
    """The record in a folder; None where there is none, or a damaged one, which is named on stderr."""
    if not (folder / "record.json").is_file():
        return None
    try:
        return _read(folder)
    except DAMAGED as error:
        print(f"The record {folder} is damaged ({type(error).__name__}), and is computed again.", file=sys.stderr)
        return None


def committed(id: str) -> Run | None:
    """The record of that id among those that are committed with the repository, or in the folder that RECONKIT_RECORDS names."""
    return _whole(_committed_folder() / id)


def _committed_folder() -> Path:
    return Path(os.environ.get("RECONKIT_RECORDS") or Path(__file__).parents[1] / "papermill_runs" / "records")


def differences(run: Run) -> str:
    """Where the versions and the processor that a record was made with differ from these here, as "name theirs (here ours)"."""
    how, there = run.config.prune, run.record.get("environment", {})
    device = models.resolve_device(run.config.device if run.config.device == "cpu" else "auto")
    here = {**environment(), "precision": resolve_precision(how.precision, device) if how and how.trains else "fp32"}
    names = [name for name in ("python", "processor", "gpu", "precision", *LIBRARIES) if name in there and there[name] != here[name]]
    return ", ".join(f"{name} {there[name]} (here {here[name]})" for name in names)


def _say_differences(run: Run) -> None:
    """Say once in a process what another environment a record comes from."""
    if (text := differences(run)) and text not in _SAID:
        _SAID.add(text)
        print(f"Some records were made elsewhere: {text}.")


_SAID: set[str] = set()
DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)
"What reading a record raises when a part of it is lost or altered."


def _judged(run: Run, thresholds: OverfitConfig) -> Run:
    """The record as these thresholds see it; they are no part of its id."""
    found = replace(run, config=replace(run.config, prune=replace(run.config.prune, overfit=thresholds)))
    word, reasons = verdict(found)
    return replace(found, record={**run.record, "verdict": word, "reasons": reasons})


def priced(run: Run, price_per_hour: float | None) -> Run:
    """The run with what it cost at this price: money/prune, money/evaluate, and money/million tokens by batch size where speed was measured."""
    if price_per_hour is None:
        return run
    spent = {part: run.metrics.get(f"seconds/{part}") for part in ("prune", "evaluate")}
    found = {f"money/{part}": cost.money(seconds, price_per_hour) for part, seconds in spent.items() if seconds is not None}
    rate = "speed/decode_tokens_per_second/"
    found |= {
        f"money/million tokens/{name.removeprefix(rate)}": cost.million_tokens(value, price_per_hour)
        for name, value in run.metrics.items()
        if name.startswith(rate)
    }
    return replace(run, config=replace(run.config, price_per_hour=price_per_hour), metrics={**run.metrics, **found})


def fingerprint(run_config: RunConfig) -> str:
    """The id that `run` gives to this configuration here."""
    return _id(_parts(run_config))


def _parts(config: RunConfig) -> dict[str, Any]:
    """What identifies a run: what was asked for, and nothing of this machine.

    Of the configuration these are the fields that differ from their default, so that a new field renames no record.
    """
    asked, usual = _asked(config), _asked(RunConfig(prune=PruneConfig() if config.prune else None))
    texts = {"test": [_text(corpus, "test") for corpus in config.test]}
    parts = ["evaluation"]
    if config.prune:
        texts |= {"corpus": [_text(config.corpus, "train")], "held_out": [_text(corpus, "validation") for corpus in config.held_out]}
        texts |= {"extra": [data.identity(config.extra)]} if config.extra else {}
        parts += ["criteria", *(["reconstruction"] if config.prune.trains else [])]
    if SELF in config.test or (config.prune and (config.self_generated or config.corpus == SELF)):
        parts.append("self-generation")
    return {
        "asked": json.loads(json.dumps(_differing(asked, usual))),
        "model": models.identity(config.model),
        "texts": texts,
        "tasks": {task: data.task_identity(task) for task in config.tasks} if "zero_shot" in config.evaluate else {},
        "results": {part: RESULTS[part] for part in sorted(parts)},
        **({"hardware": versions.hardware(environment())} if "speed" in config.evaluate else {}),
    }


def _asked(config: RunConfig) -> dict[str, Any]:
    """The fields of a configuration that decide numbers, besides the names of the model and of texts."""
    plain = {name: value for name, value in to_dict(config).items() if name not in (*NO_MATTER, *NAMES)}
    plain |= {"draw": config.draw, "test_length": config.test_length or config.length, "evaluate": sorted(config.evaluate)}
    if "zero_shot" not in config.evaluate:
        plain = {name: value for name, value in plain.items() if name not in ("tasks", "limit")}
    if config.prune:
        plain["prune"] = _asked_pruning(config.prune)
    else:  # the dense model is the same whatever others are calibrated with
        plain = {name: value for name, value in plain.items() if name in DENSE}
    if not config.self_generated and config.corpus != SELF:
        plain.pop("selfgen", None)
    return plain


def _asked_pruning(config: PruneConfig) -> dict[str, Any]:
    """The fields of a pruning that decide numbers, in one form: defaults that follow from others are written out, unused ones left out."""
    plain = to_dict(config)
    del plain["overfit"]  # which decides words only
    plain["layer_sparsity"] = [[pattern, float(share)] for pattern, share in config.layer_sparsity.items()]  # the first match wins
    plain |= {"target": config.target_stream, "window": config.window_blocks, "overlap": config.overlap_blocks}
    plain["technique"] = "+".join(part for part in ("LR", "BR", "GP", "CR") if part in config.technique.split("+"))
    plain |= {name: float(plain[name]) for name in ("sparsity", "learning_rate", "damping", "gradient_clip") if plain[name] is not None}
    unused = TRAINING_ONLY if not config.trains else ("epochs",) if config.steps is not None else ()
    return {name: value for name, value in plain.items() if name not in unused}


def _differing(asked: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """The fields whose values are not the usual ones, inside nested configurations too."""
    found = {}
    for name, value in asked.items():
        if isinstance(value, Mapping) and isinstance(usual.get(name), Mapping) and usual[name]:
            value = _differing(value, usual[name])
            if not value:
                continue
        elif value == usual.get(name):
            continue
        found[name] = value
    return found


def _text(corpus: str, split: str) -> str:
    return corpus if corpus == SELF else data.identity(corpus, split)


def platform_key(device: str = "auto") -> dict[str, Any]:
    """What of this machine and this code decides numbers: device kind, sources, versions.

    The number of threads, like the processor, only decides in which order sums are taken; the record's environment has both.
    """
    return {
        "device": models.resolve_device(device).split(":")[0],
        "code": _code(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def _code() -> str:
    """One fingerprint of the sources that a notebook calls: an executed notebook is current as long as they are the same."""
    files = (file for file in sorted(Path(__file__).parent.glob("*.py")) if file.stem not in OUTSIDE)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _id(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def _opened(config: RunConfig) -> Iterator[tuple[Any, Any]]:
    """The dense model and its tokenizer, in memory or with its blocks on disk."""
    options = {"dtype": getattr(torch, config.dtype), "device": config.device}
    if not config.offload:
        yield models.load_model(config.model, **options)
        return
    with tempfile.TemporaryDirectory(prefix="reconkit-blocks-", ignore_cleanup_errors=True) as folder:  # no part of a cache on a slow or small drive
        yield models.open_model(config.model, Path(folder) / "blocks", **options)


def _compute(config: RunConfig, id: str, parts: dict[str, Any], folder: Path) -> None:
    """Do the work and write the whole record into `folder`."""
    with _opened(config) as (model, tokenizer):
        _measure(config, id, parts, folder, model, tokenizer)
    if config.checkpoint:
        shutil.rmtree(Path(config.checkpoint) / id, ignore_errors=True)


def _measure(config: RunConfig, id: str, parts: dict[str, Any], folder: Path, model: Any, tokenizer: Any) -> None:
    """Prune the open model and measure it; the record goes into `folder`."""
    started = time.time()
    progress.ABOUT.update(run=id, tag=config.tag)
    tested, own, blanks = _test_sets(config, model, tokenizer)  # too little text is said before anything is pruned
    errors, training, notes = pd.DataFrame(columns=ERRORS), pd.DataFrame(columns=TRAINING), []
    metrics: dict[str, float] = {"sparsity": 0.0}
    zeros, precision = None, "fp32"
    if config.prune is not None:
        options = {"length": config.length, "seed": config.draw, "bos": config.bos}
        samples, extra = _training_samples(config, model, tokenizer)
        draw = {**options, "count": config.held_out_count, "split": "validation"}
        held_out = {data.short_name(c): data.load_samples(c, tokenizer, **draw) for c in config.held_out}
        with cost.measure() as used:
            state = Path(config.checkpoint) / id if config.checkpoint else None
            result = pruning.prune(model, samples, config.prune, extra=extra, held_out=held_out, checkpoint=state)
        errors, training, notes, zeros, precision = result.errors, result.training, result.notes, result.zeros, result.precision
        metrics |= {"sparsity": result.sparsity, "seconds/prune": result.seconds}
        metrics |= {f"memory/{kind}": count for kind, count in result.peak_memory.items()}
        metrics |= {f"{name}/prune": value for name, value in used.record().items() if name in SPENT}
        metrics |= {"data per parameter": result.per_parameter} if result.per_parameter is not None else {}
        for row in errors[errors.block == errors.block.max()].itertuples():
            metrics |= {f"{name}/{row.source}": getattr(row, name) for name in Errors._fields}
    record = evaluation.evaluate(
        model,
        tokenizer,
        sparsity=zeros,
        perplexity=tested,
        texts=own,
        blanks=blanks,
        count=config.test_count,
        length=config.test_length or config.length,
        tasks=config.tasks if "zero_shot" in config.evaluate else (),
        limit=config.limit,
        speed="speed" in config.evaluate,
        prompts=_prompts(config, tokenizer) if "generations" in config.evaluate else None,
        seed=config.draw,
        bos=config.bos,
    )
    for row in record["perplexity"]:
        name = f"perplexity/{row['corpus']}"
        metrics |= {name: row["value"], f"{name}/low": row["low"], f"{name}/high": row["high"]}
    if record["cloze"]:
        metrics |= {f"accuracy/cloze{end}": record["cloze"][name] for end, name in (("", "value"), ("/low", "low"), ("/high", "high"))}
    for row in record["zero_shot"]:
        name = f"accuracy/{row['task']}" + ("" if row["metric"] == "acc" else " (acc_norm)")
        metrics |= {name: row["value"], f"{name}/low": row["low"], f"{name}/high": row["high"]}
    metrics |= {f"speed/{row['measure']}/{row['batch']}": row["value"] for row in record["speed"]}
    metrics |= {f"size/{name}": record["size"][name] for name in ("parameters", "bytes")}
    metrics |= {f"{name}/evaluate": value for name, value in record["cost"].items() if name in ("seconds", *SPENT)}
    word, reasons = verdict(_Tables(errors, training, config, metrics))
    folder.mkdir()
    errors.to_csv(folder / "errors.csv", index=False)
    training.to_csv(folder / "training.csv", index=False)
    if config.keep_model:
        models.save_model(model, tokenizer, folder / "model")
    facts = {
        "id": id,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "config": to_dict(config),
        "metrics": metrics,
        "verdict": word,
        "reasons": reasons,
        "notes": notes,
        "evaluation": record,
        "made_from": parts,
        "commit": versions.commit(),
        "environment": {**environment(), "precision": precision},
    }
    (folder / "record.json").write_text(json.dumps(facts, indent=1, default=float), encoding="utf-8")


@dataclass(frozen=True)
class _Tables:
    errors: pd.DataFrame
    training: pd.DataFrame
    config: RunConfig
    metrics: dict[str, float]


def _training_samples(config: RunConfig, model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What chooses the masks and trains, and what only trains: a file's, further real ones, the model's own, or all of these."""
    options = {"length": config.length, "seed": config.seed, "bos": config.bos}
    own = _own(config, model, tokenizer, config.self_generated + (config.count if config.corpus == SELF else 0))
    if config.corpus == SELF:
        samples, own, more = own[: config.count], own[config.count :], None
    else:
        drawn = data.load_samples(config.corpus, tokenizer, count=config.count + config.more, **options)
        samples, more = drawn[: config.count], drawn[config.count :]
    written = data.load_samples(config.extra, tokenizer, count=None, **options) if config.extra else None
    found = [part for part in (written, more, own) if part is not None and len(part)]
    return samples, torch.cat(found) if found else None


def _own(config: RunConfig, model: Any, tokenizer: Any, count: int) -> torch.Tensor | None:
    """Text that the dense model writes, made once for all runs that ask for it."""
    if not count:
        return None
    prefixes = None
    if config.selfgen.start == "prefix":
        prefixes = data.prefixes(config.corpus, tokenizer, length=config.selfgen.prefix_length, seed=config.seed)
    options = {"length": config.length, "seed": config.seed, "config": config.selfgen, "prefixes": prefixes, "bos": config.bos}
    return testsets.own_text(model, tokenizer, count=count, **options)


def _made_before(config: RunConfig) -> Path | None:
    """The file that says that everything the dense model has to write for such runs is there; None where it writes nothing."""
    tests = ("test", "test_count", "test_length", "evaluate", "bos")
    writes = ("corpus", "count", "length", "seed", "self_generated", "selfgen") if config.self_generated or config.corpus == SELF else ()
    asked = ("perplexity" in config.evaluate and SELF in config.test) or "cloze" in config.evaluate
    if not asked and not writes:
        return None
    plain = to_dict(config)
    facts = [models.identity(config.model), config.dtype, config.draw, RESULTS, {name: plain[name] for name in (*tests, *writes)}]
    return testsets.folder() / f"made-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]}"


def _make_sets(config: RunConfig) -> None:
    """Let the dense model write what a run asks for; it is kept."""
    with _opened(config) as (model, tokenizer):
        _test_sets(config, model, tokenizer)
        if config.prune is not None:
            _training_samples(config, model, tokenizer)


def _test_sets(config: RunConfig, model: Any, tokenizer: Any) -> tuple[list[str], dict[str, torch.Tensor], tuple[Any, ...] | None]:
    """Corpora of the perplexity, the dense model's own test text by name, and the cloze set; made while the model is dense."""
    options = {"count": config.test_count, "length": config.test_length or config.length, "seed": config.draw, "bos": config.bos}
    _check_lengths(config, model)
    real = [corpus for corpus in config.test if corpus != SELF]
    own: dict[str, torch.Tensor] = {}
    if "perplexity" in config.evaluate:
        for corpus in real:
            data.load_samples(corpus, tokenizer, split="test", **options)
        if SELF in config.test:
            count = config.test_count or RunConfig.test_count
            own[SELF] = testsets.own_test(model, tokenizer, **{**options, "count": count})
    blanks = None
    if "cloze" in config.evaluate:
        require(len(real) > 0, "test", config.test, "a list with a corpus in it, from which cloze items can be made")
        blanks = testsets.cloze_of(model, tokenizer, real[0], length=options["length"], seed=config.draw, bos=config.bos)
    return real if "perplexity" in config.evaluate else [], own, blanks


def _check_lengths(config: RunConfig, model: Any) -> None:
    """Refuse text that is longer than the model's context, before anything is written or pruned."""
    tested = {"perplexity", "cloze"} & set(config.evaluate)
    lengths = {
        "The calibration text": config.length if config.prune else 0,
        "The test text": (config.test_length or config.length) if tested else 0,
        "A prompt with what is written after it": PROMPT + evaluation.WRITTEN if "generations" in config.evaluate else 0,
        "The text of the speed measurement": evaluation.PROMPT_TOKENS + evaluation.NEW_TOKENS if "speed" in config.evaluate else 0,
    }
    for name, length in lengths.items():
        models.check_length(model, length, name)


def _prompts(config: RunConfig, tokenizer: Any) -> torch.Tensor:
    """The beginnings of a few test samples of the first test corpus, (PROMPTS, PROMPT)."""
    first = next(corpus for corpus in config.test if corpus != SELF)
    return data.load_samples(first, tokenizer, count=PROMPTS, length=PROMPT, split="test", seed=config.draw, bos=config.bos)


def _corpora(config: RunConfig) -> list[str]:
    models.check_model(config.model)
    named = [config.corpus, *config.held_out, *config.test, *([config.extra] if config.extra else [])]
    require(SELF not in config.held_out, "held_out", config.held_out, "a list of corpora without self, which is possible as corpus and in test")
    trained = {corpus for corpus in (config.corpus, config.extra) if config.prune and corpus and Path(corpus).suffix in data.FILES}
    for field in ("held_out", "test"):
        again = trained.intersection(getattr(config, field))
        require(not again, field, ", ".join(again), "files that are not trained on; a file has no splits, so put a part of it into another one")
    asked = "generations" not in config.evaluate or any(corpus != SELF for corpus in config.test)
    require(asked, "test", config.test, "a list with a corpus in it, from which prompts can be taken")
    return [corpus for corpus in named if corpus != SELF]


def check_names(field: str, corpora: Sequence[str]) -> None:
    """Refuse two texts whose measurements would have one name."""
    names = [data.short_name(corpus) for corpus in corpora]
    twice = [corpus for corpus, name in zip(corpora, names, strict=True) if names.count(name) > 1]
    require(not twice, field, ", ".join(twice), "texts of different names, since their measurements are kept by name; rename a file, or leave it out")


def _folder() -> Path:
    return assets.cache_dir() / "runs"


def _read(folder: Path, *, cached: bool = True) -> Run:
    record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    config = from_dict(RunConfig, {**record["config"], "tag": _tag(folder)})
    errors = pd.read_csv(folder / "errors.csv", dtype=str)
    errors = errors.reindex(columns=list(dict.fromkeys([*errors.columns, "token_nmse", "token_nmse_90"])))  # an old record has none
    errors = errors.astype({"block": int, **dict.fromkeys(Errors._fields, float)})  # from str: exact
    training = pd.read_csv(folder / "training.csv", dtype=str).astype({"epoch": int, "loss": float})
    found = Run(record["id"], folder, config, record["metrics"], errors, training, record["notes"], record, cached)
    return priced(found, config.price_per_hour)


def records() -> list[Run]:
    """Every whole record, oldest first; a damaged one is named on stderr and skipped."""
    found = []
    files = [*_folder().glob("*/record.json"), *_committed_folder().glob("*/record.json")]
    for file in sorted(files, key=lambda f: f.stat().st_mtime):
        if file.parent.name in {run.id for run in found}:  # in the cache too
            continue
        try:
            found.append(_read(file.parent))
        except DAMAGED as error:
            print(f"The record {file.parent} is damaged ({type(error).__name__}) and was skipped; delete it to have it made again.", file=sys.stderr)
    return found


def remember(run: Run, parent: str | None = None) -> int | None:
    """Add a run's measurements to the history, once; returns its number there, or None where it is there already.

    Args:
        parent: id of the version that it follows; None: what its configuration says, where that is known.

    Raises:
        Damaged, OSError: as `history.Store.append`; nothing was added.
    """
    with store_of.Store() as store:
        return _remember(store, run, parent)


def _remember(store: store_of.Store, run: Run, parent: str | None = None) -> int | None:
    if parent is None and run.config.parent:
        parent = next(iter(store_of.called(store.versions(), run.config.parent).version), None)
    number = store.append({**versions.facts(run), "parent": parent}, versions.measurements(run), run.errors[["block", "source", "nmse"]])
    if run.config.tag:
        named = store.versions().groupby("version").tag.last()
        if named.get(run.id) != run.config.tag:
            store.tag(run.config.tag, run.id)
    return number


def _remember_or_say(run: Run, parent: str | None) -> None:
    """A history that cannot be written must not lose a finished run."""
    try:
        remember(run, parent)
    except (OSError, RuntimeError) as error:
        print(f"The run {run.id} is recorded, but not in the history: {error}", file=sys.stderr)


def open_history() -> store_of.Store:
    """The history, with every record in it; one that RECONKIT_HISTORY names holds only what was run while it did.

    Raises:
        ConfigError, Damaged, OSError: as `history.Store`.
    """
    store = store_of.Store()
    if store_of.named():
        return store
    known = store.versions()
    there = set(zip(known.version, known.created, strict=True))
    for run in records():
        if (run.id, run.record["created"]) not in there:
            _remember(store, run)
    return store


def history() -> pd.DataFrame:
    """One row a version, oldest first: how it was made, its verdict, and every measurement in a column of its own.

    It outlives the records, of which the cache keeps the latest.
    """
    with open_history() as store:
        return versions.wide(store)


def version_of(name: str) -> str:
    """The id of the version that is called so: by its id, the beginning of it, or its tag.

    Raises:
        ConfigError: no version or several are called so.
    """
    with open_history() as store:
        known = store.versions()
    found = store_of.called(known, name).version.unique()
    if len(found) == 1:
        return found[0]
    recent = ", ".join(dict.fromkeys(known.name.iloc[::-1].head(5))) or "none yet"
    raise ConfigError(f"{len(found) or 'No'} versions are called {name!r}; the last ones are: {recent} (reconkit runs list shows all).")


def changes(run: Run, against: Run) -> pd.DataFrame:
    """What changed from `against` to `run` on every test set that both answered, with the paired 95 % interval.

    Returns:
        set, measure ("perplexity": relative change; "accuracy" of cloze, "zero-shot" accuracy: difference), value, low, high,
        lower_is_better, n (articles, texts or items, over which the interval is).
    """
    others = {(row["metric"], row["test_set"]): row for row in versions.measurements(against)}
    rows = []
    for row in versions.measurements(run):
        other = others.get((row["metric"], row["test_set"]))
        if other is None or row["metric"] not in ("perplexity", "accuracy") or row["test_set"].endswith(" (acc_norm)"):
            continue
        found = versions.change(row, other)
        if found.paired:
            measure = "zero-shot" if row["metric"] == "accuracy" and row["test_set"] != "cloze" else row["metric"]
            rows.append((row["test_set"], measure, found.value, found.low, found.high, row["metric"] == "perplexity", found.n))
    return pd.DataFrame(rows, columns=["set", "measure", "value", "low", "high", "lower_is_better", "n"])


def recorded(id: str) -> Run | None:
    """The record of that id, where it is still there."""
    return _whole(_folder() / id) or committed(id)


def find(run: str) -> Run:
    """A run by its id, the beginning of it, or its tag.

    Raises:
        ConfigError: no run or several are called so.
    """
    known = records()
    found = [r for r in known if r.config.tag == run] or [r for r in known if r.id.startswith(run)]
    if len(found) == 1:
        return found[0]
    recent = ", ".join(r.id for r in known[-5:][::-1]) or "none yet"
    if not found and run and (gone := _gone(run)):
        raise ConfigError(f"{gone} is only in the history: its record was deleted. Run its configuration again; runs with a record: {recent}.")
    raise ConfigError(f"{len(found) or 'No'} runs are called {run!r}; the last recorded ones are: {recent} (reconkit runs list shows all).")


def _gone(name: str) -> str | None:
    """The version of that name, if the history knows one."""
    try:
        return version_of(name)
    except ConfigError:
        return None


def tag(run: str, tag: str) -> None:
    """Give a run a name; a name that another run has moves here.

    Raises:
        ConfigError: no such run, or a name that is not letters, digits, dots, dashes and underscores.
    """
    _check_tag(tag)
    chosen = find(run)
    for other in records():
        if other.config.tag == tag and other.id != chosen.id:
            (_folder() / other.id / "tag").unlink()
    _in_cache(chosen)
    (_folder() / chosen.id / "tag").write_text(tag, encoding="utf-8")
    try:
        with open_history() as store:
            store.tag(tag, chosen.id)
    except (OSError, RuntimeError) as error:
        print(f"The run {chosen.id} is called {tag}, but not in the history: {error}", file=sys.stderr)


def _in_cache(run: Run) -> None:
    """A copy of a committed record in the cache, because a tag is written beside it."""
    folder = _folder()
    if run.folder.parent == folder:
        return
    with FileLock(assets.writable(folder) / f".{run.id}.lock"), tempfile.TemporaryDirectory(prefix=f".{run.id}-", dir=folder) as staging:
        if _whole(folder / run.id) is None:
            shutil.copytree(run.folder, Path(staging) / "new")
            shutil.rmtree(folder / run.id, ignore_errors=True)
            os.replace(Path(staging) / "new", folder / run.id)


def _check_tag(tag: str) -> None:
    store_of.check_name("tag", tag)


def _tag(folder: Path) -> str | None:
    file = folder / "tag"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def cache_limit() -> int:
    """Bytes that the cache may hold (RECONKIT_CACHE_LIMIT, such as 20GB); the oldest runs go first.

    Raises:
        ConfigError: the variable is not a size.
    """
    written = os.environ.get("RECONKIT_CACHE_LIMIT") or DEFAULT_LIMIT
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|TB)", written.strip(), flags=re.IGNORECASE)
    require(match is not None, "RECONKIT_CACHE_LIMIT", written, "a size such as 500MB or 20GB")
    return int(float(match[1]) * {"MB": 10**6, "GB": 10**9, "TB": 10**12}[match[2].upper()])


def _keep_within_limit(folder: Path, newest: str) -> None:
    """Delete the oldest runs while the whole cache is above its limit; the newest stays."""
    total, limit = size(assets.cache_dir()), cache_limit()
    for file in sorted(folder.glob("*/record.json"), key=lambda f: f.stat().st_mtime):
        if total <= limit:
            break
        if file.parent.name != newest:
            total -= size(file.parent)
            shutil.rmtree(file.parent, ignore_errors=True)


def size(folder: Path) -> int:
    """Bytes of a folder in which other processes may be at work."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                pass  # gone since the listing
    return total


def environment() -> dict[str, Any]:
    """Where numbers came from, without names or paths."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def save_metrics(out_dir: str | Path, metrics: Mapping[str, float]) -> None:
    """Hand a notebook's numbers to its suite run as metrics.json; "" writes nothing."""
    if str(out_dir):
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}
        (Path(out_dir) / "metrics.json").write_text(json.dumps(finite, indent=1), encoding="utf-8")


def save_claims(out_dir: str | Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The closing table of a notebook: paper, expected at this scale, measured, holds; kept as claims.json ("" keeps nothing).

    Args:
        rows: beside these columns a row may have `of`, the number of the paper's claim that it answers (`paper.table("claims")`),
            and `why`, the reason that was found where it does not hold. The ledger of a suite collects both. `holds` may be None
            or NaN: the measurement cannot decide the claim, because its interval includes no change or because it is confounded.
    """
    kept = []
    for row in rows:
        holds = "not resolvable" if pd.isna(row["holds"]) else "yes" if row["holds"] else "no"
        more = {name: row[name] for name in ("of", "why") if row.get(name) and not (name == "why" and holds == "yes")}
        kept.append({**{name: row[name] for name in CLAIM}, "holds": holds, **more})
    if str(out_dir):
        (Path(out_dir) / "claims.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return pd.DataFrame(kept, columns=CLAIM)


def saved(file: Path) -> Any:
    """What a notebook or its suite run left as JSON, by `save_metrics` say; None where there is nothing that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
