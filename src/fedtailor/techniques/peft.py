"""Every technique that PEFT knows: the adapter is PEFT's own module, the tree has its saved names, `save` writes its folder."""

from __future__ import annotations

import copy
import json
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fedtailor import attention, wire
from fedtailor.backbone import Backbone, fork, keys_and_values, quiet
from fedtailor.core import HIDDEN, Batch, Forward, Tree
from fedtailor.cut import held_layers
from fedtailor.errors import ConfigError, nearest, one_of
from fedtailor.techniques.base import DELTA, Technique, binder, detached, save_frame
from fedtailor.techniques.full import write_model

TASKS = {"text": "SEQ_CLS", "language": "CAUSAL_LM", "instruction": "CAUSAL_LM"}
HEADS = ("classifier", "score")
PROMPT = "prompt_embeddings"  # the saved name of a prefix or a soft prompt
QUERY_VALUE = {"query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "qkv", "query_key_value", "Wqkv"}
KEY_VALUE = {"key", "value", "k_proj", "v_proj", "k_lin", "v_lin", "qkv", "query_key_value", "Wqkv"}
FEEDFORWARD = {"lin2", "fc2", "down_proj", "c_proj"}


def lora(
    backbone: Backbone,
    rank: int = 8,
    alpha: float | None = None,
    target: list[str] | None = None,
    dropout: float = 0.0,
    head: str = "trained",
) -> Technique:
    """LoRA on the query and value projections (or on `target`); alpha is twice the rank unless given; ranks may differ."""
    if rank < 1:
        raise ConfigError(f"technique.rank must be at least 1 (got {rank})")
    technique = peft(
        backbone,
        peft_type="LORA",
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets_of(backbone, QUERY_VALUE, target),
    )
    return with_head(technique, head)


def ia3(backbone: Backbone, target: list[str] | None = None, feedforward: list[str] | None = None) -> Technique:
    """(IA)^3: a learned scale on keys, values and one feed-forward layer: the fewest parameters of all."""
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if not target and backbone.model.config.model_type in KNOWN:  # type: ignore[union-attr]
        return peft(backbone, peft_type="IA3")
    inner = targets_of(backbone, FEEDFORWARD, feedforward) if feedforward or not target else []
    modules = sorted({*targets_of(backbone, KEY_VALUE, target), *inner})
    return peft(backbone, peft_type="IA3", target_modules=modules, feedforward_modules=inner)


def prompt(backbone: Backbone, length: int = 10, head: str = "trained") -> Technique:
    """A soft prompt: `length` learned input embeddings before the text, started from real tokens."""
    if backbone.kind == "image":
        raise ConfigError("technique 'prompt' needs a text model: use 'prefix' for images")
    table = backbone.model.get_input_embeddings().weight.detach().float().cpu()  # type: ignore[operator]
    # PEFT does not find these two in every family's configuration (DistilBERT calls them otherwise); a prompt has no heads.
    sizes = {"token_dim": table.shape[1], "num_attention_heads": 1}
    technique = peft(backbone, peft_type="PROMPT_TUNING", num_virtual_tokens=_length(length), **sizes)
    words = backbone.processor(" ".join(backbone.labels) or "answer", add_special_tokens=False)["input_ids"]

    def sized(size: int) -> Tree:
        rows = torch.tensor((words * (size // len(words) + 1))[:size])
        return {**technique.init, PROMPT: table[rows].clone()}

    return with_head(technique._replace(kind="prompt", init=sized(length), resized=sized), head)


def prefix(backbone: Backbone, length: int = 10, init: str = "activations", head: str = "trained") -> Technique:
    """Learned keys and values before those of every layer (Li & Liang, 2101.00190), materialised: no network on the wire.

    `init`: "activations" starts from the keys and values of real tokens, "random" from PEFT's unit normal noise.
    `head`: "frozen" leaves the new head as it was drawn, the same at every client; it is neither trained nor sent.
    """
    one_of("technique.init", init, ("activations", "random"))
    states, modules = keys_and_values(backbone, _length(length))
    layers, _, heads, _, dim = states.shape
    sizes = {"num_virtual_tokens": length, "num_layers": layers, "token_dim": heads * dim, "num_attention_heads": heads}
    if _takes_cache(backbone.model):
        depth, held = held_layers(backbone.model)
        technique = peft(backbone, peft_type="PREFIX_TUNING", **{**sizes, "num_layers": depth})
        technique = technique._replace(bind=_widened(technique.bind, depth, held)) if len(held) < depth else technique
    else:
        technique = _through_attention(backbone, modules, sizes)

    def sized(size: int) -> Tree:
        if init == "random":
            shape = (size, layers * 2 * heads * dim)
            return {**technique.init, PROMPT: torch.randn(shape, generator=torch.Generator().manual_seed(0))}
        found, _ = keys_and_values(backbone, _length(size))
        # PEFT's layout: one row a virtual token, layer by layer, keys then values.
        return {**technique.init, PROMPT: found.permute(3, 0, 1, 2, 4).reshape(size, -1).clone()}

    return with_head(technique._replace(kind="prefix", init=sized(length), resized=sized), head)


def of_head(name: str) -> bool:
    """Whether the tensor of this name belongs to the head that maps features to classes."""
    return any(part in HEADS for part in name.split("."))


def with_head(technique: Technique, head: str) -> Technique:
    """The technique with its head trained, or frozen at its random start: then no tensor of it is in the tree.

    Raises:
        ConfigError: neither "trained" nor "frozen"; frozen, but the model has none.
    """
    one_of("technique.head", head, ("trained", "frozen"))
    if head == "trained":
        return technique
    if not any(map(of_head, technique.init)):
        raise ConfigError("technique.head = 'frozen', but this model has no classification head: leave it out")

    def bare(tree: Tree) -> Tree:
        return {name: t for name, t in tree.items() if not of_head(name)}

    return technique._replace(init=bare(technique.init), resized=lambda size: bare(technique.resized(size)))


def _widened(bind: Callable[[bool], Forward], depth: int, held: Sequence[int]) -> Callable[[bool], Forward]:
    """For a part of a cut model: its prefix has columns for the layers that it holds, and a cache has a place for every layer."""

    def wider(dropout: bool = False) -> Forward:
        forward = bind(dropout)

        def run(params: Tree, batch: Batch) -> Tensor:
            own = params[PROMPT].unflatten(1, (len(held), -1))
            blank = own.new_zeros(own.shape[0], own.shape[2])
            whole = [own[:, held.index(number)] if number in held else blank for number in range(depth)]
            if HIDDEN in batch and "input_ids" not in batch:  # PEFT asks them for the size of the batch
                ids = batch[HIDDEN].new_zeros(batch[HIDDEN].shape[:2], dtype=torch.long)
                batch = {"attention_mask": torch.ones_like(ids), **batch, "input_ids": ids}
            return forward({**params, PROMPT: torch.cat(whole, 1)}, batch)

        return run

    return wider


def _through_attention(backbone: Backbone, modules: list[nn.Module], sizes: dict[str, int]) -> Technique:
    """A prefix where there is no past_key_values to carry it (vision models, DistilBERT): our attention function does.

    The tree and the folder are as PEFT writes them for other models; PEFT itself has no forward for these.
    """
    from peft import PrefixTuningConfig

    for number, module in enumerate(modules):
        module.fedtailor_layer = number  # type: ignore[assignment]
    config = PrefixTuningConfig(task_type=TASKS.get(backbone.kind), **sizes)
    layers, heads = sizes["num_layers"], sizes["num_attention_heads"]

    def around(own: nn.Module, params: Tree) -> AbstractContextManager[None]:
        table = params[PROMPT]
        return attention.prefixed(table.view(-1, layers, 2, heads, table.shape[1] // (layers * 2 * heads)).permute(1, 2, 3, 0, 4))

    named = {f"base_model.{n}": p for n, p in backbone.model.named_parameters() if n.split(".")[0] in HEADS}
    initial = {**detached(named), PROMPT: torch.zeros(sizes["num_virtual_tokens"], layers * 2 * sizes["token_dim"])}
    bind = binder(backbone.model, {n: n.removeprefix("base_model.") for n in named}, backbone.unread, around=around)

    def save(tree: Tree, folder: Path) -> None:
        _write(backbone, tree, initial, config, 1.0, folder)

    def merge(tree: Tree, folder: Path) -> None:
        raise _unmergeable(config.peft_type)

    return Technique("prefix", backbone, initial, fixed, bind, save, merge)


def head(backbone: Backbone) -> Technique:
    """Only the classification head. Exported as a LoRA of rank 1 that is zero, because PEFT has no adapter without one."""
    technique = lora(backbone, rank=1)
    inside = {name: value for name, value in technique.init.items() if ".lora_" not in name}
    if not inside:
        raise ConfigError("technique 'head' needs a model with a classification head: use 'lora' for language models")

    def whole(tree: Tree) -> Tree:
        return {**technique.init, **tree}

    return technique._replace(
        kind="head",
        init=inside,
        resized=fixed,
        save=lambda tree, folder: technique.save(whole(tree), folder),
        merge=lambda tree, folder: technique.merge(whole(tree), folder),
    )


def peft(backbone: Backbone, **config: Any) -> Technique:
    """Any PEFT configuration, verbatim: `peft_type` and its keys, as in PEFT's adapter_config.json."""
    from peft import PeftType, get_peft_config, get_peft_model, get_peft_model_state_dict

    kinds = [kind.value for kind in PeftType]
    if config.get("peft_type") not in kinds:
        raise ConfigError(f"technique.peft_type '{config.get('peft_type')}': {nearest(str(config.get('peft_type')), kinds)}")
    _check(config)
    config = {"task_type": TASKS.get(backbone.kind), **config}
    heads = [n for n, _ in backbone.model.named_children() if n in HEADS]
    learns_prompt = config["peft_type"] in ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
    largest = max(min(p.flatten(1).shape) for p in backbone.model.parameters() if p.dim() > 1)
    if config["peft_type"] == "LORA" and config.get("r", 0) > largest:
        raise ConfigError(f"technique: rank {config['r']} is more than any matrix of this model has: set it to {largest} or less")
    if learns_prompt and backbone.kind == "image":
        raise ConfigError(f"technique '{config['peft_type']}' is for text models: use technique 'prefix' for images")
    if config["peft_type"] == "PREFIX_TUNING" and not _takes_cache(backbone.model):
        raise ConfigError("PEFT's PREFIX_TUNING needs past_key_values, which this model lacks: use technique 'prefix'")
    if backbone.kind == "image":
        config.setdefault("modules_to_save", heads)
    try:
        with quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # What does not fit is told in one line; of the rest nobody can act on (fan_in_fan_out, which PEFT sets right itself).
            warnings.simplefilter("ignore", UserWarning)
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # PEFT asks for it by its old name
            torch.manual_seed(0)
            # A copy of the modules, not of the tensors: PEFT changes the model that it is given.
            base = fork(backbone.model)
            model = get_peft_model(base, get_peft_config(dict(config))).eval()
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"technique '{config['peft_type']}' does not fit this model: {(str(error) or 'no memory').splitlines()[0]}"
        ) from error
    peft_config = model.peft_config["default"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LoRA tensor", UserWarning)  # it takes a bias of LoRA's for a matrix with a lost axis
        saved = get_peft_model_state_dict(model)
    paths = _paths(model, saved)
    parameters = dict(model.named_parameters())
    initial = detached({name: parameters[path] for name, path in paths.items()})
    model.requires_grad_(False)
    scaling = float(peft_config.lora_alpha / peft_config.r) if config["peft_type"] == "LORA" else 1.0
    if config["peft_type"] == "LORA" and peft_config.use_rslora:
        scaling = float(peft_config.lora_alpha / peft_config.r**0.5)
    if learns_prompt:
        # At inference PEFT takes the table as it is, at any length, instead of looking rows up in it.
        peft_config.inference_mode = True

    def around(own: nn.Module, params: Tree) -> AbstractContextManager[None]:
        return _at_length(own, params[PROMPT].shape[0])

    def save(tree: Tree, folder: Path) -> None:
        _write(backbone, tree, initial, peft_config, scaling, folder)

    def merge(tree: Tree, folder: Path) -> None:
        from peft import PeftModel

        if not hasattr(model.base_model, "merge_and_unload"):
            raise _unmergeable(config["peft_type"])
        with quiet():
            import tempfile

            with tempfile.TemporaryDirectory() as temporary:
                save(tree, Path(temporary))
                loaded = PeftModel.from_pretrained(copy.deepcopy(backbone.model), temporary)
                # Not merge_and_unload: for some methods it stumbles over a head of several layers (RoBERTa's).
                loaded.merge_adapter()
                names = {
                    n.replace(".base_layer.", ".").replace(".modules_to_save.default.", "."): p
                    for n, p in loaded.base_model.model.named_parameters()
                }
                plain = {n for n, _ in backbone.model.named_parameters()}
                write_model(backbone, {n: p.detach() for n, p in names.items() if n in plain}, folder)

    def resized(rank: int) -> Tree:
        if config["peft_type"] != "LORA":
            return fixed(rank)
        other = peft(backbone, **{**config, "r": rank, "lora_alpha": scaling * rank})
        return other.init

    around_or_none = around if PROMPT in paths else None
    bind = binder(model, paths, backbone.unread, scaling, around_or_none)
    return Technique(config["peft_type"].lower(), backbone, initial, resized, bind, save, merge, scaling)


def _check(config: dict[str, Any]) -> None:
    """PEFT would say what is wrong with a key or a number in words of its own, without naming it."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    known = typing.get_type_hints(PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]])
    for name, value in config.items():
        if name not in known:
            raise ConfigError(f"unknown key 'technique.{name}' for peft_type '{config['peft_type']}': {nearest(name, known)}")
        if known[name] in (int, float) and not isinstance(value, int | float):
            raise ConfigError(f"'technique.{name}' should be a number (got {value!r})")


def positions_taken(technique: Technique) -> int:
    """How many of the model's positions the prompt or prefix takes from the texts.

    A prompt is a part of the text, and a cache counts as text already read; what our own attention carries takes none.
    """
    if technique.takes:
        return technique.takes
    if technique.kind == "prefix" and not _takes_cache(technique.backbone.model):
        return 0
    return technique.init[PROMPT].shape[0] if PROMPT in technique.init else 0


def fixed(size: int) -> Tree:
    raise ConfigError("clients.ranks is for technique lora, clients.lengths for prefix and prompt: this one has neither")


def _length(length: int) -> int:
    if length < 1:
        raise ConfigError(f"technique.length must be at least 1 (got {length})")
    return length


def targets_of(backbone: Backbone, usual: set[str], asked: list[str] | None = None) -> list[str]:
    """The layers asked for, or those of this model that have a usual name.

    Raises:
        ConfigError: there is none; names the linear layers there are.
    """
    modules = dict(backbone.model.named_modules())
    linear = {name.rpartition(".")[2] for name, module in modules.items() if type(module).__name__ in ("Linear", "Conv1D")}
    for name in asked or []:
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            raise ConfigError(f"technique.target: this model has no layer '{name}': {nearest(name, linear)}")
    found = asked or sorted(linear & usual)
    if not found:
        raise ConfigError(f"technique.target: none of the usual layers found; choose one of: {', '.join(sorted(linear))}")
    return found


def _unmergeable(peft_type: str) -> ConfigError:
    return ConfigError(f"a {peft_type.lower()} adapter cannot be merged into the weights: export it without --merge")


def _write(backbone: Backbone, tree: Tree, initial: Tree, config: Any, scaling: float, folder: Path) -> None:
    """The folder that PeftModel.from_pretrained reads."""
    folder.mkdir(parents=True, exist_ok=True)
    out, own = _exportable(tree, initial, config, scaling)
    own.base_model_name_or_path = backbone.source
    own.inference_mode = True
    own.save_pretrained(str(folder))
    path = folder / "adapter_model.safetensors"
    with wire.saving(path):
        save_file({name: t.contiguous() for name, t in out.items()}, str(path), {"format": "pt"})
    save_frame(tree, folder)
    backbone.processor.save_pretrained(str(folder))
    (folder / "labels.json").write_text(json.dumps(backbone.labels, indent=1), encoding="utf-8")


def _takes_cache(model: nn.Module) -> bool:
    import inspect

    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    asked = (inner,) if hasattr(model, "given") else (model, inner)  # a part of a cut model names it in any case
    return any("past_key_values" in inspect.signature(m.forward).parameters for m in asked)


def _paths(model: nn.Module, saved: dict[str, Tensor]) -> dict[str, str]:
    """PEFT's saved names -> names of the trained parameters that they come from."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    by_memory = {p.data_ptr(): name for name, p in trained.items()}
    paths = {name: by_memory[t.data_ptr()] for name, t in saved.items() if t.data_ptr() in by_memory}
    left = [name for name in trained if name not in paths.values()]
    if PROMPT in saved and len(left) == 1:
        paths[PROMPT] = left[0]  # PEFT saves a copy of the table
        left = []
    if left:
        raise ConfigError(
            f"technique: PEFT trains '{left[0]}' but does not save it, so it cannot be exchanged: leave that option out"
        )
    return paths


@contextmanager
def _at_length(own: nn.Module, length: int) -> Iterator[None]:
    """Clients may differ in prefix length: these modules are the thread's own, so their configuration may be set."""
    own.peft_config["default"].num_virtual_tokens = length  # type: ignore[index,union-attr]
    yield


def _exportable(tree: Tree, initial: Tree, config: Any, scaling: float) -> tuple[dict[str, Tensor], Any]:
    """(tensors to save, PEFT's configuration for them): sizes follow the tree, a merged delta becomes extra ranks."""
    # A name that the tree lacks keeps its start: FFA's A is never sent.
    out: dict[str, Tensor] = {**initial, **{name: tree[name] for name in initial if name in tree}}
    config = copy.deepcopy(config)
    if PROMPT in out:
        config.num_virtual_tokens = out[PROMPT].shape[0]
    suffix = ".lora_A.weight"
    modules = [name[: -len(suffix)] for name in out if name.endswith(suffix)]
    if not modules:
        return out, config
    for module, delta in tree.get(DELTA, {}).items():
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        kept = s > s[0] * 1e-7 if s[0] > 0 else torch.zeros_like(s, dtype=torch.bool)
        root = s[kept].sqrt()
        b, a = (u[:, kept] * root).float(), (root[:, None] * v[kept]).float()
        out[module + suffix] = torch.cat([out[module + suffix], a])
        out[f"{module}.lora_B.weight"] = torch.cat([out[f"{module}.lora_B.weight"], b], 1)
    rank = max(out[m + suffix].shape[0] for m in modules)
    for m in modules:
        a, b = out[m + suffix], out[f"{m}.lora_B.weight"]
        out[m + suffix] = torch.cat([a, a.new_zeros(rank - a.shape[0], a.shape[1])])
        out[f"{m}.lora_B.weight"] = torch.cat([b, b.new_zeros(b.shape[0], rank - b.shape[1])], 1)
    config.r, config.lora_alpha = rank, scaling * (rank**0.5 if config.use_rslora else rank)
    return out, config
