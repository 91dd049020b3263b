"""What split algorithms share: a client's ends of the model, the server's middle, and the steps that go between them.

    client  h1 = front(x)                                             up
    server  h2 = middle(h1)                                           down
    client  loss(back(h2), y), its step on the back; gradient of h2   up, unless nobody wants it
    server  its step on the middle; gradient of h1                    down, if the front trains
    client  its step on the front
Labels and texts stay at home; the attention mask goes up. What tells one algorithm from another is in its `Rules`.

A front that nothing moves says the same of an example each time, so it is sent once: the server keeps it in the engine's cache and says
so, and the client names the row from then on. Where the cache is lost the server asks again. Such a row goes through the front alone and
unpadded, so that its bits do not depend on who shared its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedtailor.algorithms.fedavg import one_size
from fedtailor.core import (
    HIDDEN,
    LOST,
    SERVER,
    TARGETS,
    Algorithm,
    Back,
    ClientId,
    Flow,
    Handler,
    Job,
    Keep,
    Layers,
    Letters,
    Message,
    Part,
    Recall,
    Site,
    Slope,
    State,
    Step,
    Talk,
    Through,
    Tree,
    answer_with,
)
from fedtailor.cut import cut_at
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError, RunError
from fedtailor.optimizers import learning_rate, stepped
from fedtailor.trees import select, tree_map, weighted_mean

MASK = "attention_mask"
ENDS = ("front", "back")
EVERYBODY: ClientId = "everybody"
"""Whose the middle is where there is one for all."""


class Rules(NamedTuple):
    """What tells one split algorithm from another. Rounds count from 1."""

    cut: Callable[[Site], tuple[int, int]]  # layers of this client at the front and at the back; 0 at the back is the head alone
    moves: Callable[[int, str, str], bool] = lambda round, place, name: True  # is this tensor of front, middle or back trained?
    settle: Callable[[Tree, Mapping[ClientId, float]], Tree] = lambda middles, rates: middles  # after steps at these rates
    shared: bool = False  # one middle for all clients
    lockstep: bool = False  # everybody's step before anybody's next one
    ahead: bool = False  # a client that is done goes on with its next pass; else it waits for the round to end
    cache: float = 1e9  # bytes that the server keeps of what frozen fronts said
    start: Callable[[Tree], Tree] = lambda tree: tree  # what everybody makes of the technique's initial tree


class Split(NamedTuple):
    """A split algorithm's pieces; `algorithm` puts them together."""

    layers: Layers
    handlers: Mapping[str, Handler]
    begin: Callable[[Tree], State]
    steps: Callable[..., Generator[Any, Any, tuple[State, dict[ClientId, Tree]]]]
    personal: Callable[[Tree | None, Tree, Site], Tree]


def split(job: Job, name: str, rules: Rules) -> Split:
    """Handlers of clients and server, and `steps(state, cohort, ends)`: a round's conversation, which returns (new state, what each
    client that came to rest sent of its ends). `ends` are the ends that clients of the cohort are sent first.

    The state has `params` (the whole tree as it began), `round` (finished rounds), `middles` (by client: params, moments), `clients` (how far each
    is, its cut and number of examples), `under_way` (what went into a middle, until its gradient comes) and `post` (letters to be sent).
    """
    one_size(job, name)
    if job.layers is None:
        raise ConfigError(
            f"algorithm {name} cuts a model by its layers: use a model that has a list of them, and technique lora, prefix, full, ia3 or head"
        )
    if job.plan.dropout:
        raise ConfigError(
            f"algorithm {name} computes parts again where it has to, which dropout would change: set train.dropout = false"
        )
    layers: Layers = job.layers

    def cut(front: float, back: float) -> tuple[Part, Part, Part]:
        return cut_at(layers, int(front), int(back))

    def moving(tree: Tree, place: str, round: int) -> list[str]:
        return [tensor for tensor in tree if rules.moves(round, place, tensor)]

    # A client

    def begun(own: Tree | None, site: Site, at: tuple[int, int] | None = None) -> Tree:
        if own:
            return own
        at, init = at or rules.cut(site), rules.start(site.init)
        first, _, last = cut(*at)
        ends = {"front": layers.part(init, first), "back": layers.part(init, last)}
        never = not any(moving(ends["front"], "front", round) for round in range(1, max(job.plan.rounds, site.round) + 1))
        kept = {"kept": torch.zeros(len(site.data["train"]), dtype=torch.bool)} if never and rules.cache else {}
        return {**ends, **kept, "moments": {"front": {}, "back": {}}, "cut": list(at)}

    def batch_of(site: Site, rows: np.ndarray) -> dict[str, Any]:
        data = site.data["train"]
        return data.batch(rows, int(data.lengths[rows].max()), len(rows))

    def through_front(own: Tree, batch: Tree, name: str, back: bool) -> Through:
        read = {name: x for name, x in batch.items() if name not in TARGETS}
        return Through(cut(*own["cut"])[0], own["front"], read, name, back=back)

    def go(own: Tree | None, msg: Message, site: Site) -> Flow:
        """Take the front's step back, if there is one, and go on to the next batch."""
        step, number = int(msg.info["step"]), int(msg.info["pass"])
        try:
            own = begun(own, site)
        except ConfigError as error:  # its device has no room for any part
            return own, Message("unfit", {"why": str(error)}, place_of(msg.info))
        order = order_of(job, site, number)
        own = {**own, **{end: {**own[end], **msg.body[end]} for end in ENDS if end in msg.body}}
        if "gradient" in msg.body:
            before = through_front(own, batch_of(site, order[step - 1]), name_of(site, number, step - 1), True)
            slopes = yield Back(before, msg.body["gradient"])
            own = descended(own, "front", slopes.params, number, step - 1, len(order))
        inward = bool(moving(own["front"], "front", number))
        front, back = own["cut"]
        info = numbers(
            {"pass": number, "step": step, "steps": len(order), "n": len(site.data["train"]), "inward": inward}
            | {"front": front, "back": back, "number": site.number}
        )
        if step >= len(order):
            rested = {end: select(own[end], moving(own[end], end, number)) for end in ENDS}
            return own, Message("rested", {} if rules.ahead else rested, info)
        rows = order[step]
        if "kept" in own:
            new = rows if "again" in msg.info else rows[~own["kept"][torch.from_numpy(rows.copy())].numpy()]
            asks: list[Step] = [through_front(own, batch_of(site, row[None]), name_of(site, number, step), False) for row in new]
            said = yield asks
            body = {
                "rows": torch.from_numpy(rows.astype(np.int32)),
                "said": {str(r): h[0] for r, h in zip(new, said, strict=True)},
            }
            return own, Message("sent", body, info)
        batch = batch_of(site, rows)
        hidden = yield through_front(own, batch, name_of(site, number, step), inward)
        mask = {MASK: batch[MASK].to(torch.uint8)} if MASK in batch else {}
        return own, Message("sent", {HIDDEN: hidden, **mask}, info)

    def turn(own: Tree | None, msg: Message, site: Site) -> Flow:
        """Loss, and the step of the back."""
        own, step, number = begun(own, site), int(msg.info["step"]), int(msg.info["pass"])
        order = order_of(job, site, number)
        rows, hidden = order[step], msg.body[HIDDEN]
        batch = batch_of(site, rows)
        if "kept" in own and "kept" in msg.info:
            kept = own["kept"].clone()
            kept[torch.from_numpy(rows.copy())] = True
            own = {**own, "kept": kept}
        if MASK in batch and batch[MASK].shape[1] > hidden.shape[1]:  # the head reads no more than this
            batch = {name: x[:, : hidden.shape[1]] if x.dim() == 2 else x for name, x in batch.items()}
        found = yield Slope(job.loss, cut(*own["cut"])[2], own["back"], {**batch, HIDDEN: hidden})
        own = descended(own, "back", found.params, number, step, len(order))
        info = {"pass": number, "step": step, "steps": len(order), "n": len(site.data["train"]), "examples": len(rows)}
        body = {"gradient": found.hidden} if "wanted" in msg.info else {}
        return own, Message("turned", body, {**numbers(info), "loss": found.loss})

    def descended(own: Tree, end: str, slopes: Tree, number: int, step: int, steps: int) -> Tree:
        params, moments = descend(own[end], own["moments"][end], end, slopes, number, step, steps)
        return {**own, end: params, "moments": {**own["moments"], end: moments}}

    def descend(tree: Tree, moments: Tree, place: str, slopes: Tree, number: int, step: int, steps: int) -> tuple[Tree, Tree]:
        """(tree, optimiser state) after a step of the tensors that move in this pass."""
        names = moving(tree, place, number)
        held = moments.get("m", moments.get("momentum"))
        if held is not None and set(held) != set(names):  # others moved before
            moments = {}
        rate = learning_rate(job.plan.at(number), step, steps)
        params, moments = stepped(job.plan, select(tree, names), select(slopes, names), moments, rate)
        return {**tree, **params}, moments

    # The server

    def middle(own: Tree | None, msg: Message, site: Site) -> Flow:
        """The server's part for all clients that are ready: outputs for those that sent, a step for those that turned."""
        sent, turned, middles = msg.body["sent"], msg.body["turned"], msg.body["middles"]
        body: Tree = {}
        joined: Tree = {}
        recalls: list[Step] = [
            Recall([f"{client}/{int(row)}" for row in given["rows"]]) for client, given in sent.items() if "rows" in given
        ]
        recalled = iter((yield recalls) if recalls else [])
        keeps: dict[ClientId, Step] = {}
        for client, given in sent.items():
            if "rows" not in given:
                joined[client] = {
                    name: given[name].long() if name == MASK else given[name] for name in (HIDDEN, MASK) if name in given
                }
                continue
            there = {**next(recalled), **{f"{client}/{row}": h for row, h in given["said"].items()}}
            names = [f"{client}/{int(row)}" for row in given["rows"]]
            if all(name in there for name in names):
                joined[client] = padded([there[name] for name in names])
                keeps[client] = Keep({f"{client}/{row}": h for row, h in given["said"].items()}, rules.cache)
        kept = dict(zip(keeps, (yield list(keeps.values())) if keeps else [], strict=True))
        todo: list[Step] = [way({**sent[client], "batch": batch}, middles) for client, batch in joined.items()]
        todo += [Back(way(given, middles), given["gradient"]) for given in turned.values()]
        found = yield todo
        for client, outputs in zip(joined, found, strict=False):
            body[client] = {HIDDEN: outputs, "batch": joined[client], "kept": bool(kept.get(client))}
        for client, slopes in zip(turned, found[len(joined) :], strict=True):
            body[client] = {"slopes": slopes.params, **({} if slopes.hidden is None else {"gradient": slopes.hidden})}
        return own, Message("passed", body)

    def way(given: Tree, middles: Tree) -> Through:
        at, params = cut(given["front"], given["back"])[1], middles[given["whose"]]["params"]
        back = bool(given["inward"]) or bool(moving(params, "middle", int(given["pass"])))
        return Through(at, params, given["batch"], given["name"], bool(given["inward"]), back)

    def whose(client: ClientId) -> ClientId:
        return EVERYBODY if rules.shared else client

    def steps(
        state: State, cohort: list[ClientId], ends: Mapping[ClientId, Tree] | None = None
    ) -> Generator[Any, Any, tuple[State, dict[ClientId, Tree]]]:
        number = int(state["round"]) + 1
        last = max(job.plan.rounds, number) if rules.ahead else number
        middles, clients, under_way = ({**state[name]} for name in ("middles", "clients", "under_way"))
        letters = {c: Message(m["verb"], m["body"], m["info"]) for c, m in state["post"].items()}
        busy = set(state["busy"])
        for client in cohort:
            first = {} if rules.ahead else {"pass": number, "step": 0}
            at = {"pass": 1, "step": 0, **clients.get(client, {}), **first}
            if client not in busy and client not in letters and at["pass"] <= last and not at.get("unfit"):
                under_way.pop(client, None)
                letters[client] = Message("go", (ends or {}).get(client, {}), place_of(at))
        aim = len(cohort) if rules.ahead and number < job.plan.rounds else 0  # passes after which the round ends; 0: all of them
        passes, rested, note, count = 0, {}, "", 0
        while letters or not rules.lockstep:
            if aim and passes >= aim:
                break
            busy |= letters.keys()
            came: dict[ClientId, Message] = yield Letters(letters, "all" if rules.lockstep else "any", note)
            if not came:  # nobody is left under way
                letters, busy = {}, set()
                break
            busy -= came.keys() | (letters.keys() if rules.lockstep else set())
            letters, sent, turned, wrong = {}, {}, {}, []
            for client, reply in sorted(came.items()):
                if reply.verb == LOST:
                    continue
                reply = reply._replace(body=tree_map(lambda t: t, reply.body))  # from the disk, if it waits there
                known, given = clients.get(client, {}), under_way.get(client)
                problem = str(reply.body["why"])[:400] if reply.verb == "unfit" else complaint(layers, reply, given)
                if reply.verb == "unfit":
                    clients[client] = {**known, "unfit": 1}
                if problem:
                    wrong.append(f"{client} set aside: {problem}")
                elif reply.verb == "rested":
                    passes += 1
                    clients[client] = {**known, **at_of(reply), "pass": int(reply.info["pass"]) + 1, "step": 0}
                    if reply.info["steps"]:
                        rested[client] = reply.body
                    if rules.ahead and clients[client]["pass"] <= last:
                        letters[client] = Message("go", {}, place_of(clients[client]))
                elif reply.verb == "sent":
                    clients[client] = {**known, **at_of(reply)}
                    owner = whose(client)
                    if owner not in middles:
                        _, between, _ = cut(reply.info["front"], reply.info["back"])
                        middles[owner] = {
                            "params": layers.part(state["params"], between),
                            "moments": {},
                            "n": clients[client]["n"],
                        }
                    count += 1
                    sent[client] = {
                        **reply.body,
                        **clients[client],
                        "whose": owner,
                        "name": f"{client}/{number}/{count}/middle",
                    }
                elif given and place_of(given) == place_of(at_of(reply)):  # else it is of another step
                    if "gradient" in reply.body:
                        turned[client] = {**given, "gradient": reply.body["gradient"]}
                    else:
                        letters[client] = Message("go", {}, place_of(given, 1))
                    under_way.pop(client)
            note = "; ".join(wrong)
            if sum("unfit" in known for known in clients.values()) == job.clients:
                raise RunError(f"no client can take part: {note}")
            asked = {"sent": sent, "turned": turned, "middles": middles}
            done = (yield {SERVER: Message("middle", asked)}) if sent or turned else {}
            found = done[SERVER].body if SERVER in done else {}
            for client, given in sent.items():
                if client not in found:  # the cache has lost what the client does not send any more
                    letters[client] = Message("go", {}, {**place_of(given), "again": 1.0})
                    continue
                outputs = found[client]
                given = {name: x for name, x in given.items() if name not in (HIDDEN, MASK, "said", "rows")}
                under_way[client] = {**given, "batch": outputs["batch"], "shape": list(outputs[HIDDEN].shape)}
                wanted = way({**given, "batch": {}}, middles).back
                flags = {name: 1.0 for name, on in (("wanted", wanted), ("kept", outputs["kept"])) if on}
                letters[client] = Message("turn", {HIDDEN: outputs[HIDDEN]}, {**place_of(given), **flags})
            together: dict[ClientId, list[ClientId]] = {}
            for client in turned:
                inner = {"gradient": found[client]["gradient"]} if "gradient" in found[client] else {}
                letters[client] = Message("go", inner, place_of(turned[client], 1))
                together.setdefault(whose(client), []).append(client)
            rates = {}
            for owner, members in together.items():
                given = turned[members[0]]
                slopes = weighted_mean(
                    [found[c]["slopes"] for c in members], [float(len(next(iter(turned[c]["batch"].values())))) for c in members]
                )
                number_, step, steps_ = (int(given[name]) for name in ("pass", "step", "steps"))
                params, moments = descend(
                    middles[owner]["params"], middles[owner]["moments"], "middle", slopes, number_, step, steps_
                )
                middles[owner] = {**middles[owner], "params": params, "moments": moments}
                rates[owner] = learning_rate(job.plan.at(number_), step, steps_)
            if rates:
                middles = rules.settle(middles, rates)
        post = {c: {"verb": m.verb, "body": m.body, "info": dict(m.info)} for c, m in letters.items()}
        after = {"middles": middles, "clients": clients, "under_way": under_way, "busy": sorted(busy), "post": post}
        return {**state, **after}, rested

    def begin(params: Tree) -> State:
        return {"params": rules.start(params), "round": 0, "middles": {}, "clients": {}, "under_way": {}, "busy": [], "post": {}}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        mine = begun(own, site, (layers.least, 1))  # of a client that has no cut yet, any gives the same whole
        _, between, _ = cut(*mine["cut"])
        front, back = ({**mine[end], **broadcast.get(end, {})} for end in ENDS)
        return layers.whole([front, broadcast.get("middle") or layers.part(rules.start(site.init), between), back])

    return Split(layers, {"go": go, "turn": turn, "middle": middle}, begin, steps, personal)


def algorithm(
    job: Job,
    parts: Split,
    round: Callable[[State, list[ClientId]], Talk],
    model: Callable[[State], Tree],
    said: Callable[[State, ClientId], Tree],
) -> Algorithm:
    """A split algorithm; `said` is what a client is sent to judge itself: the middle, and the ends that are not its own."""

    def counted(state: State, cohort: list[ClientId]) -> Talk:
        after = yield from round(state, cohort)
        return {**after, "round": state["round"] + 1}

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        return (yield {c: Message("answer", said(state, c)) for c in cohort})

    _, judged = answer_with(job, lambda state: {}, parts.personal)
    return Algorithm(
        init=parts.begin,
        round=counted,
        client={**parts.handlers, "answer": judged},
        answer=answer,
        model=model,
        personal=parts.personal,
        updates=False,
        splits=True,
    )


def own_middle(state: State, client: ClientId) -> Tree:
    """What a client is sent to judge itself where its ends are its own."""
    return {"middle": state["middles"][client]["params"]} if client in state["middles"] else {}


def order_of(job: Job, site: Site, number: int) -> list[np.ndarray]:
    """Rows of each step of this pass: the same whenever they are asked for."""
    return batches(job.plan, site.data["train"].lengths, site._replace(round=number).random("split"))


def name_of(site: Site, number: int, step: int) -> str:
    return f"{site.id}/{number}/{step}/front"


def place_of(given: Mapping[str, Any], further: int = 0) -> dict[str, float]:
    """Where in its work a client is: what its messages are told apart by."""
    return {"pass": float(given["pass"]), "step": float(given["step"] + further)}


def numbers(info: Mapping[str, float]) -> dict[str, float]:
    return {name: float(x) for name, x in info.items()}


def at_of(reply: Message) -> dict[str, int]:
    """What a client says of itself."""
    names = ("pass", "step", "steps", "n", "front", "back", "inward", "number")
    return {name: int(reply.info[name]) for name in names if name in reply.info}


def padded(rows: list[Tensor]) -> Tree:
    """Hidden states of single examples, (tokens, width) each, as a batch with its mask; none where all are of one length."""
    lengths = torch.tensor([len(row) for row in rows])
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return {HIDDEN: hidden, MASK: mask.long()}


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
