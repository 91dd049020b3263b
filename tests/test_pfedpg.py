"""pFedPG: the server's step against numbers taken by differences, its sign, what crosses, and its limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from federations import Outcome, World
from fedtailor.algorithms.pfedpg import downhill, generated
from fedtailor.core import Message, Plan, stream
from fedtailor.data.examples import Subset
from fedtailor.errors import ConfigError
from fedtailor.losses import classification
from fedtailor.wire import encode
from tiny import distance, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")
PROMPT = "prompt_embeddings"
GIVEN: dict[str, Any] = {"technique": "prompt", "topts": {"length": 2}, "plan": SGD}


def made(rows: int = 3, size: int = 5, width: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    def drawn(name: str, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=stream(0, name))

    sides = {"query": (size, width), "key": (size, width), "value": (size, width), "output": (width, size)}
    generator = {"base": drawn("base", rows, size), **{name: drawn(name, *shape) for name, shape in sides.items()}}
    return generator, {"a": drawn("a", rows, size), "b": drawn("b", 1, size)}


def test_a_prompt_is_cross_attention_over_the_base() -> None:
    generator, descriptors = made()
    for at in descriptors.values():
        q, k, v = (t @ generator[name] for t, name in ((at, "query"), (generator["base"], "key"), (generator["base"], "value")))
        wanted = F.scaled_dot_product_attention(q[None], k[None], v[None])[0] @ generator["output"]
        torch.testing.assert_close(generated(generator, at, False), wanted.expand(3, 5))
        torch.testing.assert_close(generated(generator, at, True), wanted + generator["base"])


@pytest.mark.parametrize("residual", [True, False])
def test_the_gradient_is_that_of_the_surrogate(residual: bool) -> None:
    """d/dx sum_n <P_n(x), P_n - P~_n> by central differences, for some entries of everything that is learned."""
    generator, descriptors = made()
    changes = {c: torch.randn(3, 5, dtype=torch.float64, generator=stream(1, c)) for c in descriptors}
    slopes, own = downhill(generator, descriptors, changes, residual)

    def surrogate() -> float:
        return -sum(float((generated(generator, at, residual) * changes[c]).sum()) for c, at in descriptors.items())

    for tensors, found in ((generator, slopes), (descriptors, own)):
        for name, t in tensors.items():
            for place in range(0, t.numel(), 3):
                flat, before = t.view(-1), float(t.view(-1)[place])
                flat[place] = before + 1e-5
                up = surrogate()
                flat[place] = before - 1e-5
                numeric = (up - surrogate()) / 2e-5
                flat[place] = before
                assert float(found[name].reshape(-1)[place]) == pytest.approx(numeric, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("options", [{}, {"server_optimizer": "sgd"}, {"residual": False}, {"rows": "one"}])
def test_a_step_of_the_server_moves_prompts_towards_what_clients_found(options: dict[str, Any], world: Maker) -> None:
    """The sign: with the other one the generator would run away from its clients. Who is not in the cohort keeps its descriptor."""
    here = world("pfedpg", options={"width": 4, "server_lr": 1e-4, **options}, **GIVEN)
    state = here.algorithm.init(here.technique.init)
    talk = here.algorithm.round(state, ["c0", "c1"])
    sent = {c: letter.body[PROMPT] for c, letter in next(talk).items()}
    assert not torch.equal(sent["c0"], sent["c1"])
    changes = {c: torch.randn(t.shape, generator=stream(0, c)) for c, t in sent.items()}
    with pytest.raises(StopIteration) as end:
        talk.send({c: Message("update", {PROMPT: change}, {"n": 6.0}) for c, change in changes.items()})
    after = end.value.value
    again = {c: letter.body[PROMPT] for c, letter in next(here.algorithm.round(after, ["c0", "c1", "c2"])).items()}
    assert sum(float(((again[c] - sent[c]) * changes[c]).sum()) for c in sent) > 0
    third = next(here.algorithm.round(after, ["c0"]))["c0"]
    assert set(after["clients"]) == {"c0", "c1"}
    assert torch.equal(third.body[PROMPT], again["c0"])


def test_only_a_prompt_crosses_both_ways(federation: Federation) -> None:
    done = federation("pfedpg", options={"width": 4}, **GIVEN)
    for seen in done.log:
        if seen.reply.verb == "update":
            assert seen.letter.body.keys() == seen.reply.body.keys() == {PROMPT}
            assert seen.reply.body[PROMPT].shape == (2, 32)
        else:  # a client has its tuned prompt
            assert seen.letter.body == {}
    prompt, row = {PROMPT: torch.ones(2, 32)}, done.ledger.clients["c0"]
    mine = [seen for seen in done.log if seen.reply.verb == "update" and seen.client == "c0"]
    assert row["bytes_up"] == sum(len(encode(Message("update", prompt, seen.reply.info))) for seen in mine)
    assert row["bytes_down"] == len(mine) * len(encode(Message("train", prompt)))
    assert not same(done.own["c0"], done.own["c1"])


def test_a_server_that_learns_nothing_sends_the_same_prompts_and_heads_go_on(federation: Federation) -> None:
    """Local prompt tuning from one start in every round."""
    done = federation("pfedpg", options={"width": 4, "server_lr": 0.0}, **GIVEN)
    first, second = ({s.client: s for s in done.log if s.round == r and s.reply.verb == "update"} for r in (1, 2))
    for client in ("c0", "c1", "c2"):
        assert torch.equal(first[client].letter.body[PROMPT], second[client].letter.body[PROMPT])
        assert not torch.equal(first[client].reply.body[PROMPT], second[client].reply.body[PROMPT])  # another head


def test_with_a_server_that_learns_nothing_it_is_local_prompt_tuning(federation: Federation) -> None:
    """By the model's own backward: the prompt starts anew in each round, the head goes on."""
    whole = {**GIVEN, "plan": SGD._replace(batch=16, lr=0.1)}
    done = federation("pfedpg", options={"width": 4, "server_lr": 0.0}, **whole)
    told = {s.round: s for s in done.log if s.client == "c1" and s.reply.verb == "update"}
    data = Subset(rows_of("bert"), range(10, 17))
    batch = data.batch(range(7), int(data.lengths.max()), 7)
    tree = dict(done.world.technique.init)
    for round in (1, 2):
        tree[PROMPT] = told[round].letter.body[PROMPT]
        moving = {name: t.clone().requires_grad_() for name, t in tree.items()}
        classification(done.world.technique.bind(False), moving, batch, {}).backward()
        after = {name: t - 0.1 * moving[name].grad for name, t in tree.items()}  # type: ignore[operator]
        moved = {PROMPT: after[PROMPT] - tree[PROMPT]}
        assert distance({PROMPT: told[round].reply.body[PROMPT]}, moved) < 1e-5
        assert float(moved[PROMPT].abs().max()) > 1e-4
        tree = after


@pytest.mark.parametrize("deploy", ["tuned", "generated"])
def test_what_a_client_answers_with(deploy: str, world: Maker) -> None:
    here = world("pfedpg", options={"width": 4, "deploy": deploy}, **GIVEN)
    state, site = here.algorithm.init(here.technique.init), here.sites("c0", 1)
    sent = next(here.algorithm.answer(state, ["c0"]))["c0"].body
    own = {name: t + 1 for name, t in here.technique.init.items()}
    tree, fresh = here.algorithm.personal(own, sent, site), here.algorithm.personal(None, sent, site)
    assert torch.equal(tree[PROMPT], own[PROMPT] if deploy == "tuned" else sent[PROMPT])
    assert torch.equal(fresh[PROMPT], sent[PROMPT])
    assert all(torch.equal(tree[name], own[name]) for name in own if name != PROMPT)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"technique": "lora"}, "choose technique prompt or prefix"),
        ({"technique": "prompt", "sizes": {"c0": 1, "c1": 2, "c2": 2}}, "needs the same rank or length"),
        ({"options": {"rows": "two"}}, "algorithm.rows"),
        ({"options": {"deploy": "tune"}}, "did you mean 'tuned'"),
        ({"options": {"width": 0}}, "a width above 0"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], says: str, world: Maker) -> None:
    def refused() -> None:
        here = world("pfedpg", **given)
        here.algorithm.init(here.technique.init)

    with pytest.raises(ConfigError, match=says):
        refused()
