"""A frozen causal model that reads retrieved passages: it says how likely an answer is, or writes one.

A prompt is the passages, the nearest last, and then the question. The passages that are furthest are left out where the model has too
few positions for all; a question that is too long even alone loses its beginning, and an answer may take half of the positions.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor.backbone import CAUSAL, Backbone, load, positions
from fedtailor.config import ModelSection
from fedtailor.core import Reader, Told
from fedtailor.errors import ConfigError, DataError
from fedtailor.techniques.template import Words, readable


def reader(name: str, encoder: Backbone, new_tokens: int) -> Reader:
    """The causal model `name`, on the encoder's device and in its precision, as what reads the encoder's passages.

    Raises:
        ConfigError: there is no such model, it cannot be loaded, or it is no causal model; `new_tokens` is less than 1.
    """
    if new_tokens < 1:
        raise ConfigError(f"technique.new_tokens must be at least 1 (got {new_tokens})")
    weight = next(encoder.model.parameters())
    try:
        backbone = load(ModelSection(name=name), "language", [], device=str(weight.device), dtype=weight.dtype)
    except DataError as error:
        raise ConfigError(f"technique.generator: {error}") from error
    model: Any = backbone.model
    known = model.config.architectures or []  # as the checkpoint has it: other models are given a head of noise
    if not any(architecture.endswith(CAUSAL) for architecture in known):
        raise ConfigError(
            f"technique.generator '{name}' is no causal model ({', '.join(known) or 'it does not say what it is'}): "
            "name one that continues texts"
        )
    words = Words(backbone.processor)
    # Positions that are computed have no table: what the model was made for is the bound then, if it says so.
    limit = positions(backbone) or getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize
    longest = limit // 2  # that an answer may be

    def prompt(passages: Sequence[str], question: str, answer: int) -> list[int]:
        """Its tokens, with room for so many of an answer."""
        for count in range(len(passages), -1, -1):
            ids = [*words.ends[0], *words.tokens("".join([*reversed(passages[:count]), question]))]
            if len(ids) + answer <= limit:
                return ids
        return [*words.ends[0], *ids[len(ids) + answer + words.opening - limit :]]

    @torch.no_grad()
    def score(passages: Sequence[str], question: str, answers: Sequence[str]) -> list[Told]:
        tails = [words.following(question, answer)[:longest] for answer in answers]
        width = max(map(len, tails), default=0)
        if not width:
            return [Told(0.0, 0, 0) for _ in answers]
        ids = torch.tensor([prompt(passages, question, width)], device=model.device)
        table = torch.tensor([[*tail, *[words.pad] * (width - len(tail))] for tail in tails], device=model.device)
        read = model(input_ids=ids, use_cache=True)
        chances = read.logits[:, -1:].expand(len(tails), -1, -1)
        if width > 1:  # the prompt is read once for all answers
            read.past_key_values.batch_repeat_interleave(len(tails))
            chances = torch.cat([chances, model(input_ids=table[:, :-1], past_key_values=read.past_key_values).logits], 1)
        chances = chances.float().log_softmax(-1)
        found: Tensor = chances.gather(2, table[..., None])[..., 0]
        hits = chances.argmax(-1) == table
        return [
            Told(-float(found[i, :size].double().sum()), size, int(hits[i, :size].sum()))
            for i, size in enumerate(map(len, tails))
        ]

    def write(passages: Sequence[str], question: str) -> str:
        most = min(new_tokens, longest)
        return greedy(model, backbone.processor, prompt(passages, question, most), most)

    def text(tokens: list[int]) -> str:
        return str(encoder.processor.decode(tokens, skip_special_tokens=True))

    return Reader([readable(label) for label in encoder.labels] if encoder.kind == "text" else [], text, score, write)


def greedy(model: Any, tokenizer: Any, ids: Sequence[int], most: int) -> str:
    """The likeliest continuation of these tokens, token by token, at most so many."""
    asked = torch.tensor([list(ids)], device=model.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT, of what transformers gives it
        out = model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    return str(tokenizer.decode(out[0, asked.shape[1] :], skip_special_tokens=True))
