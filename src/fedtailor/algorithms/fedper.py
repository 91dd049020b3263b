"""FedPer: Federated Learning with Personalization Layers (Arivazhagan et al., arXiv 1912.00818).

    client k:  w_k, h_k <- train((w, h_k), its data);  sends w_k - w;  the head h_k stays
    server:    w <- w + sum_k p_k (w_k - w),  p_k = n_k / sum n
The head is what maps features to classes (`classifier` or `score`); the paper keeps the last blocks of the network too, here the
frozen backbone is everybody's. A client judges the global test set with its own head.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping

from fedtailor.algorithms.cards import HEADED, card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.core import Algorithm, ClientId, Fit, Fitted, Flow, Job, Message, Site, State, Tree, answer_with, one_exchange
from fedtailor.errors import ConfigError
from fedtailor.techniques.peft import of_head
from fedtailor.trees import add, select, subtract, weighted_mean


@card("personal", "|t| - head", "|t| - head", "exact", HEADED)
def fedper(job: Job, *, weighting: str = "examples") -> Algorithm:
    """FedAvg of everything but the head, which stays with its client."""

    return partly_shared(job, "fedper", lambda name: not of_head(name), both_parts("fedper"), weighting)


def both_parts(name: str) -> Callable[[Tree], None]:
    """For algorithms that treat the head and the rest apart; what is returned refuses trees that lack one of them."""

    def check(params: Tree) -> None:
        if len({of_head(tensor) for tensor in params}) < 2:
            raise ConfigError(
                f"algorithm {name} tells heads from the rest: choose a technique that trains both (lora, prefix, full)"
            )

    return check


Training = Callable[[Tree, Message, Site], Generator[Fit, Fitted, tuple[Tree, Mapping[str, float]]]]
"""(a client's tree, its letter, site) -> asks; returns (the tree after training, what was seen)."""


def partly_shared(
    job: Job,
    name: str,
    shared: Callable[[str], bool],
    check: Callable[[Tree], None],
    weighting: str = "examples",
    training: Training | None = None,
) -> Algorithm:
    """FedAvg of the tensors whose names are `shared`; the others are personal. `check` refuses trees that this does not suit; `training`
    is one fit of all of it where nothing is said."""
    weigh = weights_by(weighting)
    one_size(job, name)

    def together(start: Tree, msg: Message, site: Site) -> Generator[Fit, Fitted, tuple[Tree, Mapping[str, float]]]:
        done = yield Fit(job.loss, start, site.data["train"], {}, job.plan)
        return done.params, done.seen

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        params, seen = yield from (training or together)(personal(own, msg.body, site), msg, site)
        mine = {name: t for name, t in params.items() if not shared(name)}
        return mine, Message("update", subtract(select(params, msg.body), msg.body), seen)

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        return {**site.init, **(own or {}), **broadcast}

    def init(params: Tree) -> State:
        check(params)
        return {"params": params}

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        delta = weighted_mean([r.body for r in replies.values()], [weigh(r) for r in replies.values()])
        return {"params": {**state["params"], **add(select(state["params"], delta), delta)}}

    def broadcast(state: State) -> Tree:
        return {name: t for name, t in state["params"].items() if shared(name)}

    answer, judged = answer_with(job, broadcast, personal)
    return Algorithm(
        init=init,
        round=one_exchange(lambda state, client: Message("train", broadcast(state)), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        check=checks(job, train=update()),
    )
