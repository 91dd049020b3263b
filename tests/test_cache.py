"""The engine's cache: bounded, on disk, and as good as the checkpoint says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedtailor.engines.cache import Cache
from tiny import same


def rows(count: int, start: int = 0) -> dict[str, torch.Tensor]:
    return {f"c0/{i}": torch.randn(i + 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(start, start + count)}


def test_what_is_kept_is_recalled_bit_for_bit(tmp_path: Path) -> None:
    cache = Cache()
    cache.lie(tmp_path)
    items = {**rows(3), "half": torch.ones(2, dtype=torch.bfloat16), "none": torch.empty(0, 4)}
    assert cache.keep(items, 1e6)
    assert same(cache.recall([*items, "other"]), items)
    assert cache.keep({"c0/0": torch.zeros(1, 4)}, 1e6)  # what is there stays
    assert same(cache.recall(["c0/0"])["c0/0"], items["c0/0"])


def test_a_full_cache_keeps_what_came_first() -> None:
    cache = Cache()  # nobody said where: a temporary folder
    assert cache.keep(rows(2), 16 * 3)
    assert not cache.keep(rows(1, 2), 16 * 3)
    assert set(cache.recall(rows(3))) == {"c0/0", "c0/1"}


def test_a_killed_run_finds_what_the_checkpoint_says(tmp_path: Path) -> None:
    cache = Cache()
    cache.lie(tmp_path)
    cache.keep(rows(3), 1e6)
    checkpoint = cache.dump()
    cache.keep(rows(2, 3), 1e6)  # after the checkpoint: the kill comes now
    again = Cache()
    again.lie(tmp_path)
    again.load(checkpoint)
    assert same(again.recall(rows(5)), rows(3))
    assert again.dump() == checkpoint
    again.keep(rows(2, 3), 1e6)
    assert same(again.recall(rows(5)), rows(5))


@pytest.mark.parametrize("harm", ["gone", "short", "garbled"])
def test_a_cache_that_is_damaged_is_empty(harm: str, tmp_path: Path) -> None:
    cache = Cache()
    cache.lie(tmp_path)
    cache.keep(rows(3), 1e6)
    told = cache.dump()
    if harm == "gone":
        (tmp_path / "cache.bin").unlink()
    elif harm == "short":
        (tmp_path / "cache.bin").write_bytes(b"1234")
    else:
        (tmp_path / "cache.jsonl").write_text("{]\n{]\n{]\n")
    again = Cache()
    again.lie(tmp_path)
    again.load(told)
    assert not again.recall(rows(3))
    assert again.keep(rows(2), 1e6)
    assert same(again.recall(rows(3)), rows(2))


def test_the_files_go_when_the_run_is_over(tmp_path: Path) -> None:
    cache = Cache()
    cache.lie(tmp_path)
    cache.keep(rows(3), 1e6)
    cache.remove()
    assert not list(tmp_path.iterdir())
