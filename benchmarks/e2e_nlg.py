"""E2E NLG: sentences from meaning representations, BLEU of models that were customized split and unsplit.

    pip install sacrebleu
    python benchmarks/e2e_nlg.py [--model runs/e2e_gpt2] [--epochs 3] [--rounds 3]

A GPT-2 of 4 layers, width 192 and about 2,000 tokens is trained from scratch on the coffee shops of E2E (src1_valid.txt), and
kept: where the folder `--model` holds a model, that one is used. It is then customized to pubs, which none of its meanings name
(src1_test.txt has them): the meaning representations of pubs are divided, two of three go to three clients by the area, and one of
three, with all of its sentences as references, is the test set. Each client's LoRA is trained twice: split by
experiments/e2e_nlg.toml (one layer at each end at the client, no alignment), and as the uncut model on the same batches. Prints a
markdown table of corpus BLEU (sacrebleu) of greedy texts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedtailor.backbone import quiet
from fedtailor.config import Experiment, load
from fedtailor.core import Plan, Tree, seed_of, stream
from fedtailor.data.encode import PROMPT, encode
from fedtailor.data.examples import Subset
from fedtailor.data.readers import table
from fedtailor.data.sources import Rows
from fedtailor.engines.batches import batches
from fedtailor.engines.splitting import slope
from fedtailor.folder import reopen
from fedtailor.optimizers import fresh, learning_rate, stepped
from fedtailor.predict import tree_of
from fedtailor.run import run
from fedtailor.simulation import World, build

HERE = Path(__file__).parents[1]
DATA = Path(os.environ.get("FEDTAILOR_DATA", HERE.parent / "shared" / "data")) / "e2e"
END = "<|endoftext|>"
LONGEST = 128  # tokens of a row, prompt and sentence
NEW = 80  # tokens that a text has at most: a sentence of E2E has 27 words in the mean
GROUP = 32  # texts that are generated together

Row = tuple[str, str]  # (meaning representation, one sentence for it)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=HERE / "runs" / "e2e_gpt2", help="a Hugging Face folder, made where it is missing"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of the model's own training")
    parser.add_argument("--rounds", type=int, default=3, help="of customization, one pass each")
    asked = parser.parse_args()
    require_sacrebleu()
    shops, others = (rows_of(DATA / f"src1_{name}.txt") for name in ("valid", "test"))
    if not (asked.model / "config.json").is_file():
        begun = time.perf_counter()
        loss = pretrained(asked.model, shops, asked.epochs)
        print(f"{asked.model.name}: last pass's loss {loss:.3f} nats a token, {time.perf_counter() - begun:.0f} s", flush=True)
    train, test = divided([row for row in others if field(row[0], "Type") == "pub"])
    with tempfile.TemporaryDirectory() as folder:
        experiment = customization(asked.model, train, test, Path(folder), asked.rounds)
        compare(experiment, asked.model, references(test), Path(folder))


def require_sacrebleu() -> None:
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise SystemExit("this benchmark scores with sacrebleu: pip install sacrebleu") from None


# --- Data


def rows_of(path: Path) -> list[Row]:
    if not path.is_file():
        raise SystemExit(f"{path} is not there: put E2E's files there, or set FEDTAILOR_DATA to the folder that holds e2e")
    columns = table(path)
    return list(zip(columns["instruction"], columns["response"], strict=True))


def field(meaning: str, name: str) -> str | None:
    """The value of a slot of `name : The Mill | Type : pub`."""
    return dict(part.strip().split(" : ", 1) for part in meaning.split("|") if " : " in part).get(name)


def divided(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """(train, test): one of three meaning representations, with all of its sentences, is for testing."""
    held = {meaning for meaning, _ in rows if seed_of(0, "e2e", meaning) % 3 == 0}
    return [row for row in rows if row[0] not in held], [row for row in rows if row[0] in held]


def references(rows: Sequence[Row]) -> dict[str, list[str]]:
    """All sentences of each meaning representation, one or many."""
    found: dict[str, list[str]] = {}
    for meaning, sentence in rows:
        found.setdefault(meaning, []).append(sentence)
    return found


# --- The small model


def pretrained(folder: Path, rows: Sequence[Row], epochs: int) -> float:
    """Train a GPT-2 from scratch on prompts and sentences, every token a target, and save it with its tokenizer.

    Returns the mean loss of the last pass, nats a token.
    """
    texts = [PROMPT.format(instruction=meaning) + sentence for meaning, sentence in rows]
    with quiet():
        tokenizer = tokenizer_of(texts)
        torch.manual_seed(0)
        model = small_gpt2(tokenizer).train()
        store = encode(Rows({"text": texts}), "language", tokenizer, LONGEST)
        data, plan = Subset(store, range(store.rows)), Plan(epochs=epochs, batch=16, lr=2e-3, schedule="cosine")
        order = batches(plan, data.lengths, stream(0, "e2e"))
        losses: list[float] = []
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        for step, chosen in enumerate(order):
            loss = model(**data.batch(chosen, int(data.lengths[chosen].max()), len(chosen))).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(plan, step, len(order)) * min(1.0, (step + 1) / 50)  # warm-up
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    last = losses[-(len(order) // epochs) :]
    return sum(last) / len(last)


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A byte-level BPE of these texts: nothing is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=[END], initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, bos_token=END, unk_token=END, pad_token=END, model_max_length=2 * LONGEST
    )


def small_gpt2(tokenizer: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    # A few passes need no dropout; the activation is GPT-2's, in one kernel.
    quick = {**dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0), "activation_function": "gelu_pytorch_tanh"}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=2 * LONGEST, n_embd=192, n_layer=4, n_head=6, **ends, **quick)
    return GPT2LMHeadModel(config)


# --- Split and unsplit


def customization(model: Path, train: Sequence[Row], test: Sequence[Row], folder: Path, rounds: int) -> Experiment:
    """experiments/e2e_nlg.toml with the small model, and these rows: a client an area."""
    for name, rows in (("train", train), ("test", test)):
        lines = [{"instruction": m, "response": s, "client": field(m, "area") or "no area said"} for m, s in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    keys = [
        f"model.name={model.resolve()}",
        f"data.name={folder / 'train.jsonl'}",
        "data.test=test.jsonl",
        "clients.partition.kind=natural",
        f"rounds={rounds}",
        "train.lr=3e-3",  # so small a model wants a higher rate than GPT-2
    ]
    return load(HERE / "experiments" / "e2e_nlg.toml", keys)


def compare(experiment: Experiment, base: Path, wanted: dict[str, list[str]], folder: Path) -> None:
    """Train each client both ways, generate for the test meaning representations, print the table."""
    run(experiment, folder / "split")
    world, (model, state, states) = build(experiment), reopen(folder / "split")
    before = texts_of(base, None, list(wanted))
    print(f"{sum(map(len, wanted.values()))} references of {len(wanted)} meaning representations")
    print("| client | rows | BLEU base | BLEU unsplit | BLEU split | largest difference of any tensor | texts that differ |")
    print("|---|---|---|---|---|---|---|", flush=True)
    moved: list[float] = []
    for client in sorted(world.clients):
        whole, (_, joined) = trained_unsplit(world, client), tree_of(model, state, states, client)
        world.technique.save(whole, folder / "unsplit" / client)
        unsplit = texts_of(base, folder / "unsplit" / client, list(wanted))
        split = texts_of(base, folder / "split" / "adapter" / "personal" / client, list(wanted))
        scores = " | ".join(f"{bleu(texts, wanted):.2f}" for texts in (before, unsplit, split))
        differ = sum(a != b for a, b in zip(unsplit, split, strict=True))
        rows = len(world.clients[client].train)
        print(f"| {client} | {rows} | {scores} | {apart(whole, joined):.1e} | {differ} of {len(split)} |", flush=True)
        moved.append(apart(whole, world.site(client, 0).init))
    print(f"The largest change of any entry by training: {min(moved):.2f} to {max(moved):.2f}. Of the last client, for example:")
    meaning, many = next(iter(wanted.items()))
    for name, text in {"meaning": meaning, "base": before[0], "split": split[0], "a reference": many[0]}.items():
        print(f"  {name}: {text}")


def trained_unsplit(world: World, client: str) -> Tree:
    """The client's tree after all rounds on the uncut model: the batches of the split run, in their order."""
    plan, forward = world.job.plan, world.technique.bind(False)
    tree, moments = dict(world.site(client, 0).init), Tree()
    for round in range(1, world.experiment.rounds + 1):
        site = world.sites(client, round)
        data = site.data["train"]
        order = batches(plan, data.lengths, site.random("split"))
        for step, rows in enumerate(order):
            batch = data.batch(rows, int(data.lengths[rows].max()), len(rows))
            _, slopes, _ = slope(world.job.loss, forward, tree, batch, {})
            rate = learning_rate(plan.at(round), step, len(order))
            tree, moments = stepped(plan, tree, slopes, moments or fresh(plan, tree), rate)
    return tree


def apart(one: Tree, other: Tree) -> float:
    """The largest difference of any entry of any tensor."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# --- Texts and their score


@torch.no_grad()
def texts_of(base: Path, adapter: Path | None, meanings: Sequence[str]) -> list[str]:
    """Greedy texts of the model in a folder, with a PEFT folder on it or without."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out: list[str] = []
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")  # so that all go on at the same place
        model = AutoModelForCausalLM.from_pretrained(base)
        speaker = (PeftModel.from_pretrained(model, str(adapter)) if adapter else model).eval()
        for start in range(0, len(meanings), GROUP):
            asked = [PROMPT.format(instruction=meaning) for meaning in meanings[start : start + GROUP]]
            given = tokenizer(asked, padding=True, return_tensors="pt", return_token_type_ids=False)
            found = speaker.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            out += tokenizer.batch_decode(found[:, given["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in out]


def bleu(texts: Sequence[str], wanted: dict[str, list[str]]) -> float:
    """Corpus BLEU, 0 to 100, of a text a meaning representation against all of its sentences."""
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, wanted.values()))
    # None: this one has no k-th reference. (sacrebleu's types do not know that it takes it.)
    streams: list[Any] = [[many[k] if k < len(many) else None for many in wanted.values()] for k in range(most)]
    tokenized = BLEU(force=True)  # as E2E's files are, both sides alike: no warning about it
    return float(tokenized.corpus_score(list(texts), streams).score)


if __name__ == "__main__":
    main()
