"""One bar for long work, and a small file beside it that `reconkit watch` reads from another process."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from tqdm import tqdm

from .assets import cache_dir, remove
from .callbacks import Callback

if TYPE_CHECKING:
    from .pruning import Pruning

QUIET = 30.0  # seconds between plain lines where the output is not a terminal


ABOUT: dict[str, Any] = {}
"What is known of the run that this process works on, such as its id and tag."


def folder() -> Path:
    """Folder in which running prunings keep their state, one file a process."""
    return cache_dir() / "progress"


def log(pid: int) -> Path:
    """File of what a running pruning measured: JSON lines of (kind, row), kinds errors, training and said."""
    return folder() / f"{pid}.jsonl"


class Progress:
    """Counts equal steps; shows a bar with an estimate (plain lines off a terminal) and keeps the state on disk.

    The state is {pid, born, title, done, total, started, updated, seconds_left, rss, gpu} with `ABOUT` and whatever `step` is given.
    """

    def __init__(self, title: str, total: int, *, show: bool = True) -> None:
        self.title, self.total, self.done, self.started = title, total, 0, time.time()
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            desc=title,
            disable=not show,
            file=sys.stderr,
            leave=False,
            mininterval=0.2 if terminal else QUIET,
            ascii=None if terminal else True,
        )
        self.file = folder() / f"{os.getpid()}.json"
        self.process = psutil.Process()
        self.written = 0.0
        self.before: int | None = None
        self.facts: dict[str, Any] = {}
        self.kept: dict[str, int] = {}
        self._log("", "w")

    def step(self, steps: int = 1, **facts: Any) -> None:
        """Count `steps` and show where the work is. A first call without facts counts earlier work, which the estimate leaves out."""
        self.done += steps
        self.facts.update(facts)
        if self.before is None:
            self.before = 0 if facts else steps
            self.bar.initial = self.bar.n = self.before
            steps -= self.before
        self.bar.update(steps)
        if facts:
            self.bar.set_postfix({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in facts.items()}, refresh=False)
        if time.time() - self.written > 0.5 or self.done >= self.total:
            self._write()

    def keep(self, kind: str, rows: Sequence[Any]) -> None:
        """Leave the rows of a growing table that are not there yet, for whoever watches."""
        known = self.kept.get(kind, 0)
        self.kept[kind] = len(rows)
        self._log("".join(json.dumps([kind, row]) + "\n" for row in rows[known:]))

    def _log(self, text: str, mode: str = "a") -> None:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with log(os.getpid()).open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError:
            pass  # as in `_write`

    def say(self, text: str) -> None:
        """A line that stays, above the bar and for whoever watches."""
        self._log(json.dumps(["said", text]) + "\n")
        if not self.bar.disable:
            self.bar.write(text, file=sys.stderr)
        self._write()

    def _write(self) -> None:
        now = self.written = time.time()
        here = self.done - (self.before or 0)
        rate = (now - self.started) / here if here else None
        state = {
            **ABOUT,
            "pid": os.getpid(),
            "born": self.process.create_time(),
            "title": self.title,
            "done": self.done,
            "total": self.total,
            "started": self.started,
            "updated": now,
            "seconds_left": rate * (self.total - self.done) if rate else None,
            "rss": self.process.memory_info().rss,
            "gpu": torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0,
            **self.facts,
        }
        partial = self.file.with_suffix(".partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(state))
            partial.replace(self.file)
        except OSError:
            pass  # a full disk must not end the work that is being watched

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        for file in (self.file, log(os.getpid())):
            remove(file)


class ProgressCallback(Callback):
    """Shows a pruning's progress, and leaves its tables for whoever watches."""

    def __init__(self, *, show: bool = True) -> None:
        self.show = show
        self.bar: Progress | None = None

    def on_begin(self, pruning: Pruning) -> None:
        each = pruning.epochs + 1
        self.bar = Progress(f"{pruning.config.technique} {pruning.config.criterion}", len(pruning.windows) * each, show=self.show)
        self.bar.step(pruning.done * each)

    def on_mask_end(self, pruning: Pruning, window: range) -> None:
        self.bar.step(block=window.stop - 1)

    def on_epoch_end(self, pruning: Pruning, window: range, epoch: int) -> None:
        self.bar.keep("training", pruning.state.training)
        last = [row for row in pruning.state.training if row[0] == pruning.state.training[-1][0] and row[1] == epoch]
        self.bar.step(int(epoch > 0), epoch=epoch, loss=last[0][3])

    def on_block_end(self, pruning: Pruning, block: int) -> None:
        self.bar.keep("errors", pruning.state.errors)

    def on_warning(self, pruning: Pruning, text: str) -> None:
        self.bar.say(text)

    def on_end(self, pruning: Pruning, error: BaseException | None) -> None:
        if self.bar is not None:
            self.bar.__exit__()
