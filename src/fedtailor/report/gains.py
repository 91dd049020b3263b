"""What a model of its own brings each client: over training alone, and over the model that all share. Who loses by it is seen first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedtailor.report.figures import COLOURS, DOWN, WORST, Figure, distinct, named, plain
from fedtailor.report.folders import LOWER_IS_BETTER, Run, number

TITLE = "What a model of its own brings a client"
ALONE = "local"  # the algorithm of those who exchange nothing
ALIKE = ("technique", "model", "train", "rounds")  # sections that two runs should have in common


def drawn(runs: Sequence[Run]) -> list[Figure]:
    """A figure for each of these runs whose clients have models of their own."""
    figures = (figure(run, alone(run, runs), run.label if len(runs) > 1 else "") for run in runs if personal(run))
    return [one for one in figures if one]


def personal(run: Run) -> bool:
    """Whether clients have models of their own, and not because nothing is shared."""
    return run.kind("algorithm") != ALONE and any(c.get("metric_global") or c.get("metric_shared") for c in run.clients)


def alone(run: Run, runs: Sequence[Run]) -> Run | None:
    """Which of the runs has the same clients with the same rows, each by itself; of several the one that is most like this."""
    found = [one for one in runs if one.finished and one.kind("algorithm") == ALONE and _held(one) == _held(run)]
    return max(found, key=lambda one: sum(one.experiment.get(s) == run.experiment.get(s) for s in ALIKE), default=None)


def _held(run: Run) -> tuple[Any, ...]:
    """What says who holds which rows, and how they are judged."""
    experiment, clients = run.experiment, run.experiment.get("clients", {})
    split = [clients.get(key) for key in ("count", "partition", "test", "valid", "newcomers")]
    return experiment.get("seed"), experiment.get("data"), split, run.metric


def over(run: Run, column: str, other: Run) -> dict[str, float]:
    """How much better each client's own model is on its own test rows than what a column of clients.csv says."""
    sign = -1.0 if run.metric in LOWER_IS_BETTER else 1.0
    before = {c["client"]: number(c.get(column)) for c in other.clients}
    known = [(client, own, before.get(client)) for client, own, _ in run.scores]
    return {client: sign * (own - than) for client, own, than in known if than is not None}


def figure(run: Run, by_itself: Run | None, label: str) -> Figure | None:
    """A bar a client, the least gain first: over training alone, with a mark over the shared model; over the shared model where nobody
    trained alone."""
    bases = {
        "local-only": over(run, "metric", by_itself) if by_itself else {},
        "the shared model": over(run, "metric_shared", run),
    }
    found = {words: gains for words, gains in bases.items() if gains}
    if not found:
        return None
    first, *others = found
    order = sorted(found[first], key=lambda client: found[first][client])
    names = dict(zip(order, distinct(order), strict=True))

    def trace(words: str, clients: Sequence[str]) -> dict[str, Any]:
        hover = f"%{{x}}: %{{y:+.4f}} {plain(run.metric)} over {words}<extra></extra>"
        return {
            "x": [names[c] for c in clients],
            "y": [round(found[words][c], 6) for c in clients],
            "hovertemplate": hover,
        }

    lost = [c for c in order if found[first][c] < 0]
    bars = ((f"loses to {first}", WORST, lost), (f"gains over {first}", DOWN, order[len(lost) :]))
    data = [
        {"type": "bar", "name": name, **trace(first, those), "marker": {"color": colour}} for name, colour, those in bars if those
    ]
    for words in others:
        mark = {"size": 7, "symbol": "diamond", "color": COLOURS[0]}
        dots = trace(words, [c for c in order if c in found[words]])
        data.append({"type": "scatter", "mode": "markers", "name": f"over {words}", **dots, "marker": mark})
    axis = {"type": "category", "categoryorder": "array", "categoryarray": list(names.values()), "showgrid": False}
    change = "fall" if run.metric in LOWER_IS_BETTER else "gain"
    layout = {
        "xaxis": {**axis, **named(len(names)), "title": {"text": f"{len(names):,} clients, least gain first"}},
        "yaxis": {"title": {"text": plain(f"{change} in {run.metric}")}},
        "showlegend": True,
        "bargap": 0.15 if len(names) <= 60 else 0,
    }
    title = f"{label}: gain of each client’s own model" if label else "Gain of each client’s own model"
    note = " ".join(_told(words, list(gains.values())) for words, gains in found.items())
    return Figure(title, f"{title}. {note}", data, layout, note=note)


def _told(words: str, values: Sequence[float]) -> str:
    losers = sum(value < 0 for value in values)
    spread = f"mean gain {sum(values) / len(values):+.4f}, least {min(values):+.4f}, largest {max(values):+.4f}"
    return f"{losers:,} of {len(values):,} clients lose to {words} ({spread})."
