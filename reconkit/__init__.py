"""Prune language models, reconstruct them block by block, and measure what it was worth.

    import reconkit as rk

    model, tokenizer = rk.load_model("smollm2-135m")
    samples = rk.load_samples("wiki", tokenizer, count=32, length=256)
    result = rk.prune(model, samples, rk.PruneConfig(technique="BR+GP"))

Names are imported when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import criteria, data, evaluation, models, overfit, plots, runs, streams
    from .config import ConfigError, PruneConfig, RunConfig
    from .data import load_samples
    from .evaluation import evaluate, perplexity
    from .models import load_model, save_model
    from .overfit import verdict
    from .parameters import check_parameters
    from .pruning import PruneResult, prune
    from .runs import Run, run
    from .selfgen import self_generate
    from .zeroshot import zero_shot

# Public name → the module that holds it.
_HOME = {
    "ConfigError": "config",
    "PruneConfig": "config",
    "PruneResult": "pruning",
    "Run": "runs",
    "RunConfig": "config",
    "check_parameters": "parameters",
    "evaluate": "evaluation",
    "load_model": "models",
    "load_samples": "data",
    "perplexity": "evaluation",
    "prune": "pruning",
    "run": "runs",
    "save_model": "models",
    "self_generate": "selfgen",
    "verdict": "overfit",
    "zero_shot": "zeroshot",
}
_MODULES = ("criteria", "data", "evaluation", "models", "overfit", "plots", "runs", "streams")

__all__ = [*_HOME, *_MODULES]

try:
    __version__ = version("reconkit")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _HOME:
        value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its names are {', '.join(sorted(__all__))}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
