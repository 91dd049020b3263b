"""The server of split learning: it holds middles, one a client or one for all, and the conversation of a round.

The state has `params` (the whole tree as it began, or as it was averaged), `round` (finished rounds), `middles` (whose -> params, moments,
n), `clients` (how far each is, its cut and number of examples), `under_way` (what went into a middle, until its gradient comes), `busy` (who
owes a reply) and `post` (letters to be sent when the next round begins).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fedtailor.algorithms.split_rules import EVERYBODY, MASK, Ground, at_of, place_of
from fedtailor.core import (
    HIDDEN,
    LOST,
    SERVER,
    Back,
    ClientId,
    Flow,
    Keep,
    Layers,
    Letters,
    Message,
    Recall,
    Site,
    State,
    Step,
    Through,
    Tree,
)
from fedtailor.cut import cut_at
from fedtailor.errors import ConfigError, RunError
from fedtailor.trees import tree_map, weighted_mean

Round: TypeAlias = Generator[Any, Any, tuple[State, dict[ClientId, Tree]]]


@dataclass
class Desk:
    """What lies on the server's desk in a round: trees are replaced, never changed."""

    number: int
    last: int  # the pass that a client may not go beyond
    middles: Tree
    clients: Tree
    under_way: Tree
    busy: set[ClientId]
    letters: dict[ClientId, Message] = field(default_factory=dict)
    sent: Tree = field(default_factory=dict)  # this time
    turned: Tree = field(default_factory=dict)  # this time
    rested: dict[ClientId, Tree] = field(default_factory=dict)
    passes: int = 0  # that have ended in this round
    count: int = 0


def steps(on: Ground, state: State, cohort: list[ClientId], ends: Mapping[ClientId, Tree] | None = None) -> Round:
    """A round's conversation: every client of the cohort makes a pass (or goes on with it, where nobody waits). Returns (new state, what each
    client that came to rest sent of its ends); `ends` are the ends that clients are sent first.

    Raises:
        RunError: no client has room for any part.
    """
    desk, rules = opened(on, state, cohort, ends or {}), on.rules
    # Where nobody waits a round ends after so many passes, whose ever they are; the last round ends when all have ended.
    aim = len(cohort) if rules.ahead and desk.number < on.job.plan.rounds else 0
    note = ""
    while (desk.letters or not rules.lockstep) and not (aim and desk.passes >= aim):
        desk.busy |= desk.letters.keys()
        came: dict[ClientId, Message] = yield Letters(desk.letters, "all" if rules.lockstep else "any", note)
        if not came:  # nobody is left under way
            desk.letters, desk.busy = {}, set()
            break
        desk.busy -= came.keys() | (desk.letters.keys() if rules.lockstep else set())
        note = heard(on, desk, state, came)
        asked = {"sent": desk.sent, "turned": desk.turned, "middles": desk.middles}
        done = (yield {SERVER: Message("middle", asked)}) if desk.sent or desk.turned else {}
        answered(on, desk, done[SERVER].body if SERVER in done else {})
    post = {c: {"verb": m.verb, "body": m.body, "info": dict(m.info)} for c, m in desk.letters.items()}
    after = {"middles": desk.middles, "clients": desk.clients, "under_way": desk.under_way, "busy": sorted(desk.busy)}
    return {**state, **after, "post": post}, desk.rested


def opened(on: Ground, state: State, cohort: list[ClientId], ends: Mapping[ClientId, Tree]) -> Desk:
    """The desk as a round begins: letters that are left from the round before, and one to each client that is not busy."""
    number = int(state["round"]) + 1
    last = max(on.job.plan.rounds, number) if on.rules.ahead else number
    middles, clients, under_way = ({**state[name]} for name in ("middles", "clients", "under_way"))
    desk = Desk(number, last, middles, clients, under_way, set(state["busy"]))
    desk.letters = {c: Message(m["verb"], m["body"], m["info"]) for c, m in state["post"].items()}
    for client in cohort:
        first = {} if on.rules.ahead else {"pass": number, "step": 0}
        at = {"pass": 1, "step": 0, **desk.clients.get(client, {}), **first}
        if client not in desk.busy and client not in desk.letters and at["pass"] <= last and not at.get("unfit"):
            desk.under_way.pop(client, None)
            desk.letters[client] = Message("go", ends.get(client, {}), place_of(at))
    return desk


def heard(on: Ground, desk: Desk, state: State, came: Mapping[ClientId, Message]) -> str:
    """Sort what came; returns what the user should know of it."""
    desk.letters, desk.sent, desk.turned, wrong = {}, {}, {}, []
    for client, reply in sorted(came.items()):
        if reply.verb == LOST:
            continue
        reply = reply._replace(body=tree_map(lambda t: t, reply.body))  # from the disk, if it waits there
        known, given = desk.clients.get(client, {}), desk.under_way.get(client)
        if reply.verb == "unfit":
            desk.clients[client] = {**known, "unfit": 1}
            wrong.append(f"{client} set aside: {str(reply.body['why'])[:400]}")
        elif problem := complaint(on.layers, reply, given):
            wrong.append(f"{client} set aside: {problem}")
        elif reply.verb == "rested":
            desk.passes += 1
            desk.clients[client] = {**known, **at_of(reply), "pass": int(reply.info["pass"]) + 1, "step": 0}
            if reply.info["steps"]:
                desk.rested[client] = reply.body
            if on.rules.ahead and desk.clients[client]["pass"] <= desk.last:
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
            desk.sent[client] = {**reply.body, **desk.clients[client], "whose": whose, "name": name}
        elif given and place_of(given) == place_of(at_of(reply)):  # else it is of another step
            if "gradient" in reply.body:
                desk.turned[client] = {**given, "gradient": reply.body["gradient"]}
            else:
                desk.letters[client] = Message("go", {}, place_of(given, 1))
            desk.under_way.pop(client)
    if sum("unfit" in known for known in desk.clients.values()) == on.job.clients:
        raise RunError(f"no client can take part: {'; '.join(wrong)}")
    return "; ".join(wrong)


def answered(on: Ground, desk: Desk, found: Mapping[str, Any]) -> None:
    """Write to those that sent and turned what the middle found for them, and take its steps."""
    for client, given in desk.sent.items():
        if client not in found:  # the cache has lost what the client does not send any more
            desk.letters[client] = Message("go", {}, {**place_of(given), "again": 1.0})
            continue
        outputs = found[client]
        given = {name: x for name, x in given.items() if name not in (HIDDEN, MASK, "said", "rows")}
        desk.under_way[client] = {**given, "batch": outputs["batch"], "shape": list(outputs[HIDDEN].shape)}
        flags = {"wanted": way(on, {**given, "batch": {}}, desk.middles).back, "kept": outputs["kept"]}
        info = {**place_of(given), **{name: 1.0 for name, flag in flags.items() if flag}}
        desk.letters[client] = Message("turn", {HIDDEN: outputs[HIDDEN]}, info)
    together: dict[ClientId, list[ClientId]] = {}
    for client, given in desk.turned.items():
        inner = {"gradient": found[client]["gradient"]} if "gradient" in found[client] else {}
        desk.letters[client] = Message("go", inner, place_of(given, 1))
        together.setdefault(given["whose"], []).append(client)
    rates = {}
    for whose, members in together.items():
        at, held = desk.turned[members[0]], desk.middles[whose]
        rows = [float(len(desk.turned[c]["batch"][HIDDEN])) for c in members]
        slopes = weighted_mean([found[c]["slopes"] for c in members], rows)
        params, moments = on.descend(held["params"], held["moments"], "middle", slopes, at)
        desk.middles[whose] = {**held, "params": params, "moments": moments}
        rates[whose] = on.rate(at)
    if rates:
        desk.middles = on.rules.settle(desk.middles, rates)


def middle(on: Ground, own: Tree | None, msg: Message, site: Site) -> Flow:
    """The server's part for all clients that are ready: outputs for those that sent, gradients for those that turned."""
    sent, turned, middles = msg.body["sent"], msg.body["turned"], msg.body["middles"]
    named = {c: [f"{c}/{int(row)}" for row in given["rows"]] for c, given in sent.items() if "rows" in given}
    recalls: list[Step] = [Recall(names) for names in named.values()]
    recalled = dict(zip(named, (yield recalls) if recalls else [], strict=True))
    joined: Tree = {}
    keeps: dict[ClientId, Step] = {}
    for client, given in sent.items():
        if client not in named:
            read = {name: given[name] for name in (HIDDEN, MASK) if name in given}
            joined[client] = {name: x.long() if name == MASK else x for name, x in read.items()}
            continue
        new = {f"{client}/{row}": h for row, h in given["said"].items()}
        there = {**recalled[client], **new}
        if all(name in there for name in named[client]):
            joined[client] = padded([there[name] for name in named[client]], bool(given["masked"]))
            keeps[client] = Keep(new, on.rules.cache)
    kept = dict(zip(keeps, (yield list(keeps.values())) if keeps else [], strict=True))
    todo: list[Step] = [way(on, {**sent[client], "batch": batch}, middles) for client, batch in joined.items()]
    todo += [Back(way(on, given, middles), given["gradient"]) for given in turned.values()]
    found = yield todo
    body: Tree = {}
    for client, outputs in zip(joined, found, strict=False):
        body[client] = {HIDDEN: outputs, "batch": joined[client], "kept": bool(kept.get(client))}
    for client, slopes in zip(turned, found[len(joined) :], strict=True):
        body[client] = {"slopes": slopes.params, **({} if slopes.hidden is None else {"gradient": slopes.hidden})}
    return own, Message("passed", body)


def way(on: Ground, given: Tree, middles: Tree) -> Through:
    """A client's batch through its middle."""
    at, params = on.cut(given["front"], given["back"])[1], middles[given["whose"]]["params"]
    back = bool(given["inward"]) or bool(on.moving(params, "middle", int(given["pass"])))
    return Through(at, params, given["batch"], given["name"], bool(given["inward"]), back)


def padded(rows: list[Tensor], masked: bool) -> Tree:
    """Hidden states of single examples, (tokens, width) each, as a batch, with a mask where the model reads one."""
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return {HIDDEN: hidden, **({MASK: mask.long()} if masked else {})}


def complaint(layers: Layers, reply: Message, given: Tree | None) -> str:
    """What is wrong with a client's message; "" if nothing is."""
    try:
        if reply.verb == "turned":
            gradient = reply.body.get("gradient")
            if gradient is not None and given and list(gradient.shape) != given["shape"]:
                return f"its gradient has shape {list(gradient.shape)}, where {given['shape']} was sent"
            return ""
        info = at_of(reply)
        cut_at(layers, info["front"], info["back"])
        if reply.verb == "rested":
            return ""
        hidden = list(reply.body["said"].values()) if "rows" in reply.body else [reply.body[HIDDEN]]
        for h in hidden:
            if h.dim() != 2 + ("rows" not in reply.body) or (layers.hidden and h.shape[-1] != layers.hidden):
                return f"its hidden states have shape {list(h.shape)}, where the last axis is {layers.hidden or 'the width'}"
        if MASK in reply.body and reply.body[MASK].shape != hidden[0].shape[:2]:
            return f"its mask has shape {list(reply.body[MASK].shape)}, its hidden states {list(hidden[0].shape)}"
    except (KeyError, AttributeError, ConfigError) as error:
        return str(error)
    return ""
