"""Rows to tensors, once for everybody: tokens end to end without padding, images as the model's processor wants them."""

from __future__ import annotations

from typing import Any

import torch

from fedtailor.data.examples import IGNORED, Store, store
from fedtailor.data.sources import Rows
from fedtailor.errors import DataError

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_CONTEXT = "### Instruction:\n{instruction}\n\n### Context:\n{context}\n\n### Response:\n"


def encode(rows: Rows, kind: str, processor: Any, max_length: int) -> Store:
    """Encode rows with the columns of sources.py.

    Shapes: input_ids, token_type_ids and a language model's labels are ragged (longer rows are cut to `max_length`); class
    labels are (rows,), pixel_values (rows, channels, height, width).
    """
    if kind == "image":
        return _images(rows, processor)
    pads = {"input_ids": processor.pad_token_id or 0, "token_type_ids": 0, "labels": IGNORED}
    if kind == "text":
        seconds = list(rows["pair"]) if "pair" in rows.column_names else None
        tokens = processor(list(rows["text"]), seconds, truncation=True, max_length=max_length, padding=False)
        columns: dict[str, Any] = {"input_ids": tokens["input_ids"]}
        if seconds and "token_type_ids" in tokens:
            columns["token_type_ids"] = tokens["token_type_ids"]
        pads.pop("labels")
        return store({**columns, "labels": list(rows["label"])}, pads)
    pairs = _instructions(rows) if kind == "instruction" else [("", text) for text in rows["text"]]
    ids, labels = [], []
    end = [processor.eos_token_id] if processor.eos_token_id is not None else []
    prompts = processor([p or " " for p, _ in pairs], padding=False)["input_ids"]
    answers = processor([a for _, a in pairs], padding=False, add_special_tokens=kind == "language")["input_ids"]
    for (prompt, _), before, after in zip(pairs, prompts, answers, strict=True):
        before = before if prompt else []
        row = [*before, *after, *end][:max_length]
        ids.append(row)
        labels.append([*([IGNORED] * len(before)), *after, *end][:max_length])
    return store({"input_ids": ids, "labels": labels}, pads)


def _instructions(rows: Rows) -> list[tuple[str, str]]:
    contexts = rows["context"] if "context" in rows.column_names else [""] * len(rows)
    return [
        ((PROMPT_WITH_CONTEXT if c else PROMPT).format(instruction=i, context=c), r)
        for i, c, r in zip(rows["instruction"], contexts, rows["response"], strict=True)
    ]


def _images(rows: Rows, processor: Any) -> Store:
    pixels = []
    for start in range(0, len(rows), 64):
        try:
            images = [_opened(image).convert("RGB") for image in rows["image"][start : start + 64]]
        except OSError as error:
            raise DataError(f"image in rows {start} to {start + 63} cannot be read: {error}") from error
        pixels.append(processor(images, return_tensors="pt")["pixel_values"])
    columns: dict[str, Any] = {"pixel_values": torch.cat(pixels), "labels": list(rows["label"])}
    return store(columns, {})


def _opened(image: Any) -> Any:
    """A PIL image, or the file of one."""
    from PIL import Image

    return image if isinstance(image, Image.Image) else Image.open(image)
