"""pFedPT: the frame, the two phases, the authors' loop in plain torch, the limit without a frame, and what never crosses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageClassification

from federations import PLAN, Outcome, World
from fedtailor.core import Fit, Fitted, Message, Plan, stream
from fedtailor.data.examples import Subset
from fedtailor.engines.batches import batches
from fedtailor.errors import ConfigError
from fedtailor.techniques.base import FRAME, frame_shapes, framed
from fedtailor.wire import encode
from tiny import distance, rows_of, same

Federation = Callable[..., Outcome]
Maker = Callable[..., World]

SGD = Plan(epochs=1, batch=4, lr=1e-2, optimizer="sgd")
PROMPT = "prompt_embeddings"


def test_a_frame_of_two_pixels_around_cifar_has_720_numbers() -> None:
    shapes = frame_shapes((3, 32, 32), 2)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 720
    assert sum(torch.Size(shape).numel() for shape in frame_shapes((1, 64, 64), 2).values()) == 496
    assert frame_shapes((3, 32, 32), 0) == {}
    images = torch.randn(2, 3, 6, 8)
    frame = {name: torch.randn(shape) for name, shape in frame_shapes((3, 6, 8), 2).items()}
    added = framed(images, frame) - images
    assert float(added[:, :, 2:4, 2:6].abs().max()) == 0
    for place, name in zip((added[:, :, :2], added[:, :, 4:], added[:, :, 2:4, :2], added[:, :, 2:4, 6:]), FRAME, strict=True):
        torch.testing.assert_close(place, frame[name].expand_as(place), rtol=1e-5, atol=1e-5)


def test_two_rounds_are_the_plain_loop(federation: Federation, backbones: Callable[[str], Any]) -> None:
    """Full fine-tuning of transformers' own module behind a frame that two lines of torch put on; the frame's momentum goes on."""
    options = {"prompt_epochs": 2, "prompt_lr": 0.05, "prompt_momentum": 0.5, "pad": 3}
    ours = federation("pfedpt", family="vit", technique="full", plan=SGD, clients=1, rounds=2, options=options)
    model = AutoModelForImageClassification.from_pretrained(backbones("vit").source).eval()
    before = copy.deepcopy(dict(model.named_parameters()))
    random, rows = stream(0, "frame", "c0"), Subset(rows_of("vit"), range(6))
    strips = [torch.randn(s, generator=random).requires_grad_() for s in ((3, 3, 32), (3, 3, 32), (3, 26, 3), (3, 26, 3))]
    first = torch.optim.SGD(strips, lr=0.05, momentum=0.5)

    def phase(optimizer: torch.optim.Optimizer, epochs: int, round: int, asked: int) -> None:
        drawn = batches(SGD._replace(epochs=epochs), rows.lengths, stream(0, "fit", "c0", round, 1, asked), pace(round))
        for chosen in drawn:
            batch = rows.batch(chosen, 1, len(chosen))
            frame = torch.zeros(3, 32, 32)
            frame = frame + F.pad(strips[0], (0, 0, 0, 29)) + F.pad(strips[1], (0, 0, 29, 0))
            frame = frame + F.pad(strips[2], (0, 29, 3, 3)) + F.pad(strips[3], (29, 0, 3, 3))
            model.zero_grad()
            first.zero_grad()
            model(pixel_values=batch["pixel_values"] + frame, labels=batch["labels"]).loss.backward()
            optimizer.step()

    for round in (1, 2):
        phase(first, 2, round, 1)
        phase(torch.optim.SGD(model.parameters(), lr=SGD.lr), 1, round, 2)
    for name, strip in zip(FRAME, strips, strict=True):
        torch.testing.assert_close(ours.own["c0"]["prompt"][name], strip.detach(), rtol=1e-4, atol=1e-5)
    wanted = {name: p.detach() for name, p in model.named_parameters()}
    assert distance({name: ours.state["params"][name] for name in wanted}, wanted) < 1e-5
    assert distance(wanted, {name: p.detach() for name, p in before.items()}) > 1e-3


def pace(round: int) -> torch.Generator:
    return stream(0, "pace", round, 1)


def test_without_a_frame_it_is_fedavg_bit_for_bit(federation: Federation) -> None:
    ours = federation("pfedpt", family="vit", options={"pad": 0}, plan=PLAN)
    plain = federation("fedavg", family="vit", plan=PLAN)
    assert same(ours.state["params"], plain.state["params"])
    some = federation("pfedpt", family="vit", options={"pad": 1, "prompt_epochs": 1}, plan=PLAN)
    assert not same(some.state["params"], plain.state["params"])


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_the_phases_train_disjoint_tensors_and_no_prompt_crosses(family: str, world: Maker, federation: Federation) -> None:
    given = {"family": family, "technique": "lora", "topts": {"rank": 2}}
    if family == "bert":
        given = {"family": family, "technique": "prefix", "topts": {"length": 2}}
    here = world("pfedpt", plan=PLAN, **given)
    state = here.algorithm.init(here.technique.init)
    letter = next(here.algorithm.round(state, ["c0"]))["c0"]
    flow = here.algorithm.client["train"](None, letter, here.sites("c0", 1))
    first = next(flow)
    assert isinstance(first, Fit)
    assert (first.plan.optimizer, first.plan.lr, first.plan.momentum, first.plan.epochs) == ("sgd", 1.0, 0.5, 5.0)
    moved = {name: t + 1 for name, t in first.params.items()}
    second = flow.send(Fitted(moved, {"n": 6.0}, {"step": 2}))
    assert second.plan == PLAN
    private = set(FRAME) if family == "vit" else {PROMPT}
    assert set(first.params) == private
    assert second.params.keys() == letter.body.keys() == here.technique.init.keys() - private
    assert same(second.aux["rest"], moved)
    with pytest.raises(StopIteration) as end:
        flow.send(Fitted(second.params, {"n": 6.0}, {}))
    own, reply = end.value.value
    assert same(own, {"prompt": moved, "optimizer": {"step": 2}})
    assert reply.body.keys() == letter.body.keys()

    done = federation("pfedpt", options={"prompt_epochs": 1, "prompt_lr": 0.1}, **given)
    for seen in done.log:
        assert not private & (set(seen.letter.body) | set(seen.reply.body))
    update = next(s for s in done.log if s.client == "c0" and s.reply.verb == "update")
    shared = {n: t + 1 for n, t in here.technique.init.items() if n not in private}  # values do not change a length
    assert len(encode(update.letter)) == len(encode(Message("train", shared)))
    assert len(encode(update.reply)) == len(encode(Message("update", shared, update.reply.info)))
    tree = here.algorithm.personal(done.own["c0"], letter.body, here.sites("c0", 2))
    assert tree.keys() == here.technique.init.keys() | private
    assert here.algorithm.personal(None, letter.body, here.sites("c0", 2)).keys() == here.technique.init.keys()


def test_a_frame_lies_beside_what_is_exported(federation: Federation, techniques: Callable[..., Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    done = federation("pfedpt", family="vit", options={"prompt_epochs": 1, "prompt_lr": 0.1}, rounds=1)
    tree = {**done.state["params"], **done.own["c0"]["prompt"]}
    techniques("vit", "lora", rank=2).save(tree, tmp_path / "mine")
    assert same(load_file(tmp_path / "mine" / "frame.safetensors"), done.own["c0"]["prompt"])


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"technique": "lora"}, "choose technique prefix or prompt"),
        ({"family": "gpt2", "technique": "prefix", "topts": {"length": 2}}, "a technique with a head"),
        ({"family": "vit", "options": {"pad": 16}}, "a frame of 0 to 15 pixels"),
        ({"family": "vit", "sizes": {"c0": 1, "c1": 2, "c2": 2}}, "needs the same rank"),
        ({"options": {"prompt_epochs": 0.0}}, "prompt_epochs above 0"),
        ({"options": {"prompt_optimizer": "adma"}}, "did you mean 'adam'"),
    ],
)
def test_what_it_refuses(given: dict[str, Any], says: str, world: Maker) -> None:
    def made() -> None:
        here = world("pfedpt", **given)
        here.algorithm.init(here.technique.init)

    with pytest.raises(ConfigError, match=says):
        made()
