"""Edits of discrete prompts: how a search gets from one to the next. All of them are ours; words alone are edited, no weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from fedtailor.core import Job, Tree, seed_of
from fedtailor.techniques.template import SLOT, alternatives

TEMPLATES = (
    SLOT,
    f"{SLOT} It is about:",
    f"This text says: {SLOT}",
    f"{SLOT} In one word:",
    f"What is this? {SLOT}",
    f"{SLOT} All in all, it was",
)
FRAMES = ("{}", "This is about {}.", "a {} text", "It is {}.", "an example of {}", "The topic is {}.", "The opinion is {}.")
MOST = 6  # alternatives that a class's text may have


class Edits:
    """Edits of prompts, drawn from a stream of their own for each turn of the search."""

    def __init__(self, job: Job, templates: Sequence[str], descriptions: Sequence[Sequence[str]], start: Tree, turn: int) -> None:
        self.similar, self.templates, self.descriptions, self.start = job.similar, templates, descriptions, start
        self._draw = torch.Generator().manual_seed(seed_of(job.seed, "edits", turn))
        self.words = sorted({word for text in (*templates, *(t for d in descriptions for t in d)) for word in _plain(text)})

    def below(self, count: int) -> int:
        return int(torch.randint(count, (1,), generator=self._draw))

    def one(self, options: Sequence[Any]) -> Any:
        return options[self.below(len(options))]

    def child(self, parents: Sequence[Tree]) -> Tree:
        """One parent with one or two edits."""
        prompt: Tree = self.one(parents)
        kinds = [self._other_template, self._template_word]
        kinds += [self._described, self._label_word, self._label_word, self._crossed(parents)] if prompt["labels"] else []
        kinds += [self._example] if self.start["shown"] else []
        for _ in range(1 + self.below(2)):
            edit: Callable[[Tree], Tree] = self.one(kinds)
            prompt = edit(prompt)
        return prompt

    def _other_template(self, prompt: Tree) -> Tree:
        return {**prompt, "template": self.one(self.templates)}

    def _template_word(self, prompt: Tree) -> Tree:
        before, after = prompt["template"].split(SLOT)
        parts = [before, after]
        side = self.below(2) if prompt["labels"] else 0  # language models read what stands before
        parts[side] = self._edited(parts[side])
        return {**prompt, "template": f"{parts[0].strip()} {SLOT} {parts[1].strip()}".strip()}

    def _described(self, prompt: Tree) -> Tree:
        """A class's text as it is given, instead of its own or beside it."""
        k = self.below(len(prompt["labels"]))
        text = self.one(self.descriptions[k]) if self.descriptions[k] else prompt["labels"][k]
        return _with_label(prompt, k, [text] if self.below(2) else [*alternatives(prompt["labels"][k]), text])

    def _label_word(self, prompt: Tree) -> Tree:
        k = self.below(len(prompt["labels"]))
        texts = alternatives(prompt["labels"][k])
        i, deed = self.below(len(texts)), self.below(4)
        if deed == 0 and len(texts) > 1:
            return _with_label(prompt, k, texts[:i] + texts[i + 1 :])
        other = self._edited(texts[i]) or texts[i]
        return _with_label(prompt, k, [*texts, other] if deed == 1 else [*texts[:i], other, *texts[i + 1 :]])

    def _crossed(self, parents: Sequence[Tree]) -> Any:
        def cross(prompt: Tree) -> Tree:
            other = self.one(parents)
            return {**prompt, "labels": [pair[self.below(2)] for pair in zip(prompt["labels"], other["labels"], strict=True)]}

        return cross

    def _example(self, prompt: Tree) -> Tree:
        """One solved example more, or one less."""
        there = list(zip(prompt["shown"], prompt["shown_labels"], strict=True))
        example = self.one(list(zip(self.start["shown"], self.start["shown_labels"], strict=True)))
        there = [e for e in there if e != example] if example in there else [*there, example]
        return {**prompt, "shown": [text for text, _ in there], "shown_labels": [label for _, label in there]}

    def _edited(self, text: str) -> str:
        """A word replaced (by a similar one where the model knows any), put in or taken out."""
        words = text.split()
        i, deed = self.below(len(words) + 1), self.below(3)
        if deed == 0 and len(words) > 1 and i < len(words):
            return " ".join(words[:i] + words[i + 1 :])
        if deed == 1 or i == len(words):
            return " ".join([*words[:i], self.one(self.words), *words[i:]]) if self.words else text
        word = words[i].strip(".,:;!?").lower()
        other = self.one(self.similar(word) or self.words or [word])
        return " ".join([*words[:i], words[i].lower().replace(word, other) if word else other, *words[i + 1 :]])


def children(parents: Sequence[Tree], known: Sequence[Tree], count: int, edits: Edits) -> list[Tree]:
    """Up to so many new prompts: an edit may give what is there already."""
    found = list(known)
    for _ in range(20 * count):
        if len(found) == len(known) + count:
            break
        child = edits.child(parents)
        if child not in found:
            found.append(child)
    return found[len(known) :]


def _with_label(prompt: Tree, k: int, texts: list[str]) -> Tree:
    labels = list(prompt["labels"])
    labels[k] = "; ".join(list(dict.fromkeys(texts))[:MOST])
    return {**prompt, "labels": labels}


def _plain(text: str) -> Iterator[str]:
    return (word for word in (w.strip(".,:;!?").lower() for w in text.replace(SLOT, " ").split()) if word.isalpha())
