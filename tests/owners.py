"""Owners of data who federate in this process: a server in a thread, each member in one, lines over the loopback."""

from __future__ import annotations

import queue
import random
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from commands import csv_of
from fedtailor.config import Experiment, parse
from fedtailor.engines.clients import Clients
from fedtailor.federation import member
from fedtailor.federation.doors import Doors
from fedtailor.federation.join import join
from fedtailor.federation.member import Limits, Own
from fedtailor.federation.post import Keys
from fedtailor.federation.serve import serve
from fedtailor.run import Watch, run
from tiny import LABELS, WORDS

_torch = threading.RLock()


def _alone(work: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's random stream and its counter of operations are one for all threads; real members have a process each."""

    def done(*args: Any) -> Any:
        with _torch:
            return work(*args)

    return done


member.of_member, member.build = _alone(member.of_member), _alone(member.build)
_work = Clients.work
Clients.work = _alone(lambda *args: list(_work(*args)))  # type: ignore[method-assign]
NAMES = ("east", "north", "south")
Rows = list[tuple[str, ...]]


def rows_of(name: str, count: int) -> Rows:
    draw = random.Random(name)
    return [(" ".join(draw.choices(WORDS[3:], k=draw.randint(3, 8))), draw.choice(LABELS), name) for _ in range(count)]


class Owners(NamedTuple):
    """Files of each owner, the same rows in one file, and a test set."""

    own: Mapping[str, Path]
    all: Path
    test: Path
    public: Path
    model: Path

    def values(self, **sections: Any) -> dict[str, Any]:
        """A simulation's experiment: short, small, one by one; distillation with public examples."""
        base: dict[str, Any] = {
            "name": "owners",
            "rounds": 2,
            "model": {"name": str(self.model)},
            "data": {"name": str(self.all), "test": str(self.test), "max_length": 16},
            "clients": {"count": len(self.own), "partition": {"kind": "natural", "column": "user"}},
            "technique": {"kind": "lora", "rank": 2},
            "train": {"batch": 4, "lr": 0.05},
            "engine": {"stacked": False, "ordered": True},
        }
        for name, value in sections.items():
            base[name] = {**base.get(name, {}), **value} if isinstance(value, dict) and "kind" not in value else value
        if base.get("algorithm", {}).get("kind") == "distil":
            base["data"] |= {"public": str(self.public)}
        return base

    def simulated(self, folder: Path, **sections: Any) -> dict[str, Any]:
        return run(parse(self.values(**sections)), folder)

    def apart(self, **sections: Any) -> Experiment:
        """The same experiment, the rows being with their owners."""
        values = self.values(**sections)
        public = {"public": values["data"]["public"]} if "public" in values["data"] else {}
        values["data"] = {
            "name": "own",
            "kind": "text",
            "labels": sorted(LABELS),
            "test": str(self.test),
            "max_length": 16,
            **public,
        }
        values["clients"] = {k: v for k, v in values["clients"].items() if k != "partition"}
        return parse(values)


def owners(folder: Path, model: Path, count: int = 10, names: Sequence[str] = NAMES) -> Owners:
    parts = {name: rows_of(name, count + 3 * i) for i, name in enumerate(names)}
    own = {}
    for name, rows in parts.items():
        own[name] = folder / f"{name}.csv"
        own[name].write_text(csv_of([row[:2] for row in rows], "text,label"), encoding="utf-8")
    (folder / "all.csv").write_text(csv_of([row for rows in parts.values() for row in rows]), encoding="utf-8")
    (folder / "test.csv").write_text(csv_of(rows_of("test", 12)), encoding="utf-8")
    (folder / "public.csv").write_text(csv_of([row[:1] for row in rows_of("public", 20)], "text"), encoding="utf-8")
    return Owners(own, folder / "all.csv", folder / "test.csv", folder / "public.csv", model)


class Served(NamedTuple):
    summary: dict[str, Any] | BaseException
    members: dict[str, dict[str, Any] | BaseException]
    notices: list[str]


class Federation:
    """A server in a thread; members are started and end when it does."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        keys: Keys = Keys(),
        resume: bool = False,
        port: int = 0,
        watch: Watch = Watch(),
    ) -> None:
        self.notices: list[str] = []
        self.folder, self._said = folder, queue.SimpleQueue[str]()
        self.summary: dict[str, Any] | BaseException = RuntimeError("the server did not end")
        self.members: dict[str, dict[str, Any] | BaseException] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._thread = threading.Thread(target=self._serve, args=(experiment, keys, resume, port, watch), daemon=True)
        self._thread.start()
        self.address = "127.0.0.1:" + self.until(r"listening on .*:(\d+)")

    def _serve(self, experiment: Experiment, keys: Keys, resume: bool, port: int, watch: Watch) -> None:
        try:
            watch = watch._replace(notice=self._notice, round=lambda line: self._notice(f"round {line['round']} is over"))
            self.summary = serve(experiment, self.folder / "run", f"127.0.0.1:{port}", keys, resume, watch)
        except BaseException as error:
            self.summary = error
        self._notice("the server has ended")

    def _notice(self, line: str) -> None:
        self.notices.append(line)
        self._said.put(line)

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Wait for a line like this of the server; returns its first group."""
        while True:
            line = self._said.get(timeout=seconds)
            if found := re.search(pattern, line):
                return found[1] if found.groups() else line
            if line == "the server has ended":
                raise AssertionError(f"{self.summary!r} before '{pattern}': {self.notices}")

    def member(
        self, name: str, own: Own, doors: Doors | None = None, limits: Limits = Limits(), wait: bool = True, home: str = ""
    ) -> None:
        """Start a member; with `wait`, until the server has agreed with it or refused it."""

        def take_part() -> None:
            try:
                self.members[name] = join(
                    self.address, doors or Doors(name, None), self.folder / (home or f"home-{name}"), own, limits, self._notice
                )
            except BaseException as error:
                self.members[name] = error

        self._threads[name] = threading.Thread(target=take_part, daemon=True)
        self._threads[name].start()
        if wait:
            self.until(rf"^{name} is (attached|refused)")

    def wait(self, name: str, seconds: float = 60) -> dict[str, Any] | BaseException:
        """What became of a member."""
        self._threads[name].join(seconds)
        return self.members[name]

    def end(self, seconds: float = 120) -> Served:
        self._thread.join(seconds)
        for thread in self._threads.values():
            thread.join(10 if isinstance(self.summary, dict) else 0.1)  # members dial a server that failed without end
        return Served(self.summary, self.members, self.notices)


def federated(
    owners: Owners, folder: Path, own: Callable[[str], Own] | None = None, limits: Limits = Limits(), **sections: Any
) -> Served:
    """All owners from the first round to the last."""
    federation = Federation(owners.apart(**sections), folder)
    for name, path in owners.own.items():
        has = own(name) if own else Own(str(path), models=(str(owners.model),), public=str(owners.public))
        federation.member(name, has, limits=limits, wait=False)
    return federation.end()
