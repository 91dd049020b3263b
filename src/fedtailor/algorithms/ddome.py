"""DDOME: Learning to Specialize: Joint Gating-Expert Training for Adaptive MoEs in Decentralized Settings (arXiv 2306.08586; in earlier
versions FedJETs).

The server has M experts and a gate; a client gets the K experts that the gate picks for its rows, and trains them and the gate together:
    x_hat    a row under the common expert, which is frozen and everybody's;  g = softmax(gate(x_hat)), M scores
    down     the gate;  up: the K experts with the largest sum of g over the client's rows;  down: those experts
    client   min CE( sum_i g_i f(x; W_i), y ) over the K experts and the gate at once, g renormalised over the K
    anchor   is tied to one expert q, and has two losses apart:  CE(f(x; W_q), y) for the expert,  CE(g, q) for the gate
    server   every expert's mean over those who trained it, the gate's over all, by examples; other experts stay as they are
    test     without labels: the gate picks K experts by a client's rows, and of them one by row, the best scored
The wire, a client and round: P_r + K P_e both ways and K numbers up (an anchor: K = 1 and no numbers).

**Our reading**: displayed formulas are known by the paper's text alone (`renormalise`, `vote` = "votes": a row votes for its best K; the
anchors' gate loss). **Ours**: experts are trees of the technique on one frozen backbone and all start as its initial tree, which is the common
expert too (the paper found that better than random ones); x_hat is its mean hidden state before the last layer. Who is an anchor is open
in the paper, which builds them by label: here they are drawn, at most half of a cohort in its first rounds, one an expert and no
more than half of all clients, unless `tied` names them. One optimiser for both, the gate's rate being gate_lr. Where K = M nobody
is asked. M = K = 1 without anchors is FedAvg, bit for bit.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, spoken, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.core import (
    Algorithm,
    Batch,
    ClientId,
    Fit,
    Flow,
    Forward,
    Job,
    Loss,
    Message,
    Predict,
    Site,
    State,
    Talk,
    Tree,
    stream,
)
from fedtailor.data.examples import IGNORED
from fedtailor.errors import ConfigError, nearest, one_of
from fedtailor.losses import Wrapped, classification
from fedtailor.techniques.mixture import COMMON, EXPERTS, GATE, embed, expert, gate, gated
from fedtailor.trees import moved, subtract, zeros_like

EMBEDDING = "embedding"


@card("personal", "gate + k |t| + k numbers", "gate + k |t|", "our reading", "lora, prefix, prompt, ia3, full, head")
def ddome(
    job: Job,
    *,
    experts: int = 5,
    k: int = 2,
    anchors: int | None = None,
    tied: Sequence[str] = (),
    width: int = 64,
    gate_lr: float = 0.0,
    renormalise: bool = True,
    vote: str = "scores",
    weighting: str = "examples",
) -> Algorithm:
    """A mixture of experts: a gate picks for each client the few that it trains. `gate_lr` = 0 takes the experiment's rate."""
    one_size(job, "ddome")
    one_of("algorithm.vote", vote, ("scores", "votes"))
    weigh, names = weights_by(weighting), [expert(i) for i in range(experts)]
    count = len(tied) or (min(experts, job.clients // 2) if anchors is None else anchors)
    if not 1 <= k <= experts or width < 1 or gate_lr < 0 or count < 0:
        raise ConfigError(
            f"algorithm ddome needs 1 <= k <= experts, width >= 1, gate_lr >= 0 and anchors >= 0 (got {k}, {experts}, {width}, {gate_lr:g}, {count})"
        )
    if count > job.clients:
        raise ConfigError(f"algorithm ddome: {count} anchors, where there are {job.clients} clients")
    if job.names and (strange := [name for name in tied if name not in job.names]):
        raise ConfigError(f"algorithm.tied: no client is called '{strange[0]}': {nearest(strange[0], job.names[:50])}")
    if job.loss is not classification or not job.hidden:
        raise ConfigError(
            "algorithm ddome mixes class logits by hidden states: it needs data with classes and a technique that trains their logits; "
            "for language models choose fedavg or fedbasis"
        )
    # A step of u moves the gate by `scale` as much; plain steps are also `scale` times as long.
    ratio = gate_lr / job.plan.lr if gate_lr and job.plan.lr else 1.0
    scale = ratio**0.5 if job.plan.optimizer == "sgd" else ratio
    jointly, apart, first = (
        mixing(job.loss, scale, renormalise),
        anchoring(job.loss, scale),
        gate(job.hidden, width, experts, job.seed),
    )

    def init(params: Tree) -> State:
        return {COMMON: params, GATE: first, EXPERTS: dict.fromkeys(names, params), "anchors": {}, "trained": {}, "turn": 0}

    def embedded(own: Tree | None, site: Site) -> Generator[Predict, Tree, Tensor]:
        """Of the training rows, once and for all; of the test rows, which need no labels, where there are no others."""
        rows = site.data["train"] if len(site.data["train"]) else site.data.get("test", ())
        if own and len(own[EMBEDDING]) == len(site.data["train"]) > 0:
            return own[EMBEDDING]  # type: ignore[no-any-return]
        if not len(rows):
            return torch.zeros(0, job.hidden)
        return (yield Predict(embed, site.init, rows))[EMBEDDING]  # type: ignore[arg-type,no-any-return]

    def choose(own: Tree | None, msg: Message, site: Site) -> Flow:
        rows = yield from embedded(own, site)
        found = picked(gated(msg.body, rows), k, vote)
        mine = {EMBEDDING: rows, GATE: msg.body, "chosen": found}
        return mine, Message("chosen", {EXPERTS: found}, {"n": float(len(site.data["train"]))})

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        start: Tree = msg.body[GATE] if GATE in msg.body else own[GATE]  # type: ignore[index]
        data, chosen = site.data["train"], [i for i, name in enumerate(names) if name in msg.body[EXPERTS]]
        trees = {names[i]: msg.body[EXPERTS][names[i]] for i in chosen}
        # One expert has every row, wherever it is.
        rows = torch.zeros(len(data), job.hidden) if experts == 1 or not len(data) else (yield from embedded(own, site))
        aux = {GATE: start, "pick": F.one_hot(torch.tensor(chosen), experts).float()}
        params = {EXPERTS: {str(slot): tree for slot, tree in enumerate(trees.values())}, "u": zeros_like(start)}
        loss = apart if msg.info.get("anchor") else jointly
        done = yield Fit(loss, params, data.having(EMBEDDING, rows), aux, job.plan, passes=len(trees))
        moves = {name: subtract(done.params[EXPERTS][str(slot)], tree) for slot, (name, tree) in enumerate(trees.items())}
        body = {GATE: {name: u * scale for name, u in done.params["u"].items()}, EXPERTS: moves}
        kept = {EMBEDDING: rows, "chosen": own["chosen"]} if own and "chosen" in own else {EMBEDDING: rows}
        return kept, Message("update", body, done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        held = anchored(state, cohort)
        free = [c for c in cohort if c not in held]
        wanted = dict.fromkeys(free, names) if k == experts else (yield from asked(state, free))
        gate_too = {GATE: state[GATE]}
        letters = {}
        for c in cohort:
            if c in held:
                letters[c] = Message("train", {**gate_too, EXPERTS: of(state, [held[c]])}, {"anchor": 1.0})
            elif c in wanted:  # who was asked has the gate
                letters[c] = Message("train", {**(gate_too if k == experts else {}), EXPERTS: of(state, wanted[c])})
        replies = yield letters
        told, next_turn = [replies[c] for c in sorted(replies)], {**state, "anchors": held, "turn": int(state["turn"]) + 1}
        if not told:
            return next_turn
        by = {name: [r for r in told if name in r.body[EXPERTS]] for name in names}
        means = {
            n: moved(state[EXPERTS][n], [r.body[EXPERTS][n] for r in by[n]], [weigh(r) for r in by[n]]) for n in names if by[n]
        }
        new = moved(state[GATE], [r.body[GATE] for r in told], [weigh(r) for r in told])
        trained = {name: len(heard) for name, heard in by.items()}
        return {**next_turn, GATE: new, EXPERTS: {**state[EXPERTS], **means}, "trained": trained}

    def asked(state: State, clients: list[ClientId], idle: bool = False) -> Generator[Any, Any, dict[ClientId, list[str]]]:
        """The experts that each wants; who has no rows to train on wants none, unless it is `idle` anyway."""
        replies = (yield {c: Message("choose", state[GATE]) for c in clients}) if clients else {}
        heard = {c: replies[c] for c in sorted(replies) if idle or float(replies[c].info["n"])}
        return {c: [names[int(i)] for i in r.body[EXPERTS]] for c, r in heard.items()}

    def anchored(state: State, cohort: list[ClientId]) -> dict[ClientId, str]:
        """The anchors and their experts; as long as there are too few, half of a cohort may be some."""
        if tied:
            return {c: names[i % experts] for i, c in enumerate(tied)}
        held = dict(state["anchors"])
        free = [c for c in cohort if c not in held]
        room = max(1, len(cohort) // 2) - (len(cohort) - len(free))
        order = torch.randperm(len(free), generator=stream(job.seed, "anchors", int(state["turn"]))).tolist()
        for i in order[: max(0, min(count - len(held), room))]:
            held[free[i]] = names[len(held) % experts]
        return held

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        wanted = dict.fromkeys(cohort, names) if k == experts else (yield from asked(state, cohort, idle=True))
        return (yield {c: Message("answer", {GATE: state[GATE], EXPERTS: of(state, those)}) for c, those in wanted.items()})

    def judged(own: Tree | None, msg: Message, site: Site) -> Flow:
        body: Tree = {}
        for split in ("test", "global"):
            if split in site.data and len(site.data[split]):
                outputs = yield Predict(job.judge, {COMMON: site.init, **msg.body}, site.data[split], passes=2)
                body[split] = job.tally(outputs)
        return own, Message("judged", body, {"n": float(len(site.data.get("test", ())))})

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        """The experts that a client chose last; all of them where it never did."""
        mine = [names[int(i)] for i in own["chosen"]] if own and "chosen" in own else names
        return {COMMON: site.init, GATE: broadcast[GATE], EXPERTS: {n: broadcast[EXPERTS][n] for n in mine}}

    def wants(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("chosen",), ("n",)):
            return why
        if why := difference(reply.body, {EXPERTS: torch.zeros(k, dtype=torch.int16)}):
            return why
        found = reply.body[EXPERTS].tolist()
        return "" if len(set(found) & set(range(experts))) == k else f"it chooses {found} of {experts} experts"

    def mixture(state: State) -> Tree:
        return {COMMON: state[COMMON], GATE: state[GATE], EXPERTS: state[EXPERTS]}

    return Algorithm(
        init=init,
        round=round,
        client={"choose": choose, "train": train, "answer": judged},
        answer=answer,
        model=mixture,
        personal=personal,
        said=lambda state, client: {GATE: state[GATE], EXPERTS: state[EXPERTS]},
        updates=k == experts,  # else other experts each time
        check=checks(job, choose=wants, train=update(lambda letter, reply: {GATE: first, EXPERTS: letter.body[EXPERTS]})),
        tells=lambda state: {"experts_trained": state["trained"]},
    )


def of(state: State, names: Sequence[str]) -> Tree:
    return {name: state[EXPERTS][name] for name in names}


def picked(logits: Tensor, k: int, vote: str) -> Tensor:
    """The k experts that rows with these logits (rows, experts) want most, in their order; the first ones where there are no rows."""
    scores = logits.softmax(1)
    if vote == "votes":
        scores = F.one_hot(scores.topk(k, 1).indices, logits.shape[1]).sum(1).to(scores.dtype)
    best = scores.double().sum(0).sort(descending=True, stable=True).indices[:k]
    return best.sort().values.to(torch.int16)


def mixing(base: Loss, scale: float, renormalise: bool) -> Loss:
    """base of sum_i g_i f(x; W_i) over the trees in params, with the gate aux["gate"] + scale u; aux["pick"] (k, experts) says which they are."""
    return _Mixing(base, scale, renormalise)


class _Mixing(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        base: Any
        _, base, scale, renormalise = self
        shares = gated(moving(params, aux, scale), batch[EMBEDDING]).softmax(-1) @ aux["pick"].mT
        shares = shares / shares.sum(-1, keepdim=True) if renormalise else shares

        def mixture(trees: Tree, inputs: Batch) -> Tensor:
            return sum(shares[:, i, None] * forward(tree, inputs) for i, tree in enumerate(trees.values()))  # type: ignore[return-value,no-any-return]

        return base(mixture, params[EXPERTS], plain(batch), {})  # type: ignore[no-any-return]


def anchoring(base: Loss, scale: float) -> Loss:
    """base of the one expert, and apart from it the cross entropy of the gate with that expert."""
    return _Anchoring(base, scale)


class _Anchoring(Wrapped):
    def __call__(self, forward: Forward, params: Tree, batch: Batch, aux: Tree) -> Tensor:
        base: Any
        _, base, scale = self
        (tree,) = params[EXPERTS].values()
        said = gated(moving(params, aux, scale), batch[EMBEDDING]).log_softmax(-1) @ aux["pick"][0]
        seen = batch["labels"] != IGNORED  # padding rows are nobody's
        return base(forward, tree, plain(batch), {}) - (said * seen).sum() / seen.sum().clamp_min(1)  # type: ignore[no-any-return]


def moving(params: Tree, aux: Tree, scale: Any) -> Tree:
    return {name: t + scale * params["u"][name] for name, t in aux[GATE].items()}


def plain(batch: Batch) -> Batch:
    """What the model reads of a batch, and the labels."""
    return {name: t for name, t in batch.items() if name != EMBEDDING}
