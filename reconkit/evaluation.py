"""Perplexity, zero-shot accuracy, speed and size of a model, however it was made."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import cost, data, offload, packing, statistics
from .config import require
from .latency import compressed, latency
from .models import blocks, read_on, save_model, weight_views, weights_sum
from .streams import Runner
from .zeroshot import answers, check_tasks, compare, items_sum

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE = 0.1  # share of zeros that a model may have besides its masks: restored weights hold some
WRITTEN = 48  # tokens after each prompt
LOGITS = 2**26  # logits held at once; a large vocabulary must not decide how much memory an evaluation takes


@torch.no_grad()
def sequence_nll(model: PreTrainedModel, samples: Tensor, *, batch_size: int = 8) -> Tensor:
    """Mean −log p of the next token in each sequence, (N, T) → (N,) float64; T − 1 tokens of each are predicted.

    Logits are held for so many sequences at once as fit, or for so many tokens of one sequence, which then are read in pieces
    through the key-value cache.

    Raises:
        ConfigError: no sequence, or fewer than two tokens in each.
    """
    require(samples.ndim == 2 and samples.shape[1] >= 2 and len(samples) > 0, "samples", tuple(samples.shape), "(samples, at least 2 tokens)")
    if _at_once(model, samples):
        return _read(model, samples, torch.empty(0, 3, dtype=torch.long), len(samples), batch_size)[0]
    length, vocabulary = samples.shape[1], model.get_output_embeddings().out_features
    if offload.of(model):
        return _nll_by_block(model, samples, max(1, min(batch_size, LOGITS // (length * vocabulary))))
    piece, found = max(1, LOGITS // vocabulary), []
    for ids in samples.split(1):
        ids = ids.to(model.device)
        cache, parts = None, []
        for part in ids[:, :-1].split(piece, dim=1):
            logits, cache = read_on(model, part, cache)
            start = sum(p.shape[1] for p in parts)
            parts.append(_nll(logits, ids[:, start + 1 : start + 1 + part.shape[1]]))
        found.append(torch.cat(parts, 1).mean(1))
    return torch.cat(found)


def _at_once(model: PreTrainedModel, samples: Tensor) -> bool:
    """Whether all logits of a sample are held at once, from one forward of a model in memory."""
    return not offload.of(model) and samples.shape[1] * model.get_output_embeddings().out_features <= LOGITS


def _nll_by_block(model: PreTrainedModel, samples: Tensor, batch_size: int) -> Tensor:
    """As `sequence_nll`, for blocks on disk: all samples pass one block before the next is read."""
    runner = Runner(model, blocks(model)[1])
    states = runner.embed(samples, batch_size)
    for i in range(len(runner.blocks)):
        with offload.holding(model, i):
            states = runner.advance([i], states, batch_size)
    parts = zip(states.split(batch_size), samples.split(batch_size), strict=True)
    return torch.cat([_nll(runner.logits(s.to(runner.device))[:, :-1], ids[:, 1:].to(runner.device)).mean(1) for s, ids in parts])


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    """−log p of `targets` (B, T) under `logits` (B, T, vocabulary), in float64 on the CPU."""
    rows = zip(logits, targets, strict=True)  # one by one: a sample's logits stay in the processor's cache, and a slice of them is no copy
    return torch.stack([torch.nn.functional.cross_entropy(row.float(), ids, reduction="none") for row, ids in rows]).cpu().double()


def perplexity(model: PreTrainedModel, samples: Tensor, *, batch_size: int = 8) -> float:
    """exp of the mean −log p over all predicted tokens of `samples` (N, T)."""
    return float(sequence_nll(model, samples, batch_size=batch_size).mean().exp())


def ids_sum(ids: Tensor) -> str:
    """A fingerprint of token ids and their shape."""
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


@torch.no_grad()
def cloze(model: PreTrainedModel, samples: Tensor, items: Tensor, *, batch_size: int = 8) -> Tensor:
    """Whether the model finds the true token of each cloze item likelier than every other candidate: (items,) bool.

    Args:
        samples: (N, T) tokens in which the blanks are; a blank sees all tokens before it.
        items: (items, 2 + choices): sample, position, the true token, the others. One forward answers all blanks of a sample.
    """
    return _read(model, samples, items, 0, batch_size)[1]


@torch.no_grad()
def _read(model: PreTrainedModel, samples: Tensor, items: Tensor, count: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """`sequence_nll` of the first `count` samples and `cloze` of `items`, from one forward of each sample that either asks for."""
    size = max(1, min(batch_size, LOGITS // (samples.shape[1] * model.get_output_embeddings().out_features)))
    parts = [slice(i, min(i + size, end)) for start, end in ((0, count), (count, len(samples))) for i in range(start, end, size)]
    nll, right = [], torch.zeros(len(items), dtype=torch.bool)
    for part in parts:
        asked = (part.start <= items[:, 0]) & (items[:, 0] < part.stop)
        if part.start >= count and not asked.any():
            continue
        ids = samples[part].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        if part.start < count:
            nll.append(_nll(logits[:, :-1], ids[:, 1:]).mean(1))
        chosen = items[asked].to(logits.device)
        scores = logits[chosen[:, 0] - part.start, chosen[:, 1] - 1].float().gather(1, chosen[:, 2:])
        right[asked] = (scores[:, :1] > scores[:, 1:]).all(1).cpu()
    return torch.cat(nll) if nll else torch.empty(0, dtype=torch.float64), right


@torch.no_grad()
def generations(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, *, tokens: int = WRITTEN) -> list[dict[str, Any]]:
    """What the model writes on from each prompt (N, T), always taking the likeliest token.

    Returns:
        prompt (text), tokens (ids) and pieces (their texts, one each): kept, they can be compared with what another version writes.
    """
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    ids = prompts.to(model.device)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, prompts.shape[1] :].tolist()
    return [
        {"prompt": tokenizer.decode(prompt), "tokens": own, "pieces": [tokenizer.decode([token]) for token in own]}
        for prompt, own in zip(prompts, written, strict=True)
    ]


def size(model: PreTrainedModel) -> dict[str, float]:
    """Parameters, bytes in memory, and the share of zeros in the prunable matrices (which saves no byte by itself)."""
    weights = zeros = 0
    for index, block in enumerate(blocks(model)[1]):
        with offload.holding(model, index):
            for view in weight_views(block)[0]:
                weights += view.get().numel()
                zeros += int((view.get() == 0).sum())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "prunable": weights,
        "zeros": zeros / weights,
    }


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
    speed_batches: Sequence[int] = (1, 8),
    seed: int = 0,
    batch_size: int = 8,
    sparsity: float | None = None,
    packed: bool = False,
    price_per_hour: float | None = None,
    texts: Mapping[str, Tensor] | None = None,
    blanks: tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Sequence[int]] | None = None,
    prompts: Tensor | None = None,
) -> dict[str, Any]:
    """The record of a model: everything that was asked for, with 95 % intervals, and what measuring it took.

    Args:
        perplexity: corpora; `count` samples of `length` tokens of their `split`; None: all of it, as `data.load_reported` says.
        tasks: zero-shot tasks, `limit` items of each.
        against: the dense model; then perplexities carry their ratio to its, and accuracies the paired difference.
        speed: time generation, too, at each of `speed_batches`; the models take turns. On a GPU with kernels for it, a 2:4
            model is timed once more as "this, 2:4 kernels".
        sparsity: the share of zeros that the prunable matrices must have, such as `PruneResult.sparsity`: the wrong model is never scored.
        packed: save the model, and write its weights as bitmasks and values, in a temporary folder; read these back, compare, and
            add both sizes.
        price_per_hour: of the machine; with `speed`, gives what a million tokens cost.
        texts: further samples (N, T) by name, such as text of the model's own; their split is called "given".
        blanks: (samples, items) of a cloze set, see `cloze`, and where it is known the number of each sample's article, as
            `testsets.cloze_of` gives them.
        prompts: tokens (N, T) from which it writes on, see `generations`.

    Returns:
        perplexity: rows of corpus (of a file, its name), split, length, tokens, data (a fingerprint), samples (another), dtype,
        device, value, low, high, n (articles, over which the interval is), nll and articles (per sequence), and ratio, ratio_low,
        ratio_high with `against`; cloze: value, low, high, n (articles), right, sample and article (per item), and difference,
        difference_low, difference_high with `against`, or None; zero_shot: rows, see `zero_shot`, with
        items (a fingerprint) and right (per item); generations: rows, see `generations`; speed: rows, see `latency`; size: dict;
        cost: of measuring, see `Cost.record`, and with a price that of a million tokens by batch size;
        fingerprint: what decides these figures, the weights included.
    """
    check_tasks(tasks)
    measured = size(model)
    if sparsity is not None and not sparsity - 1e-6 <= measured["zeros"] <= sparsity + SPARE:
        had = f"{measured['zeros']:.2%} zeros where {sparsity:.2%} were pruned"
        raise RuntimeError(f"The model to be measured has {had}: it is another model, or its masks were lost.")
    options = {"length": length, "split": split}
    drawn = {
        c: data.draw_reported(c, tokenizer, **options) if count is None else data.draw(c, tokenizer, count=count, seed=seed, **options)
        for c in perplexity
    }
    drawn |= {name: data.Draw(samples, list(range(len(samples)))) for name, samples in (texts or {}).items()}
    blanks, blank_articles = (blanks[:2], blanks[2] if len(blanks) > 2 else None) if blanks else (None, None)
    with cost.measure() as used:
        rows, right = [], None
        for corpus, (samples, articles) in drawn.items():
            if blanks and right is None and _at_once(model, samples) and torch.equal(samples, blanks[0][: len(samples)]):
                nll, right = _read(model, *blanks, len(samples), batch_size)
            else:
                nll = sequence_nll(model, samples, batch_size=batch_size)
            found, real = statistics.perplexity(nll, articles), corpus not in (texts or {})
            row = {
                "corpus": data.short_name(corpus),
                "split": split if real else "given",
                "length": samples.shape[1],
                "tokens": samples[:, 1:].numel(),
                "data": data.identity(corpus, split) if real else corpus,
                "samples": ids_sum(samples),
                "dtype": str(model.dtype).removeprefix("torch."),
                "device": model.device.type,
                **vars(found),
            }
            if against is not None:
                ratio = statistics.perplexity_ratio(nll, sequence_nll(against, samples, batch_size=batch_size), articles)
                row |= {"ratio": ratio.value, "ratio_low": ratio.low, "ratio_high": ratio.high}
            rows.append({**row, "nll": nll.tolist(), "articles": articles})
        asked = _zero_shot_record(model, tokenizer, tasks, limit, seed, against) if tasks else []
        filled = _cloze_record(model, *blanks, right, against, batch_size, blank_articles) if blanks else None
        written = generations(model, tokenizer, prompts) if prompts is not None else []
        models = {"this": model} | ({} if against is None else {"against": against})
        if speed and (other := compressed(model)) is not None:
            models["this, 2:4 kernels"] = other
        timing = latency(models, batch_sizes=speed_batches).to_dict("records") if speed else []
    if packed:
        measured |= _packed(model, tokenizer)
    spent = used.record(price_per_hour)
    if price_per_hour is not None:
        own = [row for row in timing if row["model"] == "this" and row["measure"] == "decode_tokens_per_second"]
        spent |= {f"million_tokens/{row['batch']}": cost.million_tokens(row["value"], price_per_hour) for row in own}
    facts = [[data.identity(c, split) for c in perplexity], split, count, length, list(tasks), limit, seed, str(model.dtype), weights_sum(model)]
    facts += [sorted((name, ids_sum(ids)) for name, ids in (texts or {}).items()), [ids_sum(b) for b in blanks or ()]]
    return {
        "perplexity": rows,
        "cloze": filled,
        "zero_shot": asked,
        "generations": written,
        "speed": timing,
        "size": measured,
        "cost": spent,
        "fingerprint": hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12],
    }


def _packed(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, tokenizer, Path(folder) / "saved")
        saved = sum(file.stat().st_size for file in (Path(folder) / "saved").glob("*.safetensors"))
        sizes = packing.pack(model, Path(folder) / "packed.safetensors")
        if not packing.same(model, packing.unpack(Path(folder) / "packed.safetensors")):
            raise RuntimeError("The packed weights came back changed; this is a bug.")
    return {"saved_bytes": saved, **{f"{kind}_bytes": count for kind, count in sizes.items()}}


def _zero_shot_record(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], limit: int | None, seed: int, against: PreTrainedModel | None
) -> list[dict[str, Any]]:
    own = answers(model, tokenizer, tasks, limit=limit, seed=seed)
    table = compare(own, answers(against, tokenizer, tasks, limit=limit, seed=seed) if against is not None else None)
    return [{**row, "items": items_sum(row["task"], limit, seed), "right": own[row["task"]][row["metric"]]} for row in table.to_dict("records")]


def _cloze_record(
    model: PreTrainedModel,
    samples: Tensor,
    items: Tensor,
    right: Tensor | None,
    against: PreTrainedModel | None,
    batch_size: int,
    articles: Sequence[int] | None,
) -> dict[str, Any]:
    """`right` is the model's `cloze`, where it is known already; without the samples' articles, each sample is one."""
    right = cloze(model, samples, items, batch_size=batch_size) if right is None else right
    sample = items[:, 0].tolist()
    article = sample if articles is None else [articles[i] for i in sample]
    found: dict[str, Any] = dict(vars(statistics.proportion(right, article)))
    if against is not None:
        paired = statistics.difference(right, cloze(against, samples, items, batch_size=batch_size), article)
        found |= {"difference": paired.value, "difference_low": paired.low, "difference_high": paired.high}
    told = {"items": ids_sum(torch.cat([samples.flatten(), items.flatten()])), "right": right.int().tolist()}
    return found | told | {"sample": sample, "article": article}
