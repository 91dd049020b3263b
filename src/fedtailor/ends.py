"""The ends of a cut model where nothing else of it is: what a member of a split federation loads, and what it is told of the rest."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import nn

from fedtailor import wire
from fedtailor.algorithms.split_rules import ENDS, dealt
from fedtailor.backbone import Backbone, fork
from fedtailor.config import Experiment
from fedtailor.core import Layers, Tree
from fedtailor.cut import cut_at, held_layers, parts, sever
from fedtailor.errors import ConfigError
from fedtailor.options import algorithm_named, checked
from fedtailor.techniques import Technique


class Ends(NamedTuple):
    """A client's part of the model. What only the whole model tells, the server tells."""

    front: int  # layers
    back: int
    start: Tree | None = None  # the technique's initial tree, of these ends; None: the weights as they are loaded
    unread: str | None = None  # `Backbone.unread`


def cut_of(experiment: Experiment, number: int) -> tuple[int, int] | None:
    """(layers at the front, at the back) of the client of this place, without a model; None where nothing is cut.

    Raises:
        ConfigError: the cut is counted on the whole model.
    """
    factory = algorithm_named(experiment.algorithm.kind)
    known = inspect.signature(factory).parameters
    if not {"front", "back"} <= known.keys():
        return None
    options = checked(factory, "algorithm", experiment.algorithm.options, "job")
    front, back = (options.get(name, known[name].default) for name in ENDS)
    limited = "least_front" in known and any(device.memory_mb for device in experiment.clients.devices)
    if isinstance(front, str) or limited:
        why = "memory_mb of clients.devices" if limited else f"algorithm.front = '{front}'"
        raise ConfigError(
            f"{why}: such a cut is counted on the whole model, which members do not hold: "
            "set algorithm.front and back to numbers (`fedtailor plan` counts them), and leave memory_mb out"
        )
    return dealt(front, number), dealt(back, number)


def ends_of(cut: tuple[int, int], technique: Technique, layers: Layers) -> Ends:
    """What the server of this technique tells a client that is cut so."""
    if technique.kind == "full":
        return Ends(*cut, unread=technique.backbone.unread)
    first, _, last = cut_at(layers, *cut)
    names = layers.part(technique.init, first).keys() | layers.part(technique.init, last).keys()
    start = {name: tensor for name, tensor in technique.init.items() if name in names}
    return Ends(*cut, start, technique.backbone.unread)


def technique_of(ends: Ends, kind: str, backbone: Backbone, make: Callable[[Backbone], Technique]) -> Technique:
    """The technique where only the ends are. It works part by part (`parts.on_part`); the ends alone have no forward."""
    if ends.start is None:
        return make(backbone)

    def nothing(*_: Any) -> Any:
        raise RuntimeError("this process holds a part of the model: the middle is at the server")

    return Technique(kind, backbone, ends.start, resized=nothing, bind=nothing, save=nothing, merge=nothing)


def severed(model: nn.Module, front: int, back: int) -> nn.Module:
    """The ends of a whole model: modules of their own, the same tensors."""
    own = fork(model)
    first, _, last = parts(held_layers(own)[0], front, back)
    sever(own, [first, last])
    return own


def save(tree: Tree, layers: Layers, ends: Ends, about: dict[str, Any], middle: Tree, folder: Path) -> None:
    """Keep a client's ends of a personal tree, its middle where it was sent one, and a page that says what they are.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first, _, last = cut_at(layers, ends.front, ends.back)
    own = {f"{end}.{n}": t for end, part in zip(ENDS, (first, last), strict=True) for n, t in layers.part(tree, part).items()}
    for name, tensors in (("ends", own), ("middle", middle)):
        path = folder / f"{name}.safetensors"
        path.unlink(missing_ok=True)
        if tensors:
            with wire.saving(path):
                save_file({n: t.contiguous().clone() for n, t in tensors.items()}, str(path), {"format": "pt"})
    says = {"front": ends.front, "back": ends.back, "layers": layers.depth, **about}
    (folder / "ends.json").write_text(json.dumps(says, indent=1), encoding="utf-8")
