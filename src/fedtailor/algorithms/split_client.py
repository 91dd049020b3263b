"""A client of split learning: it holds its own ends of the model, its texts and its labels.

    go     takes the front's step back, if there is one, and sends the next batch's hidden states; rests where its pass is done
    turn   loss and the step of the back; sends the gradient of what came, if anybody wants it

A front that nothing moves says the same of an example each time, so it is sent once: the server keeps it in the engine's cache and says
so, and the client names the row from then on. Where the cache is lost the server asks again. Such a row goes through the front alone and
unpadded, so that its bits do not depend on who shared its batch. With dropout nothing is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedtailor.algorithms import split_deltas
from fedtailor.algorithms.split_rules import ENDS, MASK, Ground, place_of
from fedtailor.core import HIDDEN, TARGETS, Back, Flow, Handler, Job, Message, Site, Slope, Step, Through, Tree
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.trees import select


def handlers(on: Ground) -> dict[str, Handler]:
    """The client's handlers, by verb."""

    def through_front(own: Tree, site: Site, batch: Tree, at: tuple[int, int], back: bool) -> Through:
        read = {name: x for name, x in batch.items() if name not in TARGETS}
        seed = on.seed(site.seed, site.id, "front", *at)
        return Through(on.cut(*own["cut"])[0], own["front"], read, name_of(site, *at), back=back, seed=seed)

    def go(own: Tree | None, msg: Message, site: Site) -> Flow:
        step, number = int(msg.info["step"]), int(msg.info["pass"])
        try:
            mine = begun(on, own, site)
        except ConfigError as error:  # its device has no room for any part
            return own, Message("unfit", {"why": str(error)}, place_of(msg.info))
        order = order_of(on.job, site, number)
        mine = {**mine, **{end: {**mine[end], **msg.body[end]} for end in ENDS if end in msg.body}}
        if "gradient" in msg.body:
            before = through_front(mine, site, batch_of(site, order[step - 1]), (number, step - 1), True)
            slopes = yield Back(before, msg.body["gradient"])
            mine = descended(mine, "front", slopes.params, {"pass": number, "step": step - 1, "steps": len(order)})
        inward = bool(on.moving(mine["front"], "front", number))
        info = info_of(site, number, step, len(order), mine["cut"], inward=inward, number=site.number)
        if step >= len(order):
            if number >= on.job.plan.rounds:  # it was its last pass
                mine = {name: x for name, x in mine.items() if name not in ("bases", "new")}
            rested = {end: select(mine[end], on.moving(mine[end], end, number)) for end in ENDS}
            return mine, Message("rested", {} if on.rules.ahead else rested, info)
        rows = order[step]
        batch = batch_of(site, rows)
        info |= {"masked": float(MASK in batch)}
        if "kept" not in mine:
            info |= {"again": 1.0} if "again" in msg.info else {}
            hidden = yield through_front(mine, site, batch, (number, step), inward)
            if on.rules.delta:
                each = [h[:length] for h, length in zip(hidden, lengths_of(batch, hidden), strict=True)]
                bases, body = split_deltas.said(on.rules.delta, mine.get("bases", {}), rows.tolist(), each, "again" in msg.info)
                return {**mine, "bases": bases, "new": list(body["said"])}, Message("sent", body, info)
            mask = {MASK: batch[MASK].to(torch.uint8)} if MASK in batch else {}
            return mine, Message("sent", {HIDDEN: hidden, **mask}, info)
        info |= {"again": 1.0} if "again" in msg.info else {}
        new = rows if "again" in msg.info else rows[~mine["kept"][torch.from_numpy(rows.copy())].numpy()]
        asks: list[Step] = [through_front(mine, site, batch_of(site, row[None]), (number, step), False) for row in new]
        said = yield asks
        body = {"rows": torch.from_numpy(rows.astype(np.int32)), "said": {str(r): h[0] for r, h in zip(new, said, strict=True)}}
        return mine, Message("sent", body, info)

    def turn(own: Tree | None, msg: Message, site: Site) -> Flow:
        mine, step, number = begun(on, own, site), int(msg.info["step"]), int(msg.info["pass"])
        order = order_of(on.job, site, number)
        rows, hidden = order[step], msg.body[HIDDEN]
        batch = batch_of(site, rows)
        if "kept" in mine and "kept" in msg.info:
            kept = mine["kept"].clone()
            kept[torch.from_numpy(rows.copy())] = True
            mine = {**mine, "kept": kept}
        if "new" in mine and "kept" not in msg.info:  # the server has no room for what it was sent whole
            mine = {**mine, "bases": {row: h for row, h in mine["bases"].items() if row not in mine["new"]}}
        given = {**shortened(batch, hidden), HIDDEN: hidden}
        seed = on.seed(site.seed, site.id, "back", number, step)
        found = yield Slope(on.job.loss, on.cut(*mine["cut"])[2], mine["back"], given, seed=seed)
        mine = descended(mine, "back", found.params, {"pass": number, "step": step, "steps": len(order)})
        info = info_of(site, number, step, len(order), mine["cut"], examples=len(rows))
        body = {"gradient": found.hidden} if "wanted" in msg.info else {}
        return mine, Message("turned", body, {**info, "loss": found.loss})

    def descended(own: Tree, end: str, slopes: Tree, at: Mapping[str, int]) -> Tree:
        params, moments = on.descend(own[end], own["moments"][end], end, slopes, at)
        return {**own, end: params, "moments": {**own["moments"], end: moments}}

    return {"go": go, "turn": turn}


def begun(on: Ground, own: Tree | None, site: Site, at: tuple[int, int] | None = None) -> Tree:
    """What a client has: of its own, or to begin with; `at` is the cut of one that has none yet.

    Raises:
        ConfigError: its device has no room for any cut.
    """
    if own:
        return own
    cut, init, job = at or on.rules.cut(site), on.rules.start(site.init), on.job
    first, _, last = on.cut(*cut)
    ends = {"front": on.layers.part(init, first), "back": on.layers.part(init, last)}
    passes = range(1, max(job.plan.rounds, site.round) + 1)
    frozen = not any(on.moving(ends["front"], "front", number) for number in passes)
    kept = {"kept": torch.zeros(len(site.data["train"]), dtype=torch.bool)} if frozen and on.rules.cache else {}
    return {**ends, **kept, "moments": {"front": {}, "back": {}}, "cut": list(cut)}


def personal(on: Ground, own: Tree | None, broadcast: Tree, site: Site) -> Tree:
    """A client's whole tree: its ends, unless others were sent, around the middle that was sent."""
    mine = begun(on, own, site, (on.layers.least, 0))  # of a client that has no cut yet, any gives the same whole
    _, between, _ = on.cut(*mine["cut"])
    front, back = ({**mine[end], **broadcast.get(end, {})} for end in ENDS)
    return on.layers.whole([front, broadcast.get("middle") or on.layers.part(on.rules.start(site.init), between), back])


def order_of(job: Job, site: Site, number: int) -> list[np.ndarray]:
    """Rows of each step of this pass: the same whenever they are asked for."""
    return batches(job.plan, site.data["train"].lengths, site._replace(round=number).random("split"))


def batch_of(site: Site, rows: np.ndarray, split: str = "train") -> dict[str, Any]:
    data = site.data[split]
    return data.batch(rows, int(data.lengths[rows].max()), len(rows))


def shortened(batch: Tree, hidden: torch.Tensor) -> Tree:
    """The batch beside hidden states that are fewer: the head reads no more than these."""
    if MASK not in batch or batch[MASK].shape[1] <= hidden.shape[1]:
        return batch
    return {name: x[:, : hidden.shape[1]] if x.dim() == 2 else x for name, x in batch.items()}


def lengths_of(batch: Tree, hidden: torch.Tensor) -> list[int]:
    """Hidden states of each row of a batch that are no padding."""
    return batch[MASK].sum(1).tolist() if MASK in batch else [hidden.shape[1]] * len(hidden)


def name_of(site: Site, number: int, step: int) -> str:
    """Of a way through the front. What is under way when a round ends has another name in the next: it is gone again, alone, in a run that
    was killed between them and in one that was not."""
    return f"{site.id}/{site.round}/{number}/{step}/front"


def info_of(site: Site, pass_: int, step: int, steps: int, cut: list[int], **more: float) -> dict[str, float]:
    """What a client says of itself with each message."""
    info = {"pass": pass_, "step": step, "steps": steps, "n": len(site.data["train"]), "front": cut[0], "back": cut[1], **more}
    return {name: float(x) for name, x in info.items()}
