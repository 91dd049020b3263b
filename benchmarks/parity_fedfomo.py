"""FedFomo beside its authors' code: the same clients, network, batches and validation rows, round by round.

    python benchmarks/parity_fedfomo.py CHECKOUT [--rounds 6] [--clients 4]

CHECKOUT is one of github.com/NVlabs/FedFomo (compared at fe04f66); its licence is for research only, and nothing of it is here.

Their side is `Federation.compute_client_weights` and `Federation.federate` with their CNN and the defaults of their README; ours is
the algorithm file with its asks answered here. Both train with the same few lines of plain SGD, which are not what is compared.
All peers are candidates (m = clients - 1), so that the lots of both sides do not matter. Prints the largest differences.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import Fit, Fitted, Job, Message, Predict, Site
from fedtailor.losses import classification
from fedtailor.metrics import metric

CLASSES, TRAIN, VALID, STEPS, BATCH, LR = 10, 40, 20, 8, 10, 0.05


class Rows:
    """A client's images: classes look alike everywhere, but every second client has them in another order."""

    def __init__(self, client: int) -> None:
        draw = torch.Generator().manual_seed(client)
        means = torch.randn(CLASSES, 3, 32, 32, generator=torch.Generator().manual_seed(99))
        self.y = torch.randint(CLASSES, (TRAIN + VALID,), generator=draw)
        order = torch.arange(CLASSES) if client % 2 else torch.arange(CLASSES).flip(0)
        self.x = means[order[self.y]] + torch.randn(TRAIN + VALID, 3, 32, 32, generator=draw)

    def __len__(self) -> int:
        return VALID


def trained(model: torch.nn.Module, rows: Rows, seed: int) -> torch.nn.Module:
    """STEPS steps of plain SGD; the same batches for the same seed."""
    draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(STEPS):
        batch = torch.randint(TRAIN, (BATCH,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(rows.x[batch]), rows.y[batch]).backward()
        optimizer.step()
    return model


class Theirs:
    """What their Federation asks of a client."""

    def __init__(self, place: int, model: torch.nn.Module, rows: Rows, clients: int, args: Any) -> None:
        self.id, self.model, self.rows, self.args = place, model, rows, args
        self.first_model = copy.deepcopy(model)
        self.criterion, self.device, self.train_size, self.last_active_round = None, None, TRAIN, 0
        self.population = types.SimpleNamespace(num_clients=clients)
        self.client_weights = torch.zeros(clients).numpy()
        self.client_weights[place] = args.client_initial_self_weight
        self.model_weights_over_time: list[Any] = []
        self.client_weights_over_time: list[Any] = []
        self.optim = self.scheduler = None

    def get_federating_clients(self, possible_clients: list[Theirs], **_: Any) -> list[Theirs]:
        found = [self, *(c for c in possible_clients if c.id != self.id)]
        self.federating_client_ids = [c.id for c in found]
        return found

    def eval(self, model: torch.nn.Module, **_: Any) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model(self.rows.x[TRAIN:]), self.rows.y[TRAIN:]))

    def update_model(self, state: dict[str, Any]) -> None:
        self.model = copy.deepcopy(self.first_model)
        self.model.load_state_dict(state)
        self.optim = self.scheduler = None


def answered(flow: Any, network: torch.nn.Module, rows: Rows, seed: int) -> tuple[Any, Message]:
    """Our client's handler, its asks answered with the same network and the same SGD."""
    result: Any = None
    while True:
        try:
            ask = flow.send(result)
        except StopIteration as end:
            return end.value
        model = copy.deepcopy(network)
        if isinstance(ask, Predict):
            nll, labels = [], rows.y[TRAIN:]
            for tree in ask.params.values():
                model.load_state_dict(tree)
                with torch.no_grad():
                    nll.append(F.cross_entropy(model(rows.x[TRAIN:]), labels, reduction="none"))
            alike = labels[:, None].expand(-1, len(nll))
            result = {"nll": torch.stack(nll, 1), "predicted": alike, "label": alike}
        else:
            assert isinstance(ask, Fit)
            model.load_state_dict(ask.params)
            done = trained(model, rows, seed).state_dict()
            result = Fitted({n: t.clone() for n, t in done.items()}, {"n": float(TRAIN)}, {})


def largest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[n] - b[n]).abs().max()) for n in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--clients", type=int, default=4)
    options = parser.parse_args()

    torch.set_default_dtype(torch.float64)
    sys.path.insert(0, str(options.checkout))
    sys.argv = ["main.py", "--baseline_model", "first_model", "--arch", "tf_cnn", "--leave_one_out", "--model_weight_delta", "1"]
    sys.modules.setdefault("torchvision", types.ModuleType("torchvision"))  # for networks that are not used here
    with contextlib.redirect_stdout(io.StringIO()):
        import federation as theirs  # type: ignore[import-not-found]
        from federated.args import args  # type: ignore[import-not-found]

        args.num_classes = CLASSES
        torch.manual_seed(0)
        network = theirs.federated_network.get_net(args)

    names = [f"c{i}" for i in range(options.clients)]
    rows = [Rows(i) for i in range(options.clients)]
    population = [Theirs(i, copy.deepcopy(network), rows[i], options.clients, args) for i in range(options.clients)]
    found = metric("auto", "image", CLASSES)
    job = Job(classification, found.judge, found.tally, clients=options.clients)
    ours = ALGORITHMS["fedfomo"](job, m=options.clients - 1)
    init = {n: t.clone() for n, t in network.state_dict().items()}
    state, own = ours.init(init), dict.fromkeys(names)

    print(f"{'round':>5}  {'moved':>9}  {'trained':>9}  {'affinity':>9}  {'peers that helped':>18}  went back")
    for number in range(options.rounds):
        if number:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                group = theirs.Federation(clients=population, federation_id=0, epoch=number)
                group.compute_client_weights(number, federated_models=[], available_clients=population)
                group.federate()
        talk = ours.round(state, names)
        letters, replies = next(talk), {}
        for i, (name, client) in enumerate(zip(names, population, strict=True)):
            client.first_model = copy.deepcopy(client.model)
            trained(client.model, rows[i], 1000 * number + i)
            site = Site(name, {"train": rows[i], "valid": rows[i]}, init, number + 1)
            flow = ours.client["train"](own[name], letters[name], site)
            own[name], replies[name] = answered(flow, network, rows[i], 1000 * number + i)
        try:
            talk.send(replies)
        except StopIteration as end:
            state = end.value
        moved = max(largest(own[c]["base"], p.first_model.state_dict()) for c, p in zip(names, population, strict=True))
        after = max(largest(own[c]["params"], p.model.state_dict()) for c, p in zip(names, population, strict=True))
        trust = max(
            abs(state["affinity"][c].get(other, 0.0) - float(p.client_weights[j]))
            for c, p in zip(names, population, strict=True)
            for j, other in enumerate(names)
        )
        scores = [{k: v for k, v in r.info.items() if k == "own" or k.isdigit()} for r in replies.values()]
        helped = sum(v > 0 for told in scores for k, v in told.items() if k != "own")
        back = sum(bool(told) and max(told.values()) <= 0 for told in scores)
        print(f"{number + 1:5}  {moved:9.1e}  {after:9.1e}  {trust:9.1e}  {helped:18}  {back}")


if __name__ == "__main__":
    main()
