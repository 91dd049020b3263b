"""A causal model with real trained weights: llama2.c's stories260K as a transformers folder, where the shared files are there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2] / "shared"


def stories() -> Path:
    """The folder of `stories260K.bin` and `tok512.bin`; skips the test where there is none."""
    folder = Path(os.environ.get("FEDTAILOR_MODELS", ROOT / "models")) / "stories260k"
    if not (folder / "stories260K.bin").is_file():
        pytest.skip(f"{folder} is not there: set FEDTAILOR_MODELS to the folder that holds stories260k")
    return folder


def converted(source: Path, to: Path) -> Path:
    """The same weights and vocabulary as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    data = (source / "stories260K.bin").read_bytes()
    dim, hidden, layers, heads, shared, words, length = struct.unpack("7i", data[:28])
    numbers = torch.from_numpy(np.frombuffer(data, dtype="<f4", offset=28).copy())

    def taken(*shape: int) -> torch.Tensor:
        nonlocal numbers
        count = int(np.prod(shape))
        found, numbers = numbers[:count].view(*shape), numbers[count:]
        return found

    def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """llama2.c turns neighbouring pairs, transformers the first half of a head against the second."""
        rows, width = weight.shape
        return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)

    narrow = dim // heads * shared
    config = LlamaConfig(
        vocab_size=words, hidden_size=dim, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, max_position_embeddings=length, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    table, before = taken(words, dim), taken(layers, dim)
    q, k, v, o = taken(layers, dim, dim), taken(layers, narrow, dim), taken(layers, narrow, dim), taken(layers, dim, dim)
    between, gate, down, up = (
        taken(layers, dim),
        taken(layers, hidden, dim),
        taken(layers, dim, hidden),
        taken(layers, hidden, dim),
    )
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": taken(dim)}
    for n in range(layers):
        at = f"model.layers.{n}"
        state |= {
            f"{at}.self_attn.q_proj.weight": halves(q[n], heads), f"{at}.self_attn.k_proj.weight": halves(k[n], shared),
            f"{at}.self_attn.v_proj.weight": v[n], f"{at}.self_attn.o_proj.weight": o[n],
            f"{at}.mlp.gate_proj.weight": gate[n], f"{at}.mlp.down_proj.weight": down[n], f"{at}.mlp.up_proj.weight": up[n],
            f"{at}.input_layernorm.weight": before[n], f"{at}.post_attention_layernorm.weight": between[n],
        }  # fmt: skip
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    model.save_pretrained(to)

    pieces, scores, raw, at = [], [], (source / "tok512.bin").read_bytes(), 4
    for _ in range(words):
        score, size = struct.unpack("fi", raw[at : at + 8])
        pieces.append(raw[at + 8 : at + 8 + size].decode().replace(" ", "▁"))
        scores.append(score)
        at += 8 + size
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [(p[:i], p[i:]) for p in pieces[259:] for i in range(1, len(p)) if p[:i] in vocabulary and p[i:] in vocabulary]
    merges.sort(key=lambda pair: -scores[vocabulary[pair[0] + pair[1]]])
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(spaces)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(to)
    return to
