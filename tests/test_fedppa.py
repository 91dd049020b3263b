"""FedPPA-style alignment: its limits, what is common and what is not, and the weights of FedPPA+."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from federations import Outcome, World
from fedtailor import wire
from fedtailor.algorithms.fedppa import by_layer, dealt, entropy
from fedtailor.core import Message, Plan
from fedtailor.errors import ConfigError
from fedtailor.techniques.peft import of_head
from tiny import distance, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
WHOLE = Plan(epochs=1, batch=16, lr=0.1, optimizer="sgd")  # all of a client's rows in one step
AT_ONCE: dict[str, Any] = {"stages": 1, "lam": 1.0}


def replies(done: Outcome, round: int = 1) -> dict[str, Message]:
    return {s.client: s.reply for s in done.log if s.round == round and s.reply.verb == "update"}


def test_fully_aligned_it_is_uniform_fedavg_under_heads_that_stay(federation: Federation) -> None:
    done = federation("fedppa", options=AT_ONCE, plan=WHOLE, rounds=3)
    plain = federation("fedper", options={"weighting": "uniform"}, plan=WHOLE, rounds=3)
    common = {n: t for n, t in plain.state["params"].items() if not of_head(n)}
    assert distance({n: done.state["params"][n] for n in common}, common) < 1e-5
    for client in ("c0", "c1", "c2"):
        heads = {n: t for n, t in done.own[client]["params"].items() if of_head(n)}
        assert distance(heads, plain.own[client]) < 1e-5


@pytest.mark.parametrize("rule", ["interpolate", "proximal"])
def test_unaligned_it_is_training_alone(rule: str, federation: Federation) -> None:
    plan = WHOLE._replace(epochs=2)
    alone = federation("local", plan=plan)
    done = federation("fedppa", options={"lam": 0.0, "stages": 2, "rule": rule}, plan=plan)
    for client in ("c0", "c1", "c2"):
        assert distance(done.own[client]["params"], alone.own[client]["params"]) < 1e-6


def test_what_is_pulled_halfway_begins_halfway(federation: Federation) -> None:
    one = federation("fedppa", options={**AT_ONCE, "lam": 0.5}, plan=WHOLE, rounds=1)
    letter = one.world.algorithm.round(one.state, ["c0"])
    mean = next(letter)["c0"].body  # type: ignore[call-overload,index]
    flow = one.world.algorithm.client["train"](one.own["c0"], Message("train", mean), one.world.sites("c0", 2))
    start = next(flow).params  # type: ignore[union-attr]
    for name, t in one.own["c0"]["params"].items():
        torch.testing.assert_close(start[name], (t + mean[name]) / 2 if name in mean else t)


def test_layers_that_a_client_lacks_are_the_others_mean(federation: Federation) -> None:
    done = federation("fedppa", options={"depths": [1, 2]}, plan=WHOLE, rounds=1)
    layers, told = done.world.job.layers, replies(done)
    assert layers
    deep = {c: [n for n, layer in enumerate(by_layer(layers, dict(r.body))) if layer] for c, r in told.items()}
    assert deep == {"c0": [0], "c1": [0, 1], "c2": [0]}
    for number, members in ((0, ["c0", "c1", "c2"]), (1, ["c1"])):
        for name in by_layer(layers, dict(told["c1"].body))[number]:
            mean = sum(told[c].body[name] for c in members) / len(members)
            torch.testing.assert_close(done.state["params"][name], mean, rtol=1e-6, atol=1e-7)
    assert not any(of_head(name) for reply in told.values() for name in reply.body)


def test_another_shape_is_never_averaged(federation: Federation) -> None:
    """Two clients of rank 2 and one of rank 3, which meets nobody."""
    sizes = {"c0": 2, "c1": 3, "c2": 2}
    done = federation("fedppa", options={"lam": 1.0, "stages": 1}, topts={"rank": 3}, sizes=sizes, plan=WHOLE, rounds=2)
    told, letters = replies(done), {s.client: s.letter.body for s in done.log if s.round == 2 and s.reply.verb == "update"}
    for name, t in letters["c1"].items():
        torch.testing.assert_close(t, told["c1"].body[name])
    for name, t in letters["c0"].items():
        torch.testing.assert_close(t, (told["c0"].body[name] + told["c2"].body[name]) / 2)
    assert letters["c0"].keys() == letters["c2"].keys()


def test_the_papers_entropies() -> None:
    counts = torch.tensor([[50, 50, 0], [90, 10, 0], [30, 30, 40]])
    found = [entropy(torch.repeat_interleave(torch.arange(3), row)) for row in counts]
    assert found == pytest.approx([0.693147, 0.325083, 1.088900], abs=1e-6)
    assert [x / sum(found) for x in found] == pytest.approx([0.328953, 0.154278, 0.516769], abs=1e-6)
    assert entropy(torch.zeros(5, dtype=torch.long)) == 0
    assert entropy(torch.zeros(0, dtype=torch.long)) == 0


def test_weights_by_entropy(federation: Federation) -> None:
    done = federation("fedppa", options={**AT_ONCE, "weights": "entropy"}, plan=WHOLE, rounds=1)
    told = replies(done)
    heavy = {c: r.info["entropy"] for c, r in told.items()}
    assert len(set(heavy.values())) > 1
    for name in told["c0"].body:
        mean = sum(w * told[c].body[name] for c, w in heavy.items()) / sum(heavy.values())
        torch.testing.assert_close(done.state["params"][name], mean, rtol=1e-5, atol=1e-6)


def test_clients_of_one_class_each_count_alike(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fedtailor.algorithms.fedppa"], "entropy", lambda labels: 0.0)
    none = federation("fedppa", options={**AT_ONCE, "weights": "entropy"}, plan=WHOLE, rounds=1)
    assert same(none.state["params"], federation("fedppa", options=AT_ONCE, plan=WHOLE, rounds=1).state["params"])


def test_the_wire_is_the_adapted_layers(federation: Federation) -> None:
    done = federation("fedppa", options={"depths": [1, 2]}, plan=WHOLE)
    seen = [s for s in done.log if s.client == "c0" and s.reply.verb == "update"]
    row = done.ledger.clients["c0"]
    assert row["bytes_up"] == sum(len(wire.encode(s.reply)) for s in seen)
    assert row["bytes_down"] == sum(len(wire.encode(s.letter)) for s in seen)
    assert seen[1].letter.body.keys() == seen[1].reply.body.keys() < seen[0].letter.body.keys()


@pytest.mark.parametrize(
    "plan", [Plan(epochs=1, batch=4), Plan(epochs=2, batch=3), Plan(epochs=0.5, batch=2), Plan(steps=5, batch=4)]
)
@pytest.mark.parametrize("rows", [1, 6, 23])
def test_stages_are_one_plan(plan: Plan, rows: int) -> None:
    """As many steps as in one training, and in each pass every row once."""
    parts = dealt(plan, np.arange(rows) % 5 + 3, 4, torch.Generator())
    steps = plan.steps or max(1, round(plan.epochs * -(-rows // plan.batch)))
    whole, left = divmod(steps, -(-rows // plan.batch))
    seen = [row for part in parts for row in part]
    assert len(parts) == 4
    assert all(sorted(seen[i * rows : (i + 1) * rows]) == list(range(rows)) for i in range(whole))
    assert len(set(seen[whole * rows :])) == len(seen) - whole * rows <= left * plan.batch
    assert parts[-1]
    assert dealt(plan, np.arange(0), 4, torch.Generator()) == [[]] * 4


def test_a_training_in_stages_takes_the_steps_of_one(federation: Federation) -> None:
    flops: dict[str, Any] = {"flops": lambda rows, width: float(rows), "plan": Plan(epochs=1, batch=2), "rounds": 1}
    staged = federation("fedppa", options={"stages": 4}, **flops)
    assert staged.ledger.total("examples") == federation("local", **flops).ledger.total("examples")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"lam": 1.5}, "from 0"),
        ({"lam": -1, "rule": "proximal"}, "from 0"),
        ({"stages": 0}, "stages"),
        ({"depths": [-1]}, "depths.*from 1 to 2"),
        ({"depths": [0]}, "depths.*from 1 to 2"),
        ({"depths": [1, 3]}, "depths.*from 1 to 2"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], line: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=line):
        world("fedppa", options=options)


def test_somebody_must_have_something_in_common(world: Maker) -> None:
    with pytest.raises(ConfigError, match=r"no two clients have a layer in common.*choose fml"):
        world("fedppa", topts={"rank": 3}, sizes={"c0": 1, "c1": 2, "c2": 3})
    world("fedppa", topts={"rank": 3}, sizes={"c0": 3, "c1": 2, "c2": 3})


def test_it_needs_tensors_of_layers(world: Maker) -> None:
    for technique, topts in (("prefix", {"length": 2}), ("head", {})):
        here = world("fedppa", technique=technique, topts=topts)
        with pytest.raises(ConfigError, match=r"layer by layer.*fedbasis"):
            here.algorithm.init(here.technique.init)
    with pytest.raises(ConfigError, match="layer by layer"):
        world("fedppa", technique="prompt", topts={"length": 2})
    with pytest.raises(ConfigError, match="uniform"):
        world("fedppa", options={"weights": "entropy"}, family="gpt2")
