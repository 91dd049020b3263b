"""What the server computes of split steps: the middle's outputs and gradients, and what frozen fronts said, from the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from fedtailor.algorithms.split_rules import MASK, Ground
from fedtailor.core import HIDDEN, Back, ClientId, Flow, Keep, Message, Recall, Site, Step, Through, Tree
from fedtailor.trees import is_finite


def middle(on: Ground, own: Tree | None, msg: Message, site: Site) -> Flow:
    """The server's part for all clients that are ready: outputs for those that sent, gradients for those that turned; of a client whose
    numbers are not finite there is nothing."""
    sent, turned, middles = msg.body["sent"], msg.body["turned"], msg.body["middles"]
    named = {c: [f"{c}/{int(row)}" for row in given["rows"]] for c, given in sent.items() if "rows" in given}
    recalls: list[Step] = [Recall(names) for names in named.values()]
    recalled = dict(zip(named, (yield recalls) if recalls else [], strict=True))
    body: Tree = {}
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
        else:
            body[client] = {"again": 1}
    kept = dict(zip(keeps, (yield list(keeps.values())) if keeps else [], strict=True))
    todo: list[Step] = [way(on, client, {**sent[client], "batch": batch}, middles) for client, batch in joined.items()]
    todo += [Back(way(on, client, given, middles), given["gradient"]) for client, given in turned.items()]
    found = yield todo
    for client, outputs in zip(joined, found, strict=False):
        if is_finite({"": outputs}):
            body[client] = {HIDDEN: outputs, "batch": joined[client], "kept": bool(kept.get(client))}
    for client, slopes in zip(turned, found[len(joined) :], strict=True):
        inner = {} if slopes.hidden is None else {"gradient": slopes.hidden}
        if is_finite(slopes.params) and is_finite(inner):
            body[client] = {"slopes": slopes.params, **inner}
    return own, Message("passed", body)


def way(on: Ground, client: ClientId, given: Tree, middles: Tree) -> Through:
    """A client's batch through its middle."""
    at, params = on.cut(given["front"], given["back"])[1], middles[given["whose"]]["params"]
    back = bool(given["inward"]) or bool(on.moving(params, "middle", int(given["pass"])))
    seed = on.seed(on.job.seed, client, "middle", int(given["pass"]), int(given["step"]))
    return Through(at, params, given["batch"], given["name"], bool(given["inward"]), back, seed)


def padded(rows: list[Tensor], masked: bool) -> Tree:
    """Hidden states of single examples, (tokens, width) each, as a batch, with a mask where the model reads one."""
    hidden = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return {HIDDEN: hidden, **({MASK: mask.long()} if masked else {})}
