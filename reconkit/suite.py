"""Manifests → papermill → run folders. The only room that knows papermill.

A suite is a TOML file beside its output folder: `papermill_runs/offline.toml` fills `papermill_runs/offline/`.

    [defaults]                  # parameters for every notebook that has them
    model = "smollm2-135m"

    [[run]]
    notebook = "01_pruning_criteria"
    name = "criteria"           # folder of the run; default: the notebook's name
    minutes = 4                 # estimate
    alone = true                # nothing runs beside it (timings)
    [run.parameters]
    count = 16
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import html
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import torch

from . import assets, cluster, data, ledger, models, report, runs, sweep
from . import book as pages
from .config import SELF, ConfigError, one_of, read_toml, require
from .parameters import OUT_DIR, gathered, raise_faults
from .parameters import faults as parameter_faults

PUBLISHED = "published"
SCALES = "papermill_runs"
"Where a manifest that is named by one word lies: each is a scale, and the only place that says what it is."
PATHS = ("model", "corpus", "held_out", "test", "extra")
"Parameters whose value may be a path."
CHECKPOINT = "checkpoint"
"One that is a folder, there or not yet."
TIMED = ("seconds/", "memory/", "speed/", "ratio/", "gpu_hours/", "joules/", "money/")
"Beginnings of measurements that differ between machines and are shown without a judgement."
TOLERANCE = 0.03
"Relative difference below which a number counts as reproduced: other processors sum in another order, and training amplifies it."
NOTEBOOK = "00_start_here"
"That a new manifest begins with."
NEW = """# A suite: one [[run]] for each notebook execution. Run it with: reconkit suite run {name}

[defaults]  # parameters for every notebook that has them
seed = 0

[[run]]
notebook = "00_start_here"
name = "wanda-60"
minutes = 2

[run.parameters]  # reconkit suite run --dry-run names what a notebook has
criterion = "wanda"
sparsity = 0.6
"""


@dataclass(frozen=True)
class Entry:
    """One execution of a notebook."""

    name: str
    notebook: Path
    parameters: dict[str, Any]
    "All parameters of the notebook, defaults included, without out_dir."
    minutes: float = 1.0
    alone: bool = False


@dataclass(frozen=True)
class Suite:
    """A checked manifest."""

    name: str
    folder: Path
    "Where its runs go, one folder each."
    entries: list[Entry] = field(default_factory=list)


def load_manifest(manifest: str | Path) -> Suite:
    """Read and check a manifest; nothing runs before everything in it is known to be possible.

    Raises:
        ConfigError: what is wrong, in which entry, and what is possible.
    """
    file = Path(manifest).absolute()
    if not file.suffix and not file.is_file():  # a scale, by its word
        file = Path(SCALES, f"{manifest}.toml").absolute()
    if not file.is_file():
        known = sorted(p.name for p in file.parent.glob("*.toml")) if file.parent.is_dir() else []
        hint = f"a word is looked up in {SCALES}/ of the current folder, " if str(manifest) == file.stem else ""
        raise ConfigError(f"There is no manifest {manifest}; {hint}{'there are: ' + ', '.join(known) if known else 'reconkit suite new writes one'}.")
    return _checked(file, read_toml(file))


def _checked(file: Path, written: Mapping[str, Any]) -> Suite:
    """The suite of a manifest's tables; all faults are listed at once."""
    _known(file.name, written, ("defaults", "run"))
    defaults, rows = written.get("defaults", {}), written.get("run", [])
    require(isinstance(defaults, dict), f"{file.name}: defaults", defaults, "a table of parameters")
    require(isinstance(rows, list) and len(rows) > 0 and all(isinstance(r, dict) for r in rows), f"{file.name}: run", rows, "one [[run]] or more")
    faults: list[str] = []
    entries = [entry for row in rows if (entry := _entry(file, row, defaults, faults)) is not None]
    names = [e.name for e in entries]
    twice = sorted({n for n in names if names.count(n) > 1})
    known = sorted({k for e in entries for k in e.parameters})
    unused = [key for key in defaults if key not in known] if len(entries) == len(rows) else []
    with gathered(faults):
        require(not twice, f"{file.name}: name", ", ".join(twice), "given to one run only")
    with gathered(faults):
        require(not unused, f"{file.name}: defaults", ", ".join(unused), one_of(tuple(known)))
    raise_faults(file.name, faults)
    return Suite(file.stem, file.parent / file.stem, entries)


def _entry(file: Path, row: Mapping[str, Any], defaults: Mapping[str, Any], faults: list[str]) -> Entry | None:
    """The checked entry of a [[run]]; None where its notebook cannot be read."""
    where = f"{file.name}: run {row.get('name', row.get('notebook', '?'))!r}"
    minutes, alone, given = row.get("minutes", 1.0), row.get("alone", False), row.get("parameters", {})
    number = isinstance(minutes, (int, float)) and not isinstance(minutes, bool) and 0 < minutes < math.inf
    with gathered(faults):
        _known(where, row, ("notebook", "name", "parameters", "minutes", "alone"))
    with gathered(faults):
        require(number, f"{where}: minutes", minutes, "a positive number")
    with gathered(faults):
        require(isinstance(alone, bool), f"{where}: alone", alone, "true or false")
    with gathered(faults):
        require(isinstance(given, dict), f"{where}: parameters", given, "a table")
    notebook = None
    with gathered(faults):
        notebook = _notebook(file, row, where)
    if notebook is None or not isinstance(given, dict):
        return None
    name = row.get("name", notebook.stem)
    safe = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) is not None
    with gathered(faults):
        require(safe, f"{where}: name", name, "letters, digits and . _ + -, fit for a folder")
    with gathered(faults):
        known = parameters(notebook)
        chosen = {k: v for k, v in defaults.items() if k in known} | given
        found = parameter_faults(where, chosen, known, _annotated(notebook))
        faults += found
        final = known | chosen if found else {k: _absolute(k, v, file.parent) for k, v in (known | chosen).items()}
        return Entry(str(name), notebook, {k: v for k, v in final.items() if k != OUT_DIR}, float(minutes) if number else 1.0, bool(alone))
    return None


def _notebook(file: Path, row: Mapping[str, Any], where: str) -> Path:
    folder = file.parent.parent / "notebooks"
    stem = row.get("notebook")
    possible = sorted(p.stem for p in folder.glob("*.ipynb"))
    require(isinstance(stem, str) and stem != "", f"{where}: notebook", stem, one_of(tuple(possible)))
    notebook = (file.parent / stem) if stem.endswith(".ipynb") else folder / f"{stem}.ipynb"
    require(notebook.is_file(), f"{where}: notebook", stem, one_of(tuple(possible)) + ", or a path to an .ipynb file")
    return notebook


def _absolute(name: str, value: Any, folder: Path) -> Any:
    """A model or text that lies beside the caller or the manifest, by its whole path: the notebook works in a folder of its own."""
    if name == CHECKPOINT and value:
        return os.path.abspath(value)
    if isinstance(value, list):
        return [_absolute(name, part, folder) for part in value]
    if name not in PATHS or not isinstance(value, str) or value in (*data.NAMED, models.OFFLINE, models.TINY):
        return value
    places = [] if Path(value).is_absolute() else [Path.cwd() / value, folder / value]
    is_there = _is_model if name == "model" else _is_text
    return next((os.path.abspath(place) for place in places if is_there(place)), value)


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file() or (path.suffix == ".gguf" and path.is_file())


def _is_text(path: Path) -> bool:
    return path.suffix in data.FILES and path.is_file()


def _known(where: str, table: Mapping[str, Any], possible: Sequence[str]) -> None:
    wrong = [key for key in table if key not in possible]
    require(not wrong, f"{where}: key", ", ".join(wrong), one_of(tuple(possible)))


def parameters(notebook: Path) -> dict[str, Any]:
    """The literals of a notebook's `parameters` cell, by name.

    Raises:
        ConfigError: not a notebook, no such cell, or something in it that is not a literal.
    """
    found: dict[str, Any] = {}
    for line, target in _assignments(notebook):
        try:
            found[target.id] = ast.literal_eval(line.value)  # type: ignore[arg-type]
        except ValueError:
            raise ConfigError(f"{notebook.name}: the parameters cell holds {ast.unparse(line)!r}, which is not NAME = LITERAL.") from None
    require(OUT_DIR in found, f"{notebook.name}: parameters", ", ".join(found), f"such that {OUT_DIR} is one of them")
    return found


def _annotated(notebook: Path) -> dict[str, str]:
    """The type of each parameter: the annotation, or where there is none the default's."""
    known = parameters(notebook)
    lines = {target.id: line.annotation for line, target in _assignments(notebook) if isinstance(line, ast.AnnAssign)}
    return {name: ast.unparse(lines[name]) if name in lines else type(value).__name__ for name, value in known.items()}


def _assignments(notebook: Path) -> list[tuple[ast.AnnAssign | ast.Assign, ast.Name]]:
    """The lines of the `parameters` cell."""
    cells = [c for c in _read(notebook).cells if "parameters" in c.metadata.get("tags", [])]
    require(len(cells) == 1, f"{notebook.name}: cells tagged parameters", len(cells), "exactly one")
    try:
        lines = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ConfigError(f"{notebook.name}: the parameters cell is not Python ({error.msg}, line {error.lineno}).") from None
    found = []
    for line in lines:
        target = line.target if isinstance(line, ast.AnnAssign) else line.targets[0] if isinstance(line, ast.Assign) else None
        if not isinstance(target, ast.Name) or line.value is None:
            raise ConfigError(f"{notebook.name}: the parameters cell holds {ast.unparse(line)!r}, which is not NAME = LITERAL.")
        found.append((line, target))
    return found


def _read(notebook: Path) -> Any:
    try:
        return nbformat.read(notebook, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise ConfigError(f"{notebook.name} is not a readable notebook ({type(error).__name__}).") from None


def key(entry: Entry, platform: Mapping[str, Any]) -> str:
    """What decides the result of an entry: its code, parameters, texts and published tables, and the sources and versions in `platform`."""
    code = [c.source for c in _read(entry.notebook).cells if c.cell_type == "code" and "parameters" not in c.metadata.get("tags", [])]
    here = Path(__file__).parent
    drawn = [file.read_text(encoding="utf-8") for file in (here / "plots.py", *sorted(here.glob("paper/*"))) if file.is_file()]
    facts = [code, entry.parameters, _texts(entry.parameters), drawn, platform]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _texts(parameters: Mapping[str, Any]) -> list[str]:
    """What is behind the names of models and corpora: a file may change under its name.

    Raises:
        ConfigError: no source knows such a name.
    """
    found = []
    if "model" in parameters:
        models.check_model(parameters["model"])
        found.append(models.identity(parameters["model"]))
    for name, split in (("corpus", "train"), ("held_out", "validation"), ("test", "test")):
        given = parameters.get(name, [])
        found += [data.identity(corpus, split) for corpus in ([given] if isinstance(given, str) else given) if corpus != SELF]
    return found


def _unknown(parameters: Mapping[str, Any]) -> list[str]:
    """Models, corpora and tasks that no source knows."""
    faults: list[str] = []

    def names(*keys: str) -> list[str]:
        given = [parameters[key] for key in keys if parameters.get(key)]
        return [name for value in given for name in (value if isinstance(value, list) else [value])]

    for model in names("model", "models"):
        with gathered(faults):
            models.check_model(model)
    for corpus in names("corpus", "other", "extra", "held_out", "test", "made"):
        if corpus != SELF:
            with gathered(faults):
                data.check_corpus(corpus)
    with gathered(faults):
        require(SELF not in names("held_out"), "held_out", parameters.get("held_out"), "a list of corpora without self, which is possible in test")
    for key in ("held_out", "test"):
        with gathered(faults):
            runs.check_names(key, names(key))
    for task in names("tasks"):
        with gathered(faults):
            require(task in data.TASKS, "tasks", task, one_of(tuple(data.TASKS)))
    return list(dict.fromkeys(faults))


def run(
    manifest: str | Path,
    *,
    only: str | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    on: str | None = None,
    address: str | None = None,
) -> int:
    """Run what is new or changed of a suite; returns the exit status: 0, or 1 when an entry failed.

    Args:
        jobs: notebooks at once; None: two on a CPU (two with half of the threads each finish sooner than one after the other, because
            small products leave threads waiting), one on a GPU. Ray runs what it has room for: there it decides only the threads of each.
        on: None: in processes of this machine; "ray": on the cluster at `address`, or on a Ray that is started here for the while.

    Raises:
        ConfigError: the manifest is wrong, or Ray cannot do it; nothing has run.
    """
    cluster.check(on, address)
    suite = load_manifest(manifest)
    platform = runs.platform_key()
    jobs = _jobs(jobs, platform["device"])
    chosen = _chosen(suite, only)
    raise_faults(suite.name, [f"run {e.name!r}: {text}" for e in chosen for text in _unknown(e.parameters)])
    keys = {e.name: key(e, platform) for e in chosen}
    todo = [e for e in chosen if force or _state(suite, e, keys[e.name]) != "unchanged"]
    if dry_run:
        return _plan(chosen, todo)
    if todo:
        assets.writable(suite.folder)
        with _place(suite, todo, jobs, platform, address) if on else nullcontext() as there:
            _execute_all(suite, todo, keys, jobs, there)
    failed = [e for e in chosen if _status(suite, e).get("state") != "ok"]
    if todo or not (suite.folder / "index.html").is_file():
        index(suite)
    if failed or todo:
        print(status(manifest))
    print(f"{len(chosen) - len(failed)} of {len(chosen)} whole, {len(chosen) - len(todo)} unchanged: {os.path.relpath(suite.folder / 'index.html')}")
    return 1 if failed else 0


def _chosen(suite: Suite, only: str | None) -> list[Entry]:
    chosen = [e for e in suite.entries if only is None or fnmatch.fnmatchcase(e.name, only)]
    require(len(chosen) > 0, "--only", only, "a pattern that matches one of " + ", ".join(e.name for e in suite.entries))
    return chosen


def _plan(chosen: list[Entry], todo: list[Entry]) -> int:
    for e in chosen:
        print(f"{'run' if e in todo else 'keep':<5} {e.name}: {e.notebook.name}, {', '.join(f'{k}={v!r}' for k, v in e.parameters.items())}")
    return 0


def _jobs(jobs: int | None, device: str) -> int:
    jobs = jobs if jobs is not None else 2 if device == "cpu" and (os.cpu_count() or 1) > 1 else 1
    require(type(jobs) is int and jobs >= 1, "--jobs", jobs, "a whole number of at least 1")
    return jobs


@contextmanager
def _place(suite: Suite, todo: list[Entry], jobs: int, platform: Mapping[str, Any], address: str | None) -> Iterator[cluster.Cluster]:
    """The Ray on which these entries can run."""
    with cluster.connected(address, platform["device"], _threads(jobs)) as there:
        if address:
            there.check([suite.folder, assets.cache_dir()], [e.notebook for e in todo], platform)
        yield there


@dataclass
class _Running:
    entry: Entry
    process: subprocess.Popen[bytes] | cluster.Task
    staging: Path
    log: Path
    started: float | None
    "None while it waits for a place on a cluster."


def _execute_all(suite: Suite, todo: list[Entry], keys: Mapping[str, str], jobs: int, there: cluster.Cluster | None = None) -> None:
    """Up to `jobs` notebooks at once here, or all on a cluster, each in a process of its own; those that want to be alone are."""
    waiting, going, done = list(todo), [], 0
    limit, at_once = (len(todo), there.slots) if there else (jobs, jobs)
    estimates = {e.name: _status(suite, e).get("seconds") or 60 * e.minutes for e in todo}
    line = _Line()
    terminated = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no kernel is left behind
    try:
        while waiting or going:
            free = [e for e in waiting if not going or not e.alone] if len(going) < limit and not any(r.entry.alone for r in going) else []
            if free:
                waiting.remove(free[0])
                going.append(_start(suite, free[0], jobs, there))
                continue
            time.sleep(0.2)
            now = time.time()
            for r in going:
                r.started = now if r.started is None and r.process.begun() else r.started
            ahead = [max(estimates[r.entry.name] - now + (r.started or now), 0) for r in going] + [estimates[e.name] for e in waiting]
            names = ", ".join(r.entry.name for r in going if r.started is not None) or "waiting for a place"
            line.show(f"[{done + 1}/{len(todo)}] {names}, about {report.clock(sum(ahead) / at_once)} left")
            for r in [r for r in going if r.started is not None and r.process.poll() is not None]:
                with assets.disk(suite.folder / r.entry.name):
                    state = _finish(suite, r, keys[r.entry.name])
                going.remove(r)
                done += 1
                line.say(f"[{done}/{len(todo)}] {r.entry.name}: {state} in {report.clock(now - r.started)}")
    finally:
        signal.signal(signal.SIGTERM, terminated)
        line.clear()
        if there:
            there.stop([r.process for r in going])
        for r in going:
            if not there:
                cluster.kill(r.process)
            shutil.rmtree(r.staging, ignore_errors=True)


def _start(suite: Suite, entry: Entry, jobs: int, there: cluster.Cluster | None = None) -> _Running:
    for ending in ("", ".old"):  # "a-*" would be "a-b", too
        for left in suite.folder.glob(f".{entry.name}-????????{ending}"):
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{entry.name}-", dir=suite.folder))
    staging.chmod(0o755)
    try:
        data.write_text(staging / "params.json", json.dumps(entry.parameters, indent=1) + "\n")
    except BaseException:
        assets.remove(staging)
        raise
    log, command = staging / "log.txt", ["-m", "reconkit.suite", str(entry.notebook)]
    if there:  # whose nodes may have other settings and another cache
        settings = {name: value for name, value in os.environ.items() if name.startswith("RECONKIT_")}
        variables = settings | _variables() | {"RECONKIT_CACHE": str(assets.cache_dir())}
        return _Running(entry, there.submit(entry.name, command, staging, variables), staging, log, None)
    threads = {"OMP_NUM_THREADS": str(_threads(jobs))} if jobs > 1 else {}
    return _Running(entry, cluster.launch([*command, str(staging)], log, {**os.environ, **_variables(), **threads}), staging, log, time.time())


def _threads(jobs: int) -> int:
    """Threads of a notebook when `jobs` of them run here at once."""
    return max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else torch.get_num_threads()


def _variables() -> dict[str, str]:
    """What of the environment a notebook gets otherwise than it is here: it works in a folder of its own."""
    folders = {name: os.path.abspath(os.environ[name]) for name in ("RECONKIT_CACHE", "RECONKIT_DATA") if os.environ.get(name)}
    if links := os.environ.get("PIP_FIND_LINKS"):
        there = {word: Path(word).absolute().as_uri() for word in links.split() if os.path.exists(word) and not os.path.isabs(word)}
        folders["PIP_FIND_LINKS"] = " ".join(there.get(word, word) for word in links.split())  # pip splits it, so a path must hold no blank
    return {**folders, "JUPYTER_PREFER_ENV_PATH": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def _finish(suite: Suite, r: _Running, key: str) -> str:
    """Write the status beside what the notebook left, and move everything into place."""
    state = "ok" if r.process.returncode == 0 else "failed"
    reason = None
    if state == "failed":
        lines = [x for x in r.log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
        reason = lines[-1] if lines else f"ended with status {r.process.returncode}"
    notebook = r.staging / pages.COPY
    if state == "ok":
        r.log.unlink()
        nbformat.write(_linked(_without_bars(_read(notebook)), suite, r.entry, suite.folder), notebook)
    facts = {
        "state": state,
        "reason": reason,
        "seconds": round(time.time() - r.started, 1),
        "key": key,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    data.write_text(r.staging / "status.json", json.dumps(facts, indent=1) + "\n")
    _replace(r.staging, suite.folder / r.entry.name)
    return state if reason is None else f"{state} ({reason})"


def _replace(new: Path, folder: Path) -> None:
    """Move a whole folder into place of an older one."""
    old = new.with_name(f"{new.name}.old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _child(notebook: str, staging: str) -> None:
    """Execute one notebook here and note where that was."""
    cluster.end_with_starter()
    try:
        _execute(notebook, staging)
    finally:  # at the end, because a look at a GPU takes memory of it
        (Path(staging) / "env.json").write_text(json.dumps(runs.environment(), indent=1) + "\n", encoding="utf-8")


def _execute(notebook: str, staging: str) -> None:
    """The last line printed on failure is the reason."""
    import papermill

    given = json.loads((Path(staging) / "params.json").read_text(encoding="utf-8"))
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                notebook,
                str(Path(staging) / pages.COPY),
                {**given, OUT_DIR: staging},
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=staging,
            )
            return
        except papermill.PapermillExecutionError as error:
            print(f"cell {error.exec_count}: {error.ename}: {' '.join(str(error.evalue).split())}")
            sys.exit(1)
        except RuntimeError as error:  # the kernel did not start, which happens now and then
            if attempt == 2:
                print(f"the kernel did not start: {error}")
                sys.exit(1)


class _Line:
    """A line that is written over on a terminal; elsewhere only finished entries are printed."""

    def __init__(self) -> None:
        self.live, self.width = sys.stderr.isatty(), 0

    def show(self, text: str) -> None:
        if self.live:
            print(f"\r{text:<{self.width}}", end="", file=sys.stderr, flush=True)
            self.width = len(text)

    def clear(self) -> None:
        if self.live and self.width:
            print(f"\r{'':<{self.width}}\r", end="", file=sys.stderr, flush=True)
            self.width = 0

    def say(self, text: str) -> None:
        self.clear()
        print(text, flush=True)


def _status(suite: Suite, entry: Entry) -> dict[str, Any]:
    return runs.saved(suite.folder / entry.name / "status.json") or {}


def _state(suite: Suite, entry: Entry, key: str) -> str:
    """new, failed, changed or unchanged."""
    found = _status(suite, entry)
    if not found:
        return "new"
    if found["state"] != "ok":
        return "failed"
    return "unchanged" if found["key"] == key else "changed"


def status(manifest: str | Path) -> str:
    """The state of each entry as a table: name, state, time, reason."""
    suite, platform = load_manifest(manifest), runs.platform_key()
    rows = []
    for e in suite.entries:
        found = _status(suite, e)
        rows.append((e.name, _state(suite, e, key(e, platform)), report.clock(found["seconds"]) if found else "", found.get("reason") or ""))
    return pd.DataFrame(rows, columns=["run", "state", "time", "reason"]).to_string(index=False)


def new(manifest: str | Path, grid: Sequence[str] = (), *, notebook: str = NOTEBOOK) -> None:
    """Write a manifest to start from, or one with a run for every combination of a grid.

    Args:
        grid: words such as criterion=wanda,sparsegpt and seed=0,1.
        notebook: that these parameters belong to.

    Raises:
        ConfigError: the file is there already, or its name is none; the notebook has no such parameter, or one of another type.
    """
    file = Path(manifest)
    require(
        file.suffix == ".toml" and re.fullmatch(r"[A-Za-z0-9._+-]+", file.stem) is not None,
        "manifest",
        manifest,
        "a name such as papermill_runs/mine.toml",
    )
    require(not file.exists(), "manifest", manifest, "a file that is not there yet")
    asked = sweep.grid(grid)
    require(bool(asked) or notebook == NOTEBOOK, "--notebook", notebook, "with a grid, such as seed=0,1")
    text = NEW.format(name=manifest)
    if asked:
        text = f"# A sweep of {notebook} over {', '.join(asked)}. Run it with: reconkit suite run {manifest}\n\n" + sweep.manifest(notebook, asked, 2)
    entries = _checked(file.absolute(), tomllib.loads(text)).entries if asked else []
    raise_faults(file.stem, [f"run {e.name!r}: {fault}" for e in entries for fault in _unknown(e.parameters)])
    data.write_text(file, text)
    count = len(entries) or 1
    print(f"Wrote {file}: {count} {'run' if count == 1 else 'runs'}.")


def _without_bars(notebook: Any) -> Any:
    """The executed notebook without progress lines and without the folder that it wrote to."""
    folder = notebook.metadata.pop("papermill")["parameters"][OUT_DIR]
    for cell in notebook.cells:
        cell.source = cell.source.replace(folder, "")
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr") and not _is_widget(o)]
    return notebook


def _is_widget(output: Any) -> bool:
    return any("widget" in kind for kind in output.get("data", {}))


def _retold(executed: Any, source: Any) -> Any:
    """The executed cells of code between the paragraphs of `source`: prose is not executed, so an edit of it needs no new run."""
    done, cells = [c for c in executed.cells if c.cell_type == "code"], []
    for cell in source.cells:
        cells.append(cell if cell.cell_type != "code" else done.pop(0))
        while done and "injected-parameters" in done[0].metadata.get("tags", []):
            cells.append(done.pop(0))
    executed.cells = cells
    return executed


def _linked(notebook: Any, suite: Suite, entry: Entry, home: Path) -> Any:
    """Its links lead on from the folder of its run in `home`: to the copies that the suite executes, and else to the files they were written for."""
    home = home.resolve()
    here, copies = home / entry.name, {e.notebook.resolve(): home / e.name / pages.COPY for e in reversed(suite.entries)}
    source = f" · [notebook]({os.path.relpath(entry.notebook.resolve(), here)})"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            led = pages.relinked(cell.source, entry.notebook.parent, lambda file: os.path.relpath(copies.get(file, file), here))
            cell.source = pages.EXECUTED.sub(lambda _: source, led)
    return notebook


def _normalised(notebook: Any) -> Any:
    """Without ids, times, widget state and everything else that differs between two equal executions."""
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}}
    notebook.nbformat_minor = 4  # the last one without cell ids
    for cell in notebook.cells:
        cell.pop("id", None)
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            for output in cell.outputs:
                if "metadata" in output:
                    output.metadata = {}
                for kind, text in output.get("data", {}).items():
                    if kind in ("text/html", "text/plain"):  # ids that pandas draws for its tables, and addresses
                        output.data[kind] = re.sub(r" at 0x[0-9a-f]+", "", re.sub(r"\bT_[0-9a-f]{5}", "T_0", text))
    return notebook


def publish(manifest: str | Path, only: str | None = None) -> None:
    """Copy a whole, current suite for reading to `published/<suite>/`: normalised notebooks, figures, data, numbers.

    Args:
        only: a pattern of entries; the others stay published as they are.

    Raises:
        ConfigError: an entry is missing, failed or changed since; nothing is copied.
    """
    suite, platform = load_manifest(manifest), runs.platform_key()
    chosen = _chosen(suite, only)
    stale = [f"{e.name} ({s})" for e in chosen if (s := _state(suite, e, key(e, platform))) != "unchanged"]
    if stale:
        raise ConfigError(f"{suite.name} is not whole: {', '.join(stale)}; run it first with: reconkit suite run {manifest}")
    home = suite.folder.parent / PUBLISHED
    staging = Path(tempfile.mkdtemp(prefix=".publish-", dir=assets.writable(home)))
    try:
        with assets.disk(home / suite.name):
            _copied(suite, chosen, home, staging)
            _replace(staging, home / suite.name)
    finally:
        assets.remove(staging)
    index(suite)
    claims = ledger.collect(home / suite.name, [e.name for e in suite.entries])
    page = suite.folder.parent.parent / "README.md"
    if page.is_file():
        text = page.read_text(encoding="utf-8")
        address = (home / suite.name).relative_to(page.parent).as_posix()
        data.write_text(page, ledger.written_into(text, suite.name, ledger.as_markdown(claims, address)))
    print(f"Published {len(chosen)} runs in {os.path.relpath(home / suite.name)}.")


def _copied(suite: Suite, chosen: Sequence[Entry], home: Path, staging: Path) -> None:
    """Put into `staging` what is published: the chosen entries as they ran, the others as they were published before."""
    staging.chmod(0o755)
    for e in suite.entries:
        if e not in chosen and (home / suite.name / e.name).is_dir():
            shutil.copytree(home / suite.name / e.name, staging / e.name)
    for e in chosen:
        source, to = suite.folder / e.name, staging / e.name
        to.mkdir()
        told = _linked(_retold(_read(source / pages.COPY), _read(e.notebook)), suite, e, home / suite.name)
        nbformat.write(_normalised(told), to / pages.COPY)
        for part in ("figures", "data"):
            if (source / part).is_dir():
                shutil.copytree(source / part, to / part)
        for file in ("metrics.json", "claims.json", "params.json"):
            if (source / file).is_file():
                shutil.copy(source / file, to / file)


def book(manifest: str | Path, out: str | Path | None = None) -> Path:
    """Make a static HTML book of a suite's executed notebooks: what was run here, or else the published copies; returns its first page.

    Args:
        out: its folder, which is replaced; None: papermill_runs/book/<suite>.

    Raises:
        ConfigError: no notebook of the suite was executed, or Sphinx is not installed.
    """
    suite = load_manifest(manifest)
    home = suite.folder.parent
    executed = {}
    for e in suite.entries:
        own, published = suite.folder / e.name / pages.COPY, home / PUBLISHED / suite.name / e.name / pages.COPY
        found = own if own.is_file() and _status(suite, e).get("state") == "ok" else published
        if found.is_file() and e.notebook.parent.resolve() == (home.parent / "notebooks").resolve():  # solutions are pages anyway
            executed[e.name] = found
    folder = Path(out) if out else home / "book" / suite.name
    pages.build(executed, home.parent / "notebooks", folder, _repository())
    print(f"Made a book of {len(executed)} notebooks: {os.path.relpath(folder / 'index.html')}")
    return folder / "index.html"


def _repository() -> str:
    """The project's address, from its one setting."""
    links = dict(line.split(", ", 1) for line in metadata("reconkit").get_all("Project-URL") or [])
    return links.get("Repository", "")


def compared(suite: Suite) -> pd.DataFrame:
    """Every number of every run, yours beside the published one: run, metric, yours, published, difference, reproduced."""
    rows = []
    for e in suite.entries:
        mine = runs.saved(suite.folder / e.name / "metrics.json") or {}
        theirs = runs.saved(suite.folder.parent / PUBLISHED / suite.name / e.name / "metrics.json") or {}
        for name in dict.fromkeys([*mine, *theirs]):
            a, b = mine.get(name, math.nan), theirs.get(name, math.nan)
            difference = (a - b) / abs(b) if b else (0.0 if a == b else math.nan)
            judged = "" if name.startswith(TIMED) or difference != difference else "yes" if abs(difference) <= TOLERANCE else "no"
            rows.append((e.name, name, a, b, difference, judged))
    return pd.DataFrame(rows, columns=["run", "metric", "yours", "published", "difference", "reproduced"])


def index(suite: Suite) -> None:
    """Write the page of a suite and its tables.

    `index.html` has the paper's claims, then each run's state, claims, figures and numbers beside the published ones; `index.csv` has
    these numbers and `ledger.csv` the claims.
    """
    numbers = compared(suite)
    _write_table(numbers, suite.folder / "index.csv")
    claims = ledger.collect(suite.folder, [e.name for e in suite.entries])
    _write_table(claims, suite.folder / "ledger.csv")
    parts = [ledger.as_html(claims)] if (claims.run != "").any() else []
    parts += [section] if (section := sweep.write(suite.entries, suite.folder)) else []
    for e in suite.entries:
        found, folder = _status(suite, e), suite.folder / e.name
        title = html.escape(e.name)
        said = (
            f"{found['state']}, {report.clock(found['seconds'])}" + (f": {found['reason']}" if found.get("reason") else "")
            if found
            else "not run yet"
        )
        link = f'<a href="{title}/notebook.ipynb">notebook</a>' if (folder / pages.COPY).is_file() else ""
        pictures = "".join(
            f'<a href="{title}/figures/{html.escape(p.stem)}.svg"><img src="{title}/figures/{html.escape(p.name)}" alt="{html.escape(p.stem)}"></a>'
            for p in sorted(folder.glob("figures/*.png"))
        )
        said_here = _claims(folder / "claims.json")
        own = numbers[numbers.run == e.name].drop(columns="run")
        cells = ["{:.5g}".format, "{:.5g}".format, "{:+.1%}".format]
        table = (
            own.to_html(index=False, border=0, na_rep="", formatters=dict(zip(("yours", "published", "difference"), cells, strict=True)))
            if len(own)
            else ""
        )
        parts.append(
            f"<h2>{title}</h2><p>{html.escape(said)} {link}</p>{said_here}<div>{pictures}</div>"
            f"<details><summary>{len(own)} numbers</summary>{table}</details>"
        )
    judged = numbers[numbers.reproduced != ""]
    summary = (
        f"{(judged.reproduced == 'yes').sum()} of {len(judged)} published numbers reproduced within {TOLERANCE:.0%}."
        if len(judged)
        else "Nothing is published to compare with yet."
    )
    data.write_text(suite.folder / "index.html", PAGE.format(name=html.escape(suite.name), summary=summary, body="\n".join(parts)))


def _write_table(table: pd.DataFrame, file: Path) -> None:
    with assets.writing(file) as partial:
        table.to_csv(partial, index=False)


def _claims(file: Path) -> str:
    rows = runs.saved(file)
    return pd.DataFrame(rows, columns=[*runs.CLAIM, "why"]).to_html(index=False, border=0, escape=True, na_rep="") if rows else ""


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>reconkit: {name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }}
th, td {{ padding: 0.2rem 0.6rem; border-bottom: 1px solid #ddd; text-align: left; }}
img {{ max-width: 32rem; max-height: 18rem; margin: 0.5rem 1rem 0.5rem 0; }}
</style>
</head>
<body>
<h1>{name}</h1>
<p>{summary}</p>
{body}
</body>
</html>
"""

if __name__ == "__main__":
    _child(*sys.argv[1:])
