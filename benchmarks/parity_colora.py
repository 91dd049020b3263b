"""FedMosaic's Co-LoRA beside its authors' code (snumprlab/fedmosaic, tried at 7887f5f).

    python benchmarks/parity_colora.py CHECKOUT

Out of their files are run: `get_target_layers`, `closest_row_orthonormal`, the loop of `train_abalign.py` that carries B from one model to
another (without its `.cuda()`), and `fedmosaic_load_state_dict`, which makes a client's "global" adapter where models differ. Beside
them, from the same numbers in float64 (also where theirs says float32, unless said otherwise): `colora.ends`, `alignment.polar`,
`alignment.carried`, and the letters of a round of `fedmosaic` with clients of two kinds, 6 and 9 layers of widths 16 and 24. Prints the
largest differences.
"""

from __future__ import annotations

import ast
import copy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from parity_fedmosaic import Wide, apart, function, parsed
from torch import Tensor

from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.alignment import carried, polar
from fedtailor.algorithms.colora_pieces import pieces
from fedtailor.algorithms.fedmosaic import weights
from fedtailor.core import Job, Kind, Plan, Tree
from fedtailor.losses import classification
from fedtailor.metrics import metric
from fedtailor.techniques.colora import ends

RANK, BLOCKS, TAU = 4, 3, 0.5
KINDS = ((6, 16), (9, 24))  # (layers, width)
CLIENTS = 5


def carry(checkout: Path, floats: Any, x1: Tensor, x3: Tensor, b1: Tensor) -> Tensor:
    """Their B of the larger model: the loop over modules, run for one; `floats` is torch, or `Wide`."""
    tree = parsed(checkout, "train_abalign.py")
    loop = next(
        n for n in ast.walk(tree) if isinstance(n, ast.For) and "lora_B_output_1b, lora_B_output_3b" in ast.unparse(n.iter)
    )
    text = ast.unparse(loop).replace(".cuda()", "").replace(".to(torch.bfloat16)", "")
    roots = function(checkout, "train_abalign.py", "matrix_inv_sqrt", {"torch": floats})
    found: dict[str, Tensor] = {}
    known = {
        "torch": floats,
        "matrix_inv_sqrt": roots,
        "gamma": 1e-4,
        "lora_B_output_1b": [x1],
        "lora_B_output_3b": [x3],
        "layer_name_3b": ["B"],
        "layer_name_1b": ["B"],
        "state_dict": found,
        "state_dict2": {"B": b1},
    }
    exec(text, known)
    return found["B"].double()


def names(layers: int, width: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Our names of a client's tree -> theirs, and shapes: one module a layer."""
    out: dict[str, tuple[str, tuple[int, ...]]] = {}
    last = ends(layers, BLOCKS)
    for layer in range(layers):
        if layer in last:
            out[f"colora.{last.index(layer)}.0.P"] = (f"layers.{layer}.q.lora2_P", (RANK, RANK))
            out[f"colora.{last.index(layer)}.0.Q"] = (f"layers.{layer}.q.lora2_Q", (RANK,))
        else:
            out[f"layers.{layer}.q.lora_A.weight"] = (f"layers.{layer}.q.lora2_A", (RANK, width))
            out[f"layers.{layer}.q.lora_B.weight"] = (f"layers.{layer}.q.lora2_B", (width, RANK))
    return out


def theirs_of(aggregate: Any, locals_: list[Tree], client: int, sim: Tensor, kinds: list[int]) -> Tree:
    """The "global" adapter that their function loads into a client's model."""
    loaded: list[Tree] = []
    model = SimpleNamespace(load_state_dict=lambda tree, strict: loaded.append(dict(tree)))
    args = SimpleNamespace(deepspeed="", softmax_temp=TAU, num_clients=CLIENTS, num_blocks=BLOCKS)
    told = {
        "LAYER_INDEX": 1,
        "curr_round": 1,
        "task_similarity": sim,
        "model_ids": {k: [c for c in range(CLIENTS) if kinds[c] == k] for k in range(len(KINDS))},
    }
    start = {name.replace("lora2", "lora1"): t for name, t in locals_[client].items()}
    aggregate(model, start, locals_, client, args, told)
    return {name.replace("lora1", "lora2"): t for name, t in loaded[-1].items() if "lora1" in name}


def main(folder: str) -> None:
    checkout, wide = Path(folder), torch.float64
    chance = torch.Generator().manual_seed(0)
    target = function(checkout, "utils/train_utils.py", "get_target_layers", {})
    sizes = [(depth, blocks) for blocks in range(1, 9) for depth in range(blocks, 49)]
    wrong = sum(target(depth, blocks) != ends(depth, blocks) for depth, blocks in sizes)
    print(f"layers that hold pieces differ in {wrong} of {len(sizes)} pairs of depth and blocks")

    nearest = function(checkout, "train_abalign.py", "closest_row_orthonormal", {"torch": torch})
    table = torch.randn(RANK, 24, generator=chance)
    print(f"A with orthonormal rows differs by at most {apart([nearest(table)[0]], [polar(table)]):.1e}")

    b1, b3 = (torch.linalg.qr(torch.randn(d, RANK, generator=chance, dtype=wide))[0] for d in (16, 24))
    z1 = torch.randn(400, RANK, generator=chance, dtype=wide)
    z3 = z1 @ torch.randn(RANK, RANK, generator=chance, dtype=wide) + 0.1 * torch.randn(400, RANK, generator=chance, dtype=wide)
    mine, theirs, short = carried(b3, z3, z1), *(carry(checkout, floats, z1 @ b1.T, z3 @ b3.T, b1) for floats in (Wide(), torch))
    print(f"B of the larger model differs by at most {apart([mine], [theirs]):.1e} of {float(mine.abs().max()):.1e}")
    print(f"B: theirs in float32, as it runs, differs from theirs in float64 by {apart([short], [theirs]):.1e}")

    kinds = [c % len(KINDS) for c in range(CLIENTS)]
    names_of = [names(*KINDS[k]) for k in kinds]
    trees = [{n: torch.randn(shape, generator=chance, dtype=wide) for n, (_, shape) in own.items()} for own in names_of]
    sketches = {f"c{c}": torch.randn(10, 4, generator=chance, dtype=wide) for c in range(CLIENTS)}
    columns = torch.stack([torch.nn.functional.normalize(s, dim=0) for s in sketches.values()])
    sim = torch.einsum("irc,jrc->ij", columns, columns) / columns.shape[2]
    locals_ = [{names_of[c][n][0]: t for n, t in trees[c].items()} for c in range(CLIENTS)]
    known = {"torch": torch, "copy": copy, "load_deepspeed": None, "get_target_layers": target}
    aggregate = function(checkout, "federated_methods/fedmosaic_utils.py", "fedmosaic_load_state_dict", known)

    frozen = {f"colora.{b}.0.A": torch.zeros(RANK, 1) for b in range(BLOCKS)}
    judged = metric("auto", "text", 2)
    whole = tuple(Kind({n: torch.zeros(s) for n, (_, s) in names(*k).items()}, frozen, True) for k in KINDS)
    job = Job(classification, judged.judge, judged.tally, Plan(), clients=CLIENTS, kinds=whole, frozen=frozen)
    algorithm = ALGORITHMS["fedmosaic"](job, tau=TAU)
    everybody = list(sketches)
    state = {
        **algorithm.init(whole[0].init),
        "trees": dict(zip(everybody, trees, strict=True)),
        "sketches": sketches,
        "kinds": dict(zip(everybody, kinds, strict=True)),
    }
    letters: Any = next(algorithm.round(state, everybody))
    worst = {"pieces": 0.0, "the rest": 0.0}
    for c in range(CLIENTS):
        found, got = theirs_of(aggregate, locals_, c, sim, kinds), letters[f"c{c}"].body["global"]
        for n, t in got.items():
            part = "pieces" if n in pieces(got) else "the rest"
            worst[part] = max(worst[part], apart([t], [found[names_of[c][n][0]]]))
        assert got.keys() == set(trees[c])
    said = " ".join(f"{w:.3f}" for w in weights(sketches, TAU)["c0"].tolist())
    for part, difference in worst.items():
        print(f"letters of two kinds, {part}: differ by at most {difference:.1e}; the first client's weights: {said}")


if __name__ == "__main__":
    main(sys.argv[1])
