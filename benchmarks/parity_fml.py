"""FML beside its authors' code (ZJU-DAI/Federated-Mutual-Learning, tried at b547bbf).

    python benchmarks/parity_fml.py CHECKOUT

Their `Trainer.train_mutual`, `Node.fork` and `Global_Node.merge` on their LeNet5, in the order of their main loop (which at b547bbf has fork
and merge commented out; up to 56793ce it has not), beside `fml` on the same modules: SGD with momentum and weight decay, three clients of
unequal size, two epochs a round. Random images: what is compared is arithmetic. Needs tqdm, as they do. The last lines are their loop as it is
at b547bbf, where nothing is exchanged.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import Any

import torch
from parity import apart, detached, drawn, forward_of, images, job, ours

from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import Plan
from fedtailor.data.examples import Subset

ROUNDS, ALPHA, BETA = 3, 0.6, 0.3
PLAN = Plan(epochs=2, batch=16, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4)


class Loader(list):  # type: ignore[type-arg]
    """These batches, and the `dataset` that their progress bar divides by."""

    dataset = range(1)


def main(checkout: str) -> None:
    sys.path.insert(0, checkout)
    from Node import Global_Node, Node  # type: ignore[import-not-found]
    from Trainer import train_mutual  # type: ignore[import-not-found]

    args = Namespace(device="cpu", optimizer="sgd", lr=PLAN.lr, momentum=PLAN.momentum, alpha=ALPHA, beta=BETA)
    args.local_model = args.global_model = "LeNet5"
    rows = images(120)
    data = {f"c{k}": Subset(rows, range(k * 40, k * 40 + 24 + 8 * k)) for k in range(3)}

    def built() -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        shared = Global_Node(None, args)
        return shared, {client: Node(k, None, None, args) for k, client in enumerate(sorted(data))}

    def loop(shared: Any, nodes: dict[str, Any], exchanging: bool) -> None:
        for round in range(1, ROUNDS + 1):
            for client, node in nodes.items():
                if exchanging:
                    node.fork(shared)
                node.train_data = Loader(drawn(PLAN, data[client], client, round))
                train_mutual(node)
            if exchanging:
                shared.merge(list(nodes.values()))

    shared, nodes = built()
    start, inits = detached(shared.model), {client: detached(node.model) for client, node in nodes.items()}

    algorithm = ALGORITHMS["fml"](job(PLAN, len(data)), alpha=ALPHA, beta=BETA)
    state, own = ours(algorithm, forward_of(shared.model), start, inits, data, ROUNDS)
    loop(shared, nodes, exchanging=True)
    apart("shared", state["params"], detached(shared.model), start)
    for client, node in nodes.items():
        apart(f"private {client}", own[client]["params"], detached(node.model), inits[client])
    idle, alone = built()
    loop(idle, alone, exchanging=False)
    apart("without fork and merge: shared", state["params"], detached(idle.model), start)
    for client, node in alone.items():
        apart(f"without fork and merge: private {client}", own[client]["params"], detached(node.model), inits[client])


if __name__ == "__main__":
    main(sys.argv[1])
