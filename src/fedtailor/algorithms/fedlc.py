"""FedLC: Federated Learning with Label Distribution Skew via Logits Calibration (Zhang et al., arXiv 2209.00189).

    client k:  minimise the cross entropy of  z_c + s_c  in the place of the logits z_c, where n_c of its n rows are of class c and
               s_c = -tau n_c^(-1/4)     (rule "margin", the paper's)
               s_c = tau log(n_c / n)    (rule "prior": logit adjustment, Menon et al., arXiv 2007.07314)
    server:    FedAvg; the plain logits are judged
A class that a client has not seen is as good as left out of its softmax (n_c is 1e-8 there), so a client with one class alone has
nothing to learn and says so by a difference of nearly zero. The wire is FedAvg's: class counts stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.fedavg import fedavg
from fedtailor.core import Algorithm, Job, Site, Tree
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import calibrated, classification

UNSEEN = 1e-8  # rows of a class that a client has none of


@card("global", "|t|", "|t|", "exact")
def fedlc(job: Job, *, rule: str = "margin", tau: float = 1.0, weighting: str = "examples") -> Algorithm:
    """FedAvg whose clients calibrate their logits by how many rows of each class they hold."""
    one_of("algorithm.rule", rule, ("margin", "prior"))
    if tau < 0:
        raise ConfigError(f"algorithm.tau must not be negative (got {tau})")
    if job.loss is not classification:
        raise ConfigError("algorithm fedlc calibrates class logits: it needs labelled data and a technique that trains on labels")

    def aux(site: Site) -> Tree:
        return {"shift": shift(site.data["train"].column("labels"), job.classes, rule, tau)}

    return fedavg(job, weighting=weighting, loss=calibrated, aux=aux)


def shift(labels: Tensor, classes: int, rule: str, tau: float) -> Tensor:
    """What is added to the logits, (classes,), from the labels (rows,) of one client."""
    counts = torch.bincount(labels, minlength=classes).double().clamp_min(UNSEEN)
    found = -tau * counts**-0.25 if rule == "margin" else tau * (counts / counts.sum()).log()
    return found.float()
