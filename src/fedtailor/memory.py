"""What a run takes from the system's memory: its peak, and that it keeps what it will need again."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from pathlib import Path

import torch

TRIM, MMAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD


def keep() -> None:
    """Let the allocator keep large blocks: each step asks for the same ones, and given back they come as pages to be cleared anew.

    Full fine-tuning on a CPU takes a fifth less time so, for a fifth more memory; LoRA hardly notices either (docs/performance.md).
    Only where the C library is glibc, and for blocks of up to 32 MB.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP, 2**30)
        libc.mallopt(TRIM, 2**31 - 1)


def give_back() -> None:
    """Let the allocator give large blocks back as soon as they are free: a server, which carries models and does not train, and a member with a
    part of a model take no more memory than they hold at the time. Only where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(MMAP, 1 << 16)
        libc.mallopt(TRIM, 1 << 17)


def trim() -> None:
    """Give back what is free between blocks that are not: what carried large messages leaves. Only where the C library is glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def forget_peak() -> None:
    """The highest memory is measured from now on, where the system allows it: runs of one process do not count for each other."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Highest resident memory of this process since `forget_peak`, in bytes; on a GPU, what torch had allocated there at most."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found.group(1)) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
