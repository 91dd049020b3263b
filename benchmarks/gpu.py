"""Stacked training on a GPU against one by one and against pooled training of one adapter.

    python benchmarks/gpu.py [--clients 64] [--batch 8] [--tokens 128] [--layers 12] [--width 768] [--precision bf16]

LoRA r = 8 on a BERT-base-sized and a GPT-2-sized model with random weights. Warm examples a second, medians over the repeats, all
sides in one process taking turns. Small sizes run on a CPU too, which checks the script, not the claim.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, GPT2Config, PreTrainedTokenizerFast

from fedtailor.backbone import load
from fedtailor.config import ModelSection
from fedtailor.core import Fit, Plan, stream
from fedtailor.data.examples import Subset, store
from fedtailor.engines.answering import Workers, answer
from fedtailor.losses import classification, language
from fedtailor.techniques import TECHNIQUES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("clients", 64),
        ("batch", 8),
        ("tokens", 128),
        ("steps", 4),
        ("layers", 12),
        ("width", 768),
        ("repeats", 5),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU (checks the script, not the claim)"
    print(f"{name}, {args.clients} clients x {args.steps} steps x batch {args.batch} x {args.tokens} tokens, {args.precision}\n")
    print("| model | one by one | pooled | stacked | against one by one | against pooled |\n|---|---|---|---|---|---|")
    for family in ("bert", "gpt2"):
        with tempfile.TemporaryDirectory() as folder:
            rates = measure(family, model_folder(family, Path(folder), args), args, device)
        alone, pooled, stacked = rates["alone"], rates["pooled"], rates["stacked"]
        print(
            f"| {family} | {alone:.0f} | {pooled:.0f} | {stacked:.0f} | {stacked / alone:.1f} x | {stacked / pooled:.2f} x |",
            flush=True,
        )


def model_folder(family: str, folder: Path, args: argparse.Namespace) -> Path:
    """A model of the wanted size with random weights, saved as any model folder is."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    heads = max(1, args.width // 64)
    if family == "bert":
        config: Any = BertConfig(
            hidden_size=args.width, num_hidden_layers=args.layers, num_attention_heads=heads, intermediate_size=4 * args.width
        )
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        config = GPT2Config(n_embd=args.width, n_layer=args.layers, n_head=heads, pad_token_id=0)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[PAD]").save_pretrained(
        folder
    )
    return folder


def measure(family: str, folder: Path, args: argparse.Namespace, device: str) -> dict[str, float]:
    kind, loss = ("text", classification) if family == "bert" else ("language", language)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    backbone = load(ModelSection(name=str(folder)), kind, ["a", "b"] if kind == "text" else [], device=device, dtype=dtype)
    technique = TECHNIQUES["lora"](backbone)
    random, each = np.random.default_rng(0), args.steps * args.batch
    rows = args.clients * each
    ids = random.integers(2, 20000, (rows, args.tokens)).tolist()
    columns = {"input_ids": ids, "labels": ids if kind == "language" else random.integers(0, 2, rows)}
    data = store(columns, {"input_ids": 0, **({"labels": -100} if kind == "language" else {})})
    plan = Plan(steps=args.steps, batch=args.batch, lr=1e-3)
    fits = {
        f"client-{k:03d}": Fit(loss, technique.init, Subset(data, np.arange(k * each, (k + 1) * each)), {}, plan)
        for k in range(args.clients)
    }
    # Pooled: one adapter, the same rows, steps as large as a stacked step over all clients.
    whole = {
        "pooled": Fit(loss, technique.init, Subset(data, np.arange(rows)), {}, plan._replace(batch=args.batch * args.clients))
    }
    workers = Workers(technique.bind, 1, device, group=args.clients)
    sides = {"alone": (fits, False), "pooled": (whole, False), "stacked": (fits, True)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 1):
        for name, (asks, stacked) in sides.items():
            begun = time.perf_counter()
            answer(asks, workers, lambda client: stream(0, client), stacked)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:
                seconds[name].append(time.perf_counter() - begun)
    return {name: rows / statistics.median(found) for name, found in seconds.items()}


if __name__ == "__main__":
    main()
