"""Every knob is checked before work, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from reconkit import config
from reconkit.config import ConfigError, OverfitConfig, PruneConfig, RunConfig, SelfGenConfig


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        *((PruneConfig, f, v) for f, v in [
            ("criterion", "random"), ("pattern", "4:2"), ("pattern", "2/4"), ("pattern", 24), ("sparsity", 1.0),
            ("sparsity", -0.1), ("sparsity", "half"),
            ("technique", "GP"), ("technique", "BR+BR"), ("technique", "LR+GP"), ("technique", None),
            ("layers", "heads"), ("layers", ()), ("epochs", -1),
            ("epochs", 1.5), ("steps", 0), ("learning_rate", 0), ("learning_rate", 2), ("batch_size", 0), ("micro_batch", 9), ("precision", "int8"),
            ("gradient_clip", 0), ("early_stopping", 0), ("damping", 0), ("column_block", 0), ("target", "both"), ("reconstruction_input", "none"),
            ("statistics_input", None), ("window", 0), ("overlap", 1), ("seed", -1), ("seed", True),
        ]),
        *((RunConfig, f, v) for f, v in [
            ("count", 0), ("length", 1), ("held_out_count", 0), ("test_count", 0), ("limit", 0), ("evaluate", ("beauty",)), ("prune", "BR"),
            ("dtype", "int8"), ("device", "tpu"), ("seed", -1), ("self_generated", -1),
        ]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_by_the_name_of_its_field(kind: type, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is .*must be"):
        kind(**{field: value})


class Nothing:
    """A value of no field's type."""


EVERY_FIELD = [(kind, f.name) for kind in (OverfitConfig, SelfGenConfig, PruneConfig, RunConfig) for f in dataclasses.fields(kind)]


@pytest.mark.parametrize(("kind", "field"), EVERY_FIELD, ids=lambda v: getattr(v, "__name__", v))
def test_every_field_refuses_another_type_by_its_name(kind: type, field: str) -> None:
    kinds = config.field_types(kind)[field]
    values: list[Any] = [Nothing(), b"bytes", {1, 2}]
    values += [] if bool in kinds else [True]
    values += [] if {int, float} & set(kinds) else [1.5, 1]
    values += [] if str in kinds or field in ("held_out", "evaluate", "test", "tasks") else ["1"]
    for value in values:
        with pytest.raises(ConfigError, match=rf"^{field} is .*must be"):
            kind(**{field: value})


@pytest.mark.parametrize("field", ["held_out", "evaluate", "test", "tasks"])
def test_a_list_of_words_is_neither_numbers_nor_the_letters_of_one(field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is .*split into letters"):
        RunConfig(**{field: [*"wiki", "self"]})
    for value in ([5], [None], 5, None, {"wiki": 1}):
        with pytest.raises(ConfigError, match=f"^{field} is"):
            RunConfig(**{field: value})


def test_a_path_is_kept_as_text() -> None:
    paths = {"model": Path("a/b"), "corpus": Path("c.txt"), "extra": Path("d.jsonl"), "checkpoint": Path("e")}
    made = RunConfig(**paths, test=Path("f.txt"), held_out=[Path("g.txt")])
    assert (made.model, made.corpus, made.extra, made.checkpoint) == ("a/b", "c.txt", "d.jsonl", "e")
    assert (made.test, made.held_out) == (("f.txt",), ("g.txt",))
    assert json.loads(json.dumps(config.to_dict(made)))["model"] == "a/b"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("kind", "field"), [(PruneConfig, "sparsity"), (PruneConfig, "learning_rate"), (SelfGenConfig, "temperature")])
def test_no_number_is_nan_or_infinite(kind: type, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field} is"):
        kind(**{field: value})


def test_the_defaults_are_the_papers_setting() -> None:
    c = PruneConfig()
    assert (c.criterion, c.sparsity, c.epochs, c.learning_rate, c.batch_size, c.damping, c.column_block) == ("sparsegpt", 0.5, 10, 2e-4, 8, 0.01, 128)
    assert c.gradient_clip is None and c.early_stopping is None and c.statistics_input == c.reconstruction_input == "sparse"


@pytest.mark.parametrize(
    ("technique", "expected"),
    [
        ("LR", (False, "sparse", 1, 0)), ("BR", (True, "sparse", 1, 0)), ("BR+GP", (True, "dense", 1, 0)), ("BR+CR", (True, "sparse", 2, 1)),
        ("BR+GP+CR", (True, "dense", 2, 1)), ("BR+CR+GP", (True, "dense", 2, 1)),
    ],
)  # fmt: skip
def test_a_technique_is_a_name_for_switches(technique: str, expected: tuple[Any, ...]) -> None:
    c = PruneConfig(technique=technique)
    assert (c.trains, c.target_stream, c.window_blocks, c.overlap_blocks) == expected


def test_switches_go_before_the_name() -> None:
    c = PruneConfig(technique="BR+GP+CR", target="sparse", window=3)
    assert PruneConfig(technique="BR+CR", window=1).overlap_blocks == 0
    assert (c.target_stream, c.window_blocks, c.overlap_blocks) == ("sparse", 3, 1)


def test_a_pattern_sets_the_sparsity_itself() -> None:
    assert PruneConfig(pattern="2:4").sparsity == 0.5 and PruneConfig(pattern="1:4", sparsity=0.1).sparsity == 0.75
    with pytest.raises(ConfigError, match="layer_sparsity"):
        PruneConfig(pattern="2:4", layer_sparsity={"*": 0.3})


def test_sparsity_by_layer_takes_the_first_pattern_that_matches() -> None:
    c = PruneConfig(layer_sparsity={"*.3.*": 0.1, "*mlp*": 0.7})
    assert [c.sparsity_of(n) for n in ("layers.3.mlp.up", "layers.2.mlp.up", "layers.2.attn.q")] == [0.1, 0.7, 0.5]
    with pytest.raises(ConfigError, match=r"layer_sparsity\[x\]"):
        PruneConfig(layer_sparsity={"x": 1})


@pytest.mark.parametrize(
    "made", [PruneConfig(layers=("mlp.*",), layer_sparsity={"a": 0.2}), RunConfig(prune=None), RunConfig(test="wiki", evaluate=())]
)
def test_plain_data_and_back(made: Any) -> None:
    assert config.from_dict(type(made), json.loads(json.dumps(config.to_dict(made)))) == made


def test_an_unknown_field_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="sparisty.*sparsity"):
        config.from_dict(PruneConfig, {"sparisty": 0.5})


def test_every_field_is_documented() -> None:
    import ast
    import inspect

    for kind in (PruneConfig, RunConfig):
        body = ast.parse(inspect.getsource(kind)).body[0].body
        documented = {a.target.id for a, b in zip(body, body[1:], strict=False) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
        assert documented == {f.name for f in dataclasses.fields(kind)}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_toml_is_read_with_and_without_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("x = 'ä'\r\n", encoding=encoding)
    assert config.read_toml(tmp_path / "a.toml") == {"x": "ä"}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"x = ", "a.toml is not valid TOML: Invalid value"),
        ("x = 1".encode("utf-16"), "a.toml is not UTF-8 text .*save it in UTF-8"),
        ("x = 1".encode("utf-16-be"), "a.toml is not UTF-8 text .*save it in UTF-8"),
        ("x = 'ä'".encode("latin-1"), "a.toml is not UTF-8 text .* at byte 5"),
        (b"x = '\0'", "a.toml is not valid TOML: .* line 1, column 6"),
    ],
)
def test_a_toml_file_that_cannot_be_read_is_named(content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=named):
        config.read_toml(tmp_path / "a.toml")
