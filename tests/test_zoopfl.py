"""ZooPFL-style: its estimators against true gradients, calls that are counted and never differentiated, and what stays at home."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from federations import Outcome, World, run_world
from fedtailor import wire
from fedtailor.algorithms.zoopfl import called, coded, looked, offsets, reconstructing, seen_of, slopes, stepped
from fedtailor.core import Message, Plan, Tree, stream
from fedtailor.data.examples import Subset
from fedtailor.errors import ConfigError
from tiny import distance, rows_of

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")
PROMPTED: dict[str, Any] = {"technique": "prompt", "topts": {"length": 2}, "plan": SGD}
SMALL = {"code": 3, "features": 16, "steps": 2, "pretrain": 0}


def asked(world: World, code: int = 3, features: int = 16) -> Tree:
    """What a client gives to the black box, drawn anew."""
    tree = world.technique.init

    def drawn(name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=stream(3, name))

    sizes = {"weight": (features, code), "bias": (code,), "embedding": (code,), "output": (3, 3), "towards": (code, code)}
    found = {name: drawn(name, *shape) for name, shape in sizes.items()}
    return {**found, "tree": tree, "decoder": drawn("decoder", code, tree["prompt_embeddings"].numel()) * 0.1}


def some(rows: int = 4) -> dict[str, torch.Tensor]:
    data = Subset(rows_of("bert"), range(rows))
    return data.batch(range(rows), int(data.lengths.max()), rows)


def test_estimators_on_a_quadratic() -> None:
    """Central differences along the axes are exact; random directions are right on average, but for the curvature times mu."""
    draw = stream(0, "quadratic")
    root, z, b = (torch.randn(shape, dtype=torch.float64, generator=draw) for shape in ((5, 5), (2, 5), (5,)))
    hessian = root @ root.mT

    def value(at: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.einsum("ri,ij,rj->r", at, hessian, at) + at @ b

    def estimated(name: str, towards: torch.Tensor, mu: float) -> torch.Tensor:
        return slopes(name, torch.stack([value(z + step) for step in offsets(name, towards, mu)], 1), towards, mu)

    truth, axes = z @ hessian + b, torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(estimated("cge", axes, 0.3), truth)
    torch.testing.assert_close(estimated("rge", axes, 1e-6), truth, rtol=1e-4, atol=1e-4)
    many = F.normalize(torch.randn(40_000, 5, dtype=torch.float64, generator=draw), dim=1)
    torch.testing.assert_close(estimated("rge", many, 1e-4), truth, rtol=0.05, atol=0.2)


def test_the_estimate_is_the_gradient_through_the_model(world: Maker) -> None:
    """What the black box would have told had it been asked for gradients."""
    here = world("zoopfl", options=SMALL, **PROMPTED)
    params, batch, forward = asked(here), some(), here.technique.bind(False)
    params["towards"] = torch.eye(3)
    with torch.no_grad():
        found = looked("cge", 0.02, forward, params, batch)
    z = coded(params, batch)[1].requires_grad_()
    loss = F.cross_entropy(called(forward, params, batch, z) @ params["output"].mT, batch["labels"], reduction="sum")
    (truth,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(found["slope"], truth, rtol=0.02, atol=2e-3)
    assert float(truth.abs().max()) > 0.02
    with torch.no_grad():
        torch.testing.assert_close(found["output"], called(forward, params, batch, z), rtol=1e-2, atol=1e-2)


def test_each_row_has_a_prompt_of_its_own(world: Maker) -> None:
    here = world("zoopfl", options=SMALL, **PROMPTED)
    params, batch, forward = asked(here), some(), here.technique.bind(False)
    with torch.no_grad():
        z = coded(params, batch)[1]
        many = called(forward, params, batch, z)
        for i in range(len(z)):
            prompt = params["tree"]["prompt_embeddings"] + ((z[i] + params["embedding"]) @ params["decoder"]).view(2, 32)
            one = forward(
                {**params["tree"], "prompt_embeddings": prompt}, {n: t[i : i + 1] for n, t in batch.items() if n != "labels"}
            )
            torch.testing.assert_close(many[i], one[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(z[0], z[1])


def test_a_step_is_the_chain_rule(world: Maker) -> None:
    """Encoder and embedding by autograd of <v, z>, the output map by that of its own loss."""
    here = world("zoopfl", options=SMALL, **PROMPTED)
    params, batch = asked(here), some()
    with torch.no_grad():
        seen = looked("rge", 0.1, here.technique.bind(False), params, batch)
    moving = {name: params[name].clone().requires_grad_() for name in ("weight", "bias", "embedding", "output")}
    z = seen_of(batch, 16) @ moving["weight"] + moving["bias"] + moving["embedding"]
    surrogate = (seen["slope"] * z).sum(1).mean() + F.cross_entropy(seen["output"] @ moving["output"].mT, batch["labels"])
    surrogate.backward()
    after = stepped(params, seen, 0.3, 0.2)
    for name, t in moving.items():
        wanted = t.detach() - (0.2 if name == "output" else 0.3) * t.grad
        torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("estimator", "calls"), [("cge", 6), ("rge", 5)])
def test_calls_are_counted_and_none_has_a_gradient(
    estimator: str, calls: int, world: Maker, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 d calls of a row and step, or q + 1; the ledger, the replies and the black box itself agree."""
    options = {**SMALL, "estimator": estimator, "queries": 4, "pretrain": 1}
    here = world("zoopfl", options=options, **PROMPTED)
    rung: list[bool] = []

    def bind(dropout: bool) -> Any:
        forward = here.technique.bind(dropout)

        def counted(params: Tree, batch: Any) -> torch.Tensor:
            rung.append(torch.is_grad_enabled())
            return forward(params, batch)

        return counted

    watched = here._replace(technique=here.technique._replace(bind=bind))
    done = run_world(watched, tmp_path, rounds=1)
    rows_called: list[int] = []
    monkeypatch.setattr(
        sys.modules[called.__module__], "called", lambda *args: rows_called.append(len(args[-1])) or called(*args)
    )
    rung.clear()  # what the evaluation of the first round called
    state, trained = done.state, [seen for seen in done.log if seen.reply.verb == "update"]
    assert [seen.reply.info["queries"] for seen in trained] == [0.0] * 3
    for client in here.clients:
        flow = here.algorithm.client["train"](None, next(here.algorithm.round(state, [client]))[client], here.sites(client, 2))
        ask, asks = flow.send(None), 0
        forward = bind(False)
        while True:
            asks += 1
            assert ask.passes == calls
            rows = len(ask.data)
            rows_called.clear()
            with torch.no_grad():
                batch = ask.data.batch(range(rows), int(max(ask.data.lengths)), rows)
                answer = ask.fn(forward, ask.params, batch)
            assert sum(rows_called) == calls * rows
            try:
                ask = flow.send(answer)
            except StopIteration as end:
                reply = end.value[1]
                break
        assert asks == 2
        assert reply.info["queries"] == calls * 4 * asks
    assert rung
    assert not any(rung)


def test_the_ledger_counts_calls_and_no_way_back(techniques: Callable[..., Any], tmp_path: Any) -> None:
    from federations import world_of
    from fedtailor.engines.answering import Workers
    from fedtailor.engines.local import Local
    from fedtailor.engines.states import States
    from fedtailor.filters import chain
    from fedtailor.ledger import Ledger

    here = world_of(techniques("bert", "prompt", length=2), "bert", "zoopfl", {**SMALL, "pretrain": 1}, SGD)
    ledger = Ledger()
    workers = Workers(here.technique.bind, 1, flops=lambda rows, width: 1e9, looks=lambda rows, width: float(rows))
    engine = Local(here.algorithm, here.sites, workers, States(tmp_path), ledger, chain(()), chain(()))
    state = engine.converse(here.algorithm.round(here.algorithm.init(here.technique.init), here.clients), 1)
    assert ledger.total("flops") == 0.0  # pre-training never calls the model
    engine.converse(here.algorithm.round(state, here.clients), 2)
    engine.close()
    assert ledger.total("flops") == 3 * 2 * 4 * 6  # clients, steps, rows, calls
    assert ledger.total("examples") == 6 + 7 + 8  # passes of training: those of the auto-encoder


@pytest.mark.parametrize("shared", ["encoder", "all"])
def test_what_is_private_stays_at_home_and_the_rest_is_counted(shared: str, federation: Federation) -> None:
    done = federation("zoopfl", options={**SMALL, "pretrain": 1, "shared": shared}, rounds=2, **PROMPTED)
    crossed = {"weight": torch.zeros(16, 3), "bias": torch.zeros(3)}
    ends = {"back": torch.zeros(3, 16), "origin": torch.zeros(16)}
    output = {"output": torch.zeros(3, 3)} if shared == "all" else {}
    bodies = {1: {**crossed, **ends}, 2: {**crossed, **output}}
    mine = [seen for seen in done.log if seen.client == "c0" and seen.reply.verb == "update"]
    verbs = {1: "reconstruct", 2: "train"}
    for seen in mine:
        shapes = {name: t.shape for name, t in bodies[seen.round].items()}
        assert {n: t.shape for n, t in seen.letter.body.items()} == {n: t.shape for n, t in seen.reply.body.items()} == shapes
    row = done.ledger.clients["c0"]
    assert row["bytes_down"] == sum(len(wire.encode(Message(verbs[r], bodies[r]))) for r in (1, 2))
    assert row["bytes_up"] == sum(len(wire.encode(Message("update", bodies[s.round], s.reply.info))) for s in mine)
    assert set(done.own["c0"]) == {"embedding", "output", "code"}
    assert float(done.own["c0"]["embedding"].abs().max()) > 0
    assert distance({"o": done.own["c0"]["output"]}, {"o": torch.eye(3)}) > 1e-4
    for seen in done.log:
        for t in (*seen.letter.body.values(), *(seen.reply.body.values() if seen.reply.verb == "update" else ())):
            assert shared == "all" or not torch.equal(t, done.own[seen.client]["output"])


def test_the_embedding_is_personal_and_no_secret(federation: Federation) -> None:
    """Encoder's bias and embedding have one gradient: who adds up a client's changes of the one has the other."""
    done = federation("zoopfl", options={**SMALL, "pretrain": 1}, rounds=3, **PROMPTED)
    for client in ("c0", "c1", "c2"):
        trained = [seen.reply.body["bias"] for seen in done.log if seen.client == client and seen.letter.verb == "train"]
        torch.testing.assert_close(sum(trained), done.own[client]["embedding"], rtol=1e-4, atol=1e-7)


def test_the_mean_is_by_examples(federation: Federation) -> None:
    done = federation("zoopfl", options=SMALL, rounds=1, **PROMPTED)
    told = {s.client: s for s in done.log if s.reply.verb == "update"}
    for name in ("weight", "bias"):
        start = told["c0"].letter.body[name]
        mean = sum(n * told[c].reply.body[name] for c, n in {"c0": 6, "c1": 7, "c2": 8}.items()) / 21
        torch.testing.assert_close(done.state["shared"][name], start + mean, rtol=1e-5, atol=1e-6)


def test_pre_training_comes_near_to_principal_components(federation: Federation) -> None:
    """Nothing linear can be better than those, where all clients hold the same rows; rows of padding count for nothing."""
    options = {"code": 3, "features": 16, "pretrain": 8, "steps": 1}
    given: dict[str, Any] = {"technique": "prompt", "topts": {"length": 2}, "plan": Plan(epochs=100, batch=8, lr=0.02)}
    done = federation("zoopfl", options=options, rounds=6, equal=True, **given)
    start = done.world.algorithm.init(done.world.technique.init)["shared"]
    data = Subset(rows_of("bert"), range(8))
    batch, padded = (data.batch(range(8), int(data.lengths.max()), size) for size in (8, 11))
    before, after, again = (
        float(reconstructing(16)(None, shared, part, {}))  # type: ignore[arg-type]
        for shared, part in ((start, batch), (done.state["shared"], batch), (done.state["shared"], padded))
    )
    found = seen_of(batch, 16)
    best = float(torch.linalg.svdvals(found - found.mean(0))[3:].square().sum()) / 8
    assert 0.999 * best < after < 1.2 * best < before
    assert again == pytest.approx(after, rel=1e-4)


def test_an_export_has_the_output_map_in_its_head(federation: Federation) -> None:
    done = federation("zoopfl", options=SMALL, rounds=2, **PROMPTED)
    here, own = done.world, done.own["c0"]
    tree = here.algorithm.personal(
        own, done.answers and {n: done.state["shared"][n] for n in ("weight", "bias")}, here.sites("c0", 2)
    )
    forward, batch = here.technique.bind(False), some()
    inputs = {n: t for n, t in batch.items() if n != "labels"}
    with torch.no_grad():
        plain = forward({**here.technique.init, "prompt_embeddings": tree["prompt_embeddings"]}, inputs)
        torch.testing.assert_close(forward(tree, inputs), plain @ own["output"].mT, rtol=1e-4, atol=1e-5)
    assert distance({"p": tree["prompt_embeddings"]}, {"p": here.technique.init["prompt_embeddings"]}) > 1e-3


def test_the_shared_output_map_is_in_the_shared_model(federation: Federation) -> None:
    done = federation("zoopfl", options={**SMALL, "shared": "all"}, rounds=3, **PROMPTED)
    here, output = done.world, done.state["shared"]["output"]
    assert distance({"r": output}, {"r": torch.eye(3)}) > 1e-3
    tree, batch = here.algorithm.model(done.state), some()
    forward, inputs = here.technique.bind(False), {n: t for n, t in batch.items() if n != "labels"}
    with torch.no_grad():
        plain = forward({**here.technique.init, "prompt_embeddings": tree["prompt_embeddings"]}, inputs)
        torch.testing.assert_close(forward(tree, inputs), plain @ output.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["cge", "rge"])
def test_it_learns(estimator: str, federation: Federation) -> None:
    options = {"code": 4, "features": 32, "estimator": estimator, "steps": 10, "lr": 0.3, "output_lr": 0.1}
    few, many = (federation("zoopfl", options=options, rounds=r, **PROMPTED) for r in (1, 8))
    start, end = (sum(float(o.answers[c].body["test"]["nll"]) for c in ("c0", "c1", "c2")) for o in (few, many))
    assert end < 0.9 * start, (start, end)


def test_images_have_a_prefix_and_pooled_pixels(federation: Federation) -> None:
    done = federation("zoopfl", options={**SMALL, "pretrain": 1}, family="vit", technique="prefix", topts={"length": 2}, plan=SGD)
    assert done.state["shared"]["weight"].shape == (3 * 64, 3)
    assert float(done.own["c0"]["embedding"].abs().max()) > 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"technique": "lora"}, "choose technique prompt or prefix with a trained head"),
        ({"technique": "prompt", "topts": {"length": 2, "head": "frozen"}}, "with a trained head"),
        ({"technique": "prompt", "family": "gpt2"}, "choose zeroth-order for language"),
        ({"technique": "prompt", "options": {"estimator": "spsa"}}, "algorithm.estimator"),
        ({"technique": "prompt", "options": {"shared": "decoder"}}, "algorithm.shared"),
        ({"technique": "prompt", "options": {"mu": 0.0}}, "above 0"),
        ({"technique": "prompt", "sizes": {"c0": 1, "c1": 2, "c2": 2}}, "needs the same rank or length"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], says: str, world: Maker) -> None:
    def refused() -> None:
        here = world("zoopfl", **given)
        here.algorithm.init(here.technique.init)

    with pytest.raises(ConfigError, match=says):
        refused()
