"""What a site brings to a federation: said in a file of its own, never in a job."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from fedtailor.errors import ConfigError, nearest
from fedtailor.federation.member import Limits, Own

FILE, MEMBER, RUN = "fedtailor.toml", "FEDTAILOR_MEMBER", "FEDTAILOR_RUN"
"""The file in the folder `local` of a site's kit, and what names another one; where a server keeps its runs."""
KEYS: dict[str, type | tuple[type, ...]] = {
    "data": str,
    "text": str,
    "pair": list,
    "label": str,
    "model": (str, list),
    "public": str,
    "device": str,
    "simulate": bool,
    "verbs": list,
    "mb_a_round": (int, float),
    "epochs": (int, float),
    "home": str,
}


class Brought(NamedTuple):
    own: Own
    limits: Limits
    home: str  # "": in the site's own folder


def brought(local: Path, site: str) -> Brought:
    """Read the site's file; `{site}` in it is the site's name, so that one file may serve several sites of one machine.

    Raises:
        ConfigError: it is not there, or says something that it cannot say.
    """
    path = Path(os.environ.get(MEMBER, "").replace("{site}", site) or local / FILE)
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8").replace("{site}", site))
    except FileNotFoundError:
        raise ConfigError(f"'{path}' is not there: say in it what this site brings, at least data = \"PATH\"") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    for key, value in found.items():
        if key not in KEYS:
            raise ConfigError(f"{path}: unknown key '{key}': {nearest(key, KEYS)}")
        if not isinstance(value, KEYS[key]) or (isinstance(value, bool) and KEYS[key] is not bool):
            raise ConfigError(f"{path}: {key} cannot be {value!r}")
    return _of(found, path)


def _of(found: dict[str, Any], path: Path) -> Brought:
    if not found.get("data") and not found.get("simulate"):
        raise ConfigError(f'{path}: name the site\'s data: data = "PATH"')
    pair = tuple(str(column) for column in found["pair"]) if "pair" in found else None
    if pair is not None and len(pair) != 2:
        raise ConfigError(f'{path}: pair are two columns: ["FIRST", "SECOND"]')
    models = found.get("model", [])
    own = {k: v for k, v in found.items() if k in Own._fields and k != "pair"}
    verbs = frozenset(str(verb) for verb in found.get("verbs", []))
    limits = Limits(verbs, 1e6 * found.get("mb_a_round", 0), found.get("epochs", 0))
    own |= {"pair": pair, "models": (models,) if isinstance(models, str) else tuple(map(str, models))}
    return Brought(Own(**own), limits, found.get("home", ""))
