"""`template`: a discrete prompt. Words around the text and words for the classes; nothing is trained, the tree is readable.

A tree is
    template       text with the slot {text}: what the model reads
    labels         a text a class (classification); alternatives are separated by ";"
    shown          solved examples, as texts; shown_labels: their classes (numbers)
Sentence encoders (any checkpoint that is not a causal model): logit = scale * cos(embedding of the filled template, mean embedding
of the class's texts and of the examples shown for it), embeddings being means over the tokens. Causal models: logit = mean log
probability a token of the class's text after the filled template, the best of its alternatives; examples stand before it, solved.
Language data: the words before the slot stand before every text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtailor import wire
from fedtailor.backbone import CAUSAL, Backbone, fork, positions
from fedtailor.core import Batch, Forward, Tree
from fedtailor.errors import ConfigError
from fedtailor.techniques.base import Technique, pooled

SLOT = "{text}"
ROOM = 16  # tokens that must be left to a text
CACHED = 4096  # embedded class texts that a worker keeps


def template(
    backbone: Backbone,
    template: str = SLOT,
    labels: list[str] = [],  # noqa: B006 (never written to)
    examples: list[list[str]] = [],  # noqa: B006
    scale: float = 20.0,
) -> Technique:
    """A discrete prompt: a template with the slot {text}, a text a class, solved examples; found by prompt-search, or as given."""
    if backbone.kind == "image":
        raise ConfigError("technique 'template' needs texts: use 'prefix' or 'head' for images")
    classes = backbone.labels if backbone.kind == "text" else []
    init = tree(template, labels or [readable(name) for name in classes], examples, classes)
    words = Words(backbone.processor)
    limit = positions(backbone)
    taken = words.taken(init)
    if limit is not None and taken + ROOM > limit:
        raise ConfigError(f"technique.template and its examples take {taken} of the model's {limit} positions: make them shorter")

    def save(tree: Tree, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"model": backbone.source, "classes": backbone.labels, **tree}, indent=1, ensure_ascii=False)
        wire.atomically(folder / "prompt.json", lambda path: path.write_text(text, encoding="utf-8"))

    def merge(tree: Tree, folder: Path) -> None:
        raise ConfigError("a template cannot be merged into the weights: export it without --merge")

    def resized(size: int) -> Tree:
        raise ConfigError("clients.ranks and clients.lengths: a template has neither")

    def bind(dropout: bool = False) -> Forward:
        return _forward(fork(backbone.model).train(dropout), backbone, words, scale, room)

    def passes(trees: Sequence[Tree]) -> int:
        """A sentence encoder reads a text once for a template; a causal model also once for each class text of several tokens."""
        if not is_causal(backbone.model) or backbone.kind != "text":
            return len({t["template"] for t in trees})
        told = [(tuple(words.solved(t)), t["template"], words.answers(t)) for t in trees]
        long = [any(len(tokens) > 1 for texts in answers for tokens in texts) for _, _, answers in told]
        read_once = {(solved, text) for (solved, text, _), several in zip(told, long, strict=True) if not several}
        return len(read_once) + sum(
            sum(map(len, answers)) for (_, _, answers), several in zip(told, long, strict=True) if several
        )

    room = len(words.pieces(init).before) + ROOM  # tokens before a text of language data: a search may add some
    takes = room if backbone.kind != "text" else 0
    return Technique("template", backbone, init, resized, bind, save, merge, passes=passes, takes=takes)


def readable(label: str) -> str:
    """A class name as words: "card_arrival" and "cardArrival" are "card arrival"."""
    spaced = "".join(f" {c}" if c.isupper() and i and label[i - 1].islower() else c for i, c in enumerate(label))
    return " ".join(spaced.replace("_", " ").replace("-", " ").replace(".", " ").split()) or label


def tree(template: str, labels: list[str], examples: list[list[str]], classes: list[str]) -> Tree:
    """A checked tree.

    Raises:
        ConfigError: no slot or more than one, not one text a class, an empty one, an example that is not [text, class].
    """
    if template.count(SLOT) != 1:
        raise ConfigError(f"technique.template '{template}' needs the slot {SLOT} exactly once")
    if len(labels) != len(classes):
        raise ConfigError(f"technique.labels has {len(labels)} texts for {len(classes)} classes ({', '.join(classes[:5])} ...)")
    if not all(alternatives(text) for text in labels):
        raise ConfigError("technique.labels: a class's text is empty: write what its texts are about")
    for example in examples:
        if len(example) != 2 or example[1] not in classes:
            raise ConfigError(f"technique.examples: {example!r} is not [text, class] with one of the classes")
    return {
        "template": template,
        "labels": list(labels),
        "shown": [text for text, _ in examples],
        "shown_labels": [classes.index(label) for _, label in examples],
    }


def alternatives(label: str) -> list[str]:
    return [part.strip() for part in label.split(";") if part.strip()]


class Pieces(NamedTuple):
    """A tree as tokens."""

    before: list[int]
    after: list[int]


class Words:
    """Texts to tokens, each once."""

    def __init__(self, processor: Any) -> None:
        plain, full = (processor("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        self.opening = full.index(plain[0]) if plain and plain[0] in full else 0
        self.closing = len(full) - self.opening - len(plain)
        self.ends = (full[: self.opening], full[len(full) - self.closing :])
        self.pad = processor.pad_token_id or 0
        tokens = [processor(text, add_special_tokens=False)["input_ids"] for text in ("a b", "a", "b")]
        self.spaced = tokens[0] != tokens[1] + tokens[2]  # the space between words is a part of a token
        self.tokens: Callable[[str], list[int]] = functools.lru_cache(CACHED)(
            lambda text: list(processor(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        )

    def pieces(self, tree: Mapping[str, Any]) -> Pieces:
        """What stands before and after the text. Examples, for causal models, stand before everything else."""
        before, after = tree["template"].split(SLOT)
        # The text is tokenized already, without the space before it: where spaces count, the template keeps its own.
        return Pieces(self.tokens(before if self.spaced else before.strip()), self.tokens(after.rstrip()))

    def solved(self, tree: Mapping[str, Any]) -> list[int]:
        """The examples, filled in and solved, for a model that reads on."""
        texts = [
            tree["template"].replace(SLOT, text).rstrip() + " " + alternatives(tree["labels"][label])[0]
            for text, label in zip(tree["shown"], tree["shown_labels"], strict=True)
        ]
        return self.tokens("\n\n".join(texts) + "\n\n") if texts else []

    def answer(self, after: str, text: str) -> list[int]:
        """The tokens of a class's text where it follows `after`: tokenizers treat a word's first letter by what is before it."""
        return self.following(after.rstrip() or "a", f" {text}")

    def following(self, before: str, text: str) -> list[int]:
        """The tokens that `text` adds to those of `before`; its own where they would change."""
        known, whole = self.tokens(before), self.tokens(before + text)
        return whole[len(known) :] if whole[: len(known)] == known and len(whole) > len(known) else self.tokens(text.strip())

    def answers(self, tree: Mapping[str, Any]) -> list[list[list[int]]]:
        """For each class the tokens of each of its alternatives."""
        read = tree["template"].split(SLOT)[1]
        return [[self.answer(read, text) for text in alternatives(label)] for label in tree["labels"]]

    def taken(self, tree: Mapping[str, Any]) -> int:
        before, after = self.pieces(tree)
        longest = max((len(self.tokens(part)) for label in tree["labels"] for part in alternatives(label)), default=0)
        return len(before) + len(after) + len(self.solved(tree)) + longest + self.opening + self.closing


def _forward(own: nn.Module, backbone: Backbone, words: Words, scale: float, room: int) -> Forward:
    limit = positions(backbone)
    device = next(own.parameters()).device

    def spliced(batch: Batch, before: list[int], after: list[int], more: int = 0) -> tuple[Tensor, Tensor]:
        """The batch with tokens before and after each text; a text too long for the model gives way at its end.

        Returns (input_ids, attention_mask), both (batch, width); `more`: positions to be left free after that.
        """
        ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
        a, b, c = words.opening, len(before), words.closing
        bodies = (lengths - a - c).clamp_min(0)
        if limit is not None:
            # A search may grow a prompt beyond the model: its beginning, the first examples, goes first.
            before = before[max(0, a + len(before) + len(after) + c + more + ROOM - limit) :]
            b = len(before)
            bodies = bodies.clamp_max(max(limit - a - b - len(after) - c - more, 1))
        head = torch.tensor([*words.ends[0], *before], device=ids.device).expand(len(ids), -1)
        tail = torch.tensor([*after, *words.ends[1]], device=ids.device).expand(len(ids), -1)
        parts = torch.cat([head, ids[:, a : a + int(bodies.max())], tail], 1)
        width = parts.shape[1]
        place = torch.arange(width, device=ids.device).expand(len(ids), -1)
        end = (a + b + bodies)[:, None]
        # Where the text ends, the tail begins; what lies between them in `parts` is padding.
        gap = width - tail.shape[1] - end
        total = end + tail.shape[1]
        source = torch.where(place < end, place, (place + gap).clamp_max(width - 1))
        mask = (place < total).long()
        return torch.where(mask.bool(), parts.gather(1, source.long()), words.pad).to(device), mask.to(device)

    def embedded(ids: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = own.base_model(input_ids=ids, attention_mask=mask).last_hidden_state  # type: ignore[operator,union-attr]
        return pooled(hidden.float(), mask)

    @functools.lru_cache(CACHED)
    @torch.no_grad()
    def meaning(text: str) -> Tensor:
        ids = [*words.ends[0], *words.tokens(text)[: (limit or 512) - 4], *words.ends[1]]
        row = torch.tensor([ids], device=device)
        return embedded(row, torch.ones_like(row))[0]

    kept: dict[Any, Tensor] = {}

    def once(batch: Batch, key: Any, read: Callable[[], Tensor]) -> Tensor:
        """What was read from this very batch for this key before, or is read now: a search judges many class texts in a row."""
        mine = (id(batch["input_ids"]), key)
        if mine not in kept:
            kept.clear()
            kept.update({mine: read(), "alive": batch["input_ids"]})  # while it is kept nothing else can have its id
        return kept[mine]

    def similar(params: Tree, batch: Batch) -> Tensor:
        before, after = words.pieces(params)
        filled = [params["template"].replace(SLOT, text) for text in params["shown"]]
        shown = list(zip(filled, params["shown_labels"], strict=True))
        classes = [
            torch.stack([meaning(t) for t in [*alternatives(label), *(text for text, k in shown if k == i)]]).mean(0)
            for i, label in enumerate(params["labels"])
        ]
        texts = once(batch, params["template"], lambda: embedded(*spliced(batch, before, after)))
        cosine: Tensor = texts @ F.normalize(torch.stack(classes), dim=-1).T
        return scale * cosine

    def likely(params: Tree, batch: Batch) -> Tensor:
        before, after = words.pieces(params)
        before = [*words.solved(params), *before]
        answers = words.answers(params)
        if all(len(tokens) == 1 for texts in answers for tokens in texts):

            def next_token() -> Tensor:
                ids, mask = spliced(batch, before, after)
                last = (mask.sum(1) - 1 - words.closing).view(-1, 1, 1)
                logits = own(input_ids=ids, attention_mask=mask).logits.float()
                at_last: Tensor = logits.gather(1, last.expand(-1, 1, logits.shape[-1]))
                return at_last[:, 0].log_softmax(-1)

            told: Tensor = once(batch, (tuple(before), tuple(after)), next_token)
            return torch.stack([told[:, [t[0] for t in texts]].amax(1) for texts in answers], 1)
        return torch.stack([torch.stack([score(batch, before, after, t) for t in texts]).amax(0) for texts in answers], 1)

    def score(batch: Batch, before: list[int], after: list[int], answer: list[int]) -> Tensor:
        """Mean log probability of the answer's tokens, (batch,)."""
        ids, mask = spliced(batch, before, [*after, *answer])
        ends = mask.sum(1) - words.closing
        logits = own(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        places = ends[:, None] - len(answer) + torch.arange(len(answer), device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)[:, None]
        told: Tensor = logits[rows, places - 1, ids[rows, places]]
        return told.mean(1)

    def read_on(params: Tree, batch: Batch) -> Tensor:
        before, _ = words.pieces(params)
        before = before[-room:]
        ids = torch.cat([torch.tensor(before, device=device).expand(len(batch["input_ids"]), -1), batch["input_ids"]], 1)
        seen = torch.cat([batch["attention_mask"].new_ones(len(ids), len(before)), batch["attention_mask"]], 1)
        logits: Tensor = own(input_ids=ids.long(), attention_mask=seen).logits
        return logits.float()

    if backbone.kind != "text":
        return read_on
    return likely if is_causal(own) else similar


def is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith(CAUSAL)
