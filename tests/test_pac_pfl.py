"""PAC-PFL: SVGD against numpy loops, a client's gradient against autograd of the rule written out, weights in closed form, its limit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from federations import Outcome, World
from fedtailor import wire
from fedtailor.algorithms.marginal import as_tree, drawn, log_marginal, shapes_of, shares
from fedtailor.algorithms.pac_pfl import svgd, toward
from fedtailor.core import Message, Plan, Work, stream
from fedtailor.errors import ConfigError
from fedtailor.trees import numel

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
WHOLE = Plan(epochs=1, batch=16)  # all of a client's rows at once
HEAD: dict[str, Any] = {"technique": "head", "plan": WHOLE}
PREFIX: dict[str, Any] = {"technique": "prefix", "topts": {"length": 1, "head": "frozen"}, "plan": WHOLE}
both_ways = pytest.mark.parametrize("case", [HEAD, PREFIX], ids=["head", "prefix"])
"""A linear head is judged on what enters it, another tree through the model."""


def noise(client: str, turn: int, draws: int, size: int) -> torch.Tensor:
    return torch.randn((draws, size), generator=stream(0, "pac_pfl", client, turn))


def losses(world: World, trees: torch.Tensor, client: str) -> torch.Tensor:
    """The mean loss of each of these flat trees on a client's training rows."""
    data = world.sites(client, 1).data["train"]
    batch = data.batch(range(len(data)), int(data.lengths.max()), len(data))
    forward, shapes = world.technique.bind(False), shapes_of(world.technique.init)
    return torch.stack([F.cross_entropy(forward(as_tree(h, shapes), batch), batch["labels"]) for h in trees])


def mll(world: World, theta: torch.Tensor, client: str, turn: int, draws: int, beta: float) -> torch.Tensor:
    mean, log_std = theta.chunk(2)
    found = losses(world, mean + log_std.exp() * noise(client, turn, draws, len(mean)), client)
    return torch.log(torch.exp(-beta * (found - found.min())).mean()) / beta - found.min()


@pytest.mark.parametrize("bandwidth", [0.0, 0.7])
def test_a_step_of_svgd_is_its_double_sum(bandwidth: float) -> None:
    x, g = (torch.randn(5, 3, dtype=torch.float64, generator=stream(0, name)) for name in "xg")
    a, slopes = x.numpy(), g.numpy()
    square = ((a[:, None] - a[None]) ** 2).sum(-1)
    width = bandwidth or math.sqrt(np.median(square) / (2 * math.log(6)))
    wanted = np.zeros_like(a)
    for k in range(5):
        for other in range(5):
            kernel = math.exp(-square[k, other] / (2 * width**2))
            wanted[k] += (kernel * slopes[other] + kernel * (a[k] - a[other]) / width**2) / 5
    np.testing.assert_allclose(svgd(x, g, bandwidth).numpy(), wanted, rtol=1e-6, atol=1e-9)


def test_particles_of_svgd_stay_apart() -> None:
    """Descending on a unit normal: a gradient alone takes all to 0; with the kernel they spread as far as the target does."""
    x = alone = torch.randn(12, 1, dtype=torch.float64, generator=stream(0, "start")) * 0.1 + 2
    for _ in range(500):
        x, alone = x + 0.3 * svgd(x, -x), alone - 0.3 * alone
    assert float(alone.std()) < 1e-6
    assert float(x.std()) == pytest.approx(1.0, abs=0.25)
    assert abs(float(x.mean())) < 0.1
    pairs = torch.pdist(x)
    assert float(pairs.min()) > 0.02


def test_the_factor_has_the_harmonic_mean() -> None:
    slopes = [torch.randn(2, 3, generator=stream(0, str(i))) for i in range(3)]
    h = 3 / (1 / 4 + 1 / 6 + 1 / 12)
    torch.testing.assert_close(toward(slopes, [4.0, 6.0, 12.0]), (h / (h + 3) * sum(slopes)).double())


@both_ways
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_a_client_sends_the_gradients_of_its_mll(beta: float, case: dict[str, Any], federation: Federation) -> None:
    """And their values; `beta` = 0 is the number of its rows."""
    done = federation("pac_pfl", options={"particles": 2, "draws": 3, "beta": beta}, rounds=1, **case)
    for seen in done.log:
        if seen.reply.verb != "slopes":
            continue
        for k, theta in enumerate(seen.letter.body["particles"]):
            moving = theta.clone().requires_grad_()
            value = mll(done.world, moving, seen.client, 0, 3, beta or seen.reply.info["n"])
            value.backward()
            assert float(seen.reply.body["mll"][k]) == pytest.approx(value.item(), rel=1e-4)
            torch.testing.assert_close(seen.reply.body["slopes"][k], moving.grad, rtol=2e-3, atol=2e-5)


def test_in_batches_it_is_the_mean_over_them(federation: Federation) -> None:
    """One draw: mll is minus a mean loss, and two equal batches of a client's six rows have the mean of all six."""
    options = {"particles": 1, "draws": 1}
    whole = federation("pac_pfl", options=options, rounds=1, **PREFIX)
    parts = federation("pac_pfl", options=options, rounds=1, **{**PREFIX, "plan": WHOLE._replace(batch=3)})
    a, b = (next(s.reply.body["slopes"] for s in done.log if s.client == "c0") for done in (whole, parts))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@both_ways
def test_one_particle_without_a_hyper_prior_goes_up_the_mean_mll(case: dict[str, Any], federation: Federation) -> None:
    """Torch's Adam on |T| h / (h + |T|) times the mean of the clients' mll."""
    options = {"particles": 1, "draws": 2, "lam": 0.0, "lr": 0.05}
    done = federation("pac_pfl", options=options, rounds=3, **case)
    start = next(seen.letter.body["particles"] for seen in done.log)[0]
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.05)
    h = 3 / (1 / 6 + 1 / 7 + 1 / 8)
    for turn in range(3):
        optimizer.zero_grad()
        mean = sum(mll(done.world, theta, f"c{i}", turn, 2, 6.0 + i) for i in range(3)) / 3
        (-(3 * h / (h + 3)) * mean).backward()
        optimizer.step()
    moved = float((theta.detach() - start).abs().max())
    assert moved > 0.05
    assert float((done.state["particles"][0] - theta.detach()).abs().max()) < 0.02 * moved


def test_the_hyper_prior_pulls_to_its_centre(world: Maker) -> None:
    here = world("pac_pfl", options={"particles": 3, "lam": 1.0, "lr": 0.01, "bandwidth": 1e-3}, **HEAD)
    state = here.algorithm.init(here.technique.init)
    talk = here.algorithm.round(state, ["c0"])
    body = next(talk)["c0"].body["particles"]
    with pytest.raises(StopIteration) as end:
        talk.send({"c0": Message("slopes", {"slopes": torch.zeros_like(body), "mll": torch.zeros(3)}, {"n": 6.0})})
    centre = torch.cat([here.technique.init[n].flatten() for n, _ in shapes_of(here.technique.init)])
    before, after = ((s["particles"][:, : len(centre)] - centre).abs().mean() for s in (state, end.value.value))
    assert float(after) < float(before)


def test_weights_are_those_of_bayes() -> None:
    found = torch.rand(3, 4, generator=stream(0, "losses"), dtype=torch.float64)
    # With beta the number of rows, all draws of all particles compete by their likelihood.
    torch.testing.assert_close(shares(found, 20, 20.0), (-20 * found).flatten().softmax(0).view(3, 4))
    by_hand = np.exp(20 * np.log(np.exp(-2 * found.numpy()).mean(1)) / 2)
    torch.testing.assert_close(shares(found, 20, 2.0).sum(1), torch.from_numpy(by_hand / by_hand.sum()))
    assert float(shares(found * 1e4, 10**6, 1e6).sum()) == pytest.approx(1)  # no overflow
    torch.testing.assert_close(shares(torch.zeros(2, 2), 0, 1.0), torch.full((2, 2), 0.25))  # who has no rows knows nothing
    assert float(log_marginal(found, 1e-6)[0]) == pytest.approx(-float(found[0].mean()), abs=1e-5)


@both_ways
def test_probabilities_are_averaged_by_those_weights(case: dict[str, Any], federation: Federation) -> None:
    done = federation("pac_pfl", options={"particles": 2, "draws": 3}, rounds=2, **case)
    here, thetas = done.world, done.state["particles"]
    for client, rows in (("c0", 6), ("c2", 8)):
        trees = torch.stack([drawn(theta, noise(client, 2, 3, thetas.shape[1] // 2)) for theta in thetas])
        weights = shares(losses(here, trees.flatten(0, 1), client).view(2, 3), rows, float(rows)).flatten()
        data = here.sites(client, 2).data["test"]
        batch = data.batch(range(len(data)), int(data.lengths.max()), len(data))
        forward, shapes = here.technique.bind(False), shapes_of(here.technique.init)
        mean = sum(w * forward(as_tree(h, shapes), batch).softmax(-1) for w, h in zip(weights, trees.flatten(0, 1), strict=True))
        wanted = -float(mean[range(len(data)), batch["labels"]].log().sum())
        assert float(done.answers[client].body["test"]["nll"]) == pytest.approx(wanted, rel=1e-4)


def test_a_newcomer_predicts_as_who_took_part(federation: Federation) -> None:
    """A mixture is found from the particles and the client's rows, and from nothing that it kept."""
    some = federation("pac_pfl", rounds=1, cohorts={1: ["c0", "c1"]}, **PREFIX)
    assert not some.own["c2"]
    here, letter = some.world, Message("answer", {"particles": some.state["particles"]}, {"turn": 1.0})
    weights: dict[str, torch.Tensor] = {}
    for own in (None, {"weights": torch.tensor([1.0, 0.0, 0.0, 0.0])}):
        flow = here.algorithm.client["answer"](own, letter, here.sites("c2", 1))
        ask = flow.send(None)
        told = {"nll": torch.arange(16.0).repeat(8, 1) / 10, "of": torch.ones(8)}
        assert ask.passes == 16
        weights[str(own)] = flow.send(told).params["weights"]
    first, second = weights.values()
    assert torch.equal(first, second)


def test_a_row_goes_through_the_model_once(federation: Federation) -> None:
    """What enters a head is kept by its client, and by nobody else: exchanges and rounds ask the model for nothing more."""
    done = federation("pac_pfl", options={"exchanges": 3}, rounds=2, flops=lambda rows, width: float(rows), **HEAD)
    for i, client in enumerate(done.world.clients):
        data = done.world.sites(client, 1).data["train"]
        batch = data.batch(range(len(data)), int(data.lengths.max()), len(data))
        model, came = done.world.technique.backbone.model, list[torch.Tensor]()
        hook = model.classifier.register_forward_pre_hook(lambda m, given, came=came: came.append(given[0]))
        with torch.no_grad():
            model(**{n: t for n, t in batch.items() if n != "labels"})
        hook.remove()
        torch.testing.assert_close(done.own[client]["features"], came[0], atol=1e-5, rtol=1e-4)
        here, letter = done.world, Message("train", {"particles": done.state["particles"]}, {"turn": 6.0})
        flow = here.algorithm.client["train"](done.own[client], letter, here.sites(client, 3))
        work = next(flow)  # of its own arithmetic, there and back: 4 particles of 4 draws
        assert work == Work(2 * 2.0 * 16 * numel(here.technique.init) * len(data))
        with pytest.raises(StopIteration):
            flow.send(None)  # it replies without asking
        assert done.ledger.clients[client].get("examples", 0.0) == 0.0, i
        assert done.ledger.clients[client]["flops"] == 6 * work.flops  # two rounds of three exchanges
    assert not any("features" in s.reply.body for s in done.log)


def test_what_crosses_is_counted(federation: Federation) -> None:
    done = federation("pac_pfl", options={"particles": 3, "exchanges": 2}, rounds=1, **HEAD)
    row, size = done.ledger.clients["c0"], 2 * numel(done.world.technique.init)
    asked = [seen for seen in done.log if seen.client == "c0" and seen.reply.verb == "slopes"]
    assert len(asked) == 2
    letter = {"particles": torch.zeros(3, size)}
    assert row["bytes_down"] == sum(len(wire.encode(Message("train", letter, s.letter.info))) for s in asked)
    reply = {"slopes": torch.zeros(3, size), "mll": torch.zeros(3)}
    assert row["bytes_up"] == sum(len(wire.encode(Message("slopes", reply, s.reply.info))) for s in asked)
    assert 4 * (3 * size + 3) * 2 < row["bytes_up"] < 4 * (3 * size + 3) * 2 + 1024
    assert not torch.equal(asked[0].letter.body["particles"], asked[1].letter.body["particles"])


def test_draws_are_the_clients_own_and_new_each_time() -> None:
    assert not torch.equal(noise("c0", 0, 2, 9), noise("c1", 0, 2, 9))
    assert not torch.equal(noise("c0", 0, 2, 9), noise("c0", 1, 2, 9))


def test_a_stranger_cannot_stop_everybody_by_its_rows(world: Maker) -> None:
    here = world("pac_pfl", options={"particles": 2}, **HEAD)
    body = here.algorithm.init(here.technique.init)["particles"]
    letter = Message("train", {"particles": body}, {"turn": 0.0})
    reply = Message("slopes", {"slopes": body, "mll": torch.zeros(2)}, {"n": 6.0})
    assert here.algorithm.check(letter, reply) == ""
    assert "rows" in here.algorithm.check(letter, reply._replace(info={"n": 1e-9}))
    assert "mll" in here.algorithm.check(letter, reply._replace(body={"slopes": body}))
    assert here.algorithm.check(letter, reply._replace(body={"slopes": body[:1], "mll": torch.zeros(2)}))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"options": {"most": 100}}, 'too many .algorithm.most = 100.; choose technique.kind = "head".*fedbasis'),
        ({"technique": "head", "options": {"most": 10}}, "too many .algorithm.most = 10.; raise it, or algorithm fedbasis"),
        ({"options": {"particles": 0}}, "particles, draws and exchanges of 1 or more"),
        ({"options": {"std": 0.0}}, "wide and std above 0"),
        ({"technique": "retriever"}, "choose head or lora"),
        ({"sizes": {"c0": 1, "c1": 2, "c2": 2}}, "needs the same rank or length"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], says: str, world: Maker) -> None:
    def refused() -> None:
        here = world("pac_pfl", **given)
        here.algorithm.init(here.technique.init)

    with pytest.raises(ConfigError, match=says):
        refused()
