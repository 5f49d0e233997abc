"""Zero-shot accuracy by lm-eval's own task definitions, on the live model and without a hub."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from . import assets, data, likelihood, statistics
from .config import ConfigError, one_of, require
from .models import weights_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The folders of lm-eval's own task definitions: scanning all of its thousands takes a quarter of a minute.
DEFINITIONS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")
CHANCE = {"boolq": 0.5, "rte": 0.5, "hellaswag": 0.25, "winogrande": 0.5, "arc_easy": 0.25, "arc_challenge": 0.25, "openbookqa": 0.25}
"Accuracy of guessing (a few ARC items have three or five choices)."
METRICS = ("acc", "acc_norm")
Answers = dict[str, dict[str, list[float]]]
"Task → metric → whether each drawn item was answered right."
COLUMNS = ["task", "metric", "value", "stderr", "n", "difference", "low", "high", "p"]


def check_tasks(tasks: Sequence[str]) -> None:
    """Whether these can be asked here, without asking anything.

    Raises:
        ConfigError: an unknown task, or lm-eval is not installed.
    """
    for task in tasks:
        require(task in data.TASKS, "task", task, one_of(tuple(data.TASKS)))
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("Zero-shot tasks need lm-eval; install it with: pip install 'reconkit[eval]'.")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    against: PreTrainedModel | None = None,
) -> pd.DataFrame:
    """Accuracy on lm-eval's own task definitions, without a hub. Answers are kept by the sum of the weights, so that a dense
    model answers once for all that are compared with it.

    Args:
        tasks: any of boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa.
        limit: items of each task, a seeded draw; None: all.
        against: another model that answers the same items, usually the dense one.

    Returns:
        A row a task and metric: task, metric (acc, the length-unnormalised one that the paper reports, and acc_norm where the
        task has it), value, stderr, n (items), difference (value − the other's, NaN without `against`), low and high: the paired
        95 % interval of the difference (`statistics.difference`), or Wilson's of the value where nothing is compared; p: McNemar's
        exact test of the same items.

    Raises:
        ConfigError: an unknown task, `limit` below 1, or lm-eval is not installed.
    """
    own = answers(model, tokenizer, tasks, limit=limit, seed=seed)
    return compare(own, answers(against, tokenizer, tasks, limit=limit, seed=seed) if against is not None else None)


def compare(own: Answers, others: Answers | None = None) -> pd.DataFrame:
    """The table that `zero_shot` returns, of answers to the same items."""
    rows = []
    for task, metrics in own.items():
        for metric, given in metrics.items():
            found, difference, p = statistics.proportion(given), math.nan, math.nan
            value = found.value
            if others is not None:
                found = statistics.difference(given, others[task][metric])
                difference, p = found.value, mcnemar(torch.tensor(given), torch.tensor(others[task][metric]))
            rows.append((task, metric, value, statistics.standard_error(given), found.n, difference, found.low, found.high, p))
    return pd.DataFrame(rows, columns=COLUMNS)


def mcnemar(first: torch.Tensor, second: torch.Tensor) -> float:
    """Two-sided exact p of McNemar's test: were as many items (n,) won as lost? 1 where none differ."""
    won, lost = int((first > second).sum()), int((first < second).sum())
    tail = sum(math.comb(won + lost, k) for k in range(min(won, lost) + 1)) / 2 ** (won + lost)
    return min(1.0, 2 * tail)


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *, limit: int | None = None, seed: int = 0) -> Answers:
    """What the model answers to each drawn item, from the cache or asked now.

    Raises:
        ConfigError: as `zero_shot`.
    """
    check_tasks(tasks)
    require(limit is None or limit >= 1, "limit", limit, "a whole number of at least 1, or None for all")
    folder = assets.cache_dir() / "answers"
    whose = [weights_sum(model), str(model.dtype), model.device.type, version("lm_eval"), len(tokenizer)]
    files = {}
    for task in tasks:
        facts = [*whose, task, data.task_identity(task), limit, seed]
        files[task] = folder / f"{task}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}.json"
    missing = [task for task in tasks if not files[task].is_file()]
    for task, found in (_ask(model, tokenizer, missing, limit, seed) if missing else {}).items():
        data.write_text(files[task], json.dumps(found))
    return {task: json.loads(files[task].read_text(encoding="utf-8")) for task in tasks}


def items_sum(task: str, limit: int | None, seed: int) -> str:
    """A fingerprint of the items drawn."""
    return hashlib.sha256(json.dumps([task, data.task_identity(task), limit, seed]).encode()).hexdigest()[:12]


def _ask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], limit: int | None, seed: int) -> Answers:
    """Let lm-eval ask."""
    import lm_eval.tasks

    folders = [str(Path(lm_eval.tasks.__path__[0]) / folder) for folder in DEFINITIONS]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        apart = {"cache_dir": str(Path(scratch) / "cache")}
        members = [_member(task, _draw(data.task_data(task), Path(scratch) / f"{task}.jsonl", limit, seed), apart) for task in tasks]
        found = lm_eval.simple_evaluate(
            model=_scorer(model, tokenizer),
            tasks=[{"group": "drawn", "task": members}],
            task_manager=lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
        )
    given: Answers = {}
    for task in tasks:
        items = sorted(found["samples"][task], key=lambda s: s["doc_id"])
        given[task] = {metric: [float(s[metric]) for s in items] for metric in METRICS if metric in items[0]}
    return given


GROUP = "reconkit"


def write_tasks(folder: str | Path, tasks: Sequence[str], *, limit: int | None = None, seed: int = 0) -> Path:
    """The drawn items, and a group that lets lm-eval's own command line ask them: `lm_eval --include_path folder --tasks reconkit …`.

    Returns:
        the group's file.

    Raises:
        ConfigError: as `zero_shot`.
    """
    check_tasks(tasks)
    path = Path(folder).absolute()
    path.mkdir(parents=True, exist_ok=True)
    members = []
    for task in tasks:
        drawn = _draw(data.task_data(task), path / f"{task}.jsonl", limit, seed)
        members.append(_member(task, drawn, {}))
    file = path / f"{GROUP}.yaml"  # JSON is YAML
    file.write_text(json.dumps({"group": GROUP, "task": members}, indent=1) + "\n", encoding="utf-8")
    return file


def _member(task: str, drawn: Path, more: dict[str, str]) -> dict[str, Any]:
    """lm-eval's own definition of a task, with other data."""
    files = {"data_files": {"validation": str(drawn), "test": str(drawn)}, **more}
    return {"task": task, "dataset_path": "json", "dataset_name": None, "training_split": None, "dataset_kwargs": files}


def _scorer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """lm-eval's model over a live one; on a CPU the requests share the work where they begin alike.

    The fastest of `likelihood.packed` and `likelihood.shared` that gives lm-eval's own answers to a few requests answers them
    all; where neither does, and on a GPU, which would rather have large batches, lm-eval's plain path does.
    """
    from lm_eval.models.huggingface import HFLM

    class Shared(HFLM):
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> list[likelihood.Answer]:
            plain = super()._loglikelihood_tokens
            if self.device.type != "cpu" or any(len(c) + len(k) > self.max_length for _, c, k in requests):
                return plain(requests, disable_tqdm, override_bs)
            order = sorted(range(len(requests)), key=lambda i: requests[i][1:])
            pairs = [requests[i][1:] for i in order]
            few = likelihood.few(pairs)
            expected = [plain([(None, *pair)], True)[0] for pair in few]
            for route in (likelihood.packed, likelihood.shared):
                if likelihood.agrees(route, model, few, expected):
                    return [answer for _, answer in sorted(zip(order, route(model, pairs), strict=True))]
            return plain(requests, disable_tqdm, override_bs)

    return Shared(pretrained=model, tokenizer=tokenizer, batch_size=8)


def _draw(source: Path, to: Path, limit: int | None, seed: int) -> Path:
    """A seeded draw of `limit` items, in their order, as a file of its own."""
    items = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # JSON strings may hold other line separators
    if limit is not None and limit < len(items):
        items = [items[i] for i in sorted(random.Random(seed).sample(range(len(items)), limit))]
    to.write_text("\n".join(items) + "\n", encoding="utf-8")
    return to


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' logging and bars, and with the random state as it was."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    python, numpy, stderr = random.getstate(), np.random.get_state(), os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # lm-eval asks git for a version, and git writes past sys.stderr
    try:
        with torch.random.fork_rng(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        random.setstate(python)
        np.random.set_state(numpy)
        logging.disable(level)
