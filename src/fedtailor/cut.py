"""A model cut by layer index: a part runs the model's own forward, and what it does not hold is never loaded.

    front   what comes before the layers, and the first layers            holds the inputs
    middle  layers in between                                             sees hidden states and masks only
    back    the last layers, what comes after them, and the head          holds the labels
A U-shape is front and back at a client and the middle at a server; without `back` layers at the client the server holds the `top`.
Layers keep their numbers and tensors their names, so techniques and checkpoints fit a part as they fit the whole.

An absent layer hands its input on; what stands before the layers is replaced in later parts by the hidden states that arrived; a part
that is not the last ends with hidden states where the whole model would have logits. transformers loads what is there and nothing
else: weights of absent layers stay on disk.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedtailor.backbone import fork
from fedtailor.core import Layers, Part
from fedtailor.errors import ConfigError

_given: contextvars.ContextVar[Tensor] = contextvars.ContextVar("given")


class Absent(nn.Module):
    """A layer that is somewhere else: what comes in goes on."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


class Given(nn.Module):
    """In the place of what turns inputs into hidden states: those that arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embeddings = nn.Module()  # whose dtype vision models ask for
        self.patch_embeddings.projection = nn.Module()
        self.patch_embeddings.projection.register_buffer("weight", torch.empty(0), persistent=False)

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return _given.get()


class GivenTable(nn.Embedding):
    """The same where a table of embeddings is the head's matrix as well: it is held, and not looked up."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return _given.get()


class Nothing(nn.Module):
    """In the place of positions that were added before."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return _given.get().new_zeros(())


@contextmanager
def given(hidden: Tensor) -> Iterator[None]:
    token = _given.set(hidden)
    try:
        yield
    finally:
        _given.reset(token)


def layers_of(base: nn.Module) -> tuple[str, nn.ModuleList]:
    """(name, the stack of layers) of a model without its head: the largest list of modules."""
    found = [(name, module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not found:
        raise ConfigError(f"a {type(base).__name__} cannot be cut: it has no list of layers")
    return max(found, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def held_layers(model: Any) -> tuple[int, list[int]]:
    """(layers of the whole model, numbers of those that are here)."""
    _, layers = layers_of(model.base_model)
    return len(layers), [number for number, layer in enumerate(layers) if not isinstance(layer, Absent)]


def parts(depth: int, front: int, back: int) -> tuple[Part, Part, Part]:
    """(front, middle, back) of a model with `depth` layers; `back` = 0 leaves the head to the middle, which then is the top.

    Raises:
        ConfigError: no layer is left for the middle, or a negative number.
    """
    if front < 0 or back < 0 or front + back >= depth:
        raise ConfigError(
            f"a model of {depth} layers cannot be cut into {front} at the front and {back} at the back: leave one or more between them"
        )
    first = Part(0, front, True, False)
    return first, Part(front, depth - back, False, back == 0), Part(depth - back, depth, False, True)


def cut_at(layers: Layers, front: int, back: int) -> tuple[Part, Part, Part]:
    """(front, middle, back) where the client has the head in any case: with no layer at the back it has that alone.

    Raises:
        ConfigError: no layer is left for the middle, or the technique needs more at the front.
    """
    if front < layers.least:
        raise ConfigError(
            f"algorithm.front = {front}: with this technique clients need {layers.least} layers at the front, or more"
        )
    first, between, last = parts(layers.depth, front, back)
    return first, between._replace(last=False), last


def sever(model: Any, held: Sequence[Part]) -> None:
    """Take out of `model` what none of these parts holds. Its `base_model` has its children in the order in which they run."""
    base, first, last = model.base_model, any(part.first for part in held), any(part.last for part in held)
    stack, layers = layers_of(base)
    for number in range(len(layers)):
        if not any(part.start <= number < part.stop for part in held):
            layers[number] = Absent()
    names = [name for name, _ in base.named_children()]
    place = names.index(stack.partition(".")[0])
    tied = getattr(model, "all_tied_weights_keys", {})
    if not first:
        for number, name in enumerate(names[:place]):
            module = getattr(base, name)
            if number == 0 and last and tied:  # its weights are the head's too
                module.__class__ = GivenTable
            else:
                # The first gives hidden states; positions, where they have a table of their own, were added to them before.
                setattr(base, name, Given() if number == 0 else Nothing() if isinstance(module, nn.Embedding) else nn.Identity())
    if not last:
        for name in names[place + 1 :]:
            if next(getattr(base, name).parameters(), None) is not None:  # rotary positions have none, and belong to every layer
                setattr(base, name, Absent())
        for name, _ in list(model.named_children()):
            if name != model.base_model_prefix:
                setattr(model, name, Absent())
        model.all_tied_weights_keys = {}


def only(model: Any, part: Part) -> Any:
    """One part of a model that holds several: modules of its own, the same tensors."""
    own = fork(model)
    sever(own, [part])
    own.__class__ = partial_class(type(model).__mro__[1] if hasattr(model, "given") else type(model), [part])
    return own


def partial_class(cls: type[Any], held: Sequence[Part]) -> type[Any]:
    """The class of transformers with a constructor that makes these parts only, so that nothing else is loaded, and a forward that
    begins with hidden states or ends with them where the part does."""
    return _partial(cls, any(part.first for part in held), any(part.last for part in held), lambda depth: held)


def ends_class(cls: type[Any], front: int, back: int) -> type[Any]:
    """The same of a front and a back of so many layers, whatever lies between them."""
    return _partial(cls, True, True, lambda depth: parts(depth, front, back)[::2])


def _partial(cls: type[Any], first: bool, last: bool, held: Callable[[int], Sequence[Part]]) -> type[Any]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        cls.__init__(self, config, *args, **kwargs)
        sever(self, held(len(layers_of(self.base_model)[1])))

    def forward(self: Any, hidden_states: Tensor | None = None, past_key_values: Any = None, **inputs: Any) -> Any:
        run = super(made, self).forward if last else self.base_model
        inputs = {"past_key_values": past_key_values, **inputs}  # in the signature, as PEFT looks for it there
        inputs = {name: x for name, x in inputs.items() if x is not None}  # it names all that a model might be given
        if first:
            found = run(**inputs)
        else:
            assert hidden_states is not None
            if "input_ids" not in inputs and "pixel_values" not in inputs:  # which a server does not have, nor needs
                empty = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=hidden_states.device)
                inputs[self.main_input_name] = empty
            with given(hidden_states):
                found = run(**inputs)
        return found if last else {"logits": found["last_hidden_state"]}

    made: type[Any] = type(
        cls.__name__, (cls,), {"__init__": __init__, "forward": forward, "__module__": cls.__module__, "given": not first}
    )
    return made
