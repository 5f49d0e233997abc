"""Perplexity, zero-shot accuracy, speed and size of a model, however it was made."""

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
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from . import cost, data
from .config import ConfigError, one_of, require
from .models import blocks, weight_views

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Z95 = 1.959964  # half-width of a 95 % interval in standard errors
LOGITS = 2**26  # logits held at once; a large vocabulary must not decide how much memory an evaluation takes
# The folders of lm-eval's own task definitions: scanning all of its thousands takes a quarter of a minute.
DEFINITIONS = ("super_glue/boolq", "glue/rte", "hellaswag", "winogrande", "arc", "openbookqa")


@torch.no_grad()
def sequence_nll(model: PreTrainedModel, samples: Tensor, *, batch_size: int = 8) -> Tensor:
    """Mean −log p of the next token in each sequence, (N, T) → (N,) float64; T − 1 tokens of each are predicted.

    Raises:
        ConfigError: no sequence, or fewer than two tokens in each.
    """
    require(samples.ndim == 2 and samples.shape[1] >= 2 and len(samples) > 0, "samples", tuple(samples.shape), "(samples, at least 2 tokens)")
    fits = max(1, LOGITS // (samples.shape[1] * model.get_output_embeddings().out_features))
    found = []
    for ids in samples.split(min(batch_size, fits)):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        found.append(nll.view(len(ids), -1).cpu().double().mean(1))
    return torch.cat(found)


def perplexity(model: PreTrainedModel, samples: Tensor, *, batch_size: int = 8) -> float:
    """exp of the mean −log p over all predicted tokens of `samples` (N, T)."""
    return _exp(float(sequence_nll(model, samples, batch_size=batch_size).mean()))


def perplexity_interval(nll: Tensor) -> tuple[float, float]:
    """95 % interval of the perplexity from the spread over sequences, (N,) → (low, high)."""
    mean, error = float(nll.mean()), _standard_error(nll)
    return _exp(mean - Z95 * error), _exp(mean + Z95 * error)


def perplexity_ratio(nll: Tensor, against: Tensor) -> tuple[float, float, float]:
    """Perplexity over another model's on the same sequences, and its paired 95 % interval: (ratio, low, high)."""
    difference = nll - against
    mean, error = float(difference.mean()), _standard_error(difference)
    return _exp(mean), _exp(mean - Z95 * error), _exp(mean + Z95 * error)


def _exp(value: float) -> float:
    """Infinite where `math.exp` raises: a model that is broken has a perplexity, too."""
    return float(torch.tensor(value, dtype=torch.float64).exp())


def _standard_error(values: Tensor) -> float:
    return float(values.double().std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


@torch.no_grad()
def cloze(model: PreTrainedModel, samples: Tensor, items: Tensor, *, batch_size: int = 8) -> Tensor:
    """Whether the model finds the true token of each cloze item likelier than every other candidate: (items,) bool.

    Args:
        samples: (N, T) tokens in which the blanks are; a blank sees all tokens before it.
        items: (items, 2 + choices): sample, position, the true token, the others. One forward answers all blanks of a sample.
    """
    fits = max(1, LOGITS // (samples.shape[1] * model.get_output_embeddings().out_features))
    right = torch.zeros(len(items), dtype=torch.bool)
    for rows in torch.arange(len(samples)).split(min(batch_size, fits)):
        asked = torch.isin(items[:, 0], rows).nonzero().flatten()
        if not len(asked):
            continue
        logits = model(input_ids=samples[rows].to(model.device), use_cache=False).logits
        chosen = items[asked].to(logits.device)
        scores = logits[chosen[:, 0] - int(rows[0]), chosen[:, 1] - 1].float().gather(1, chosen[:, 2:])
        right[asked] = (scores[:, 0] > scores[:, 1:].max(1).values).cpu()
    return right


def clustered_error(right: Tensor, cluster: Tensor) -> float:
    """Standard error of the mean of `right` (items,), or of a difference, when the items of one `cluster` (their sample) belong together."""
    residuals = right.double() - right.double().mean()
    sums = torch.zeros(int(cluster.max()) + 1, dtype=torch.float64).index_add_(0, cluster, residuals)
    groups = len(cluster.unique())
    return float(sums.square().sum().sqrt() / len(right) * math.sqrt(groups / (groups - 1))) if groups > 1 else math.inf


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
    """Accuracy on lm-eval's own task definitions, without a hub.

    Args:
        tasks: any of boolq, rte, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa.
        limit: items of each task, a seeded draw; None: all.
        against: another model that answers the same items, usually the dense one.

    Returns:
        A row a task: task, metric (acc, the length-unnormalised one that the paper reports), value, stderr, n,
        difference (value − the other's, NaN without `against`), low and high: the paired 95 % interval of the difference,
        or of the value where nothing is compared.

    Raises:
        ConfigError: an unknown task, `limit` below 1, or lm-eval is not installed.
    """
    check_tasks(tasks)
    require(limit is None or limit >= 1, "limit", limit, "a whole number of at least 1, or None for all")
    answers = _answers(model, tokenizer, tasks, limit, seed)
    others = _answers(against, tokenizer, tasks, limit, seed) if against is not None else None
    rows = []
    for task in tasks:
        right = torch.tensor(answers[task], dtype=torch.float64)
        value, stderr = float(right.mean()), _standard_error(right)
        centre, spread, difference = value, stderr, math.nan
        if others is not None:
            paired = right - torch.tensor(others[task], dtype=torch.float64)
            centre = difference = float(paired.mean())
            spread = _standard_error(paired)
        rows.append((task, "acc", value, stderr, len(right), difference, centre - Z95 * spread, centre + Z95 * spread))
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n", "difference", "low", "high"])


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], limit: int | None, seed: int
) -> dict[str, list[float]]:
    """Whether each drawn item of each task was answered right."""
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    folders = [str(Path(lm_eval.tasks.__path__[0]) / folder) for folder in DEFINITIONS]
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        members = []
        for task in tasks:
            drawn = _draw(data.task_data(task), Path(scratch) / f"{task}.jsonl", limit, seed)
            files = {"validation": str(drawn), "test": str(drawn)}
            kwargs = {"data_files": files, "cache_dir": str(Path(scratch) / "cache")}
            members.append({"task": task, "dataset_path": "json", "dataset_name": None, "training_split": None, "dataset_kwargs": kwargs})
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[{"group": "drawn", "task": members}],
            task_manager=lm_eval.tasks.TaskManager(include_path=folders, include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
        )
    return {task: [s["acc"] for s in sorted(found["samples"][task], key=lambda s: s["doc_id"])] for task in tasks}


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


@torch.no_grad()
def speed(model: PreTrainedModel, *, length: int = 128, tokens: int = 32, repeats: int = 3) -> dict[str, float]:
    """Tokens a second of one sequence: reading a prompt of `length`, and writing `tokens` more; medians after a warm-up.

    Compare only figures of one machine measured side by side.
    """
    prompt = torch.full((1, length), 5, device=model.device)

    def generate(new: int) -> Tensor:
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=new, max_new_tokens=new, pad_token_id=0)

    # Reading is writing one token: a plain forward would also compute the logits of the whole prompt, which generation never does.
    reading, writing = [], []
    for _ in range(repeats + 1):
        reading.append(_timed(lambda: generate(1), model.device))
        writing.append(_timed(lambda: generate(tokens), model.device))
    read, write = statistics.median(reading[1:]), statistics.median(writing[1:])
    return {"prefill_tokens_per_second": length / read, "decode_tokens_per_second": (tokens - 1) / max(write - read, 1e-9)}


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def size(model: PreTrainedModel) -> dict[str, float]:
    """Parameters, bytes in memory, and the share of zeros in the prunable matrices (which saves no byte by itself)."""
    views = [view for block in blocks(model)[1] for view in weight_views(block)[0]]
    weights = sum(view.get().numel() for view in views)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "prunable": weights,
        "zeros": sum(int((view.get() == 0).sum()) for view in views) / weights,
    }


_speed = speed  # `evaluate` has a switch of that name


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    perplexity: Sequence[str] = ("wiki", "news", "pydocs"),
    split: str = "test",
    count: int | None = 32,
    length: int = 256,
    tasks: Sequence[str] = (),
    limit: int | None = 100,
    against: PreTrainedModel | None = None,
    speed: bool = False,
    seed: int = 0,
    batch_size: int = 8,
    texts: Mapping[str, Tensor] | None = None,
    blanks: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """The record of a model: everything that was asked for, with 95 % intervals, and what measuring it took.

    Args:
        perplexity: corpora; `count` samples of `length` tokens of their `split` (None: the whole split).
        tasks: zero-shot tasks, `limit` items of each.
        against: the dense model; then perplexities carry their ratio to its, and accuracies the paired difference.
        speed: time prefill and decoding, too.
        texts: further samples (N, T) by name, such as text of the model's own; their split is called "given".
        blanks: (samples, items) of a cloze set, see `cloze`.

    Returns:
        perplexity: rows of corpus, split, length, tokens, value, low, high, nll (per sequence), and ratio, ratio_low,
        ratio_high with `against`; cloze: value, low, high, n, right and sample (per item) or None; zero_shot: rows; speed: dict or None;
        size: dict; cost: seconds and peak memory;
        fingerprint: what decides these figures, the weights included.
    """
    check_tasks(tasks)
    drawn = {corpus: data.load_samples(corpus, tokenizer, count=count, length=length, split=split, seed=seed) for corpus in perplexity}
    with cost.measure() as used:
        rows = []
        for corpus, samples in {**drawn, **(texts or {})}.items():
            nll = sequence_nll(model, samples, batch_size=batch_size)
            low, high = perplexity_interval(nll)
            row = {
                "corpus": corpus,
                "split": split if corpus in drawn else "given",
                "length": samples.shape[1],
                "tokens": samples[:, 1:].numel(),
                "value": _exp(float(nll.mean())),
                "low": low,
                "high": high,
            }
            if against is not None:
                ratio = perplexity_ratio(nll, sequence_nll(against, samples, batch_size=batch_size))
                row |= dict(zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True))
            rows.append({**row, "nll": nll.tolist()})
        answers = zero_shot(model, tokenizer, tasks, limit=limit, seed=seed, against=against).to_dict("records") if tasks else []
        filled = _cloze_record(model, *blanks, batch_size) if blanks else None
        timing = _speed(model) if speed else None
    facts = [[data.identity(c, split) for c in perplexity], split, count, length, list(tasks), limit, seed, str(model.dtype), weights_sum(model)]
    facts += [
        sorted((name, hashlib.sha256(ids.numpy().tobytes()).hexdigest()) for name, ids in (texts or {}).items()),
        [b.tolist() for b in blanks or ()],
    ]
    return {
        "perplexity": rows,
        "cloze": filled,
        "zero_shot": answers,
        "speed": timing,
        "size": size(model),
        "cost": {"seconds": used.seconds, "rss_bytes": used.rss_bytes, "gpu_bytes": used.gpu_bytes},
        "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12],
    }


def _cloze_record(model: PreTrainedModel, samples: Tensor, items: Tensor, batch_size: int) -> dict[str, Any]:
    right = cloze(model, samples, items, batch_size=batch_size)
    value, error = float(right.double().mean()), clustered_error(right, items[:, 0])
    each = {"right": right.int().tolist(), "sample": items[:, 0].tolist()}
    return {"value": value, "low": value - Z95 * error, "high": value + Z95 * error, "n": len(right), **each}


def weights_sum(model: PreTrainedModel) -> str:
    """A sum over the weights: what a model is, whatever it is called."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
