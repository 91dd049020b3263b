"""The report's figures, as plain plotly specifications; the page's script adds the colours of the light or dark theme.

Text that comes from files goes through `plain`: plotly reads a small HTML (`<a href>`, `<b>`) in every label.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from fedtailor.report.folders import LOWER_IS_BETTER, Run, number

COLOURS = ("#3b82f6", "#e8710a", "#12a37f", "#d6457f", "#8b5cf6", "#b8860b", "#0e9fbd", "#8d6e63")
DASHES = ("solid", "dash", "dot")  # for more runs than colours
WORST = "#e8710a"
DOWN = "#12a37f"
BYTES, COUNT = {"tickformat": "~s", "ticksuffix": "B"}, {"tickformat": "~s"}


class Figure(NamedTuple):
    title: str
    says: str  # the figure in words, for who does not see it
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    x: dict[str, list[list[float]]] | None = None  # other x values for each trace: "round", "bytes", "clock"
    note: str = ""  # below the title


def plain(text: str, width: int = 60) -> str:
    return html.escape(text if len(text) <= width else text[: width - 1] + "…", quote=False)


def style(i: int) -> dict[str, str]:
    return {"color": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)]}


def steps(rounds: Sequence[float]) -> dict[str, Any]:
    """Ticks at whole rounds only."""
    return {"tickformat": "d", **({"dtick": 1} if rounds and max(rounds) - min(rounds) < 10 else {})}


def axes(runs: Sequence[Run]) -> dict[str, str]:
    """What the curves can be drawn over: {name: words}. The clock only counts where it moved."""
    found = {"round": "round"}
    if any(run.summed("bytes_up", "bytes_down") for run in runs):
        found["bytes"] = "bytes sent so far"
    if any(number(line.get("clock")) for run in runs for line in run.rounds):
        found["clock"] = "seconds " + " or ".join(dict.fromkeys(run.clock for run in runs))
    return found


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Validation metric (a figure a metric), losses and aggregation error over the rounds; a colour a run."""
    figures = []
    for metric in dict.fromkeys(run.metric for run in runs):
        same = [(i, run) for i, run in enumerate(runs) if run.metric == metric]
        figures.append(_curve(same, "valid", f"Validation {metric}"))
    every = list(enumerate(runs))
    figures.append(_curve(every, "loss", "Training loss"))
    figures.append(_curve(every, "valid_loss", "Validation loss"))
    figures.append(_curve(every, "aggregation_error", "Aggregation error"))
    return [figure for figure in figures if figure]


def _curve(runs: list[tuple[int, Run]], name: str, title: str) -> Figure | None:
    data, words = [], []
    x: dict[str, list[list[float]]] = {axis: [] for axis in axes([run for _, run in runs])}
    for i, run in runs:
        sent = accumulate((number(r.get("bytes_up")) or 0) + (number(r.get("bytes_down")) or 0) for r in run.rounds)
        points = [(line, total, number(line.get(name))) for line, total in zip(run.rounds, sent, strict=True)]
        known = [(line, total, y) for line, total, y in points if y is not None]
        if not known:
            continue
        over: dict[str, Callable[[dict[str, Any], float], float]] = {
            "round": lambda line, total: line["round"],
            "bytes": lambda line, total: total,
            "clock": lambda line, total: number(line.get("clock")) or 0,
        }
        for axis, values in x.items():
            values.append([over[axis](line, total) for line, total, _ in known])
        y = [round(v, 6) for _, _, v in known]
        mode = "lines+markers" if len(y) <= 40 else "lines"
        trace = {"type": "scatter", "mode": mode, "x": x["round"][-1], "y": y, "line": {**style(i), "width": 2}}
        hover = f"{plain(run.label)}: %{{y}}<extra></extra>"
        data.append({**trace, "name": plain(run.label), "run": i, "marker": {"size": 5}, "hovertemplate": hover})
        words.append(f"{run.label} from {y[0]:.4g} to {y[-1]:.4g}")
    says = f"{title} over rounds: " + "; ".join(words)
    layout = {
        "xaxis": steps([n for values in x["round"] for n in values]),
        "hovermode": "x unified" if len(data) > 1 else "closest",
    }
    return Figure(title, says, data, layout, x) if data else None


def costs(run: Run) -> list[Figure]:
    """Bytes and FLOPs of every round."""
    rounds = [line["round"] for line in run.rounds]
    axis = {"title": {"text": "round"}, **steps(rounds)}
    legend = {"showlegend": True, "barmode": "stack"}
    bars = []
    for name, words, colour in (("bytes_up", "up", COLOURS[0]), ("bytes_down", "down", DOWN)):
        y = [number(line.get(name)) or 0 for line in run.rounds]
        hover = f"round %{{x}}, {words}: %{{y:.4s}}B<extra></extra>"
        bars.append({"type": "bar", "name": words, "x": rounds, "y": y, "marker": {"color": colour}, "hovertemplate": hover})
    flops = [number(line.get("flops")) or 0 for line in run.rounds]
    one = {"type": "bar", "x": rounds, "y": flops, "marker": {"color": COLOURS[4]}, "name": "FLOPs"}
    one["hovertemplate"] = "round %{x}: %{y:.4s} FLOPs<extra></extra>"
    up, down = run.summed("bytes_up"), run.summed("bytes_down")
    says = f"Bytes a round over {len(rounds)} rounds: {up:.4g} bytes up and {down:.4g} down in all"
    work = f"FLOPs a round over {len(rounds)} rounds: {sum(flops):.4g} in all"
    found = [Figure("Bytes a round", says, bars, {"xaxis": axis, "yaxis": BYTES, **legend})] if up + down else []
    return [*found, Figure("FLOPs a round", work, [one], {"xaxis": axis, "yaxis": COUNT})] if rounds else []


def worst(n: int) -> int:
    """How many clients the worst decile is, as in the summary."""
    return max(1, round(n / 10))


def clients(run: Run) -> Figure | None:
    """A bar a client, worst first; the worst decile in another colour."""
    rows = run.scores
    if not rows:
        return None
    names, n = distinct([client for client, _, _ in rows]), worst(len(rows))
    own = [round(score, 6) for _, score, _ in rows]
    mean = number(run.summary.get("clients_mean"))
    mean = sum(own) / len(own) if mean is None else mean
    hover = f"%{{x}}: {plain(run.metric)} %{{y}}<extra></extra>"
    parts = (("worst decile", WORST, slice(0, n)), ("the others", COLOURS[0], slice(n, None)))
    data: list[dict[str, Any]] = [
        {"type": "bar", "name": name, "x": names[at], "y": own[at], "marker": {"color": colour}, "hovertemplate": hover}
        for name, colour, at in parts
        if names[at]
    ]
    wide = [w for _, _, w in rows]
    if any(w is not None for w in wide):
        dots = {"type": "scatter", "mode": "markers", "name": "on the global test set", "x": names, "y": wide}
        data.append({**dots, "marker": {"size": 7, "symbol": "diamond", "color": COLOURS[3]}, "hovertemplate": hover})
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": mean, "y1": mean, "line": {"dash": "dash", "width": 1.5}}
    # The words stand over the short bars: the worst clients, or the best where low is good.
    side = {"x": 1, "xanchor": "right"} if run.metric in LOWER_IS_BETTER else {"x": 0, "xanchor": "left"}
    note = {"xref": "paper", "y": mean, "yanchor": "bottom", "showarrow": False, **side}
    axis = {"type": "category", "categoryorder": "array", "categoryarray": names, "showgrid": False, **named(len(names))}
    title = f"{len(rows):,} clients, worst first" if len(rows) > 1 else "1 client"
    layout = {
        "xaxis": {**axis, "title": {"text": title}},
        "yaxis": {"title": {"text": plain(run.metric)}},
        "shapes": [line],
        "annotations": [{**note, "text": f"mean {mean:.4g}"}],
        "showlegend": True,
        "bargap": 0.15 if len(rows) <= 60 else 0,
    }
    says = f"{run.metric} of {len(rows)} clients on their own test splits: from {own[0]:.4g} to {own[-1]:.4g}, mean {mean:.4g}"
    return Figure("Each client on its own test split", says, data, layout)


def spread(runs: Sequence[Run]) -> list[Figure]:
    """Several runs' clients, worst first, over the share of clients; a figure a metric."""
    figures = []
    for metric in dict.fromkeys(run.metric for run in runs):
        data, words = [], []
        for i, run in enumerate(runs):
            own = [round(score, 6) for _, score, _ in run.scores]
            if run.metric != metric or not own:
                continue
            x = [100 * (k + 1) / len(own) for k in range(len(own))]
            mode = "lines+markers" if len(own) <= 40 else "lines"
            trace = {"type": "scatter", "mode": mode, "x": x, "y": own, "run": i, "line": {**style(i), "width": 2}}
            hover = f"{plain(run.label)}: %{{y}}<extra></extra>"
            data.append({**trace, "name": plain(run.label), "marker": {"size": 5}, "hovertemplate": hover})
            words.append(f"{run.label} from {own[0]:.4g} to {own[-1]:.4g}")
        layout = {
            "xaxis": {"title": {"text": "clients, worst first"}, "ticksuffix": " %"},
            "yaxis": {"title": {"text": plain(metric)}},
        }
        title = f"Clients' own {metric}, worst first"
        figures += [Figure(title, f"{title}: " + "; ".join(words), data, layout)] if data else []
    return figures


def partition(run: Run) -> Figure | None:
    """Who holds what: clients by classes, or, without classes, the examples of each client."""
    held = run.summary.get("partition") or {}
    counts = [[int(v) for v in row] for row in held.get("counts", [])]
    if not counts:
        return None
    rows = list(zip(distinct([str(c) for c in held["clients"]]), counts, strict=True))
    labels = distinct([str(label) for label in held.get("labels") or []])
    sizes = [sum(row) for row in counts]
    says = f"{sum(sizes)} training examples on {len(rows)} clients, {min(sizes)} to {max(sizes)} each"
    classes = len(counts[0])
    if classes < 2:
        rows.sort(key=lambda row: -row[1][0])
        axis = {"type": "category", "title": {"text": f"{len(rows):,} clients"}, "showgrid": False, **named(len(rows))}
        bars = {"type": "bar", "x": [name for name, _ in rows], "y": [row[0] for _, row in rows]}
        one = {**bars, "marker": {"color": COLOURS[0]}, "hovertemplate": "%{x}: %{y} examples<extra></extra>"}
        sizes_of = {"xaxis": axis, "yaxis": {"title": {"text": "training examples"}}}
        return Figure("Training examples of each client", says, [one], sizes_of)
    if len(rows) > 60:  # many clients in the order of their names are noise: by their commonest class, then by size
        rows.sort(key=lambda row: (row[1].index(max(row[1])), -sum(row[1])))
    labels = labels if len(labels) == classes else [str(k) for k in range(classes)]
    z = [row for _, row in rows]
    trace: dict[str, Any] = {"type": "heatmap", "x": labels, "y": [name for name, _ in rows], "z": z, "xgap": 1}
    trace["ygap"] = 1 if len(rows) <= 60 else 0
    trace["hovertemplate"] = "%{y}, %{x}: %{z} examples<extra></extra>"
    trace["colorbar"] = {"thickness": 12, "outlinewidth": 0, "tickformat": "~s"}
    ticks = {
        "type": "category",
        **named(len(rows)),
        "title": {"text": "" if len(rows) <= 60 else f"{len(rows):,} clients"},
    }
    layout: dict[str, Any] = {"xaxis": {"type": "category"}, "yaxis": {**ticks, "autorange": "reversed"}}
    layout["height"] = min(720, max(260, 150 + 18 * len(rows)))
    title = "Training examples by client and class"
    return Figure(title, f"{says}, {classes} classes", [trace], layout)


def named(n: int) -> dict[str, Any]:
    """An axis of n clients shows their names while they can be read."""
    return {"showticklabels": n <= 60, "ticks": ""}


def distinct(names: list[str]) -> list[str]:
    """Names as axis labels: short, escaped, no two alike (plotly would merge them)."""
    short = [plain(name, 24) for name in names]
    return short if len(set(short)) == len(short) else [f"{name} #{i}" for i, name in enumerate(short, 1)]
