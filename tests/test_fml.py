"""Federated Mutual Learning: the published loss, its limits, plain torch with two models and two optimisers, and what crosses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForSequenceClassification

from commands import csv_of, lines
from federations import PLAN, Outcome, World
from fedtailor import wire
from fedtailor.config import parse
from fedtailor.core import SERVER, Message, Plan, stream
from fedtailor.data.examples import Subset
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.losses import classification, language, mutual
from fedtailor.run import run
from fedtailor.trees import scale
from tiny import distance, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd", momentum=0.9)
PRIVATE = torch.tensor([[2.0, 0, -1], [0, 1, 0]])
MEME = torch.tensor([[1.0, 1, 0], [0.5, 0.5, -1]])
LABELS = torch.tensor([0, 2])


def logits(params: Any, batch: Any) -> torch.Tensor:
    return params["logits"]  # type: ignore[no-any-return]


def theirs(own: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """One of the two losses in torch's own words."""
    taught = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(own, dim=1), F.softmax(other.detach(), dim=1))
    return share * F.cross_entropy(own, LABELS) + (1 - share) * taught


def test_the_published_toy_vector() -> None:
    """CE 0.860645 and 1.580455, KL(meme || private) 0.307687, KL(private || meme) 0.260619."""
    both, batch = {"private": {"logits": PRIVATE}, "meme": {"logits": MEME}}, {"labels": LABELS}
    for alpha, beta, wanted in ((1, 1, 0.860645 + 1.580455), (0, 0, 0.307687 + 0.260619), (0.5, 0.5, 0.584166 + 0.920537)):
        assert float(mutual(classification, alpha, beta)(logits, both, batch, {})) == pytest.approx(wanted, abs=2e-6)
    padded = {name: {"logits": torch.cat([t["logits"], torch.randn(2, 3)])} for name, t in both.items()}
    more = {"labels": torch.cat([LABELS, torch.tensor([-100, -100])])}
    assert float(mutual(classification, 0.5, 0.5)(logits, padded, more, {})) == pytest.approx(0.584166 + 0.920537, abs=2e-6)
    assert mutual(classification, 0.5, 0.2) == mutual(classification, 0.5, 0.2) != mutual(classification, 0.2, 0.5)


def test_each_tree_has_the_gradient_of_its_own_loss() -> None:
    both = {"private": {"logits": PRIVATE.clone().requires_grad_()}, "meme": {"logits": MEME.clone().requires_grad_()}}
    mutual(classification, 0.7, 0.2)(logits, both, {"labels": LABELS}, {}).backward()
    private, meme = PRIVATE.clone().requires_grad_(), MEME.clone().requires_grad_()
    theirs(private, meme, 0.7).backward()
    theirs(meme, private, 0.2).backward()
    torch.testing.assert_close(both["private"]["logits"].grad, private.grad)
    torch.testing.assert_close(both["meme"]["logits"].grad, meme.grad)


def test_language_models_are_compared_on_the_tokens_that_count() -> None:
    labels = torch.tensor([[9, -100, 0], [9, 2, -100]])  # the second and third tokens are predicted from the two before them
    said = {name: {"logits": torch.randn(2, 3, 3)} for name in ("private", "meme")}
    for which, table in (("private", PRIVATE), ("meme", MEME)):
        said[which]["logits"][0, 1], said[which]["logits"][1, 0] = table
    found = float(mutual(language, 0.5, 0.5)(logits, said, {"labels": labels}, {}))
    assert found == pytest.approx(0.584166 + 0.920537, abs=2e-6)


@pytest.mark.parametrize("plan", [PLAN._replace(lr=1e-3), SGD], ids=["adamw", "momentum"])
def test_two_rounds_are_the_plain_loop(plan: Plan, federation: Federation, backbones: Callable[[str], Any]) -> None:
    """Full fine-tuning of transformers' own modules: two models, two optimisers, of which the private one's goes on."""
    ours = federation("fml", technique="full", plan=plan, clients=2, rounds=2, options={"alpha": 0.7, "beta": 0.4})
    source, data = backbones("bert").source, rows_of("bert")

    def new() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(source).eval()

    def optimizer(model: Any) -> torch.optim.Optimizer:
        kind = torch.optim.AdamW if plan.optimizer == "adamw" else torch.optim.SGD
        return kind(model.parameters(), lr=plan.lr, **({"weight_decay": 0.0} if kind is torch.optim.AdamW else {"momentum": 0.9}))

    shared, private = new(), [new(), new()]
    kept = [optimizer(model) for model in private]
    for round in (1, 2):
        memes = []
        for k, mine in enumerate(private):
            meme = new()
            meme.load_state_dict(shared.state_dict())
            both = (kept[k], optimizer(meme))
            rows = Subset(data, range(k * 10, k * 10 + 6 + k))
            for drawn in batches(plan, rows.lengths, stream(0, "fit", f"c{k}", round, 1, 1), stream(0, "pace", round, 1)):
                batch = rows.batch(drawn, int(rows.lengths[drawn].max()), len(drawn))
                labels = batch.pop("labels")
                said, meant = mine(**batch).logits, meme(**batch).logits
                for o in both:
                    o.zero_grad()
                for own, other, share in ((said, meant, 0.7), (meant, said, 0.4)):
                    taught = nn.KLDivLoss(reduction="batchmean")(F.log_softmax(own, 1), F.softmax(other.detach(), 1))
                    (share * F.cross_entropy(own, labels) + (1 - share) * taught).backward()
                for o in both:
                    o.step()
            memes.append(meme.state_dict())
        shared.load_state_dict({n: (memes[0][n] + memes[1][n]) / 2 for n in memes[0]})
    for tree, model in [(ours.state["params"], shared), *((ours.own[f"c{k}"]["params"], m) for k, m in enumerate(private))]:
        # A key's bias shifts every score of a query alike: its gradient is 0, and Adam makes a step of the rounding that is left.
        wanted = {name: p.detach() for name, p in model.named_parameters() if not name.endswith("key.bias")}
        # Elsewhere too Adam makes long steps of small gradients, whose rounding differs by processor.
        assert distance({name: tree[name] for name in wanted}, wanted) < (1e-3 if plan.optimizer == "adamw" else 1e-4)
        assert distance(wanted, {n: p.detach() for n, p in new().named_parameters() if n in wanted}) > 1e-2


@pytest.mark.parametrize("plan", [PLAN, SGD], ids=["adamw", "momentum"])
def test_with_labels_alone_it_is_local_training_beside_fedavg_bit_for_bit(plan: Plan, federation: Federation) -> None:
    both = federation("fml", options={"alpha": 1.0, "beta": 1.0}, plan=plan, rounds=3)
    alone = federation("local", plan=plan, rounds=3)
    averaged = federation("fedavg", options={"weighting": "uniform"}, plan=plan, rounds=3)
    assert same(both.state["params"], averaged.state["params"])
    assert same(both.own, alone.own)
    taught = federation("fml", plan=plan, rounds=3)
    assert not same(taught.own["c0"]["params"], alone.own["c0"]["params"])


def test_the_wire_is_fedavgs_whatever_the_private_models_are(federation: Federation) -> None:
    ours = federation("fml", sizes={"c0": 1, "c1": 2, "c2": 2}, rounds=2, flops=lambda rows, width: rows * width)
    plain = federation("fedavg", options={"weighting": "uniform"}, rounds=2, flops=lambda rows, width: rows * width)
    for name in ("bytes_up", "bytes_down"):
        assert ours.ledger.total(name) == pytest.approx(plain.ledger.total(name), rel=1e-3)  # the header says another loss
    assert ours.ledger.total("flops") == 2 * plain.ledger.total("flops")
    for seen in ours.log:
        if seen.reply.verb == "update":
            assert {n: t.shape for n, t in seen.letter.body.items()} == {n: t.shape for n, t in ours.state["params"].items()}
            assert seen.reply.body.keys() == seen.letter.body.keys()
        else:  # a client judges the tree that it has; the server's is judged beside it
            assert bool(seen.letter.body) == (seen.client == SERVER)
    sizes = {c: {t.shape[0] for n, t in own["params"].items() if ".lora_A." in n} for c, own in ours.own.items()}
    assert sizes == {"c0": {1}, "c1": {2}, "c2": {2}}
    up = len(wire.encode(next(s.reply for s in ours.log if s.reply.verb == "update")))
    numbers = sum(t.numel() for t in ours.state["params"].values())
    assert 4 * numbers < up < 4 * numbers + 4096


def test_memes_are_weighed_alike_or_by_examples(world: Maker) -> None:
    for weighting, wanted in (("uniform", 0.5), ("examples", 0.75)):
        here = world("fml", options={"weighting": weighting})
        start = here.technique.init
        talk = here.algorithm.round(here.algorithm.init(start), ["c0", "c1"])
        next(talk)
        one = {name: torch.ones_like(t) for name, t in start.items()}
        with pytest.raises(StopIteration) as end:
            talk.send({"c0": Message("update", scale(one, 0.0), {"n": 2.0}), "c1": Message("update", one, {"n": 6.0})})
        for name, t in end.value.value["params"].items():
            torch.testing.assert_close(t, start[name] + wanted)


@pytest.mark.parametrize(
    ("options", "changes", "says"),
    [
        ({"alpha": 1.5}, {}, "algorithm.alpha is the share"),
        ({"beta": -0.1}, {}, "algorithm.beta is the share"),
        ({"weighting": "all"}, {}, "algorithm.weighting"),
        ({}, {"plan": PLAN._replace(clip=1.0)}, "train.clip would clip their gradients as one"),
        ({}, {"technique": "retriever", "topts": {"rank": 2}}, "choose lora or prefix"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], changes: dict[str, Any], says: str, world: Maker) -> None:
    with pytest.raises(ConfigError, match=says):
        world("fml", options=options, **changes)


def test_what_is_chosen_by_is_the_private_models_and_not_the_meme(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """With labels alone private models are those of training alone, and so is what validation rows say of them."""
    names = ("red", "green", "blue")
    words = [(f"{names[k % 3]} w{k % 7} fox", names[k % 3], "") for k in range(60)]
    (tmp_path / "all.csv").write_text(csv_of(words), encoding="utf-8")
    values: dict[str, Any] = {
        "rounds": 2,
        "model": {"name": str(folders("bert"))},
        "data": {"name": str(tmp_path / "all.csv"), "test": 0.2},
        "clients": {"count": 3, "valid": 0.3},
        "technique": {"kind": "lora", "rank": 2},
        "train": {"batch": 4, "lr": 0.05},
    }
    found = []
    for algorithm in ({"kind": "fml", "alpha": 1.0, "beta": 1.0}, {"kind": "local"}):
        run(parse({**values, "algorithm": algorithm}), tmp_path / algorithm["kind"])
        found.append([(line["valid"], line["valid_loss"]) for line in lines(tmp_path / algorithm["kind"])])
    assert found[0] == found[1]
    assert len(found[0]) == 2
