"""What `fedtailor list` shows: read from the registries, their signatures and docstrings; there is no second list."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def _described(registry: Mapping[str, Any], skip: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    out = []
    for name, entry in sorted(registry.items()):
        parameters = inspect.signature(entry).parameters if callable(entry) else {}
        options = {
            n: "required" if p.default is inspect.Parameter.empty else p.default
            for n, p in parameters.items()
            if n not in skip
            and p.kind is not inspect.Parameter.VAR_KEYWORD
            and isinstance(p.default, str | int | float | list | tuple | dict | type | None)
        }
        options = {n: "required" if isinstance(v, type) else v for n, v in options.items()}
        entry_of = {"name": name, "summary": (inspect.getdoc(entry) or "").split("\n")[0], "options": options}
        out.append(entry_of | (entry.card._asdict() if hasattr(entry, "card") else {}))
    return out


def _techniques() -> list[dict[str, Any]]:
    from fedtailor.techniques import TECHNIQUES

    return _described(TECHNIQUES, ("backbone",))


def _algorithms() -> list[dict[str, Any]]:
    from fedtailor.algorithms import ALGORITHMS
    from fedtailor.options import CODE

    return _described(ALGORITHMS, ("job", *CODE))


def _datasets() -> list[dict[str, Any]]:
    from fedtailor.data.sources import EMBEDDED

    return _described(EMBEDDED, tuple(n for f in EMBEDDED.values() for n in inspect.signature(f).parameters))


def _models() -> list[dict[str, Any]]:
    from fedtailor.backbone import EMBEDDED

    return _described(EMBEDDED)


def _partitions() -> list[dict[str, Any]]:
    from fedtailor.data.partition import PARTITIONS

    return _described(PARTITIONS, ("count", "seed", "clients"))


def _filters() -> list[dict[str, Any]]:
    from fedtailor.filters import FILTERS

    return [{"name": name, "summary": summary} for name, (_, summary) in sorted(FILTERS.items())]


def _metrics() -> list[dict[str, Any]]:
    from fedtailor import metrics

    names = ("accuracy", "f1", "macro_f1", "matthews", "ece", "perplexity")
    return [{"name": n, "summary": (inspect.getdoc(getattr(metrics, n)) or "").split("\n")[0]} for n in names]


LISTS: Mapping[str, Callable[[], list[dict[str, Any]]]] = {
    "algorithms": _algorithms,
    "datasets": _datasets,
    "filters": _filters,
    "metrics": _metrics,
    "models": _models,
    "partitions": _partitions,
    "techniques": _techniques,
}


def listing(what: str) -> list[dict[str, Any]]:
    """Objects with at least `name` and `summary`."""
    return LISTS[what]()
