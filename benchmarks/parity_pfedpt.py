"""pFedPT beside its authors' code (hkgdifyu/pFedPT, tried at cebec63).

    python benchmarks/parity_pfedpt.py CHECKOUT

Their `clientPT.train`, `PadPrompter`, `FedAvgCNN` and `Server.aggregate_parameters` beside `pfedpt` on the same modules: three clients of unequal
size, two passes for the frame and two for the network in each of three rounds. Random images: what is compared is arithmetic. What they
import and this does not need (timm, ujson, h5py) is left empty. Needs scikit-learn, as they do.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from types import MethodType
from unittest.mock import MagicMock

import torch
from parity import CLASSES, apart, detached, drawn, images, job, ours
from torch import Tensor
from torch.func import functional_call

from fedtailor.algorithms import ALGORITHMS
from fedtailor.core import Batch, Plan, Tree, stream
from fedtailor.data.examples import Subset
from fedtailor.techniques.base import FRAME, framed

ROUNDS, PIXELS, PAD, PASSES = 3, (3, 32, 32), 2, 2
PLAN = Plan(epochs=PASSES, batch=16, optimizer="sgd", lr=0.05)
FIRST = PLAN._replace(lr=1.0, momentum=0.5)  # the frame's
THEIRS = ("pad_up", "pad_down", "pad_left", "pad_right")  # in the order of FRAME


def main(checkout: str) -> None:
    sys.path.insert(0, f"{checkout}/system")
    for absent in ("h5py", "ujson", "timm", "timm.data", "timm.models", "timm.models.layers", "timm.models.registry"):
        sys.modules.setdefault(absent, MagicMock())
    from flcore.clients.clientpt import clientPT  # type: ignore[import-not-found]
    from flcore.servers.serverbase import Server  # type: ignore[import-not-found]
    from flcore.trainmodel.models import FedAvgCNN, LocalModel_pt, PadPrompter  # type: ignore[import-not-found]

    torch.manual_seed(0)
    rows = images(160)
    data = {f"c{k}": Subset(rows, range(k * 48, k * 48 + 16 * (k + 1))) for k in range(3)}
    args = Namespace(device="cpu", dataset="", save_folder_name="", num_classes=CLASSES, batch_size=PLAN.batch, privacy=False)
    args = Namespace(**vars(args), dp_sigma=0, local_learning_rate=PLAN.lr, local_steps=PASSES, plocal_steps=PASSES)
    args = Namespace(**vars(args), pt_learning_rate=FIRST.lr, momentum=FIRST.momentum, learning_decay=1.0)
    base = FedAvgCNN(in_features=3, num_classes=CLASSES, dim=1600)
    args.model = LocalModel_pt(PadPrompter(3, PAD, 32, args), base)
    start = detached(base)

    algorithm = ALGORITHMS["pfedpt"](
        job(PLAN, len(data))._replace(pixels=PIXELS),
        pad=PAD,
        prompt_epochs=PASSES,
        prompt_lr=FIRST.lr,
        prompt_momentum=FIRST.momentum,
    )

    def forward(params: Tree, batch: Batch) -> Tensor:
        shown = framed(batch["pixel_values"], params) if FRAME[0] in params else batch["pixel_values"]
        return functional_call(base, {n: t for n, t in params.items() if n not in FRAME}, (shown,))  # type: ignore[no-any-return]

    state, own = ours(algorithm, forward, start, dict.fromkeys(data, start), data, ROUNDS)

    clients, frames = {}, {}
    for client, rows_of in data.items():
        clients[client] = made = clientPT(args, client, len(rows_of), 0, train_slow=False, send_slow=False)
        random = stream(0, "frame", client)  # as ours was drawn
        for name in THEIRS:
            strip = getattr(made.model.generator, name)
            strip.data = torch.randn(strip.shape[1:], generator=random)[None]
        frames[client] = strips(made.model.generator)
    server = MagicMock(global_model=base)
    server.add_parameters = MethodType(Server.add_parameters, server)
    for round in range(1, ROUNDS + 1):
        for client, theirs in clients.items():
            theirs.set_parameters(server.global_model)
            # One list a pass: they ask for a loader once and run through it in both phases.
            phases = [drawn(plan, data[client], client, round, asked) for asked, plan in ((1, FIRST), (2, PLAN))]
            loader = Passes([*halves(phases[0]), *halves(phases[1])])
            theirs.load_train_data = lambda loader=loader: loader
            theirs.train()
        total = sum(len(rows_of) for rows_of in data.values())
        server.uploaded_models = [theirs.model.base for theirs in clients.values()]
        server.uploaded_weights = [len(rows_of) / total for rows_of in data.values()]
        Server.aggregate_parameters(server)
    apart("network", state["params"], detached(server.global_model), start)
    for client, theirs in clients.items():
        apart(f"frame {client}", own[client]["prompt"], strips(theirs.model.generator), frames[client])


def strips(generator: torch.nn.Module) -> Tree:
    found = detached(generator)
    return {mine: found[name][0] for mine, name in zip(FRAME, THEIRS, strict=True)}


def halves(batches: list[tuple[Tensor, Tensor]]) -> list[list[tuple[Tensor, Tensor]]]:
    each = len(batches) // PASSES
    return [batches[i * each : (i + 1) * each] for i in range(PASSES)]


class Passes:
    """A loader whose next pass has the next of these lists of batches."""

    def __init__(self, passes: list[list[tuple[Tensor, Tensor]]]) -> None:
        self._passes = iter(passes)

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(next(self._passes))


if __name__ == "__main__":
    main(sys.argv[1])
