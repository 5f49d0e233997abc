"""Manifests are checked before anything starts; runs are whole or say why not; what is unchanged costs nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest

from reconkit import suite
from reconkit.cli import main
from reconkit.config import ConfigError
from reconkit.parameters import check_parameters

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"

PARAMETERS = 'value: int = 2\nrate: float = 0.5\nword: str = "a"\nparts: list = [1]\nswitch: bool = False\nout_dir: str = ""'
CODE = """import json, sys
from pathlib import Path
assert value < 100, f"{value} is too much"
print("said", value)
print("bar", 5 + 5, file=sys.stderr)
import pandas as pd
from IPython.display import display
display(pd.DataFrame({"a": [1]}).style)
display({"text/plain": "a bar " + str(7 * 6), "application/vnd.jupyter.widget-view+json": {}}, raw=True)
if out_dir:
    (Path(out_dir) / "metrics.json").write_text(json.dumps({"value": float(value), "seconds/x": 1.0}))
    (Path(out_dir) / "figures").mkdir()
    (Path(out_dir) / "figures" / "f.svg").write_text("<svg/>")"""


def notebook(file: Path, parameters: str = PARAMETERS, code: str = CODE, text: str = "# Title") -> Path:
    book = nbformat.v4.new_notebook()
    book.cells = [
        nbformat.v4.new_markdown_cell(text),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(code),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, file)
    return file


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A project with two notebooks."""
    notebook(tmp_path / "notebooks" / "00_one.ipynb")
    notebook(tmp_path / "notebooks" / "01_two.ipynb", parameters='value: int = 3\nout_dir: str = ""')
    (tmp_path / "papermill_runs").mkdir()
    return tmp_path


def manifest(home: Path, text: str = '[[run]]\nnotebook = "00_one"\n[[run]]\nnotebook = "01_two"\n', name: str = "mine") -> Path:
    file = home / "papermill_runs" / f"{name}.toml"
    file.write_text(text)
    return file


def test_a_manifest_becomes_entries(home: Path) -> None:
    first = '[[run]]\nnotebook = "00_one"\nname = "a"\nminutes = 3\nalone = true\n[run.parameters]\nword = "b"\n'
    text = f'[defaults]\nvalue = 7\nrate = 1\n{first}[[run]]\nnotebook = "01_two"\n'
    found = suite.load_manifest(manifest(home, text))
    assert (found.name, found.folder) == ("mine", home / "papermill_runs" / "mine")
    a, two = found.entries
    assert (a.name, a.minutes, a.alone, a.parameters) == ("a", 3, True, {"value": 7, "rate": 1, "word": "b", "parts": [1], "switch": False})
    assert (two.name, two.parameters) == ("01_two", {"value": 7})
    (home / "papermill_runs" / "mine.toml").write_text(text, encoding="utf-8-sig")
    assert suite.load_manifest(home / "papermill_runs" / "mine.toml").entries == found.entries, "a byte order mark is no part of it"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[run]\n", "not valid TOML.*line 1"),
        ("", "one .*run.* or more"),
        ('other = 1\n[[run]]\nnotebook = "00_one"\n', "other.*one of defaults, run"),
        ('[[run]]\nnotebook = "02_none"\n', "02_none.*00_one, 01_two"),
        ('[[run]]\nname = "a"\n', "notebook is None"),
        ('[[run]]\nnotebook = "00_one"\ncolour = 1\n', "colour.*one of notebook, name"),
        ('[[run]]\nnotebook = "00_one"\n[[run]]\nnotebook = "00_one"\n', "given to one run only"),
        ('[[run]]\nnotebook = "00_one"\nname = "../a"\n', "fit for a folder"),
        ('[[run]]\nnotebook = "00_one"\nminutes = -1\n', "positive"),
        ('[[run]]\nnotebook = "00_one"\nalone = 1\n', "true or false"),
        ('[[run]]\nnotebook = "00_one"\n[run.parameters]\nvalu = 1\n', "'valu'.*value, rate"),
        ('[[run]]\nnotebook = "00_one"\n[run.parameters]\nvalue = 1.5\n', "a whole number, like 2"),
        ('[[run]]\nnotebook = "00_one"\n[run.parameters]\nvalue = true\n', "a whole number, like 2"),
        ('[[run]]\nnotebook = "00_one"\n[run.parameters]\nparts = "x"\n', "a list"),
        ('[[run]]\nnotebook = "00_one"\n[run.parameters]\nout_dir = "x"\n', "out_dir"),
        ('[defaults]\nnothing = 1\n[[run]]\nnotebook = "00_one"\n', "defaults is 'nothing'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(home: Path, text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "_start", None)
    with pytest.raises(ConfigError, match=says):
        suite.run(manifest(home, text))
    assert not (home / "papermill_runs" / "mine").exists()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ("value = 1 + x\nout_dir = ''", "not NAME = LITERAL"),
        ("value = 1", "out_dir"),
        ("import os", "not NAME = LITERAL"),
        ("value = (", "not Python"),
    ],
)
def test_parameters_are_literals(home: Path, parameters: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        suite.parameters(notebook(home / "notebooks" / "00_one.ipynb", parameters))
    (home / "notebooks" / "00_one.ipynb").write_text("{")
    with pytest.raises(ConfigError, match="not a readable notebook"):
        suite.parameters(home / "notebooks" / "00_one.ipynb")


def test_files_beside_the_caller_or_the_manifest_are_handed_over_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook works in a folder of its own, from which relative paths lead nowhere."""
    here, beside = home / "here", home / "papermill_runs"
    for file in (here / "mine.txt", beside / "other.txt", beside / "both.txt", here / "both.txt", here / "model" / "config.json"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{}")
    for folder in ("wiki", "tiny", "wheels"):
        (here / folder).mkdir()
    (here / "tiny" / "config.json").write_text("{}")
    monkeypatch.chdir(here)
    given = 'word: str = "a"\nmodel: str = "tiny"\ncorpus: str = "wiki"\nheld_out: list = []\ntest: list = []\nextra: str = ""\nout_dir: str = ""'
    notebook(home / "notebooks" / "00_one.ipynb", parameters=given)
    texts = 'corpus = "mine.txt"\nheld_out = ["wiki", "other.txt"]\ntest = ["both.txt", "no.txt", "a/b"]\nword = "mine.txt"\nmodel = "model"\n'
    [entry] = suite.load_manifest(manifest(home, f'[[run]]\nnotebook = "00_one"\n[run.parameters]\n{texts}')).entries
    assert entry.parameters == {
        "word": "mine.txt",
        "model": str(here / "model"),
        "corpus": str(here / "mine.txt"),
        "held_out": ["wiki", str(beside / "other.txt")],
        "test": [str(here / "both.txt"), "no.txt", "a/b"],
        "extra": "",
    }
    [entry] = suite.load_manifest(manifest(home, '[[run]]\nnotebook = "00_one"\n')).entries
    assert (entry.parameters["model"], entry.parameters["corpus"]) == ("tiny", "wiki"), "a known name is no path"


def test_a_relative_folder_of_wheels_is_handed_over_whole(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "my wheels" / "wheels").mkdir(parents=True)
    monkeypatch.chdir(home / "my wheels")
    monkeypatch.setenv("PIP_FIND_LINKS", "wheels https://host/wheels /no/such")
    monkeypatch.setattr(suite.subprocess, "Popen", lambda *_, env, **__: env)
    checked = suite.load_manifest(manifest(home))
    checked.folder.mkdir()
    environment: Any = suite._start(checked, checked.entries[0], jobs=1).process
    assert environment["PIP_FIND_LINKS"] == f"{(home / 'my wheels' / 'wheels').as_uri()} https://host/wheels /no/such"


def test_a_missing_manifest_names_those_there_are(home: Path) -> None:
    manifest(home)
    with pytest.raises(ConfigError, match="mine.toml"):
        suite.run(home / "papermill_runs" / "other.toml")


def test_keys_follow_code_and_parameters_and_not_prose(home: Path) -> None:
    def key(**values: Any) -> str:
        file = notebook(home / "notebooks" / "00_one.ipynb", **{k: v for k, v in values.items() if k in ("code", "text")})
        return suite.key(suite.Entry("a", file, {"value": values.get("value", 1)}), {"threads": values.get("threads", 2)})

    assert key() == key(text="# Another title")
    assert len({key(), key(code="1"), key(value=2), key(threads=4)}) == 4


def test_a_suite_from_first_run_to_publication(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One fails and the other is whole; the second time only what failed runs; then everything is published."""
    file = manifest(home, '[[run]]\nnotebook = "00_one"\n[run.parameters]\nvalue = 500\n[[run]]\nnotebook = "01_two"\n')
    folder = home / "papermill_runs" / "mine"
    assert suite.run(file) == 1
    said = capsys.readouterr().out
    assert "00_one: failed (cell 3: AssertionError: 500 is too much)" in said and "01_two: ok" in said and "1 of 2 whole" in said
    assert json.loads((folder / "00_one" / "status.json").read_text())["reason"].endswith("500 is too much")
    assert "500 is too much" in (folder / "00_one" / "notebook.ipynb").read_text()
    whole = folder / "01_two"
    assert {p.name for p in whole.iterdir()} == {"notebook.ipynb", "params.json", "status.json", "env.json", "metrics.json", "figures"}
    assert json.loads((whole / "params.json").read_text()) == {"value": 3}
    text = (whole / "notebook.ipynb").read_text()
    assert "said 3" in text and "bar 10" not in text and "a bar 42" not in text and str(folder) not in text
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    with pytest.raises(ConfigError, match=r"00_one \(failed\)"):
        suite.publish(file)
    manifest(home)
    started: list[str] = []
    real = suite._start
    monkeypatch.setattr(suite, "_start", lambda s, e, *more: started.append(e.name) or real(s, e, *more))
    assert suite.run(file) == 0 and started == ["00_one"]
    assert suite.run(file) == 0 and suite.run(file, dry_run=True, force=True) == 0 and started == ["00_one"]
    assert "run   00_one: 00_one.ipynb, value=2" in capsys.readouterr().out
    suite.publish(file)
    published = home / "papermill_runs" / "published" / "mine"
    first = {p: p.read_bytes() for p in published.rglob("*") if p.is_file()}
    assert {p.relative_to(published).as_posix() for p in first} >= {"00_one/notebook.ipynb", "00_one/figures/f.svg", "01_two/metrics.json"}
    assert not any(b'"id"' in content or b"papermill" in content for p, content in first.items() if p.suffix == ".ipynb")
    nbformat.validate(nbformat.read(published / "00_one" / "notebook.ipynb", as_version=4))
    assert suite.run(file, only="01*", force=True) == 0 and started == ["00_one", "01_two"]
    suite.publish(file)
    assert {p: p.read_bytes() for p in published.rglob("*") if p.is_file()} == first, "two equal executions publish the same bytes"
    shutil.move(folder / "00_one", home / "away")
    with pytest.raises(ConfigError, match=r"00_one \(new\)"):
        suite.publish(file)
    suite.publish(file, only="01*")
    assert {p: p.read_bytes() for p in published.rglob("*") if p.is_file()} == first, "what is not asked for stays as it was"
    shutil.move(home / "away", folder / "00_one")
    shutil.copy(published / "00_one" / "metrics.json", whole / "metrics.json")  # 2 instead of the published 3
    table = suite.compared(suite.load_manifest(file)).set_index(["run", "metric"])
    assert table.loc[("00_one", "value"), "reproduced"] == "yes" and table.loc[("01_two", "value"), "reproduced"] == "no"
    assert table.loc[("01_two", "value"), "difference"] == pytest.approx(-1 / 3) and table.loc[("00_one", "seconds/x"), "reproduced"] == ""
    suite.index(suite.load_manifest(file))
    page = (folder / "index.html").read_text()
    assert "1 of 2 published numbers reproduced within 3%" in page and "-33.3%" in page
    assert "unchanged" in suite.status(file)


def test_an_interrupt_leaves_nothing_half_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(home / "notebooks" / "00_one.ipynb", code="import time; time.sleep(60)")
    started: list[Any] = []
    real = suite._start

    def start(*args: Any) -> Any:
        started.append(real(*args))
        return started[-1]

    def interrupt(self: Any, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "_start", start)
    monkeypatch.setattr(suite._Line, "show", interrupt)
    with pytest.raises(KeyboardInterrupt):
        suite.run(manifest(home), only="00_one")
    assert started[0].process.poll() is not None
    assert list((home / "papermill_runs" / "mine").iterdir()) == []


def test_a_start_removes_what_an_earlier_one_left_and_nothing_of_others(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite.cluster, "launch", lambda *_: None)
    checked = suite.load_manifest(manifest(home))
    others = [checked.folder / name for name in (".00_one-more-abcdefgh", "00_one", ".00_one.x-abcdefgh")]
    for left in (*others, checked.folder / ".00_one-abcdefgh", checked.folder / ".00_one-abcdefgh.old"):
        left.mkdir(parents=True)
    started = suite._start(checked, checked.entries[0], 1)
    assert set(checked.folder.iterdir()) == {*others, started.staging}


def test_alone_means_alone_and_others_run_together(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(f'[[run]]\nnotebook = "01_two"\nname = "n{i}"\nalone = {str(i == 1).lower()}\n' for i in range(4))
    going: list[str] = []
    together: list[set[str]] = []

    class Process:
        returncode = 0

        def __init__(self) -> None:
            self.looks = 0

        def poll(self) -> int | None:
            self.looks += 1
            return 0 if self.looks > 1 else None

    def start(_: Any, entry: suite.Entry, *more: Any) -> Any:
        going.append(entry.name)
        together.append(set(going))
        return suite._Running(entry, Process(), home, home, 0.0)  # type: ignore[arg-type]

    monkeypatch.setattr(suite, "_start", start)
    monkeypatch.setattr(suite, "_finish", lambda s, r, key: going.remove(r.entry.name) or "ok")
    monkeypatch.setattr(suite.time, "sleep", lambda _: None)
    checked = suite.load_manifest(manifest(home, text))
    suite._execute_all(checked, checked.entries, {e.name: "" for e in checked.entries}, jobs=2)
    assert {"n0", "n2"} in together and all(len(t) == 1 for t in together if "n1" in t) and sum("n1" in t for t in together) == 1


def test_new_writes_what_can_be_run_and_overwrites_nothing(home: Path) -> None:
    file = home / "papermill_runs" / "fresh.toml"
    suite.new(file)
    notebook(home / "notebooks" / "00_start_here.ipynb", parameters='seed: int = 0\ncriterion: str = "x"\nsparsity: float = 0.5\nout_dir: str = ""')
    assert suite.load_manifest(file).entries[0].parameters == {"seed": 0, "criterion": "wanda", "sparsity": 0.6}
    with pytest.raises(ConfigError, match="not there yet"):
        suite.new(file)
    with pytest.raises(ConfigError, match="such as"):
        suite.new(home / "no-suffix")


def test_an_edit_of_the_prose_is_published_without_a_new_run(home: Path) -> None:
    file, book = manifest(home, '[[run]]\nnotebook = "00_one"\n'), home / "notebooks" / "00_one.ipynb"
    assert suite.run(file) == 0
    notebook(book, text="# Better title\n\nand a sentence")
    suite.publish(file)
    cells = nbformat.read(home / "papermill_runs" / "published" / "mine" / "00_one" / "notebook.ipynb", as_version=4).cells
    assert [c.cell_type for c in cells] == ["markdown", "code", "code", "code"] and cells[0].source.startswith("# Better title")
    assert cells[2].metadata["tags"] == ["injected-parameters"] and cells[3].outputs


def test_links_lead_on_from_where_a_copy_lies(home: Path) -> None:
    there = "../papermill_runs/published/mine/00_one/notebook.ipynb"
    text = f"# One\n\nnext: [two](01_two.ipynb#end) · [contents](README.md) · [executed copy]({there}) · [x](https://x.y/z)"
    notebook(home / "notebooks" / "00_one.ipynb", text=text)
    file = manifest(home)
    assert suite.run(file) == 0
    suite.publish(file)
    for folder, up in (("papermill_runs/mine", "../../../"), ("papermill_runs/published/mine", "../../../../")):
        header = nbformat.read(home / folder / "00_one" / "notebook.ipynb", as_version=4).cells[0].source
        assert "[two](../01_two/notebook.ipynb#end)" in header and "[x](https://x.y/z)" in header
        assert f"[contents]({up}notebooks/README.md)" in header and f" · [notebook]({up}notebooks/00_one.ipynb)" in header


def test_a_checkpoint_is_a_folder_of_the_callers(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook(home / "notebooks" / "00_one.ipynb", parameters='checkpoint: str = ""\nout_dir: str = ""')
    monkeypatch.chdir(home)
    text = '[[run]]\nnotebook = "00_one"\n[run.parameters]\ncheckpoint = "state"\n'
    assert suite.load_manifest(manifest(home, text)).entries[0].parameters == {"checkpoint": str(home / "state")}
    assert suite.load_manifest(manifest(home, '[[run]]\nnotebook = "00_one"\n')).entries[0].parameters == {"checkpoint": ""}


def test_a_scale_is_one_word(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest(home, name="large")
    monkeypatch.chdir(home)
    assert suite.load_manifest("large") == suite.load_manifest("papermill_runs/large.toml")
    with pytest.raises(ConfigError, match="large.toml"):
        suite.load_manifest("larger")


def test_a_book_is_made_of_what_ran_here_or_was_published(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(suite.pages, "build", lambda executed, notebooks, out, repository: seen.update(executed, out=out, notebooks=notebooks))
    file = manifest(home)
    own, published = home / "papermill_runs" / "mine" / "00_one", home / "papermill_runs" / "published" / "mine"
    for folder in (own, published / "00_one", published / "01_two"):
        notebook(folder / "notebook.ipynb")
    (own / "status.json").write_text(json.dumps({"state": "ok", "key": "", "seconds": 1}))
    assert suite.book(file) == home / "papermill_runs" / "book" / "mine" / "index.html"
    assert seen["00_one"] == own / "notebook.ipynb" and seen["01_two"] == published / "01_two" / "notebook.ipynb"
    assert seen["notebooks"] == home / "notebooks"
    (own / "status.json").write_text(json.dumps({"state": "failed", "key": "", "seconds": 1}))
    suite.book(file, home / "elsewhere")
    assert seen["00_one"] == published / "00_one" / "notebook.ipynb" and seen["out"] == home / "elsewhere"


def test_publishing_writes_the_ledger_into_the_readme(home: Path) -> None:
    book = home / "notebooks" / "00_one.ipynb"
    told = '[{"claim": "it is so", "paper": "1", "expected here": "2", "measured": "3", "holds": "yes", "of": 4}]'
    notebook(book, code=f"from pathlib import Path\nif out_dir:\n    Path(out_dir, \"claims.json\").write_text('{told}')")
    file = manifest(home, '[[run]]\nnotebook = "00_one"\n')
    (home / "README.md").write_text("before\n<!-- ledger of mine -->\n<!-- end of ledger -->\nafter\n")
    assert suite.run(file) == 0
    suite.publish(file)
    page = (home / "README.md").read_text()
    assert "it is so: 3 ([00](papermill_runs/published/mine/00_one/notebook.ipynb))" in page and page.endswith("after\n")
    assert "it is so" in (home / "papermill_runs" / "mine" / "index.html").read_text().split("<h2>00_one")[0]
    assert "it is so" in (home / "papermill_runs" / "mine" / "ledger.csv").read_text()


BOOK = """model: str = "tiny"
corpus: str = "wiki"
held_out: list = ["wiki"]
test: list = ["wiki"]
made: list = ["self"]
criterion: str = "wanda"
criteria: list = ["wanda"]
technique: str = "BR+GP"
techniques: list = ["LR"]
patterns: list = ["2:4"]
sparsity: float = 0.5
sparsities: list = [0.5]
count: int = 8
counts: list = [8]
few_count: int = 4
extra_count: int = 4
length: int = 16
epochs: int = 1
batch_size: int = 2
limit: int = 4
seeds: list = [0, 1]
symbols: float = 0.05
write_batch: int = 8
offload: bool = False
checkpoint: str = ""
within: float = 0
out_dir: str = \"\""""


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('criterion = "wand"', "criterion is 'wand'; it must be one of magnitude"),
        ("sparsity = 1.5", "sparsity is 1.5; it must be a number with 0 <= sparsity < 1"),
        ("sparsity = -0.1", "sparsity is -0.1"),
        ("sparsity = nan", "sparsity is nan"),
        ("within = inf", "within is inf"),
        ("within = true", "within is True; it must be a number"),
        ('technique = "GP"', "technique is 'GP'"),
        ('criteria = ["wanda", "wand"]', "criteria: criterion is 'wand'"),
        ('techniques = ["LR", "RL"]', "techniques: technique is 'RL'"),
        ('patterns = ["4:2"]', "patterns: pattern is '4:2'"),
        ("sparsities = [0.5, 1.0]", "sparsities: sparsity is 1.0"),
        ("sparsities = []", "sparsities is .*one value or more"),
        ("held_out = []", "held_out is .*one value or more"),
        ("sparsities = [true]", "sparsities is .*values like those of"),
        ('seeds = ["0"]', "seeds is .*values like those of"),
        ("seeds = [0, -1]", "seeds: seed is -1"),
        ("counts = [0]", "counts: count is 0"),
        ("count = -5", "count is -5; it must be a whole number of at least 1"),
        ("few_count = -1", "few_count: count is -1"),
        ("extra_count = -1", "extra_count: self_generated is -1"),
        ("epochs = -1", "epochs is -1"),
        ("batch_size = 0", "batch_size is 0"),
        ("length = 1", "length is 1"),
        ("limit = -1", "limit is -1"),
        ("symbols = 1.5", "symbols is 1.5"),
        ("write_batch = 0", "write_batch: batch_size is 0"),
        ('held_out = "wiki"', "held_out is 'wiki'; it must be a list"),
        ('offload = "false"', "offload is 'false'; it must be true or false"),
        ("offload = 0", "offload is 0; it must be true or false"),
        ("count = [8]", "count is .8.; it must be a whole number"),
        ("checkpoint = 5", "checkpoint is 5; it must be a text"),
        ('model = "no-such-model"', "No model is called 'no-such-model'"),
        ('corpus = "wikki"', "No corpus is called 'wikki'"),
        ('test = ["wiki", "missing.txt"]', "There is no file missing.txt"),
    ],
)
def test_an_impossible_value_is_refused_before_anything_runs(home: Path, line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    notebook(home / "notebooks" / "00_one.ipynb", parameters=BOOK)
    row = '[[run]]\nnotebook = "00_one"\n'
    for text in (f'{row}name = "mine-run"\n[run.parameters]\n{line}\n', f"[defaults]\n{line}\n{row}"):
        file = manifest(home, text)
        assert main(["suite", "run", str(file), "--dry-run"]) == 2 and main(["suite", "run", str(file)]) == 2
        said = capsys.readouterr().err
        assert re.search(says, said) and ("mine-run" in said or "00_one" in said) and not file.with_suffix("").exists()
    name, _, value = line.partition(" = ")
    assert main(["suite", "new", str(file.with_name("new.toml")), f"{name}=[{value}]", "--notebook", "00_one"]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not file.with_name("new.toml").exists()


@pytest.mark.parametrize("line", ["limit = 0", 'checkpoint = ""', "made = []", "sparsity = 0", "within = 1", "epochs = 0", 'corpus = "self"'])
def test_what_is_possible_is_not_refused(home: Path, line: str) -> None:
    notebook(home / "notebooks" / "00_one.ipynb", parameters=BOOK)
    assert suite.run(manifest(home, f'[[run]]\nnotebook = "00_one"\n[run.parameters]\n{line}\n'), dry_run=True) == 0


def test_all_faults_of_a_manifest_are_listed_at_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook(home / "notebooks" / "00_one.ipynb", parameters=BOOK)
    first = '[[run]]\nnotebook = "00_one"\nname = "a"\nminutes = nan\n[run.parameters]\ncriterion = "wand"\nsparsity = 1.5\nseeds = [-1]\n'
    second = '[[run]]\nnotebook = "00_one"\nname = "b"\n[run.parameters]\ncount = "8"\nvalu = 1\n[[run]]\nnotebook = "02_none"\nname = "c"\n'
    file = manifest(home, first + second)
    assert main(["suite", "run", str(file), "--dry-run"]) == 2
    head, *lines = capsys.readouterr().err.strip().splitlines()
    assert "7 faults" in head and len(lines) == 7
    for run, said in [("a", "minutes"), ("a", "'wand'"), ("a", "1.5"), ("a", "seeds:"), ("b", "count is"), ("b", "'valu'"), ("c", "02_none")]:
        assert sum(f"run {run!r}" in line and said in line for line in lines) == 1
    assert main(["suite", "run", str(manifest(home)), "--jobs", "0"]) == 2
    assert "--jobs is 0" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_of_a_run_and_says_where(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    notebook(home / "notebooks" / "00_one.ipynb", code="1")
    write = Path.write_text

    def full(self: Path, *args: Any, **options: Any) -> int:
        if ".status.json." in self.name:
            write(self, "half")
            raise OSError(28, "No space left on device")
        return write(self, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    assert main(["suite", "run", str(manifest(home)), "--only", "00_one"]) == 1
    said = capsys.readouterr().err
    assert "status.json: cannot be written (No space left on device)" in said and "Traceback" not in said
    assert list((home / "papermill_runs" / "mine").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"test": "pydocs"}, "test is 'pydocs'; it must be a list"),
        ({"count": "8"}, "count is '8'; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"criterion": "wand"}, "criterion is 'wand'; it must be one of magnitude, wanda, sparsegpt"),
        ({"sparsity": 1.5}, "sparsity is 1.5; it must be a number with 0 <= sparsity < 1"),
        ({"count": [8], "sparsity": float("nan")}, "has 2 faults"),
    ],
    ids=str,
)
def test_parameters_that_papermill_injects_are_checked_as_they_enter(given: dict[str, Any], said: str) -> None:
    namespace = {"__annotations__": {"test": list, "count": int, "seed": int, "criterion": str, "sparsity": float, "out_dir": str}}
    plain = {"test": ["pydocs"], "count": 8, "seed": 0, "criterion": "wanda", "sparsity": 0.5, "out_dir": ""}
    check_parameters({**namespace, **plain})
    check_parameters({**namespace, **plain, "sparsity": 0})
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_parameters({**namespace, **plain, **given})


@pytest.mark.slow
def test_every_notebook_checks_its_parameters_and_papermill_stops_there(tmp_path: Path) -> None:
    import papermill

    for file in [*NOTEBOOKS.glob("*.ipynb"), *NOTEBOOKS.glob("*/*.ipynb")]:
        book = suite._read(file)
        after = next(i for i, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", []))
        assert "rk.check_parameters(globals())" in next(c.source for c in book.cells[after + 1 :] if c.cell_type == "code"), file.name
    with pytest.raises(papermill.PapermillExecutionError, match="parameter: test is 'pydocs'; it must be a list"):
        papermill.execute_notebook(NOTEBOOKS / "03_global_propagation.ipynb", tmp_path / "out.ipynb", {"test": "pydocs"}, kernel_name="python3")
