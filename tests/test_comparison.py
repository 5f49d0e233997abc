"""Versions side by side, of real tiny runs and of answers made here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reconkit import comparison, evaluation, models, plots, runs
from reconkit.cli import main
from reconkit.config import ConfigError, PruneConfig, RunConfig


def config(**values: Any) -> RunConfig:
    how = {"model": "tiny", "corpus": "pydocs", "count": 8, "length": 32, "held_out": ("pydocs",), "held_out_count": 2, "test": ("pydocs",)}
    return RunConfig(**{**how, "test_count": 4, "evaluate": ("perplexity", "generations"), **values})


def row(tokens: list[int], prompt: str = "p") -> dict[str, Any]:
    return {"prompt": prompt, "tokens": tokens, "pieces": [f"<{t}>" for t in tokens]}


@pytest.mark.parametrize(
    ("first", "second", "at"),
    [([1, 2, 3], [1, 2, 3], None), ([1, 2], [3, 2], 0), ([1, 2, 3], [1, 2, 4], 2), ([1, 2], [1, 2, 3], 2), ([], [], None), ([1, 2, 1], [1, 3, 1], 1)],
)
def test_the_first_token_that_differs(first: list[int], second: list[int], at: int | None) -> None:
    found = comparison.fork(row(first), row(second))
    assert found.at == at
    assert found.common + found.first == row(first)["pieces"] and found.common + found.second == row(second)["pieces"]


def test_generations_are_the_likeliest_tokens() -> None:
    model, tokenizer = models.load_model("tiny", device="cpu")
    prompts = torch.tensor([[72, 101, 108], [1, 2, 3]])
    for found, ids in zip(evaluation.generations(model, tokenizer, prompts, tokens=5), prompts, strict=True):
        for _ in range(5):  # one at a time
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
        assert found["tokens"] == ids[3:].tolist() and len(found["pieces"]) == 5


def test_two_versions_of_real_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = runs.run(config(prune=None, tag="dense"))
    one = runs.run(config(prune=PruneConfig(criterion="wanda", technique="LR"), tag="one"))
    two = runs.run(config(prune=PruneConfig(criterion="wanda", technique="BR+GP", epochs=1), tag="two"))
    table = comparison.table([one, two], dense)
    assert list(table.version) == ["one", "two"] and set(table.kind) == {"perplexity"}, "the dense model has no error"
    for run in (one, two):
        [expected] = runs.changes(run, dense).to_dict("records")
        [found] = table[table.version == run.config.tag].to_dict("records")
        assert (found["change"], found["low"], found["high"], found["paired"]) == (*(expected[k] for k in ("value", "low", "high")), True)
    table = comparison.table([two], one)
    assert set(table[table.kind == "nmse"].set) == {"calibration", "pydocs"} and table[table.kind == "nmse"].said.eq("better").all()
    for kind in ("token_nmse", "token_nmse_90"):
        part = table[table.kind == kind].set_index("set")
        errors = [run.final_errors[kind] for run in (one, two)]
        assert part.change.to_dict() == pytest.approx((errors[1] / errors[0] - 1).to_dict()) and part.n.isna().all() and part.low.isna().all()
    articles = one.record["evaluation"]["perplexity"][0]["articles"]
    assert table[table.kind == "perplexity"].n.tolist() == [len(set(articles))]
    assert len(comparison.generations(dense, two)) == 4 and all(f.at is None for f in comparison.generations(dense, dense))
    axes = plots.differences(comparison.table([one, two], one))
    assert [ax.get_xlabel().split(",")[0] for ax in axes] == ["perplexity", "final NMSE", "final token NMSE (median)"]
    assert [line.get_label() for line in comparison.overlay([one, two]).get_lines()[:2]]
    assert comparison.notes(comparison.table([one], dense), [one], dense) == []
    assert main(["runs", "compare", "dense", "one", "two", "--out", str(tmp_path / "page.html")]) == 0
    said, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
    assert "worse" in said and "»" in said and "two" in said
    assert page.count("<svg") == 2 and "<mark>" in page and "<script" not in page
    assert main(["runs", "compare", "dense", "nobody"]) == 2 and main(["runs", "compare", "dense", "one", "--out", "x.txt"]) == 2


def made(right: list[int], items: str = "a", model: str = "tiny", tag: str = "x", written: Any = ()) -> Any:
    rows = [{"task": "rte", "metric": "acc", "right": right, "items": items, "stderr": 0.1, "n": len(right)}]
    evaluated = {"perplexity": [], "zero_shot": rows, "generations": list(written)}
    metrics = {"accuracy/rte": sum(right) / len(right)}
    return SimpleNamespace(id=tag, config=SimpleNamespace(tag=tag, model=model), metrics=metrics, record={"evaluation": evaluated})


def test_words_say_what_the_interval_says() -> None:
    right = [1, 0] * 20
    assert comparison.table([made(right)], made(right)).said.tolist() == ["same"]
    assert comparison.table([made([1] * 40)], made(right)).said.tolist() == ["better"]
    assert comparison.table([made([0] * 40)], made(right)).said.tolist() == ["worse"]
    assert comparison.table([made([1, 1, *right[2:]])], made(right)).said.tolist() == ["within noise"]


def test_other_items_and_other_models_are_said() -> None:
    other, against = made([1, 0, 1], "b", model="other"), made([1, 1, 1])
    [about, unpaired] = comparison.notes(comparison.table([other], against), [other], against)
    assert "is of other" in about and "Other items were answered on rte" in unpaired


def test_markup_in_what_a_model_writes_is_text() -> None:
    nasty = {"prompt": "<b>p</b>", "tokens": [1, 2], "pieces": ["<script>", "x"]}
    other = {**nasty, "tokens": [1, 3], "pieces": ["<script>", "<img>\n"]}
    shown = comparison.Generations(made([1], tag="<i>a</i>", written=[nasty]), made([1], tag="b", written=[other]))
    text = shown._repr_html_()
    assert "<script" not in text and "<b>" not in text and "<img" not in text and "<i>" not in text and text.count("<mark>") == 2
    assert "»<img>⏎«" in repr(shown) and "the same for 1 tokens" in repr(shown)


def test_prompts_need_a_real_text() -> None:
    with pytest.raises(ConfigError, match="from which prompts can be taken"):
        runs.run(config(test=("self",), prune=None))
