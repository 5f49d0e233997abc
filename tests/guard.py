"""Guard values: what pruning the tiny model gives, for every technique, criterion and pattern.

    python tests/guard.py write            write the committed values (only when results change on purpose)
    python tests/guard.py bits FILE        write fingerprints of the exact bits, to compare before and after a change on one machine
    python tests/guard.py compare A B      compare two such files

Processors round differently, so the committed values are held to tolerances by test_guard.py; bits are compared on one machine only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reconkit as rk

HERE = Path(__file__).parent
VALUES, MASKS = HERE / "guard.json", HERE / "guard_masks.npz"
TECHNIQUES, CRITERIA, PATTERNS = ("LR", "BR", "BR+GP", "BR+GP+CR", "BR+CR"), ("magnitude", "wanda", "sparsegpt"), ("unstructured", "2:4", "4:8")
CASES = list(itertools.product(TECHNIQUES, CRITERIA, PATTERNS))
MASKED = [case for case in CASES if case[0] == "LR"]
"Cases whose first block's masks are committed: all criteria and patterns, before training decides anything."


def tokens(count: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 250, (count, length), generator=torch.Generator().manual_seed(seed))


def name(case: tuple[str, str, str]) -> str:
    return " ".join(case)


def prune(case: tuple[str, str, str]) -> tuple[torch.nn.Module, Any]:
    """The tiny model after one pruning in fp32 on the CPU, and the result."""
    technique, criterion, pattern = case
    model, _ = rk.load_model("tiny", device="cpu")
    config = rk.PruneConfig(criterion=criterion, pattern=pattern, technique=technique, epochs=2, batch_size=4, precision="fp32")
    return model, rk.prune(model, tokens(8, 32, 0), config, extra=tokens(4, 32, 1), held_out={"held": tokens(4, 32, 2)}, progress=False)


def matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    """The pruned matrices, block by block."""
    return [p.detach() for block in model.model.layers for p in block.parameters() if p.ndim == 2]


def mask(model: torch.nn.Module) -> np.ndarray:
    """Kept entries of the first block's matrices, one row."""
    return np.concatenate([(p.detach() != 0).flatten().numpy() for p in model.model.layers[0].parameters() if p.ndim == 2])


def values(model: torch.nn.Module, result: Any) -> dict[str, Any]:
    """Numbers that tell whether a pruning is the same: zeros by matrix, errors, losses, perplexity."""
    return {
        "zeros": [int((w == 0).sum()) for w in matrices(model)],
        "nmse": result.errors.nmse.tolist(),
        "token_nmse": result.errors.token_nmse.tolist(),
        "loss": result.training.loss.tolist(),
        "perplexity": rk.perplexity(model, tokens(4, 32, 3)),
    }


def bits(model: torch.nn.Module, result: Any) -> dict[str, Any]:
    """Fingerprints of the exact weights, and exact numbers."""
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
    found = values(model, result)
    return {"weights": weights, **{key: json.dumps(found[key]) for key in ("zeros", "loss", "perplexity")}, "nmse": json.dumps(found["nmse"])}


def write() -> None:
    kept, masks = {}, {}
    for case in CASES:
        model, result = prune(case)
        kept[name(case)] = values(model, result)
        if case in MASKED:
            masks[name(case)] = np.packbits(mask(model))
    VALUES.write_text(json.dumps(kept, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")
    np.savez_compressed(MASKS, **masks)


def compare(first: str, second: str) -> int:
    """Print what differs; the number of cases that do."""
    a, b = (json.loads(Path(file).read_text()) for file in (first, second))
    differing = {case: [key for key in a[case] if a[case][key] != b.get(case, {}).get(key)] for case in a}
    differing = {case: keys for case, keys in differing.items() if keys}
    for case, keys in differing.items():
        print(f"{case}: {', '.join(keys)} differ")
    print(f"{len(a) - len(differing)} of {len(a)} cases have equal bits")
    return len(differing)


if __name__ == "__main__":
    if sys.argv[1:2] == ["write"]:
        write()
    elif sys.argv[1:2] == ["bits"]:
        Path(sys.argv[2]).write_text(json.dumps({name(case): bits(*prune(case)) for case in CASES}))
    else:
        sys.exit(bool(compare(*sys.argv[2:4])))
