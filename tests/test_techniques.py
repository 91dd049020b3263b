"""Techniques on every family: what is trained here is what PEFT and transformers load, and vmap is one by one."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file
from torch.func import vmap

from fedtailor import attention
from fedtailor.backbone import Backbone, keys_and_values, load
from fedtailor.config import ModelSection
from fedtailor.core import Tree, stream
from fedtailor.errors import ConfigError, DataError
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.techniques.peft import QUERY_VALUE
from fedtailor.trees import lora_pairs, numel
from tiny import CAUSAL, FAMILIES, KINDS, LABELS, PADS, TEXT, batch_of, randomized, tokenizer

Techniques = Callable[..., Technique]
Backbones = Callable[[str], Backbone]

OPTIONS: dict[str, dict[str, Any]] = {
    "colora": {"rank": 2, "blocks": 1},
    "full": {},
    "head": {},
    "ia3": {},
    "lora": {"rank": 2},
    "peft": {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": ["dense"]},
    "prefix": {"length": 3},
    "prompt": {"length": 3},
    "retriever": {"rank": 2},
    "template": {},
}
TARGETS = {
    "bert": ["dense"],
    "roberta": ["dense"],
    "distilbert": ["lin1"],
    "gpt2": ["c_proj"],
    "llama": ["o_proj"],
    "vit": ["q_proj"],
}
NO_HEAD = {(family, "head") for family in CAUSAL}
NO_PROMPT = {("vit", "prompt")}
NO_LOGITS = ("retriever", "template")  # no logits, or nothing to train: tests of their own (test_rag.py, test_prompt_search.py)
PAIRS = [(f, k) for f in FAMILIES for k in TECHNIQUES if (f, k) not in NO_HEAD | NO_PROMPT and k not in NO_LOGITS]
NO_CACHE = {("vit", "prefix"), ("distilbert", "prefix")}  # PEFT has no forward for these: our attention carries the prefix
AUTO = {
    "text": transformers.AutoModelForSequenceClassification,
    "language": transformers.AutoModelForCausalLM,
    "image": transformers.AutoModelForImageClassification,
}


def test_every_technique_has_options_here() -> None:
    assert set(OPTIONS) == set(TECHNIQUES)


def made(techniques: Techniques, family: str, kind: str, **more: Any) -> Technique:
    options = {**OPTIONS[kind], **more}
    if kind == "peft":
        options["target_modules"] = TARGETS[family]
    return techniques(family, kind, **options)


def stock(source: str | Path, kind: str) -> torch.nn.Module:
    """The model as anybody loads it, with transformers' own attention."""
    return AUTO[kind].from_pretrained(source).eval()


def logits_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def visible(family: str, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits that mean something: of a language model, those at real tokens (after a soft prompt, the last ones)."""
    if family not in CAUSAL:
        return logits
    width = batch["attention_mask"].shape[1]
    return logits[:, -width:][batch["attention_mask"].bool()]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    worst = float((a - b).abs().max())
    assert worst <= tolerance * max(1.0, float(b.abs().max())), worst


# Exported folders


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")  # told to who loads it: merging is not possible there
@pytest.mark.parametrize(("family", "kind"), [p for p in PAIRS if p not in NO_CACHE])
def test_an_exported_folder_is_what_peft_or_transformers_loads(
    family: str, kind: str, techniques: Techniques, tmp_path: Path
) -> None:
    technique = made(techniques, family, kind)
    sizes = {"lora": (2, 1, 5), "prefix": (3, 1, 6), "prompt": (3, 1, 6)}.get(kind, (0,))
    batch = batch_of(family, extra=2)
    for size in sizes:
        tree = randomized(technique.resized(size) if size else technique.init)
        folder = tmp_path / f"{size}"
        technique.save(tree, folder)
        if kind == "full":
            model = stock(folder, KINDS[family])
        else:
            base = stock(technique.backbone.source, KINDS[family])
            model = PeftModel.from_pretrained(base, str(folder)).eval()
        ours = technique.bind(False)(tree, batch)
        close(visible(family, ours, batch), visible(family, logits_of(model, batch), batch))
        start = technique.bind(False)(technique.init, batch)
        assert float((visible(family, ours, batch) - visible(family, start, batch)).abs().max()) > 1e-3
        loader = transformers.AutoImageProcessor if family == "vit" else transformers.AutoTokenizer
        assert loader.from_pretrained(folder) is not None


@pytest.mark.parametrize(("family", "kind"), sorted(NO_CACHE))
def test_a_prefix_without_cache_is_saved_whole(family: str, kind: str, techniques: Techniques, tmp_path: Path) -> None:
    technique = made(techniques, family, kind)
    tree = randomized(technique.init)
    technique.save(tree, tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {n: t.tolist() for n, t in saved.items()} == {n: t.tolist() for n, t in tree.items()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PREFIX_TUNING", 3)
    assert json.loads((tmp_path / "labels.json").read_text()) == LABELS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "ia3", "head"])
def test_a_merged_folder_is_a_plain_model(family: str, kind: str, techniques: Techniques, tmp_path: Path) -> None:
    if (family, kind) in NO_HEAD:
        pytest.skip("no head")
    technique = made(techniques, family, kind)
    tree = randomized(technique.init)
    technique.merge(tree, tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    batch = batch_of(family)
    merged = logits_of(stock(tmp_path, KINDS[family]), batch)
    close(visible(family, merged, batch), visible(family, technique.bind(False)(tree, batch), batch), 1e-4)
    # The backbone that all clients share is untouched.
    fresh = logits_of(stock(technique.backbone.source, KINDS[family]), batch)
    close(visible(family, technique.backbone.model(**batch).logits, batch), visible(family, fresh, batch))


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_what_cannot_be_merged_says_so(kind: str, techniques: Techniques, tmp_path: Path) -> None:
    technique = made(techniques, "bert", kind)
    with pytest.raises(ConfigError, match="cannot be merged into the weights: export it without --merge"):
        technique.merge(technique.init, tmp_path)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "vit"])
def test_a_delta_is_exported_as_extra_ranks(family: str, techniques: Techniques, tmp_path: Path) -> None:
    """Saved for PEFT and merged for transformers: the same logits as the forward with the delta beside the base."""
    technique = made(techniques, family, "lora")
    tree = randomized(technique.init)
    for i, (module, (a, b)) in enumerate(lora_pairs(tree).items()):
        left = 0.2 * torch.randn(tree[b].shape[0], 1 + i, generator=stream(1, module))
        right = 0.2 * torch.randn(1 + i, tree[a].shape[1], generator=stream(2, module))
        tree.setdefault("delta", {})[module] = left @ right
    batch = batch_of(family)
    ours = technique.bind(False)(tree, batch)
    technique.save(tree, tmp_path / "adapter")
    technique.merge(tree, tmp_path / "merged")
    base = stock(technique.backbone.source, KINDS[family])
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 + len(tree["delta"])
    assert config["lora_alpha"] == 2 * config["r"]
    close(visible(family, logits_of(adapted, batch), batch), visible(family, ours, batch), 1e-4)
    close(visible(family, logits_of(stock(tmp_path / "merged", KINDS[family]), batch), batch), visible(family, ours, batch), 1e-4)


def test_rslora_keeps_its_scale_at_another_rank_and_with_a_delta(backbones: Backbones, tmp_path: Path) -> None:
    technique = TECHNIQUES["peft"](
        backbones("bert"), peft_type="LORA", r=4, lora_alpha=6, use_rslora=True, target_modules=["query"]
    )
    assert technique.scaling == pytest.approx(6 / math.sqrt(4))
    batch = batch_of("bert")
    for i, size in enumerate((4, 2, 9)):
        tree = randomized(technique.resized(size))
        tree["delta"] = {m: 0.1 * torch.randn(32, 32, generator=stream(0, m)) for m in lora_pairs(tree)} if i else {}
        technique.save(tree, tmp_path / f"{size}")
        model = PeftModel.from_pretrained(stock(technique.backbone.source, "text"), str(tmp_path / f"{size}")).eval()
        close(logits_of(model, batch), technique.bind(False)(tree, batch), 1e-4)


# Sizes and names


def roberta_base() -> transformers.RobertaForSequenceClassification:
    config = transformers.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, num_labels=2
    )
    with torch.device("meta"):
        return transformers.RobertaForSequenceClassification(config)


def test_sizes_of_roberta_base_are_the_published_ones() -> None:
    """LoRA r = 8 on query and value with the head: 887,042 numbers; a prefix of 64 with the head: 1,771,778."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    model = roberta_base()
    head = sum(p.numel() for p in model.classifier.parameters())
    assert head == 592_130
    names = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = sorted(names & QUERY_VALUE)
    assert targets == ["query", "value"]
    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules=targets, task_type="SEQ_CLS"))
    assert sum(t.numel() for t in get_peft_model_state_dict(wrapped).values()) == 887_042 == 294_912 + head
    assert 2 * 12 * 768 * 64 + head == 1_771_778


@pytest.mark.parametrize(
    ("family", "width"), [("bert", 32), ("roberta", 32), ("distilbert", 32), ("gpt2", 32), ("vit", 32), ("llama", 16)]
)
def test_a_prefix_has_two_rows_a_layer_and_token(family: str, width: int, techniques: Techniques) -> None:
    """2 L m H numbers; under grouped queries (Llama here: 2 of 4 heads) H is what keys and values have."""
    head = 0 if family in CAUSAL else sum(p.numel() for n, p in stock_head(techniques, family))
    for length in (1, 3, 8):
        tree = made(techniques, family, "prefix").resized(length)
        assert tree["prompt_embeddings"].numel() == 2 * 2 * length * width
        assert numel(tree) == 2 * 2 * length * width + head


def stock_head(techniques: Techniques, family: str) -> list[tuple[str, torch.Tensor]]:
    model = made(techniques, family, "prefix").backbone.model
    # DistilBERT's pre_classifier is drawn from the seed where a checkpoint has none, as the classifier is.
    return [(n, p) for n, p in model.named_parameters() if n.split(".")[0] in ("classifier", "score")]


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_prompt_sizes_follow_their_formulas(family: str, techniques: Techniques) -> None:
    init = made(techniques, family, "lora").init
    outs = {"gpt2": [96], "llama": [32, 16]}.get(family, [32, 32])  # GPT-2: q, k and v in one; Llama: fewer value heads
    factors = {n: t for n, t in init.items() if ".lora_" in n}
    assert numel(factors) == 2 * sum(2 * (32 + out) for out in outs)
    assert all(bool((t == 0).all()) for n, t in factors.items() if ".lora_B." in n)
    assert {t.shape[0] for n, t in made(techniques, family, "lora").resized(5).items() if ".lora_A." in n} == {5}
    if family != "vit":
        assert made(techniques, family, "prompt").init["prompt_embeddings"].shape == (3, 32)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
@pytest.mark.parametrize(("family", "kind"), [p for p in PAIRS if p not in NO_CACHE])
def test_trees_have_pefts_saved_names(family: str, kind: str, techniques: Techniques, tmp_path: Path) -> None:
    technique = made(techniques, family, kind)
    technique.save(technique.init, tmp_path)
    if kind == "full":
        assert set(technique.init) == {n for n, _ in stock(technique.backbone.source, KINDS[family]).named_parameters()}
        return
    saved = set(load_file(tmp_path / "adapter_model.safetensors"))
    if kind == "colora":  # PEFT's for the modules without pieces; of the others it has products
        assert set(technique.init) & saved == {n for n in technique.init if not n.startswith("colora.")}
        return
    assert set(technique.init) == (saved if kind != "head" else {n for n in saved if ".lora_" not in n})
    assert all(t.dtype == torch.float32 for t in technique.init.values())
    if family in TEXT and kind != "head":
        from peft import get_peft_model_state_dict

        model = PeftModel.from_pretrained(stock(technique.backbone.source, "text"), str(tmp_path))
        assert set(get_peft_model_state_dict(model)) == saved


def test_a_prompt_starts_from_real_tokens_and_a_prefix_from_their_keys(techniques: Techniques, backbones: Backbones) -> None:
    table = backbones("bert").model.get_input_embeddings().weight
    tokens = backbones("bert").processor(" ".join(LABELS), add_special_tokens=False)["input_ids"]
    prompt = made(techniques, "bert", "prompt").resized(4)["prompt_embeddings"]
    torch.testing.assert_close(prompt, table[[*tokens, tokens[0]]])
    # A text after a prefix of its own keys and values sees them twice: the softmax over doubled keys is the same.
    technique = techniques("distilbert", "prefix", length=3)
    batch = {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    close(technique.bind(False)(technique.init, batch), backbones("distilbert").model(**batch).logits)
    noise = techniques("bert", "prefix", length=3, init="random")
    assert torch.equal(noise.init["prompt_embeddings"], noise.resized(3)["prompt_embeddings"])
    assert 0.7 < float(noise.init["prompt_embeddings"].std()) < 1.3


# Forward


@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_vmap_is_one_by_one(family: str, kind: str, techniques: Techniques) -> None:
    """Logits and gradients of three clients with their own trees and batches."""
    technique = made(techniques, family, kind)
    forward = technique.bind(False)
    trees = [randomized(technique.init, seed, 0.1) for seed in range(3)]
    batches = [batch_of(family, extra=e, seed=s) for s, e in ((1, 0), (2, 1), (3, 2))]
    width = max(b["input_ids"].shape[1] for b in batches) if family != "vit" else 0
    if width:
        batches = [
            {
                n: torch.nn.functional.pad(t, (0, width - t.shape[1]), value=PADS[family] if n == "input_ids" else 0)
                for n, t in b.items()
            }
            for b in batches
        ]
    weights = torch.randn(forward(trees[0], batches[0]).shape, generator=stream(0, "weights"))
    if family in CAUSAL:  # as in training, what comes out at padding does not count
        for batch in batches:
            batch["weights"] = weights.clone()
            batch["weights"][:, -width:][batch["attention_mask"] == 0] = 0.0

    def loss(tree: Tree, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (logits(tree, batch) * batch.get("weights", weights)).mean()

    def stacked(trees: list[Tree]) -> Tree:
        return {n: torch.stack([t[n] for t in trees]) for n in trees[0]}

    def logits(tree: Tree, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return forward(tree, {n: t for n, t in batch.items() if n != "weights"})

    many = vmap(logits)(stacked(trees), stacked(batches))
    # As the engine does it: backward through vmap, and one by one.
    leaves = {n: t.requires_grad_() for n, t in stacked(trees).items()}
    vmap(loss)(leaves, stacked(batches)).sum().backward()
    for i, (tree, batch) in enumerate(zip(trees, batches, strict=True)):
        close(many[i], logits(tree, batch))
        own = {n: t.clone().requires_grad_() for n, t in tree.items()}
        loss(own, batch).backward()
        largest = max(float(t.grad.abs().max()) for t in own.values() if t.grad is not None)
        assert largest > 0
        for n, t in own.items():
            if t.grad is not None:
                assert float((leaves[n].grad[i] - t.grad).abs().max()) <= 1e-5 * max(largest, 1e-3), n


@pytest.mark.parametrize(("family", "kind"), [(f, k) for f, k in PAIRS if f != "vit"])
def test_padding_does_not_show(family: str, kind: str, techniques: Techniques) -> None:
    technique = made(techniques, family, kind)
    forward, tree = technique.bind(False), randomized(technique.init)
    short, long = batch_of(family), batch_of(family, extra=7)
    together = forward(tree, long)
    close(visible(family, together, long), visible(family, forward(tree, short), short))
    for row in range(3):
        length = int(short["attention_mask"][row].sum())
        alone = {n: t[row : row + 1, :length] for n, t in short.items()}
        one = {n: t[row : row + 1] for n, t in long.items()}
        close(visible(family, forward(tree, alone), alone), visible(family, together[row : row + 1], one))


@pytest.mark.parametrize("family", ["vit", "distilbert"])
def test_a_prefix_through_attention_is_a_concatenation_written_out(family: str, techniques: Techniques) -> None:
    """The stock eager model, its projections replaced by ones that put the prefix before keys and values."""
    technique = made(techniques, family, "prefix")
    tree = randomized(technique.init)
    table = tree["prompt_embeddings"].view(3, 2, 2, 4, 8)  # token, layer, keys or values, head, dim
    model = AUTO[KINDS[family]].from_pretrained(technique.backbone.source, attn_implementation="eager").eval()
    for name, t in tree.items():
        if name != "prompt_embeddings":
            model.get_parameter(name.removeprefix("base_model.")).data = t
    kept = {"layer": 0}

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any = None, scaling: Any = None, **_: Any) -> Any:
        before = table[:, kept["layer"]].permute(1, 2, 0, 3)  # keys or values, head, token, dim
        kept["layer"] += 1
        rows = q.shape[0]
        keys, values = (torch.cat([b.expand(rows, *b.shape), t], 2) for b, t in zip(before, (k, v), strict=True))
        scores = q @ keys.mT / 8**0.5
        if mask is not None:
            visible = mask if mask.dtype == torch.bool else mask > -1
            hidden = torch.cat([torch.zeros(*visible.shape[:-1], 3, dtype=torch.bool), ~visible], -1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return (scores.softmax(-1) @ values).transpose(1, 2), None

    transformers.AttentionInterface.register("written-out", attend)
    transformers.AttentionMaskInterface.register("written-out", transformers.masking_utils.eager_mask)
    model.config._attn_implementation = "written-out"
    batch = batch_of(family, extra=2)
    wanted = logits_of(model, batch)
    assert kept["layer"] == 2
    close(technique.bind(False)(tree, batch), wanted)


def test_lengths_and_ranks_may_differ_in_one_forward(techniques: Techniques) -> None:
    """One bound forward, clients of other sizes in turn: nothing of the last one stays."""
    batch = batch_of("bert")
    for kind in ("prefix", "prompt", "lora"):
        technique = made(techniques, "bert", kind)
        forward = technique.bind(False)
        trees = {size: randomized(technique.resized(size)) for size in (1, 4, 2)}
        first = {size: forward(tree, batch) for size, tree in trees.items()}
        for size, tree in trees.items():
            assert torch.equal(technique.bind(False)(tree, batch), first[size])
            assert torch.equal(forward(tree, batch), first[size])


@pytest.mark.parametrize(("family", "kind"), [("bert", "lora"), ("gpt2", "prefix"), ("vit", "full"), ("llama", "lora")])
def test_two_forwards_share_tensors_and_not_modules(family: str, kind: str, techniques: Techniques) -> None:
    technique = made(techniques, family, kind)
    one, two = (inspect.unwrap(technique.bind(False)) for _ in range(2))
    models = [next(c.cell_contents for c in f.__closure__ if isinstance(c.cell_contents, torch.nn.Module)) for f in (one, two)]
    assert models[0] is not models[1]
    assert not {id(m) for m in models[0].modules()} & {id(m) for m in models[1].modules()}
    pointers = [{n: p.data_ptr() for n, p in m.named_parameters()} for m in models]
    assert pointers[0] == pointers[1]
    backbone = {p.data_ptr() for p in technique.backbone.model.parameters()}
    assert len(backbone & set(pointers[0].values())) >= 0.9 * len(backbone)
    assert not any(p.requires_grad for m in models for p in m.parameters())


def test_dropout_is_of_the_bound_forward_alone(techniques: Techniques) -> None:
    technique, batch = made(techniques, "bert", "lora"), batch_of("bert")
    quiet, noisy = technique.bind(False), technique.bind(True)
    torch.manual_seed(0)
    assert not torch.equal(noisy(technique.init, batch), noisy(technique.init, batch))
    assert torch.equal(quiet(technique.init, batch), quiet(technique.init, batch))


def test_forwards_of_several_threads_do_not_mix_prefixes(techniques: Techniques) -> None:
    from concurrent.futures import ThreadPoolExecutor

    technique, batch = made(techniques, "vit", "prefix"), batch_of("vit")
    trees = [randomized(technique.init, seed) for seed in range(4)]
    wanted = [technique.bind(False)(tree, batch) for tree in trees]

    def work(i: int) -> bool:
        forward = technique.bind(False)
        return all(torch.equal(forward(trees[i], batch), wanted[i]) for _ in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [True] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_our_attention_is_the_stock_one(family: str, backbones: Backbones) -> None:
    backbone, batch = backbones(family), batch_of(family, extra=3)
    assert backbone.model.config._attn_implementation == attention.NAME
    stocks = AUTO[KINDS[family]].from_pretrained(backbone.source, attn_implementation="eager").eval()
    close(visible(family, logits_of(backbone.model, batch), batch), visible(family, logits_of(stocks, batch), batch))


SPARED = {"bert": "bert.encoder.layer.1.attention.output", "roberta": "roberta.encoder.layer.1.attention.output"}
SPARED |= {"distilbert": "distilbert.transformer.layer.1.sa_layer_norm", "vit": "vit.layers.1.layernorm_after"}


@pytest.mark.parametrize("family", SPARED)
def test_the_last_layer_computes_only_what_the_head_reads(family: str, backbones: Backbones, techniques: Techniques) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    assert backbones(family).unread == SPARED[family]
    technique, batch = techniques(family, "full"), batch_of(family, extra=3)
    params = {name: value.clone().requires_grad_() for name, value in technique.init.items()}
    whole = copy.deepcopy(backbones(family).model).requires_grad_(True)
    flops = []
    with FlopCounterMode(display=False) as counter:
        ours = technique.bind(False)(params, batch)
        ours.square().sum().backward()
        flops.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        logits = whole(**batch).logits
        logits.square().sum().backward()
        flops.append(counter.get_total_flops())
    close(ours.detach(), logits.detach())
    for name, p in whole.named_parameters():
        assert (p.grad is None) == (params[name].grad is None), name
        if p.grad is not None:
            close(params[name].grad, p.grad)
    assert flops[0] < 0.85 * flops[1]


def test_a_classifier_that_reads_another_token_is_left_whole(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=45, n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=3, pad_token_id=0)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer(0).save_pretrained(tmp_path)
    assert load(ModelSection(name=str(tmp_path)), "text", LABELS).unread is None


def test_keys_and_values_have_the_heads_of_the_cache(backbones: Backbones) -> None:
    """(layers, 2, kv_heads, length, dim), as the model's own cache holds them."""
    backbone = backbones("llama")
    found, modules = keys_and_values(backbone, 5)
    assert found.shape == (2, 2, 2, 5, 8)
    assert len(modules) == 2
    text = "the quick brown fox jumps over the lazy dog"
    ids = torch.tensor([backbone.processor(text, add_special_tokens=False)["input_ids"][:5]])
    with torch.no_grad():
        cache = stock(backbone.source, "language")(ids, use_cache=True).past_key_values
    for layer in range(2):
        close(found[layer, 0], cache.layers[layer].keys[0])
        close(found[layer, 1], cache.layers[layer].values[0])


def test_gradient_of_a_delta_leaves_the_base_alone(techniques: Techniques) -> None:
    """Training over a merged delta: the factors' gradient is that of a model with the delta in its weights."""
    technique, batch = made(techniques, "bert", "lora"), batch_of("bert")
    tree = randomized(technique.init)
    (a, b) = lora_pairs(tree)[next(iter(lora_pairs(tree)))]
    delta = {m: tree[y] @ tree[x] for m, (x, y) in lora_pairs(tree).items()}
    half = {n: t for n, t in tree.items() if ".lora_" not in n} | {n: t for n, t in technique.init.items() if ".lora_" in n}
    forward = technique.bind(False)
    # B = 0 with the product in delta is the same function as the factors themselves.
    close(forward({**half, "delta": delta}, batch), forward(tree, batch))
    at = tree[b].clone().requires_grad_()
    (slope,) = torch.autograd.grad(forward({**tree, b: at}, batch).square().sum(), at)
    (moved,) = torch.autograd.grad(forward({**half, a: tree[a], b: at - tree[b], "delta": delta}, batch).square().sum(), at)
    close(moved, slope, 1e-4)


# Errors


@pytest.mark.parametrize(
    ("family", "kind", "options", "line"),
    [
        ("bert", "lora", {"rank": 0}, "technique.rank must be at least 1"),
        ("bert", "prefix", {"length": 0}, "technique.length must be at least 1"),
        ("bert", "prompt", {"length": -1}, "technique.length must be at least 1"),
        ("bert", "prefix", {"init": "activation"}, "did you mean 'activations'"),
        ("vit", "prompt", {}, "use 'prefix' for images"),
        ("gpt2", "head", {}, "use 'lora' for language models"),
        ("llama", "head", {}, "use 'lora' for language models"),
        ("bert", "peft", {"peft_type": "LORAA"}, "did you mean 'LORA'"),
        ("bert", "peft", {}, "technique.peft_type"),
        ("bert", "peft", {"peft_type": "LORA", "rang": 3}, "rang"),
        ("bert", "lora", {"target": ["nowhere"]}, "has no layer 'nowhere': choose one of: classifier"),
        ("bert", "lora", {"target": ["quary"]}, "did you mean 'query'"),
        ("vit", "peft", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "use technique 'prefix' for images"),
        ("distilbert", "peft", {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}, "use technique 'prefix'"),
    ],
)
def test_bad_options_are_explained(family: str, kind: str, options: dict[str, Any], line: str, backbones: Backbones) -> None:
    with pytest.raises(ConfigError) as caught:
        TECHNIQUES[kind](backbones(family), **options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["full", "head", "ia3"])
def test_techniques_without_a_size_refuse_one(kind: str, techniques: Techniques) -> None:
    with pytest.raises(ConfigError, match=r"clients\.ranks"):
        made(techniques, "bert", kind).resized(3)


def test_models_that_cannot_be_loaded_are_explained(folders: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((folders("bert") / "config.json").read_text())
    cases = {
        str(tmp_path / "nowhere"): "does not exist: name a folder, a hub id",
        str(tmp_path / "empty"): "has no config.json",
        str(tmp_path / "bare"): "has no weights",
        "minilmm": "did you mean 'minilm'?",
        "./nowhere": "does not exist",
    }
    for name, line in cases.items():
        with pytest.raises(DataError) as caught:
            load(ModelSection(name=name), "text", LABELS)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot be loaded for language data"):
        load(ModelSection(name=str(folders("vit"))), "language", [])


def test_a_head_that_the_checkpoint_lacks_comes_from_the_seed(folders: Callable[[str], Path]) -> None:
    five = ["a", "b", "c", "d", "e"]
    one, two, other = (load(ModelSection(name=str(folders("bert"))), "text", five, seed=s).model for s in (1, 1, 2))
    assert one.classifier.weight.shape == (5, 32)
    assert torch.equal(one.classifier.weight, two.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert torch.equal(one.bert.embeddings.word_embeddings.weight, other.bert.embeddings.word_embeddings.weight)
    assert one.config.id2label == dict(enumerate(five))


def test_the_embedded_model_is_a_real_one() -> None:
    """MiniLM: 6 layers of 384; LoRA r = 8 on query and value; close texts are close."""
    backbone = load(ModelSection(name="minilm"), "text", ["sport", "law"])
    assert backbone.model.config.num_hidden_layers == 6
    init = TECHNIQUES["lora"](backbone).init
    assert numel({n: t for n, t in init.items() if ".lora_" in n}) == 6 * 2 * 8 * (384 + 384)
    texts = ["A man plays football.", "People are playing soccer.", "The court dismissed the appeal."]
    batch = backbone.processor(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model.bert(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    similar = means @ means.T
    assert float(similar[0, 1]) > float(similar[0, 2]) + 0.2
