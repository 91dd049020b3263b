"""What a run takes from the system's memory: its peak, that it keeps what it will need again, and what lies on disk instead."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import re
import resource
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

TRIM, MMAP = -1, -3  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
BLOCK = 1 << 20


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


def zeros(shape: Sequence[int], dtype: torch.dtype, on_disk: bool = False) -> Tensor:
    """Zeros; `on_disk`, in a temporary file that is gone with them: pages of it that are in memory are the system's to take back.

    Raises:
        OSError: the temporary folder has no room.
    """
    size = math.prod(shape) * dtype.itemsize
    if not on_disk or not size:
        return torch.zeros(tuple(shape), dtype=dtype)
    with tempfile.TemporaryFile(prefix="fedtailor-") as file:
        try:
            # A mapped file without its blocks ends the process where the disk is full, and not the call.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                for start in range(0, size, BLOCK):
                    file.write(bytes(min(BLOCK, size - start)))
                file.flush()
        except OSError as error:
            error.filename = tempfile.gettempdir()
            raise
        return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype).view(tuple(shape))


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
