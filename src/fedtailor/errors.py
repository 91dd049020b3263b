"""Errors a user can act on: one line each (what, where, nearest valid choice), one exit code each."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class FedtailorError(Exception):
    """A failure that is explained in one line; `exit_code` is what the command line ends with."""

    exit_code = 4


class ConfigError(FedtailorError):
    """Bad usage or a bad experiment file (exit code 2)."""

    exit_code = 2


class DataError(FedtailorError):
    """Data or weights that cannot be used as they are (exit code 3)."""

    exit_code = 3


class RunError(FedtailorError):
    """The run itself failed: lost clients, a corrupt checkpoint, a full disk (exit code 4)."""


def first_line(error: BaseException) -> str:
    """The first line of somebody else's error that says something; its type where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint that ends an error line: the closest valid choice, or all of them when none is close."""
    known = sorted(str(c) for c in choices)
    close = [k for k in known if k.lower() == word.lower()] or get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"choose one of: {', '.join(known)}"


def one_of(key: str, value: str, known: Iterable[str]) -> str:
    """The value, if it is one of these.

    Raises:
        ConfigError: it is not; names the nearest.
    """
    if value not in (choices := list(known)):
        raise ConfigError(f"{key} cannot be '{value}': {nearest(value, choices)}")
    return value
