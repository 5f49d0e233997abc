"""The promises of the project's files: one list of requirements, the public names, a clean tree."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import reconkit as rk

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = ("venv", "figures", "test", "smoke", "lab", "publish", "clean")

# name → its parameters as callers may rely on them: `name`, `name=default`, `*` before keyword-only ones, `...` where more may follow.
SIGNATURES = {
    "load_model": "name, *, dtype=torch.float32, device='auto'",
    "load_samples": "corpus, tokenizer, *, count=64, length=256, split='train', seed=0, bos=False",
    "self_generate": "model, tokenizer, *, count, length, seed=0, ...",
    "PruneConfig": "*, criterion='sparsegpt', pattern='unstructured', sparsity=0.5, technique='BR+GP', layers='all', epochs=10, steps=None, "
    "learning_rate=0.0002, batch_size=8, micro_batch=None, precision='auto', early_stopping=None, seed=0, ...",
    "prune": "model, samples, config, *, extra=None, held_out=None, checkpoint=None, callbacks=(), progress=True",
    "check_parameters": "namespace",
    "save_model": "model, tokenizer, folder",
    "perplexity": "model, samples, *, batch_size=8",
    "zero_shot": "model, tokenizer, tasks, *, limit=None, seed=0, against=None",
    "evaluate": "model, tokenizer, ...",
    "verdict": "run_or_result, ...",
    "RunConfig": "model, corpus, count, length, held_out=('wiki', 'news'), prune=PruneConfig(), evaluate=('perplexity',), "
    "tag=None, keep_model=False, ...",
    "run": "run_config",
}
MODULES = {"plots", "runs", "criteria", "evaluation", "overfit", "data", "models", "streams"}


def tracked() -> list[Path]:
    """The files of the project: those that git tracks or would add."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def pythons(versions: SpecifierSet) -> list[str]:
    return [f"3.{minor}" for minor in range(8, 20) if versions.contains(f"3.{minor}.0")]


def test_environment_yml_is_pyproject_through_pip() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, through_pip = environment["dependencies"]
    classified = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert environment["name"] == PROJECT["name"] and pip == "pip"
    assert python.startswith("python>=") and pythons(SpecifierSet(python.removeprefix("python"))) == classified
    assert set(classified) <= set(pythons(SpecifierSet(PROJECT["requires-python"])))
    assert through_pip == {"pip": ["-c constraints.txt", "-e .[all]"]}


def test_all_holds_every_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    [everything] = extras["all"]
    assert Requirement(everything).name == PROJECT["name"]
    assert Requirement(everything).extras == set(extras) - {"all", "ray", "colab"}


def test_constraints_pin_every_requirement_within_its_bounds() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) and not [v for v in pins.values() if "+" in v]
    assert pins["torch"] == "2.13.0"
    extras = [r for name, needed in PROJECT["optional-dependencies"].items() if name != "all" for r in needed]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
        assert {s.operator for s in requirement.specifier} == {">="}, f"{requirement}: lower bounds only"


def parameters(written: str) -> list[tuple[str, str, inspect._ParameterKind]]:
    """(name, default as text, kind) of a signature of the table."""
    import ast

    tree = ast.parse(f"def f({written.replace(', ...', '')}): ...").body[0].args  # type: ignore[attr-defined]
    positional = [None] * (len(tree.args) - len(tree.defaults)) + tree.defaults
    rows = [(a.arg, d, inspect.Parameter.POSITIONAL_OR_KEYWORD) for a, d in zip(tree.args, positional, strict=True)]
    rows += [(a.arg, d, inspect.Parameter.KEYWORD_ONLY) for a, d in zip(tree.kwonlyargs, tree.kw_defaults, strict=True)]
    return [(name, ast.unparse(default) if default else "", kind) for name, default, kind in rows]


def default(name: str, parameter: inspect.Parameter) -> object:
    """The default, also where a dataclass makes it anew for each instance."""
    import dataclasses

    value = getattr(rk, name)
    if dataclasses.is_dataclass(value):
        field = next(f for f in dataclasses.fields(value) if f.name == parameter.name)
        return field.default_factory() if field.default is dataclasses.MISSING else field.default  # type: ignore[misc]
    return parameter.default


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_name_has_its_signature(name: str) -> None:
    import torch

    known = {"torch": torch, "PruneConfig": rk.PruneConfig}
    have = list(inspect.signature(getattr(rk, name)).parameters.values())
    want = parameters(SIGNATURES[name])
    by_name = {p.name: p for p in have}
    assert set(by_name) >= {p for p, *_ in want}
    if "..." in SIGNATURES[name]:
        assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in have if p.name not in {n for n, *_ in want}), (
            "what follows has defaults"
        )
    else:
        assert [p.name for p in have] == [n for n, *_ in want]
    positional = [p.name for p in have if p.kind is p.POSITIONAL_OR_KEYWORD]
    expected = [n for n, _, kind in want if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional[: len(expected)] == expected
    for parameter, text, kind in want:
        assert by_name[parameter].kind is kind, parameter
        if text:
            assert default(name, by_name[parameter]) == eval(text, known), parameter


def test_public_names_are_listed_and_nothing_else() -> None:
    assert set(rk.__all__) == set(SIGNATURES) | MODULES | {"PruneResult", "Run", "ConfigError"}
    assert set(rk.__all__) <= set(dir(rk))
    assert issubclass(rk.ConfigError, ValueError)
    assert {"errors", "training", "sparsity", "seconds", "peak_memory", "notes"} <= set(rk.PruneResult.__annotations__)
    for module in MODULES:
        assert inspect.ismodule(getattr(rk, module))
    with pytest.raises(AttributeError, match="its names are"):
        rk.nothing  # noqa: B018


def test_importing_the_package_imports_no_heavy_library() -> None:
    heavy = ("torch", "transformers", "pandas", "numpy", "matplotlib")
    code = f"import sys, reconkit; reconkit.ConfigError; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_version_is_the_projects() -> None:
    assert rk.__version__ == PROJECT["version"]


def test_only_the_right_rooms_know() -> None:
    """Who may import what: house rules that a reader can rely on."""
    owners = {"matplotlib": {"plots"}, "seaborn": {"plots"}, "papermill": {"suite"}, "lm_eval": {"zeroshot"}, "datasets": {"data"}}
    owners |= {"ray": {"cluster"}, "pynvml": {"cost"}, "sqlite3": {"history"}, "plotly": {"dashboard"}}
    for file in sorted((ROOT / "reconkit").glob("*.py")):
        imported = set(re.findall(r"^\s*(?:import|from) (\w+)", file.read_text(), flags=re.M))
        wrong = [library for library, allowed in owners.items() if library in imported and file.stem not in allowed]
        assert not wrong, f"{file.name} imports {wrong}"


def test_no_module_has_the_name_of_a_public_function() -> None:
    assert not {p.stem for p in (ROOT / "reconkit").glob("*.py")} & set(SIGNATURES)


def test_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert set(TARGETS) <= set(re.findall(r"^([a-z]+):", makefile, flags=re.M))
    for target in TARGETS:
        assert f"make {target} " in makefile, f"make help does not name {target}"


def test_readme_names_the_commands() -> None:
    readme = ROOT / "README.md"
    assert readme.is_file()
    text = readme.read_text()
    for word in ("make figures", "make test", "make lab", "environment.yml", "TORCH_INDEX", "RECONKIT_CACHE", "reconkit prune"):
        assert word in text, word
    for notebook in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        assert notebook.name in text, f"README.md does not name {notebook.name}"


def test_notebooks_hold_no_outputs() -> None:
    for file in tracked():
        if file.suffix == ".ipynb" and file.is_relative_to(ROOT / "notebooks"):
            code = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
            assert not [cell for cell in code if cell["outputs"] or cell["execution_count"]], f"{file.name} has outputs"


def test_no_registry_host_is_written_anywhere() -> None:
    """Assets come from whatever index the reader's pip is set to."""
    hosts = re.compile("|".join([r"pypi\." + "org", "files" + r"\.pythonhosted", "download" + r"\.pytorch"]))
    named = [
        f"{file.relative_to(ROOT)}" for file in tracked() if file.suffix not in (".png", ".svg") and hosts.search(file.read_text(errors="ignore"))
    ]
    assert not named


def test_ci_runs_the_tests_and_the_smoke_suite() -> None:
    for script in (".ci/run", ".ci/torch"):
        subprocess.run(["bash", "-n", ROOT / script], check=True)
        assert (ROOT / script).stat().st_mode & 0o111
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert "set -euo pipefail" in lines and [line for line in lines if line.startswith("make")] == ["make test", "make smoke"]


@pytest.mark.parametrize(
    ("name", "metadata", "cuda"),
    [
        ("cpu build", {"version": "2.13.0+cpu", "requires_dist": ["filelock"]}, False),
        ("default build without CUDA", {"version": "2.13.0", "requires_dist": ["filelock"]}, False),
        ("default build with CUDA", {"version": "2.13.0", "requires_dist": ["nvidia-cublas==13.1; platform_system == 'Linux'"]}, True),
    ],
)
def test_torch_script_takes_the_cpu_build_only_where_pip_would_bring_cuda(name: str, metadata: dict[str, object], cuda: bool, tmp_path: Path) -> None:
    """The script against a stand-in for Python that writes down what it is asked to install."""
    log, report = tmp_path / "log", tmp_path / "report.json"
    report.write_text(json.dumps({"install": [{"metadata": metadata}]}))
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"""#!/usr/bin/env bash
case "$*" in
    -c*) exec {sys.executable} "$@" ;;
    *--report*) cat {report} ;;
    *) echo "$*" >> {log} ;;
esac
"""
    )
    stand_in.chmod(0o755)
    for command, answer in (("uname", "echo Linux"), ("nvidia-smi", "exit 9")):
        (tmp_path / command).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / command).chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run([ROOT / ".ci/torch", stand_in], env={"PATH": path}, check=True)
    asked = log.read_text().splitlines()
    assert any("--torch-backend=cpu" in line for line in asked) is cuda, name
    assert asked[-1].endswith("install -q -c constraints.txt torch==2.13.0")
    log.write_text("")
    subprocess.run([ROOT / ".ci/torch", stand_in, "https://index.example/cpu"], env={"PATH": path}, check=True)
    assert log.read_text().splitlines() == ["-m pip install -q -c constraints.txt --index-url https://index.example/cpu --no-deps torch==2.13.0"]


def test_colabs_versions_are_within_our_bounds_so_that_an_install_moves_none() -> None:
    lines = [line for line in (ROOT / ".ci" / "colab.txt").read_text().splitlines() if line and not line.startswith("#")]
    theirs = {name: Version(version.removesuffix(".*")) for name, version in (line.split("==") for line in lines)}
    assert set(theirs) == {"transformers", "datasets", "numpy", "pandas", "ipykernel"}
    extras = PROJECT["optional-dependencies"]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras["colab"], *extras["notebooks"]]):
        if requirement.name in theirs:
            assert requirement.specifier.contains(theirs[requirement.name]), requirement
    subprocess.run(["bash", "-n", ROOT / ".ci" / "colab"], check=True)


def test_committed_records_are_neither_ignored_nor_cleaned(tmp_path: Path) -> None:
    for name in ("Makefile", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path / name)
    kept, made = (tmp_path / "papermill_runs" / name / "a" / "record.json" for name in ("records", "smoke"))
    for file in (kept, made):
        file.parent.mkdir(parents=True)
        file.touch()
    for name in ("reconkit", "tests"):
        (tmp_path / name).mkdir()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    ignored = [subprocess.run(["git", "check-ignore", "-q", file], cwd=tmp_path).returncode == 0 for file in (kept, made)]
    subprocess.run(["make", "-s", "clean"], cwd=tmp_path, check=True)
    assert ignored == [False, True] and kept.is_file() and not made.exists()
