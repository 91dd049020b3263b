"""A run's folder: what lies in it, whether it may be written to, and what it says of its experiment later, wherever it is then."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
import torch

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

from fedtailor import wire
from fedtailor.backbone import EMBEDDED as MODELS
from fedtailor.config import DataSection, Experiment, load, parse
from fedtailor.core import Tree
from fedtailor.data.readers import TABLES
from fedtailor.data.sources import EMBEDDED as DATA
from fedtailor.engines.states import MANIFEST, States
from fedtailor.equip import Facts, Model, equip
from fedtailor.errors import ConfigError, FedtailorError, RunError
from fedtailor.simulation import build

EXPERIMENT, ENVIRONMENT, FACTS = "experiment.toml", "environment.json", "facts.json"
ROUNDS, CLIENTS, SUMMARY = "rounds.jsonl", "clients.csv", "summary.json"


def check_folder(experiment: Experiment, out: Path, resume: bool) -> None:
    """The folder is free, or it holds this very experiment and is to be resumed. A run without a checkpoint is none yet.

    Raises:
        ConfigError: it is a file, or holds something else. RunError: it holds a corrupt checkpoint.
    """
    path = out / EXPERIMENT
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out '{out}' is a file: name a folder")
    begun = path.exists() and (out / "state" / MANIFEST).exists()
    if begun and not resume:
        raise ConfigError(f"'{out}' already holds a run: add --resume to go on with it, or name another --out")
    if begun:
        ours, theirs = plain(experiment), plain(stored(out))
        changed = [k for k in ours | theirs if ours.get(k) != theirs.get(k) and k not in ("rounds", "track")]
        if changed:
            raise ConfigError(f"'{out}' holds another experiment: section '{changed[0]}' differs; name another --out")
        done = States(out / "state").resume()
        if done and done[0] > experiment.rounds:
            raise ConfigError(f"'{out}' is already at round {done[0]}: set rounds to {done[0]} or more, or name another --out")
    elif out.is_dir() and any(out.iterdir()) and not path.exists():
        raise ConfigError(f"--out '{out}' is not empty and holds no run: name another folder")


def make_folder(experiment: Experiment, out: Path) -> None:
    resolved, here = tomli_w.dumps(written(experiment)), {**environment(), "folder": str(out.resolve())}
    try:
        out.mkdir(parents=True, exist_ok=True)
        wire.atomically(out / EXPERIMENT, lambda p: p.write_text(resolved, encoding="utf-8"))
        (out / ENVIRONMENT).write_text(json.dumps(here, indent=1), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to '{out}': {error.strerror}") from error


def record(facts: Facts, out: Path) -> None:
    """Write what the model has to know about the data; where it is written already, the data must still say the same.

    Raises:
        ConfigError: the data changed since the run began.
    """
    path = out / FACTS
    if path.is_file() and (before := _facts(path)) != facts:
        name = next(name for name, was, now in zip(facts._fields, before, facts, strict=True) if was != now)
        raise ConfigError(f"'{out}': the data is no longer what the run began with ({name} differ): name another --out")
    text = json.dumps(facts._asdict(), indent=1)
    wire.atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def facts_of(out: Path) -> Facts:
    """What a run knows of its data.

    Raises:
        RunError: the file is missing or corrupt.
    """
    return _facts(out / FACTS)


def _facts(path: Path) -> Facts:
    try:
        return Facts(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path}: corrupt ({error}): remove it, and the data is read in its place") from error


def plain(experiment: Experiment) -> dict[str, Any]:
    """The resolved experiment as plain values: paths are absolute, and no None (TOML has none).

    Equal experiments have equal values whatever directory they are read in; what may be a hub id stays as it is, unless a
    file or folder of that name is there.
    """

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if v is not None}
        return [strip(v) for v in value] if isinstance(value, list | tuple) else value

    values: dict[str, Any] = strip(experiment.model_dump())
    data, algorithm = values["data"], values["algorithm"]
    for section, key in _models(values):
        folder = Path(section[key]).expanduser()
        if section[key] not in MODELS and (_is_path(section[key]) or folder.is_dir()):
            section[key] = _absolute(folder)
    for key in ("name", "public"):
        name = data.get(key)
        if isinstance(name, str) and name not in DATA and (_is_path(name) or Path(name).expanduser().exists()):
            data[key] = _absolute(Path(name).expanduser())
    test = Path(str(data.get("test", ""))).expanduser()
    if test.suffix.lower() in TABLES and test.is_file():  # else it is beside the data, whose name is absolute
        data["test"] = _absolute(test)
    file, found, function = algorithm["kind"].rpartition(":")
    if found:
        algorithm["kind"] = f"{_absolute(Path(file))}:{function}"
    return values


def _models(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where a model is named, (section, key): the server's, those of kinds of clients that have their own, and a generator."""
    own = [values["model"], *(kind["model"] for kind in values["clients"].get("kinds", []) if "model" in kind)]
    generator = values["technique"].get("generator")
    named = [(values["technique"], "generator")] if generator and isinstance(generator, str) else []
    return [*((section, "name") for section in own), *named]


def written(experiment: Experiment) -> dict[str, Any]:
    """`plain`, to be read as an experiment again: a max_length that nobody asked for is left open, so that it still gives way."""
    values = plain(experiment)
    if "max_length" not in experiment.data.model_fields_set:
        del values["data"]["max_length"]
    return values


def stored(out: Path) -> Experiment:
    """The experiment of a run folder; what was moved or copied together with the folder is named where it is now.

    Raises:
        ConfigError: the file is missing or was altered into something that is no experiment.
    """
    values, now = plain(load(out / EXPERIMENT)), str(out.resolve())
    was = now
    with contextlib.suppress(OSError, ValueError, KeyError):  # an earlier version's, or cut by a kill: taken as not moved
        was = json.loads((out / ENVIRONMENT).read_text(encoding="utf-8"))["folder"]
    named = [*_models(values), *((values["data"], key) for key in ("name", "test", "public"))]
    for section, key in [*named, (values["algorithm"], "kind")]:
        name = str(section.get(key))
        if was != now and os.path.isabs(name):
            moved = os.path.normpath(os.path.join(now, os.path.relpath(name, was)))
            if Path(moved.rpartition(":")[0] if section is values["algorithm"] else moved).exists():
                section[key] = moved
    if values["data"]["max_length"] == DataSection.model_fields["max_length"].default:
        del values["data"]["max_length"]  # earlier versions wrote it out unasked; who asked for it has a run, so it fits
    return parse(values)


def _is_path(name: str) -> bool:
    """Whether this names a file or folder even where there is none: one that is gone is to be reported as that."""
    return name.startswith((".", "~")) or Path(name).suffix.lower() in (*TABLES, ".zip")


def _absolute(path: Path) -> str:
    """The last part stays as it is: a link into the hub's cache has the suffix that its target lacks."""
    return str(path.parent.resolve() / path.name)


def environment() -> dict[str, Any]:
    packages = ("fedtailor", "torch", "transformers", "peft", "datasets", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "packages": {name: metadata.version(name) for name in packages},
    }


def defined(value: Any) -> Any:
    """JSON has no NaN and no infinity: what a diverged model's measures may be is None there."""
    if isinstance(value, dict):
        return {name: defined(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [defined(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def writing(out: Path | None = None) -> Iterator[None]:
    """Turns the operating system's complaints (a full disk, also that of the temporary folder) into one line that says how
    to go on. What a run reads is in memory or in its checkpoint by then: all that is left to fail is writing.

    Without `out` only the temporary folder is written to, and there is nothing to resume.

    Raises:
        RunError: in place of an OSError, or of a library's own exception that tells of one; another process writes to `out`.
    """
    try:
        with _alone(out) if out else contextlib.nullcontext():
            yield
    except FedtailorError:
        raise
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # what libraries in Rust say in exceptions of their own
        if not found and not isinstance(error, OSError):
            raise
        why = os.strerror(int(found[1])) if found else getattr(error, "strerror", None) or error
        file = getattr(error, "filename", None) or out
        where = f"'{file}'" if file else "the temporary folder"
        then = "free space, then --resume" if out else "free space there, or name another folder in TMPDIR"
        raise RunError(f"cannot write to {where}: {why}; {then}") from error


def keep_rounds(path: Path, done: int) -> None:
    """Drop the lines of rounds after the checkpoint: they will be run again."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["round"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break  # a kill cut this line short
    wire.atomically(path, lambda p: p.write_text("".join(line + "\n" for line in kept), encoding="utf-8"))


def checkpoint(out: Path) -> tuple[Experiment, Tree, States]:
    """The experiment, the server's state and the store of a run that has a checkpoint.

    Raises:
        ConfigError: the folder holds no run. RunError: it has no checkpoint yet, or a corrupt one.
    """
    if not (out / EXPERIMENT).is_file():
        raise ConfigError(f"'{out}' is not a run folder (no {EXPERIMENT} in it)")
    if not (out / "state" / MANIFEST).is_file():
        raise RunError(f"'{out}' has no checkpoint yet: run it first")
    experiment, states = stored(out), States(out / "state")
    before = states.resume()
    assert before is not None
    return experiment, before[1], states


def reopen(out: Path) -> tuple[Model, Tree, States]:
    """The model of a finished or interrupted run, without its data: for `predict` and `export`.

    Raises:
        ConfigError: the folder holds no run. RunError: it has no checkpoint yet, or a corrupt one.
    """
    experiment, state, states = checkpoint(out)
    path = out / FACTS
    if not path.is_file():  # a folder of an earlier version: the data still says it
        return build(experiment), state, states
    return equip(experiment, _facts(path)), state, states


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else writes to the folder meanwhile; who is killed holds it no longer."""
    if not fcntl:
        yield
        return
    handle = os.open(out, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another process writes to '{out}': wait until it ends, or name another --out") from error
        yield
    finally:
        os.close(handle)
