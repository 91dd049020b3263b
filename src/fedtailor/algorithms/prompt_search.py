"""Search for a discrete prompt with nothing but scores from the clients: no gradient, no weight, no text of theirs moves.

Rounds: the server proposes candidates (trees of the technique `template`), clients score them on rows of their own, all candidates on
the same rows, and answer with sums; the server adds the sums up and proposes anew. Down: texts. Up: three numbers a candidate.
A query is one candidate read on one row; `budget` bounds their number over the whole run.

A candidate counts by its difference to the best so far on the same rows: a client with one class, or with hard texts, favours nobody.
Two rules, both ours (arXiv 2601.00526 names prompt engineering, and no rule; prompts edited by their loss: GrIPS, arXiv 2203.07281;
successive halving: arXiv 1502.07943):
    evolve   every client of the cohort scores all candidates. The best `keep` stay, and what is known of them grows; the others make
             room for children by edits: a word replaced by one that the model takes for similar, put in or taken out; a class's text
             from another parent or from `descriptions`; another template; a solved example more or less.
    bandit   many candidates once, few of them at each client: it scores the best so far and `each` others, dealt in turn. When
             everyone alive has been scored the worse half goes, until one is left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fedtailor.algorithms.cards import card
from fedtailor.algorithms.checks import checks, spoken, tallied
from fedtailor.algorithms.prompt_edits import FRAMES, TEMPLATES, Edits, children
from fedtailor.core import (
    Algorithm,
    Batch,
    ClientId,
    Flow,
    Forward,
    Job,
    Message,
    Predict,
    Site,
    State,
    Talk,
    Tree,
    answer_with,
)
from fedtailor.errors import ConfigError, one_of
from fedtailor.techniques.template import SLOT, alternatives

RULES = ("evolve", "bandit")


@card("global", "3 numbers a candidate", "the candidates' texts", "ours", "template")
def prompt_search(
    job: Job,
    *,
    rule: str = "evolve",
    candidates: int = 16,
    keep: int = 4,
    each: int = 4,
    rows: int = 32,
    budget: int = 200_000,
    by: str = "loss",
    templates: list[str] = [],  # noqa: B006 (never written to)
    descriptions: list[list[str]] = [],  # noqa: B006
) -> Algorithm:
    """Discrete prompts, black box: candidates go down, scores come up; `budget` counts the queries of the whole run."""
    one_of("algorithm.rule", rule, RULES)
    one_of("algorithm.by", by, ("accuracy", "loss"))
    for name, value in {"budget": budget, "candidates": candidates, "keep": keep, "each": each, "rows": rows}.items():
        if value < 1:
            raise ConfigError(f"algorithm.{name} must be at least 1 (got {value})")
    if rule == "evolve" and keep >= candidates:
        raise ConfigError(
            f"algorithm.keep = {keep} leaves no room for new ones: set it below algorithm.candidates = {candidates}"
        )
    if candidates < 2:
        raise ConfigError("algorithm.candidates = 1 leaves nothing to choose from: set it to 2 or more")
    if not all(alternatives(text) for texts in descriptions for text in texts):
        raise ConfigError("algorithm.descriptions: a text is empty: write what a class's texts are about, or leave it out")
    for text in templates:
        if text.count(SLOT) != 1:
            raise ConfigError(f"algorithm.templates: '{text}' needs the slot {SLOT} exactly once")

    def init(params: Tree) -> State:
        if "template" not in params:
            raise ConfigError("algorithm prompt-search edits words: set technique.kind = 'template'")
        if descriptions and len(descriptions) != len(params["labels"]):
            raise ConfigError(f"algorithm.descriptions has {len(descriptions)} lists for {len(params['labels'])} classes")
        first = children([params], [params], candidates - 1, edits(params, 0))
        return {"pool": entries([params, *first]), "start": params, "best": params, "queries": 0, "turn": 0}

    def edits(start: Tree, turn: int) -> Edits:
        told = descriptions or [[f.format(text) for f in FRAMES for text in alternatives(label)] for label in start["labels"]]
        return Edits(job, [*templates, *TEMPLATES], told, start, turn)

    def score(own: Tree | None, msg: Message, site: Site) -> Flow:
        data, sums = site.data["train"], {}
        picked = torch.randperm(len(data), generator=site.random("score"))[: int(msg.info["rows"])].tolist()
        if picked:
            passes = job.passes(list(msg.body.values()))
            outputs = yield Predict(partial(judge_each, job.judge), msg.body, data.take(picked), passes)
            sums = {name: job.tally(unflattened(outputs, name)) for name in msg.body}
        return own, Message("scored", sums, {"n": float(len(picked)), "queries": float(len(picked) * len(sums))})

    def round(state: State, cohort: list[ClientId]) -> Talk:
        pool = state["pool"]
        dealt = dict.fromkeys(cohort, tuple(pool)) if rule == "evolve" else deal(pool, cohort, each)
        left, asked = budget - int(state["queries"]), sum(map(len, dealt.values()))
        share = min(rows, left // asked) if asked and len(pool) > 1 else 0  # the last of the budget is spent on fewer rows
        if left < asked and not state["queries"]:
            raise ConfigError(
                f"algorithm.budget = {budget} does not pay for one row of each of the {asked} candidates that the cohort scores in a "
                "round: raise it, or lower algorithm.candidates or clients.per_round"
            )
        if not share:
            return state
        letters = {  # equal letters are one
            names: Message("score", {name: pool[name]["prompt"] for name in names}, {"rows": float(share)})
            for names in set(dealt.values())
        }
        replies = yield {client: letters[names] for client, names in dealt.items()}
        # Who does not reply in time may have done the work all the same.
        unheard = sum(share * len(names) for client, names in dealt.items() if client not in replies)
        spent, turn = unheard + sum(int(reply.info["queries"]) for reply in replies.values()), int(state["turn"]) + 1
        if not replies:
            return {**state, "queries": int(state["queries"]) + spent}
        told = learned(pool, [replies[c].body for c in sorted(replies)], by)
        ranked = sorted(told, key=lambda name: (-standing(told[name]), int(name)))
        best = told[ranked[0]]["prompt"]
        if rule == "evolve":
            ranked = ranked[:keep]
            fresh = children(
                [told[n]["prompt"] for n in ranked],
                [e["prompt"] for e in told.values()],
                candidates - keep,
                edits(state["start"], turn),
            )
            grown = entries(fresh, 1 + max(map(int, pool)))
        else:
            grown, leader = {}, leader_of(pool)
            if all(entry["fresh"] for name, entry in told.items() if name != leader):  # scored since the last cut
                ranked = ranked[: -(-len(ranked) // 2)]
                told = {name: {**entry, "fresh": 0.0} for name, entry in told.items()}
        kept = {name: told[name] for name in sorted(ranked, key=int)}
        return {**state, "pool": {**kept, **grown}, "best": best, "queries": int(state["queries"]) + spent, "turn": turn}

    def scored(letter: Message, reply: Message) -> str:
        if why := spoken(reply, ("scored",), ("n", "queries")):
            return why
        if reply.body.keys() not in (set(), letter.body.keys()) or not 0 <= reply.info["queries"] <= rows * len(letter.body):
            return "it scores other candidates than it was asked for"
        return next((why for sums in reply.body.values() if (why := tallied(job, sums))), "")

    answer, judged = answer_with(job, lambda state: state["best"])
    return Algorithm(
        init=init,
        round=round,
        client={"score": score, "answer": judged},
        answer=answer,
        model=lambda state: state["best"],
        trains=False,
        updates=False,
        check=checks(job, score=scored),
    )


def judge_each(judge: Any, forward: Forward, candidates: Tree, batch: Batch) -> Tree:
    """Outputs of every candidate on the same batch, as "name/output"; the technique reads a batch once for equal templates."""
    found: Tree = {}
    # Equal templates one after the other: the technique keeps what it read last.
    for name in sorted(candidates, key=lambda name: (candidates[name]["template"], candidates[name]["shown"], int(name))):
        found |= {f"{name}/{key}": value for key, value in judge(forward, candidates[name], batch).items()}
    return found


def unflattened(outputs: Tree, name: str) -> Tree:
    return {key.partition("/")[2]: value for key, value in outputs.items() if key.startswith(f"{name}/")}


def entries(prompts: Iterable[Tree], first: int = 0) -> Tree:
    """A pool: candidates by number, with what is known of them."""
    return {str(first + i): {"prompt": prompt, "gain": 0.0, "rows": 0.0, "fresh": 0.0} for i, prompt in enumerate(prompts)}


def standing(entry: Mapping[str, Any]) -> float:
    """How much better than the start of the search, a row; nothing is known of who was never scored."""
    return float(entry["gain"]) / float(entry["rows"]) if entry["rows"] else -math.inf


def leader_of(pool: Mapping[str, Any]) -> str:
    return min(pool, key=lambda name: (-standing(pool[name]), int(name)))


def deal(pool: Mapping[str, Any], cohort: Sequence[ClientId], each: int) -> dict[ClientId, tuple[str, ...]]:
    """The leader and `each` others to each client, in turn, from those on who have been scored least."""
    leader = leader_of(pool)
    waiting = sorted(
        (name for name in pool if name != leader),
        key=lambda name: (float(pool[name]["fresh"]), float(pool[name]["rows"]), int(name)),
    )
    each = min(each, len(waiting))
    return {
        client: (leader, *(waiting[(i * each + j) % len(waiting)] for j in range(each)))
        for i, client in enumerate(cohort)
        if waiting
    }


def learned(pool: Mapping[str, Any], replies: Sequence[Tree], by: str) -> dict[str, Tree]:
    """The pool after these replies: each candidate's difference to the leader on the same rows, on the leader's scale."""
    leader = leader_of(pool)
    base = standing(pool[leader]) if pool[leader]["rows"] else 0.0
    told = {}
    for name, entry in pool.items():
        pairs = [(value(reply[name], by), value(reply[leader], by)) for reply in replies if name in reply and leader in reply]
        seen = sum(weight for (_, weight), _ in pairs)
        gained = sum(mine - its for (mine, _), (its, _) in pairs) + base * seen
        told[name] = {
            "prompt": entry["prompt"],
            "gain": float(entry["gain"]) + gained,
            "rows": float(entry["rows"]) + seen,
            "fresh": float(entry["fresh"]) + seen,
        }
    return told


def value(sums: Mapping[str, Any], by: str) -> tuple[float, float]:
    """(what to make large, rows or tokens it is the sum over)."""
    weight = float(sums["tokens" if "tokens" in sums else "n"])
    return (float(sums["correct"]) if by == "accuracy" else -float(sums["nll"])), weight
