"""Warm examples a second: clients trained by fedtailor against pooled training of one adapter and a plain client loop.

    python benchmarks/stacked.py [--technique lora prefix] [--precision fp32 bf16] [--repeats 7]

20 clients x 4 steps x batch 8 x 32 tokens, all-MiniLM-L6-v2, 10 classes, AdamW. All sides run in one process, taking turns, so that a
noisy machine disturbs them alike; medians over the repeats and their ratios are printed. "pooled" trains one adapter with PEFT's
model on the same examples at the best of several batch sizes; "plain" is the usual loop: for each client, load the global adapter,
train it with torch.optim.AdamW, keep it.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, PrefixTuningConfig, get_peft_model

from fedtailor.backbone import fork, load, quiet
from fedtailor.config import ModelSection
from fedtailor.core import Fit, Plan, stream
from fedtailor.data.examples import Subset, store
from fedtailor.engines.answering import Workers, answer
from fedtailor.losses import classification
from fedtailor.memory import peak
from fedtailor.techniques import TECHNIQUES

CLIENTS, STEPS, BATCH, TOKENS, CLASSES = 20, 4, 8, 32, 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--technique", nargs="+", default=["lora", "prefix"], choices=["lora", "prefix"])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=sorted(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 64, 160], help="batch sizes tried for pooled training")
    args = parser.parse_args()
    print("| technique | precision | plain loop | pooled (best batch) | fedtailor | against pooled | against plain |")
    print("|---|---|---|---|---|---|---|")
    for technique in args.technique:
        for precision in args.precision:
            measure(technique, precision, args.repeats, args.batches)
    print(f"\npeak memory of this process (all sides): {peak() / 1e6:.0f} MB; threads: {torch.get_num_threads()}")


def measure(kind: str, precision: str, repeats: int, sizes: list[int]) -> None:
    backbone = load(ModelSection(), "text", [str(i) for i in range(CLASSES)], dtype=DTYPES[precision])
    rng = np.random.default_rng(0)
    rows = CLIENTS * STEPS * BATCH
    ids = rng.integers(1000, 20000, (rows, TOKENS))
    labels = rng.integers(0, CLASSES, rows)
    sides: dict[str, Callable[[], None]] = {
        "plain": plain(backbone, kind, ids, labels),
        "ours": ours(backbone, kind, ids, labels),
    }
    sides |= {f"pooled {size}": pooled(backbone, kind, ids, labels, size) for size in sizes}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, work in sides.items():
            begun = time.perf_counter()
            work()
            if repeat:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begun)
    rate = {name: rows / statistics.median(found) for name, found in seconds.items()}
    best = max((n for n in rate if n.startswith("pooled")), key=rate.__getitem__)
    print(
        f"| {kind} | {precision} | {rate['plain']:.1f} | {rate[best]:.1f} ({best.split()[1]}) | {rate['ours']:.1f} "
        f"| {rate['ours'] / rate[best]:.2f} x | {rate['ours'] / rate['plain']:.2f} x |",
        flush=True,
    )


def ours(backbone, kind, ids, labels) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    technique = TECHNIQUES[kind](backbone)
    data = store({"input_ids": ids.tolist(), "labels": labels}, {"input_ids": 0})
    workers = Workers(technique.bind, torch.get_num_threads())
    plan = Plan(steps=STEPS, batch=BATCH, lr=1e-3)
    each = STEPS * BATCH
    fits = {
        f"client-{k:02d}": Fit(classification, technique.init, Subset(data, np.arange(k * each, (k + 1) * each)), {}, plan)
        for k in range(CLIENTS)
    }

    def work() -> None:
        answer(fits, workers, lambda client: stream(0, client), stacked=True)

    return work


def adapted(backbone, kind):  # type: ignore[no-untyped-def]
    """PEFT's model, as its documentation makes it."""
    with quiet():
        if kind == "lora":
            config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
        else:
            config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=10)
        model = get_peft_model(fork(backbone.model), config)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = copy.deepcopy(module.config)
            module.config._attn_implementation = "sdpa"
    return model.eval()


def step(model, optimizer, ids, labels) -> None:  # type: ignore[no-untyped-def]
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    F.cross_entropy(logits.float(), labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def plain(backbone, kind, ids, labels) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    model = adapted(backbone, kind)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in trained.items()}
    inputs, targets = torch.from_numpy(ids), torch.from_numpy(labels)

    def work() -> None:
        kept = []
        for k in range(CLIENTS):
            with torch.no_grad():
                for n, p in trained.items():
                    p.copy_(start[n])
            optimizer = torch.optim.AdamW(trained.values(), lr=1e-3, weight_decay=0.0)
            for s in range(STEPS):
                rows = slice((k * STEPS + s) * BATCH, (k * STEPS + s + 1) * BATCH)
                step(model, optimizer, inputs[rows], targets[rows])
            kept.append({n: p.detach().clone() for n, p in trained.items()})

    return work


def pooled(backbone, kind, ids, labels, size) -> Callable[[], None]:  # type: ignore[no-untyped-def]
    model = adapted(backbone, kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    inputs, targets = torch.from_numpy(ids), torch.from_numpy(labels)

    def work() -> None:
        for rows in range(0, len(inputs), size):
            step(model, optimizer, inputs[rows : rows + size], targets[rows : rows + size])

    return work


if __name__ == "__main__":
    main()
