"""One exchange over NVIDIA FLARE's calls, there and back, in its simulator: a load as bytes and as tensors.

    PYTHONPATH=benchmarks python benchmarks/flare_calls.py

docs/nvflare.md quotes the table; it is why cargo.py sends tensors from 2 MiB on."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nvflare.collab import collab

SIZES = [1 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
PIECE = 8 << 20
TIMES = 5


class Echo:
    @collab.publish
    def echo(self, load: Any) -> Any:
        return load


class Asker:
    @collab.main
    def main(self, context: Any) -> None:
        rows = [(size, median(context.clients[0], bytes(size)), median(context.clients[0], tensors(size))) for size in SIZES]
        Path(os.environ["FLARE_TABLE"]).write_text(json.dumps(rows), encoding="utf-8")


def tensors(size: int) -> list[torch.Tensor]:
    return [torch.zeros(min(PIECE, size - at), dtype=torch.uint8) for at in range(0, size, PIECE)]


def median(site: Any, load: Any) -> float:
    took = []
    for _ in range(TIMES):
        begun = time.perf_counter()
        site(timeout=300.0).echo(load=load)
        took.append(time.perf_counter() - begun)
    return statistics.median(took[1:])


def job(folder: Path) -> Path:
    controller = {"path": "nvflare.collab.runtime.controller.CollabController", "args": {"server_obj_id": "asker"}}
    executor = {"path": "nvflare.collab.runtime.executor.CollabExecutor", "args": {"client_obj_id": "echo"}}
    files = {
        "meta.json": {"name": "calls", "resource_spec": {}, "min_clients": 1, "deploy_map": {"app": ["@ALL"]}},
        "app/config/config_fed_server.json": {
            "format_version": 2,
            "workflows": [{"id": "controller", **controller}],
            "components": [{"id": "asker", "path": "flare_calls.Asker", "args": {}}],
        },
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["*"], "executor": executor}],
            "components": [{"id": "echo", "path": "flare_calls.Echo", "args": {}}],
        },
    }
    for name, values in files.items():
        path = folder / "calls" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    return folder / "calls"


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        local = folder / "ws" / "local"
        local.mkdir(parents=True)
        (local / "resources.json").write_text(json.dumps({"format_version": 2, "class_allow_list": ["*"]}), encoding="utf-8")
        command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job(folder)), "-w", str(folder / "ws"), "-n", "1"]
        table = folder / "table.json"
        subprocess.run([*command, "-t", "1"], env={**os.environ, "FLARE_TABLE": str(table)}, stdout=sys.stderr, cwd=folder)
        print("| bytes | as bytes, ms | as tensors, ms |\n|---|---|---|")
        for size, small, large in json.loads(table.read_text(encoding="utf-8")):
            print(f"| {size:,} | {1e3 * small:.0f} | {1e3 * large:.0f} |")


if __name__ == "__main__":
    main()
