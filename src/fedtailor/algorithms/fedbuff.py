"""FedBuff: Federated Learning with Buffered Asynchronous Aggregation (Nguyen et al., arXiv 2106.06639).

    client:  trains from the version that it was sent; sends w_k - w and that version
    server:  waits for nobody: once `buffer` updates have come, w += eta_g mean(s(t - version) dw_k),  s(tau) = (1 + tau)^-power
A round is one emptying of the buffer. Clients that are still busy are not asked again until their update is in, or until
`patience` rounds have passed (their letter or reply was lost and nobody noticed). power = 1/2 is the paper's choice; 0 ignores staleness.
"""

from __future__ import annotations

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size
from fedtailor.core import (
    LOST,
    Algorithm,
    ClientId,
    Fit,
    Flow,
    Job,
    Message,
    Site,
    State,
    Talk,
    Tree,
    answer_with,
    as_they_come,
)
from fedtailor.errors import ConfigError
from fedtailor.trees import add, scale, subtract, weighted_mean


@card("global", "|t|", "|t|", "exact")
def asynchronous(job: Job, *, buffer: int = 5, server_lr: float = 1.0, power: float = 0.5, patience: int = 10) -> Algorithm:
    """FedBuff: updates are taken as they come, and count less the older they are. No client waits for a slower one."""
    one_size(job, "asynchronous")
    if buffer < 1:
        raise ConfigError(f"algorithm.buffer must be at least 1 (got {buffer})")

    def init(params: Tree) -> State:
        return {"params": params, "version": 0, "busy": {}}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        done = yield Fit(job.loss, msg.body, site.data["train"], {}, job.plan)
        info = {**done.seen, "version": msg.info["version"]}
        return own, Message("update", subtract(done.params, msg.body), info)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        version = state["version"]
        busy = {c: since for c, since in state["busy"].items() if version - since < patience}
        free = [c for c in cohort if c not in busy]
        busy |= dict.fromkeys(free, version)
        letter = Message("train", state["params"], {"version": float(version)})
        replies: list[tuple[ClientId, Message]] = []
        letters: dict[ClientId, Message] = dict.fromkeys(free, letter)
        while len(replies) < buffer:
            came = yield as_they_come(letters)
            letters = {}
            if not came:  # nobody is left under way
                break
            replies += sorted((c, message) for c, message in came.items() if message.verb != LOST)
            for client in came:
                busy.pop(client, None)
        if not replies:
            return {**state, "version": version + 1, "busy": busy}
        # Client order, so that simultaneous arrivals cannot change a bit; the mean is over the buffer, as in the paper.
        ordered = [message for _, message in sorted(replies, key=lambda reply: reply[0])]
        scaled = [scale(m.body, (1 + version - m.info["version"]) ** -power) for m in ordered]
        delta = weighted_mean(scaled, [1.0] * len(scaled))
        return {"params": add(state["params"], scale(delta, server_lr)), "version": version + 1, "busy": busy}

    answer, judged = answer_with(job, lambda state: state["params"])
    return Algorithm(
        init=init,
        round=round,
        client={"train": train, "answer": judged},
        answer=answer,
        model=lambda state: state["params"],
        check=checks(job, train=of_its_version),
    )


def of_its_version(letter: Message, reply: Message) -> str:
    """What is wrong with an update: it says which version it started from, and that is the one that was sent."""
    if why := update(needs=("n", "version"))(letter, reply):
        return why
    return "" if reply.info["version"] == letter.info["version"] else "it says that it started from another version"
