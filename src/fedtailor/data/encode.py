"""Rows to tensors, once for everybody: tokens end to end without padding, images as the model's processor wants them."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from fedtailor.data.examples import IGNORED, Store, store
from fedtailor.data.sources import Rows
from fedtailor.errors import DataError

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_CONTEXT = "### Instruction:\n{instruction}\n\n### Context:\n{context}\n\n### Response:\n"
TAIL = 8  # tokens at the end of a prompt that are never cut: they say that the response comes now


def encode(rows: Rows, kind: str, processor: Any, max_length: int) -> Store:
    """Encode rows with the columns of sources.py.

    Shapes: input_ids, token_type_ids and a language model's labels are ragged (longer rows are cut to `max_length`); class
    labels are (rows,), pixel_values (rows, channels, height, width).

    Raises:
        DataError: an image that cannot be decoded.
    """
    if not len(rows):  # what is elsewhere
        none = {"input_ids": np.zeros(0, dtype=np.int32)} if kind != "image" else {}
        return Store(none, np.zeros(1, dtype=np.int64), {"labels": torch.zeros(0, dtype=torch.long)}, dict.fromkeys(none, 0))
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
    prompts = processor([p or " " for p, _ in pairs], padding=False, verbose=False)["input_ids"]
    answers = processor([a for _, a in pairs], padding=False, verbose=False, add_special_tokens=kind == "language")["input_ids"]
    for (prompt, _), before, after in zip(pairs, prompts, answers, strict=True):
        before = shortened(before, len(after) + len(end), max_length) if prompt else []
        ids.append([*before, *after, *end][:max_length])
        labels.append([*([IGNORED] * len(before)), *after, *end][:max_length])
    return store({"input_ids": ids, "labels": labels}, pads)


def shortened(prompt: list[int], answer: int, max_length: int) -> list[int]:
    """A long prompt loses its middle: up to half a row is the answer's, as a row without an answer teaches nothing."""
    room = max_length - min(answer, max_length // 2)
    if len(prompt) <= room:
        return prompt
    kept = max(room - TAIL, 0)
    return [*prompt[:kept], *prompt[len(prompt) - room + kept :]]


def _instructions(rows: Rows) -> list[tuple[str, str]]:
    contexts = rows["context"] if "context" in rows.column_names else [""] * len(rows)
    return [
        ((PROMPT_WITH_CONTEXT if c else PROMPT).format(instruction=i, context=c), r)
        for i, c, r in zip(rows["instruction"], contexts, rows["response"], strict=True)
    ]


def _images(rows: Rows, processor: Any) -> Store:
    pixels = torch.empty(0)
    for start in range(0, len(rows), 64):
        images = [_opened(image, row) for row, image in enumerate(rows["image"][start : start + 64], start + 1)]
        part = processor(images, return_tensors="pt")["pixel_values"]
        if not start:  # in one piece from the start: joining parts would take the memory twice
            pixels = torch.empty((len(rows), *part.shape[1:]), dtype=part.dtype)
        pixels[start : start + len(part)] = part
    columns: dict[str, Any] = {"pixel_values": pixels, "labels": list(rows["label"])}
    return store(columns, {})


def _opened(image: Any, row: int) -> Any:
    """An RGB image from a PIL image, the path of a file, or the bytes of one with its path (as `datasets` has them)."""
    from PIL import Image

    path, data = (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)
    try:
        if isinstance(image, Image.Image):
            return image.convert("RGB")
        file: Any = path if data is None else io.BytesIO(data)
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except Exception as error:  # broken files fail in many ways
        where = f"'{path}'" if isinstance(path, str) else f"in row {row}"
        raise DataError(f"image {where} cannot be read: {error}") from error
