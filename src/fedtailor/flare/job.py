"""A FLARE job without code: three JSON files that name our two classes and carry the experiment as values."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from fedtailor.config import Experiment, parse
from fedtailor.errors import ConfigError, RunError, first_line
from fedtailor.folder import written
from fedtailor.simulation import OWN, federates

SYNC = 300
"""Seconds in which every site must have loaded our class."""
DONE = "FINISHED:COMPLETED"


def files(experiment: Experiment, sites: Sequence[str] = ()) -> dict[str, str]:
    """Path -> text of the job's files. Without `sites` it runs at all sites that there are.

    Raises:
        ConfigError: the experiment is none for a federation, or needs other sites.
    """
    lines = tomli_w.dumps(written(admissible(experiment))).splitlines()
    count = experiment.clients.count if experiment.data.name == OWN else max(1, len(sites))
    if sites and len(sites) < count:
        raise ConfigError(f"clients.count is {count}, but --sites names {len(sites)}")
    meta: dict[str, Any] = {
        "name": experiment.name,
        "resource_spec": {},
        "min_clients": max(count, len(sites)),
        "deploy_map": {"app": ["server", *sites] if sites else ["@ALL"]},
    }
    if sites:
        meta["mandatory_clients"] = list(sites)
    server = {
        "format_version": 2,
        "workflows": [
            {
                "id": "controller",
                "path": "nvflare.collab.runtime.controller.CollabController",
                "args": {"server_obj_id": "conductor", "sync_task_timeout": SYNC, "max_call_threads": max(100, 4 * count)},
            }
        ],
        "components": [
            {
                "id": "conductor",
                "path": "fedtailor.flare.server.Conductor",
                "args": {"experiment": lines, "digest": digest_of(lines)},
            }
        ],
    }
    client = {
        "format_version": 2,
        "executors": [
            {
                "tasks": ["*"],
                "executor": {
                    "path": "nvflare.collab.runtime.executor.CollabExecutor",
                    "args": {"client_obj_id": "participant", "max_call_threads": 8},
                },
            }
        ],
        "components": [
            {"id": "participant", "path": "fedtailor.flare.site.Participant", "args": {"name": experiment.name}},
        ],
    }
    config = {"app/config/config_fed_server.json": server, "app/config/config_fed_client.json": client}
    return {path: json.dumps(values, indent=1) + "\n" for path, values in {"meta.json": meta, **config}.items()}


def admissible(experiment: Experiment) -> Experiment:
    """The experiment, if a job may carry it.

    Raises:
        ConfigError: its algorithm is a file, which would be code, or as `federates`.
    """
    kind = experiment.algorithm.kind
    if ":" in kind:
        raise ConfigError(f"algorithm.kind '{kind}' is code: a job carries none; install it at the server and the sites")
    federates(experiment)
    return experiment


def opened(lines: Sequence[str], digest: str, sites: Sequence[str]) -> Experiment:
    """The experiment that a job carries, at its server.

    Raises:
        ConfigError: it is not what was submitted, or as `admissible`, or it needs more sites than the job has.
    """
    if digest_of(lines) != digest:
        raise ConfigError("the job's experiment is not what was submitted: braces in its texts name a variable of FLARE")
    experiment = admissible(parse(tomllib.loads("\n".join(lines)), where="the job's experiment"))
    count = experiment.clients.count if experiment.data.name == OWN else 1
    if len(sites) < count:
        raise ConfigError(f"clients.count is {count}, and the job runs at {len(sites)} sites ({', '.join(sites)})")
    return experiment


def digest_of(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def export(experiment: Experiment, folder: Path, sites: Sequence[str] = ()) -> Path:
    """Write the job into `folder`/NAME and return that.

    Raises:
        ConfigError: as `files`; or it is there already and something else. RunError: it cannot be written.
    """
    job, texts = folder / experiment.name, files(experiment, sites)
    if job.exists():
        there = {path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()}
        if there - texts.keys():
            raise ConfigError(f"'{job}' holds something else ({sorted(there - texts.keys())[0]}): name another --export")
    try:
        for name, text in texts.items():
            path = job / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to '{job}': {error.strerror}") from error
    return job


def needed() -> None:
    """Raises:
    ConfigError: the package is not installed.
    """
    try:
        import nvflare.collab  # noqa: F401
    except ImportError as error:
        raise ConfigError("NVIDIA FLARE is an extra: pip install 'fedtailor[nvflare]'") from error


def submit(job: Path, kit: Path, user: str = "", wait: bool = False, notice: Callable[[str], None] = print) -> dict[str, str]:
    """Send a job to FLARE's server as the user of this startup kit; with `wait` until it is over. Returns its id and status.

    Raises:
        ConfigError: it is no kit, or the package is not installed. RunError: the server cannot be reached or refuses; the job failed.
    """
    needed()
    if not (kit / "startup" / "fed_admin.json").is_file():
        raise ConfigError(f"--admin '{kit}' is no startup kit of a FLARE user: there is no startup/fed_admin.json in it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nvflare.fuel.flare_api.flare_api import new_secure_session
    with contextlib.redirect_stdout(sys.stderr):  # FLARE prints what it does
        return _sent(new_secure_session, job, user or kit.resolve().name, kit, wait, notice)


def _sent(
    login: Callable[..., Any], job: Path, user: str, kit: Path, wait: bool, notice: Callable[[str], None]
) -> dict[str, str]:
    """Raises:
    RunError: as `submit`.
    """
    try:
        session = login(user, str(kit.resolve()), timeout=60.0)
    except Exception as error:
        raise RunError(f"FLARE's server cannot be reached or refuses: {first_line(error)}") from error
    try:
        found = {"job": str(session.submit_job(str(job.resolve()))), "status": "SUBMITTED"}
        if wait:
            notice(f"job {found['job']} is submitted")
            _, meta = session.monitor_job_and_return_job_meta(found["job"])
            found["status"] = str(meta["status"])
    except Exception as error:
        raise RunError(f"FLARE's server refuses the job: {first_line(error)}") from error
    finally:
        session.close()
    if wait and found["status"] != DONE:
        raise RunError(f"job {found['job']} ended as {found['status']}: the server's log says why; submit it again to go on")
    return found


def submitted(
    experiment: Experiment, kit: Path, user: str, sites: Sequence[str], wait: bool, notice: Callable[[str], None]
) -> dict[str, str]:
    """Raises: as `export` and `submit`."""
    with tempfile.TemporaryDirectory(prefix="fedtailor-") as folder:
        return submit(export(experiment, Path(folder), sites), kit, user, wait, notice)
