"""The peak of memory is that of a run, also of the second one in a process."""

from __future__ import annotations

import sys

import pytest
import torch

from fedtailor.ledger import forget_peak, peak_memory


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="resident memory is reset on Linux only")
def test_a_peak_that_is_over_is_forgotten() -> None:
    forget_peak()
    before = peak_memory()
    large = torch.ones(40_000_000)
    assert peak_memory() - before > 140e6
    del large
    forget_peak()
    if peak_memory() - before > 140e6:
        pytest.skip("this system does not let a process reset its peak")
    assert peak_memory() - before < 40e6
