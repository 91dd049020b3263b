"""pFedPT: Visual Prompt Based Personalized Federated Learning (Li et al., arXiv 2303.08678).

Every client keeps a private prompt d_k that says what its data is like; what stands behind it, w, is shared and averaged:
    client k:  d_k <- train(d_k) for `prompt_epochs` with w held still, its optimiser goes on from round to round
               w_k <- train(w)   by the experiment's plan with d_k held still;  sends w_k - w
    server:    w <- w + sum_k p_k (w_k - w),  p_k = n_k / sum n
    client k answers with the averaged w behind its own d_k
The order and the two optimisers are the authors' (their code: SGD with momentum 0.5 at rate 1 for the prompt). The prompt is
    images:  a frame of `pad` pixels, added to every image and not clipped: four strips drawn from N(0, 1), 2 C pad (W + H - 2 pad) numbers
    text:    the technique's prefix or soft prompt (ours; the paper is about images), w is then the head
The wire is FedAvg's of w; no number of a prompt is ever sent. Ours: w is a small tree on a frozen backbone, where the authors train
networks from scratch; batches are not cut to full ones; letters go to the cohort only; a client that has not taken part has no frame.
"""

from __future__ import annotations

import torch

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Tree, answer_with, one_exchange, stream
from fedtailor.errors import ConfigError, one_of
from fedtailor.losses import beside
from fedtailor.techniques.base import frame_shapes
from fedtailor.techniques.peft import PROMPT
from fedtailor.trees import moved, subtract


@card("personal", "|t| - prompt", "|t| - prompt", "exact for images, our reading for text", "prefix, prompt; for images any")
def pfedpt(
    job: Job,
    *,
    pad: int = 2,
    prompt_epochs: float = 5.0,
    prompt_lr: float = 1.0,
    prompt_momentum: float = 0.5,
    prompt_optimizer: str = "sgd",
    weighting: str = "examples",
) -> Algorithm:
    """pFedPT: a private frame around the pictures (or a private prompt before the text), everything behind it averaged."""
    weigh, loss = weights_by(weighting), beside(job.loss)
    one_of("algorithm.prompt_optimizer", prompt_optimizer, ("sgd", "adam", "adamw"))
    if prompt_epochs <= 0 or prompt_lr < 0 or prompt_momentum < 0:
        raise ConfigError("algorithm pfedpt needs prompt_epochs above 0, prompt_lr and prompt_momentum of 0 or more")
    if job.pixels and not 0 <= 2 * pad < min(job.pixels[1:]):
        raise ConfigError(f"algorithm.pad = {pad}: a frame of 0 to {(min(job.pixels[1:]) - 1) // 2} pixels fits these images")
    alone = job.plan._replace(epochs=prompt_epochs, steps=0, optimizer=prompt_optimizer, lr=prompt_lr, momentum=prompt_momentum)
    alone = alone._replace(weight_decay=0.0, schedule="constant", decay="constant", rounds=1, clip=0.0)

    def init(params: Tree) -> State:
        if PROMPT not in params:
            if not job.pixels:
                raise ConfigError(
                    "algorithm pfedpt keeps a prompt at each client: choose technique prefix or prompt (any technique for images), "
                    "or algorithm fedper"
                )
            one_size(job, "pfedpt")
        if not shared(params):
            raise ConfigError(
                "algorithm pfedpt averages what stands behind the prompt: choose a technique with a head (technique.head = "
                "'trained', a classifier), or algorithm local"
            )
        return {"params": params}

    def shared(params: Tree) -> Tree:
        return {name: t for name, t in params.items() if name != PROMPT}

    def begun(site: Site) -> Tree:
        """A client's first prompt."""
        if PROMPT in site.init:
            return {PROMPT: site.init[PROMPT]}
        random = stream(site.seed, "frame", site.id)
        return {name: torch.randn(shape, generator=random) for name, shape in frame_shapes(job.pixels, pad).items()}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        own = own or {"prompt": begun(site), "optimizer": {}}
        data = site.data["train"]
        if own["prompt"]:
            first = yield Fit(loss, own["prompt"], data, {"rest": msg.body}, alone, own["optimizer"])
            own = {"prompt": first.params, "optimizer": first.optimizer}
        done = yield Fit(loss, msg.body, data, {"rest": own["prompt"]}, job.plan)
        return own, Message("update", subtract(done.params, msg.body), done.seen)

    def personal(own: Tree | None, broadcast: Tree, site: Site) -> Tree:
        return {**site.init, **(own["prompt"] if own else {}), **broadcast}

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        bodies, weights = [r.body for r in replies.values()], [weigh(r) for r in replies.values()]
        return {"params": {**state["params"], **moved(shared(state["params"]), bodies, weights)}}

    answer, judged = answer_with(job, lambda state: shared(state["params"]), personal)
    return Algorithm(
        init=init,
        round=one_exchange(lambda state, client: Message("train", shared(state["params"])), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=personal,
        check=checks(job, train=update()),
    )
