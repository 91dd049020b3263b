"""What a stranger's reply must be for an algorithm to take it: names, shapes and dtypes, which the letter or the job tells.

A federation looks at every reply so before the algorithm does; in a simulation nobody is a stranger. Values are not looked at: whoever
sends a tree of the right form has a vote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedtailor.core import Job, Message, Tree
from fedtailor.trees import leaves

Check = Callable[[Message, Message], str]
"""(letter, reply) -> what is wrong, in words; "" if nothing is."""
COUNTS = 1e15
"""No count is larger."""


def checks(job: Job, **by_verb: Check) -> Check:
    """The check of the letter's verb; "answer" is an evaluation where nothing else is said."""
    known = {"answer": judged(job), **by_verb}

    def check(letter: Message, reply: Message) -> str:
        if letter.verb not in known:
            return f"a letter '{letter.verb}' is none of a member's"
        try:
            return known[letter.verb](letter, reply)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
            return f"its reply to '{letter.verb}' is malformed ({type(error).__name__}: {str(error)[:100]})"

    return check


def update(
    like: Callable[[Message, Message], Tree] = lambda letter, reply: letter.body,
    needs: Sequence[str] = ("n",),
    smaller: bool = False,
    verb: str = "update",
) -> Check:
    """The check of a reply whose body is like this tree, the letter's where nothing is said, and whose info has these numbers."""

    def check(letter: Message, reply: Message) -> str:
        return spoken(reply, (verb,), needs) or difference(reply.body, like(letter, reply), smaller)

    return check


def spoken(reply: Message, verbs: Sequence[str], needs: Sequence[str] = ()) -> str:
    """What is wrong with a reply's verb and numbers."""
    if reply.verb not in verbs:
        return f"it replies '{reply.verb[:40]}', where {' or '.join(verbs)} was expected"
    missing = [name for name in needs if name not in reply.info]
    return f"its reply lacks {', '.join(missing)}" if missing else ""


def difference(got: Mapping[str, Any], want: Mapping[str, Any], smaller: bool = False) -> str:
    """The first leaf of `got` that is not as in `want`; with `smaller` axes may be shorter, but not empty."""
    mine, theirs = dict(leaves(want)), dict(leaves(got))
    for name in sorted(mine.keys() | theirs.keys()):
        if name not in theirs or name not in mine:
            return f"'{name[:100]}' is {'missing' if name in mine else 'not expected'}"
        if why := unlike(theirs[name], mine[name], smaller):
            return f"'{name[:100]}' {why}"
    return ""


def unlike(got: Any, want: Any, smaller: bool = False) -> str:
    """In what a leaf differs from another, not looking at values."""
    if not isinstance(want, Tensor) or not isinstance(got, Tensor):
        return "" if type(got) is type(want) else f"is a {type(got).__name__}, expected a {type(want).__name__}"
    # Filters give float32, whatever floats they were given.
    same = got.dtype in (want.dtype, torch.float32) if want.is_floating_point() else got.dtype == want.dtype
    fits = got.dim() == want.dim() and all(a == b or (smaller and 0 < a < b) for a, b in zip(got.shape, want.shape, strict=True))
    return "" if same and fits else f"is {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}"


def judged(job: Job) -> Check:
    """The check of a reply to an evaluation."""

    def check(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("judged",), ("n",)):
            return why
        if extra := reply.body.keys() - {"test", "global"}:
            return f"'{min(extra)[:100]}' is not expected"
        return next((why for sums in reply.body.values() if (why := tallied(job, sums))), "")

    return check


def tallied(job: Job, sums: Mapping[str, Any]) -> str:
    """What is wrong with sums over rows: they are those of the metric, of one row at least, and no part is more than the whole."""
    none, rows = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    want = job.tally({"nll": none, "predicted": rows, "confidence": none, "label": rows, "tokens": rows, "hits": rows})
    if why := difference(sums, want):
        return why
    n, of = float(sums["n"]), float(sums["tokens" if "tokens" in want else "n"])
    if not (1 <= n <= COUNTS and 0 <= float(sums["correct"]) <= of <= COUNTS and float(sums["nll"]) > -1e-3 * n):
        return "its sums are not those of any rows"
    table = sums.get("confusion")
    if table is not None and (bool((table < 0).any()) or float(table.double().sum()) != n):
        return "its table of right and wrong does not add up to its rows"
    bins = sums.get("bins")
    if bins is not None and (bool((bins < 0).any()) or bins[:, [0, 2]].sum(0).tolist() != [n, float(sums["correct"])]):
        return "its bins of confidence do not add up to its rows"
    return ""
