"""Whether the main job can run on this machine, and what it offers."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import Any


def examine() -> list[dict[str, Any]]:
    """[{name, ok, found}], each checked for real: the embedded model is loaded, a product is timed."""
    import torch

    from fedtailor.folder import environment

    here = environment()
    checks = [
        {"name": "python", "ok": (3, 11) <= sys.version_info[:2] <= (3, 13), "found": f"{here['python']} (3.11 to 3.13)"},
        {"name": "packages", "ok": True, "found": ", ".join(f"{k} {v}" for k, v in here["packages"].items())},
        {"name": "cpu", "ok": True, "found": f"{here['cpus']} threads, {torch.backends.cpu.get_cpu_capability()}"},
        {"name": "gpu", "ok": True, "found": here["cuda"] or "none: the CPU is used"},
        {"name": "bf16", "ok": True, "found": _precision("cuda" if here["cuda"] else "cpu")},
        {"name": "disk", "ok": True, "found": f"{shutil.disk_usage(Path.cwd()).free / 1e9:.0f} GB free here"},
    ]
    checks.append(_model())
    return checks


def _precision(device: str) -> str:
    ratio = bf16_speed(device)
    advice = "engine.precision = bf16 pays here" if ratio > 1.1 else "keep engine.precision = fp32 here"
    return f"{ratio:.1f} x the speed of fp32: {advice}"


def bf16_speed(device: str) -> float:
    """Over fp32's, by timing a product in both: without hardware for it, bf16 is many times slower."""
    import torch

    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512, device=device, dtype=dtype)
        for _ in range(2):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(5):
            a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[dtype] = time.perf_counter() - begun
    return seconds[torch.float32] / seconds[torch.bfloat16]


def _model() -> dict[str, Any]:
    from fedtailor.backbone import load
    from fedtailor.config import ModelSection
    from fedtailor.errors import FedtailorError

    try:
        backbone = load(ModelSection(), "text", ["a", "b"])
    except (FedtailorError, ImportError) as error:
        return {"name": "model", "ok": False, "found": f"the embedded model does not load: {error}"}
    count = sum(p.numel() for p in backbone.model.parameters())
    return {"name": "model", "ok": True, "found": f"minilm loads ({count / 1e6:.1f} M numbers)"}
