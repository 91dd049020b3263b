"""PAC-PFL: Personalized Federated Learning of Probabilistic Models: A PAC-Bayesian Approach (Boroujeni et al., arXiv 2401.08351).

The server learns a distribution over *priors*, as K particles; a client predicts with a mixture of what they become on its own data:
    client i:  m_i rows; sends  g_ik = grad mll_i(theta_k)  and mll_i(theta_k) for each particle, and m_i
    server:    grad log Q(theta_k) = lam grad log hyperprior(theta_k) + h / (h + |T|) sum_{i in T} g_ik,   h the harmonic mean of the m_i
               phi(theta_k) = (1/K) sum_l [kappa(theta_l, theta_k) grad log Q(theta_l) + grad_{theta_l} kappa(theta_l, theta_k)]   (SVGD)
               an Adam step up phi;   kappa(a, b) = exp(-||a - b||^2 / (2 w^2)),   w^2 = median ||a - b||^2 / (2 ln(K + 1)), or a `bandwidth`
    predict:   p(y | x) = sum_k W_k p(y | x, theta_k, data of i),   W_k in proportion to exp(m_i mll_i(theta_k)); no training
The server's side and the weights are as in the authors' code. Their priors are Gaussian processes, whose mll has a closed form. **Our
reading** for a tree h of d numbers (PACOH's device; whether the paper's own experiments with networks do this is not known):
    theta = (mean, log std) of a Gaussian prior over h;  h_j = mean + exp(log std) z_j, j = 1..J, z_j from the client's own stream
    mll_i(theta) = (1/beta) ln (1/J) sum_j exp(-beta L_i(h_j)),  L_i the mean loss; `beta` = 0 takes m_i: (1/m_i) ln p(y | X, theta), as theirs
    p(y | x, theta_k, data) = sum_j w_kj p(y | x, h_kj),  w_kj in proportion to exp(-beta L_i(h_kj)): the prior's draws, reweighted
The hyper-prior is N(technique's start, `wide`^2) for means and N(ln `std`, 0.5^2) for log stds, and the K particles are draws of it. z_j
are the same for all particles, so that particles differ and luck does not. The wire: 2 K d numbers down, 2 K d + K + 1 up, `exchanges` times
a round. A tree that is one linear head (linear_heads.py) is judged on what enters it, which a client computes once and keeps: gradients are
then of all its rows together, and an exchange costs next to nothing. Otherwise a gradient is the mean over the batches of a pass, exact
with `train.batch` of a client's rows or more, and of [train] epochs or steps, batch, clip and dropout count. Rate and optimiser are the
server's in any case. The authors' private variant is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import COUNTS, checks, difference, spoken
from fedtailor.algorithms.fedavg import one_size
from fedtailor.algorithms.linear_heads import Head, features, linear_head, products
from fedtailor.algorithms.marginal import (
    as_tree,
    drawn,
    losses_of,
    losses_of_heads,
    marginal,
    mixed,
    mixed_heads,
    of_heads,
    shapes_of,
    shares,
)
from fedtailor.core import (
    Algorithm,
    ClientId,
    Examples,
    Fit,
    Flow,
    Job,
    Message,
    Plan,
    Predict,
    Site,
    State,
    Talk,
    Tree,
    Work,
    falling,
    stream,
)
from fedtailor.errors import ConfigError
from fedtailor.losses import classification, language
from fedtailor.optimizers import stepped
from fedtailor.techniques.peft import of_head
from fedtailor.trees import numel

LOOSE = 0.5  # standard deviation of the log stds under the hyper-prior


@card("personal", "exchanges (2 K |t| + K + 1)", "exchanges 2 K |t|", "exact server, our reading of a client")
def pac_pfl(
    job: Job,
    *,
    particles: int = 4,
    draws: int = 4,
    beta: float = 0.0,
    lam: float = 1e-4,
    lr: float = 0.03,
    bandwidth: float = 0.0,
    wide: float = 1.0,
    std: float = 0.05,
    exchanges: int = 1,
    most: int = 50_000,
) -> Algorithm:
    """Particles of a prior by Stein variational descent; each client predicts with a mixture weighed by its own data."""
    one_size(job, "pac_pfl")
    if min(particles, draws, exchanges) < 1 or min(beta, lam, lr, bandwidth) < 0 or min(wide, std) <= 0:
        raise ConfigError(
            "algorithm pac_pfl needs particles, draws and exchanges of 1 or more, beta, lam, lr and bandwidth of 0 or more, and "
            "wide and std above 0"
        )
    if job.loss not in (classification, language):
        raise ConfigError(
            "algorithm pac_pfl averages class or token probabilities, which this technique lacks: choose head or lora"
        )
    plan = job.plan._replace(
        optimizer="sgd", lr=1.0, weight_decay=0.0, momentum=0.0, schedule="constant", decay="constant", rounds=1
    )

    def init(params: Tree) -> State:
        if numel(params) > most:
            smaller = "raise it" if all(map(of_head, params)) else 'choose technique.kind = "head", or a smaller rank or length'
            raise ConfigError(
                f"algorithm pac_pfl keeps {particles} particles of a prior over the tree: {numel(params):,} numbers are too many "
                f"(algorithm.most = {most:,}); {smaller}, or algorithm fedbasis, which mixes trees of any size"
            )
        centre = hyper(params, std)
        noise = torch.randn((particles, len(centre)), generator=stream(job.seed, "pac_pfl"))
        return {"params": params, "particles": centre + noise * deviations(params, wide), "optimizer": {}, "mll": [], "turn": 0}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        thetas, rows, shapes = msg.body["particles"], site.data["train"], shapes_of(site.init)
        z = torch.randn((draws, thetas.shape[1] // 2), generator=stream(site.seed, "pac_pfl", site.id, int(msg.info["turn"])))
        heat, kept = beta or float(max(len(rows), 1)), {}
        if (head := head_of(site)) and len(rows):
            kept = {"features": own["features"] if own else (yield look(site, rows, head))["features"]}
            yield Work(2 * products(particles * draws, z.shape[1], len(rows)))  # there and back
            slopes, mll = of_heads(thetas, z, heat, kept["features"], rows.column("labels"))
        else:
            aux, found = {"noise": z, "beta": torch.tensor(heat)}, []
            for theta in thetas:
                loss, start = marginal(job.loss, shapes), {"up": torch.zeros_like(theta)}
                found.append((yield Fit(loss, start, rows, {**aux, "theta": theta}, plan, passes=draws)))
            slopes = torch.stack([done.params["up"] / max(done.seen["steps"], 1.0) for done in found])
            mll = torch.tensor([-done.seen["loss"] for done in found])
        n = float(len(rows))
        seen = {"n": n, "loss": -float(mll.mean()), "turn": msg.info["turn"]}
        return {**kept, "weights": (n * mll).softmax(0)}, Message("slopes", {"slopes": slopes, "mll": mll}, seen)

    def head_of(site: Site) -> Head | None:
        return linear_head(site.init) if job.loss is classification else None

    def look(site: Site, rows: Examples, head: Head) -> Predict:
        return Predict(partial(features, head=head), site.init, rows)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        for _ in range(exchanges):
            letter = Message("train", {"particles": state["particles"]}, {"turn": float(state["turn"])})
            replies = yield dict.fromkeys(cohort, letter)
            heard = [replies[c] for c in sorted(replies) if replies[c].info["n"]]
            if not heard:
                continue
            rows = [r.info["n"] for r in heard]
            slopes = toward([r.body["slopes"] for r in heard], rows)
            pull = (hyper(state["params"], std) - state["particles"]) / deviations(state["params"], wide) ** 2
            phi = svgd(state["particles"], slopes + lam * pull.double(), bandwidth)
            rate = lr * falling(job.plan.decay, min(state["turn"] / (job.plan.rounds * exchanges), 1.0))
            up = {"particles": -phi.to(state["particles"].dtype)}
            moved, optimizer = stepped(Plan(optimizer="adam"), {"particles": state["particles"]}, up, state["optimizer"], rate)
            mll = sum(n * r.body["mll"].double() for n, r in zip(rows, heard, strict=True)) / sum(rows)
            state = {**state, **moved, "optimizer": optimizer, "mll": mll.tolist(), "turn": int(state["turn"]) + 1}
        return state

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        letter = Message("answer", {"particles": state["particles"]}, {"turn": float(state["turn"])})
        return (yield dict.fromkeys(cohort, letter))

    def judged(own: Tree | None, msg: Message, site: Site) -> Flow:
        """The client's mixture, found anew from its training rows: a newcomer does no less and no more."""
        shapes, thetas, rows = shapes_of(site.init), msg.body["particles"], site.data["train"]
        z = torch.randn((draws, thetas.shape[1] // 2), generator=stream(site.seed, "pac_pfl", site.id, int(msg.info["turn"])))
        trees, count = torch.stack([drawn(theta, z) for theta in thetas]).flatten(0, 1), particles * draws
        losses = torch.zeros(particles, draws)
        head, judge, passes = head_of(site), partial(mixed, job.judge, shapes), count
        if head:
            judge, passes = partial(mixed_heads, job.judge, head), 1
        if len(rows) and head:
            yield Work(products(count, z.shape[1], len(rows)))
            inputs = own["features"] if own and "features" in own else (yield look(site, rows, head))["features"]
            losses = losses_of_heads(trees, inputs, rows.column("labels")).double().view(particles, draws)
        elif len(rows):
            told = yield Predict(partial(losses_of, job.judge, shapes), {"trees": trees}, rows, passes=count)
            losses = (told["nll"].double().sum(0) / told["of"].double().sum().clamp_min(1)).view(particles, draws)
        mixture = {
            "start": site.init,
            "trees": trees,
            "weights": shares(losses, len(rows), beta or float(max(len(rows), 1))).flatten().float(),
        }
        body: Tree = {}
        for split in ("test", "global"):
            if split in site.data and len(site.data[split]):
                outputs = yield Predict(judge, mixture, site.data[split], passes=passes)
                if head:
                    yield Work(products(count, z.shape[1], len(site.data[split])))
                body[split] = job.tally(outputs)
        return own, Message("judged", body, {"n": float(len(site.data.get("test", ())))})

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        """One tree in the place of a mixture: the particles' means, weighed as the client last found them."""
        means = broadcast["particles"].chunk(2, 1)[0]
        return as_tree(own["weights"] @ means if own else means.mean(0), shapes_of(site.init))

    def slopes_sent(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("slopes",), ("n",)):
            return why
        n = reply.info["n"]
        if n and not 1 <= n <= COUNTS:  # next to nothing would make the harmonic mean, and everybody's step, nothing
            return f"it says that it has {n:g} rows"
        return difference(reply.body, {"slopes": letter.body["particles"], "mll": torch.zeros(particles)})

    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: as_tree(state["particles"].chunk(2, 1)[0].mean(0), shapes_of(state["params"])),
        personal=personal,
        updates=False,  # gradients: what a filter lost of one is not owed to the next
        check=checks(job, train=slopes_sent),
        tells=lambda state: {"mll": state["mll"]},
    )


def hyper(params: Tree, std: float) -> Tensor:
    """The hyper-prior's centre, (2 d,): the technique's start, and the logarithm of `std`."""
    means = torch.cat([params[name].flatten() for name, _ in shapes_of(params)])
    return torch.cat([means, torch.full_like(means, math.log(std))])


def deviations(params: Tree, wide: float) -> Tensor:
    """The hyper-prior's standard deviations, (2 d,)."""
    return torch.cat([torch.full((numel(params),), wide), torch.full((numel(params),), LOOSE)])


def toward(slopes: Sequence[Tensor], rows: Sequence[float]) -> Tensor:
    """h / (h + |T|) times the sum of the clients' gradients."""
    harmonic = len(rows) / sum(1 / n for n in rows)
    return harmonic / (harmonic + len(rows)) * torch.stack([s.double() for s in slopes]).sum(0)


def svgd(particles: Tensor, slopes: Tensor, bandwidth: float = 0.0) -> Tensor:
    """Where SVGD moves particles (K, D) whose log density has these gradients; `bandwidth` 0 is the median rule."""
    x, count = particles.double(), len(particles)
    square = torch.stack([(x - one).square().sum(1) for one in x])
    width = bandwidth**2 if bandwidth else float(square.quantile(0.5)) / (2 * math.log(count + 1))
    sharp = 1 / (1e-8 + 2 * width)
    kernel = (-sharp * square).exp()
    return (kernel @ slopes.double() + 2 * sharp * (kernel.sum(1, keepdim=True) * x - kernel @ x)) / count
