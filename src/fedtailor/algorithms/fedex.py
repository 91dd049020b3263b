"""FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning (Singhal et al., arXiv 2410.09432).

    server:  A = mean A_k, B = mean B_k (as FedIT), and  W0 += s (mean(B_k A_k) - B A):  base and factors together are exact
    wire:    down, the factors and the residual as low-rank factors; with uniform or any weights p_k
             residual = sum p_k (B_k - B)(A_k - A), of rank at most (K - 1) r
The authors' code adds the transpose of the residual to Linear weights, which is right for GPT-2's Conv1D only; ours adds the
residual itself to (d_out, d_in) weights and the transpose to Conv1D's, and a test has a non-square layer. Means are uniform, as in
their code, unless `weighting` says otherwise. With a server optimiser the residual is taken against what the server really
keeps, mean(B_k A_k) - B_new A_new.
"""

from __future__ import annotations

import torch

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, update
from fedtailor.algorithms.fedavg import one_size, weights_by
from fedtailor.algorithms.merging import catch_up, merge_into_base, merged, merged_loss, unrounded
from fedtailor.core import Algorithm, ClientId, Fit, Flow, Job, Message, Site, State, Talk, Tree, answer_with
from fedtailor.errors import ConfigError
from fedtailor.trees import add, aggregation_error, lora_pairs, subtract, weighted_mean


@card("global", "|t|", "|t| + residual factors not merged yet", "exact", "lora")
def fedex(job: Job, *, weighting: str = "uniform") -> Algorithm:
    """FedEx-LoRA: FedIT's mean of factors, and the error of doing so added to the base: exact, without new ranks."""
    weigh = weights_by(weighting)
    one_size(job, "fedex")
    unrounded(job, "fedex")

    def init(params: Tree) -> State:
        if not lora_pairs(params):
            raise ConfigError('algorithm fedex works on LoRA factors: set technique.kind = "lora" (or use fedavg)')
        return {"params": params, "delta": {}, "log": {}, "known": {}, "time": 0, "aggregation_error": 0.0}

    def train(own: Tree | None, msg: Message, site: Site) -> Flow:
        mine = merged(own, msg)
        aux = {"delta": mine["delta"]} if mine["delta"] else {}
        done = yield Fit(merged_loss(job.loss), msg.body["params"], site.data["train"], aux, job.plan)
        return mine, Message("update", subtract(done.params, msg.body["params"]), done.seen)

    def round(state: State, cohort: list[ClientId]) -> Talk:
        replies = yield {c: Message("train", {"params": state["params"], **catch_up(state, c)}) for c in cohort}
        if not replies:
            return state
        known = {**state["known"], **dict.fromkeys(replies, state["time"])}
        ordered = [replies[c] for c in sorted(replies)]
        weights = [weigh(r) for r in ordered]
        old, total = state["params"], sum(weights)
        trees = [add(old, dict(r.body.items())) for r in ordered]
        params = add(old, weighted_mean([r.body for r in ordered], weights))
        residual: Tree = {}
        for module, (a, b) in lora_pairs(old).items():
            # The centred form needs no product of full size; the last client's rows are a combination of the others'.
            left = torch.cat([(w / total) * (t[b] - params[b]) for w, t in zip(weights, trees, strict=True)], dim=1)
            right = torch.cat([t[a] - params[a] for t in trees])
            residual[module] = compact(left, right, (len(trees) - 1) * old[a].shape[0])
        new = {**state, "params": params, "known": known}
        if len(trees) == 1:
            return {**new, "aggregation_error": 0.0}
        # What is left is rounding: factors and residual side by side are one product.
        whole: Tree = {}
        for module, (a, b) in lora_pairs(params).items():
            whole[a] = torch.cat([params[a], residual[module]["A"]])
            whole[b] = torch.cat([params[b], residual[module]["B"]], dim=1)
        return merge_into_base({**new, "aggregation_error": aggregation_error(trees, weights, whole)}, residual)

    def broadcast(state: State) -> Tree:
        return {**state["params"], **({"delta": state["delta"]} if state["delta"] else {})}

    answer, judged = answer_with(job, broadcast)
    check = checks(job, train=update(lambda letter, reply: dict(letter.body["params"])))
    return Algorithm(init, round, {"train": train, "answer": judged}, answer, broadcast, check=check)


def compact(left: torch.Tensor, right: torch.Tensor, rank: int) -> Tree:
    """left (d_out, k) @ right (k, d_in) as factors B (d_out, r), A (r, d_in) of at most `rank`: QR of the thin side."""
    q, r = torch.linalg.qr(left.double())
    u, s, v = torch.linalg.svd(r @ right.double(), full_matrices=False)
    keep = max(1, min(rank, int(s.numel())))
    return {"B": (q @ (u[:, :keep] * s[:keep])).float(), "A": v[:keep].float()}
