"""The state of a pruning on disk, so that a killed one continues and ends with the same bits.

In the folder: `key.json` (what was being done), one `window-N.json` for each finished window, written last and naming its
other files with their sums, one file a block, and one file with the streams of the last window. Streams that are lost or
damaged can be recomputed from the blocks; after a damaged block the pruning restarts at the last window that is whole.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import offload
from .assets import remove, writing
from .callbacks import Callback
from .config import RESULTS, ConfigError, PruneConfig, to_dict
from .streams import store

if TYPE_CHECKING:
    from .pruning import Pruning, State

FORMAT = 1  # of the files in the folder
STREAMS = 4  # of the samples' size at once, at most: dense, sparse, target, and what is advanced
SUPERSEDED = 2  # windows after which an earlier version of a block is deleted: one step back stays possible


def _plain(config: PruneConfig) -> dict[str, Any]:
    """The configuration as JSON has it, without `overfit`, which decides words only; of `layer_sparsity` the first match wins."""
    plain = {k: list(v.items()) if k == "layer_sparsity" else v for k, v in to_dict(config).items() if k != "overfit"}
    return json.loads(json.dumps(plain))


class Checkpoint:
    """A folder that holds one pruning."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def open(cls, folder: str | Path, model: nn.Module, sources: Mapping[str, Tensor], config: PruneConfig) -> Checkpoint:
        """Begin in an empty folder, or continue in one that holds the same pruning.

        Raises:
            ConfigError: the folder holds another pruning (the message names what differs) or something else.
        """
        path = Path(folder)
        key = {
            "model": on_disk.sum() if (on_disk := offload.of(model)) else _sum(model.state_dict()),
            "samples": _sum(sources),
            "configuration": _plain(config),
            "results": {"format": FORMAT, **{part: RESULTS[part] for part in ("criteria", "reconstruction")}},
        }
        for left in path.glob(".*"):  # of a process that was killed while it wrote
            if re.fullmatch(r"\.(key|window-\d+|block-\d+-\d+|streams-\d+)\.(json|pt)\.\d+", left.name):
                remove(left)
        if path.is_dir() and any(path.iterdir()):
            try:
                known = json.loads((path / "key.json").read_text())
            except (OSError, ValueError):
                raise ConfigError(f"checkpoint is {str(folder)!r}, which holds no checkpoint and is not empty; name another folder.") from None
            differs = [part for part in key if known.get(part) != key[part]]
            if differs:
                raise ConfigError(
                    f"checkpoint is {str(folder)!r}, begun with another {' and another '.join(differs)}; "
                    "name an empty folder, or load and ask for the same again."
                )
        _write(path / "key.json", json.dumps(key, indent=1).encode())
        return cls(path)

    def save(self, done: int, layers: nn.ModuleList, window: Sequence[int], walk: Mapping[str, Any]) -> None:
        """Keep the state after `done` windows: the blocks of the window just trained, the streams, the tables."""
        facts = {name: value for name, value in walk.items() if name not in ("sparse", "dense", "masks")}
        last = self._record(done - 1) or {"blocks": {}}
        blocks = dict(last["blocks"])
        for i in window:
            masks = {name: mask for name, mask in walk["masks"].items() if name.startswith(f"{i}.")}
            blocks[str(i)] = self._put(f"block-{i}-{done}.pt", {"weights": layers[i].state_dict(), "masks": masks})
        streams = self._put(f"streams-{done}.pt", {"sparse": walk["sparse"], "dense": walk["dense"]})
        record = json.dumps({"walk": facts, "blocks": blocks, "streams": streams})
        _write(self.folder / f"window-{done}.json", json.dumps({"sum": _text_sum(record), "record": record}).encode())
        (self.folder / f"streams-{done - 1}.pt").unlink(missing_ok=True)
        needed = {name for n in range(done - SUPERSEDED + 1, done + 1) for name, _ in (self._record(n) or last)["blocks"].values()}
        for file in self.folder.glob("block-*.pt"):
            if file.name not in needed:
                file.unlink()

    def last(self) -> tuple[int, dict[str, Any]] | None:
        """(windows done, record) of the last window whose blocks are all whole, or None."""
        numbers = sorted((int(f.stem.split("-")[1]) for f in self.folder.glob("window-*.json")), reverse=True)
        for done in numbers:
            record = self._record(done)
            if record and all(self._whole(*file) for file in record["blocks"].values()):
                return done, record
            (self.folder / f"window-{done}.json").unlink()
        return None

    def blocks(self, record: Mapping[str, Any], layers: nn.ModuleList, on_disk: offload.Offload | None = None) -> dict[str, Tensor]:
        """Put the saved blocks into `layers`; returns the masks that later windows need. Of blocks `on_disk`, only these stay in memory."""
        masks: dict[str, Tensor] = {}
        for i, (name, _) in record["blocks"].items():
            if on_disk:
                on_disk.hold(int(i))
            kept = torch.load(self.folder / name, weights_only=True, map_location=next(layers[int(i)].parameters()).device)
            layers[int(i)].load_state_dict(kept["weights"])
            if int(i) >= record["walk"]["position"]:
                masks |= kept["masks"]
            elif on_disk:
                on_disk.finish(int(i))
        return masks

    def streams(self, record: Mapping[str, Any]) -> dict[str, Any] | None:
        """{"sparse": …, "dense": …} of the record, or None where the file is gone, damaged, or of a device that is not here."""
        where = None if torch.cuda.is_available() else "cpu"
        return torch.load(self.folder / record["streams"][0], weights_only=True, map_location=where) if self._whole(*record["streams"]) else None

    def _record(self, done: int) -> dict[str, Any] | None:
        try:
            kept = json.loads((self.folder / f"window-{done}.json").read_text())
            return json.loads(kept["record"]) if kept["sum"] == _text_sum(kept["record"]) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _put(self, name: str, value: Any) -> tuple[str, str]:
        with writing(self.folder / name) as partial:
            torch.save(value, partial)
            found = _file_sum(partial)
        return name, found

    def _whole(self, name: str, expected: str) -> bool:
        file = self.folder / name
        return file.is_file() and _file_sum(file) == expected


def _write(file: Path, content: bytes) -> None:
    with writing(file) as partial:
        partial.write_bytes(content)


def _text_sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _file_sum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sum(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class CheckpointCallback(Callback):
    """Keeps the state of a pruning after every window, and restores it where the folder holds one."""

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.kept = folder, 0

    def on_begin(self, pruning: Pruning) -> None:
        self.saved = Checkpoint.open(self.folder, pruning.model, pruning.sources, pruning.config)
        if last := self.saved.last():
            pruning.done, pruning.state = last[0], self._restored(pruning, last[1])
            self.kept = pruning.done

    def on_window_end(self, pruning: Pruning, window: range) -> None:
        earlier = pruning.state.earlier + time.perf_counter() - pruning.started
        self.saved.save(pruning.done, pruning.runner.blocks, window, {**vars(pruning.state), "earlier": earlier})
        self.kept = pruning.done

    def on_end(self, pruning: Pruning, error: BaseException | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            place = f"window {self.kept + 1} of {len(pruning.windows)}"
            print(f"\nStopped before {place}; the same call with checkpoint={str(self.folder)!r} continues there.")

    def _restored(self, pruning: Pruning, record: Mapping[str, Any]) -> State:
        """The state after the last whole window; the model comes in dense and leaves with the finished blocks."""
        runner, position, pruned = pruning.runner, record["walk"]["position"], record["walk"]["pruned"]
        for i in range(position, pruned):
            if runner.offload:
                runner.offload.hold(i)
        if pruning.keeps_dense_blocks:
            pruning.dense_blocks = {i: copy.deepcopy(runner.blocks[i]) for i in range(position, pruned)}
        kept = self.saved.streams(record)
        dense = None if kept else _dense_states(pruning, pruned)  # before the blocks are replaced
        masks = self.saved.blocks(record, runner.blocks, runner.offload)
        if kept:
            sparse = store(kept["sparse"], STREAMS, runner.device)
            dense = {i: store(states, STREAMS, runner.device) for i, states in kept["dense"].items()}
        else:
            sparse = pruning.state.sparse
            for i in range(position):  # stored again after each block, as the pruning does, so that the bits are the same
                sparse = {source: runner.advance([i], x, pruning.config.batch_size) for source, x in sparse.items()}
        dense = {i: states for i, states in dense.items() if i >= position}
        return replace(pruning.state, **{**record["walk"], "sparse": sparse, "dense": dense, "masks": masks})


def _dense_states(pruning: Pruning, count: int) -> dict[int, dict[str, Tensor]]:
    """The dense hidden states before each of the first `count` blocks and behind the last of them, computed again."""
    found = {0: pruning.state.sparse}
    for i in range(count):
        found[i + 1] = {source: pruning.runner.advance([i], x, pruning.config.batch_size) for source, x in found[i].items()}
    return found
