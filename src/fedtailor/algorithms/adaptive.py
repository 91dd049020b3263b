"""Prefixes (or soft prompts) whose length each client chooses for itself; they are averaged although lengths differ.

The future work that summaries of arXiv 2601.00526 name; no rule is published, so all of this is ours:
    first letter   the client gets the longest prefix and, from its first rows of it, trains `pilot` steps at each length that its uplink can
                   send in `upload` seconds; it keeps the shortest whose validation loss is within `tolerance` of the best
    later letters  it gets and sends that many rows only; the server remembers nothing but the length
    server         every row is averaged over the clients that hold it, by examples, as FedAvg with clients.lengths does
The first rows are trained by everybody, so they say what all need; later rows belong to who can afford them.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import weights_by
from fedtailor.core import Algorithm, ClientId, Device, Fit, Flow, Job, Message, Predict, Site, State, Talk, Tree, answer_with
from fedtailor.errors import ConfigError
from fedtailor.metrics import mean_loss
from fedtailor.techniques.peft import PROMPT
from fedtailor.trees import add, nbytes, overlapping_mean, subtract


@card("global", "its rows + head", "its rows + head", "ours", "prefix")
def adaptive_prefix(
    job: Job,
    *,
    lengths: list[int] = [2, 5, 10, 20],  # noqa: B006 (never written to)
    pilot: int = 16,
    tolerance: float = 0.02,
    upload: float = 0.0,
    weighting: str = "examples",
) -> Algorithm:
    """FedAvg of prefixes of which each client chooses the length, by a pilot on its validation rows and by its uplink."""
    weigh = weights_by(weighting)
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"algorithm.lengths {lengths}: list lengths of 1 or more")
    if job.sizes:
        raise ConfigError("algorithm adaptive-prefix chooses lengths: leave clients.lengths out")
    if pilot < 1 or tolerance < 0 or upload < 0:
        raise ConfigError("algorithm.pilot must be at least 1, algorithm.tolerance and algorithm.upload at least 0")
    sizes = sorted(set(lengths))

    def init(params: Tree) -> State:
        if PROMPT not in params:
            raise ConfigError("algorithm adaptive-prefix chooses lengths: set technique.kind to 'prefix' or 'prompt'")
        if len(params[PROMPT]) != sizes[-1]:
            raise ConfigError(
                f"technique.length = {len(params[PROMPT])}: set it to {sizes[-1]}, the longest of algorithm.lengths"
            )
        return {"params": params, "lengths": {}}

    def choose(own: Tree | None, msg: Message, site: Site) -> Flow:
        """A pilot at each length that the device can send, then a round at the one that is kept."""
        judged = site.data["valid"] if len(site.data.get("valid", ())) else site.data["train"]
        plan, losses = job.plan._replace(steps=pilot), {}
        for size in affordable(msg.body, sizes, site.device, upload):
            tried = yield Fit(job.loss, first_rows(msg.body, size), site.data["train"], {}, plan)
            if len(judged):
                outputs = yield Predict(job.judge, tried.params, judged)
                losses[size] = mean_loss(job.tally(outputs))
        best = min(losses.values(), default=0.0)
        kept = min((size for size, loss in losses.items() if loss <= best * (1 + tolerance)), default=sizes[0])
        return (yield from train({"length": kept}, msg, site))

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        size = int(own["length"]) if own else len(msg.body[PROMPT])
        start = first_rows(msg.body, size)
        done = yield Fit(job.loss, start, site.data["train"], {}, job.plan)
        return {"length": size}, Message("update", subtract(done.params, start), {**done.seen, "length": float(size)})

    def round(state: State, cohort: list[ClientId]) -> Talk:
        known = state["lengths"]
        asked = {size: Message("train", first_rows(state["params"], size)) for size in {known[c] for c in cohort if c in known}}
        whole = Message("choose", state["params"])  # equal letters are one
        replies = yield {c: asked[known[c]] if c in known else whole for c in cohort}
        if not replies:
            return state
        told = [replies[c] for c in sorted(replies)]
        delta = overlapping_mean([r.body for r in told], [weigh(r) for r in told], state["params"])
        lengths = {**known, **{c: int(r.info["length"]) for c, r in replies.items()}}
        return {"params": add(state["params"], delta), "lengths": {c: lengths[c] for c in sorted(lengths)}}

    def like(letter: Message, reply: Message) -> Tree:
        size = reply.info["length"]
        if size not in sizes:
            raise ValueError(f"a length of {size:g}")
        return first_rows(letter.body, int(size))

    fits = update(like, ("n", "length"))
    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=init,
        round=round,
        client={"choose": choose, "train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        check=checks(job, train=fits, choose=fits),
    )


def first_rows(tree: Tree, size: int) -> Tree:
    """The same tree with the first `size` virtual tokens."""
    return tree if len(tree[PROMPT]) == size else {**tree, PROMPT: tree[PROMPT][:size].contiguous()}


def affordable(tree: Tree, sizes: list[int], device: Device, seconds: float) -> list[int]:
    """The lengths whose tree this uplink sends in time, at least the shortest."""
    if not seconds or not device.uplink:
        return sizes
    return [size for size in sizes if nbytes(first_rows(tree, size)) <= seconds * device.uplink] or sizes[:1]
