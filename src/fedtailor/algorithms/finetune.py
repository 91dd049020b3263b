"""FedAvg, then fine-tuning: what a personal algorithm must beat. FedBABU is the same in two parts.

finetune: FedAvg for all but the last `personal` rounds; in those each client goes on from the global tree alone, and sends nothing.
FedBABU: Towards Enhanced Representation for Federated Image Classification (Oh et al., arXiv 2106.06042).
    common rounds:   the head stays at its random start, the same at every client; the rest is trained and averaged
    personal rounds: each client fits its head (`tune = "head"`), or everything
A frozen head is never sent. In a personal round a client's letter holds the global tree only until it has one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedtailor.algorithms.cards import HEADED, card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.algorithms.fedper import both_parts
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Talk, Tree, answer_with
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import beside
from fedtailor.techniques.peft import of_head
from fedtailor.trees import moved, subtract


@card("personal", "|t|, then 0", "|t|, then 0", "baseline")
def finetune(job: Job, *, personal: int = 1, weighting: str = "examples") -> Algorithm:
    """FedAvg, and at the end `personal` rounds in which every client fits the global tree to its own data."""
    return in_two_phases(job, "finetune", lambda name: True, lambda name: True, personal, weighting)


@card("personal", "|t| - head, then 0", "|t| - head, then 0", "exact", HEADED)
def fedbabu(job: Job, *, personal: int = 1, tune: str = "head", weighting: str = "examples") -> Algorithm:
    """FedBABU: the body is averaged under a head that stays random; at the end every client fits a head of its own."""
    one_of("algorithm.tune", tune, ("head", "all"))
    check = both_parts("fedbabu")
    made = in_two_phases(
        job, "fedbabu", lambda name: not of_head(name), of_head if tune == "head" else lambda name: True, personal, weighting
    )

    def init(params: Tree) -> State:
        check(params)
        return made.init(params)

    return made._replace(init=init)


def in_two_phases(
    job: Job, name: str, common: Callable[[str], bool], tuned: Callable[[str], bool], personal: int, weighting: str
) -> Algorithm:
    """FedAvg of the `common` tensors; in the last `personal` rounds every client trains its own `tuned` ones from there."""
    weigh, part = weights_by(weighting), beside(job.loss)
    one_size(job, name)
    if not 0 <= personal < max(job.plan.rounds, 1):
        raise ConfigError(
            f"algorithm.personal = {personal}: rounds at the end in which clients fit their own: fewer than rounds = {job.plan.rounds}"
        )

    common_rounds = job.plan.rounds - personal if personal else math.inf

    def sent(params: Tree) -> Tree:
        return {name: t for name, t in params.items() if common(name)}

    def init(params: Tree) -> State:
        return {"params": params, "round": 0, "tuned": []}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        # Names that are not in the tree keep the backbone's own tensor: a head's is drawn there from the seed, for everybody.
        done = yield Fit(job.loss, msg.body, site.data["train"], {}, job.plan)
        return own, Message("update", subtract(done.params, msg.body), done.seen)

    def tune(own: Tree | None, msg: Message, site: Site) -> Flow:
        kept = own or begun(msg.body, site)
        loss, aux = (part, {"rest": kept["rest"]}) if kept["rest"] else (job.loss, {})
        done = yield Fit(loss, kept["mine"], site.data["train"], aux, job.plan)
        return {**kept, "mine": done.params}, Message("tuned", {}, done.seen)

    def begun(broadcast: Tree, site: Site) -> Tree:
        mine = {name: t for name, t in {**site.init, **broadcast}.items() if tuned(name)}
        # What all were sent is one object, and is stacked as one.
        return {"mine": mine, "rest": broadcast if mine.keys().isdisjoint(broadcast) else {}}

    def own_tree(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        return {**own["rest"], **own["mine"]} if own else {**site.init, **broadcast}

    def round(state: State, cohort: list[ClientId]) -> Talk:
        number = state["round"] + 1
        letter = Message("train" if number <= common_rounds else "tune", sent(state["params"]))
        replies = yield {c: Message("tune") if c in state["tuned"] else letter for c in cohort}
        if letter.verb == "tune":
            return {**state, "round": number, "tuned": sorted({*state["tuned"], *replies})}
        told = [replies[c] for c in sorted(replies)]
        after = moved(letter.body, [r.body for r in told], [weigh(r) for r in told]) if told else {}
        return {**state, "round": number, "params": {**state["params"], **after}}

    answer, judged = answer_with(job, lambda state: sent(state["params"]), own_tree)
    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "tune": tune, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=own_tree,
        check=checks(job, train=update(), tune=update(lambda letter, reply: {}, verb="tuned")),
    )
