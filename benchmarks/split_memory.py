"""What a client of split learning needs, planned and measured: it holds a front and a back, LoRA of rank 8, and nothing else.

    python benchmarks/split_memory.py [--steps 4]

Each measurement is a process of its own. It loads the client's parts from safetensors, by name, and steps: through the front, slope at the
back, back through the front, two steps of AdamW, with random tensors where the server's answers would be. Measured: the highest resident
memory (VmHWM) less what was resident before, after a warm-up on a tiny model of the same family. Once with an allocator that gives freed
blocks back to the system, which is what the plan tells, and once with `memory.keep`, as runs have it: what is freed is kept, with gaps.
MiniLM (6 layers, batch 8 x 64) and a random model of GPT-2's size (12 layers, batch 4 x 64); prints a markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedtailor import memory
from fedtailor.attention import register
from fedtailor.backbone import Backbone, locate, quiet
from fedtailor.core import HIDDEN, Job, Loss, Plan, Tree
from fedtailor.cut import partial_class, parts
from fedtailor.engines.splitting import back, slope, through
from fedtailor.losses import classification, language
from fedtailor.optimizers import stepped
from fedtailor.part_costs import both_ends, costed
from fedtailor.techniques import TECHNIQUES
from fedtailor.techniques.parts import layers, on_part

PLAN = Plan(lr=1e-3)
MAKE = functools.partial(TECHNIQUES["lora"], rank=8)


class Case(NamedTuple):
    title: str
    kind: str
    loss: Loss
    batch: tuple[int, int]
    fronts: tuple[int, ...]
    named: int  # the front of the cut that is the target

    def cls(self) -> Any:
        from transformers import BertForSequenceClassification, GPT2LMHeadModel

        return BertForSequenceClassification if self.kind == "text" else GPT2LMHeadModel

    def config(self, **sizes: Any) -> Any:
        from transformers import BertConfig, GPT2Config

        return BertConfig(**sizes) if self.kind == "text" else GPT2Config(**sizes)


CASES = {
    "minilm": Case("MiniLM, 6 layers, 8 x 64", "text", classification, (8, 64), (0, 1, 2, 3, 4), 1),
    "gpt2": Case("GPT-2 size, 12 layers, 4 x 64", "language", language, (4, 64), (0, 2, 6, 10), 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--client", nargs=4, metavar=("CASE", "FOLDER", "FRONT", "KEEPS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)  # about calls between third parties
    if asked.client:
        case, folder, front, keeps = asked.client
        memory.keep() if keeps == "keeps" else give_back()
        print(json.dumps(client(CASES[case], folder, int(front), asked.steps)))
        return
    print("| model | cut | planned, MB | measured, MB | difference | measured with `memory.keep`, MB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        for name, case in CASES.items():
            folder = locate("minilm") if name == "minilm" else made(case, Path(temporary) / name)
            for front, planned in plans(case, folder).items():
                line = [sys.executable, __file__, "--steps", str(asked.steps), "--client", name, folder, str(front)]
                measured, kept = measure([*line, "gives-back"]), measure([*line, "keeps"])
                cut = f"{front} \\| {depth(case, folder) - front - 1} \\| 1"
                shown = f"**{cut}**" if front == case.named else cut
                difference = 100 * (planned / measured - 1)
                numbers = f"{planned / 1e6:.1f} | {measured / 1e6:.1f} | {difference:+.1f} % | {kept / 1e6:.1f}"
                print(f"| {case.title} | {shown} | {numbers} |", flush=True)


def made(case: Case, folder: Path) -> str:
    """A random model of GPT-2's size, on disk."""
    torch.manual_seed(0)
    with quiet():
        case.cls()(case.config()).save_pretrained(folder)
    return str(folder)


def depth(case: Case, folder: str) -> int:
    return int(case.config().from_pretrained(folder).num_hidden_layers)


def measure(words: list[str]) -> float:
    printed = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(json.loads(printed.splitlines()[-1])["peak"])


def plans(case: Case, folder: str) -> dict[int, float]:
    """front -> bytes that the client needs, by the plan."""
    whole = Backbone(loaded(case.cls(), folder), words(), case.kind, folder, [])
    technique = MAKE(whole)
    job = Job(case.loss, lambda *_: {}, lambda tree: tree, PLAN)
    over = costed(layers(technique), technique, MAKE, job)
    assert over
    assert over.cost
    found = {}
    for front in case.fronts:
        first, _, last = parts(over.depth, front, 1)
        found[front] = both_ends(over.cost(first, *case.batch), over.cost(last, *case.batch))
    return found


def words() -> Any:
    """In the place of a tokenizer, of which a client needs nothing here."""
    return lambda text, **_: {"input_ids": [5]}


def loaded(cls: Any, folder: str) -> Any:
    with quiet():
        return cls.from_pretrained(folder, attn_implementation=register()).requires_grad_(False).eval()


def client(case: Case, folder: str, front: int, steps: int) -> dict[str, float]:
    """Resident bytes: the peak of a client's steps beyond what was there before."""
    tiny = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "vocab_size": 64, "intermediate_size": 64}
    with tempfile.TemporaryDirectory() as temporary:
        with quiet():
            case.cls()(case.config(**tiny)).save_pretrained(temporary)
        work(case, temporary, 3, 1, 2)
    before = resident()
    memory.forget_peak()
    work(case, folder, depth(case, folder), front, steps)
    return {"before": before, "peak": memory.peak() - before}


def give_back() -> None:
    """Let glibc give every block of 64 kB or more back to the system when it is freed."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(memory.MMAP, 1 << 16)
        libc.mallopt(memory.TRIM, 1 << 17)


def resident() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found.group(1))


def work(case: Case, folder: str, depth: int, front: int, steps: int) -> None:
    """Load the ends, and only them; then steps of split training."""
    first, _, last = parts(depth, front, 1)
    ends = loaded(partial_class(case.cls(), [first, last]), folder)
    for p in ends.parameters():
        p.sum()  # weights are mapped from the file: those never read would not be resident
    hidden, (rows, width) = ends.config.hidden_size, case.batch
    technique = MAKE(Backbone(ends, words(), case.kind, folder, []))
    over = layers(technique)
    assert over
    techniques = [on_part(technique, part, MAKE) for part in (first, last)]
    trees: list[Tree] = [over.part(technique.init, part) for part in (first, last)]
    states: list[Tree] = [{}, {}]
    forwards = [technique.bind(False) for technique in techniques]
    for _ in range(steps):
        inputs = batch_of(ends.config.vocab_size, rows, width)
        labels = inputs["input_ids"] if case.kind == "language" else torch.randint(0, 2, (rows,))
        h1, kept = through(forwards[0], trees[0], inputs)
        answer = torch.randn(rows, width, hidden)
        del h1  # sent
        _, slopes, gradient = slope(case.loss, forwards[1], trees[1], {**inputs, "labels": labels, HIDDEN: answer}, {})
        del answer, gradient  # sent
        trees[1], states[1] = stepped(PLAN, trees[1], slopes, states[1], PLAN.lr)
        if kept.outputs.requires_grad:
            slopes, _ = back(kept, torch.randn(rows, width, hidden))
            trees[0], states[0] = stepped(PLAN, trees[0], slopes, states[0], PLAN.lr)
        del kept, slopes


def batch_of(vocabulary: int, rows: int, width: int) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (rows, width))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


if __name__ == "__main__":
    main()
