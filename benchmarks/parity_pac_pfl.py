"""PAC-PFL's server beside its authors' code (DecodEPFL/federated-hyperposterior-learning, compared at 7fcb9c2).

    python benchmarks/parity_pac_pfl.py CHECKOUT [--rounds 200]

Their side is `SVGD` and `RBF_Kernel` of server/svgd.py with torch's Adam; their hyper-posterior is of Gaussian processes and needs
gpytorch, so a stand-in of a few lines says its log density: lambda log N + h / (h + |T|) sum mll, with the exact marginal likelihood
of Bayesian linear regression as mll. Ours is the algorithm's own round; its clients answer with gradients of that same mll. A cohort
is a part of the clients, drawn anew each round. Their privacy is left off. Prints the largest differences, in float64.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import torch
from parity import job
from torch import Tensor

from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.pac_pfl import deviations, hyper
from fedtailor.core import Message, Plan, stream

SIZE, NOISE, LAM, RATE, WIDE, STD = 6, 0.3, 0.05, 1e-2, 0.5, 0.4
ROWS = {f"c{i}": 5 + 3 * i for i in range(6)}


def rows_of(client: str) -> tuple[Tensor, Tensor]:
    """A linear function a client, and noise."""
    draw = stream(0, "rows", client)
    x = torch.randn(ROWS[client], SIZE, generator=draw)
    return x, x @ torch.randn(SIZE, generator=draw) + NOISE * torch.randn(ROWS[client], generator=draw)


def mll(theta: Tensor, client: str) -> Tensor:
    """(1 / m) ln p(y | X, theta) of the prior N(mean, diag exp(2 log std)) over a linear function's weights."""
    x, y = rows_of(client)
    mean, log_std = theta.chunk(2)
    covariance = (x * (2 * log_std).exp()) @ x.mT + NOISE**2 * torch.eye(len(x))
    return torch.distributions.MultivariateNormal(x @ mean, covariance).log_prob(y) / len(x)


class StandIn:
    """What their SVGD asks of a hyper-posterior."""

    def __init__(self, centre: Tensor, scale: Tensor) -> None:
        self.prior = torch.distributions.Independent(torch.distributions.Normal(centre, scale), 1)

    def log_prob(self, particles: Tensor, clients: list[str]) -> Tensor:
        harmonic = 1 / torch.tensor([1 / ROWS[c] for c in clients]).mean()
        sums = torch.stack([sum(mll(theta, c) for c in clients) for theta in particles])  # type: ignore[arg-type]
        return LAM * self.prior.log_prob(particles) + harmonic / (harmonic + len(clients)) * sums


def theirs_of(checkout: Path) -> Any:
    """Their server/svgd.py by itself: the package around it imports gpytorch."""
    sys.path.insert(0, str(checkout))
    for name in ("server", "server.util"):
        sys.modules[name] = types.ModuleType(name)
    usual = warnings.formatwarning
    sys.modules["server.util"].warning_format = usual  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("theirs", checkout / "server" / "svgd.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compared(theirs: Any, particles: int, bandwidth: float, rounds: int) -> None:
    options = {"particles": particles, "lam": LAM, "lr": RATE, "wide": WIDE, "std": STD, "bandwidth": bandwidth}
    algorithm = ALGORITHMS["pac_pfl"](job(Plan(rounds=rounds), len(ROWS)), **options)
    params = {"w": torch.zeros(SIZE)}
    state = algorithm.init(params)
    start = state["particles"].clone()
    own = start.clone().requires_grad_()
    kernel = theirs.RBF_Kernel(bandwidth=bandwidth or None)
    svgd = theirs.SVGD(StandIn(hyper(params, STD), deviations(params, WIDE)), kernel, torch.optim.Adam([own], lr=RATE))
    worst = 0.0
    for number in range(rounds):
        drawn = torch.randperm(len(ROWS), generator=stream(0, "cohort", number))[:3].tolist()
        cohort = sorted(list(ROWS)[i] for i in drawn)
        svgd.step(own, cohort)
        talk = algorithm.round(state, cohort)
        replies = {}
        for client, letter in next(talk).items():
            moving = letter.body["particles"].clone().requires_grad_()
            values = torch.stack([mll(theta, client) for theta in moving])
            (slopes,) = torch.autograd.grad(values.sum(), moving)
            replies[client] = Message("slopes", {"slopes": slopes, "mll": values.detach()}, {"n": float(ROWS[client])})
        try:
            talk.send(replies)
        except StopIteration as end:
            state = end.value
        worst = max(worst, float((state["particles"] - own.detach()).abs().max()))
    moved = float((own.detach() - start).abs().max())
    apart = float(torch.pdist(own.detach()).min()) if particles > 1 else 0.0
    print(f"{particles:9}  {bandwidth or 'median':>9}  {worst:18.1e}  {moved:17.2f}  {apart:18.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    given = parser.parse_args()
    theirs = theirs_of(given.checkout)
    print(f"{'particles':>9}  {'bandwidth':>9}  {'largest difference':>18}  {'largest movement':>17}  {'nearest particles':>18}")
    for particles, bandwidth in ((1, 1.0), (4, 0.0), (5, 0.0), (4, 1.0), (10, 0.5)):
        compared(theirs, particles, bandwidth, given.rounds)


if __name__ == "__main__":
    main()
