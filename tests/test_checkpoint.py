"""A killed walk continues, ends with the same bits, and trusts no damaged file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch

from reconkit import checkpoint, models, pruning
from reconkit.config import ConfigError, PruneConfig

TECHNIQUES = ("LR", "BR", "BR+GP", "BR+GP+CR", "BR+CR")


def prune(folder: Path | None, technique: str = "BR+GP", **values: Any) -> tuple[dict[str, torch.Tensor], pruning.PruneResult]:
    model = families.build("llama")
    config = PruneConfig(**{"technique": technique, "epochs": 2, "batch_size": 4, **values})
    result = pruning.prune(model, families.tokens(8, 16), config, held_out={"other": families.tokens(4, 16, 1)}, checkpoint=folder, progress=False)
    return model.state_dict(), result


def killed_after(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch, technique: str, error: type[BaseException] = ArithmeticError) -> None:
    """A walk that dies right after its `count`-th window was saved."""
    real, saved = checkpoint.Checkpoint.save, []

    def save(self: Any, *args: Any) -> None:
        real(self, *args)
        saved.append(1)
        if len(saved) == count:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoint, "save", save)
        with pytest.raises(error):
            prune(folder, technique)


def same(a: tuple[dict[str, torch.Tensor], pruning.PruneResult], b: tuple[dict[str, torch.Tensor], pruning.PruneResult]) -> bool:
    return (
        all(torch.equal(v, b[0][k]) for k, v in a[0].items())
        and a[1].errors.equals(b[1].errors)
        and a[1].training.equals(b[1].training)
        and a[1].sparsity == b[1].sparsity
        and a[1].notes == b[1].notes
    )


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_killed_at_every_window_and_resumed_ends_with_the_same_bits(technique: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = prune(None, technique)
    for count in range(1, 5 if "CR" in technique else 4):
        folder = tmp_path / str(count)
        killed_after(count, folder, monkeypatch, technique)
        assert same(prune(folder, technique), unbroken), f"killed after window {count}"


def test_a_resumed_walk_counts_the_seconds_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_after(2, tmp_path, monkeypatch, "BR")
    real = checkpoint.Checkpoint.last

    def last(self: Any) -> tuple[int, dict[str, Any]] | None:
        done, record = real(self)
        assert done == 2 and record["walk"]["earlier"] > 0
        return done, {**record, "walk": {**record["walk"], "earlier": 1000.0}}

    monkeypatch.setattr(checkpoint.Checkpoint, "last", last)
    assert 1000 < prune(tmp_path, "BR")[1].seconds < 1200


def test_a_finished_walk_is_read_and_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = prune(tmp_path)
    monkeypatch.setattr(pruning, "Trainer", None)
    assert same(prune(tmp_path), first)


def test_blocks_and_streams_are_held_once(tmp_path: Path) -> None:
    prune(tmp_path)
    names = sorted(p.name for p in tmp_path.glob("*.pt"))
    assert names == ["block-0-1.pt", "block-1-2.pt", "block-2-3.pt", "streams-3.pt"]


@pytest.mark.parametrize("technique", ["BR", "BR+GP+CR", "BR+CR"])
@pytest.mark.parametrize("victim", ["streams", "block", "window"])
@pytest.mark.parametrize("how", ["cut", "altered", "gone"])
def test_a_damaged_file_takes_the_walk_back_to_the_last_whole_window(
    technique: str, victim: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after(3, tmp_path, monkeypatch, technique)
    file = max(tmp_path.glob(f"{victim}-*"), key=lambda p: (int(p.stem.split("-")[-1]), p.name))
    content = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    saved = checkpoint.Checkpoint(tmp_path)
    assert saved.last()[0] == (3 if victim == "streams" else 2)
    assert same(prune(tmp_path, technique), prune(None, technique))


def test_another_walk_is_refused_by_name(tmp_path: Path) -> None:
    prune(tmp_path)
    with pytest.raises(ConfigError, match="another configuration"):
        prune(tmp_path, seed=1)
    model = families.build("llama")
    models.blocks(model)[1][0].mlp.up_proj.weight.data[0, 0] += 1
    config = PruneConfig(technique="BR+GP", epochs=2, batch_size=4)
    with pytest.raises(ConfigError, match="another model"):
        pruning.prune(model, families.tokens(8, 16), config, held_out={"other": families.tokens(4, 16, 1)}, checkpoint=tmp_path, progress=False)
    with pytest.raises(ConfigError, match="another samples"):
        pruning.prune(
            families.build("llama"),
            families.tokens(8, 16, 3),
            config,
            held_out={"other": families.tokens(4, 16, 1)},
            checkpoint=tmp_path,
            progress=False,
        )


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="no checkpoint"):
        prune(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_an_interrupt_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    killed_after(2, tmp_path, monkeypatch, "BR", KeyboardInterrupt)
    said = capsys.readouterr().out
    assert f"checkpoint={str(tmp_path)!r}" in said and "window 2 of 3" in said
    assert same(prune(tmp_path, "BR"), prune(None, "BR"))


def test_a_checkpoint_of_other_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(tmp_path)
    monkeypatch.setitem(checkpoint.RESULTS, "reconstruction", 99)
    with pytest.raises(ConfigError, match="begun with another results"):
        prune(tmp_path)


def test_a_full_disk_leaves_no_partial_file_and_the_walk_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = torch.save, []

    def full(value: Any, file: Path) -> None:
        count.append(1)
        if len(count) == 4:  # the streams of the second window
            Path(file).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        real(value, file)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(OSError, match="cannot be written") as raised:
        prune(tmp_path / "state", "BR")
    assert raised.value.filename == str(tmp_path / "state" / "streams-2.pt")
    assert not list((tmp_path / "state").glob(".*"))
    monkeypatch.undo()
    assert same(prune(tmp_path / "state", "BR"), prune(None, "BR"))


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    for name in (".key.json.123", ".block-0-1.pt.123"):
        (tmp_path / name).write_text("half")
    prune(tmp_path)
    assert not list(tmp_path.glob(".*"))
