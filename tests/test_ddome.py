"""DDOME: the authors' two losses in plain torch, who trains what, what crosses, the limit, and a client that has no labels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

from commands import Printed, csv_of, sets, write_experiment
from federations import PLAN, Outcome, World
from fedtailor.algorithms.ddome import EMBEDDING, anchoring, mixing, picked
from fedtailor.core import Message, Plan, Site, Tree, stream
from fedtailor.data.examples import Subset
from fedtailor.engines.answering import Workers, answer
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.losses import classification
from fedtailor.techniques.mixture import COMMON, EXPERTS, GATE, embed, gate, gated
from fedtailor.trees import nbytes
from fedtailor.wire import encode
from tiny import LABELS, batch_of, distance, randomized, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]
Techniques = Callable[..., Any]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")
WIDTH = 32  # of the tiny models' hidden states


def module(tree: Tree) -> nn.Sequential:
    """The gate as torch would write it."""
    inputs, width = tree["w1"].shape
    made = nn.Sequential(
        nn.LayerNorm(inputs, elementwise_affine=False), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, len(tree["b2"]))
    )
    values = (tree["w1"].T, tree["b1"], tree["w2"].T, tree["b2"])
    made.load_state_dict({name: t.clone() for name, t in zip(made.state_dict(), values, strict=True)})
    return made


def as_tree(made: nn.Module) -> Tree:
    w1, b1, w2, b2 = (p.detach() for p in made.parameters())
    return {"w1": w1.T, "b1": b1, "w2": w2.T, "b2": b2}


def telling(rows: torch.Tensor, experts: int) -> Tree:
    """A gate under which these rows want different experts: what they have in common is taken off."""
    tree = gate(WIDTH, 8, experts, 0)
    common = F.layer_norm(rows, (WIDTH,)).mean(0)
    return {**tree, "b1": -common @ tree["w1"], "b2": torch.zeros(experts)}


def test_the_gate_is_two_linear_layers() -> None:
    tree, rows = gate(WIDTH, 8, 3, 0), torch.randn(5, WIDTH)
    torch.testing.assert_close(gated(tree, rows), module(tree)(rows))
    assert all(float(t.abs().max()) <= WIDTH**-0.5 for t in (tree["w1"], tree["b1"]))
    assert same(tree, gate(WIDTH, 8, 3, 0))
    assert not same(tree, gate(WIDTH, 8, 3, 1))


def test_which_experts_rows_want() -> None:
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 1, 0.9, 0.1], [0, 1, 0.9, 0.1]])
    assert picked(logits, 1, "scores").tolist() == [0]
    assert picked(logits, 2, "scores").tolist() == [0, 1]
    assert picked(logits, 1, "votes").tolist() == [1]
    assert picked(logits, 2, "votes").tolist() == [1, 2]  # 0, 1, 1 of the first places, 1, 2, 2 of the first two
    assert picked(torch.zeros(0, 4), 2, "scores").tolist() == [0, 1]
    assert picked(logits, 4, "scores").dtype == torch.int16


def logits_of(params: Any, batch: Any) -> torch.Tensor:
    return batch["x"] @ params["w"]  # type: ignore[no-any-return]


def test_the_two_losses_on_paper() -> None:
    """Shares of three experts, of which two are trained: with and without making them add up to one."""
    start, rows = gate(WIDTH, 8, 3, 1), torch.randn(6, WIDTH)
    labels = torch.tensor([0, 1, 0, 1, 1, -100])  # the last is padding
    batch = {"x": torch.randn(6, 4), "labels": labels, EMBEDDING: rows}
    trees = {str(i): {"w": torch.randn(4, 2)} for i in range(2)}
    params = {EXPERTS: trees, "u": {name: torch.zeros_like(t) for name, t in start.items()}}
    aux = {GATE: start, "pick": torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])}
    g = module(start)(rows).softmax(1)[:, [0, 2]]
    said = [batch["x"] @ tree["w"] for tree in trees.values()]
    for renormalise in (True, False):
        mix = g / g.sum(1, keepdim=True) if renormalise else g
        wanted = F.cross_entropy(mix[:, :1] * said[0] + mix[:, 1:] * said[1], labels)
        torch.testing.assert_close(mixing(classification, 1.0, renormalise)(logits_of, params, batch, aux), wanted)
    alone = {
        EXPERTS: {"0": {"w": trees["1"]["w"].clone().requires_grad_()}},
        "u": {n: t.clone().requires_grad_() for n, t in params["u"].items()},
    }
    anchoring(classification, 0.5)(logits_of, alone, batch, {GATE: start, "pick": torch.tensor([[0, 0, 1.0]])}).backward()
    # Each has the slope of its own loss alone.
    w, made = trees["1"]["w"].clone().requires_grad_(), module(start)
    F.cross_entropy(batch["x"] @ w, labels).backward()
    F.cross_entropy(made(rows), torch.tensor([2, 2, 2, 2, 2, -100])).backward()
    torch.testing.assert_close(alone[EXPERTS]["0"]["w"].grad, w.grad)
    slopes = dict(zip(("w1", "b1", "w2", "b2"), (p.grad for p in made.parameters()), strict=True))
    for name, u in alone["u"].items():  # a gate moves by 0.5 u
        torch.testing.assert_close(u.grad, 0.5 * (slopes[name].T if name[0] == "w" else slopes[name]))  # type: ignore[union-attr]
    assert mixing(classification, 1.0, True) == mixing(classification, 1.0, True) != mixing(classification, 1.0, False)


@pytest.mark.parametrize("gate_lr", [0.0, 0.04])
def test_two_rounds_are_the_plain_loop(gate_lr: float, federation: Federation, backbones: Callable[[str], Any]) -> None:
    """transformers' own modules, torch's gate and torch's SGD with a rate for each; c1 is the anchor of the first of three experts."""
    options = {"experts": 3, "k": 2, "tied": ["c1"], "width": 8, "gate_lr": gate_lr}
    ours = federation("ddome", technique="full", plan=SGD, clients=2, rounds=2, options=options)
    source, data = backbones("bert").source, rows_of("bert")

    def new() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(source).eval()

    common, experts, router = new(), [new() for _ in range(3)], module(gate(WIDTH, 8, 3, 0))
    for round in (1, 2):
        done: list[tuple[dict[int, Any], Any]] = []
        for k in (0, 1):
            rows = Subset(data, range(k * 10, k * 10 + 6 + k))
            batch = rows.batch(range(len(rows)), int(rows.lengths.max()), len(rows))
            with torch.no_grad():
                inputs = {n: t for n, t in batch.items() if n != "labels"}
                hidden = common(**inputs, output_hidden_states=True).hidden_states[1]  # of two layers
                mask = batch["attention_mask"][..., None].float()
                x = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
                chosen = [0] if k == 1 else sorted(router(x).softmax(1).sum(0).topk(2).indices.tolist())
            own = {i: new() for i in chosen}
            for i, model in own.items():
                model.load_state_dict(experts[i].state_dict())
            mine = module(as_tree(router))
            groups = [
                {"params": [p for m in own.values() for p in m.parameters()]},
                {"params": mine.parameters(), "lr": gate_lr or SGD.lr},
            ]
            optimizer = torch.optim.SGD(groups, lr=SGD.lr)
            # The anchor embeds its rows in the letter in which it trains first.
            asked = 2 if k == 1 and round == 1 else 1
            for drawn in batches(SGD, rows.lengths, stream(0, "fit", f"c{k}", round, 2, asked), stream(0, "pace", round, 2)):
                batch = rows.batch(drawn, int(rows.lengths[drawn].max()), len(drawn))
                labels = batch.pop("labels")
                g = mine(x[torch.from_numpy(drawn)])
                optimizer.zero_grad()
                if k == 1:
                    loss = F.cross_entropy(own[0](**batch).logits, labels) + F.cross_entropy(g, torch.zeros_like(labels))
                else:
                    shares = g.softmax(1)[:, chosen]
                    shares = shares / shares.sum(1, keepdim=True)
                    loss = F.cross_entropy(sum(shares[:, [j]] * own[i](**batch).logits for j, i in enumerate(chosen)), labels)
                loss.backward()
                optimizer.step()
            done.append((own, mine))
        weights = [6.0, 7.0]
        for i, model in enumerate(experts):
            those = [(w, own[i].state_dict()) for w, (own, _) in zip(weights, done, strict=True) if i in own]
            if those:
                total = sum(w for w, _ in those)
                model.load_state_dict({n: sum(w / total * tree[n] for w, tree in those) for n in those[0][1]})
        gates = [as_tree(mine) for _, mine in done]
        router = module({n: 6 / 13 * gates[0][n] + 7 / 13 * gates[1][n] for n in gates[0]})
    assert distance(ours.state[GATE], as_tree(router)) < 1e-5
    for i, model in enumerate(experts):
        wanted = {n: p.detach() for n, p in model.named_parameters()}
        assert distance(ours.state[EXPERTS][f"e{i}"], wanted) < 1e-5
    assert distance(ours.state[GATE], gate(WIDTH, 8, 3, 0)) > 1e-3


def test_who_trains_what(federation: Federation) -> None:
    """Experts that nobody chose stay to the bit; an anchor has one expert and trains no other."""
    done = federation("ddome", clients=4, rounds=1, plan=SGD, options={"experts": 6, "k": 1, "anchors": 2})
    start, held = done.world.technique.init, done.state["anchors"]
    assert len(held) == 2
    assert list(held.values()) == ["e0", "e1"]
    letters = {s.client: s for s in done.log if s.letter.verb == "train"}
    trained = {name for s in letters.values() for name in s.reply.body[EXPERTS]}
    assert len(letters) == 4
    for client, seen in letters.items():
        assert seen.letter.body[EXPERTS].keys() == seen.reply.body[EXPERTS].keys()
        assert (client in held) == (GATE in seen.letter.body) == bool(seen.letter.info.get("anchor"))
        if client in held:
            assert list(seen.reply.body[EXPERTS]) == [held[client]]
    assert {"e0", "e1"} <= trained < set(done.state[EXPERTS])
    for name, tree in done.state[EXPERTS].items():
        assert same(tree, start) == (name not in trained)
    assert {name for name, n in done.state["trained"].items() if n} == trained
    asked = [s.client for s in done.log[:2]]
    assert {s.letter.verb for s in done.log[:2]} == {"choose"}
    assert set(asked).isdisjoint(held)


def test_what_crosses(federation: Federation) -> None:
    """Down and up P_r + K P_e, one expert for an anchor, and the K numbers; in bytes as in the ledger."""
    k = 2
    done = federation("ddome", clients=4, rounds=2, plan=SGD, options={"experts": 3, "k": k, "anchors": 1, "width": 8})
    gate_size, expert_size = nbytes(done.state[GATE]), nbytes(done.world.technique.init)
    assert gate_size == 4 * (WIDTH * 8 + 8 + 8 * 3 + 3)
    for client, row in done.ledger.clients.items():
        mine = [s for s in done.log if s.client == client and s.letter.verb in ("choose", "train")]
        mine = [s for s in mine if s.letter.verb == "train" or client not in done.state["anchors"]]
        mine = [s for i, s in enumerate(mine) if i < 4]  # two rounds; what is after them is the evaluation
        anchor = client in done.state["anchors"]
        experts = 1 if anchor else k
        down, up = (sum(nbytes(m.body) for m in ms) for ms in ([s.letter for s in mine], [s.reply for s in mine]))
        assert down == 2 * (gate_size + experts * expert_size)
        assert up == 2 * (gate_size + experts * expert_size + (0 if anchor else 2 * k))
        assert row["bytes_down"] == sum(len(encode(s.letter)) for s in mine)
        assert row["bytes_up"] == sum(len(encode(s.reply)) for s in mine)


@pytest.mark.parametrize("plan", [PLAN, SGD._replace(momentum=0.9)], ids=["adamw", "momentum"])
def test_one_expert_is_fedavg_bit_for_bit(plan: Plan, federation: Federation) -> None:
    one = federation("ddome", options={"experts": 1, "k": 1, "anchors": 0}, plan=plan, rounds=3)
    averaged = federation("fedavg", plan=plan, rounds=3)
    assert same(one.state[EXPERTS]["e0"], averaged.state["params"])
    assert same(one.state[GATE], gate(WIDTH, 64, 1, 0))
    for client in ("c0", "c1", "c2"):
        assert distance(one.answers[client].body["test"], averaged.answers[client].body["test"]) < 1e-6


def test_a_client_without_labels_is_sent_its_experts(world: Maker) -> None:
    """It has text alone: the gate picks K of all, and each row gets the best of them."""
    here = world("ddome", options={"experts": 4, "k": 2, "width": 8})
    state = here.algorithm.init(here.technique.init)
    trees = {name: randomized(tree, i) for i, (name, tree) in enumerate(state[EXPERTS].items())}
    rows = Subset(here.rows, range(40, 52))
    forward, batch = here.technique.bind(False), rows.batch(range(12), int(rows.lengths.max()), 12)
    with torch.no_grad():
        x = embed(forward, here.technique.init, batch)["embedding"]
    state = {**state, EXPERTS: trees, GATE: telling(x, 4)}
    site = here.sites("c0", 1)._replace(data={"train": rows.take([]), "test": rows})
    workers = Workers(here.technique.bind, 1)

    def handled(letter: Message, site: Site) -> Message:
        flow, result = here.algorithm.client[letter.verb](None, letter, site), None
        while True:
            try:
                result = answer({"new": flow.send(result)}, workers, lambda c: stream(0), False)["new"]
            except StopIteration as end:
                reply: Message = end.value[1]
                return reply

    talk = here.algorithm.answer(state, ["new"])
    letter = next(talk)["new"]  # type: ignore[index]
    assert same(letter.body, state[GATE])
    chosen = handled(letter, site)
    sent = talk.send({"new": chosen})["new"]  # type: ignore[index]
    names = [f"e{i}" for i in chosen.body[EXPERTS].tolist()]
    assert list(sent.body[EXPERTS]) == names
    judged = handled(sent, site)

    # Labels had no part in the choice; the model's own words say who is right.
    with torch.no_grad():
        scores = module(state[GATE])(x)
        best = [names[int(i)] for i in scores[:, [int(n[1:]) for n in names]].argmax(1)]
        said = {n: forward(trees[n], batch).argmax(1) for n in names}
    assert sorted(scores.softmax(1).sum(0).topk(2).indices.tolist()) == [int(n[1:]) for n in names]
    assert len(set(best)) == 2
    right = sum(int(said[n][i] == batch["labels"][i]) for i, n in enumerate(best))
    assert int(judged.body["test"]["correct"]) == right


def test_a_tree_of_experts_gives_each_row_its_best_one(techniques: Techniques) -> None:
    for family, kind, options in (
        ("bert", "lora", {"rank": 2}),
        ("vit", "prefix", {"length": 2}),
        ("bert", "prompt", {"length": 3}),
    ):
        technique = techniques(family, kind, **options)
        forward, batch = technique.bind(False), batch_of(family, rows=9, seed=3)
        trees = {f"e{i}": randomized(technique.init, i) for i in (0, 2, 3)}
        with torch.no_grad():
            rows = embed(forward, technique.init, batch)["embedding"]
            tree = {COMMON: technique.init, GATE: telling(rows, 4), EXPERTS: trees}
            found, scores = forward(tree, batch), gated(tree[GATE], rows)[:, [0, 2, 3]].argmax(1)
            each = torch.stack([forward(one, batch) for one in trees.values()], 1)
        assert len(scores.unique()) > 1
        torch.testing.assert_close(found, each[torch.arange(9), scores], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit"])
@pytest.mark.parametrize("kind", ["full", "lora", "prefix", "head", "ia3", "prompt"])
def test_rows_are_seen_by_the_hidden_states_before_the_last_layer(family: str, kind: str, techniques: Techniques) -> None:
    if (family, kind) == ("vit", "prompt"):
        return  # there is none for images
    technique = techniques(family, kind, **{"lora": {"rank": 2}, "prefix": {"length": 2}, "prompt": {"length": 2}}.get(kind, {}))
    batch = batch_of(family, rows=4)
    with torch.no_grad():
        found = embed(technique.bind(False), technique.init, batch)["embedding"]
        assert found.shape == (4, WIDTH)
        if kind in ("prefix", "prompt"):
            return  # they are seen by it
        inputs = {n: t for n, t in batch.items() if n != "labels"}
        hidden = technique.backbone.model(**inputs, output_hidden_states=True).hidden_states[1]
        mask = batch.get("attention_mask", torch.ones(hidden.shape[:2]))[..., None].float()
        torch.testing.assert_close(found, F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1), rtol=1e-4, atol=1e-5)


def test_images_too(federation: Federation) -> None:
    done = federation("ddome", family="vit", plan=SGD._replace(lr=0.05), rounds=2, options={"experts": 2, "k": 1})
    assert {"c0", "c1", "c2"} == set(done.answers)
    assert done.state["turn"] == 2


def test_anchors_are_drawn_from_the_first_cohorts(federation: Federation) -> None:
    few = {1: ["c0", "c1"], 2: ["c2", "c3"], 3: ["c4", "c5"]}
    done = federation("ddome", clients=6, equal=True, rounds=3, cohorts=few, plan=SGD, options={"experts": 3, "k": 1})
    assert list(done.state["anchors"].values()) == ["e0", "e1", "e2"]  # one an expert, half of six
    firsts = [c for c in done.state["anchors"] if c in few[1]]
    assert len(firsts) == 1
    again = federation("ddome", clients=6, equal=True, rounds=3, cohorts=few, plan=SGD, options={"experts": 3, "k": 1})
    assert again.hash == done.hash
    other = [
        federation("ddome", clients=6, equal=True, rounds=1, seed=s, plan=SGD, options={"experts": 2, "k": 1}).state["anchors"]
        for s in range(4)
    ]
    assert len({tuple(held) for held in other}) > 1
    assert federation("ddome", plan=SGD, options={"anchors": 0}).state["anchors"] == {}


def test_embeddings_are_computed_once(federation: Federation) -> None:
    cost = [federation("ddome", plan=SGD, rounds=rounds, options={"experts": 3, "k": 2}).own["c0"] for rounds in (1, 3)]
    assert same(cost[0][EMBEDDING], cost[1][EMBEDDING])
    assert cost[0][EMBEDDING].shape == (6, WIDTH)


def test_strangers_choices_are_looked_at(world: Maker) -> None:
    check = world("ddome", options={"experts": 4, "k": 2}).algorithm.check
    assert check

    def told(*numbers: int) -> str:
        return check(Message("choose"), Message("chosen", {EXPERTS: torch.tensor(numbers, dtype=torch.int16)}, {"n": 3.0}))

    assert told(0, 3) == ""
    for numbers in ((1, 1), (0, 4), (-1, 2)):
        assert "of 4 experts" in told(*numbers)
    assert "expected" in told(0, 1, 2)


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ({"k": 6}, {}, "1 <= k <= experts"),
        ({"experts": 0}, {}, "1 <= k <= experts"),
        ({"width": 0}, {}, "width >= 1"),
        ({"gate_lr": -1.0}, {}, "gate_lr >= 0"),
        ({"anchors": -1}, {}, "anchors >= 0"),
        ({"anchors": 4}, {}, "4 anchors, where there are 3 clients"),
        ({"tied": ["c7"]}, {}, "algorithm.tied: no client is called 'c7': did you mean 'c"),
        ({"vote": "all"}, {}, "algorithm.vote"),
        ({"weighting": "all"}, {}, "algorithm.weighting"),
        ({}, {"family": "gpt2"}, "for language models choose"),
        ({}, {"technique": "retriever", "topts": {"rank": 2}}, "a technique that trains their logits"),
        ({}, {"sizes": {"c0": 1, "c1": 2, "c2": 2}}, "the same rank or length"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], changes: dict[str, Any], says: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=says):
        world("ddome", options=options, **changes)


def test_a_run_and_what_is_left_of_it(
    folders: Callable[[str], Path], typed: Callable[..., Printed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated, asked, written: everybody's model is all experts, a client's are those that it chose last."""
    monkeypatch.chdir(tmp_path)
    rows = [(f"{LABELS[i % 3]} w{i % 29}", LABELS[i % 3], f"u{i % 3}") for i in range(60)]
    (tmp_path / "rows.csv").write_text(csv_of(rows), encoding="utf-8")
    write_experiment(tmp_path, folders("bert"), 2, 'name = "rows.csv"\ntest = 0.25', "count = 3")
    words = sets(algorithm__kind="ddome", algorithm__experts=3, algorithm__k=1, algorithm__width=8)
    code, _, err = typed(f"run e.toml --out run {words}")
    assert code == 0, err
    summary = json.loads(Path("run/summary.json").read_text(encoding="utf-8"))
    assert sum(summary["experts_trained"].values()) == 3  # an anchor and two others
    names = {path.name for path in Path("run/adapter").iterdir()}
    assert names == {"common", "e0", "e1", "e2", "gate.safetensors", "personal"}
    for client in ("u0", "u1", "u2"):
        folder = Path("run/adapter/personal") / client
        assert (folder / "gate.safetensors").is_file()
        assert (folder / "common" / "adapter_config.json").is_file()
        code, out, err = typed(f"predict run --client {client}", "good fox")
        assert code == 0, err
        assert out.split("\t")[0] in LABELS
    code, out, err = typed("predict run --json", "good fox", "bad dog")
    assert code == 0, err
    assert all(sum(one["scores"]) == pytest.approx(1) for one in json.loads(out)["predictions"])
    assert typed("evaluate run")[0] == 0
    assert typed("export run --to merged --merge")[0] == 0
    assert Path("merged/e2/model.safetensors").is_file()
