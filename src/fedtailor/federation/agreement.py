"""What a server and its members must have in common before the first round, and how a difference is told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fedtailor import __version__
from fedtailor.core import SERVER, ClientId
from fedtailor.ends import severed
from fedtailor.federation.frames import Header, said
from fedtailor.simulation import World

WORDS = {
    "version": "its version of fedtailor",
    "backbone": "its backbone (the weights)",
    "kind": "the backbone of its kind (the weights)",
    "tokenizer": "its tokenizer",
    "labels": "its list of labels",
    "public": "its set of public examples",
}


def agreement(world: World, member: ClientId, cut: tuple[int, int] | None = None) -> dict[str, str]:
    """What is compared, short: versions and digests; with a cut, of a whole model's ends, which is all that a member has."""
    own = world.kit(member).backbone
    labels = hashlib.sha256("\x1f".join(world.facts.labels).encode()).hexdigest()
    return {
        "version": __version__,
        "backbone": weights(severed(world.backbone.model, *cut) if cut else world.backbone.model),
        "kind": weights(own.model) + tokens(own.processor) if own is not world.backbone else "",
        "tokenizer": tokens(world.backbone.processor),
        "labels": labels,
        "public": examples(world.sites(SERVER, 0).data.get("public")),
    }


def difference(ours: Mapping[str, str], theirs: Header) -> str:
    """What is not the same, in words; "" if everything is."""
    for name, what in WORDS.items():
        if theirs.get(name) != ours[name]:
            told = f" ({said(theirs.get(name), 20)} there, {ours[name]} here)" if name == "version" else ""
            return f"{what} differs from the server's{told}"
    return ""


def weights(model: nn.Module) -> str:
    """sha256 of the tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def examples(public: Any) -> str:
    """sha256 of public texts as tokens, in their order: members speak of them by number. Of images only how many, as decoders differ in the
    last bit. "" where there are none."""
    if public is None:
        return ""
    digest = hashlib.sha256(f"{public.source.rows}".encode())
    for name, flat in sorted(public.source.ragged.items()):
        digest.update(f"{name} {flat.dtype}\n".encode())
        digest.update(flat.tobytes() + public.source.offsets.tobytes())
    return digest.hexdigest()


def tokens(processor: Any) -> str:
    """sha256 of what turns texts into tokens, or of an image processor's settings."""
    inner = getattr(processor, "backend_tokenizer", None)
    if inner is not None:  # how texts were last cut and padded lies in it too, and is of the last call
        state = json.loads(inner.to_str())
        text = json.dumps({name: x for name, x in state.items() if name not in ("truncation", "padding")})
    else:
        text = processor.to_json_string() if hasattr(processor, "to_json_string") else ""
    if not text:
        text = "\n".join(f"{k} {v}" for k, v in sorted(processor.get_vocab().items(), key=lambda item: item[1]))
    return hashlib.sha256(text.encode()).hexdigest()
