"""Every algorithm against something independent: formulas written out, plain torch, or another algorithm it must equal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from federations import PLAN, Outcome, World, by_hand
from fedtailor.algorithms import ALGORITHMS, merging
from fedtailor.algorithms.fedex import compact
from fedtailor.algorithms.hetlora import pad, product_norm, truncate
from fedtailor.core import SERVER, Device, Fit, Fitted, Message, Plan, Tree, stream
from fedtailor.data.examples import Subset
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.losses import proximal, shifted, tail_norms
from fedtailor.trees import add, aggregation_error, lora_pairs, nbytes, overlapping_mean, scale, select, tensors, weighted_mean
from tiny import batch_of, distance, randomized, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
Backbones = Callable[[str], Any]
Techniques = Callable[..., Any]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")


def updates(outcome: Outcome, round: int = 1) -> dict[str, Message]:
    return {s.client: s.reply for s in outcome.log if s.round == round and s.reply.verb == "update"}


def letters(outcome: Outcome, round: int = 1) -> dict[str, Message]:
    return {s.client: s.letter for s in outcome.log if s.round == round and s.reply.verb == "update"}


def answer_asks(world: World, state: Tree, client: str, own: Tree | None, done: Callable[[Fit], Tree], round: int = 1) -> Any:
    """What a client replies to the round's letter when its training gives `done(ask)`: no model runs."""
    talk = world.algorithm.round(state, [client])
    sent = next(talk)
    letter = getattr(sent, "to", sent)[client]
    flow = world.algorithm.client[letter.verb](own, letter, world.sites(client, round))
    ask = next(flow)
    seen = {"n": float(len(ask.data)), "steps": 2.0, "lr": ask.plan.lr, "loss": 0.0, "flops": 0.0}
    try:
        flow.send(Fitted(done(ask), seen, {}))
    except StopIteration as end:
        return letter, *end.value
    raise AssertionError("more than one ask")


def given(world: World, replies: dict[str, Message], state: Tree | None = None) -> Tree:
    """The server's state after a round with exactly these replies."""
    talk = world.algorithm.round(world.algorithm.init(world.technique.init) if state is None else state, sorted(replies))
    next(talk)
    try:
        talk.send(replies)
    except StopIteration as end:
        return end.value
    raise AssertionError("more than one exchange")


# FedAvg and its server optimisers


@pytest.mark.parametrize(
    ("plan", "optimizer"),
    [
        (PLAN._replace(epochs=2, lr=1e-3, weight_decay=0.1), lambda ps: torch.optim.AdamW(ps, lr=1e-3, weight_decay=0.1)),
        (SGD._replace(epochs=2, momentum=0.9), lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9)),
    ],
)
def test_fedavg_of_one_client_is_plain_training(plan: Plan, optimizer: Any, federation: Federation, backbones: Backbones) -> None:
    """Full fine-tuning of transformers' own module in a hand-written loop over the same batches."""
    ours = federation("fedavg", technique="full", plan=plan, clients=1, rounds=1)
    model = AutoModelForSequenceClassification.from_pretrained(backbones("bert").source).eval()
    theirs = optimizer(model.parameters())
    data = Subset(rows_of("bert"), range(6))
    drawn = batches(plan, data.lengths, stream(0, "fit", "c0", 1, 1, 1), stream(0, "pace", 1, 1))
    assert len(drawn) == 4
    for rows in drawn:
        batch = data.batch(rows, int(data.lengths[rows].max()), len(rows))
        theirs.zero_grad()
        model(**batch).loss.backward()
        theirs.step()
    # A key's bias shifts every score of a query alike: its gradient is 0, and Adam makes a step of the rounding that is left.
    wanted = {name: p.detach() for name, p in model.named_parameters() if not name.endswith("key.bias")}
    assert distance(select(ours.state["params"], wanted), wanted) < 1e-6
    moved = distance(ours.state["params"], dict(backbones("bert").model.named_parameters()))
    assert moved > 1e-2


def test_fedavg_weighs_by_examples_or_uniformly(federation: Federation) -> None:
    for weighting, weights in (("examples", [6 / 21, 7 / 21, 8 / 21]), ("uniform", [1 / 3] * 3)):
        done = federation("fedavg", options={"weighting": weighting}, rounds=1)
        start = letters(done)["c0"].body
        for name, t in done.state["params"].items():
            by_formula = start[name] + sum(w * updates(done)[f"c{i}"].body[name] for i, w in enumerate(weights))
            torch.testing.assert_close(t, by_formula, rtol=1e-6, atol=1e-7)
    with pytest.raises(ConfigError, match="examples"):
        federation("fedavg", options={"weighting": "exampels"})


def test_fedprox_without_pull_is_fedavg_bit_for_bit(federation: Federation) -> None:
    plain, zero = federation("fedavg"), federation("fedprox", options={"mu": 0.0})
    assert plain.hash == zero.hash
    assert federation("fedprox", options={"mu": 1.0}).hash != plain.hash
    with pytest.raises(ConfigError, match="mu"):
        federation("fedprox", options={"mu": -1.0})


def test_fedprox_pulls_with_mu_times_the_distance() -> None:
    params = {"w": torch.randn(3, 2, requires_grad=True), "b": torch.randn(2, requires_grad=True)}
    anchor = {name: torch.randn(t.shape) for name, t in params.items()}

    def nothing(forward: Any, params: Tree, batch: Any, aux: Tree) -> torch.Tensor:
        return 0 * params["w"].sum()

    proximal(nothing, 0.7)(None, params, {}, {"anchor": anchor}).backward()  # type: ignore[arg-type]
    for name, t in params.items():
        torch.testing.assert_close(t.grad, 0.7 * (t.detach() - anchor[name]))
    assert proximal(nothing, 0.7) == proximal(nothing, 0.7) != proximal(nothing, 0.8)


def formulas(kind: str, w: torch.Tensor, ds: list[torch.Tensor]) -> torch.Tensor:
    """The rules of arXiv 2003.00295 and 1909.06335, written out element by element in float64."""
    lr, b1, b2, tau = {"fedavgm": (1.0, 0.9, 0, 0), "fedadagrad": (0.05, 0, 0, 1e-3)}.get(kind, (0.02, 0.9, 0.99, 1e-3))
    out = w.double().reshape(-1).clone()
    for i in range(len(out)):
        m = v = 0.0
        for d in ds:
            x = float(d.double().reshape(-1)[i])
            if kind == "fedavgm":
                m = b1 * m + x
                out[i] += lr * m
                continue
            m = b1 * m + (1 - b1) * x
            if kind == "fedadam":
                v = b2 * v + (1 - b2) * x * x
            elif kind == "fedyogi":
                sign = (v > x * x) - (v < x * x)
                v = v - (1 - b2) * x * x * sign
            else:
                v = v + x * x
            assert v >= 0
            out[i] += lr * m / (v**0.5 + tau)
    return out.view(w.shape)


@pytest.mark.parametrize("kind", ["fedadam", "fedyogi", "fedadagrad", "fedavgm"])
def test_server_optimisers_follow_their_formulas(kind: str, world: Maker) -> None:
    here = world(kind, technique="head")
    start = here.technique.init
    deltas = [randomized(scale(start, 0.0), seed, 0.05) for seed in (1, 2, 3)]
    state = here.algorithm.init(start)
    for delta in deltas:
        state = given(here, {"c0": Message("update", delta, {"n": 5.0})}, state)
    for name, w in start.items():
        wanted = formulas(kind, w, [d[name] for d in deltas])
        torch.testing.assert_close(state["params"][name].double(), wanted, rtol=1e-5, atol=1e-6)
    # Nothing learned at the start: nothing moves.
    zero = given(here, {"c0": Message("update", scale(start, 0.0), {"n": 5.0})})
    assert same(zero["params"], start)


# SCAFFOLD


def test_scaffold_starts_as_uniform_fedavg_with_twice_the_wire(federation: Federation) -> None:
    ours, plain = (
        federation("scaffold", plan=SGD, rounds=1),
        federation("fedavg", plan=SGD, rounds=1, options={"weighting": "uniform"}),
    )
    assert distance(ours.state["params"], plain.state["params"]) < 1e-6
    assert all(nbytes(u.body) == 2 * nbytes(updates(plain)[c].body) for c, u in updates(ours).items())
    assert all(nbytes(u.body) == 2 * nbytes(letters(plain)[c].body) for c, u in letters(ours).items())
    for name in ("bytes_up", "bytes_down"):
        assert 1.8 < ours.ledger.total(name) / plain.ledger.total(name) < 2.2


def test_scaffold_control_variates_follow_option_two(world: Maker) -> None:
    """c_k+ = c_k - c + (w_t - w_k) / (K eta); c += |S| / N mean(dc_k), with half of the clients in the round."""
    here = world("scaffold", plan=SGD, clients=4)
    state = here.algorithm.init(here.technique.init)
    state = {"params": state["params"], "control": randomized(state["control"], 9)}
    own = {c: {"control": randomized(state["control"], i)} for i, c in enumerate(["c0", "c1"])}
    trained = {c: randomized(state["params"], 20 + i) for i, c in enumerate(own)}
    replies = {}
    for c in own:
        _, new, replies[c] = answer_asks(here, state, c, own[c], lambda ask, c=c: trained[c])
        for name, w in state["params"].items():
            wanted = own[c]["control"][name] - state["control"][name] + (w - trained[c][name]) / (2 * SGD.lr)
            torch.testing.assert_close(new["control"][name], wanted, rtol=1e-4, atol=1e-4)
        own[c] = {"before": own[c]["control"], "after": new["control"]}
    after = given(here, replies, state)
    for name in state["params"]:
        mean = sum(own[c]["after"][name] - own[c]["before"][name] for c in own) / 2
        torch.testing.assert_close(after["control"][name], state["control"][name] + 2 / 4 * mean, rtol=1e-4, atol=1e-4)
        middle = sum(trained[c][name] for c in own) / 2
        torch.testing.assert_close(after["params"][name], middle, rtol=1e-4, atol=1e-5)


def test_scaffold_shifts_the_gradient_and_needs_plain_sgd(world: Maker) -> None:
    params, shift = {"w": torch.randn(3, requires_grad=True)}, {"w": torch.randn(3)}
    shifted(lambda f, p, b, a: (p["w"] ** 2).sum())(None, params, {}, {"shift": shift}).backward()  # type: ignore[arg-type]
    torch.testing.assert_close(params["w"].grad, 2 * params["w"].detach() + shift["w"])
    for plan in (PLAN, SGD._replace(momentum=0.9), SGD._replace(schedule="linear"), SGD._replace(clip=1.0)):
        with pytest.raises(ConfigError, match="sgd"):
            world("scaffold", plan=plan)


# Averaging factors: FedIT, FFA, FedSA


def product(tree: Tree) -> dict[str, torch.Tensor]:
    return {m: tree[b].double() @ tree[a].double() for m, (a, b) in lora_pairs(tree).items()}


def test_fedit_error_is_the_centred_formula(federation: Federation) -> None:
    """What FedIT loses is sum p_k (B_k - B)(A_k - A), and it says so."""
    done = federation("fedit", rounds=2)
    p = [6 / 21, 7 / 21, 8 / 21]
    old = letters(done, 2)["c0"].body
    trees = [add(old, updates(done, 2)[f"c{i}"].body) for i in range(3)]
    for name, t in done.state["params"].items():
        torch.testing.assert_close(t, sum(w * tree[name] for w, tree in zip(p, trees, strict=True)), rtol=1e-5, atol=1e-6)
    lost = whole = 0.0
    for a, b in lora_pairs(old).values():
        mean_a, mean_b = (sum(w * t[n].double() for w, t in zip(p, trees, strict=True)) for n in (a, b))
        centred = sum(w * (t[b].double() - mean_b) @ (t[a].double() - mean_a) for w, t in zip(p, trees, strict=True))
        exact = sum(w * t[b].double() @ t[a].double() for w, t in zip(p, trees, strict=True))
        torch.testing.assert_close(exact - mean_b @ mean_a, centred, rtol=1e-6, atol=1e-9)
        lost, whole = lost + float(centred.square().sum()), whole + float(exact.square().sum())
    assert done.state["aggregation_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert done.state["aggregation_error"] > 1e-4


def test_ffa_keeps_a_and_halves_the_wire(federation: Federation, techniques: Techniques) -> None:
    done, fedit = federation("ffa"), federation("fedit")
    init = techniques("bert", "lora", rank=2).init
    frozen = {name for name in init if ".lora_A." in name}
    assert frozen
    for seen in done.log:
        assert not frozen & set(seen.letter.body)
        assert not frozen & set(seen.reply.body)
    factors = [sum(t.numel() for n, t in tensors(updates(r)["c0"].body) if ".lora_" in n) for r in (done, fedit)]
    assert factors[1] == 2 * factors[0]  # d_in = d_out on these projections
    assert factors[0] == sum(2 * init[n].shape[1] for n in frozen)  # r d_out a module
    assert done.state["aggregation_error"] == 0.0
    # Exactness: with one A for all, the mean of products is the product of means.
    p, old = [6 / 21, 7 / 21, 8 / 21], letters(done, 2)["c0"].body
    for a, b in lora_pairs(init).values():
        exact = sum(w * (old[b] + updates(done, 2)[f"c{i}"].body[b]) @ init[a] for i, w in enumerate(p))
        torch.testing.assert_close(done.state["params"][b] @ init[a], exact, rtol=1e-5, atol=1e-6)


def test_ffa_model_is_the_exported_model(federation: Federation, techniques: Techniques) -> None:
    """What lacks in the tree is the A of every client: the same forward with A put there changes nothing."""
    technique, done = techniques("bert", "lora", rank=2), federation("ffa")
    forward, batch = technique.bind(False), batch_of("bert")
    frozen = {n: t for n, t in technique.init.items() if ".lora_A." in n}
    assert torch.equal(forward(done.state["params"], batch), forward({**done.state["params"], **frozen}, batch))
    assert not torch.equal(forward(done.state["params"], batch), forward(technique.init, batch))


def test_fedsa_sends_a_only(federation: Federation, techniques: Techniques) -> None:
    done = federation("fedsa", rounds=2)
    init = techniques("bert", "lora", rank=2).init
    shared = {n for n in init if ".lora_A." in n}
    for seen in done.log:
        if seen.reply.verb == "update":
            assert set(seen.letter.body) == set(seen.reply.body) == shared
        else:
            assert set(seen.letter.body) == shared
    for own in done.own.values():
        assert set(own) == set(init) - shared
    assert not same(done.own["c0"], done.own["c1"])
    # A client's second round starts from its own B and head and the server's A.
    model = done.state["params"]
    assert {n for n in init if not torch.equal(model[n], init[n])} == shared


# FLoRA


RANKS = {"c0": 1, "c1": 2, "c2": 3}


def test_flora_merges_the_mean_of_products_of_unequal_ranks(federation: Federation) -> None:
    done = federation("flora", sizes=RANKS, rounds=2)
    p = [6 / 21, 7 / 21, 8 / 21]
    for round in (1, 2):
        sent = updates(done, round)
        for i, r in enumerate(RANKS.values()):
            assert {t.shape[0] for n, t in sent[f"c{i}"].body["factors"].items() if ".lora_A." in n} == {r}
    factors = [updates(done, r)[f"c{i}"].body["factors"] for r in (1, 2) for i in range(3)]
    for module, delta in done.state["delta"].items():
        exact = sum(w * product(f)[module] for w, f in zip(p * 2, factors, strict=True))
        torch.testing.assert_close(delta.double(), exact, rtol=1e-5, atol=1e-7)
    head = sum(
        w * updates(done, 1)[f"c{i}"].body["head"][n] for i, w in enumerate(p) for n in ["base_model.model.classifier.weight"]
    )
    start = letters(done, 1)["c0"].body["head"]["base_model.model.classifier.weight"]
    now = letters(done, 2)["c0"].body["head"]["base_model.model.classifier.weight"]
    torch.testing.assert_close(now, start + head, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "sizes"), [("flora", RANKS), ("fedex", None)])
def test_the_base_of_a_client_that_missed_rounds_is_the_servers_bit_for_bit(
    kind: str, sizes: dict[str, int] | None, federation: Federation
) -> None:
    """c2 trains in round 1 and then not before round 4, c1 not before round 3; rank 16 products outgrow the delta itself."""
    ways: set[str] = set()
    for topts in ({"rank": 2}, {"rank": 16}):
        if topts["rank"] == 16 and sizes:
            sizes = {"c0": 16, "c1": 12, "c2": 8}
        cohorts = {1: ["c0", "c2"], 2: ["c0"], 3: ["c0", "c1"], 4: ["c0", "c1", "c2"]}
        done = federation(kind, topts=topts, sizes=sizes, rounds=4, cohorts=cohorts)
        # What a client has merged when it trains in round 4 is what the server had merged after round 3.
        three = federation(kind, topts=topts, sizes=sizes, rounds=3, cohorts=cohorts)
        for client in ("c0", "c1", "c2"):
            assert same(done.own[client]["delta"], three.state["delta"]), client
        ways |= {"delta" if "delta" in s.letter.body else "missed" for s in done.log if s.reply.verb == "update"}
    assert ways == {"delta", "missed"}


def test_flora_first_equals_a_reference_with_stacked_factors() -> None:
    """The reference's way: A weighted and stacked, B stacked, one product; ours adds what `plus` adds."""
    a, b = [torch.randn(r, 5) for r in (2, 3)], [torch.randn(7, r) for r in (2, 3)]
    stack = {"m": {"A": torch.vstack([0.3 * a[0], 0.7 * a[1]]), "B": torch.hstack(b)}}
    exact = 0.3 * b[0].double() @ a[0].double() + 0.7 * b[1].double() @ a[1].double()
    torch.testing.assert_close(merging.plus({}, stack)["m"].double(), exact, rtol=1e-5, atol=1e-6)
    twice = merging.plus(merging.plus({}, stack), stack)["m"]
    torch.testing.assert_close(twice.double(), 2 * exact, rtol=1e-5, atol=1e-6)


def test_a_lost_reply_is_not_merged_twice(world: Maker) -> None:
    """c1 merges what it is sent, its reply is lost, and the server sends the same again."""
    here, own = world("flora", sizes=RANKS), {}
    state = by_hand(here, here.algorithm.init(here.technique.init), 1, own)
    again = dict(own)
    by_hand(here, state, 2, again, cohort=["c1"])  # c1 works, but the server never learns of it
    late = by_hand(here, state, 2, own, cohort=["c0"])
    own["c1"] = again["c1"]
    final = dict(own)
    by_hand(here, late, 3, final)
    for client in ("c0", "c1", "c2"):
        assert same(final[client]["delta"], late["delta"]), client


# FedEx


@pytest.mark.parametrize(
    ("family", "target", "shape"),
    [("bert", ["intermediate.dense"], (48, 32)), ("gpt2", ["c_attn"], (96, 32)), ("bert", ["query"], (32, 32))],
)
def test_fedex_is_the_exact_mean_of_products(
    family: str, target: list[str], shape: tuple[int, int], federation: Federation
) -> None:
    done = federation("fedex", family, topts={"rank": 2, "target": target}, rounds=1)
    sent = [add(letters(done)["c0"].body["params"], updates(done)[f"c{i}"].body) for i in range(3)]
    kept = done.state["params"]
    for module, (a, b) in lora_pairs(kept).items():
        exact = sum(product(t)[module] for t in sent) / 3
        assert exact.shape == shape
        found = kept[b].double() @ kept[a].double() + done.state["delta"][module].double()
        assert float((found - exact).abs().max()) < 1e-6 * max(1.0, float(exact.abs().max()))
        averaged = float((kept[b].double() @ kept[a].double() - exact).abs().max())
        assert averaged > 1e-4 * float(exact.abs().max())  # without the residual it is FedIT: not exact
        log = done.state["log"]["0"][module] if done.state["log"] else None
        if log:
            assert log["B"].shape[1] == log["A"].shape[0] == 4  # (3 - 1) r


def test_fedex_residual_has_rank_of_one_client_less() -> None:
    """(N - 1) r for generic factors, in the centred form with any weights; the compact factors lose nothing."""
    torch.manual_seed(0)
    for d_out, d_in in ((6, 6), (30, 40)):
        for p in ([1 / 3] * 3, [0.1, 0.2, 0.3, 0.4]):
            a, b = [torch.randn(2, d_in) for _ in p], [torch.randn(d_out, 2) for _ in p]
            mean_a, mean_b = (sum(w * t for w, t in zip(p, x, strict=True)) for x in (a, b))
            left = torch.cat([w * (t - mean_b) for w, t in zip(p, b, strict=True)], 1)
            right = torch.cat([t - mean_a for t in a])
            exact = sum(w * y.double() @ x.double() for w, x, y in zip(p, a, b, strict=True)) - mean_b.double() @ mean_a.double()
            bound = (len(p) - 1) * 2
            assert int(torch.linalg.matrix_rank(exact, rtol=1e-5)) == min(bound, d_out)
            small = compact(left, right, bound)
            assert small["B"].shape[1] == min(bound, d_out)
            torch.testing.assert_close(small["B"].double() @ small["A"].double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target", "path"),
    [
        ("bert", ["intermediate.dense"], "bert.encoder.layer.{}.intermediate.dense.weight"),
        ("gpt2", ["c_attn"], "transformer.h.{}.attn.c_attn.weight"),
        ("llama", ["v_proj"], "model.layers.{}.self_attn.v_proj.weight"),
    ],
)
def test_a_merged_delta_is_a_model_whose_weights_were_changed(
    family: str, target: list[str], path: str, techniques: Techniques
) -> None:
    """Linear keeps (d_out, d_in), GPT-2's Conv1D (d_in, d_out): both against a model with the sum in its weights."""
    technique = techniques(family, "lora", rank=2, target=target)
    init = technique.init
    pairs = lora_pairs(init)
    delta = {m: 0.1 * torch.randn(init[b].shape[0], init[a].shape[1], generator=stream(0, m)) for m, (a, b) in pairs.items()}
    tree = randomized(init)
    auto = AutoModelForCausalLM if family in ("gpt2", "llama") else AutoModelForSequenceClassification
    model = auto.from_pretrained(technique.backbone.source).eval()
    for i, (module, (a, b)) in enumerate(pairs.items()):
        weight = model.get_parameter(path.format(i))
        change = technique.scaling * (delta[module] + tree[b] @ tree[a])
        weight.data += change.T if family == "gpt2" else change
    for n, t in tree.items():
        if ".lora_" not in n:
            model.get_parameter(n.removeprefix("base_model.model.")).data = t
    batch = batch_of(family)
    wanted = model(**batch).logits
    found = technique.bind(False)({**tree, "delta": delta}, batch)
    mask = batch["attention_mask"].bool() if family in ("gpt2", "llama") else ...
    torch.testing.assert_close(found[mask], wanted[mask], rtol=1e-4, atol=1e-4)
    assert float((found - technique.bind(False)(tree, batch)).abs().max()) > 1e-2


def test_fedex_of_one_client_needs_no_residual(federation: Federation) -> None:
    done = federation("fedex", clients=1, rounds=1)
    assert done.state["delta"] == {}
    assert done.state["aggregation_error"] == 0.0
    assert same(done.state["params"], add(letters(done)["c0"].body["params"], updates(done)["c0"].body))


# HetLoRA


def test_hetlora_pads_and_truncates_without_loss(techniques: Techniques) -> None:
    small = randomized(techniques("bert", "lora", rank=2).init)
    big = pad(small, 5)
    for module, (a, b) in lora_pairs(big).items():
        assert big[a].shape[0] == big[b].shape[1] == 5
        torch.testing.assert_close(product(big)[module], product(small)[module])
    assert same(truncate(big, 2), small)
    for a, b in lora_pairs(small).values():
        norm = torch.linalg.matrix_norm(small[b] @ small[a])
        assert product_norm(small[a], small[b]) == pytest.approx(float(norm), rel=1e-5)


def test_hetlora_prunes_only_where_the_tail_fell(world: Maker) -> None:
    here = world("hetlora", topts={"rank": 4}, options={"gamma": 0.5, "r_min": 1}, sizes={"c0": 4, "c1": 3, "c2": 1})
    state = {**here.algorithm.init(here.technique.init), "params": randomized(here.technique.init)}
    for factor, kept in ((0.5, 2.0), (2.0, 4.0)):

        def trained(ask: Fit, factor: float = factor) -> Tree:
            out = dict(ask.params)
            for _, b in lora_pairs(out).values():
                out[b] = torch.cat([out[b][:, :2], factor * out[b][:, 2:]], 1)
            return out

        _, _, reply = answer_asks(here, state, "c0", None, trained)
        assert reply.info["rank"] == kept
        assert {reply.body[a].shape[0] for a, _ in lora_pairs(reply.body).values()} == {int(kept)}
    # Ranks differ a client from the first letter on: floor(0.5 * 3) = 1; a rank of 1 has nothing to prune.
    _, _, reply = answer_asks(here, state, "c1", None, lambda ask: {n: 0.5 * t for n, t in ask.params.items()})
    assert reply.info["rank"] == 1
    _, _, reply = answer_asks(here, state, "c2", None, lambda ask: {n: 0.5 * t for n, t in ask.params.items()})
    assert reply.info["rank"] == 1


def test_hetlora_weighs_by_norm_and_remembers_ranks(world: Maker) -> None:
    here = world("hetlora", topts={"rank": 3}, sizes={"c0": 1, "c1": 2, "c2": 3})
    sent = {c: truncate(randomized(here.technique.init, i), i + 1) for i, c in enumerate(here.clients)}
    norms = {c: float(sum(p.square().sum() for p in product(t).values()) ** 0.5) for c, t in sent.items()}
    replies = {
        c: Message("update", t, {"n": 1.0, "rank": float(i + 1), "norm": norms[c]}) for i, (c, t) in enumerate(sent.items())
    }
    state = given(here, replies)
    share = {c: norms[c] / sum(norms.values()) for c in norms}
    for a, b in lora_pairs(here.technique.init).values():
        wanted = torch.zeros_like(here.technique.init[a])
        for c, t in sent.items():
            wanted[: t[a].shape[0]] += share[c] * t[a]
        torch.testing.assert_close(state["params"][a], wanted)
        assert state["params"][b].shape == here.technique.init[b].shape
    assert state["ranks"] == {"c0": 1, "c1": 2, "c2": 3}
    letters_out = next(here.algorithm.round(state, here.clients))
    shapes = {c: {m.body[a].shape[0] for a, _ in lora_pairs(m.body).values()} for c, m in letters_out.items()}
    assert shapes == {"c0": {1}, "c1": {2}, "c2": {3}}


def test_hetlora_tail_is_the_norm_of_the_last_ranks(techniques: Techniques) -> None:
    tree = randomized(techniques("bert", "lora", rank=4).init)
    pairs = lora_pairs(tree)
    wanted = sum(float(tree[b][:, 2:].norm() * tree[a][2:].norm()) for a, b in pairs.values())
    assert float(tail_norms(tree, pairs, 2)) == pytest.approx(wanted, rel=1e-5)


# Asynchronous


FAST, SLOW = Device("fast", flops=100.0), Device("slow", flops=1.0)


def ten(rows: int, width: int) -> float:
    return 10.0


def test_fedbuff_waits_for_nobody(federation: Federation) -> None:
    """Two steps of 10 operations: 0.2 s on a fast device, 20 s on the slow one; FedAvg pays 20 s a round."""
    devices = {"c0": FAST, "c1": FAST, "c2": SLOW}
    waiting = federation("fedavg", devices=devices, rounds=3, flops=ten)
    assert waiting.clock == pytest.approx([20.0, 40.0, 60.0])
    free = federation("asynchronous", options={"buffer": 2}, devices=devices, rounds=3, flops=ten)
    assert free.clock == pytest.approx([0.2, 0.4, 0.6])
    assert [s.client for s in free.log if s.reply.verb == "update" and s.round == 2] == ["c0", "c1"]  # c2 is busy
    assert free.state["busy"] == {"c2": 0}


def test_fedbuff_counts_stale_updates_less(federation: Federation, world: Maker) -> None:
    """The slow client's update of version 0 arrives in round 3: s = (1 + 2)^-1/2; the mean is over the buffer."""
    devices = {"c0": FAST, "c1": Device("slow", flops=40.0)}
    done = federation("asynchronous", options={"buffer": 1}, clients=2, devices=devices, rounds=3, flops=ten)
    assert done.clock == pytest.approx([0.2, 0.4, 0.5])
    first, second, third = (dict(updates(done, r)) for r in (1, 2, 3))
    assert set(first) == {"c0", "c1"}
    assert set(second) == {"c0"}
    start = letters(done, 1)["c0"].body
    for name, t in done.state["params"].items():
        wanted = start[name] + first["c0"].body[name] + second["c0"].body[name] + 3**-0.5 * first["c1"].body[name]
        torch.testing.assert_close(t, wanted, rtol=1e-5, atol=1e-6)
    assert third["c0"].info["version"] == 2.0


def test_fedbuff_survives_a_kill_with_replies_under_way(federation: Federation, tmp_path: Any) -> None:
    devices = {"c0": FAST, "c1": FAST, "c2": Device("slow", flops=40.0)}
    case = {"options": {"buffer": 2}, "devices": devices, "flops": ten}
    straight = federation("asynchronous", rounds=5, **case)
    federation("asynchronous", rounds=2, folder=tmp_path / "killed", **case)
    resumed = federation("asynchronous", rounds=3, start=2, folder=tmp_path / "killed", **case)
    assert resumed.hash == straight.hash
    assert resumed.clock == straight.clock[2:]


def test_fedbuff_asks_lost_clients_again_after_patience(world: Maker) -> None:
    here, own = world("asynchronous", options={"buffer": 1, "patience": 2}), {}
    state = here.algorithm.init(here.technique.init)
    asked = []
    for round in range(1, 6):
        letters_out = next(here.algorithm.round(state, here.clients)).to
        asked.append(sorted(letters_out))
        state = by_hand(here, state, round, own, lost=("c1",))
    assert asked == [["c0", "c1", "c2"], ["c0", "c2"], ["c0", "c1", "c2"], ["c0", "c2"], ["c0", "c1", "c2"]]


def test_fedbuff_of_equal_devices_is_uniform_fedavg(federation: Federation) -> None:
    ours = federation("asynchronous", options={"buffer": 3}, rounds=3)
    plain = federation("fedavg", options={"weighting": "uniform"}, rounds=3)
    assert distance(ours.state["params"], plain.state["params"]) < 1e-6
    with pytest.raises(ConfigError, match="buffer"):
        federation("asynchronous", options={"buffer": 0})


# Baselines


def test_local_is_each_client_by_itself(federation: Federation) -> None:
    """Nothing learned travels, and two rounds are one plain training of two passes with its optimiser kept."""
    done = federation("local", rounds=2)
    for seen in done.log:
        assert not seen.letter.body
        assert not (seen.reply.body if seen.reply.verb == "trained" else {})
    alone = federation("local", clients=1, rounds=2)
    assert same(alone.own["c0"], done.own["c0"])
    assert done.own["c0"]["optimizer"]["step"] == 4
    assert done.ledger.total("bytes_up") / done.ledger.total("replies") < 512


def test_pooled_makes_the_same_example_passes_as_the_cohort(federation: Federation) -> None:
    """Two of three clients a round: two thirds of a pass over everybody's 21 rows, in batches of 4; nothing on the wire."""
    some = federation("pooled", rounds=3, cohorts={r: ["c0", "c2"] for r in (1, 2, 3)})
    assert [s.reply.info["steps"] for s in some.log if s.client == SERVER and s.reply.verb == "update"] == [4.0] * 3
    assert some.ledger.total("bytes_up") == 0.0
    fixed = federation("pooled", plan=PLAN._replace(steps=5), rounds=1, cohorts={1: ["c0", "c2"]})
    assert [s.reply.info["steps"] for s in fixed.log if s.reply.verb == "update"] == [10.0]


# All


@pytest.mark.parametrize("kind", ["fedit", "ffa", "fedsa", "flora", "fedex", "hetlora"])
def test_algorithms_on_factors_need_lora(kind: str, world: Maker) -> None:
    here = world(kind, technique="head")
    with pytest.raises(ConfigError, match=f'{kind} works on LoRA factors: set technique.kind = "lora"'):
        here.algorithm.init(here.technique.init)


def test_hetlora_options_are_checked(world: Maker) -> None:
    for options in ({"gamma": 0.0}, {"gamma": 1.5}, {"r_min": 0}):
        with pytest.raises(ConfigError, match="gamma"):
            world("hetlora", options=options)


OTHERS = {
    "adaptive-prefix",
    "local",
    "prompt-search",
    "rag",
    "zero-shot",
    "zeroth-order",
}  # they send no trained tree: tests of their own


@pytest.mark.parametrize("kind", sorted(set(ALGORITHMS) - OTHERS))
def test_the_loss_falls(kind: str, federation: Federation) -> None:
    """A sign error anywhere between gradient and server would make it grow."""
    sgd = Plan(epochs=4, batch=4, lr=0.05, optimizer="sgd")
    plan = sgd if kind in ("fed_influence", "scaffold") else PLAN._replace(epochs=3)
    prompted: dict[str, Any] = {"technique": "prefix", "topts": {"length": 2}} if kind in ("pfedpg", "pfedpt", "zoopfl") else {}
    lr = {"fedadam": {"lr": 0.01}, "fedyogi": {"lr": 0.01}, "fedadagrad": {"lr": 0.02}, "pac_pfl": {"lr": 0.05}}.get(kind, {})
    of_two_layers = ("flexp", "pfsl", "phsfl", "splitfed", "splitlora")
    more: dict[str, Any] = {"front": 0} if kind in of_two_layers else {"buffer": 3} if kind == "asynchronous" else {}
    plan = plan._replace(rounds=4, steps=6 if kind == "pfsl" else 0)
    more = {**more, "prompt_lr": 0.01} if kind == "pfedpt" else more
    done = federation(kind, rounds=4, plan=plan, options={**lr, **more}, **prompted)
    start = federation(kind, rounds=1, plan=plan._replace(lr=1e-9), options={"lr": 1e-9} if lr else more, **prompted)

    def loss(outcome: Outcome) -> float:
        return sum(float(m.body["test"]["nll"]) for c, m in outcome.answers.items() if c != SERVER)

    assert loss(done) < loss(start)


def test_aggregation_error_of_equal_factors_is_zero() -> None:
    one = {"m.lora_A.weight": torch.randn(2, 5), "m.lora_B.weight": torch.randn(4, 2)}
    assert aggregation_error([one, one], [0.3, 0.7], weighted_mean([one, one], [0.3, 0.7])) < 1e-6
    other = {**one, "m.lora_B.weight": torch.randn(4, 2)}
    assert aggregation_error([one, other], [1, 1], weighted_mean([one, other], [1, 1])) < 1e-6  # equal A: exact


# Clients of different sizes


@pytest.mark.parametrize(("technique", "option"), [("prefix", "length"), ("prompt", "length"), ("lora", "rank")])
def test_entries_are_averaged_over_the_clients_that_hold_them(technique: str, option: str, federation: Federation) -> None:
    """Sizes 1, 3 and 2 of 3: entry by entry, the mean of who has it, weighted by rows (6, 7, 8)."""
    sizes = {"c0": 1, "c1": 3, "c2": 2}
    done = federation("fedavg", technique=technique, topts={option: 3}, sizes=sizes, rounds=1)
    old = letters(done, 1)["c0"].body
    sent = [updates(done, 1)[c].body for c in sizes]
    seen = 0
    for name, t in done.state["params"].items():
        for place in itertools.product(*(range(n) for n in t.shape[:2])):
            mine = [(w, u[name]) for w, u in zip((6, 7, 8), sent, strict=True)]
            held = [(w, part[place]) for w, part in mine if all(i < n for i, n in zip(place, part.shape, strict=False))]
            assert held
            mean = sum(w * part for w, part in held) / sum(w for w, _ in held)
            torch.testing.assert_close(t[place], old[name][place] + mean, rtol=1e-5, atol=1e-6)
            seen += len(held) < 3
    assert seen


def test_equal_sizes_change_no_bit(federation: Federation) -> None:
    same_size = federation("fedavg", technique="prefix", topts={"length": 2}, sizes={"c0": 2, "c1": 2, "c2": 2})
    assert same_size.hash == federation("fedavg", technique="prefix", topts={"length": 2}).hash
    trees = [{"w": torch.randn(3, 2)} for _ in range(3)]
    assert same(overlapping_mean(trees, [1, 2, 3], trees[0]), weighted_mean(trees, [1, 2, 3]))


@pytest.mark.parametrize("kind", ["asynchronous", "fedit", "ffa", "fedsa", "fedex", "scaffold"])
def test_who_needs_equal_sizes_says_so(kind: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match="the same rank or length"):
        world(kind, sizes={"c0": 1, "c1": 2, "c2": 2}, plan=SGD)


@pytest.mark.parametrize("kind", ["flora", "fedex"])
def test_who_merges_refuses_rounded_letters(kind: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=r"leave filters\.down out"):
        ALGORITHMS[kind](world(kind).job._replace(exact_down=False))


@pytest.mark.parametrize("kind", ["flora", "fedex"])
def test_who_is_exact_measures_it(kind: str, federation: Federation) -> None:
    error = federation(kind).state["aggregation_error"]
    assert 0 < error < 1e-6 < federation("fedit").state["aggregation_error"]
