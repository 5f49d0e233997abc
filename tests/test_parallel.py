"""Two processes on one walk give what one gives, hold the same bits, and end together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import test_reconstruct as windows
import torch
import torch.distributed as dist
from torch import nn

from reconkit import checkpoint, cli, parallel, pruning
from reconkit.config import ConfigError, PruneConfig
from reconkit.pruning import prune

pytestmark = pytest.mark.timeout(1500)  # the first test waits for all that the ranks do
WORDS = ["--model", "tiny", "--corpus", "pydocs", "--count", "5", "--length", "32", "--batch-size", "3", "--steps", "20", "--precision", "fp32"]
# name → (family, values): seven samples in batches of three, so that shares differ and one is empty.
WALKS: dict[str, tuple[str, dict[str, Any]]] = {
    "LR": ("llama", {"technique": "LR"}),
    "BR": ("llama", {"technique": "BR", "criterion": "magnitude", "steps": 4}),
    "BR+GP wanda": ("llama", {"technique": "BR+GP", "criterion": "wanda"}),
    "BR+GP sparsegpt": ("llama", {"technique": "BR+GP"}),
    "BR+GP+CR wanda": ("llama", {"technique": "BR+GP+CR", "criterion": "wanda"}),
    "BR+GP+CR sparsegpt": ("llama", {"technique": "BR+GP+CR"}),
    "BR wanda in parts, clipped": ("llama", {"technique": "BR", "criterion": "wanda", "micro_batch": 1, "gradient_clip": 0.01, "steps": 4}),
    "early stopping": ("llama", {"technique": "BR+GP", "early_stopping": 1, "learning_rate": 0.02}),
    "one sample a batch": ("llama", {"technique": "BR+GP", "batch_size": 1, "steps": 4}),
    "experts": ("mixtral (experts)", {"technique": "BR+GP", "steps": 4}),
    "transposed": ("gpt2 (Conv1D)", {"technique": "BR+GP", "pattern": "2:4", "steps": 4}),
}


def pruned(family: str, dtype: torch.dtype = torch.float32, folder: Path | None = None, seed: int = 0, **values: Any) -> dict[str, Any]:
    model = families.build(family).to(dtype)
    config = PruneConfig(**{"steps": 20, "batch_size": 3, "precision": "fp32", **values})
    held_out = {"other": families.tokens(5, 12, 1)}
    result = prune(model, families.tokens(7, 16, seed), config, extra=families.tokens(2, 16, 2), held_out=held_out, checkpoint=folder, progress=False)
    return {"errors": result.errors, "training": result.training, "weights": model.state_dict(), "notes": result.notes, "sparsity": result.sparsity}


def in_half() -> dict[str, Any]:
    return pruned("llama", torch.bfloat16, technique="BR+GP", batch_size=5, micro_batch=2, steps=4)


def in_fp16() -> dict[str, Any]:
    """Gradients that overflow at first, with an empty share in the first batch."""
    module, (x, y) = windows.window(), windows.pairs(3)
    result = windows.train(module, precision="fp16", steps=8, batch_size=1, training={"calibration": (x, 300 * y)})
    return {"skipped": result.skipped, "weights": module.state_dict()}


def said(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def broken_and_resumed(folder: Path, patch: pytest.MonkeyPatch, lost: bool) -> tuple[str, dict[str, Any]]:
    """Rank 0 fails after its second window was saved, and the same call goes on."""
    real, saved = checkpoint.Checkpoint.save, []

    def save(self: Any, *args: Any) -> None:
        real(self, *args)
        saved.append(1)
        if len(saved) == 2:
            raise ArithmeticError("no more")

    patch.setattr(checkpoint.Checkpoint, "save", save)
    first = said(lambda: pruned("llama", folder=folder, technique="BR+GP+CR"))
    patch.undo()
    if lost and parallel.main():
        (folder / "streams-2.pt").unlink()
    return first, pruned("llama", folder=folder, technique="BR+GP+CR")


def gradients() -> list[Any]:
    """Of three parameters: both ranks', the second's, nobody's."""
    parameters = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 3), 1.0 + parallel.rank())
    if parallel.rank() == 1:
        parameters[1].grad = torch.arange(6.0).view(2, 3)
    parallel.add_gradients(parameters)
    return [p.grad for p in parameters]


def exchanged(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    rank = parallel.rank()
    found = {"gradients": gradients(), "given": parallel.give(torch.tensor([rank == 1, True]), 1)}
    patch.setattr(parallel, "BUCKET", 8)
    found["in buckets"] = gradients()
    patch.undo()
    rows = torch.arange(6.0).view(3, 2)
    parts = {"same": [rows], "order": [rows.roll(rank, 0)], "scalar": [torch.tensor(1.0 + rank)], "number": [rows] * (1 + rank)}
    found["differing"] = parallel.differing(parts)
    found["tree"] = parallel.give_all({"a": {0: rows + rank}, "b": rows.bfloat16() * (1 + rank)})
    found["raised"] = said(lambda: parallel.at_main(lambda: {}["missing"]))
    return found


def unequal_weights(patch: pytest.MonkeyPatch) -> str:
    real = pruning.reconstruct

    def drifting(modules: Any, *rest: Any, **more: Any) -> Any:
        trained = real(modules, *rest, **more)
        next(modules[0].parameters()).data[0, 0] += 1e-6 * parallel.rank()
        return trained

    patch.setattr(pruning, "reconstruct", drifting)
    found = said(lambda: pruned("llama", technique="BR"))
    patch.undo()
    return found


def on_disk() -> str:
    model = families.build("llama")
    model._reconkit_offload = object()
    return said(lambda: prune(model, families.tokens(2, 8), PruneConfig(technique="LR"), progress=False))


def work(rank: int, folder: Path) -> None:
    """Everything that the tests ask of two ranks, in one start of them."""
    os.environ["RECONKIT_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2, timeout=parallel.TIMEOUT)
    found: dict[str, Any] = {name: pruned(family, **values) for name, (family, values) in WALKS.items()}
    found |= {"half": in_half(), "fp16": in_fp16()}
    with pytest.MonkeyPatch.context() as patch:
        found["exchanged"] = exchanged(patch)
        found["resumed"] = [broken_and_resumed(folder / f"kept-{lost}", patch, lost) for lost in (False, True)]
        found["unequal weights"] = unequal_weights(patch)
    found["unequal samples"] = said(lambda: pruned("llama", seed=rank, technique="LR"))
    found["on disk"] = on_disk()
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_thread() -> Any:
    """As the ranks compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """What each of two ranks found, and their folder."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2))
    return first, second, folder


def distance(a: Any, b: Any) -> float:
    """The largest relative difference between two tables of the same rows."""
    if not len(a) and not len(b):
        return 0.0
    numbers, others = a.select_dtypes("float"), b.select_dtypes("float")
    assert a.drop(columns=numbers.columns).equals(b.drop(columns=others.columns))
    return float((numbers / others - 1).abs().max().max())


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def torchrun(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    """Two processes; the limit ends what hangs, well before the group's own does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RECONKIT_CACHE": str(cache)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=parallel.TIMEOUT.total_seconds() * 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("name", WALKS)
def test_two_processes_give_what_one_gives(name: str, ranks: Any, one_thread: None) -> None:
    family, values = WALKS[name]
    alone, found = pruned(family, **values), ranks[0][name]
    assert distance(found["training"], alone["training"]) < 1e-5 and distance(found["errors"], alone["errors"]) < 1e-5
    assert found["notes"] == alone["notes"] and found["sparsity"] == alone["sparsity"]
    assert list(found["weights"]) == list(alone["weights"])
    for key, weight in alone["weights"].items():
        assert torch.equal(found["weights"][key] == 0, weight == 0), key


@pytest.mark.slow
@pytest.mark.parametrize("name", [*WALKS, "half", "fp16"])
def test_both_ranks_hold_the_same_bits(name: str, ranks: Any) -> None:
    first, second = ranks[0][name], ranks[1][name]
    assert same_bits(first["weights"], second["weights"])
    assert all(first[table].equals(second[table]) for table in ("errors", "training") if table in first)


@pytest.mark.slow
def test_half_precision_models_and_products(ranks: Any, one_thread: None) -> None:
    alone, found = in_half(), ranks[0]["half"]
    assert distance(found["errors"], alone["errors"]) < 0.02 and {w.dtype for w in found["weights"].values()} == {torch.bfloat16}
    alone, found = in_fp16(), ranks[0]["fp16"]
    assert found["skipped"] == alone["skipped"] > 0
    assert all(torch.allclose(found["weights"][k], w, atol=1e-4) for k, w in alone["weights"].items())


@pytest.mark.slow
def test_what_is_exchanged(ranks: Any) -> None:
    for found in (ranks[0]["exchanged"], ranks[1]["exchanged"]):
        for both, one, none in (found["gradients"], found["in buckets"]):
            assert torch.equal(both, torch.full((2, 3), 3.0)) and torch.equal(one, torch.arange(6.0).view(2, 3)) and none is None
        assert found["given"].tolist() == [True, True]
        assert found["differing"] == ["order", "scalar", "number"]
        assert torch.equal(found["tree"]["a"][0], torch.arange(6.0).view(3, 2)) and found["tree"]["b"].dtype == torch.bfloat16
        assert found["raised"] == "KeyError: 'missing'"


@pytest.mark.slow
def test_a_walk_that_broke_goes_on_with_the_same_bits(ranks: Any) -> None:
    """Both ranks raise what the first did; where its streams are lost, they are computed again."""
    unbroken = ranks[0]["BR+GP+CR sparsegpt"]
    for first, resumed in ranks[0]["resumed"] + ranks[1]["resumed"]:
        assert first == "ArithmeticError: no more"
        assert same_bits(resumed["weights"], unbroken["weights"]) and resumed["errors"].equals(unbroken["errors"])
        assert resumed["training"].equals(unbroken["training"]) and resumed["notes"] == unbroken["notes"]
    assert not list((ranks[2] / "cache").rglob("*.json")), "nothing is left for `reconkit watch`"


@pytest.mark.slow
def test_what_ranks_cannot_do_together_is_refused_by_all_of_them(ranks: Any) -> None:
    for found in ranks[:2]:
        assert found["unequal samples"] == "ConfigError: Not every rank was given the same samples; seed them alike."
        assert "Blocks on disk are for one process" in found["on disk"]
        assert found["unequal weights"].startswith("RuntimeError: The ranks' weights of blocks 0 differ")


@pytest.mark.parametrize("number", [0, 1, 2, 7, 8])
def test_shares_are_all_rows_once_and_even(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "count", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append([*range(number)][parallel.share(number)])
    assert sum(shares, []) == [*range(number)] and max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_of_torchrun_without_a_group_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="torchrun started 2 processes.*parallel.group"):
        prune(families.build("llama"), families.tokens(2, 8), PruneConfig(technique="LR"), progress=False)
    assert cli.main(["prune", *WORDS, "--plan"]) == 2 and "must be 1 with --plan" in capsys.readouterr().err
    assert cli.main(["prune", *WORDS, "--out", str(tmp_path / "out"), "--offload"]) == 2 and "must be 1 with --offload" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_line_saves_and_prints_once(tmp_path: Path, cache: Path, one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file

    together, alone = tmp_path / "together", tmp_path / "alone"
    done = torchrun("-m", "reconkit", "prune", *WORDS, "--out", str(together), "--held-out", "pydocs", cache=cache)
    assert done.returncode == 0, done.stderr
    assert cli.main(["prune", *WORDS, "--out", str(alone), "--held-out", "pydocs"]) == 0
    own = capsys.readouterr().out
    assert done.stdout.count("Saved in") == 1 and len(done.stdout.splitlines()) == len(own.splitlines())
    assert {p.name for p in tmp_path.iterdir()} == {"together", "alone"}
    weights, expected = load_file(together / "model.safetensors"), load_file(alone / "model.safetensors")
    assert list(weights) == list(expected)
    for key, weight in expected.items():
        assert torch.equal(weights[key] == 0, weight == 0), key
        assert (weights[key] - weight).norm() < 5e-5 * weight.norm(), f"{key}: AdamW makes much of gradients that are rounding, and no more"


@pytest.mark.slow
def test_a_failure_on_one_rank_ends_all(tmp_path: Path, cache: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""import sys
from reconkit import cli, parallel, pruning
real = pruning.reconstruct
def failing(*args, **kwargs):
    if parallel.rank() == 1 and kwargs["stream"] == 1:
        raise RuntimeError("The second rank is lost.")
    return real(*args, **kwargs)
pruning.reconstruct = failing
sys.exit(cli.main({["prune", *WORDS, "--out", str(tmp_path / "out")]!r}))
"""
    )
    done = torchrun(str(script), cache=cache)
    assert done.returncode != 0 and "reconkit: The second rank is lost." in done.stderr
    assert not (tmp_path / "out").exists() and "Saved" not in done.stdout
