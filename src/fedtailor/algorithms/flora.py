"""FLoRA: Federated Fine-Tuning LLMs with Heterogeneous Low-Rank Adaptations (Wang et al., arXiv 2409.05976).

    client k:  trains fresh factors of its own rank r_k;  sends A_k (r_k, d_in), B_k (d_out, r_k), the head
    server:    A = [p_1 A_1; ...; p_K A_K],  B = [B_1, ..., B_K]:  B A = sum p_k B_k A_k exactly;  W0 += s B A;  factors start anew
    client:    merges every stack that it has not seen yet, in order, so its base is the server's bit for bit
What a client has merged is its own state; a client that missed rounds gets their stacks, or the merged sum where that is
smaller. s is the same at every rank (alpha grows with the rank). The head is averaged with p_k, as usual.
"""

from __future__ import annotations

import torch

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, difference, update
from fedtailor.algorithms.fedavg import weights_by
from fedtailor.algorithms.merging import catch_up, merge_into_base, merged, merged_loss, unrounded
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Letters, Message, Site, State, Talk, Tree, answer_with
from fedtailor.errors import ConfigError
from fedtailor.trees import add, aggregation_error, lora_pairs, subtract, weighted_mean

weigh = weights_by("examples")


@card("global", "sum r_k (d_in + d_out) + head", "the stacks not merged yet", "exact", "lora")
def flora(job: Job) -> Algorithm:
    """FLoRA: stacked factors of any ranks, merged exactly into the base each round."""
    unrounded(job, "flora")

    def init(params: Tree) -> State:
        if not lora_pairs(params):
            raise ConfigError('algorithm flora works on LoRA factors: set technique.kind = "lora" (or use fedavg)')
        head = {n: t for n, t in params.items() if ".lora_" not in n}
        return {"fresh": params, "head": head, "delta": {}, "log": {}, "known": {}, "time": 0, "aggregation_error": 0.0}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        mine = merged(own, msg)
        start = {**site.init, **msg.body["head"]}
        aux = {"delta": mine["delta"]} if mine["delta"] else {}
        done = yield Fit(merged_loss(job.loss), start, site.data["train"], aux, job.plan)
        # Fresh factors need no difference; the head does.
        head = subtract({n: done.params[n] for n in msg.body["head"]}, msg.body["head"])
        factors = {n: t for n, t in done.params.items() if ".lora_" in n}
        return mine, Message("update", {"factors": factors, "head": head}, done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        replies = yield {c: Message("train", {"head": state["head"], **catch_up(state, c)}) for c in cohort}
        strange = {c: why for c in sorted(replies) if (why := misfit(replies[c].body["factors"], state["fresh"]))}
        if strange:
            replies = {c: r for c, r in replies.items() if c not in strange}
            yield Letters({}, "all", "; ".join(f"{c} set aside: {why}" for c, why in strange.items()))
        if not replies:
            return state
        known = {**state["known"], **dict.fromkeys(replies, state["time"])}
        ordered = [replies[c] for c in sorted(replies)]
        weights = [weigh(r) for r in ordered]
        shares = [w / sum(weights) for w in weights]
        stack: Tree = {}
        product: Tree = {}
        for module, (a, b) in lora_pairs(ordered[0].body["factors"]).items():
            stack[module] = {
                "A": torch.cat([p * r.body["factors"][a] for p, r in zip(shares, ordered, strict=True)]),
                "B": torch.cat([r.body["factors"][b] for r in ordered], dim=1),
            }
            product[a], product[b] = stack[module]["A"], stack[module]["B"]
        error = aggregation_error([r.body["factors"] for r in ordered], weights, product)  # of rounding alone
        head = add(state["head"], weighted_mean([r.body["head"] for r in ordered], shares)) if state["head"] else {}
        return merge_into_base({**state, "head": head, "known": known, "aggregation_error": error}, stack)

    def broadcast(state: State) -> Tree:
        # The factors of a newcomer are fresh (B = 0): what was learned stands in delta and head.
        return {**state["fresh"], **state["head"], **({"delta": state["delta"]} if state["delta"] else {})}

    answer, judged = answer_with(job, broadcast)
    check = checks(job, train=update(lambda letter, reply: {"factors": reply.body["factors"], "head": letter.body["head"]}))
    return Algorithm(init, round, {"train": train, "answer": judged}, answer, broadcast, check=check)


def misfit(factors: Tree, fresh: Tree) -> str:
    """What is wrong with a client's factors: one rank for each pair, everything else as the server's own."""
    want = {name: t for name, t in fresh.items() if ".lora_" in name}
    try:
        for a, b in lora_pairs(want).values():
            rank = int(factors[a].shape[0])
            want[a], want[b] = want[a][:1].expand(rank, -1), want[b][:, :1].expand(-1, rank)
            if not rank:
                return f"'{a}' has no rank"
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        return f"its factors are malformed ({error})"
    return difference(factors, want)
