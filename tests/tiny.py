"""Tiny random models and the rows that they read, and what tells whether two trees agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fedtailor.core import Tree, stream
from fedtailor.data.examples import Store, Subset, store
from fedtailor.trees import leaves

LABELS = ["good", "bad", "fine"]
WORDS = [*LABELS, "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", *(f"w{i}" for i in range(29))]
TEXT = ("bert", "roberta", "distilbert")
CAUSAL = ("gpt2", "llama")
FAMILIES = (*TEXT, *CAUSAL, "vit")
KINDS = {**dict.fromkeys(TEXT, "text"), **dict.fromkeys(CAUSAL, "language"), "vit": "image"}
PADS = {"bert": 0, "roberta": 1, "distilbert": 0, "gpt2": 0, "llama": 0}  # RoBERTa counts positions from its pad token's id
FIRST = 5  # ids from here on are words


def tokenizer(pad: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(pad, special.pop(0))
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tiny(family: str) -> Any:
    """A random model of this family; weights are large enough for every path through it to show in the logits."""
    import transformers as t

    words = 45
    common = {"vocab_size": words, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    wide = {"initializer_range": 0.2}
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    if family == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**common, **wide, max_position_embeddings=64, num_labels=3))
    if family == "roberta":
        sizes = {"max_position_embeddings": 66, "pad_token_id": 1, "num_labels": 3, "type_vocab_size": 1}
        return t.RobertaForSequenceClassification(t.RobertaConfig(**common, **wide, **sizes))
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64, "num_labels": 3}
        return t.DistilBertForSequenceClassification(t.DistilBertConfig(vocab_size=words, **sizes, **wide))
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=words, **sizes, **wide, **ends))
    if family == "llama":
        sizes = {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
        return t.LlamaForCausalLM(t.LlamaConfig(**common, **sizes, **wide, **ends))
    assert family == "vit"
    common.pop("vocab_size")
    return t.ViTForImageClassification(t.ViTConfig(**common, **wide, image_size=32, patch_size=8, num_labels=3))


def rows_of(family: str, count: int = 60, seed: int = 0) -> Store:
    """Random encoded examples for this family, each of another length."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    if family == "vit":
        return store({"pixel_values": torch.randn(count, 3, 32, 32, generator=stream(seed, "images")), "labels": labels}, {})
    ids = [random.integers(FIRST, 45, random.integers(4, 10)).tolist() for _ in range(count)]
    if family in CAUSAL:
        return store({"input_ids": ids, "labels": ids}, {"input_ids": PADS[family], "labels": -100})
    return store({"input_ids": ids, "labels": labels}, {"input_ids": PADS[family]})


def batch_of(family: str, rows: int = 3, extra: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of this family, without labels; `extra`: that many columns of padding more."""
    data = Subset(rows_of(family, rows, seed), np.arange(rows))
    out = data.batch(range(rows), int(max(data.lengths)) + extra, rows)
    return {name: t for name, t in out.items() if name != "labels"}


def randomized(tree: Tree, seed: int = 0, size: float = 0.3) -> Tree:
    """A tree of the same shapes that differs everywhere from what nothing learned: B of LoRA starts at zero."""
    return {name: t + size * torch.randn(t.shape, generator=stream(seed, name)) for name, t in tree.items()}


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types included; mappings of any class."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def distance(a: Tree, b: Tree) -> float:
    """The largest difference of two trees, relative to the largest number of that tensor."""
    worst = 0.0
    for (name, x), (other, y) in zip(leaves(a), leaves(b), strict=True):
        assert name == other
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
            assert x.shape == y.shape, name
            scale = max(float(x.abs().max()), 1e-3)
            worst = max(worst, float((x.double() - y.double()).abs().max()) / scale)
    return worst
