"""A split training step against the unsplit one, in one process: front and back at a client, the middle at a server, LoRA of rank 8.

    python benchmarks/split_step.py [--repeats 15]

MiniLM (6 layers, cut 1 | 4 | 1, batch 8 x 32 tokens) and a random model of GPT-2's size (12 layers, 2 | 9 | 1, batch 4 x 64). The four tensors
of a step are encoded and decoded as messages, as on a wire. Both sides run in turn; prints a markdown table of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fedtailor import wire
from fedtailor.backbone import Backbone, load, where_others_go_unread
from fedtailor.config import ModelSection
from fedtailor.core import HIDDEN, Loss, Message, Plan, Tree
from fedtailor.cut import only, partial_class, parts
from fedtailor.engines.splitting import back, slope, through
from fedtailor.losses import classification, language
from fedtailor.optimizers import stepped
from fedtailor.techniques import TECHNIQUES

PLAN = Plan(lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    print("| model | unsplit, ms | split, ms | ratio | kB a step |")
    print("|---|---|---|---|---|")
    for name, whole, (front, end), batch, loss in (minilm(), gpt2()):
        sides = {"unsplit": unsplit(whole, batch, loss), "split": split(whole, front, end, batch, loss)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        sent = 0
        for repeat in range(asked.repeats + 2):
            for side, work in sides.items():
                begun = time.perf_counter()
                sent = work() or sent
                if repeat > 1:
                    seconds[side].append(1e3 * (time.perf_counter() - begun))
        a, b = (statistics.median(seconds[side]) for side in ("unsplit", "split"))
        print(f"| {name} | {a:.1f} | {b:.1f} | {b / a:.2f} x | {sent / 1e3:,.0f} |", flush=True)


Side = tuple[str, Backbone, tuple[int, int], dict[str, Tensor], Loss]


def minilm() -> Side:
    ids = torch.randint(1000, 20000, (8, 32))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(0, 2, (8,))}
    return "MiniLM", load(ModelSection(), "text", ["a", "b"]), (1, 1), batch, classification


def gpt2() -> Side:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().requires_grad_(False)
    ids = torch.randint(0, 50257, (4, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return "GPT-2 size, random", Backbone(model, None, "language", "random", []), (2, 1), batch, language


def unsplit(backbone: Backbone, batch: dict[str, Tensor], loss: Loss) -> Callable[[], int]:
    technique = TECHNIQUES["lora"](backbone, rank=8)
    forward, params = technique.bind(False), technique.init
    state: Tree = {}

    def step() -> int:
        nonlocal params, state
        _, slopes, _ = slope(loss, forward, params, batch, {})
        params, state = stepped(PLAN, params, slopes, state, PLAN.lr)
        return 0

    return step


def split(backbone: Backbone, front: int, end: int, batch: dict[str, Tensor], loss: Loss) -> Callable[[], int]:
    depth = backbone.model.config.num_hidden_layers  # type: ignore[union-attr]
    cut = parts(depth, front, end)
    whole = backbone.model
    whole.__class__ = partial_class(type(whole), cut)  # what `only` takes parts of
    each = [backbone._replace(model=only(whole, part), unread=None) for part in cut]
    each[2] = each[2]._replace(unread=where_others_go_unread(backbone) if backbone.kind == "text" else None)
    techniques = [TECHNIQUES["lora"](part, rank=8) for part in each]
    forwards = [technique.bind(False) for technique in techniques]
    trees = [technique.init for technique in techniques]
    states: list[Tree] = [{}, {}, {}]

    def down(i: int, slopes: Tree) -> None:
        trees[i], states[i] = stepped(PLAN, trees[i], slopes, states[i], PLAN.lr)

    mask = {"attention_mask": batch["attention_mask"]}
    inputs = {**mask, "input_ids": batch["input_ids"]}

    def step() -> int:
        sizes: list[int] = []

        def sent(value: Tensor) -> Tensor:
            blob = wire.encode(Message("hidden", {"value": value}))
            sizes.append(len(blob))
            found: Tensor = wire.decode(blob).body["value"]
            return found

        h1, kept1 = through(forwards[0], trees[0], inputs)
        h2, kept2 = through(forwards[1], trees[1], {**mask, HIDDEN: sent(h1)})
        _, slopes3, g2 = slope(loss, forwards[2], trees[2], {**batch, HIDDEN: sent(h2)}, {})
        down(2, slopes3)
        assert g2 is not None
        slopes2, g1 = back(kept2, sent(g2))
        down(1, slopes2)
        assert g1 is not None
        slopes1, _ = back(kept1, sent(g1))
        down(0, slopes1)
        return sum(sizes)

    return step


if __name__ == "__main__":
    main()
