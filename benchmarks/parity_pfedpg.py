"""pFedPG's generator beside a re-implementation (PeiYauWeng/Probabilistic_Prompt_Aggregation_Baseline, tried at 49b3632); no code of the
authors' is known.

    python benchmarks/parity_pfedpg.py CHECKOUT

Their `prompt_generator` (one descriptor row a client, base added) with the server's step of their `train_eval_pFedPG`, one client a round, beside
`pfedpg` with `rows = "one"`, both by plain descent: their Adam counts a client's steps by everybody's and moves the descriptors of who is not
there, ours does neither. Clients are stood in for by random changes: what is compared is the server. The bias of their output
layer is left out: the paper has none. torchvision, which they import for their model, is left empty.

Then what the gradients of other re-implementations do, by our generator: whether a step of the server leads a prompt to what the client found.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import MagicMock

import torch
from parity import apart, job
from torch import Tensor

from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.pfedpg import generated
from fedtailor.core import Message, Plan, Tree, stream
from fedtailor.techniques.peft import PROMPT

ROUNDS, ROWS, SIZE, WIDTH, RATE = 12, 10, 48, 16, 1e-2
CLIENTS = ["c0", "c1", "c2"]
NAMES = {"query": "to_q.weight", "key": "to_k.weight", "value": "to_v.weight", "output": "to_out.0.weight"}


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    for absent in ("torchvision", "torchvision.models"):
        sys.modules.setdefault(absent, MagicMock())
    from Models.pFedPG_model import prompt_generator  # type: ignore[import-not-found]

    torch.manual_seed(0)
    theirs = prompt_generator(ROWS, len(CLIENTS), WIDTH, WIDTH, SIZE)
    theirs.to_out[0].bias = None
    optimizer = torch.optim.SGD(theirs.parameters(), lr=RATE)

    def tree() -> Tree:
        found = {name: p.detach().clone() for name, p in theirs.named_parameters()}
        return {"base": found["base_prompts"], **{ours: found[name].mT.contiguous() for ours, name in NAMES.items()}}

    def descriptors() -> Tree:
        return {c: theirs.descriptor.weight.detach()[k : k + 1].clone() for k, c in enumerate(CLIENTS)}

    algorithm = ALGORITHMS["pfedpg"](job(Plan(), len(CLIENTS)), width=WIDTH, rows="one", server_lr=RATE, server_optimizer="sgd")
    start, first = tree(), descriptors()
    state = {**algorithm.init({PROMPT: start["base"]}), "generator": start}
    state["clients"] = {c: {"descriptor": d, "optimizer": {}} for c, d in first.items()}
    worst = 0.0
    for round in range(ROUNDS):
        at = round % len(CLIENTS)
        talk = algorithm.round(state, [CLIENTS[at]])
        sent = next(talk)[CLIENTS[at]].body[PROMPT]
        prompt = theirs(x_id=torch.tensor([at]))
        worst = max(worst, float((sent - prompt.detach()).abs().max()))
        change = torch.randn(ROWS, SIZE, generator=stream(0, "change", round))
        try:
            talk.send({CLIENTS[at]: Message("update", {PROMPT: change}, {"n": 1.0})})
        except StopIteration as end:
            state = end.value
        found = torch.autograd.grad(list(prompt), list(theirs.parameters()), grad_outputs=list(-change))
        for p, g in zip(theirs.parameters(), found, strict=True):
            p.grad = g
        optimizer.step()
    print(f"prompts sent: largest difference {worst:.1e}")
    apart("generator", state["generator"], tree(), start)
    apart("descriptors", {c: state["clients"][c]["descriptor"] for c in CLIENTS}, descriptors(), first)
    signs(start, first["c0"])


def signs(generator: Tree, descriptor: Tensor) -> None:
    """Cosine of how a step moves a prompt and of what the client changed in it, the mean of a hundred random changes."""
    gradients: dict[str, Callable[[Tensor], Tensor]] = {
        "ours, as pFedHN's": lambda change: -change,
        "P~ - P (MSungK/pFedPG, or the paper's words taken literally)": lambda change: change,
        "all entries of P dP' (dbd05088/FederatedCL)": lambda change: change.sum(0).expand_as(change),
    }
    for name, gradient in gradients.items():
        found = []
        for number in range(100):
            change = torch.randn(ROWS, SIZE, generator=stream(0, "sign", number))
            leaves = {part: t.clone().requires_grad_() for part, t in generator.items()}
            before = generated(leaves, descriptor, True)
            slopes = torch.autograd.grad(before, list(leaves.values()), grad_outputs=gradient(change))
            after = generated({part: t - RATE * g for (part, t), g in zip(leaves.items(), slopes, strict=True)}, descriptor, True)
            found.append(torch.cosine_similarity((after - before).detach().flatten(), change.flatten(), dim=0))
        print(f"{name}: cosine of a step with the client's change {float(torch.stack(found).mean()):+.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
