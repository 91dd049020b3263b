"""FedALA: one step on paper, the authors' loop in plain torch, the limits, which layers are mixed, and what crosses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from federations import Outcome, World
from fedtailor.algorithms.fedala import mixed, mixing, reached
from fedtailor.core import Fit, Fitted, Message, Plan, Tree, stream
from fedtailor.data.examples import Subset
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.techniques.parts import layers
from fedtailor.trees import nbytes
from tiny import distance, randomized, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


def bowl(forward: Any, params: Tree, batch: Any, aux: Tree) -> torch.Tensor:
    return 0.5 * (params["w"] - batch["target"]).square().sum()  # type: ignore[no-any-return]


def test_one_step_on_paper() -> None:
    """theta = old + (new - old) W = (1, 2.5, -1); its slope under 1/2 ||theta - target||^2 is theta - target = (1, -0.5, -3)."""
    old, new = {"w": torch.tensor([0.0, 2.0, -1.0])}, {"w": torch.tensor([2.0, 3.0, 1.0])}
    weights = torch.tensor([0.5, 0.5, 0.0], requires_grad=True)
    loss = mixing(bowl)(None, {"weights": {"w": weights}}, {"target": torch.tensor([0.0, 3.0, 2.0])}, {"old": old, "new": new})  # type: ignore[arg-type]
    assert float(loss.detach()) == 0.5 * (1 + 0.25 + 9)
    loss.backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [1 * 2, -0.5 * 1, -3 * 2]
    assert mixing(bowl) == mixing(bowl)


def test_weights_of_one_and_zero_are_exact() -> None:
    old, new = (
        randomized({"w": torch.zeros(99), "below": torch.zeros(3)}, 1),
        randomized({"w": torch.zeros(99), "below": torch.zeros(3)}, 2),
    )
    assert same(mixed(old, new, {"w": torch.ones(99)}), new)
    assert same(mixed(old, new, {"w": torch.zeros(99)}), {"w": old["w"], "below": new["below"]})
    half = torch.rand(99)
    torch.testing.assert_close(mixed(old, new, {"w": half})["w"], old["w"] + (new["w"] - old["w"]) * half)


def high(name: str) -> bool:
    """The last two layers of the tiny BERT."""
    return name.startswith(("classifier", "bert.pooler", "bert.encoder.layer.1."))


def test_three_rounds_are_the_plain_loop(federation: Federation, backbones: Callable[[str], Any]) -> None:
    """Full fine-tuning of transformers' own module: weights with a rule written out beside torch's optimiser."""
    eta, most = 20.0, 3
    ours = federation(
        "fedala", technique="full", plan=SGD, clients=2, rounds=3, options={"layers": 2, "eta": eta, "most": most, "share": 0.7}
    )
    source, data = backbones("bert").source, rows_of("bert")
    shared = AutoModelForSequenceClassification.from_pretrained(source).eval()
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    server = {n: p.detach().clone() for n, p in shared.named_parameters()}
    old = [{n: t.clone() for n, t in server.items()} for _ in range(2)]
    learned: list[Tree] = [{}, {}]

    def put(tree: Tree) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(tree[name])

    def descend(rows: Subset, drawn: Any) -> None:
        batch = rows.batch(drawn, int(rows.lengths[drawn].max()), len(drawn))
        model.zero_grad()
        model(**batch).loss.backward()

    for round in (1, 2, 3):
        trained = []
        for k in (0, 1):
            rows, asked = Subset(data, range(k * 10, k * 10 + 6 + k)), 0
            if round > 1:
                w = learned[k] or {n: torch.ones_like(t) for n, t in server.items() if high(n)}
                order = torch.randperm(len(rows), generator=stream(0, "fedala", f"c{k}", round))[: int(0.7 * len(rows))].tolist()
                for _ in range(1 if learned[k] else most):
                    for i in range(0, len(order), 4):
                        put({n: old[k][n] + (t - old[k][n]) * w[n] if n in w else t for n, t in server.items()})
                        descend(rows, order[i : i + 4])
                        slopes = {n: p.grad for n, p in model.named_parameters() if n in w}
                        w = {n: (t - eta * slopes[n] * (server[n] - old[k][n])).clamp(0, 1) for n, t in w.items()}
                        asked += 1
                learned[k] = w
            put({n: old[k][n] + (t - old[k][n]) * learned[k][n] if n in learned[k] else t for n, t in server.items()})
            for drawn in batches(SGD, rows.lengths, stream(0, "fit", f"c{k}", round, 1, asked + 1), stream(0, "pace", round, 1)):
                descend(rows, drawn)
                with torch.no_grad():
                    for p in model.parameters():
                        p.sub_(SGD.lr * p.grad)  # type: ignore[arg-type,operator]
            old[k] = {n: p.detach().clone() for n, p in model.named_parameters()}
            trained.append(old[k])
        server = {n: 6 / 13 * trained[0][n] + 7 / 13 * trained[1][n] for n in server}
    assert distance(ours.state["params"], server) < 1e-5
    for k in (0, 1):
        assert distance(ours.own[f"c{k}"]["params"], old[k]) < 1e-5
        assert distance(ours.own[f"c{k}"]["weights"], learned[k]) < 1e-4
    values = torch.cat([t.flatten() for t in learned[0].values()])
    assert 0 <= float(values.min()) < 0.9
    assert 0 < float((values < 1).float().mean()) < 1


def test_where_nothing_is_learned_it_is_fedavg_or_local_training_bit_for_bit(federation: Federation) -> None:
    averaged, alone = federation("fedavg", plan=SGD, rounds=3), federation("local", plan=SGD, rounds=3)
    ones = federation("fedala", plan=SGD, rounds=3, options={"eta": 0.0})
    assert same(ones.state["params"], averaged.state["params"])
    zeros = federation("fedala", plan=SGD, rounds=3, options={"eta": 0.0, "start": 0.0, "layers": 0})
    for client in ("c0", "c1", "c2"):
        assert same(ones.answers[client].body["test"], averaged.answers[client].body["test"])
        assert same(zeros.own[client]["params"], alone.own[client]["params"])
        assert same(zeros.answers[client].body, alone.answers[client].body)


def test_who_is_judged(federation: Federation) -> None:
    """As a client would start its next round, or as it ended its last; a newcomer has the server's tree."""
    for deploy in ("mixed", "trained"):
        done = federation(
            "fedala", rounds=2, plan=SGD, options={"deploy": deploy, "eta": 20.0, "most": 2}, cohorts={2: ["c0", "c1"]}
        )
        own, site, now = done.own["c0"], done.world.sites("c0", 2), done.state["params"]
        tree = done.world.algorithm.personal(own, now, site)
        wanted = mixed(own["params"], now, own["weights"]) if deploy == "mixed" else own["params"]
        assert same(tree, wanted)
        assert same(done.world.algorithm.personal(None, now, site), now)
        assert not same(tree, now)
        assert done.own["c2"]["weights"] == {}  # once is not yet a difference to learn from


def test_which_layers_are_mixed(techniques: Callable[..., Any]) -> None:
    def names(kind: str, count: int, **options: Any) -> set[str]:
        technique = techniques("bert", kind, **options)
        return {n for n, t in reached(layers(technique), technique.init, count).items() if t.any()}

    everything = set(techniques("bert", "lora", rank=2).init)
    head = {n for n in everything if "classifier" in n}
    assert names("lora", 1, rank=2) == head
    assert names("lora", 2, rank=2) == {n for n in everything if ".layer.1." in n} | head
    assert names("lora", 0, rank=2) == names("lora", 3, rank=2) == names("lora", 9, rank=2) == everything
    # What has no list of layers: the head, and everything else.
    assert names("prompt", 1, length=2) < names("prompt", 2, length=2) == set(techniques("bert", "prompt", length=2).init)
    # A prefix has columns for every layer.
    technique = techniques("bert", "prefix", length=2)
    found = reached(layers(technique), technique.init, 2)
    (prefix,) = [t for n, t in found.items() if not t.all()]
    assert not prefix[:, : prefix.shape[1] // 2].any()
    assert prefix[:, prefix.shape[1] // 2 :].all()
    # A language model's head is not trained: its last layer is the last.
    language = techniques("gpt2", "lora", rank=2)
    assert {n for n, t in reached(layers(language), language.init, 1).items() if t.any()} == {
        n for n in language.init if ".h.1." in n
    }


def learning(world: World, own: Tree | None, new: Tree, losses: Callable[[int], float], round: int = 2) -> tuple[list[Fit], Any]:
    """The asks about weights, each answered with a loss and a step of -0.7, and what the client keeps."""
    flow = world.algorithm.client["train"](own, Message("train", new), world.sites("c0", round))
    asks, ask = list[Fit](), next(flow)
    while "weights" in ask.params:
        asks.append(ask)
        after = {"weights": {n: t - 0.7 for n, t in ask.params["weights"].items()}}
        ask = flow.send(Fitted(after, {"loss": losses(len(asks))}, {}))
    with pytest.raises(StopIteration) as end:
        flow.send(Fitted(ask.params, {"n": 6.0}, {}))
    return asks, end.value.value[0]


def test_passes_until_losses_settle_then_one(world: Maker) -> None:
    here = world("fedala", technique="head", options={"window": 3, "most": 9, "threshold": 0.1, "share": 1.0, "eta": 2.0})
    old, new = randomized(here.technique.init, 1), randomized(here.technique.init, 2)
    own = {"params": old, "weights": {}}
    steps = 2  # six rows in batches of four
    asks, kept = learning(here, own, new, lambda i: 1.0)
    assert len(asks) == 4 * steps  # more than `window` losses are there, and do not differ
    assert {(a.plan.lr, a.plan.optimizer, len(a.data)) for a in asks} == {(2.0, "sgd", 4), (2.0, "sgd", 2)}
    assert all(float(t) == 0 for t in torch.cat([w.flatten() for w in kept["weights"].values()]))  # 1 - 0.7 - 0.7, cut at 0
    assert asks[1].params["weights"].keys() == new.keys()
    # The loss of a pass is that of its last batch.
    asks, _ = learning(here, own, new, lambda i: float(i % 2) + (i // 2 < 5) * (i // 2))
    assert len(asks) == 7 * steps
    asks, _ = learning(here, own, new, float)
    assert len(asks) == 9 * steps
    asks, _ = learning(here, kept, new, float)
    assert len(asks) == steps
    asks, again = learning(here, own, old, float)  # no difference to learn from
    assert (asks, again["weights"]) == ([], {})
    asks, _ = learning(here, None, here.technique.init, float, 1)
    assert not asks


def test_who_has_no_rows_learns_nothing(world: Maker) -> None:
    here = world("fedala", technique="head", empty=("c0",))
    own = {"params": randomized(here.technique.init, 1), "weights": {}}
    assert learning(here, own, randomized(here.technique.init, 2), float)[0] == []


def test_the_wire_is_fedavgs(federation: Federation) -> None:
    ours = federation("fedala", options={"layers": 0, "most": 2}, rounds=2)
    plain = federation("fedavg", rounds=2)
    for name in ("bytes_up", "bytes_down"):
        assert ours.ledger.total(name) == pytest.approx(plain.ledger.total(name), rel=1e-3)  # the header says another loss
    for seen in ours.log:
        if seen.reply.verb == "update":
            assert nbytes(seen.letter.body) == nbytes(seen.reply.body) == nbytes(ours.state["params"])
            assert seen.reply.body.keys() == ours.state["params"].keys()
    assert same(
        federation("fedala", options={"share": 1e-6, "most": 1}).own["c0"],
        federation("fedala", options={"share": 0.2, "most": 1}).own["c0"],
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": -1}, "layers >= 0"),
        ({"share": 0.0}, "share"),
        ({"eta": -1.0}, "eta >= 0"),
        ({"start": 1.5}, "start"),
        ({"most": 0}, "most >= 1"),
        ({"window": 0}, "window >= 1"),
        ({"deploy": "mix"}, "mixed"),
        ({"weighting": "all"}, "algorithm.weighting"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], says: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=says):
        world("fedala", options=options)


def test_it_needs_one_size(world: Maker) -> None:
    with pytest.raises(ConfigError, match="the same rank or length"):
        world("fedala", sizes={"c0": 1, "c1": 2, "c2": 2})
