"""One HTML page from run folders: no network, no framework, everything in one file.

write([Path("runs/a"), Path("runs/b")], Path("report.html"))
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fedtailor.errors import RunError
from fedtailor.report import figures, gains
from fedtailor.report.figures import Figure
from fedtailor.report.folders import Run, number, read


def write(runs: Sequence[Path], out: Path, note: str = "") -> Path:
    """Write the page of one run, or the comparison of several, to `out`; `note` says more of the comparison.

    Raises:
        ConfigError: a folder that holds no run. DataError: a run that cannot be read. RunError: `out` cannot be written.
    """
    page = html(read(runs), note)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write to '{out}': {error.strerror}") from error
    return out


def html(runs: Sequence[Run], note: str = "") -> str:
    from plotly.offline import get_plotlyjs

    script = str(get_plotlyjs())
    body = _single(runs[0]) if len(runs) == 1 else _several(runs, note)
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    size = f"{len(script.encode()) / 1e6:.1f} MB"
    footer = (
        f"<footer>Written by fedtailor. The page is one file and loads nothing from the network; "
        f"{size} of its size are plotly.js, which draws the figures.</footer>"
    )
    here = resources.files(__name__)
    return Template(here.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{title} · fedtailor"),
        style=here.joinpath("page.css").read_text(encoding="utf-8"),
        body=body + footer + _json(figures.axes(runs), 'id="axes"'),
        plotly=script,
    )


def _single(run: Run) -> str:
    title = f"<header><h1>{escape(run.label)}</h1>{_subtitle(run)}</header>"
    curves = figures.curves([run])
    return "".join(
        [
            title,
            _notice(run),
            _cards(run),
            _prompt(run),
            _section("Over the rounds", _over([run]) if curves else "", curves),
            _section(gains.TITLE, "", gains.drawn([run]), wide=True),
            _influence(run),
            _parts(run),
            _files(run),
        ]
    )


def _several(runs: Sequence[Run], note: str) -> str:
    metrics = " and ".join(dict.fromkeys(run.metric for run in runs if run.finished)) or "metric"
    curves, spread = figures.curves(runs), figures.spread(runs)
    boxes = "".join(
        f'<label><input type="checkbox" name="runs" value="{i}" checked>{_swatch(i)}{escape(run.label)}</label>'
        for i, run in enumerate(runs)
    )
    legend = f"<fieldset><legend>Runs&ensp;</legend>{boxes}</fieldset>"
    parts = "".join(
        f"<details><summary><h2>{escape(run.label)}</h2></summary>"
        f"{_subtitle(run)}{_notice(run)}{_cards(run)}{_prompt(run)}{_influence(run)}{_parts(run)}{_files(run)}</details>"
        for run in runs
    )
    told = f"Test metric: {escape(metrics)}" + (f". {escape(note)}" if note else "")
    return "".join(
        [
            f'<header><h1>{len(runs)} runs compared</h1><p class="soft">{told}</p></header>',
            _comparison(runs),
            _section("Over the rounds", legend + (_over(runs) if curves else ""), [*curves, *spread]),
            _section(gains.TITLE, "", gains.drawn(runs), wide=True),
            "<h2>Each run</h2>",
            parts,
        ]
    )


def _subtitle(run: Run) -> str:
    e, rounds = run.experiment, run.value("rounds") or run.experiment.get("rounds", "?")
    shown = [
        f"<strong>{escape(run.kind('algorithm'))}</strong> with <strong>{escape(run.kind('technique'))}</strong>",
        f"model {escape(str(e.get('model', {}).get('name', '?')))}",
        f"data {escape(str(e.get('data', {}).get('name', '?')))}",
        f"{_count(run.summary.get('clients') or e.get('clients', {}).get('count'))} clients",
        f"{_count(rounds)} rounds",
        f"seed {escape(str(e.get('seed', '?')))}",
    ]
    return f'<p>{" · ".join(shown)}</p><p class="soft">{escape(str(run.folder))}</p>'


def _notice(run: Run) -> str:
    if run.finished:
        return ""
    done, planned = run.rounds[-1]["round"] if run.rounds else 0, run.experiment.get("rounds", "?")
    text = f"This run is not finished: {done} of {planned} rounds done, not yet evaluated on the test sets."
    return f'<p class="warn" role="note">{escape(text)} Go on with <code>--resume</code>.</p>'


def _cards(run: Run) -> str:
    scores = [("Global test", "global_test"), ("Clients' mean", "clients_mean"), ("Worst decile", "clients_worst_decile")]
    notes = {
        "global_test": _without_training(run),
        "clients_mean": "own test splits",
        "clients_worst_decile": "mean of the worst tenth",
    }
    cards = [(title, _score(run.value(name)), run.metric + ", " + notes[name]) for title, name in scores if run.finished]
    if not run.finished:
        seen = [line["valid"] for line in run.rounds if number(line.get("valid")) is not None]
        cards = [("Validation", _score(seen[-1]), run.metric + ", last")] if seen else []
    with_shared = run.value("clients_mean_shared")
    cards += [("With the shared model", _score(with_shared), run.metric + ", clients' mean")] if with_shared is not None else []
    for name, words in (("newcomers_mean", "as they come"), ("newcomers_joined_mean", "joined")):
        mean = run.value(name) if run.finished else None
        cards += [(f"Newcomers {words}", _score(mean), run.metric + ", own test splits")] if mean is not None else []
    clock = run.value("simulated_seconds")
    cards += [
        ("Bytes up", _bytes(run.value("bytes_up_per_client_round")), "a client and round"),
        ("Bytes down", _bytes(run.value("bytes_down_per_client_round")), "a client and round"),
        ("Bytes in all", _bytes(run.value("bytes_total")), "both ways"),
        ("Trained", _count(run.value("trainable_parameters")), "parameters"),
        (
            "FLOPs",
            _si(run.value("flops_per_example")),
            f"an example, forward{'' if run.value('trainable_parameters') == 0 else ' and backward'}",
        ),
        ("Peak memory", _bytes(run.value("peak_memory_bytes")), "of the process"),
        ("Time", _time(run.value("seconds")), f"{_time(clock)} {run.clock}" if clock else "of the rounds"),
    ]
    lines = [f"<div><dt>{escape(t)}</dt><dd>{escape(v)}<small>{escape(n.strip(', '))}</small></dd></div>" for t, v, n in cards]
    return f'<dl class="cards">{"".join(lines)}</dl>'


def _without_training(run: Run) -> str:
    known = {"majority": "commonest class"}
    return ", ".join(f"{words} {_score(run.summary[name])}" for name, words in known.items() if name in run.summary)


def _comparison(runs: Sequence[Run]) -> str:
    late = {"newcomers_mean": "newcomers", "newcomers_joined_mean": "newcomers, joined"}
    late = {name: words for name, words in late.items() if any(name in run.summary for run in runs)}
    head = ["run", "algorithm", "technique", "global test", "clients’ mean", "worst decile", *late.values(), "up", "down"]
    head += ["bytes in all", "trained", "FLOPs", "peak memory", "time"]
    metrics = {run.metric for run in runs if run.finished}
    rows = []
    for i, run in enumerate(runs):
        unit = f" {run.metric}" if len(metrics) > 1 else ""
        tests = ["global_test", "clients_mean", "clients_worst_decile", *late]
        scores = [_score(run.value(name)) + (unit if run.finished else "") for name in tests]
        sizes = [_bytes(run.value(n)) for n in ("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_total")]
        rest = [_si(run.value("trainable_parameters")), _si(run.value("flops_per_example"))]
        rest += [_bytes(run.value("peak_memory_bytes")), _time(run.value("seconds"))]
        cells = [run.kind("algorithm"), run.kind("technique"), *scores, *sizes, *rest]
        cut = "" if run.finished else f" (unfinished, round {run.rounds[-1]['round'] if run.rounds else 0})"
        rows.append((f"{_swatch(i)} {escape(run.label + cut)}", [escape(cell) for cell in cells]))
    note = '<p class="soft">Up and down are bytes a client and round; FLOPs are of one example, forward and, in training, backward.</p>'
    return _table(head, rows, "The runs compared", text=2) + note


def _over(runs: Sequence[Run]) -> str:
    """The switch between x axes, where there is more than one."""
    known = figures.axes(runs)
    if len(known) < 2:
        return ""
    radios = "".join(
        f'<label><input type="radio" name="over" value="{name}"{" checked" if name == "round" else ""}>{words}</label>'
        for name, words in known.items()
    )
    return f"<fieldset><legend>Over&ensp;</legend>{radios}</fieldset>"


CLIENT_COLUMNS = (
    "device",
    "train",
    "valid",
    "test",
    "metric",
    "metric_global",
    "metric_shared",
    "metric_newcomer",
    "metric_joined",
)


def _parts(run: Run) -> str:
    """What belongs to one run alone."""
    own, held = figures.clients(run), figures.partition(run)
    rest = [name for name in CLIENT_COLUMNS if any(c.get(name) for c in run.clients)]
    shapes = {"bytes_up": _bytes, "bytes_down": _bytes, "flops": _si, "simulated_seconds": _time, "examples": _count}
    rows = [
        (
            escape(c["client"]),
            [escape(_score(c.get(n)) if n.startswith("metric") else c[n]) for n in rest]
            + [f(c.get(n)) for n, f in shapes.items()],
        )
        for c in run.clients
    ]
    words = {
        "metric": f"own test ({run.metric})",
        "metric_global": "global test",
        "metric_shared": "own test, shared model",
        "metric_newcomer": "newcomer, as it comes",
        "metric_joined": "newcomer, joined",
        "simulated_seconds": run.clock,
        "flops": "FLOPs",
    }
    head = ["client", *(escape(words.get(n, n.replace("_", " "))) for n in [*rest, *shapes])]
    table = _table(head, rows, "All clients", text="device" in rest)
    return "".join(
        [
            _section("The clients", "", [f for f in (own, held) if f], wide=True),
            _folded(f"All {len(rows):,} clients as a table", table) if rows else "",
            _section("What it cost", "", figures.costs(run)),
            _folded("All rounds as a table", _rounds(run)) if run.rounds else "",
        ]
    )


def _prompt(run: Run) -> str:
    """The words of a discrete prompt: what was found is there to be read."""
    prompt = run.summary.get("prompt")
    if not isinstance(prompt, dict):
        return ""
    classes = run.summary.get("partition", {}).get("labels", [])
    said = list(zip(classes, prompt.get("labels", []), strict=False))
    shown = [(escape(str(classes[k])), [escape(text)]) for text, k in zip(prompt["shown"], prompt["shown_labels"], strict=True)]
    rows = [(escape(str(name)), [escape(text)]) for name, text in said]
    return (
        f"<section><h2>The prompt</h2><blockquote>{escape(prompt['template'])}</blockquote>"
        + (_table(["class", "its words"], rows, "What stands for the classes", text=True) if rows else "")
        + (_table(["class", "solved example"], shown, "Examples in the prompt", text=True) if shown else "")
        + "</section>"
    )


def _influence(run: Run) -> str:
    """What the model would be without each client, the least useful first."""
    last: dict[str, Any] = next((line for line in (run.summary, *reversed(run.rounds)) if line.get("influence")), {})
    found: dict[str, dict[str, Any]] = last.get("influence", {})
    if not found:
        return ""
    rows = [
        (
            escape(c),
            [_score(v.get("fip")), _score(v.get("fil")), _score(v.get("fia")), "left out" if c in last["left_out"] else ""],
        )
        for c, v in sorted(found.items(), key=lambda item: number(item[1].get("fil")) or 0.0)
    ]
    head = ["client", "parameters moved", "loss", "share of right answers", ""]
    note = '<p class="soft">Estimated change if the client had never taken part: of the parameters (length), of the loss, of what is right.</p>'
    return f"<section><h2>Without each client</h2>{_table(head, rows, 'Influence of the clients')}{note}</section>"


def _rounds(run: Run) -> str:
    head = ["round", "cohort", "loss", "validation", "up", "down", "FLOPs", "seconds"]
    rows = [
        (
            escape(str(r["round"])),
            [
                *(_count(r.get("cohort")), _score(r.get("loss")), _score(r.get("valid"))),
                *(_bytes(r.get("bytes_up")), _bytes(r.get("bytes_down")), _si(r.get("flops")), _time(r.get("seconds"))),
            ],
        )
        for r in run.rounds
    ]
    return _table(head, rows, "All rounds")


def _files(run: Run) -> str:
    texts = (("Experiment", run.toml), ("Environment", run.environment))
    state = f'<p class="soft">Hash of the final state: {escape(str(run.summary.get("state_hash")))}</p>' if run.finished else ""
    pre = '<pre tabindex="0" aria-label="{}">{}</pre>'
    return "".join(_folded(title, pre.format(title, escape(text))) for title, text in texts if text) + state


def _folded(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def _section(title: str, before: str, drawn: Sequence[Figure], wide: bool = False) -> str:
    if not drawn:
        return ""
    inner = "".join(_figure(f, wide) for f in drawn)
    return f'<section><h2>{escape(title)}</h2>{before}<div class="figures">{inner}</div></section>'


def _figure(figure: Figure, wide: bool) -> str:
    spec = {"data": figure.data, "layout": figure.layout, "x": figure.x}
    note = f"<p>{escape(figure.note)}</p>" if figure.note else ""
    return (
        f"<figure{' class=wide' if wide else ''}><figcaption><h3>{escape(figure.title)}</h3>{note}</figcaption>"
        f'<div class="plot" role="img" aria-label="{escape(figure.says)}"></div>{_json(spec)}</figure>'
    )


def _json(value: Any, attributes: str = "") -> str:
    """Data for the page's script. `<` is spelled out, so that no text can close the element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" {attributes}>{text}</script>'


def _table(head: Iterable[str], rows: Iterable[tuple[str, list[str]]], name: str, text: int = 0) -> str:
    """Cells are HTML already. The first column heads its row; `text` more are words, the rest numbers."""
    kinds = ["", *(' class="text"' if k < text else "" for k in range(40))]
    top = "".join(f'<th scope="col"{kind}>{cell}</th>' for cell, kind in zip(head, kinds, strict=False))
    lines = []
    for first, cells in rows:
        body = "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(cells, kinds[1:], strict=False))
        lines.append(f'<tr><th scope="row">{first}</th>{body}</tr>')
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


def _swatch(i: int) -> str:
    style = figures.style(i)
    line = {"solid": "solid", "dash": "dashed", "dot": "dotted"}[style["dash"]]
    return f'<span class="swatch" style="border-top-style:{line};border-top-color:{style["color"]}"></span>'


def _score(value: Any) -> str:
    found = number(value)
    return (
        "–" if found is None else f"{found:.4f}" if abs(found) < 10 else f"{found:,.2f}" if abs(found) < 1e6 else f"{found:.3g}"
    )


def _count(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:,.0f}"


def _si(value: Any, unit: str = "") -> str:
    """1234567 -> 1.23 M"""
    found = number(value)
    if found is None:
        return "–"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(found) < 999.5 or prefix == "P":
            break
        found /= 1000
    return f"{found:.3g} {prefix}{unit}".strip() if abs(found) < 1000 else f"{found:,.0f} {prefix}{unit}"


def _bytes(value: Any) -> str:
    return _si(value, "B")


def _time(value: Any) -> str:
    found = number(value)
    if found is None:
        return "–"
    if found < 60:
        return f"{found:.3g} s"
    minutes, seconds = divmod(round(found), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


__all__ = ["write"]
