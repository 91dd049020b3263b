"""FedProx: Federated Optimization in Heterogeneous Networks (Li et al., arXiv 1812.06127).

    client:  minimise  loss(w) + mu/2 ||w - w_t||^2,  w_t what the server sent
    server:  FedAvg
mu = 0 is FedAvg, bit for bit. The wire is FedAvg's.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.fedavg import fedavg
from fedtailor.core import Algorithm, Job
from fedtailor.errors import ConfigError
from fedtailor.losses import proximal


@card("global", "|t|", "|t|", "exact")
def fedprox(job: Job, *, mu: float = 0.01, weighting: str = "examples") -> Algorithm:
    """FedAvg with a proximal term that keeps local training near the global tree."""
    if mu < 0:
        raise ConfigError(f"algorithm.mu must not be negative (got {mu})")
    return fedavg(job, weighting=weighting, loss=proximal(job.loss, mu))
