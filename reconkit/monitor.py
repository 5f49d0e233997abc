"""Watching what runs: in the terminal or in a notebook, from any process that shares the cache; watching never touches the run."""

from __future__ import annotations

import json
import shutil
import sys
import time
from typing import Any

import pandas as pd
import psutil

from . import progress, report, runs
from .config import ConfigError

ERRORS, TRAINING = ["block", "source", "mse", "nmse", "token_nmse", "token_nmse_90"], ["window", "epoch", "source", "loss"]
SAME = 1.0  # seconds by which two looks at one process's start may differ


def running(run: str | None = None) -> list[dict[str, Any]]:
    """The states of the walks that are running now, oldest first; of `run` only: a process number, a run's id, the beginning of one, or its tag."""
    states = []
    for file in progress.folder().glob("*.json"):
        try:
            state = json.loads(file.read_text())
            process = psutil.Process(state["pid"])
            same = abs(process.create_time() - state["born"]) < SAME  # else another process has the number now
            if same and process.status() != psutil.STATUS_ZOMBIE:  # killed, and its parent has not asked yet
                states.append(state)
        except (OSError, ValueError, KeyError, psutil.Error):  # gone since the listing, or left by a killed process
            continue
    return sorted((state for state in states if run is None or _is(state, run)), key=lambda state: state["started"])


def _is(state: dict[str, Any], run: str) -> bool:
    return run in (str(state["pid"]), state.get("tag")) or str(state.get("run") or "").startswith(run)


def course(state: dict[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """What a running pruning has measured so far: errors (block, source, mse, nmse, token_nmse, token_nmse_90), training (window,
    epoch, source, loss), and its warnings."""
    rows: dict[str, list[Any]] = {"errors": [], "training": [], "said": []}
    try:
        text = progress.log(state["pid"]).read_text(encoding="utf-8")
    except OSError:
        text = ""
    for told in text.splitlines():
        try:
            kind, row = json.loads(told)
        except ValueError:  # half written
            continue
        rows[kind].append(row)
    return pd.DataFrame(rows["errors"], columns=ERRORS), pd.DataFrame(rows["training"], columns=TRAINING), rows["said"]


def lines(state: dict[str, Any]) -> list[str]:
    """A running walk in a few lines: where it is, losses, errors, memory and time, and its warnings."""
    errors, training, said = course(state)
    who = "  ".join([state["title"], f"process {state['pid']}", *(str(state[k]) for k in ("run", "tag") if state.get(k))])
    place = "  ".join(f"{k} {report.show(state[k])}" for k in ("block", "epoch") if k in state)
    found = [f"{who}  {state['done'] / max(state['total'], 1):.0%}  {place}".rstrip()]
    if len(training):
        window = training[training.window == training.window.iloc[-1]]
        by_source = [(source, part.loss.iloc[-1], part.loss.iloc[0]) for source, part in window.groupby("source", sort=False)]
        losses = [f"{source} {report.show(now)} (from {report.show(first)})" for source, now, first in by_source]
        found.append(f"  loss of window {window.window.iloc[-1]}: {', '.join(losses)}")
    if len(errors):
        by_source = [(source, part.nmse.tolist()) for source, part in errors.groupby("source", sort=False)]
        told = [f"{source} {report.show(now)}" + (f" ({report.show(before[-1])} before)" if before else "") for source, (*before, now) in by_source]
        found.append(f"  NMSE after block {errors.block.max()}: {', '.join(told)}")
    left = state.get("seconds_left")
    left = "" if left is None else f", about {report.clock(max(left - (time.time() - state['updated']), 0))} left"
    memory = ", ".join(f"{report.size(state[k])} {word}" for k, word in (("rss", "RAM"), ("gpu", "GPU")) if state.get(k))
    found.append(f"  {memory or 'memory unknown'}; {report.clock(time.time() - state['started'])} so far{left}")
    return found + [f"  warning: {text}" for text in said]


def watch(run: str | None = None, *, interval: float = 1.0) -> None:
    """Show the running walks in the terminal until they end, or until Ctrl-C, which ends the watching alone; without any, what was recorded.

    Args:
        run: a process number, the id or tag of a run that is under way, or a recorded one; None: everything.
        interval: seconds between looks.

    Raises:
        ConfigError: nothing is called `run`.
    """
    watched, terminal = running(run), sys.stdout.isatty()
    if not watched:
        print(_recorded(run))
        return
    height, before = 0, None
    try:
        while watched:
            shown = [line for state in watched for line in lines(state)]
            if terminal:
                width, rows = shutil.get_terminal_size()
                shown = shown[: rows - 1]  # what has left the screen cannot be drawn anew
                back = f"\x1b[{height}F\x1b[J" if height else ""
                print(back + "\n".join(line[: width - 1] for line in shown), flush=True)
                height = len(shown)
            elif (place := [(s["pid"], s.get("block"), s.get("epoch")) for s in watched]) != before:  # a log grows only where something happened
                print("\n".join(shown), flush=True)
                before = place
            time.sleep(interval)
            watched = running(run)
    except KeyboardInterrupt:
        print("\nNo longer watching; what runs goes on.")
        return
    print("Done: nothing is running any more.")


def live(run: str | None = None, *, interval: float = 2.0, wait: float = 60.0) -> None:
    """The same in a notebook: one figure that is drawn anew while the run goes on. Interrupting the cell ends the watching alone.

    Args:
        run: as `watch`; of several the oldest is shown.
        interval: seconds between looks.
        wait: seconds for a run to begin.

    Raises:
        ConfigError: nothing has begun by then.
    """
    from IPython.display import Image, display

    from . import plots

    until, handle = time.time() + wait, None
    while not (watched := running(run)):
        if time.time() > until:
            who = f"Nothing called {run!r}" if run else "Nothing"
            raise ConfigError(f"{who} has begun within {wait:.0f} seconds; start it in another process first.")
        time.sleep(min(interval, 0.2))
    try:
        while watched:
            errors, training, _ = course(watched[0])
            if len(errors) or len(training):
                shown = Image(plots.as_png(plots.course(errors, training, "\n".join(line.strip() for line in lines(watched[0])))))
                handle = display(shown, display_id=True) if handle is None else handle.update(shown) or handle
            time.sleep(interval)
            watched = running(run)
    except KeyboardInterrupt:
        print("No longer watching; what runs goes on.")


def _recorded(run: str | None) -> str:
    if run is not None:
        found = runs.find(run)
        return "\n".join([f"run {found.id}", *(f"  {name}  {report.show(value)}" for name, value in found.metrics.items())])
    history = runs.history()
    if history.empty:
        return f"Nothing is running. {report.EMPTY}"
    return "Nothing is running. The last versions:\n" + report.text_table(report.arrange(history.tail(5)))
