"""FedRep: Exploiting Shared Representations for Personalized Federated Learning (Collins et al., arXiv 2102.07078).

    client k:  h_k <- train(h_k) for `head_epochs` with the body w held still;  w_k <- train(w) with h_k held still;  sends w_k - w
    server:    FedAvg of the bodies; heads stay with their clients
The body is trained by the experiment's plan (`train.epochs`; the paper's is one pass), the head for ten passes where nothing is said, as
the authors' code does. The wire is FedPer's. A client judges the global test set with its own head.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping

from fedtailor.algorithms.cards import HEADED, card
from fedtailor.algorithms.fedper import both_parts, partly_shared
from fedtailor.core import Algorithm, Fit, Fitted, Job, Message, Site, Tree
from fedtailor.errors import ConfigError
from fedtailor.losses import beside
from fedtailor.techniques.peft import of_head


@card("personal", "|t| - head", "|t| - head", "exact", HEADED)
def fedrep(job: Job, *, head_epochs: float = 10.0, weighting: str = "examples") -> Algorithm:
    """FedPer whose clients first fit their head to the body that they were sent, and then the body to that head."""
    if head_epochs <= 0:
        raise ConfigError(
            f"algorithm.head_epochs: passes over the data in which the head is trained, above 0 (got {head_epochs})"
        )
    loss, heads = beside(job.loss), job.plan._replace(epochs=head_epochs, steps=0)

    def training(start: Tree, msg: Message, site: Site) -> Generator[Fit, Fitted, tuple[Tree, Mapping[str, float]]]:
        head = {name: t for name, t in start.items() if of_head(name)}
        # The body as it came: one object for all clients, and stacked as one.
        fitted = yield Fit(loss, head, site.data["train"], {"rest": msg.body}, heads)
        done = yield Fit(loss, dict(msg.body), site.data["train"], {"rest": fitted.params}, job.plan)
        return {**fitted.params, **done.params}, done.seen

    return partly_shared(job, "fedrep", lambda name: not of_head(name), both_parts("fedrep"), weighting, training)
