"""The peak of memory is that of a run, also of the second one in a process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

PEAKS = """
import torch
from fedtailor.memory import forget_peak, peak

forget_peak()
before = peak()
large = torch.ones(40_000_000)
print(peak() - before)
del large
forget_peak()
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="resident memory is reset on Linux only")
def test_a_peak_that_is_over_is_forgotten() -> None:
    """In a process of its own, whose allocator has kept nothing that it could give instead."""
    printed = subprocess.run([sys.executable, "-c", PEAKS], check=True, capture_output=True, text=True).stdout
    during, after = map(float, printed.split())
    assert during > 140e6
    if after > 140e6:
        pytest.skip("this system does not let a process reset its peak")
    assert after < 40e6


FAULTS = """
import resource, torch
from fedtailor.memory import keep

keep()
for _ in range(60):  # the allocator keeps a few in a cache of its own first
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(3_000_000)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is told what to keep")
def test_kept_blocks_come_without_new_pages() -> None:
    """What a step asks for again is there: no page of it is cleared anew. In a process of its own, whose heap nobody has cut up."""
    printed = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True).stdout
    assert int(printed) < 300  # of 2,930 pages
