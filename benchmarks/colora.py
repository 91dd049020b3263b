"""Clients of two encoders that share Co-LoRA's pieces: how near the alignment brings them, and what they gain by it.

    python benchmarks/colora.py alignment                (a minute)
    python benchmarks/colora.py learning --out DIR       (half an hour on one core; resumable)

The encoders are MiniLM (6 layers) and, as the smaller reference, its first three layers, which is written into a temporary folder. Data: FDU-MTL, 16
clients, one a domain, 32 tokens. `alignment` prints, for steps and rates, the relative squared error and the cosine of A x of one model to
A' x' of the other on public reviews that the alignment has not seen. `learning`: clients of both kinds in turn, three seeds: alone, with
`fedmosaic`, and with `fedmosaic` whose A has not been moved (align_steps = 0: B is mapped all the same).
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from fedtailor.algorithms.alignment import align, by_module, entered
from fedtailor.backbone import locate, quiet
from fedtailor.compare import compare, markdown
from fedtailor.config import parse
from fedtailor.core import SERVER, Predict, Tree
from fedtailor.engines.answering import answer, drive
from fedtailor.evaluation import workers
from fedtailor.simulation import World, build

DATA = Path("../shared/data/fdu_mtl")
WIDTH, SEEN, UNSEEN = 32, 100, 150


def shorter(folder: Path, layers: int = 3) -> str:
    """MiniLM's first layers."""
    from transformers import AutoModel, AutoTokenizer

    with quiet():
        model = AutoModel.from_pretrained(locate("minilm"))
        model.encoder.layer = model.encoder.layer[:layers]
        model.config.num_hidden_layers = layers
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(locate("minilm")).save_pretrained(folder)
    return str(folder)


def experiment(small: str) -> dict[str, Any]:
    return {
        "name": "colora",
        "rounds": 16,
        "model": {"name": small},
        "data": {"name": str(DATA), "limit": 2000, "test_limit": 500, "max_length": WIDTH, "public": 0.2},
        "technique": {"kind": "colora", "blocks": 3},
        "clients": {
            "count": 16,
            "partition": {"kind": "natural", "column": "domain"},
            "test": 0.3,
            "kinds": [{"model": {"name": "minilm"}}, {}],
        },
        "train": {"epochs": 0.25, "batch": 2, "lr": 2e-3},
        "engine": {"precision": "fp32"},
        "evaluate": {"every": 0, "sample": 25},
        "algorithm": {"kind": "fedmosaic"},
    }


def nearness(world: World, crew: Any, client: str, factors: Tree) -> tuple[float, float]:
    """(relative squared error, mean cosine) of A x to the reference's."""
    site, kind = world.sites(client, 0), world.job.kinds[0]
    assert site.reference
    order = torch.randperm(len(site.data["public"]), generator=torch.Generator().manual_seed(1)).numpy()
    rows, look = order[:UNSEEN], functools.partial(entered, width=WIDTH, paired=True)
    names = [name for name in kind.frozen if name.endswith(".A")]
    both = []
    for who, tree, data in (
        (client, {**site.init, **kind.frozen, **factors}, site.data["public"]),
        (SERVER, {**site.reference.init, **world.job.frozen}, site.reference.data["public"]),
    ):
        said = answer({who: Predict(look, tree, data.take(rows))}, crew.of(who), lambda c: torch.Generator(), False)[who]
        downs = [tree[name] for name in names]
        both.append(torch.stack([x @ down.mT for x, down in zip(by_module(said["within"], downs), downs, strict=True)], -2))
    ours, theirs = both
    seen = theirs.abs().sum((-1, -2)) > 0
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1)[seen].mean()
    return float((ours - theirs).square().sum() / theirs.square().sum()), float(cosine)


def alignment(small: str) -> None:
    world = build(parse(experiment(small)))
    crew, client, kind = workers(world), world.facts.clients[0], world.job.kinds[0]
    site = world.sites(client, 0)
    print("| steps | rate | relative squared error | cosine |\n|---|---|---|---|")
    print("| as drawn | | {:.3f} | {:.3f} |".format(*nearness(world, crew, client, {})))
    for steps, rate in ((0, 1e-3), (100, 5e-5), (100, 1e-3), (100, 3e-3), (100, 1e-2), (300, 3e-3)):
        flow: Any = align(site, kind.frozen, world.job.frozen, SEEN, steps, rate)

        def answered(asks: dict[str, Any]) -> dict[str, Any]:
            who = crew.of(SERVER if asks[client].reference else client)
            return answer(asks, who, lambda c: torch.Generator(), False)

        found = drive({client: flow}, answered)[client]
        print(f"| {steps} | {rate:g} | " + "{:.3f} | {:.3f} |".format(*nearness(world, crew, client, found)), flush=True)


def learning(small: str, out: Path) -> None:
    sets = [
        {"name": "local", "algorithm.kind": "local"},
        {"name": "fedmosaic", "algorithm.kind": "fedmosaic"},
        {"name": "fedmosaic, A as drawn", "algorithm.kind": "fedmosaic", "algorithm.align_steps": 0},
    ]
    values = experiment(small)
    del values["algorithm"]
    print(markdown(compare(parse({**values, "compare": {"sets": sets, "seeds": [0, 1, 2]}}), out)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["alignment", "learning"])
    parser.add_argument("--out", type=Path, default=Path("runs/colora"))
    asked = parser.parse_args()
    if not DATA.exists():
        parser.error(f"'{DATA}' does not exist: run this from the project's root, with the shared data beside it")
    if asked.what == "alignment":
        with tempfile.TemporaryDirectory() as folder:
            alignment(shorter(Path(folder)))
    else:
        asked.out.mkdir(parents=True, exist_ok=True)
        learning(shorter(asked.out / "three-layers"), asked.out)


if __name__ == "__main__":
    main()
