"""Zero-shot answers: the draw, the comparison, and the shared work against lm-eval's plain path."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch

from reconkit import data, likelihood, models, zeroshot
from reconkit.config import ConfigError


@pytest.fixture
def tiny() -> tuple:
    return models.load_model("tiny")


@pytest.fixture
def questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty questions whose answer the tiny model cannot know."""
    items = [{"question": f"is {i} odd", "passage": f"{i} is a number.", "idx": i, "label": i % 2} for i in range(30)]
    file = tmp_path / "boolq.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    monkeypatch.setattr(data, "task_data", lambda task: file)
    monkeypatch.setattr(data, "task_identity", lambda task: "made here")
    monkeypatch.setenv("RECONKIT_CACHE", str(tmp_path / "cache"))


def test_zero_shot_draws_by_seed_and_compares_item_by_item(tiny: tuple, questions: None) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    table = zeroshot.zero_shot(model, tokenizer, ["boolq"], limit=12, against=model)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python and all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy, strict=True))
    assert list(table.columns) == ["task", "metric", "value", "stderr", "n", "difference", "low", "high", "p"]
    [row] = table.to_dict("records")
    assert (row["task"], row["metric"], row["n"], row["difference"], row["low"], row["high"], row["p"]) == ("boolq", "acc", 12, 0, 0, 0, 1)
    other, _ = models.load_model("tiny")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    [row] = zeroshot.zero_shot(other, tokenizer, ["boolq"], limit=12, against=model).to_dict("records")
    assert row["low"] <= row["difference"] <= row["high"] and row["low"] < row["high"]
    [alone] = zeroshot.zero_shot(other, tokenizer, ["boolq"], limit=12).to_dict("records")
    assert math.isnan(alone["difference"]) and alone["low"] < alone["value"] < alone["high"] and alone["value"] == row["value"]


def test_draws(tmp_path: Path) -> None:
    source = tmp_path / "all.jsonl"
    source.write_text("".join(f'{{"n": {i}}}\n' for i in range(50)))

    def drawn(limit: int | None, seed: int) -> list[str]:
        return zeroshot._draw(source, tmp_path / "some.jsonl", limit, seed).read_text().splitlines()

    assert drawn(9, 0) == drawn(9, 0) != drawn(9, 1)
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"n": "a\u2028b\x85c"}\n{"n": 2}\n', encoding="utf-8")
    assert zeroshot._draw(odd, tmp_path / "same.jsonl", None, 0).read_bytes() == odd.read_bytes(), "an item is a line of JSON, whatever it holds"
    assert len(set(drawn(9, 0))) == 9 and set(drawn(9, 0)) < set(drawn(None, 0)) and len(drawn(99, 0)) == 50


def test_an_unknown_task_is_refused_before_any_work(tiny: tuple) -> None:
    with pytest.raises(ConfigError, match="boolq.*winogrande"):
        zeroshot.zero_shot(*tiny, ["chess"])
    with pytest.raises(ConfigError, match="limit is 0"):
        zeroshot.zero_shot(*tiny, ["boolq"], limit=0)


def test_nothing_is_said_on_stderr(
    tiny: tuple, questions: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """git, which lm-eval asks for a version, complains outside a repository."""
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    zeroshot.zero_shot(*tiny, ["boolq"], limit=2)
    assert "git" not in capfd.readouterr().err


@pytest.mark.data
@pytest.mark.slow
def test_requests_and_scores_are_those_of_plain_lm_eval(tiny: tuple, data_mirror: Path) -> None:
    """The same items through lm-eval's whole task list, as its own documentation calls it."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny
    file = str(data_mirror / "zeroshot" / "rte_validation.jsonl")
    task = {
        "task": "rte",
        "dataset_path": "json",
        "dataset_name": None,
        "training_split": None,
        "dataset_kwargs": {"data_files": {"validation": file}},
    }
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[{"group": "g", "task": [task]}],
        task_manager=TaskManager(),
        bootstrap_iters=0,
    )
    [row] = zeroshot.zero_shot(model, tokenizer, ["rte"]).to_dict("records")
    assert row["n"] == 277 and row["value"] == pytest.approx(plain["results"]["rte"]["acc,none"])


def changed(model: Any, seed: int = 1) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def test_a_model_answers_once_for_all_that_are_compared_with_it(tiny: tuple, questions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny
    first = zeroshot.zero_shot(model, tokenizer, ["boolq"], limit=6)
    asked: list[Any] = []
    real = zeroshot._ask
    monkeypatch.setattr(zeroshot, "_ask", lambda *args: asked.append(args[2]) or real(*args))
    assert zeroshot.zero_shot(model, tokenizer, ["boolq"], limit=6).equals(first) and asked == []
    zeroshot.zero_shot(changed(models.load_model("tiny")[0]), tokenizer, ["boolq"], limit=6, against=model)
    assert asked == [["boolq"]], "other weights are another model"
    zeroshot.zero_shot(model, tokenizer, ["boolq"], limit=7)
    assert len(asked) == 2, "and other items are another question"


@pytest.mark.parametrize(("won", "lost", "p"), [(0, 0, 1.0), (5, 5, 1.0), (0, 5, 0.0625), (1, 9, 22 / 1024), (8, 0, 2 / 256)])
def test_mcnemar_is_the_binomial_of_the_items_that_differ(won: int, lost: int, p: float) -> None:
    first = torch.tensor([1.0] * won + [0.0] * lost + [1.0, 0.0])
    second = torch.tensor([0.0] * won + [1.0] * lost + [1.0, 0.0])
    assert zeroshot.mcnemar(first, second) == pytest.approx(p)


@pytest.mark.parametrize("family", ["llama", "gemma3 (sliding and full layers)", "gpt2 (Conv1D)", "opt (biases, learned positions)", "bloom (alibi)"])
@pytest.mark.parametrize("length", [1, 9])
def test_shared_continuations_equal_the_obvious_way(family: str, length: int) -> None:
    model = families.build(family)
    context, ends = families.tokens(1, length)[0].tolist(), [[5, 6, 7], [8], [9, 10, 11, 12]]
    for (likely, greedy), end in zip(likelihood.continuations(model, context, ends), ends, strict=True):
        with torch.no_grad():
            scores = model(torch.tensor([context + end])).logits[0, length - 1 : -1].log_softmax(-1)
        assert likely == pytest.approx(float(sum(scores[i, t] for i, t in enumerate(end))), abs=1e-4)
        assert greedy == all(int(scores[i].argmax()) == t for i, t in enumerate(end))
    written = [int(model(torch.tensor([context])).logits[0, -1].argmax())]
    assert likelihood.continuations(model, context, [written])[0][1]


def test_the_scorer_gives_lm_evals_own_log_likelihoods(tiny: tuple) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny
    pairs = [("the cat sat on", " the mat"), ("", "a start"), ("the cat sat on", " a chair"), ("another", " one"), ("the cat sat on", " it")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    shared = zeroshot._scorer(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in plain]
    assert [value for value, _ in shared] == pytest.approx([value for value, _ in plain], abs=1e-3)


ROUTES = {
    "llama": "packed",
    "opt (biases, learned positions)": "packed",
    "gpt2 (Conv1D)": "packed",
    "mixtral (experts)": "packed",
    "gemma3 (sliding and full layers)": "shared",  # what is asked is longer than its window
    "bloom (alibi)": "shared",  # no positions
    "gpt-neo": "shared",  # a window by the place in the row
    **dict.fromkeys(families.STATES, "plain"),  # a state, which a mask does not cut
}


@pytest.mark.parametrize(("family", "route"), ROUTES.items())
def test_every_family_is_asked_in_the_fastest_way_that_gives_lm_evals_answers(
    family: str, route: str, tiny: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setattr(likelihood, "PACK", 40)  # so that there are several, one with a single question
    model, tokenizer = families.build(family), tiny[1]
    contexts = [families.tokens(1, length, seed)[0].tolist() for seed, length in enumerate([36, 9, 1, 14, 5, 22])]
    contexts.append([*contexts[1][:6], 7, 8])  # begins like another
    with torch.no_grad():
        written = int(model(torch.tensor(contexts[:1])).logits[0, -1].argmax())
    requests = [(("", ""), context, end) for end in ([5, 6, 7], [8], [5, 6, 9, 10], [written]) for context in contexts]
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)._loglikelihood_tokens(requests, disable_tqdm=True)
    answered = ["plain"]
    for name in ("packed", "shared"):
        monkeypatch.setattr(likelihood, name, noted(getattr(likelihood, name), len(requests), answered))
    ours = zeroshot._scorer(model, tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert answered[-1] == route
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in plain], abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in plain] and plain[3 * len(contexts)][1]


def test_a_route_is_judged_on_what_may_go_wrong() -> None:
    """The most tokens, the longest continuation, two continuations of a context of several tokens, the two shortest contexts."""
    pairs = [([3, 4, 5, 6, 7, 8, 9], [5]), ([3, 9, 8], [5, 6, 7, 8]), ([4], [5]), ([4], [6]), ([5, 4, 4, 4], [5]), ([5, 4, 4, 4], [6])]
    assert likelihood.few(pairs) == [pairs[i] for i in (0, 1, 4, 5, 2, 1)]
    assert likelihood.few(pairs[2:4]) == [pairs[i] for i in (2, 2, 2, 3, 2)]


def noted(route: Any, count: int, answered: list[str]) -> Any:
    """The route, which adds its name where it is asked everything."""

    def asked(model: Any, pairs: Any) -> Any:
        answered.extend([route.__name__] if len(pairs) == count else [])
        return route(model, pairs)

    return asked


def test_a_model_of_nans_answers_as_in_lm_eval(tiny: tuple) -> None:
    """No route agrees with it, so the plain one answers."""
    pytest.importorskip("lm_eval")
    model, tokenizer = tiny
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(math.nan)
    found = zeroshot._scorer(model, tokenizer)._loglikelihood_tokens([(("", ""), [5, 6], [7]), (("", ""), [5], [8, 9])], disable_tqdm=True)
    assert len(found) == 2 and all(math.isnan(value) for value, _ in found)


def test_a_tree_holds_once_what_begins_alike() -> None:
    tree = likelihood.Tree()
    for context, end in [([3, 4, 5], [6, 7]), ([3, 4, 5], [6, 8, 9]), ([3, 9], [6])]:
        tree.add(context, end)
    assert list(tree.nodes) == [(-1, 3), (0, 4), (1, 5), (2, 6), (3, 8), (0, 9)]
    assert tree.wanted == [([2, 3], [6, 7]), ([2, 3, 4], [6, 8, 9]), ([5], [6])]


@pytest.mark.assets
@pytest.mark.slow
def test_lm_evals_command_line_on_a_saved_model_gives_the_same_accuracies(tiny: tuple, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder, tasks = models.save_model(*tiny, tmp_path / "model"), ["openbookqa", "winogrande"]
    group = zeroshot.write_tasks(tmp_path / "tasks", tasks, limit=5)
    words = ["--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(group.parent), "--tasks", zeroshot.GROUP]
    words += ["--device", "cpu", "--batch_size", "8", "--output_path", str(tmp_path / "found.json")]
    run = subprocess.run([sys.executable, "-m", "lm_eval", *words], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    [found] = [json.loads(file.read_text())["results"] for file in tmp_path.glob("found*.json")]
    table = zeroshot.zero_shot(*tiny, tasks, limit=5)
    assert len(table) == 3 and all(found[row.task][f"{row.metric},none"] == pytest.approx(row.value) for row in table.itertuples())


def test_written_tasks_give_lm_evals_command_line_the_same_score(
    tiny: tuple, questions: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The group file alone, through lm-eval's own look-up of task names."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = tiny
    file = zeroshot.write_tasks(tmp_path / "tasks", ["boolq"], limit=10, seed=3)
    assert sorted(p.name for p in file.parent.iterdir()) == ["boolq.jsonl", "reconkit.yaml"]
    folder = str(Path(lm_eval.tasks.__path__[0]) / "super_glue" / "boolq")
    manager = TaskManager(include_path=[folder, str(file.parent)], include_defaults=False)
    plain = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=["reconkit"], task_manager=manager, bootstrap_iters=0
    )
    [row] = zeroshot.zero_shot(model, tokenizer, ["boolq"], limit=10, seed=3).to_dict("records")
    assert plain["results"]["boolq"]["acc,none"] == pytest.approx(row["value"]) and plain["n-samples"]["boolq"]["effective"] == 10
