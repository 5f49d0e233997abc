"""Checking the parameters of a notebook: types as they enter, values by the rules of the configurations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any

from .config import ConfigError, Faults, PruneConfig, RunConfig, SelfGenConfig, field_types, one_of, require

OUT_DIR = "out_dir"
KINDS = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "list": "a list"}
CONFIGURED = {
    "again": (PruneConfig, "criterion"),
    "criteria": (PruneConfig, "criterion"),
    "counts": (RunConfig, "count"),
    "extra_count": (RunConfig, "self_generated"),
    "few_count": (RunConfig, "count"),
    "few_epochs": (PruneConfig, "epochs"),
    "few_held_out_count": (RunConfig, "held_out_count"),
    "few_length": (RunConfig, "length"),
    "ladder_batch": (PruneConfig, "batch_size"),
    "ladder_steps": (PruneConfig, "steps"),
    "lengths": (RunConfig, "length"),
    "made": (RunConfig, "test"),
    "models": (RunConfig, "model"),
    "more_count": (RunConfig, "more"),
    "other": (RunConfig, "corpus"),
    "patterns": (PruneConfig, "pattern"),
    "product_sparsities": (PruneConfig, "sparsity"),
    "seeds": (RunConfig, "seed"),
    "small_count": (RunConfig, "count"),
    "small_epochs": (PruneConfig, "epochs"),
    "small_held_out_count": (RunConfig, "held_out_count"),
    "small_length": (RunConfig, "length"),
    "sparsities": (PruneConfig, "sparsity"),
    "techniques": (PruneConfig, "technique"),
    "write_batch": (SelfGenConfig, "batch_size"),
}
"Parameters of notebooks that are a field of a configuration under another name; of a list, each element is."
OPTIONAL = ("made",)
"Lists that may be empty."


def check_parameters(namespace: Mapping[str, Any]) -> None:
    """Check the annotated names of a notebook, as in `rk.check_parameters(globals())` in the cell after its parameters.

    Papermill injects values without looking at their types: a text where a list belongs would be read letter by letter.

    Raises:
        ConfigError: values of other types than annotated, or that a configuration refuses; all of them are listed.
    """
    kinds = {name: getattr(kind, "__name__", str(kind)) for name, kind in namespace.get("__annotations__", {}).items() if name != OUT_DIR}
    values = {name: namespace[name] for name in kinds if name in namespace}
    raise_faults("The notebook", faults("parameter", values, values, kinds))


@contextmanager
def gathered(faults: list[str]) -> Iterator[None]:
    """Keep a ConfigError as one of `faults`."""
    try:
        yield
    except ConfigError as error:
        faults.append(str(error))


def raise_faults(where: str, faults: Sequence[str]) -> None:
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise Faults("\n  ".join([f"{where} has {len(faults)} faults:", *faults]))


def faults(where: str, chosen: Mapping[str, Any], known: Mapping[str, Any], kinds: Mapping[str, str]) -> list[str]:
    """What is wrong with the parameters that a manifest gives, `chosen`, by the notebook's own, `known`, and by the configurations."""
    found: list[str] = []
    for key, value in chosen.items():
        with gathered(found):
            require(key in known and key != OUT_DIR, f"{where}: parameter", key, one_of(tuple(k for k in known if k != OUT_DIR)))
            require(_fits(value, kinds[key]), f"{where}: {key}", value, f"{KINDS.get(kinds[key], kinds[key])}, like {known[key]!r}")
            require(_finite(value), f"{where}: {key}", value, "without nan and inf")
            if isinstance(value, list):
                full = value or not known[key] or key in OPTIONAL
                require(full, f"{where}: {key}", value, f"a list of one value or more, like {known[key]!r}")
                alike = all(_alike(part, like) for part in value for like in known[key])
                require(alike, f"{where}: {key}", value, f"a list of values like those of {known[key]!r}")
    if found:
        return found
    for kind in (PruneConfig, RunConfig, SelfGenConfig):
        names = field_types(kind)
        own, together = (
            {k: _none(v, names[k]) for k, v in values.items() if k in names and k not in CONFIGURED} for values in (known, known | chosen)
        )
        if together != own or known is chosen:
            before = [] if known is chosen else _refused(kind, own)  # a fault of the notebook's own defaults
            found += [f"{where}: {text}" for name, text in _refused(kind, together) if (name, text) not in before]
    for key in chosen.keys() & CONFIGURED.keys():
        kind, name = CONFIGURED[key]
        for part in chosen[key] if isinstance(chosen[key], list) else [chosen[key]]:
            found += [f"{where}: {key}: {text}" for _, text in _refused(kind, {name: _none(part, field_types(kind)[name])})]
    return list(dict.fromkeys(found))


def _refused(kind: type, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(field, sentence) of every value that the configuration refuses."""
    left, found = dict(values), []
    while True:
        try:
            kind(**left)
            return found
        except ConfigError as error:
            name = str(error).split(" is ")[0].split("[")[0]
            found.append((name, str(error)))
            if left.pop(name, None) is None:
                return found


def _none(value: Any, kinds: tuple[Any, ...]) -> Any:
    """None for "" and 0 where a field may be None: a manifest has no word for it."""
    return None if NoneType in kinds and not value and not isinstance(value, bool) else value


def _fits(value: Any, kind: str) -> bool:
    """Whether a value is of the type of that name; whole numbers may stand for fractions."""
    return type(value).__name__ == kind or (kind == "float" and type(value) is int)


def _alike(value: Any, like: Any) -> bool:
    """Whether a value of a list can stand beside one of the notebook's: both are numbers, or both of one type."""
    numbers = (int, float)
    return type(value) is type(like) or (type(value) in numbers and type(like) in numbers)


def _finite(value: Any) -> bool:
    return all(map(_finite, value)) if isinstance(value, list) else not isinstance(value, float) or math.isfinite(value)
