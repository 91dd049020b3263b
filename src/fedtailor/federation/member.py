"""A member of a federation: it has its own data, its own installed code and its own limits; from the server it takes messages and an
experiment's values, and nothing that is executed."""

from __future__ import annotations

import json
import queue
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from fedtailor import memory, wire
from fedtailor.config import Experiment, ModelSection, parse
from fedtailor.core import ClientId, Message, Tree
from fedtailor.ends import Ends, cut_of, save
from fedtailor.engines.clients import Clients, Place
from fedtailor.equip import Facts
from fedtailor.errors import ConfigError, FedtailorError, RunError, nearest
from fedtailor.evaluation import workers
from fedtailor.federation.agreement import agreement
from fedtailor.federation.carriers import MemberEnd
from fedtailor.federation.frames import EXPERIMENT, FINISH, LETTER, READY, VALID, Parcel, said
from fedtailor.federation.guard import is_here, misshapen
from fedtailor.federation.shelf import Full, Shelf
from fedtailor.filters import chain
from fedtailor.simulation import OWN, World, build, of_member
from fedtailor.trees import is_finite


class Limits(NamedTuple):
    """What this member lets itself be asked for, whatever the experiment says. Zero: no limit."""

    verbs: frozenset[str] = frozenset()  # empty: all that the algorithm has
    bytes: float = 0.0  # down and up together, a round
    epochs: float = 0.0  # passes over its own rows, a round
    memory: int = wire.MAX_BYTES  # bytes of one message


class Own(NamedTuple):
    """What this member has in the place of what the experiment names; "" is the experiment's own."""

    data: str = ""
    text: str = ""
    pair: tuple[str, str] | None = None
    label: str = ""
    models: tuple[str, ...] = ()  # folders of backbones here: FOLDER, or NAME=FOLDER with the name that the experiment says
    public: str = ""  # public examples
    device: str = ""
    simulate: bool = False  # take this member's part of the experiment's own data, which is on this machine too


class Member:
    """One attached member: builds what the experiment describes, answers letters until the server says that it is over."""

    def __init__(
        self,
        name: ClientId,
        dial: MemberEnd,
        home: Path,
        own: Own,
        limits: Limits,
        notice: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.name, self.dial, self.home, self.own, self.limits, self.notice = name, dial, home, own, limits, notice
        self.shelf = Shelf(home / "state")
        self.world: World | None = None
        self._agreed: dict[str, Any] = {}
        self._ends: Ends | None = None  # what it holds of a model that is cut
        self._told = b""  # the experiment as it came
        self._clients: Clients | None = None
        self._early: Parcel | None = None  # a letter that came before the experiment
        self._round = 0  # the one that was told of last
        # By round, so that a server which goes back and forth between rounds is allowed no more.
        self._bytes, self._passes = defaultdict[int, float](float), defaultdict[int, float](float)

    def serve(self) -> dict[str, Any]:
        """Take part until the end; returns what the server says of it.

        Raises:
            RunError: the server refuses this member, or does not keep to the protocol. ConfigError, DataError: what this member has does
                not suit the experiment (the server is told too).
        """
        while True:
            try:
                parcel = self.dial.inbox.get(timeout=1.0)  # with a timeout, so that Ctrl-C is heard
            except queue.Empty:
                continue
            if isinstance(parcel, RunError):
                raise parcel
            kind = parcel.note.get("is")
            if kind == EXPERIMENT:
                self._begin(parcel)
            elif kind == LETTER:
                self._letter(parcel)
            elif kind == FINISH:
                return self._finish(parcel)

    # The experiment

    def _begin(self, parcel: Parcel) -> None:
        try:
            blob = content(parcel)
            if self.world is None or blob != self._told:
                self.world = self._built(blob)
                self._told = blob
                experiment = self.world.experiment
                rows = self.world.clients[self.name]
                sizes = {"train": len(rows.train), "valid": len(rows.valid), "test": len(rows.test)}
                self._agreed = {**agreement(self.world, self.name), **sizes, "holds": "ends" if self._ends else "all"}
                pool = workers(self.world, self.world.flops, self.world.looks)
                up = chain(experiment.filters.up)
                self._clients = Clients(self.world.algorithm, pool, self.shelf, up, experiment.seed, False, self.notice)
        except FedtailorError as error:
            self._declined(parcel, error)
        except Exception as error:  # what a stranger's values do to libraries cannot be listed
            self._declined(
                parcel, RunError(f"the server's experiment cannot be used here: {type(error).__name__}: {said(error)}")
            )
        self.dial.send(Parcel(parcel.id, {"is": READY, **self._agreed}, b""))
        early, self._early = self._early, None
        if early:
            self._letter(early)

    def _declined(self, parcel: Parcel, error: FedtailorError) -> NoReturn:
        self.dial.send(Parcel(parcel.id, {"is": READY, "why": said(error, 500)}, b""))
        self.dial.drain(5.0)
        raise error

    def _built(self, blob: bytes) -> World:
        """Raises:
        ConfigError: the experiment asks for more than this member allows, or has no place for it. DataError: its own data.
        """
        try:
            body = wire.decode(blob, self.limits.memory).body
            told = json.loads(body["values"])
            facts, values = Facts(**told["facts"]), told["experiment"]
            lists = (facts.clients, facts.newcomers, facts.labels)
            if not all(isinstance(x, list) and all(isinstance(one, str) for one in x) for x in lists):
                raise TypeError("its members and labels are lists of names")
            experiment = parse(values, where="the server's experiment")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(f"the server's experiment cannot be read: {error}") from error
        if self.name not in facts.clients:
            raise ConfigError(f"'{self.name}' is not among the members of this run: {said(nearest(self.name, facts.clients))}")
        if ":" in experiment.algorithm.kind:
            kind = said(experiment.algorithm.kind, 100)
            raise ConfigError(f"the server asks for algorithm '{kind}': code of others is not run here")
        if self.own.simulate:
            if experiment.data.name == OWN:
                raise ConfigError(
                    "--simulate: the experiment names no data of which this member could take its part: use --data PATH"
                )
            world = build(experiment)
        else:
            self._ends = self._held(experiment, facts, body)
            if self._ends:
                memory.give_back()  # who holds a part of a model has no memory to spare
            world = of_member(self._with_own(experiment, facts), facts, self.name, self._ends)
        rows, train = max(1, len(world.clients[self.name].train)), experiment.train
        passes = train.steps * train.batch / rows if train.steps else train.epochs
        if self.limits.epochs and passes > self.limits.epochs:
            raise ConfigError(
                f"the server asks for {passes:g} passes a round, allowed here are {self.limits.epochs:g} (--epochs)"
            )
        return world

    def _held(self, experiment: Experiment, facts: Facts, body: Tree) -> Ends | None:
        """What this member holds of a model that is cut.

        Raises:
            ConfigError: its cut is counted on the whole model. RunError: what is to begin with is no tree of tensors.
        """
        cut = cut_of(experiment, facts.clients.index(self.name))
        if cut is None:
            return None
        start, unread = body.get("start"), body.get("unread")
        if not isinstance(start, dict | None) or not all(isinstance(t, Tensor) for t in (start or {}).values()):
            raise RunError("the server's experiment begins with no tree of tensors")
        return Ends(*cut, start, unread if isinstance(unread, str) else None)

    def _with_own(self, experiment: Experiment, facts: Facts) -> Experiment:
        """What the server's experiment calls by a path would be a file of this machine: only this member says which. What clients of other
        kinds work with is not needed here, and not loaded."""
        own, data, clients, engine = self.own, experiment.data, experiment.clients, experiment.engine
        if not own.data:
            raise ConfigError("name your data with --data PATH (or --simulate, where this machine has the experiment's own)")
        columns = {"text": own.text or data.text, "pair": own.pair or data.pair, "label": own.label or data.label}
        data = data.model_copy(update={"name": own.data, "subset": None, "test": None, "limit": None, **columns})
        if data.public is not None:
            if not own.public:
                raise ConfigError(f"the experiment uses public examples ('{data.public}'): name them here with --public PATH")
            data = data.model_copy(update={"public": own.public})
        kind = clients.kinds[facts.everybody.index(self.name) % len(clients.kinds)] if clients.kinds else None
        model, *others = self._models([experiment.model, *([kind.model] if kind and kind.model else [])])
        if kind:
            kind = kind.model_copy(update={"model": others[0] if others else None})
            clients = clients.model_copy(update={"kinds": [kind] * len(clients.kinds)})
        techniques = [experiment.technique, *([kind.technique] if kind and kind.technique else [])]
        for name, value in (item for technique in techniques for item in technique.options.items()):
            if isinstance(value, str) and is_here(value):
                raise ConfigError(f"technique.{said(name, 60)} of the server's experiment is a path of this machine")
        engine = engine.model_copy(update={"workers": 0, **({"device": own.device} if own.device else {})})  # threads are ours
        return experiment.model_copy(update={"data": data, "model": model, "clients": clients, "engine": engine})

    def _models(self, sections: Sequence[ModelSection]) -> list[ModelSection]:
        """These models of the experiment as this member has them. A FOLDER without a NAME stands for the only one that is a folder at the
        server, or for the experiment's own where none is."""
        names = list(dict.fromkeys(section.name for section in sections))
        folders = {n: given.removeprefix(f"{n}=") for n in names for given in self.own.models if given.startswith(f"{n}=")}
        plain = [given for given in self.own.models if not any(given.startswith(f"{n}=") for n in names)]
        wanted = [n for n in names if is_here(n) and n not in folders]
        if plain and len(wanted) < 2:
            folders[wanted.pop() if wanted else names[0]] = plain.pop(0)
            if plain:
                raise ConfigError(f"--model: '{plain[0]}' is one too many: the experiment names {said(', '.join(names), 200)}")
        if len(wanted) > 1:
            ask = " ".join(f"--model {said(name, 60)}=FOLDER" for name in wanted)
            raise ConfigError(f"the experiment's models are folders on the server: name your copies of them with {ask}")
        if wanted:
            raise ConfigError("the experiment's model is a folder on the server: name your copy of it with --model FOLDER")
        here = [(section, folders.get(section.name)) for section in sections]
        return [s.model_copy(update={"name": folder, "revision": None}) if folder else s for s, folder in here]

    # Letters

    def _letter(self, parcel: Parcel) -> None:
        if self.world is None:  # a server may send one before it notices that this process is a new one
            if self._early:
                self._early.discard()
            self._early = parcel
            return
        try:
            if done := self.shelf.replied(parcel.id):
                self.dial.send(Parcel(parcel.id, *done))
                return
            at = Place(int(parcel.note["round"]), int(parcel.note["step"]))
            if at.step < 0:
                raise RunError("a letter of no step")
            view, own, kept = (str(parcel.note[name]) for name in ("view", "own", "kept"))
            message = self._opened(parcel, view)
            self._allowed(message, at.round, parcel.size, view)
            self.shelf.begin(own, kept)
            note, reply = self._answer(message, at, view)
            content = wire.encode(reply) if view else self.shelf.reply(parcel.id, note, reply)
        except OSError:  # this machine's trouble, not the letter's
            raise
        except Exception as error:  # a letter may be anything, and what handlers make of it cannot be listed
            why = said(error, 500) if isinstance(error, FedtailorError) else f"{type(error).__name__}: {said(error, 400)}"
            self.notice(f"a letter of the server is refused: {why}")
            self.dial.send(Parcel(parcel.id, {"is": LETTER, "why": why}, b""))
            if isinstance(error, Full):
                self.dial.drain(5.0)
                raise
            return
        finally:
            parcel.discard()
        self._bytes[at.round] += len(content) if isinstance(content, bytes) else content.stat().st_size
        self.dial.send(Parcel(parcel.id, note, content))

    def _opened(self, parcel: Parcel, view: str) -> Message:
        assert self.world
        limit = self.limits.memory
        found = (
            wire.decode(parcel.content, limit)
            if isinstance(parcel.content, bytes)
            else wire.read(parcel.content, max_bytes=limit)
        )
        found = found if view else chain(self.world.experiment.filters.down).undo(found)
        if not view and not is_finite(found.body):
            raise RunError("the letter is not finite")
        if not view and (name := misshapen(found.body, self.world.technique.init)):
            raise RunError(f"the letter's '{said(name, 100)}' has not the form that this technique's has")
        return found

    def _allowed(self, message: Message, round: int, size: int, view: str) -> None:
        assert self.world
        limits, rounds = self.limits, self.world.experiment.rounds
        if not 0 <= round <= rounds:
            raise RunError(f"a letter of round {round}, where the experiment has {rounds}")
        self._bytes[round] += size
        if message.verb not in self.world.algorithm.client:
            raise RunError(f"verb '{said(message.verb, 60)}' is none of algorithm {self.world.experiment.algorithm.kind}")
        if limits.verbs and message.verb not in limits.verbs:
            raise RunError(f"verb '{message.verb}' is not allowed here (--verbs {','.join(sorted(limits.verbs))})")
        if limits.bytes and self._bytes[round] > limits.bytes:
            raise RunError(
                f"{self._bytes[round] / 1e6:.1f} MB in round {round}: allowed here are {limits.bytes / 1e6:g} (--mb-a-round)"
            )
        rows = max(1, len(self.world.clients[self.name].train))
        if limits.epochs and not view and self._passes[round] / rows >= limits.epochs:
            raise RunError(
                f"{self._passes[round] / rows:.1f} passes in round {round}: allowed here are {limits.epochs:g} (--epochs)"
            )

    def _answer(self, message: Message, at: Place, view: str) -> tuple[dict[str, Any], Message]:
        assert self.world
        assert self._clients
        if at.round != self._round:
            self._round = at.round
            self.notice(f"round {at.round}/{self.world.experiment.rounds}: {message.verb}")
        sites = self.world.valid_sites if view == VALID else self.world.sites
        (done,) = self._clients.work({self.name: message}, at, sites, bool(view))
        if done.reply is None:
            raise RunError(done.why)
        self._passes[at.round] += done.examples
        note = {"is": LETTER, "flops": done.flops, "examples": done.examples, "own": self.shelf.now}
        return note, done.reply

    # The end

    def _finish(self, parcel: Parcel) -> dict[str, Any]:
        """Keep the model that came of it.

        Raises:
            RunError: there is none, or it is not one.
        """
        try:
            return self._kept(parcel)
        except (FedtailorError, OSError):
            raise
        except Exception as error:  # as of a letter
            raise RunError(f"the model that the server sent cannot be kept: {type(error).__name__}: {said(error)}") from error
        finally:
            parcel.discard()

    def _kept(self, parcel: Parcel) -> dict[str, Any]:
        """The member's personal model where the algorithm has such, else everybody's."""
        if self.world is None:
            raise RunError("the server ended what it had not begun")
        own, model = str(parcel.note.get("own", "")), self.world.algorithm
        body = wire.decode(content(parcel), self.limits.memory).body
        if not is_finite(body):
            raise RunError("the model that the server sent is not finite")
        self.shelf.begin(own, "")
        tree, folder = body["broadcast"], self.home / ("ends" if self._ends else "adapter")
        middle: Tree = tree.get("middle", {}) if self._ends else {}
        if model.personal:
            site = self.world.sites(self.name, 0)
            tree = model.personal(self.shelf.read_own(self.name).get("algorithm"), tree, site)
        if self._ends:
            self._save_ends(tree, middle, folder)
        else:
            self.world.kit(self.name).technique.save(tree, folder)
        self.dial.drain(5.0)
        told = {"state_hash": said(body["told"]["state_hash"], 64)}
        return {"name": self.name, "rounds": self.world.experiment.rounds, "adapter": str(folder), **told}

    def _save_ends(self, tree: Tree, middle: Tree, folder: Path) -> None:
        assert self.world
        assert self.world.job.layers
        assert self._ends
        section = self.world.experiment.technique
        about = {"model": self.world.backbone.source, "technique": {"kind": section.kind, **section.options}}
        save(tree, self.world.job.layers, self._ends, {**about, "labels": self.world.facts.labels}, middle, folder)


def content(parcel: Parcel) -> bytes:
    return parcel.content if isinstance(parcel.content, bytes) else parcel.content.read_bytes()
