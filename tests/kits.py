"""A consortium that runs NVIDIA FLARE: provisioned kits, its server and sites as processes on the loopback, TLS between them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

ALLOWED = ["fedtailor.flare", "nvflare.collab.runtime"]
"""What every site adds to its `class_allow_list`."""
LEAD = "lead@example.org"
PROJECT = """\
api_version: 3
name: example
participants:
  - {{name: localhost, type: server, org: here, fed_learn_port: {port}, admin_port: {admin}}}
{sites}
  - {{name: {lead}, type: admin, org: here, role: lead}}
builders:
  - path: nvflare.lighter.impl.workspace.WorkspaceBuilder
    args: {{template_file: [master_template.yml]}}
  - path: nvflare.lighter.impl.static_file.StaticFileBuilder
    args: {{config_folder: config}}
  - path: nvflare.lighter.impl.cert.CertBuilder
  - path: nvflare.lighter.impl.signature.SignatureBuilder
"""
SERVER = ["nvflare.private.fed.app.server.server_train", "-s", "fed_server.json"]
SITE = ["nvflare.private.fed.app.client.client_train", "-s", "fed_client.json"]


def provisioned(folder: Path, sites: Iterable[str]) -> Path:
    """The folder of all kits; every site allows our classes."""
    port, admin = _free(), _free()
    lines = "\n".join(f"  - {{name: {site}, type: client, org: here}}" for site in sites)
    (folder / "project.yml").write_text(PROJECT.format(port=port, admin=admin, sites=lines, lead=LEAD), encoding="utf-8")
    command = [sys.executable, "-m", "nvflare.lighter.provision", "-p", "project.yml", "-w", "kits"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    kits = folder / "kits" / "example" / "prod_00"
    assert kits.is_dir(), done.stdout + done.stderr
    for kit in kits.iterdir():
        allow(kit / "local")
    return kits


def allow(local: Path) -> None:
    """What a site's administrator does once: our classes may be named by a job."""
    default = local / "resources.json.default"
    values = json.loads(default.read_text(encoding="utf-8")) if default.is_file() else {"format_version": 2}
    values["class_allow_list"] = [*values.get("class_allow_list", []), *ALLOWED]
    (local / "resources.json").write_text(json.dumps(values), encoding="utf-8")


@contextmanager
def running(kits: Path, environment: Mapping[str, str]) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """The server and the sites, until the block ends."""
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for kit in sorted(kits.iterdir(), key=lambda k: k.name != "localhost"):
            if kit.name != LEAD:
                started[kit.name] = _start(kit, environment)
        yield started
    finally:
        for process in started.values():
            end(process)


def _start(kit: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    words = SERVER if kit.name == "localhost" else SITE
    more = ["--set", "secure_train=true", "org=here", "config_folder=config"]
    if kit.name != "localhost":
        more.insert(2, f"uid={kit.name}")
    with (kit / "out.txt").open("wb") as out:
        command = [sys.executable, "-u", "-m", words[0], "-m", str(kit), *words[1:], *more]
        return subprocess.Popen(command, cwd=kit, env=dict(environment), stdout=out, stderr=out)


def workers(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that a site or the server has started for a job."""
    return psutil.Process(process.pid).children(recursive=True)


def end(process: subprocess.Popen[bytes]) -> None:
    below = workers(process) if process.poll() is None else []
    process.kill()
    process.wait(30)
    for child in below:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def until(what: str, happened: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def told(kits: Path) -> str:
    """The ends of all logs."""
    return "\n".join(
        f"== {log}\n" + "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-40:])
        for log in sorted({*kits.glob("*/out.txt"), *kits.glob("*/*/log.txt")})
    )


def _free() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
