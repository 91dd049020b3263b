"""FedMosaic's RELA: weights on paper, the mixture and the sketch against independent computations, what crosses the wire."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from federations import Outcome, World, by_hand
from fedtailor.algorithms.fedmosaic import leading, weights
from fedtailor.algorithms.gates import closed, gated, mixed
from fedtailor.core import Message, Plan, Tree
from fedtailor.data.examples import Subset
from fedtailor.errors import ConfigError
from fedtailor.losses import classification
from fedtailor.techniques.base import DELTA
from fedtailor.trees import lora_pairs, nbytes, weighted_mean
from fedtailor.wire import encode
from tiny import batch_of, distance, randomized, rows_of, same

Federation = Callable[..., Outcome]
WHOLE = Plan(epochs=1, batch=16, lr=0.1, optimizer="sgd")  # all of a client's rows in one step
PREFIX = {"technique": "prefix", "topts": {"length": 2}}
SPEAKS = "base_model.model.bert.encoder.layer.1.attention.self.value"  # the last module that LoRA has changed


def matrix(*columns: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(columns).T


# The weights


def test_the_weights_on_paper() -> None:
    """The mean of columns' cosines, not the cosine of all: a column counts the same however long it is."""
    sketches = {
        "a": matrix((1, 0), (0, 1)),
        "b": matrix((5, 0), (1, 0)),  # cosines with a: 1, 0
        "c": matrix((-1, 0), (0, 1)),  # -1, 1
        "d": matrix((3, 4), (0, 0)),  # 0.6, 0: a column of zeros is like nothing
    }
    e = [torch.tensor(s / 0.5).exp() for s in (0.5, 0.0, 0.3)]
    assert weights(sketches, 0.5)["a"].tolist() == pytest.approx([0.0, *(float(x / sum(e)) for x in e)])


def test_weights_are_shares_of_the_others() -> None:
    drawn = {c: torch.randn(6, 3, generator=torch.Generator().manual_seed(i)) for i, c in enumerate("abcde")}
    for i, row in enumerate(weights(drawn, 0.5).values()):
        assert float(row[i]) == 0
        assert float(row.sum()) == pytest.approx(1)
    alike = weights(dict.fromkeys("abcd", drawn["a"]), 0.5)
    assert alike["b"].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    groups = weights({c: (1 if c in "ab" else -1) * drawn["a"] + 0.01 * drawn[c] for c in "abcd"}, 0.1)
    assert float(groups["a"][1]) > 0.999
    assert float(groups["c"][3]) > 0.999
    assert weights({"a": drawn["a"]}, 0.5) == weights({}, 0.5) == {}


def test_a_letter_holds_the_mean_of_those_with_the_same_task(world: Callable[..., World]) -> None:
    here = world("fedmosaic", clients=4, options={"tau": 0.05})
    start = here.technique.init
    names, trees = here.clients, {c: randomized(start, i) for i, c in enumerate(here.clients)}
    task = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    sketches = {c: task if i < 2 else -task for i, c in enumerate(names)}
    state = {**here.algorithm.init(start), "trees": trees, "sketches": sketches}
    letters = next(here.algorithm.round(state, names))
    for one, other in (("c0", "c1"), ("c1", "c0"), ("c2", "c3"), ("c3", "c2")):
        assert distance(letters[one].body["global"], trees[other]) < 1e-6  # type: ignore[index]
    # Of a cohort's letters the weights are over everybody, whoever takes part.
    alone = next(here.algorithm.round(state, ["c0"]))
    assert same(alone["c0"].body, letters["c0"].body)  # type: ignore[index]


def test_the_least_alike_may_weigh_nothing(world: Callable[..., World]) -> None:
    here = world("fedmosaic", options={"tau": 1e-3}, clients=3)
    shares = weights({"c0": matrix((1, 0)), "c1": matrix((1, 0)), "c2": matrix((-1, 0))}, 1e-3)
    assert shares["c0"].tolist() == [0.0, 1.0, 0.0]
    init = here.algorithm.init(here.technique.init)
    trees = {c: randomized(here.technique.init, i) for i, c in enumerate(here.clients)}
    sketches = {"c0": matrix((1, 0)), "c1": matrix((1, 0)), "c2": matrix((-1, 0))}
    letters = next(here.algorithm.round({**init, "trees": trees, "sketches": sketches}, here.clients))
    assert same(letters["c0"].body["global"], trees["c1"])  # type: ignore[call-overload,index]


def test_without_temperature_everybody_gets_the_plain_mean_of_the_others(federation: Federation) -> None:
    done = federation("fedmosaic", options={"tau": 1e9, "samples": 1}, rounds=2)
    last = {s.client: s.reply.body["tree"] for s in done.log if s.round == 1 and s.letter.verb == "train"}
    for seen in (s for s in done.log if s.round == 2 and s.letter.verb == "train"):
        others = [dict(last[c].items()) for c in sorted(last) if c != seen.client]
        assert distance(seen.letter.body["global"], weighted_mean(others, [1.0, 1.0])) < 1e-6


# The mixture


def test_two_adapters_answer_side_by_side(world: Callable[..., World]) -> None:
    """Against the products themselves, merged into the frozen weights; gates differ by module."""
    here = world("fedmosaic")
    forward, start = here.technique.bind(False), here.technique.init
    shared, own = randomized(start, 1), randomized(start, 2)
    gates = {module: torch.tensor(0.7 * i - 1) for i, module in enumerate(closed(start))}
    merged: Tree = {DELTA: {}}
    for module, (down, up) in lora_pairs(start).items():
        g = 1 / (1 + float((-gates[module]).exp()))
        merged[DELTA][module] = g * shared[up] @ shared[down] + (1 - g) * own[up] @ own[down]
        merged |= {down: start[down], up: torch.zeros_like(start[up])}
    for name in start.keys() - merged.keys():
        g = 1 / (1 + float((-gates[name.rpartition(".")[0]]).exp()))
        merged[name] = g * shared[name] + (1 - g) * own[name]
    batch = batch_of("bert")
    torch.testing.assert_close(forward(mixed(gates, shared, own), batch), forward(merged, batch), atol=1e-4, rtol=1e-4)
    assert float((forward(merged, batch) - forward(own, batch)).abs().max()) > 1e-2


@pytest.mark.parametrize(("technique", "topts"), [("lora", {"rank": 2}), ("prefix", {"length": 2}), ("head", {}), ("full", {})])
def test_a_tree_mixed_with_itself_is_itself(technique: str, topts: Any, world: Callable[..., World]) -> None:
    here = world("fedmosaic", technique=technique, topts=topts)
    tree, batch, forward = randomized(here.technique.init, 1, 0.1), batch_of("bert"), here.technique.bind(False)
    both = mixed({m: t + 1.3 for m, t in closed(tree).items()}, tree, tree)
    torch.testing.assert_close(forward(both, batch), forward(tree, batch), atol=1e-5, rtol=1e-5)
    assert gated(classification) == gated(classification)


def test_a_mixture_is_exported_as_a_plain_adapter_of_twice_the_rank(federation: Federation, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    done = federation("fedmosaic", rounds=2, plan=WHOLE)
    technique, own = done.world.technique, done.own["c1"]
    assert done.world.algorithm.personal
    tree = done.world.algorithm.personal(own, {}, done.world.sites("c1", 2))
    assert same(tree, mixed(own["gates"], own["global"], own["params"]))
    technique.save(tree, tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(technique.backbone.source)
    loaded, batch = PeftModel.from_pretrained(base, str(tmp_path)).eval(), batch_of("bert")
    assert loaded.peft_config["default"].r == 4
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, technique.bind(False)(tree, batch), atol=1e-4, rtol=1e-4)


# The client


def slope(done: Outcome, params: Tree, client: int = 0) -> Tree:
    """Gradient of the plain loss over all of a client's rows, by the model's own backward."""
    data = Subset(rows_of("bert"), range(10 * client, 10 * client + 6 + client))
    batch = data.batch(range(len(data)), int(data.lengths.max()), len(data))
    moving = {name: t.clone().requires_grad_() for name, t in params.items()}
    classification(done.world.technique.bind(False), moving, batch, {}).backward()
    return {name: t.grad for name, t in moving.items()}


@pytest.mark.parametrize(
    ("case", "on", "shape"),
    [
        ({}, f"{SPEAKS}.lora_B.weight", (12, 2)),  # 40 % of 32 rows
        (PREFIX, "prompt_embeddings", (25, 2)),  # the last layer's keys and values, 64 a token
        ({"technique": "head"}, "base_model.model.classifier.weight", (12, 3)),
        ({"technique": "full"}, "bert.encoder.layer.1.output.dense.weight", (19, 32)),  # of 48 x 32
    ],
    ids=["lora", "prefix", "head", "full"],
)
def test_a_sketch_is_the_gradient_at_the_initial_tree(
    case: dict[str, Any], on: str, shape: tuple[int, int], federation: Federation
) -> None:
    options = {"samples": 3, "noise": 0.0}
    done = federation("fedmosaic", options=options, plan=WHOLE, rounds=2, **case)
    assert done.state["on"] == on
    start = done.world.technique.init
    for i in range(3):
        gradient = slope(done, start, i)[on]
        gradient = gradient.unflatten(1, (2, -1))[:, 1] if on == "prompt_embeddings" else gradient
        whole = gradient if gradient.shape[0] > gradient.shape[1] else gradient.T
        # Every round sees the same rows at the same tree: the mean with the last round's changes nothing.
        found = done.own[f"c{i}"]["sketch"]
        assert found.shape == shape
        torch.testing.assert_close(found, whole[: shape[0]], atol=2e-6, rtol=1e-4)
        assert float(found.abs().max()) > 1e-3
    assert same(done.state["sketches"], {c: own["sketch"] for c, own in done.own.items()})


def test_noise_is_of_each_sample_and_the_last_round_counts_as_much_as_this_one(federation: Federation) -> None:
    case: dict[str, Any] = {"plan": WHOLE, "technique": "head"}
    exact = federation("fedmosaic", options={"noise": 0.0}, **case).own["c0"]["sketch"]
    once, twice = (
        federation("fedmosaic", options={"noise": 0.5, "samples": 25}, rounds=rounds, **case).own["c0"]["sketch"] - exact
        for rounds in (1, 2)
    )
    assert float(once.std()) == pytest.approx(0.5 / 25**0.5, rel=0.4)
    assert float(twice.std()) == pytest.approx(0.5 / 50**0.5, rel=0.4)
    fresh = federation("fedmosaic", options={"noise": 0.5, "samples": 25, "memory": 0.0}, rounds=2, **case).own["c0"]["sketch"]
    torch.testing.assert_close(once + fresh - exact, 2 * twice, atol=1e-5, rtol=1e-4)


def test_the_first_step_is_half_of_plain_training(federation: Federation) -> None:
    """The global tree is the initial one and stands still, half open."""
    done = federation("fedmosaic", plan=WHOLE, rounds=1)
    start = done.world.technique.init
    for i in range(3):
        own, gradient = done.own[f"c{i}"], slope(done, start, i)
        assert distance(own["params"], {n: t - 0.5 * WHOLE.lr * gradient[n] for n, t in start.items()}) < 1e-6
        assert same(own["global"], start)
        assert all(float(gate) == 0 for gate in own["gates"].values())


def test_gates_move_down_the_slope_of_the_mixture(federation: Federation) -> None:
    one, two = (federation("fedmosaic", plan=WHOLE, rounds=rounds) for rounds in (1, 2))
    before, after = one.own["c0"], two.own["c0"]
    shared = next(s.letter.body["global"] for s in two.log if s.round == 2 and s.client == "c0")
    assert same(after["global"], dict(shared.items()))
    forward, data = two.world.technique.bind(False), Subset(rows_of("bert"), range(6))
    batch = data.batch(range(6), int(data.lengths.max()), 6)
    for module in ("base_model.model.classifier", SPEAKS):
        ends = []
        for side in (-1e-2, 1e-2):  # a difference of losses, without any backward
            gates = {**before["gates"], module: before["gates"][module] + side}
            ends.append(float(classification(forward, mixed(gates, shared, before["params"]), batch, {})))
        move = float(after["gates"][module] - before["gates"][module])
        assert move == pytest.approx(-WHOLE.lr * (ends[1] - ends[0]) / 2e-2, rel=0.05, abs=1e-6)
    assert abs(float(after["gates"]["base_model.model.classifier"])) > 1e-5


def test_a_client_alone_has_its_own_last_tree_for_the_global_one(federation: Federation) -> None:
    one, two = (federation("fedmosaic", clients=1, rounds=rounds) for rounds in (1, 2))
    assert same(two.own["c0"]["global"], one.own["c0"]["params"])
    assert same(two.state["params"], two.own["c0"]["params"])


def test_language_and_images_have_sketches_too(federation: Federation) -> None:
    for family, on in (("gpt2", "lora_B"), ("llama", "lora_B"), ("vit", "lora_B")):
        done = federation("fedmosaic", family=family, options={"samples": 1}, plan=WHOLE)
        assert on in done.state["on"]
        assert ".1." in done.state["on"]
        assert all(float(s.abs().max()) > 1e-3 for s in done.state["sketches"].values())


def test_llamas_matrix_under_full_is_the_papers(federation: Federation) -> None:
    done = federation("fedmosaic", family="llama", technique="full", options={"samples": 1}, plan=WHOLE, rounds=1)
    assert done.state["on"] == "model.layers.1.mlp.down_proj.weight"


# The wire


def test_what_crosses_and_what_stays(federation: Federation) -> None:
    done = federation("fedmosaic", clients=4, rounds=3, cohorts={1: ["c0", "c1", "c2"], 2: ["c0", "c1"]})
    tree, sketch = nbytes(done.world.technique.init), 4 * 12 * 2
    turns = [s for s in done.log if s.letter.verb == "train"]
    for seen in turns:
        assert nbytes(seen.letter.body) == tree
        assert nbytes(seen.reply.body) == tree + sketch
        assert seen.reply.body.keys() == {"tree", "sketch"}
    for client, n in {"c0": 3, "c1": 3, "c2": 2, "c3": 1}.items():
        mine = [s for s in turns if s.client == client]
        assert len(mine) == n
        assert done.ledger.clients[client]["bytes_up"] == sum(len(encode(s.reply)) for s in mine)
        assert done.ledger.clients[client]["bytes_down"] == sum(len(encode(s.letter)) for s in mine)
    assert all(not s.letter.body for s in done.log if s.letter.verb == "answer")  # each judges what it keeps


def test_who_is_new_is_given_the_plain_mean(federation: Federation, world: Callable[..., World]) -> None:
    done = federation("fedmosaic", rounds=2, cohorts={1: ["c0", "c1"], 2: ["c0"]})
    trees = [done.own[c]["params"] for c in ("c0", "c1")]
    assert distance(done.state["params"], weighted_mean(trees, [1.0, 1.0])) < 1e-6
    heard = next(s for s in done.log if s.letter.verb == "answer" and s.client == "c2")
    assert same(dict(heard.letter.body), done.state["params"])
    here, own = world("fedmosaic"), {}
    state = by_hand(here, here.algorithm.init(here.technique.init), 1, own, cohort=["c0", "c1"])
    letter = next(here.algorithm.round(state, ["c2"]))["c2"]  # type: ignore[index]
    assert same(letter.body["global"], state["params"])


def test_a_strangers_sketch_must_be_of_the_matrix_that_was_asked_for(world: Callable[..., World]) -> None:
    here, own = world("fedmosaic"), {}
    check, start = here.algorithm.check, here.technique.init
    assert check
    letter = Message("train", {"global": start, "on": here.algorithm.init(start)["on"]})
    good = {"tree": start, "sketch": torch.zeros(12, 2)}
    assert check(letter, Message("tree", good, {"n": 3.0})) == ""
    assert check(letter, Message("tree", {}, {"n": 0.0})) == ""
    assert "sketch" in check(letter, Message("tree", {**good, "sketch": torch.zeros(12, 3)}, {"n": 3.0}))
    assert "sketch" in check(letter, Message("tree", {"tree": start}, {"n": 3.0}))
    assert "lacks n" in check(letter, Message("tree", good))
    by_hand(here, here.algorithm.init(start), 1, own)
    assert all(not check(s.letter, s.reply) for s in here.log)


def test_leading_rows_are_along_the_longer_axis() -> None:
    t = torch.arange(40.0).view(4, 10)
    assert same(leading(t, 0.4), t.T[:4].contiguous())
    assert same(leading(t.T, 0.4), t.T[:4].contiguous())
    assert leading(torch.arange(5.0), 0.4).tolist() == [[0], [1]]
    assert leading(t, 0.01).shape == (1, 4)


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ({"tau": 0.0}, {}, "tau > 0"),
        ({"samples": 0}, {}, "samples >= 1"),
        ({"share": 1.5}, {}, "share <= 1"),
        ({"noise": -1.0}, {}, "noise >= 0"),
        ({"memory": 1.0}, {}, "memory < 1"),
        ({}, {"sizes": {"c0": 1, "c1": 2, "c2": 2}}, "same rank"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], changes: dict[str, Any], says: str, world: Callable[..., World]) -> None:
    with pytest.raises(ConfigError, match=says):
        world("fedmosaic", options=options, **changes)


@pytest.mark.parametrize(("technique", "topts"), [("template", {}), ("retriever", {"rank": 0})])
def test_without_a_tree_there_is_no_reference_model(technique: str, topts: Any, world: Callable[..., World]) -> None:
    here = world("fedmosaic", technique=technique, topts=topts)
    with pytest.raises(ConfigError, match=r"gradient of a reference model.*has no tensors: choose technique lora"):
        here.algorithm.init(here.technique.init)
