"""pFedPG: Efficient Model Personalization in Federated Learning via Client-Specific Prompt Generation (Yang et al., arXiv 2308.15367).

The server owns a generator of prompts; clients tune what they are sent, with a head of their own, and send back what they changed:
    down:      P_n = base + softmax(d_n W_q (base W_k)' / sqrt(width)) base W_v W_o      base (K, D); d_n (K, D), or (1, D)
    client n:  (P~_n, H_n) <- train((P_n, H_n), its data);  the head H_n stays;  sends P~_n - P_n
    server:    one step of W_q, W_k, W_v, W_o, base (by all clients) and d_n (by client n) down the gradient of
               sum_n <P_n, P_n - P~_n>  with the second factor held fixed
No tree is averaged. The wire is the prompt, K D numbers both ways: K = 10, D = 768 are 7,680.

Our reading: the paper's equations are known through its text alone. Descending along P~_n - P_n, as its words have it, would lead away from
what the clients found; the sign here is pFedHN's, whom it credits. Options where readings differ: `residual` (base is added, or not), `rows` of
a descriptor ("prompt": K, or "one"), `deploy` (a client answers with its tuned prompt, or the generated one). The server's optimiser, its
width and all starts are ours: base starts as the technique's own prompt, matrices as torch's linear layers, descriptors uniform in (-1, 1).
Prefixes are rows of D = layers x 2 x width numbers here; the paper's prompts are of the input layer, the technique `prompt`. Any cohort.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Plan, Site, State, Talk, Tree, answer_with, stream
from fedtailor.errors import ConfigError, one_of
from fedtailor.optimizers import stepped
from fedtailor.techniques.peft import PROMPT


@card("personal", "the prompt", "the prompt", "our reading", "prefix, prompt")
def pfedpg(
    job: Job,
    *,
    server_lr: float = 1e-3,
    server_optimizer: str = "adam",
    width: int = 64,
    residual: bool = True,
    rows: str = "prompt",
    deploy: str = "tuned",
) -> Algorithm:
    """pFedPG: the server generates each client's prompt by cross-attention and learns from how the clients change it."""
    one_size(job, "pfedpg")
    one_of("algorithm.server_optimizer", server_optimizer, ("sgd", "adam"))
    one_of("algorithm.rows", rows, ("prompt", "one"))
    one_of("algorithm.deploy", deploy, ("tuned", "generated"))
    if server_lr < 0 or width < 1:
        raise ConfigError(f"algorithm pfedpg needs server_lr of 0 or more and a width above 0 (got {server_lr} and {width})")
    plan = Plan(optimizer=server_optimizer)

    def init(params: Tree) -> State:
        if PROMPT not in params:
            raise ConfigError(
                "algorithm pfedpg generates prompts: choose technique prompt or prefix, or algorithm fedper for other trees"
            )
        size = params[PROMPT].shape[1]
        shapes = {"query": (size, width), "key": (size, width), "value": (size, width), "output": (width, size)}
        drawn = {name: uniform(shape, shape[0] ** -0.5, job.seed, name) for name, shape in shapes.items()}
        generator = {"base": params[PROMPT], **drawn}
        return {"params": params, "generator": generator, "optimizer": {}, "clients": {}}

    def descriptor(state: State, client: ClientId) -> Tensor:
        if client in state["clients"]:
            known: Tensor = state["clients"][client]["descriptor"]
            return known
        base = state["generator"]["base"]
        return uniform((len(base) if rows == "prompt" else 1, base.shape[1]), 1.0, job.seed, "descriptor", client)

    def prompt(state: State, client: ClientId) -> Tree:
        return {PROMPT: generated(state["generator"], descriptor(state, client), residual)}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        start = {**site.init, **(own or {}), **msg.body}
        done = yield Fit(job.loss, start, site.data["train"], {}, job.plan)
        return done.params, Message("update", {PROMPT: done.params[PROMPT] - msg.body[PROMPT]}, done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        replies = yield {client: Message("train", prompt(state, client)) for client in cohort}
        if not replies:
            return state
        found = {client: descriptor(state, client) for client in sorted(replies)}
        slopes, own = downhill(state["generator"], found, {c: r.body[PROMPT] for c, r in replies.items()}, residual)
        generator, optimizer = stepped(plan, state["generator"], slopes, state["optimizer"], server_lr)
        clients = dict(state["clients"])
        for client, at in found.items():  # each has its own steps behind it
            kept = clients[client]["optimizer"] if client in clients else {}
            moved, kept = stepped(plan, {"descriptor": at}, {"descriptor": own[client]}, kept, server_lr)
            clients[client] = {**moved, "optimizer": kept}
        return {**state, "generator": generator, "optimizer": optimizer, "clients": clients}

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        mine = own or {}
        return {**site.init, **broadcast, **mine} if deploy == "tuned" else {**site.init, **mine, **broadcast}

    def answer(state: State, cohort: list[ClientId]) -> Talk:
        # Who has replied has a tuned prompt.
        has = state["clients"] if deploy == "tuned" else {}
        return (yield {c: Message("answer", {} if c in has else prompt(state, c)) for c in cohort})

    _, judged = answer_with(job, lambda state: {}, personal)
    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: {**state["params"], PROMPT: state["generator"]["base"]},
        personal=personal,
        check=checks(job, train=update()),
    )


def uniform(shape: tuple[int, ...], most: float, seed: int, *purpose: str) -> Tensor:
    return torch.empty(shape).uniform_(-most, most, generator=stream(seed, "pfedpg", *purpose))


def generated(generator: Tree, descriptor: Tensor, residual: bool) -> Tensor:
    """A client's prompt (K, D) from the base (K, D) and its descriptor, (K, D) or (1, D)."""
    base: Tensor = generator["base"]
    query, key, value = descriptor @ generator["query"], base @ generator["key"], base @ generator["value"]
    found: Tensor = F.softmax(query @ key.mT * query.shape[1] ** -0.5, -1) @ value @ generator["output"]
    return base + found if residual else found.expand_as(base).contiguous()


def downhill(
    generator: Tree, descriptors: dict[ClientId, Tensor], changes: dict[ClientId, Tensor], residual: bool
) -> tuple[Tree, dict[ClientId, Tensor]]:
    """Gradients of sum_n <P_n, -changes_n> by the generator and by each descriptor: a step down them moves P_n along its change."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in generator.items()}
    own = {client: t.detach().clone().requires_grad_() for client, t in descriptors.items()}
    with torch.enable_grad():
        prompts = [generated(leaves, at, residual) for at in own.values()]
        against = [-changes[client] for client in own]
        slopes = torch.autograd.grad(prompts, [*leaves.values(), *own.values()], against)
    return dict(zip(leaves, slopes, strict=False)), dict(zip(own, slopes[len(leaves) :], strict=True))
