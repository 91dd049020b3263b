"""The baselines that make a number mean something: `local` (nobody exchanges anything), `pooled` (nobody keeps anything) and
`zero-shot` (nobody trains anything).

local:   each client trains its own tree, round after round, with its own optimiser state; letters are empty.
pooled:  one tree is trained on all clients' training rows together, in simulation only (site SERVER). A round makes as many
         example passes as the cohort would have made, so pooled and federated see the same number of examples. The optimiser's
         state is kept over the rounds: it is plain training.
zero-shot: the technique's initial tree as it is; with the technique `template` that is what the model knows of the classes' names.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.core import SERVER, Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Talk, Tree, answer_with


@card("baseline", "0", "0", "baseline")
def local(job: Job) -> Algorithm:
    """Each client by itself: what federation must beat."""

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        own = own or {"params": site.init, "optimizer": {}}
        done = yield Fit(job.loss, own["params"], site.data["train"], {}, job.plan, own["optimizer"])
        return {"params": done.params, "optimizer": done.optimizer}, Message("trained", {}, done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        yield {client: Message("train") for client in cohort}
        return state

    answer, judged = answer_with(job, lambda state: {}, own_tree)
    return Algorithm(
        init=lambda params: {"params": params},
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=own_tree,
        of_all_kinds=True,
        check=checks(job, train=update(lambda letter, reply: {}, verb="trained")),
    )


def own_tree(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
    """The tree that a client keeps and never sends."""
    params: Tree = own["params"] if own else site.init
    return params


@card("baseline", "0", "0", "baseline")
def pooled(job: Job) -> Algorithm:
    """Central training on everybody's rows at equal example passes: what federation gives up."""

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        share = msg.info["cohort"] / job.clients
        plan = job.plan._replace(
            epochs=job.plan.epochs * share, steps=round_up(job.plan.steps * msg.info["cohort"]) if job.plan.steps else 0
        )
        done = yield Fit(job.loss, msg.body, site.data["train"], {}, plan, own["optimizer"] if own else {})
        return {"optimizer": done.optimizer}, Message("update", done.params, done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        replies = yield {SERVER: Message("train", state["params"], {"cohort": float(len(cohort))})}
        return {"params": replies[SERVER].body} if SERVER in replies else state

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=lambda params: {"params": params},
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
    )


@card("baseline", "0", "0", "baseline", "any")
def zero_shot(job: Job) -> Algorithm:
    """No training and no letters: what the pretrained model can do already."""

    def round(state: State, cohort: list[ClientId]) -> Talk:
        yield from ()
        return state

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=lambda params: {"params": params},
        round=round,
        client={"answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        trains=False,
        check=checks(job),
    )


def round_up(steps: float) -> int:
    return int(-(-steps // 1))
