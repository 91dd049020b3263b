"""Answering what client handlers ask for: each ask alone, or all clients in lockstep with equal asks in one stacked call."""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fedtailor.core import Ask, ClientId, Fit, Fitted, Flow, Forward, Message, Predict, Step, Tree, Work
from fedtailor.engines.splitting import Steps
from fedtailor.engines.training import Flops, fit, no_flops
from fedtailor.optimizers import steps_in
from fedtailor.trees import numel, signature, tree_map

TOKENS = 640
"""Tokens in a stacked step on a CPU: more is no faster and takes memory for activations (docs/performance.md)."""
LARGE = 4_000_000
"""Trained numbers above which clients are trained one by one."""
EVEN = 2
"""Groups come in multiples of this, so that two workers end together. Not the number of workers: the bits of a run must not
depend on how many cores a machine has."""
PREDICTED = 1024
"""Tokens in a batch of Predict."""

Answers = dict[ClientId, Any]
Asks = Mapping[ClientId, Ask | list[Step]]
Randoms = Callable[[ClientId], torch.Generator]


class Workers:
    """Threads that each hold a forward of their own over the same tensors; on a CPU each is single-threaded.

    One single-threaded worker a core beats one worker on all cores for small steps, and shares the backbone's memory.
    """

    def __init__(
        self,
        bind: Callable[[bool], Forward],
        count: int,
        device: str = "cpu",
        flops: Flops = no_flops,
        group: int = 0,
        looks: Flops = no_flops,
        steps: Steps | None = None,
    ) -> None:
        self.steps = steps
        self.device, self.flops, self.group, self.count, self.looks = device, flops, group, count, looks
        self.tokens = TOKENS if device == "cpu" and not group else 0
        self._bind = bind
        self._forwards: dict[bool, queue.SimpleQueue[Forward]] = {}
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) if count > 1 else None

    def map(self, work: Callable[[Any, Forward], Any], items: Sequence[Any], dropout: bool = False) -> list[Any]:
        """work(item, forward) for each item, results in the order of the items. With dropout, one after the other:
        torch's random stream is one for all threads."""
        if not items:  # who only steps through parts binds no whole forward
            return []
        if dropout not in self._forwards:
            self._forwards[dropout] = queue.SimpleQueue()
            for _ in range(self.count):
                self._forwards[dropout].put(self._bind(dropout))
        forwards = self._forwards[dropout]

        def one(item: Any) -> Any:
            forward = forwards.get()
            try:
                return work(item, forward)
            finally:
                forwards.put(forward)

        if self._pool is None or dropout:
            return [one(item) for item in items]
        return list(self._pool.map(one, items))

    def run(self, work: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """work(item) for each item, results in the order of the items."""
        return [work(item) for item in items] if self._pool is None else list(self._pool.map(work, items))

    def work(self, step: Step) -> tuple[float, float]:
        """(operations, example passes) of a step of a cut model."""
        assert self.steps
        return self.steps.work(step)

    def of(self, client: ClientId) -> Workers:
        """Who works for this client: clients with other models have workers of their own (`Crew`)."""
        return self

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


class Crew:
    """Workers by client, where clients differ in technique or backbone; those of the server for everybody else."""

    def __init__(self, server: Workers, clients: Mapping[ClientId, Workers]) -> None:
        self._server, self._clients, self.count = server, clients, server.count

    def of(self, client: ClientId) -> Workers:
        return self._clients.get(client, self._server)

    def close(self) -> None:
        for workers in {id(w): w for w in (self._server, *self._clients.values())}.values():
            workers.close()


def answer(asks: Asks, workers: Workers, randoms: Randoms, stacked: bool, pace: int | None = None) -> Answers:
    """The results of these asks. With `stacked`, Fits with the same loss, plan and shapes share calls; else each is alone.

    `randoms` gives each client its stream; `pace` is the seed of what all share (batches.py).
    """
    done: Answers = _stepped(asks, workers, stacked)
    for dropout in (False, True):
        fits = {c: a for c, a in asks.items() if isinstance(a, Fit) and a.plan.dropout == dropout}
        groups = grouped(fits, workers.group, EVEN) if stacked else [[c] for c in fits]

        def train(group: list[ClientId], forward: Forward, fits: dict[ClientId, Fit] = fits) -> list[Fitted]:
            streams = [randoms(c) for c in group]
            return fit(
                [fits[c] for c in group], streams, forward, workers.device, workers.flops, pace=pace, tokens=workers.tokens
            )

        for group, results in zip(groups, workers.map(train, groups, dropout), strict=True):
            done |= dict(zip(group, results, strict=True))
    predicts = {c: a for c, a in asks.items() if isinstance(a, Predict)}
    pieces = [(c, rows) for c, ask in predicts.items() for rows in _cut(ask)]

    def judge(piece: tuple[ClientId, np.ndarray], forward: Forward) -> Tree:
        return _outputs(predicts[piece[0]], piece[1], forward, workers.device)

    parts: dict[ClientId, list[tuple[np.ndarray, Tree]]] = {c: [] for c in predicts}
    for (client, rows), outputs in zip(pieces, workers.map(judge, pieces), strict=True):
        parts[client].append((rows, outputs))
    return done | {c: _ordered(found) for c, found in parts.items()} | {c: None for c, a in asks.items() if isinstance(a, Work)}


def _stepped(asks: Asks, workers: Workers, stacked: bool) -> Answers:
    """The results of the steps of cut models among these asks; of a list, a list."""
    wanted = {
        (client, i): step
        for client, ask in asks.items()
        for i, step in enumerate(ask if isinstance(ask, list) else [ask])
        if not isinstance(step, Fit | Predict | Work)
    }
    if not wanted:
        return {client: [] for client, ask in asks.items() if isinstance(ask, list)}
    assert workers.steps, "this engine has no parts of a cut model"
    found = workers.steps.answer(wanted, stacked, workers.run)
    out: Answers = {}
    for client, ask in asks.items():
        if isinstance(ask, list):
            out[client] = [found[client, i] for i in range(len(ask))]
        elif (client, 0) in found:
            out[client] = found[client, 0]
    return out


def drive(flows: Mapping[ClientId, Flow], answer: Callable[[dict[ClientId, Ask | list[Step]]], Answers]) -> dict[ClientId, Any]:
    """Advance all flows to their next ask, answer the asks together, until each has returned (own state, reply)."""
    done: dict[ClientId, tuple[Tree | None, Message]] = {}
    answers: Answers = dict.fromkeys(flows)
    while answers:
        asks: dict[ClientId, Ask | list[Step]] = {}
        for client, result in answers.items():
            try:
                asks[client] = flows[client].send(result)
            except StopIteration as end:
                done[client] = end.value
        answers = answer(asks) if asks else {}
    return done


def grouped(fits: Mapping[ClientId, Fit], size: int, workers: int) -> list[list[ClientId]]:
    """Clients whose Fits can be stacked, in groups of equal amounts of work.

    The choice is a rule on sizes, not on timings, so that the same run always has the same bits: about TOKENS tokens a step,
    neighbours in number of steps and in length together. A group of one is trained without a client axis.
    """
    keyed: dict[Any, list[ClientId]] = {}
    for client, ask in fits.items():
        alike = (ask.loss, ask.plan, ask.passes, signature(ask.params), signature(ask.aux), steps_in(ask.optimizer))
        keyed.setdefault(alike, []).append(client)
    groups: list[list[ClientId]] = []
    for clients in keyed.values():
        means = {c: float(np.mean(fits[c].data.lengths)) if len(fits[c].data) else 1.0 for c in clients}
        clients = sorted(clients, key=lambda c: (len(fits[c].data), means[c], c))
        tokens = fits[clients[0]].plan.batch * max(1.0, sum(means.values()) / len(means))
        # Stacking is for small trees on a frozen backbone: with weights of their own, clients share no arithmetic.
        small = numel(fits[clients[0]].params) <= LARGE
        largest = size or (max(1, int(TOKENS // tokens)) if small else 1)
        # As many groups as workers need to stay busy to the end.
        count = -(-len(clients) // largest)
        count = min(len(clients), -(-count // workers) * workers)
        cuts = np.linspace(0, len(clients), count + 1).round().astype(int)
        groups += [clients[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    return groups


def looked(ask: Predict, looks: Flops) -> float:
    """Operations of the forward passes over these rows, without what padding adds."""
    widths, rows = np.unique(np.asarray(ask.data.lengths), return_counts=True)
    return ask.passes * sum(looks(int(n), int(width)) for width, n in zip(widths, rows, strict=True))


def _cut(ask: Predict) -> list[np.ndarray]:
    """The rows in batches of about PREDICTED tokens, like lengths together."""
    lengths = np.asarray(ask.data.lengths)
    order = np.argsort(-lengths, kind="stable")
    out: list[np.ndarray] = []
    while len(order):
        size = max(1, min(256, PREDICTED // max(1, int(lengths[order[0]]))))
        out.append(order[:size])
        order = order[size:]
    return out


@torch.no_grad()
def _outputs(ask: Predict, rows: np.ndarray, forward: Forward, device: str) -> Tree:
    width = int(np.asarray(ask.data.lengths)[rows].max())
    batch = {k: v.to(device) for k, v in ask.data.batch(rows.tolist(), width, len(rows)).items()}
    params = tree_map(lambda t: t.to(device), ask.params)
    return {k: v.cpu() for k, v in ask.fn(forward, params, batch).items()}


def _ordered(parts: Sequence[tuple[np.ndarray, Tree]]) -> Tree:
    """The outputs of all batches, back in the data's order."""
    if not parts:
        return {}
    back = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in parts])))
    return {k: torch.cat([tree[k] for _, tree in parts])[back] for k in parts[0][1]}
