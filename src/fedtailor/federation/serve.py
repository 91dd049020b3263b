"""The server of a federation: it waits for its members, agrees with them on the experiment, and conducts the run."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtailor import memory, wire
from fedtailor.config import Experiment
from fedtailor.core import ClientId, Message, Tree
from fedtailor.ends import cut_of, ends_of
from fedtailor.engines.states import States
from fedtailor.equip import Facts
from fedtailor.errors import ConfigError
from fedtailor.evaluation import broadcast_of, workers
from fedtailor.federation.agreement import agreement, difference
from fedtailor.federation.carriers import Attached, ServerEnd
from fedtailor.federation.frames import EXPERIMENT, FINISH, Header, Parcel, said
from fedtailor.federation.post import Keys, Post
from fedtailor.federation.remote import TICK, Remote, Rules
from fedtailor.filters import chain
from fedtailor.folder import FACTS, check_folder, facts_of, make_folder, record, writing, written
from fedtailor.ledger import Ledger
from fedtailor.run import Watch, conduct
from fedtailor.simulation import OWN, Split, World, build, federates, of_server, rows_of


def serve(
    experiment: Experiment,
    out: Path,
    address: str,
    keys: Keys,
    resume: bool = False,
    watch: Watch = Watch(),
    limit: int = wire.MAX_BYTES,
) -> dict[str, Any]:
    """Conduct an experiment with members that dial in at `address`, and return its summary.

    Raises:
        ConfigError, DataError, RunError: as `run`; RunError also where the address cannot be listened on.
    """
    federates(experiment)
    if experiment.data.name == OWN:
        _check_own(experiment)
    check_folder(experiment, out, resume)
    standing = Standing(experiment.name, experiment.rounds)
    memory.give_back()  # it carries models, and does not train
    with tempfile.TemporaryDirectory(prefix="fedtailor-") as folder:
        post = Post(address, Path(folder), limit, keys, lambda: standing.told(post))
        post.open()
        try:
            watch.members(lambda: attached(post, standing.owed()))
            watch.notice(f"listening on {address.rpartition(':')[0]}:{post.port}")
            return gather(experiment, out, post, watch, standing)
        finally:
            post.close()


@dataclass
class Standing:
    """How a run is getting on, for people who ask while it runs."""

    name: str
    rounds: int
    round: int = 0
    stage: str = "waiting for members"
    valid: float | None = None
    owed: Callable[[], Mapping[ClientId, tuple[int, float]]] = dict  # as Remote.owed

    def told(self, post: ServerEnd) -> dict[str, Any]:
        values = {name: x for name, x in vars(self).items() if name != "owed"}
        return {**values, "members": attached(post, self.owed())}


def gather(experiment: Experiment, out: Path, post: ServerEnd, watch: Watch, standing: Standing) -> dict[str, Any]:
    """Conduct an experiment with the members at the other end of `post`; `standing` is kept up to date.

    Raises: as `serve`.
    """
    world = _gathered(experiment, out, post, watch)
    make_folder(experiment, out)
    with writing(out):
        record(world.facts, out)
        return Server(world, post, watch, standing).conduct(out)


def attached(post: ServerEnd, owed: Mapping[ClientId, tuple[int, float]]) -> dict[ClientId, dict[str, Any]]:
    """Who is there or was, since when (`seconds` ago), and for whom the run waits: who `owed` a reply, in which round, for how long."""
    now = time.monotonic()
    return {
        name: {
            "attached": known.since is not None,
            "seconds": round(now - (known.since if known.since is not None else known.left), 1),
            "round": owed.get(name, (None, 0.0))[0],
            "waiting": round(owed.get(name, (None, 0.0))[1], 1),
            "bytes_in": known.line.bytes_in,
            "bytes_out": known.line.bytes_out,
        }
        for name, known in sorted(post.members.items())
    }


def _gathered(experiment: Experiment, out: Path, post: ServerEnd, watch: Watch) -> World:
    """The server's world: its members are those of the partition that the experiment names, those of the run that goes on, or the first
    `clients.count` that come."""
    watch.stage("loading data and model")
    if experiment.data.name != OWN:
        return build(experiment)
    count = experiment.clients.count
    members = facts_of(out).clients if (out / FACTS).is_file() else []
    watch.stage("waiting for members")
    before = -1
    while not members:
        here = [name for name, known in list(post.members.items()) if known.since is not None]
        if len(here) != before:
            before = len(here)
            watch.notice(f"{before} of {count} members are attached" + (f": {', '.join(sorted(here))}" if here else ""))
        if len(here) >= count:
            members = sorted(here)
        time.sleep(TICK)
    return of_server(experiment, Facts(experiment.data.kind, experiment.data.labels, bool(experiment.data.pair), members, 0))


def _check_own(experiment: Experiment) -> None:
    """Raises:
    ConfigError: what nobody can read off data that is not here is not said.
    """
    kind, labels = experiment.data.kind, experiment.data.labels
    if kind == "auto":
        raise ConfigError("data.kind: with data.name = 'own' say what the members' data is: text, image, language or instruction")
    if kind in ("text", "image") and len(labels) < 2:
        raise ConfigError("data.labels: with data.name = 'own' name the classes, two at least")
    cut_of(experiment, 0)


class Server:
    """A world, its members' lines, and the run that goes over them."""

    def __init__(self, world: World, post: ServerEnd, watch: Watch, standing: Standing) -> None:
        self.world, self.post, self.watch, self.standing = world, post, watch, standing
        self._values = json.dumps({"experiment": written(world.experiment), "facts": world.facts._asdict()})
        self._ours: dict[tuple[Any, int], dict[str, str]] = {}  # a cut, a kind of client -> what is agreed upon

    def conduct(self, out: Path) -> dict[str, Any]:
        engine: list[Remote] = []

        def engine_of(states: States, ledger: Ledger) -> Remote:
            engine.append(self._engine(states, ledger))
            self.standing.owed = engine[0].owed
            return engine[0]

        def round(line: dict[str, Any]) -> None:
            now = self.standing
            now.round, now.stage, now.valid = line["round"], "running", line.get("valid")
            self.watch.round(line)

        def end(state: Tree, states: States) -> None:
            self._end(engine[0], state, states)

        return conduct(self.world, out, self.watch._replace(round=round), engine_of, end)

    def _engine(self, states: States, ledger: Ledger) -> Remote:
        world, experiment = self.world, self.world.experiment
        clients = experiment.clients
        return Remote(
            world.algorithm,
            world.sites,
            world.valid_sites,
            workers(world, world.flops, world.looks),
            states,
            ledger,
            self.post,
            chain(experiment.filters.up),
            chain(experiment.filters.down),
            experiment.seed,
            Rules(clients.min_clients, clients.deadline, clients.grace, experiment.engine.ordered),
            self._greet,
            self._agree,
            self.watch.notice,
            self.watch.client,
            lambda member: len(world.clients[member].train) if member in world.clients else 0,
        )

    def _greet(self, member: ClientId) -> None:
        if why := self._stranger(member):
            self._refuse(member, why)
        else:
            self.post.send(member, self._experiment(member))

    def _stranger(self, member: ClientId) -> str:
        """Why there is no place for it; "" where there is one."""
        here = self.world.facts.clients
        return "" if member in here else f"'{member}' is not among the members of this run ({', '.join(here)})"

    def _cut(self, member: ClientId) -> tuple[int, int] | None:
        """Layers that a member with data of its own holds; None: the whole model."""
        if not self.world.algorithm.splits:
            return None
        try:
            return cut_of(self.world.experiment, self.world.facts.clients.index(member))
        except ConfigError:  # which a member with data of its own says itself
            return None

    def _experiment(self, member: ClientId) -> Parcel:
        body: Tree = {"values": self._values}
        layers, cut = self.world.job.layers, self._cut(member)
        if layers and cut:
            told = ends_of(cut, self.world.technique, layers)
            body |= {name: x for name, x in (("start", told.start), ("unread", told.unread)) if x is not None}
        return Parcel(f"{self.post.session}-experiment-{member}", {"is": EXPERIMENT}, wire.encode(Message(EXPERIMENT, body)))

    def _agree(self, member: ClientId, note: Header) -> bool:
        if why := self._stranger(member):  # it was not asked, and says that it is ready all the same
            self._refuse(member, why)
            return False
        cut = self._cut(member) if note.get("holds") == "ends" else None
        place = cut, self.world.facts.everybody.index(member) % max(len(self.world.kits), 1)
        if place not in self._ours:
            self._ours[place] = agreement(self.world, member, cut)
        why = f"it cannot take part: {said(note['why'])}" if "why" in note else difference(self._ours[place], note)
        if why:
            self._refuse(member, why)
            return False
        sizes = [note.get(name) for name in Split._fields]
        if self.world.experiment.data.name == OWN and all(type(n) is int and 0 <= n < 1 << 31 for n in sizes):
            self.world.clients[member] = rows_of(*map(int, sizes))  # type: ignore[arg-type]
        self.watch.notice(f"{member} is attached")
        return True

    def _refuse(self, member: ClientId, why: str) -> None:
        self.watch.notice(f"{member} is refused: {why}")
        self.post.tell(member, {"is": "bye", "why": why})

    def _end(self, engine: Remote, state: Tree, states: States) -> None:
        """Give every member what it needs to keep the model, and wait until they have it: as long as there is progress, whatever the line."""
        world, told = self.world, {"state_hash": states.hash(state)}

        def encoded(model: Tree) -> bytes:
            return wire.encode(Message(FINISH, {"broadcast": model, "told": told}))

        everybodys = b"" if world.algorithm.personal else encoded(world.algorithm.model(state))
        for number, member in enumerate(world.facts.clients):
            model = everybodys or encoded(broadcast_of(world, state, member))
            note = {"is": FINISH, "own": states.elsewhere.get(member, "")}
            self.post.send(member, Parcel(f"{self.post.session}-finish-{number}", note, model), reply=False)
        giving = Giving(world.facts.clients, world.experiment.clients.grace)
        engine.wait(lambda: giving.over(self.post.members, time.monotonic()))
        if giving.late:
            self.watch.notice(f"not there to be given the model: {', '.join(sorted(giving.late))}")


class Giving:
    """Who has not got everything yet: a member is waited for as long as there is progress, and then for `grace` seconds."""

    def __init__(self, members: list[ClientId], grace: float) -> None:
        self.late: list[ClientId] = []
        self._grace = grace
        self._waiting = dict.fromkeys(members, (-1, 0.0))  # bytes that went out, and when there were so many first

    def over(self, members: Mapping[ClientId, Attached], now: float) -> bool:
        for member, (sent, since) in list(self._waiting.items()):
            known = members.get(member)
            if known is None or known.line.idle:
                del self._waiting[member]
            elif known.line.bytes_out != sent:
                self._waiting[member] = known.line.bytes_out, now
            elif now - since > self._grace:
                self.late.append(member)
                del self._waiting[member]
        return not self._waiting
