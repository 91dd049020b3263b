"""Fed-Influence: Toward Understanding the Influence of Individual Clients in Federated Learning (Xue et al., AAAI 2021, arXiv 2012.10936).

A monitor beside FedAvg or a rule like it: how would today's tree differ had client c never been there? With C the clients of a round,
R = C without c, p_k n_k over the sum of R's, and client k's m steps at rate eta:
    eps_c  <-  sum_R p_k [prod_i (I - eta H_k,i)] eps_c   +   (sum_R p_k w_k - w, where c was in the round, else 0)
                           sequential                                      combinatorial
    H_k,i  the Hessian of k's loss before step i, here  mean_z g_z g_z'  over `samples` rows z of k's (the empirical Fisher)
    FIP = ||eps_c||,   FIL = loss(w + eps_c) - loss(w),   FIA = the same of the metric's share of right rows
High FIL: the client is worth having. With the true Hessians and quadratic losses eps_c is retraining without c, exactly (a test).
LWET (`truncate`): each tensor is followed by itself, with its own block of H; where the sequential part of a round is longer than the
eps_c that it came from, that tensor's is dropped for good, and only the combinatorial is left: errors would grow from round to round.
Clients send, besides their difference, g_z for each row and step: m * samples |t| more up. **A gradient of one row tells much of it.**
What is watched is the same bits as without. Plain SGD with a constant rate only: (I - eta H) is the way back of no other step.

The equations are rebuilt from the paper's text; its supplement was not at hand. Ours: where c was alone in a round, the tree would not
have moved; LWET is tested in every round on what the round would make of eps_c; FedProx's mu pulls to a start that is shifted as well,
eps <- eps - eta (H eps + mu (eps - eps_before)); eps starts at 0 when a client is first heard, which is exact.
Cleansing: from round `cleanse_at` on the `share` of clients with the lowest FIL is not asked any more. FIL is measured on the server's
test rows, as in the paper, which a choice by it uses up; `on = "valid"` takes everybody's validation rows, which only a simulation has.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, spoken
from fedtailor.algorithms.fedavg import fedavg, one_size, weights_by
from fedtailor.algorithms.fedlc import fedlc
from fedtailor.algorithms.fedprox import fedprox
from fedtailor.algorithms.lora_averaging import fedit
from fedtailor.algorithms.shifts import GROWN, followed, lengths
from fedtailor.core import (
    SERVER,
    Algorithm,
    Batch,
    ClientId,
    Fit,
    Flow,
    Forward,
    Handler,
    Job,
    Letters,
    Loss,
    Message,
    Predict,
    Site,
    State,
    Talk,
    Tree,
)
from fedtailor.errors import ConfigError, first_line, one_of
from fedtailor.metrics import mean_loss
from fedtailor.trees import nbytes, numel, subtract

RULES: Mapping[str, Callable[..., Algorithm]] = {"fedavg": fedavg, "fedit": fedit, "fedlc": fedlc, "fedprox": fedprox}
"""Rules whose new tree is the old one and the weighted mean of the clients' differences."""
BACK = 3  # forward passes that a gradient takes
FILES = 2  # a round's shifts lie beside those of the last one


@card("global", "|t| (1 + steps x samples)", "|t|", "exact")
def fed_influence(
    job: Job,
    *,
    rule: str = "fedavg",
    options: dict[str, Any] = {},  # noqa: B006 (never written to)
    samples: int = 4,
    truncate: bool = True,
    on: str = "test",
    every: int = 0,
    cleanse_at: int = 0,
    share: float = 0.1,
    room: float = 2.0,
) -> Algorithm:
    """Estimates what each client's part in a federated mean has done, and may leave out the worst; `rule` is what is watched."""
    one_size(job, "fed_influence")
    one_of("algorithm.rule", rule, tuple(RULES))
    one_of("algorithm.on", on, ("test", "valid"))
    plan = job.plan
    if plan.optimizer != "sgd" or plan.momentum or plan.schedule != "constant" or plan.clip or plan.weight_decay or plan.dropout:
        raise ConfigError(
            'algorithm fed_influence needs train.optimizer = "sgd" with a constant rate and no momentum, clip, weight_decay or '
            f"dropout: it follows differences back through the steps (to train without it choose {rule})"
        )
    if samples < 1 or every < 0 or not 0 < share < 1 or (cleanse_at and cleanse_at < 2):
        raise ConfigError(
            "algorithm fed_influence needs samples >= 1, every >= 0, 0 < share < 1 and cleanse_at >= 2, or 0 for never"
        )
    try:
        watched = RULES[rule](job, **options)
    except TypeError as error:
        raise ConfigError(f"algorithm.options {options} are not those of {rule}: {first_line(error)}") from error
    weigh = weights_by(options.get("weighting", "examples"))
    mu = float(options.get("mu", (fedprox.__kwdefaults__ or {})["mu"])) if rule == "fedprox" else 0.0

    def kept(params: Tree) -> int:
        return job.clients * nbytes(params)

    def on_disk(params: Tree) -> bool:
        return kept(params) > room * 1e9

    def init(params: Tree) -> State:
        if on_disk(params) and (free := shutil.disk_usage(tempfile.gettempdir()).free) < FILES * kept(params):
            raise ConfigError(
                f"algorithm fed_influence keeps a tree a client: {job.clients} clients x {numel(params):,} numbers, "
                f"{kept(params) / 1e9:.1f} GB {FILES} times in the temporary folder, which has {free / 1e9:.1f} GB: choose a smaller "
                "technique (head, a lower rank), name another folder in TMPDIR, or raise algorithm.room, the GB that it may take in memory"
            )
        inner = watched.init(params)
        # Zero clients' worth of tensors: they grow as clients are heard.
        eps = {name: t.new_zeros((0, *t.shape)) for name, t in inner["params"].items()}
        seen = {"clients": [], "eps": eps, "cut": {name: torch.zeros(0, dtype=torch.uint8) for name in eps}}
        return {**inner, "influence": seen, "turn": 0, "left_out": [], "weighed": {"turn": 0, "fil": {}, "fia": {}}}

    def watch(handler: Handler) -> Handler:
        """The rule's own handler; what it asks to be trained is looked at on the way."""

        def handle(own: Tree | None, msg: Message, site: Site) -> Flow:
            flow, rows, draw = handler(own, msg, site), site.data["train"], site.random("influence")
            ask = next(flow)
            assert isinstance(ask, Fit)
            done = yield ask._replace(plan=ask.plan._replace(path=True))
            # A pull to the start has a Hessian that the server knows.
            loss, aux = (job.loss if mu else ask.loss), {name: t for name, t in ask.aux.items() if name != "anchor"}
            steps = []
            for params in done.path:
                picked = rows.take(torch.randperm(len(rows), generator=draw)[:samples].tolist())
                steps.append((yield Predict(partial(gradients, loss), {"params": params, "aux": aux}, picked, passes=BACK)))
            try:
                flow.send(done)
            except StopIteration as end:
                own, reply = end.value
            found = {name: torch.stack([step[name] for step in steps]) for name in steps[0]} if steps else {}
            return own, Message("watched", {"update": reply.body, "gradients": found}, reply.info)

        return handle

    def weighed(own: Tree | None, msg: Message, site: Site) -> Flow:
        """The server's: what the tree is worth without any shift and with each client's, on the rows that it has."""
        rows = site.data.get(on, ())
        params, eps = msg.body["params"], msg.body["eps"]
        losses, right = [], []
        shifts = [{}, *({n: t[i] for n, t in eps.items()} for i in range(int(msg.info["clients"])))]
        for shift in shifts if len(rows) else []:
            moved = {name: t + shift[name] if shift else t for name, t in params.items()}
            sums = job.tally((yield Predict(job.judge, moved, site.data[on])))
            losses.append(mean_loss(sums))
            right.append(float(sums["correct"]) / max(float(sums["tokens" if "tokens" in sums else "n"]), 1.0))
        found = {"loss": torch.tensor(losses, dtype=torch.float64), "right": torch.tensor(right, dtype=torch.float64)}
        return own, Message("weighed", found)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        turn = int(state["turn"]) + 1
        seen, results, left_out = state["influence"], state["weighed"], state["left_out"]
        new = {name: t for name, t in state.items() if name not in ("influence", "turn", "left_out", "weighed")}
        if asked := [c for c in cohort if c not in left_out]:
            talk = watched.round(new, asked)
            replies = yield next(talk)
            if heard := {c: replies[c] for c in sorted(replies)}:
                try:
                    talk.send({c: Message("update", r.body["update"], r.info) for c, r in heard.items()})
                except StopIteration as end:
                    new = end.value
                delta = subtract(new["params"], state["params"])
                seen = followed(seen, delta, heard, [weigh(r) for r in heard.values()], mu, truncate, on_disk(delta))
        known: list[ClientId] = seen["clients"]
        # In the round before `cleanse_at`, or, where too few have been heard by then, in the next that can.
        chooses = 0 < cleanse_at <= turn + 1 and not left_out and len(known) > 1
        if known and (chooses or turn == plan.rounds or (every and turn % every == 0)):
            letter = Message("weigh", {"params": new["params"], "eps": seen["eps"]}, {"clients": float(len(known))})
            note = "clients are chosen by the server's test rows: its score on them is none of an untouched test set from here on"
            told = (yield Letters({SERVER: letter}, note=note if chooses and on == "test" else "")).get(SERVER)
            if told and len(told.body["loss"]):
                fil, fia = ((t[1:] - t[0]).tolist() for t in (told.body["loss"], told.body["right"]))
                results = {"turn": turn, "fil": dict(zip(known, fil, strict=True)), "fia": dict(zip(known, fia, strict=True))}
                if chooses:
                    count = min(max(1, int(share * len(known))), len(known) - 1)
                    left_out = sorted(sorted(known, key=lambda c: results["fil"][c])[:count])
        return {**new, "influence": seen, "turn": turn, "left_out": left_out, "weighed": results}

    def tells(state: State) -> Tree:
        seen, fresh = state["influence"], state["weighed"]
        fips = lengths(seen["eps"], len(seen["clients"]))
        lines = {c: {"fip": fip} for c, fip in zip(seen["clients"], fips, strict=True)}
        if fresh["turn"] == state["turn"]:
            for c, fil in fresh["fil"].items():
                lines[c] |= {"fil": fil, "fia": fresh["fia"][c]}
        return {"influence": lines, "left_out": state["left_out"]}

    def seen_on_the_way(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("watched",), ("n", "steps", "lr")):
            return why
        found, steps = reply.body["gradients"], int(reply.info["steps"])
        rows = next(iter(found.values())).shape[1] if found else 0
        if not 0 <= reply.info["lr"] <= GROWN * plan.lr or bool(found) != (steps > 0) or (found and not 1 <= rows <= samples):
            return f"gradients of {rows} rows at {steps} steps and a rate of {reply.info['lr']:g}"
        floats = {name: t for name, t in letter.body.items() if t.is_floating_point()}
        wanted = {name: t.new_zeros(1).expand(steps, rows, *t.shape) for name, t in floats.items()} if found else {}
        return difference(reply.body, {"update": letter.body, "gradients": wanted})

    handlers = {verb: handler if verb == "answer" else watch(handler) for verb, handler in watched.client.items()}
    return watched._replace(
        init=init,
        round=round,
        client={**handlers, "weigh": weighed},
        updates=False,  # a gradient is of other rows each time
        check=checks(job, train=seen_on_the_way),
        tells=tells,
    )


def gradients(loss: Loss, forward: Forward, params: Tree, batch: Batch) -> Tree:
    """Each row's own gradient, (rows, *shape) a tensor; `params` holds the tree and what the loss reads beside it."""
    count, tree = len(next(iter(batch.values()))), params["params"]
    moving = [name for name, t in tree.items() if t.is_floating_point()]

    def of_row(own: Tree, row: Tree) -> Tensor:
        return loss(forward, own, {name: t[None] for name, t in row.items()}, params["aux"])

    with torch.enable_grad():  # a Predict runs without
        # A tree a row: what a row does to its own is its gradient.
        trees = {n: t.detach().expand(count, *t.shape).clone().requires_grad_(n in moving) for n, t in tree.items()}
        try:
            value = vmap(of_row, randomness="different")(trees, dict(batch)).sum()
        except RuntimeError as error:  # what cannot be stacked in training either
            if not any(word in str(error) for word in ("vmap", "functorch")):
                raise
            each = ({n: t[i] for n, t in trees.items()} for i in range(count))
            value = torch.stack([of_row(own, {n: t[i] for n, t in batch.items()}) for i, own in enumerate(each)]).sum()
    slopes = torch.autograd.grad(value, [trees[name] for name in moving], allow_unused=True)
    return {name: torch.zeros_like(trees[name]) if g is None else g for name, g in zip(moving, slopes, strict=True)}
