"""The server of split learning: it holds middles, one a client or one for all, and the conversation of a round.

The state has `params` (the whole tree as it began, or as it was averaged), `round` (finished rounds), `middles` (whose -> params, moments,
n), `clients` (how far each is, its cut and number of examples), `under_way` (what went into a middle, until its gradient comes), `drawn` (how
often each was asked to take part), `bases` (whose -> row -> hidden states, where only changes are sent), `busy` (who owes a reply) and
`post` (letters to be sent when the next round begins).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedtailor.algorithms import split_deltas
from fedtailor.algorithms.split_checks import complaint, strange
from fedtailor.algorithms.split_middle import padded, way
from fedtailor.algorithms.split_rules import ENDS, EVERYBODY, MASK, Ground, at_of, place_of
from fedtailor.core import (
    HIDDEN,
    LOST,
    SERVER,
    ClientId,
    Letters,
    Message,
    State,
    Tree,
)
from fedtailor.errors import ConfigError, RunError
from fedtailor.trees import is_finite, nbytes, tree_map, weighted_mean

TRIES = 3
"""Times that a client is written to again when letters to it are lost one after the other."""
UNUSABLE = "what its numbers give at the server is not finite (lower train.lr)"
Round: TypeAlias = Generator[Any, Any, tuple[State, dict[ClientId, Tree]]]


@dataclass
class Desk:
    """What lies on the server's desk in a round: trees are replaced, never changed."""

    number: int
    middles: Tree
    clients: Tree
    under_way: Tree
    drawn: dict[ClientId, int]  # rounds that each client was asked to take part in
    busy: set[ClientId]
    bases: Tree  # client -> row -> the hidden states that it has
    free: float  # bytes that are left for them
    last: dict[ClientId, int] = field(default_factory=dict)  # the pass that a client may not go beyond
    letters: dict[ClientId, Message] = field(default_factory=dict)
    out: dict[ClientId, Message] = field(default_factory=dict)  # the last letter to each client in this round
    sent: Tree = field(default_factory=dict)  # this time
    turned: Tree = field(default_factory=dict)  # this time
    rested: dict[ClientId, Tree] = field(default_factory=dict)
    lost: dict[ClientId, int] = field(default_factory=dict)  # letters to a client that were lost one after the other
    notes: list[str] = field(default_factory=list)  # what the user should know
    passes: int = 0  # that have ended in this round
    count: int = 0

    def set_aside(self, client: ClientId, why: str) -> None:
        self.notes.append(f"{client} set aside: {why}")
        self.under_way.pop(client, None)


def steps(on: Ground, state: State, cohort: list[ClientId], ends: Mapping[ClientId, Tree] | None = None) -> Round:
    """A round's conversation: every client of the cohort makes a pass (or goes on with it, where nobody waits). Returns (new state, what each
    client that came to rest sent of its ends); `ends` are the ends that clients are sent first.

    Raises:
        RunError: no client has room for any part.
    """
    desk, rules = opened(on, state, cohort, ends or {}), on.rules
    # Where nobody waits a round ends after so many passes, whose ever they are; the last round ends when all have ended.
    aim = len(cohort) if rules.ahead and desk.number < on.job.plan.rounds else 0
    while (desk.letters or not rules.lockstep) and not (aim and desk.passes >= aim):
        asked, desk.out, desk.busy = desk.letters, {**desk.out, **desk.letters}, desk.busy | desk.letters.keys()
        note, desk.notes = told(desk.notes), []
        came: dict[ClientId, Message] = yield Letters(asked, "all" if rules.lockstep else "any", note)
        if rules.lockstep:  # who is not among them is not heard any more
            came = {**{c: Message(LOST) for c in asked}, **came}
        if not came:  # nobody is left under way
            desk.letters, desk.busy = {}, set()
            break
        desk.busy -= came.keys()
        heard(on, desk, state, came)
        work = {"sent": desk.sent, "turned": desk.turned, "middles": desk.middles}
        done = (yield {SERVER: Message("middle", work)}) if desk.sent or desk.turned else {}
        answered(on, desk, done[SERVER].body if SERVER in done else {})
    if desk.notes:  # nobody is written to any more: for the user alone
        yield Letters({}, "all", told(desk.notes))
    post = {c: {"verb": m.verb, "body": m.body, "info": dict(m.info)} for c, m in desk.letters.items()}
    after = {name: getattr(desk, name) for name in ("middles", "clients", "under_way", "drawn", "bases")}
    return {**state, **after, "busy": sorted(desk.busy), "post": post}, desk.rested


def told(notes: list[str], most: int = 5) -> str:
    return "; ".join([*notes[:most], *([f"and {len(notes) - most} more"] if len(notes) > most else [])])


def opened(on: Ground, state: State, cohort: list[ClientId], ends: Mapping[ClientId, Tree]) -> Desk:
    """The desk as a round begins: letters that are left from the round before, and one to each client that is not busy."""
    number = int(state["round"]) + 1
    drawn = {**state["drawn"], **{c: state["drawn"].get(c, 0) + 1 for c in cohort}}
    # What is under way is gone again alone, in a run that was killed here and in one that was not: it has another name from now on.
    under_way = {c: {**given, "name": f"{given['name']}/{number}"} for c, given in state["under_way"].items()}
    desk = Desk(number, {**state["middles"]}, {**state["clients"]}, under_way, drawn, set(state["busy"]), {**state["bases"]}, 0)
    desk.free = on.rules.room - nbytes(desk.bases)
    desk.letters = {c: Message(m["verb"], m["body"], m["info"]) for c, m in state["post"].items()}
    # A client makes as many passes as rounds in which it is drawn; where all always are, it need not wait for them.
    everybody = on.rules.ahead and len(cohort) == on.job.clients and number <= on.job.plan.rounds  # after them others join
    for client in drawn:
        desk.last[client] = max(on.job.plan.rounds, number) if everybody else drawn[client] if on.rules.ahead else number
    for client in cohort:
        first = {} if on.rules.ahead else {"pass": number, "step": 0}
        at = {"pass": 1, "step": 0, **desk.clients.get(client, {}), **first}
        if client in desk.busy or client in desk.letters or at["pass"] > desk.last[client] or at.get("unfit"):
            continue
        desk.under_way.pop(client, None)
        desk.letters[client] = Message("go", ends.get(client, {}), place_of(at))
    return desk


def heard(on: Ground, desk: Desk, state: State, came: Mapping[ClientId, Message]) -> None:
    """Sort what came."""
    desk.letters, desk.sent, desk.turned = {}, {}, {}
    for client, reply in sorted(came.items()):
        known, given = desk.clients.get(client, {}), desk.under_way.get(client)
        if reply.verb == LOST:
            tell_again(desk, client, desk.out.get(client))
            continue
        desk.lost.pop(client, None)
        reply = reply._replace(body=tree_map(lambda t: t, reply.body))  # from the disk, if it waits there
        if reply.verb == "unfit":
            desk.clients[client] = {**known, "unfit": 1}
            desk.set_aside(client, str(reply.body["why"])[:400])
        elif problem := complaint(on.layers, reply, given) or strange(on, known, reply, state["params"]):
            desk.set_aside(client, problem)
        elif reply.verb == "rested":
            desk.passes += 1
            if reply.info["pass"] >= on.job.plan.rounds:  # it was its last
                desk.free += nbytes(desk.bases.pop(client, {}))
            desk.clients[client] = {**known, **at_of(reply), "pass": int(reply.info["pass"]) + 1, "step": 0}
            if reply.info["steps"]:
                desk.rested[client] = reply.body
            if on.rules.ahead and desk.clients[client]["pass"] <= desk.last[client]:
                desk.letters[client] = Message("go", {}, place_of(desk.clients[client]))
        elif reply.verb == "sent":
            desk.clients[client] = {**known, **at_of(reply)}
            whose = EVERYBODY if on.rules.shared else client
            if whose not in desk.middles:
                _, between, _ = on.cut(reply.info["front"], reply.info["back"])
                start = {"params": on.layers.part(state["params"], between), "moments": {}}
                desk.middles[whose] = {**start, "n": desk.clients[client]["n"]}
            desk.count += 1
            name = f"{client}/{desk.number}/{desk.count}/middle"
            again = "again" in reply.info
            given = {**at_of(reply), "whose": whose, "name": name, "again": again}
            if on.rules.delta and split_deltas.OF in reply.body:
                changed(desk, client, reply.body, given)
            else:
                desk.sent[client] = {**reply.body, **given}
        elif given and place_of(given) == place_of(at_of(reply)):  # else it is of another step
            desk.clients[client] = {**known, "step": given["step"] + 1}
            desk.under_way.pop(client)
            if "gradient" in reply.body:
                desk.turned[client] = {**given, "gradient": reply.body["gradient"]}
            else:
                desk.letters[client] = Message("go", {}, place_of(given, 1))
    if sum("unfit" in known for known in desk.clients.values()) == on.job.clients:
        raise RunError(f"no client can take part: {desk.notes[0]}")


def changed(desk: Desk, client: ClientId, body: Tree, given: Tree) -> None:
    """Take up what has changed of a client's rows, or ask again where it is about others than are here."""
    try:
        found = split_deltas.received(desk.bases.get(client, {}), body, desk.free)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError, ConfigError) as error:
        desk.set_aside(client, str(error))
        return
    if found is None:
        desk.letters[client] = Message("go", {}, {**place_of(given), "again": 1.0})
        return
    desk.bases, desk.free = {**desk.bases, client: found.bases}, found.free
    desk.sent[client] = {**given, **padded(list(found.rows.values()), bool(given["masked"])), "kept": found.kept}


def tell_again(desk: Desk, client: ClientId, letter: Message | None) -> None:
    """Write once more to a client whose letter was lost: to go on with the step that it is at. It has done nothing with the letter, or, if
    its reply was lost, does the step once more; the front's last step may be left out."""
    desk.lost[client] = desk.lost.get(client, 0) + 1
    if desk.lost[client] > TRIES:
        desk.notes.append(f"no reply from {client}")
        return
    at = {"pass": 1, "step": 0, **desk.clients.get(client, {})}
    if letter is not None and letter.verb == "go":
        at |= letter.info
    desk.under_way.pop(client, None)
    ends = {end: letter.body[end] for end in ENDS if end in letter.body} if letter is not None else {}
    desk.letters[client] = Message("go", ends, place_of(at))


def answered(on: Ground, desk: Desk, found: Mapping[str, Any]) -> None:
    """Write to those that sent and turned what the middle found for them, and take its steps."""
    for client, given in desk.sent.items():
        outputs = found.get(client, {})
        if "again" in outputs and not given.get("again"):  # the cache has lost what the client does not send any more
            desk.letters[client] = Message("go", {}, {**place_of(given), "again": 1.0})
        elif HIDDEN not in outputs:
            desk.set_aside(client, "it names rows that it has not sent" if "again" in outputs else UNUSABLE)
        else:
            given = {name: x for name, x in given.items() if name not in (HIDDEN, MASK, "said", "rows", "again", "kept")}
            desk.under_way[client] = {**given, "batch": outputs["batch"], "shape": list(outputs[HIDDEN].shape)}
            flags = {
                "wanted": way(on, client, {**given, "batch": {}}, desk.middles).back,
                "kept": outputs["kept"] or desk.sent[client].get("kept"),
            }
            info = {**place_of(given), **{name: 1.0 for name, flag in flags.items() if flag}}
            desk.letters[client] = Message("turn", {HIDDEN: outputs[HIDDEN]}, info)
    together: dict[ClientId, list[ClientId]] = {}
    for client, given in desk.turned.items():
        if "slopes" in found.get(client, {}):
            together.setdefault(given["whose"], []).append(client)
        else:
            desk.set_aside(client, UNUSABLE)
    rates = {}
    for whose, members in together.items():
        at, held = desk.turned[members[0]], desk.middles[whose]
        rows = [float(len(desk.turned[c]["batch"][HIDDEN])) for c in members]
        slopes = weighted_mean([found[c]["slopes"] for c in members], rows)
        params, moments = on.descend(held["params"], held["moments"], "middle", slopes, at)
        if not is_finite(params):  # the middle stays as it was, and the others as they are
            for client in members:
                desk.set_aside(client, UNUSABLE)
            continue
        desk.middles[whose] = {**held, "params": params, "moments": moments}
        rates[whose] = on.rate(at)
        for client in members:
            inner = {"gradient": found[client]["gradient"]} if "gradient" in found[client] else {}
            desk.letters[client] = Message("go", inner, place_of(desk.turned[client], 1))
    if rates:
        desk.middles = on.rules.settle(desk.middles, rates)
