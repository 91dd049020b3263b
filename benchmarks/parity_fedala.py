"""FedALA beside its authors' code: the same clients, network, batches and rows, round by round.

    python benchmarks/parity_fedala.py CHECKOUT [--rounds 6] [--clients 4] [--layers 1]

CHECKOUT is one of github.com/TsingZ0/FedALA (compared at a7a9b21, Apache-2.0); nothing of it is here.

Their side is `ALA.adaptive_local_aggregation` and their server's `receive_models` and `aggregate_parameters` with their CNN (narrower)
and their defaults; ours is the algorithm file with its asks answered here. Both train with the same few lines of plain SGD, which are
not what is compared. Their block of rows is replaced by the rows that ours draws. Prints the largest differences, of 64-bit numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import Fit, Fitted, Job, Layers, Message, Part, Plan, Site, Tree, stream
from fedtailor.losses import classification
from fedtailor.metrics import metric

CLASSES, TRAIN, STEPS, BATCH, LR, SHARE, THRESHOLD = 10, 40, 8, 10, 0.05, 0.8, 0.01


class Rows:
    """A client's images: classes look alike everywhere, but every second client has them in another order."""

    def __init__(self, client: int, rows: Sequence[int] | None = None, of: Rows | None = None) -> None:
        if of is not None:
            self.x, self.y = of.x[rows], of.y[rows]
            return
        draw = torch.Generator().manual_seed(client)
        means = torch.randn(CLASSES, 1, 28, 28, generator=torch.Generator().manual_seed(99))
        self.y = torch.randint(CLASSES, (TRAIN,), generator=draw)
        order = torch.arange(CLASSES) if client % 2 else torch.arange(CLASSES).flip(0)
        self.x = means[order[self.y]] + torch.randn(TRAIN, 1, 28, 28, generator=draw)

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Sequence[int]) -> Rows:
        return Rows(0, list(rows), self)


def trained(model: torch.nn.Module, rows: Rows, seed: int) -> torch.nn.Module:
    """STEPS steps of plain SGD; the same batches for the same seed."""
    draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        batch = torch.randint(TRAIN, (BATCH,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(rows.x[batch]), rows.y[batch]).backward()
        optimizer.step()
    return model


def answered(flow: Any, network: torch.nn.Module, rows: Rows, seed: int) -> tuple[Any, Message, int]:
    """Our client's handler, its asks answered with the same network, one SGD step about weights and the same SGD about tensors."""

    def forward(params: Tree, batch: Any) -> torch.Tensor:
        out: torch.Tensor = torch.func.functional_call(network, params, (batch["x"],))
        return out

    result, asked = None, 0
    while True:
        try:
            ask = flow.send(result)
        except StopIteration as end:
            return *end.value, asked
        assert isinstance(ask, Fit)
        if "weights" in ask.params:
            asked += 1
            weights = {n: t.clone().requires_grad_() for n, t in ask.params["weights"].items()}
            loss = ask.loss(forward, {"weights": weights}, {"x": ask.data.x, "labels": ask.data.y}, ask.aux)  # type: ignore[attr-defined]
            loss.backward()
            stepped = {n: (t - ask.plan.lr * t.grad).detach() for n, t in weights.items()}  # type: ignore[operator]
            result = Fitted({"weights": stepped}, {"loss": float(loss.detach())}, {})
        else:
            model = copy.deepcopy(network)
            model.load_state_dict(ask.params)
            done = trained(model, rows, seed).state_dict()
            result = Fitted({n: t.clone() for n, t in done.items()}, {"n": float(TRAIN)}, {})


def by_module(network: torch.nn.Module) -> Layers:
    """Every module with parameters is a layer, the last of them the head."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in network.named_parameters()))
    depth = len(modules) - 1

    def part(tree: Tree, wanted: Part) -> Tree:
        def inside(at: int) -> bool:
            return wanted.start <= at < wanted.stop or (wanted.last and at == depth)

        return {n: t for n, t in tree.items() if inside(modules.index(n.rpartition(".")[0]))}

    return Layers(depth, part, lambda trees: {n: t for tree in trees for n, t in tree.items()})


def largest(a: Any, b: Any) -> float:
    return max(float((a[n] - b[n]).detach().abs().max()) for n in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--eta", type=float, default=1.0)
    options = parser.parse_args()

    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, str(options.checkout / "system"))
    for name in ("sklearn", "sklearn.preprocessing", "sklearn.metrics", "utils.data_utils"):  # for what is not used here
        sys.modules[name] = types.ModuleType(name)
    sys.modules["sklearn.preprocessing"].label_binarize = None  # type: ignore[attr-defined]
    sys.modules["sklearn"].metrics = sys.modules["sklearn.metrics"]  # type: ignore[attr-defined]
    sys.modules["utils.data_utils"].read_client_data = None  # type: ignore[attr-defined]
    from flcore.servers.serverALA import FedALA  # type: ignore[import-not-found]
    from flcore.trainmodel.models import FedAvgCNN  # type: ignore[import-not-found]
    from utils.ALA import ALA  # type: ignore[import-not-found]

    torch.manual_seed(0)
    network = FedAvgCNN(in_features=1, num_classes=CLASSES, dim=1024, dim1=32)
    over = by_module(network)
    names, rows = [f"c{i}" for i in range(options.clients)], [Rows(i) for i in range(options.clients)]
    learners = [
        ALA(i, F.cross_entropy, [], BATCH, 100, 2 * options.layers, options.eta, "cpu", THRESHOLD) for i in range(options.clients)
    ]
    clients = [types.SimpleNamespace(id=name, model=copy.deepcopy(network), train_samples=TRAIN) for name in names]
    server = object.__new__(FedALA)
    server.selected_clients, server.global_model = clients, copy.deepcopy(network)

    found = metric("auto", "image", CLASSES)
    job = Job(classification, found.judge, found.tally, Plan(batch=BATCH), clients=options.clients, layers=over)
    ours = ALGORITHMS["fedala"](job, layers=options.layers, eta=options.eta, share=SHARE, threshold=THRESHOLD, most=10**6)
    init = {n: t.clone() for n, t in network.state_dict().items()}
    state, own = ours.init(init), dict.fromkeys(names)

    print(f"{'round':>5}  {'trained':>9}  {'weights':>9}  {'server':>9}  {'steps of W':>10}  least W  numbers below 1")
    for number in range(1, options.rounds + 1):
        talk = ours.round(state, names)
        letters, replies, taken = next(talk), {}, 0
        for i, (name, client) in enumerate(zip(names, clients, strict=True)):
            site = Site(name, {"train": rows[i]}, init, number)  # type: ignore[dict-item]
            drawn = torch.randperm(TRAIN, generator=stream(0, "fedala", name, number))[: int(SHARE * TRAIN)].tolist()
            learners[i].train_data = [(rows[i].x[r], rows[i].y[r]) for r in drawn]
            with contextlib.redirect_stdout(io.StringIO()):
                learners[i].adaptive_local_aggregation(server.global_model, client.model)
            trained(client.model, rows[i], 1000 * number + i)
            flow = ours.client["train"](own[name], letters[name], site)
            own[name], replies[name], steps = answered(flow, network, rows[i], 1000 * number + i)
            taken += steps
        server.receive_models()
        server.aggregate_parameters()
        try:
            talk.send(replies)
        except StopIteration as end:
            state = end.value
        params = [dict(client.model.named_parameters()) for client in clients]
        after = max(largest(own[c]["params"], p) for c, p in zip(names, params, strict=True))
        theirs = [dict(zip(list(init)[-2 * options.layers :], learner.weights or [], strict=False)) for learner in learners]
        apart = max(largest(own[c]["weights"], w) if w else 0.0 for c, w in zip(names, theirs, strict=True))
        every = torch.cat([t.flatten() for w in theirs for t in w.values()] or [torch.ones(1)])
        merged = largest(state["params"], dict(server.global_model.named_parameters()))
        print(
            f"{number:5}  {after:9.1e}  {apart:9.1e}  {merged:9.1e}  {taken:10}  {float(every.min()):7.3f}  {float((every < 1).double().mean()):.0%}"
        )


if __name__ == "__main__":
    main()
