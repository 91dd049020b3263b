"""FML: Federated Mutual Learning (Shen et al., arXiv 2006.16765).

Every client trains two models side by side: a private one, w_k, that never leaves it and may be of a size of its own, and a "meme", m_k,
a copy of the server's model. Each learns from the labels and from what the other says of the same rows; p and q are their softmaxes:
    client k:  m_k <- m, its optimiser anew; the private one's goes on.  In each step, on one batch, both at once:
               w_k steps down  alpha CE(p, y) + (1 - alpha) KL(q || p)      q held fixed
               m_k steps down  beta  CE(q, y) + (1 - beta)  KL(p || q)      p held fixed
               sends m_k - m
    server:    m <- m + sum_k p_k (m_k - m),  p_k = 1/K, or by examples where `weighting` is "examples"
The wire is FedAvg's, |m| both ways, whatever the private models are; a step costs two forward and two backward passes.
The rule is the authors' code's (temperature 1, no T^2). Ours: both models are trees on one frozen backbone and start from the technique's
initial tree, so they differ from the first merge on (where sizes do not differ anyway); next tokens in the place of classes for
language models; a cohort may be a part of the clients. Constant alpha and beta: the authors' code raises beta with each drop of the
rate in one of its versions. Averaging memes that are LoRA factors has FedIT's error.
"""

from __future__ import annotations

from fedtailor.algorithms.baselines import own_tree
from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import weights_by
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Tree, answer_with, one_exchange
from fedtailor.errors import ConfigError
from fedtailor.losses import classification, language, mutual
from fedtailor.optimizers import inside, under
from fedtailor.trees import moved, subtract


@card("personal", "|t|", "|t|", "exact")
def fml(job: Job, *, alpha: float = 0.5, beta: float = 0.5, weighting: str = "uniform") -> Algorithm:
    """Federated Mutual Learning: a private model and a shared one teach each other at every client; the shared one is averaged."""
    weigh = weights_by(weighting)
    for name, share in {"alpha": alpha, "beta": beta}.items():
        if not 0 <= share <= 1:
            raise ConfigError(f"algorithm.{name} is the share of the labels in a loss: it must be from 0 to 1 (got {share})")
    if job.loss not in (classification, language):
        raise ConfigError(
            "algorithm fml compares class or token probabilities, which this technique lacks: choose lora or prefix"
        )
    if job.plan.clip:
        raise ConfigError(
            "algorithm fml trains two models in one step, and train.clip would clip their gradients as one: leave it out, "
            "or choose fedper or local"
        )
    loss = mutual(job.loss, alpha, beta)

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        both = {"private": own_tree(own, {}, site), "meme": msg.body}
        # What is kept is the private model's: the meme's moments start anew.
        state = under(own["optimizer"], "private") if own else {}
        done = yield Fit(loss, both, site.data["train"], {}, job.plan, state, passes=2)
        mine = {"params": done.params["private"], "optimizer": inside(done.optimizer, "private")}
        return mine, Message("update", subtract(done.params["meme"], msg.body), done.seen)

    def merge(state: State, replies: dict[ClientId, Message]) -> State:
        memes, weights = [r.body for r in replies.values()], [weigh(r) for r in replies.values()]
        return {"params": moved(state["params"], memes, weights)}

    answer, judged = answer_with(job, lambda state: {}, own_tree, student=lambda state: state["params"])
    return Algorithm(
        init=lambda params: {"params": params},
        round=one_exchange(lambda state, client: Message("train", state["params"]), merge),
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        personal=own_tree,
        check=checks(job, train=update()),
    )
