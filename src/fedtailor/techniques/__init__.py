"""Techniques: how a small tree of tensors bends the frozen backbone. `TECHNIQUES` is the one registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtailor.techniques.base import Technique
from fedtailor.techniques.colora import colora
from fedtailor.techniques.full import full
from fedtailor.techniques.mixture import with_experts
from fedtailor.techniques.peft import head, ia3, lora, peft, prefix, prompt
from fedtailor.techniques.retriever import retriever
from fedtailor.techniques.template import template

_ALONE: Mapping[str, Callable[..., Technique]] = {
    "colora": colora,
    "full": full,
    "head": head,
    "ia3": ia3,
    "lora": lora,
    "peft": peft,
    "prefix": prefix,
    "prompt": prompt,
    "retriever": retriever,
    "template": template,
}
TECHNIQUES: Mapping[str, Callable[..., Technique]] = {kind: with_experts(make) for kind, make in _ALONE.items()}

__all__ = ["TECHNIQUES", "Technique"]
