"""Every knob of a run, documented beside its default and checked before work starts.

Nothing here imports torch, so that the command line can validate words in milliseconds.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

CRITERIA = ("magnitude", "wanda", "sparsegpt")
TECHNIQUES = ("LR", "BR", "BR+GP", "BR+GP+CR")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LAYERS = ("all", "attention", "feed-forward")
STREAMS = ("dense", "sparse")
MEASUREMENTS = ("perplexity", "cloze", "zero_shot", "speed", "generations")
STARTS = ("token", "prefix")
SELF = "self"  # the name, among corpora, of text that the dense model writes itself
TEST_SEEDS = 2**40  # seeds from here on write test sets, so that no calibration text can be one of them


class ConfigError(ValueError):
    """A value that can be refused before any work starts; the message names the field and what is possible."""


def require(condition: bool, name: str, value: Any, possible: str) -> None:
    """Raise `ConfigError` unless `condition`, naming the field, its value and what would be accepted."""
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {possible}.")


def one_of(words: tuple[str, ...]) -> str:
    return "one of " + ", ".join(words)


def nm_pattern(pattern: str) -> tuple[int, int] | None:
    """(N, M) of an "N:M" pattern, None for "unstructured".

    Raises:
        ConfigError: the word is neither, or not 0 < N < M.
    """
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    ok = match is not None and 0 < int(match[1]) < int(match[2])
    require(ok, "pattern", pattern, 'unstructured, or "N:M" with 0 < N < M, such as 2:4 or 4:8')
    return int(match[1]), int(match[2])


@dataclass(frozen=True, kw_only=True)
class OverfitConfig:
    """When a run counts as overfitting. Decides words, never numbers."""

    watch: float = 2.0
    "Held-out over calibration NMSE of the last block from which a run is watched."
    overfitting: float = 3.0
    "The same, from which most of what reconstruction won was won on the calibration samples only."
    rising: float = 0.02
    "A held-out loss turns up when it ends this much (relative) above its lowest epoch."
    many: float = 0.25
    "Share of the windows whose held-out loss must turn up for a remark."
    transfer: float = 0.25
    "Share of training's gain on the calibration samples (in log loss) that must hold on held-out samples; below, a remark."

    def __post_init__(self) -> None:
        for name in ("watch", "overfitting"):
            require(_is_number(getattr(self, name)) and getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        require(self.watch <= self.overfitting, "watch", self.watch, f"at most overfitting ({self.overfitting})")
        for name in ("rising", "many", "transfer"):
            require(_is_number(getattr(self, name)) and 0 <= getattr(self, name) <= 1, name, getattr(self, name), "a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class SelfGenConfig:
    """How the dense model writes its own text. The defaults are the paper's recipe (section 4)."""

    start: str = "token"
    "token: one random token of the vocabulary, then `greedy` likely ones; prefix: a few tokens of real text."
    greedy: int = 4
    "Tokens that follow the random one greedily, so that sampling starts from something likely."
    prefix_length: int = 8
    "Tokens of real text that a text starts with, when it starts with a prefix."
    temperature: float = 1.0
    "Of the sampling; 1 is the model's own distribution."
    written: int | None = None
    "Tokens written of each text, of which a random crop is kept; None: as many as are kept."
    batch_size: int = 64
    "Texts written at once; another size gives other text."
    language: str | None = "auto"
    "Keep what is detected as this language (ISO 639-1); auto: en, unless the vocabulary is single bytes (the tiny model); None: everything."
    symbols: float | None = None
    "Largest share of characters that code is full of and prose is not; None: no limit. Prose has about 0.01, code 0.05 and more."
    distinct: float | None = None
    "Smallest share of distinct runs of four tokens among all runs of four, against text that repeats itself; None: no limit."
    unlikely: float = 0.0
    "Share of the texts, those that the dense model finds most unlikely, that is dropped in the end."

    def __post_init__(self) -> None:
        require(self.start in STARTS, "start", self.start, one_of(STARTS))
        for name, least in [("greedy", 0), ("prefix_length", 1), ("batch_size", 1)]:
            require(_is_int(getattr(self, name), least), name, getattr(self, name), f"a whole number of at least {least}")
        require(self.written is None or _is_int(self.written, 1), "written", self.written, "a whole number of at least 1, or None")
        require(_is_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "a positive number")
        known = self.language in (None, "auto") or (isinstance(self.language, str) and re.fullmatch("[a-z]{2}", self.language) is not None)
        require(known, "language", self.language, "two letters such as en, auto, or None for any language")
        for name in ("symbols", "distinct"):
            value = getattr(self, name)
            require(value is None or (_is_number(value) and 0 < value <= 1), name, value, "a share above 0 and at most 1, or None")
        require(_is_number(self.unlikely) and 0 <= self.unlikely < 1, "unlikely", self.unlikely, "a share from 0 to below 1")

    @property
    def first(self) -> int:
        """Tokens that a text holds before sampling begins."""
        return self.prefix_length if self.start == "prefix" else 1 + self.greedy


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How a model is pruned and reconstructed. The defaults are the paper's setting."""

    criterion: str = "sparsegpt"
    "What chooses the mask: magnitude, wanda or sparsegpt."
    pattern: str = "unstructured"
    "unstructured, or N:M (N kept of M along the input dimension), which sets the sparsity itself."
    sparsity: float = 0.5
    "Share of the entries of each group that goes, 0 <= sparsity < 1."
    technique: str = "BR+GP"
    "LR (no reconstruction of blocks) or BR with any of +GP (dense-stream target) and +CR (windows of two blocks)."
    layers: str | tuple[str, ...] = "all"
    "all, attention, feed-forward, or shell-style patterns of layer names inside a block, such as ('mlp.*',)."
    layer_sparsity: Mapping[str, float] = field(default_factory=dict)
    "Sparsity by shell-style pattern of the full layer name; the first match wins, others take `sparsity`."
    epochs: int = 10
    "Passes over the training samples in each window."
    steps: int | None = None
    "Optimiser steps in each window; overrides `epochs`, so that runs of unequal sample counts can be compared."
    learning_rate: float = 2e-4
    "Peak learning rate of AdamW (betas 0.9, 0.95, no weight decay), falling linearly to zero."
    batch_size: int = 8
    "Samples in one optimiser step."
    micro_batch: int | None = None
    "Samples in one forward and backward; gradients of a step are summed over its micro-batches. None: batch_size."
    recompute: bool = False
    "Recompute a block's activations in the backward pass: less memory, about a third more time."
    precision: str = "auto"
    "auto, fp32, bf16 or fp16 for the reconstruction; weights are fp32 in all of them. LR always runs in fp32."
    gradient_clip: float | None = None
    "Largest gradient norm of a step; None: no clipping."
    early_stopping: int | None = None
    "Stop a window after so many epochs without a lower held-out loss and keep its best epoch's weights; None: never."
    damping: float = 0.01
    "SparseGPT's damping as a share of the Hessian's mean diagonal."
    column_block: int = 128
    "Columns over which SparseGPT ranks scores at once."
    target: str | None = None
    "Input of the dense target: dense or sparse stream; None: dense with GP, else sparse."
    reconstruction_input: str = "sparse"
    "Input of the pruned window while it is trained: dense or sparse stream."
    statistics_input: str = "sparse"
    "Input from which the mask's statistics come: dense or sparse stream."
    window: int | None = None
    "Blocks trained together; None: 2 with CR, else 1."
    overlap: int | None = None
    "Blocks that a window shares with the one before; None: 1 with CR, else 0."
    seed: int = 0
    "Order of the training samples."
    overfit: OverfitConfig = field(default_factory=OverfitConfig)
    "When `prune` warns that a run overfits, and what `verdict` calls it."

    def __post_init__(self) -> None:
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        if isinstance(self.overfit, Mapping):
            object.__setattr__(self, "overfit", from_dict(OverfitConfig, self.overfit))
        require(isinstance(self.overfit, OverfitConfig), "overfit", self.overfit, "an OverfitConfig")
        require(self.criterion in CRITERIA, "criterion", self.criterion, one_of(CRITERIA))
        nm = nm_pattern(self.pattern)
        if nm:
            object.__setattr__(self, "sparsity", 1 - nm[0] / nm[1])
        by_name = isinstance(self.layer_sparsity, Mapping) and all(isinstance(k, str) for k in self.layer_sparsity)
        require(by_name, "layer_sparsity", self.layer_sparsity, "a mapping of name patterns to sparsities")
        for name, value in [("sparsity", self.sparsity), *((f"layer_sparsity[{k}]", v) for k, v in self.layer_sparsity.items())]:
            require(_is_number(value) and 0 <= value < 1, name, value, "a number with 0 <= sparsity < 1")
        require(not (nm and self.layer_sparsity), "layer_sparsity", self.layer_sparsity, "empty when pattern is N:M, which sets the sparsity itself")
        parts = self.technique.split("+") if isinstance(self.technique, str) else []
        known = self.technique == "LR" or (parts[:1] == ["BR"] and set(parts) <= {"BR", "GP", "CR"} and len(set(parts)) == len(parts))
        require(known, "technique", self.technique, "LR, or BR followed by any of +GP and +CR, such as " + ", ".join(TECHNIQUES))
        if isinstance(self.layers, str):
            require(self.layers in LAYERS, "layers", self.layers, one_of(LAYERS) + ", or a list of name patterns")
        else:
            patterns = isinstance(self.layers, tuple) and len(self.layers) > 0 and all(isinstance(p, str) for p in self.layers)
            require(patterns, "layers", self.layers, one_of(LAYERS) + ", or a list of name patterns")
        require(self.precision in PRECISIONS, "precision", self.precision, one_of(PRECISIONS))
        require(self.target in (None, *STREAMS), "target", self.target, one_of(STREAMS))
        for name in ("reconstruction_input", "statistics_input"):
            require(getattr(self, name) in STREAMS, name, getattr(self, name), one_of(STREAMS))
        for name, least in [("epochs", 0), ("batch_size", 1), ("column_block", 1)]:
            require(_is_int(getattr(self, name), least), name, getattr(self, name), f"a whole number of at least {least}")
        for name in ("steps", "micro_batch", "early_stopping", "window"):
            value = getattr(self, name)
            require(value is None or _is_int(value, 1), name, value, "a whole number of at least 1, or None")
        for name in ("learning_rate", "damping"):
            value = getattr(self, name)
            require(_is_number(value) and 0 < value < 1, name, value, "a number between 0 and 1")
        require(
            self.gradient_clip is None or (_is_number(self.gradient_clip) and self.gradient_clip > 0),
            "gradient_clip",
            self.gradient_clip,
            "positive, or None",
        )
        require(
            self.micro_batch is None or self.micro_batch <= self.batch_size,
            "micro_batch",
            self.micro_batch,
            f"at most batch_size ({self.batch_size})",
        )
        require(_is_int(self.seed, 0), "seed", self.seed, "a whole number of at least 0")
        width, overlap = self.window_blocks, self.overlap_blocks
        require(_is_int(overlap, 0) and overlap < width, "overlap", overlap, f"a whole number from 0 to window - 1 ({width - 1})")

    @property
    def trains(self) -> bool:
        """Whether blocks are reconstructed at all."""
        return self.technique != "LR"

    @property
    def target_stream(self) -> str:
        """ "dense" or "sparse": the stream that enters the dense target (GP is the dense one)."""
        return self.target or ("dense" if "GP" in self.technique.split("+") else "sparse")

    @property
    def window_blocks(self) -> int:
        return self.window if self.window is not None else (2 if "CR" in self.technique.split("+") else 1)

    @property
    def overlap_blocks(self) -> int:
        if self.overlap is not None:
            return self.overlap
        return min(1, self.window_blocks - 1) if "CR" in self.technique.split("+") else 0

    def sparsity_of(self, layer: str) -> float:
        """The sparsity asked of a layer by its full name."""
        return next((s for pattern, s in self.layer_sparsity.items() if fnmatch.fnmatchcase(layer, pattern)), self.sparsity)


@dataclass(frozen=True)
class RunConfig:
    """One run: which model, which text, how pruned, how measured. The run is cached by its fingerprint."""

    model: str = "smollm2-135m"
    "smollm2-135m (offline), tiny, a folder, a .gguf file or a hub id."
    corpus: str = "wiki"
    "Calibration text: a name that `load_samples` knows, or self: text that the dense model writes (then the masks come from it, too)."
    count: int = 64
    "Calibration samples."
    length: int = 256
    "Tokens in a sample."
    held_out: tuple[str, ...] = ("wiki", "news")
    "Corpora (validation split) on which the error is measured block by block."
    prune: PruneConfig | None = field(default_factory=PruneConfig)
    "How the model is pruned; None measures the dense model."
    evaluate: tuple[str, ...] = ("perplexity",)
    "What is measured afterwards: any of perplexity, cloze, zero_shot, speed, generations (what the model writes on from a few prompts)."
    tag: str | None = None
    "A name people give the run; not part of its fingerprint."
    keep_model: bool = False
    "Keep the pruned model beside the record."
    held_out_count: int = 16
    "Samples of each held-out corpus."
    test: tuple[str, ...] = ("wiki", "news", "pydocs")
    "Corpora (test split) of the perplexity; self: text of the dense model that no calibration can hold. Cloze items come from the first."
    test_count: int | None = 32
    "Samples of each test corpus; None: the whole split in order."
    test_length: int | None = None
    "Tokens in a test sample; None: `length`."
    tasks: tuple[str, ...] = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
    "Tasks of zero_shot."
    limit: int | None = 100
    "Items of each task, a seeded draw; None: all."
    extra: str | None = None
    "A .jsonl of extra training samples, as `reconkit selfgen` writes it."
    more: int = 0
    "Further samples of `corpus` that only train: the control for text that the model writes itself."
    self_generated: int = 0
    "Samples that the dense model writes itself and that only train."
    selfgen: SelfGenConfig = field(default_factory=SelfGenConfig)
    "How it writes them."
    seed: int = 0
    "Draw of the calibration samples and of the self-generated ones."
    test_seed: int | None = None
    "Draw of the held-out and test samples; None: `seed`. One for runs of several seeds lets them answer the same questions."
    device: str = "auto"
    "auto, cuda, mps or cpu."
    dtype: str = "float32"
    "float32, bfloat16 or float16: how the model is held."
    offload: bool = False
    "Blocks stay on disk and are read one at a time, for models larger than memory; the numbers are the same, so not part of the fingerprint."
    checkpoint: str | None = None
    "A folder, on a mounted drive say, in which a run keeps its state after every window; a killed one goes on there. Not part of the fingerprint."
    parent: str | None = None
    "Tag or id of the version that this one follows, with which it is compared; not part of the fingerprint."
    price_per_hour: float | None = None
    "Price of the machine in any currency, for what a version costs to make and a million tokens to serve; not part of the fingerprint."

    def __post_init__(self) -> None:
        for name in ("held_out", "evaluate", "test", "tasks"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if isinstance(self.prune, Mapping):
            object.__setattr__(self, "prune", from_dict(PruneConfig, self.prune))
        if isinstance(self.selfgen, Mapping):
            object.__setattr__(self, "selfgen", from_dict(SelfGenConfig, self.selfgen))
        require(isinstance(self.selfgen, SelfGenConfig), "selfgen", self.selfgen, "a SelfGenConfig")
        for name, least in [("count", 1), ("length", 2), ("held_out_count", 1), ("more", 0), ("self_generated", 0), ("seed", 0)]:
            require(_is_int(getattr(self, name), least), name, getattr(self, name), f"a whole number of at least {least}")
        for name, least in (("test_count", 1), ("test_length", 1), ("limit", 1), ("test_seed", 0)):
            value = getattr(self, name)
            require(value is None or _is_int(value, least), name, value, f"a whole number of at least {least}, or None")
        for word in self.evaluate:
            require(word in MEASUREMENTS, "evaluate", word, one_of(MEASUREMENTS))
        for name in ("seed", "test_seed"):
            value = getattr(self, name)
            require((value or 0) < TEST_SEEDS, name, value, f"below {TEST_SEEDS}; test sets are written with seeds from there on")
        own = self.corpus == SELF
        require(not (own and self.more), "more", self.more, "0 when corpus is self: there is no further real text")
        require(not (own and self.selfgen.start == "prefix"), "selfgen.start", "prefix", "token when corpus is self: no real text to start from")
        require(self.prune is None or isinstance(self.prune, PruneConfig), "prune", self.prune, "a PruneConfig, or None for the dense model")
        price = self.price_per_hour
        require(price is None or (_is_number(price) and price >= 0), "price_per_hour", price, "a price of at least 0, or None")
        require(self.dtype in ("float32", "bfloat16", "float16"), "dtype", self.dtype, "float32, bfloat16 or float16")
        require(self.device in ("auto", "cuda", "mps", "cpu"), "device", self.device, "auto, cuda, mps or cpu")

    @property
    def draw(self) -> int:
        """The seed of the held-out and test samples."""
        return self.seed if self.test_seed is None else self.test_seed


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain data, fit for JSON."""
    plain = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def from_dict(kind: type, values: Mapping[str, Any]) -> Any:
    """A configuration of `kind` from plain data.

    Raises:
        ConfigError: a key that the configuration does not have; the message lists those it has.
    """
    names = [f.name for f in fields(kind)]
    unknown = [k for k in values if k not in names]
    require(not unknown, f"{kind.__name__} field", ", ".join(unknown), one_of(tuple(names)))
    return kind(**values)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
