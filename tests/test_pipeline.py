"""From a change to a verdict: the regression suite, and the workflow that runs it on a pull request."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from reconkit import history, suite
from reconkit.cli import main

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "papermill_runs" / "regression-smoke.toml"
WORKFLOW = ROOT / ".github" / "workflows" / "regression.yml"


def manifest(folder: Path, name: str, **changed: str) -> Path:
    """The smoke manifest in a folder of its own, with other parameters."""
    (folder / "papermill_runs").mkdir(exist_ok=True)
    for part in ("notebooks", "papermill_runs/alerts.toml"):
        if not (folder / part).exists():
            (folder / part).symlink_to(ROOT / part)
    lines = "\n".join(f"{key} = {value}" for key, value in changed.items())
    file = folder / "papermill_runs" / f"{name}.toml"
    file.write_text(SMOKE.read_text() + lines + "\n")
    return file


@pytest.mark.slow
def test_a_planted_regression_fails_the_suite_and_a_good_version_becomes_the_next_ones_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RECONKIT_HISTORY", str(tmp_path / "history.sqlite"))
    monkeypatch.chdir(tmp_path)
    assert suite.run(manifest(tmp_path, "base")) == 0
    assert suite.run(manifest(tmp_path, "worse", criterion='"magnitude"', technique='"LR"')) == 1
    assert "nmse/calibration is" in capsys.readouterr().out
    assert suite.run(manifest(tmp_path, "longer", epochs="3")) == 0
    with history.Store() as store:
        known, alerts = store.versions(), store.alerts()
    pruned = known[known.technique != "dense"]
    assert pruned.parent.tolist()[1:] == [pruned.version.iloc[0]] * 2, "the one that failed is nobody's parent"
    assert pruned.tag.tolist() == [None, None, "good"] and set(alerts[alerts.severity == "error"].version) == {pruned.version.iloc[1]}
    assert (tmp_path / "papermill_runs" / "longer" / "new-version" / "report.html").stat().st_size > 1e6
    capsys.readouterr()
    assert main(["runs", "check", pruned.version.iloc[1], "--github"]) == 1
    assert "::error" in capsys.readouterr().out
    assert main(["runs", "check"]) == 0


def test_the_workflow_runs_what_is_there() -> None:
    told = yaml.safe_load(WORKFLOW.read_text())
    job = told["jobs"]["regression"]
    assert "pull_request" in told[True], "YAML reads on as true"
    assert {"RECONKIT_HISTORY", "RECONKIT_CACHE"} <= set(job["env"])
    commands = [line.strip() for step in job["steps"] for line in step.get("run", "").splitlines() if ".venv/bin/reconkit" in line]
    assert len(commands) == 4
    for command in dict.fromkeys(commands):
        words = command.split()[1:]
        if words[:2] == ["suite", "run"]:
            assert (ROOT / words[2]).is_file()
            words += ["--dry-run"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-m", "reconkit", *words, *(["--help"] if words[0] == "report" else [])], cwd=ROOT, env=environment)
        assert done.returncode == 0, command


def test_the_real_scale_has_the_same_notebook() -> None:
    entries = [suite.load_manifest(file).entries for file in (SMOKE, SMOKE.with_name("regression.toml"))]
    assert [e.notebook.name for part in entries for e in part] == ["new_version.ipynb"] * 2
