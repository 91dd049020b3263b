"""The report's page against run folders written by hand."""

from __future__ import annotations

import csv
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from fedtailor.errors import ConfigError, DataError
from fedtailor.report import write
from fedtailor.report.folders import read

COLUMNS = ("letters", "replies", "bytes_down", "bytes_up", "flops", "simulated_seconds", "examples")


def folder(
    path: Path,
    clients: int = 12,
    rounds: int = 4,
    labels: tuple[str, ...] = ("a", "b", "c"),
    metric: str = "accuracy",
    personal: bool = False,
    finished: bool = True,
    name: str = "pydocs-lora",
    clock: float = 2.5,
    client: str = "client-{:03d}",
    **extra: Any,
) -> Path:
    """A run folder as run.py writes it; client k scores k / clients on its own split."""
    path.mkdir(parents=True)
    experiment = {
        "name": name,
        "seed": 0,
        "rounds": rounds,
        "model": {"name": "minilm"},
        "data": {"name": "pydocs", "metric": "auto"},
    }
    kinds = {"technique": {"kind": "lora", "rank": 4}, "algorithm": {"kind": "fedit"}, "clients": {"count": clients}}
    (path / "experiment.toml").write_text(tomli_w.dumps({**experiment, **kinds}))
    (path / "environment.json").write_text(json.dumps({"python": "3.11.2", "cuda": None, "packages": {"torch": "2.9"}}))
    ids = [client.format(k) for k in range(clients)]
    done = rounds if finished else rounds // 2
    with (path / "rounds.jsonl").open("w") as file:
        for n in range(1, done + 1):
            own = dict.fromkeys(COLUMNS, 1.0) | {"bytes_up": 4000.0, "bytes_down": 9000.0, "loss": 1 / n}
            line = {"round": n, "cohort": clients, "clock": clock * n, **{c: own[c] * clients for c in COLUMNS}, "loss": 2 / n}
            line |= {"clients": dict.fromkeys(ids, own), "seconds": 1.5, "peak_memory_bytes": 5e8, "aggregation_error": 0.1 * n}
            if n % 2 == 0:
                line |= {"valid": 30.0 / n if metric == "perplexity" else n / (2 * rounds), "valid_loss": 1 / n}
            file.write(json.dumps(line) + "\n")
    if not finished:
        with (path / "rounds.jsonl").open("a") as file:
            file.write('{"round": 99, "cut sh')
        return path
    with (path / "clients.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["client", "device", "train", "valid", "test", "metric", "metric_global", *COLUMNS])
        for k, c in enumerate(ids):
            score = 20.0 + k if metric == "perplexity" else (k + 1) / clients
            writer.writerow([c, "laptop", 80, 10, 20, score, 0.4321 if personal else "", *([done] * len(COLUMNS))])
    held = [[(k * 7 + j * 3) % 29 for j in range(len(labels))] if labels else [10 + k] for k in range(clients)]
    summary = {
        "name": name, "algorithm": "fedit", "technique": "lora", "seed": 0, "metric": metric,
        "global_test": 0.6789, "clients_mean": 0.5432, "clients_worst_decile": 0.1234, "majority": 0.2111,
        "bytes_up_per_client_round": 4000.0, "bytes_down_per_client_round": 9000.0, "bytes_total": 13000 * clients * done,
        "trainable_parameters": 73728, "flops_per_example": 1.23e9, "flops_total": 1e12, "example_passes": 960,
        "peak_memory_bytes": 512_000_000, "seconds": 75.2, "simulated_seconds": clock * done, "rounds": rounds,
        "clients": clients, "partition": {"clients": ids, "labels": list(labels), "counts": held}, "state_hash": "deadbeef",
    } | extra  # fmt: skip
    (path / "summary.json").write_text(json.dumps(summary))
    return path


class Page(HTMLParser):
    """What a browser makes of the page: its elements, its visible text, its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.figures, self.scripts, self.open = "", [], [], ""  # type: ignore[var-annotated]
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = "json" if ("type", "application/json") in attrs else tag
        if self.open == "json" and ("id", "axes") in attrs:
            self.open = "axes"

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "json":
            self.figures.append(json.loads(data))
        elif self.open == "axes":
            self.axes = list(json.loads(data))
        elif self.open == "script":
            self.scripts.append(data)
        elif self.open != "style":
            self.text += data

    def traces(self, type: str) -> list[dict[str, Any]]:
        return [trace for figure in self.figures for trace in figure["data"] if trace["type"] == type]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(tmp_path: Path, *runs: Path) -> Page:
    return Page(write(list(runs), tmp_path / "out" / "report.html"))


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    seen = page(tmp_path, folder(tmp_path / "run"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]
    loads = [
        (tag, k, v) for tag, attrs in seen.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "action", "data")
    ]
    assert loads == []
    assert not {"link", "iframe", "img", "object", "embed"} & {tag for tag, _ in seen.tags}
    policy = [a["content"] for tag, a in seen.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy
    assert "default-src 'none'" in str(policy[0])
    assert "http" not in str(policy[0])
    css = (Path(write.__code__.co_filename).parent / "page.css").read_text()
    assert "url(" not in css
    assert "@import" not in css
    assert sum("plotly.js v" in s for s in seen.scripts) == 1
    assert "plotly.js" in seen.text
    assert "MB" in seen.text


def test_key_numbers_and_figures(tmp_path: Path) -> None:
    seen = page(tmp_path, folder(tmp_path / "run"))
    for shown in ("0.6789", "0.5432", "0.1234", "0.2111", "4 kB", "9 kB", "624 kB", "73,728", "1.23 G", "512 MB", "1 min 15 s"):
        assert shown in seen.text, shown
    for shown in ("pydocs-lora", "fedit", "lora", "deadbeef", "rank = 4", '"python": "3.11.2"', "accuracy"):
        assert shown in seen.text, shown
    assert seen.axes == ["round", "bytes", "clock"]
    valid = next(f for f in seen.figures if f["x"])
    assert valid["data"][0]["y"] == [0.25, 0.5]
    sent = 12 * 13000
    assert valid["x"] == {"round": [[2, 4]], "bytes": [[2 * sent, 4 * sent]], "clock": [[5.0, 10.0]]}
    worst, others = (t for t in seen.traces("bar") if t["name"] in ("worst decile", "the others"))
    assert worst["x"] == ["client-000"]
    assert len(others["x"]) == 11
    assert any(t["y"] == [0.1, 0.2, 0.3, 0.4] for t in seen.traces("scatter"))  # the aggregation error
    labelled = [a.get("aria-label") for _, a in seen.tags if a.get("role") == "img"]
    assert len(labelled) == len(seen.figures)
    assert all(labelled)
    assert all(a.get("scope") for tag, a in seen.tags if tag == "th")


def test_without_a_clock_or_bytes_there_is_no_such_axis(tmp_path: Path) -> None:
    assert page(tmp_path, folder(tmp_path / "run", clock=0.0)).axes == ["round", "bytes"]


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = '</script><script>alert(1)</script><a href="http://evil.example">x</a><img src=x onerror=alert(2)>'
    run = folder(tmp_path / "run", labels=(evil, "b"), name=evil, client=evil + "{}", metric=evil, state_hash=evil)
    calm = page(tmp_path, folder(tmp_path / "calm", labels=("a", "b")))
    for seen in (page(tmp_path, run), page(tmp_path, run, tmp_path / "calm")):
        assert seen.count("a") == seen.count("img") == 0
        assert not any("alert" in script for script in seen.scripts)
        assert len(seen.scripts) == len(calm.scripts)
        assert "alert(1)" in seen.text
        # plotly makes links of <a href> in labels and names
        texts = re.findall(r'"(?:[^"\\]|\\.)*"', json.dumps(seen.figures))
        assert any("evil" in t or "&lt;/script" in t for t in texts)
        assert not any("<a" in t or "<img" in t or "<script" in t for t in texts)


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    seen = page(tmp_path, folder(tmp_path / "run", finished=False))
    assert "2 of 4 rounds done" in seen.text
    assert "312 kB" in seen.text
    assert "4 kB" in seen.text
    assert "0.2500" in seen.text
    empty = folder(tmp_path / "empty", rounds=1, finished=False)
    assert "0 of 1 rounds done" in page(tmp_path, empty).text


def test_several_runs(tmp_path: Path) -> None:
    base = tmp_path / "compare"
    runs = [folder(base / case / "seed-0", global_test=v) for case, v in (("kind=lora", 0.7001), ("kind=prefix", 0.6002))]
    seen = page(tmp_path, *runs, folder(base / "cut" / "seed-0", finished=False))
    for shown in ("3 runs compared", "kind=lora", "kind=prefix", "cut", "0.7001", "0.6002", "unfinished, round 2"):
        assert shown in seen.text, shown
    curves = [f for f in seen.figures if f["x"]]
    loss = next(f for f in curves if len(f["data"]) == 3)
    assert [t["name"] for t in loss["data"]] == ["kind=lora", "kind=prefix", "cut"]
    assert len({t["line"]["color"] for t in loss["data"]}) == 3
    assert [t["name"] for t in curves[0]["data"]] == ["kind=lora", "kind=prefix", "cut"]  # the cut run has the others' metric
    assert sum(a.get("name") == "runs" for _, a in seen.tags) == 3
    assert seen.count("h1") == 1


def test_cases_of_one_task_are_called_by_what_differs(tmp_path: Path) -> None:
    runs = [folder(tmp_path / f"FDU_MTL_{case}" / "seed-0") for case in ("fed_avg", "local")]
    assert [run.label for run in read(runs)] == ["fed_avg", "local"]
    again = [*runs, folder(tmp_path / "FDU_MTL_local" / "seed-1")]
    assert [run.label for run in read(again)] == ["fed_avg/seed-0", "local/seed-0", "local/seed-1"]


def test_runs_of_different_metrics_have_curves_of_their_own(tmp_path: Path) -> None:
    runs = [folder(tmp_path / "a", name="one"), folder(tmp_path / "b", name="two", metric="perplexity", labels=())]
    seen = page(tmp_path, *runs)
    assert "Validation accuracy" in seen.text
    assert "Validation perplexity" in seen.text
    assert "0.6789 perplexity" in seen.text


def test_perplexity_is_worst_where_it_is_high(tmp_path: Path) -> None:
    seen = page(tmp_path, folder(tmp_path / "run", metric="perplexity", labels=(), global_test=float("nan")))
    worst = next(t for t in seen.traces("bar") if t["name"] == "worst decile")
    assert worst["x"] == ["client-011"]
    assert worst["y"] == [31.0]
    assert "Training examples of each client" in seen.text
    assert not seen.traces("heatmap")


def test_one_client_and_personal_runs(tmp_path: Path) -> None:
    alone = page(tmp_path, folder(tmp_path / "alone", clients=1))
    assert [t["x"] for t in alone.traces("bar") if t["name"] == "worst decile"] == [["client-000"]]
    personal = page(tmp_path, folder(tmp_path / "personal", personal=True))
    assert next(t for t in personal.traces("scatter") if t["name"] == "on the global test set")["y"] == [0.4321] * 12
    assert "0.4321" in personal.text


def with_columns(run: Path, **columns: list[Any]) -> Path:
    """The same folder with columns of clients.csv replaced, or more of them."""
    path = run / "clients.csv"
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rows = [{**row, **{name: values[i] for name, values in columns.items()}} for i, row in enumerate(rows)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return run


def bars(seen: Page, words: str) -> list[dict[str, Any]]:
    return [t for t in seen.traces("bar") if words in t.get("name", "")]


def test_a_personal_run_shows_who_loses_to_the_shared_model(tmp_path: Path) -> None:
    shared = [0.5, 0.25, 0.75, 1.0]  # clients score 0.25, 0.5, 0.75, 1
    run = with_columns(folder(tmp_path / "run", clients=4, personal=True, clients_mean_shared=0.625), metric_shared=shared)
    seen = page(tmp_path, run)
    lost, won = bars(seen, "loses to the shared model")[0], bars(seen, "gains over the shared model")[0]
    assert (lost["x"], lost["y"]) == (["client-000"], [-0.25])
    assert won["y"] == [0, 0, 0.25]
    assert lost["marker"] != won["marker"]
    assert "1 of 4 clients lose to the shared model (mean gain +0.0000, least -0.2500, largest +0.2500)." in seen.text
    for words in ("0.6250", "own test, shared model"):
        assert words in seen.text
    assert "local-only" not in seen.text


def test_several_runs_show_who_loses_to_training_alone(tmp_path: Path) -> None:
    mine = with_columns(folder(tmp_path / "mine", clients=4, name="mine"), metric_shared=[0.5, 0.25, 0.75, 1.0])
    same = folder(tmp_path / "same", clients=4, name="same", algorithm="local")
    with_columns(same, metric=[0.2, 0.6, 0.7, 0.7], metric_shared=["", "", "", ""])
    other = folder(tmp_path / "other", clients=4, name="other", algorithm="local", seed=1)
    (other / "experiment.toml").write_text((other / "experiment.toml").read_text().replace("seed = 0", "seed = 1"))
    common = folder(tmp_path / "common", clients=4, name="common")
    seen = page(tmp_path, mine, other, same, common)
    [lost], [won] = bars(seen, "loses to local-only"), bars(seen, "gains over local-only")  # of the personal run alone
    assert (lost["x"], lost["y"]) == (["client-001"], [-0.1])
    assert (won["x"], won["y"]) == (["client-000", "client-002", "client-003"], [0.05, 0.05, 0.3])
    [marks] = [t for t in seen.traces("scatter") if t["name"] == "over the shared model"]
    assert marks["x"] == ["client-001", "client-000", "client-002", "client-003"]
    assert marks["y"] == [0.25, -0.25, 0, 0]
    assert "mine: gain of each client’s own model" in seen.text
    assert "1 of 4 clients lose to local-only (mean gain +0.0750, least -0.1000, largest +0.3000)." in seen.text
    assert "What a model of its own brings a client" not in page(tmp_path, common, same).text
    # With other validation rows it has trained on others too.
    text = (same / "experiment.toml").read_text()
    (same / "experiment.toml").write_text(text.replace("[clients]\n", "[clients]\nvalid = 0.25\n"))
    assert "lose to local-only" not in page(tmp_path, mine, same).text


def test_where_low_is_good_a_gain_is_a_fall(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", clients=2, metric="perplexity", labels=(), personal=True)  # 20 and 21
    seen = page(tmp_path, with_columns(run, metric_shared=[18.0, 25.0]))
    assert bars(seen, "loses to the shared model")[0]["y"] == [-2]
    assert bars(seen, "gains over the shared model")[0]["y"] == [4]
    assert any(f["layout"].get("yaxis", {}).get("title") == {"text": "fall in perplexity"} for f in seen.figures)


def test_newcomers_are_shown_and_are_no_clients_of_the_federation(tmp_path: Path) -> None:
    means = {"newcomers_mean": 0.3125, "newcomers_joined_mean": 0.4375}
    run = folder(tmp_path / "run", clients=3, **means)
    late = with_columns(run, device=["a", "a", "newcomer"], metric=[0.5, 0.25, ""], metric_newcomer=["", "", 0.1357],
                        metric_joined=["", "", 0.2468])  # fmt: skip
    seen = page(tmp_path, late)
    for words in ("Newcomers as they come", "0.3125", "Newcomers joined", "0.4375", "0.1357", "0.2468", "newcomer, as it comes"):
        assert words in seen.text
    assert sum(len(t["x"]) for t in seen.traces("bar") if t["name"] in ("worst decile", "the others")) == 2
    both = page(tmp_path, late, folder(tmp_path / "without", clients=3, name="without"))
    assert "newcomers, joined" in both.text
    alone = page(tmp_path, folder(tmp_path / "none", clients=3))
    assert "Newcomers" not in alone.text  # the path has the word too


def test_a_comparison_says_what_is_not_in_it(tmp_path: Path) -> None:
    two = [folder(tmp_path / name, clients=3, name=name) for name in ("one", "two")]
    out = write(two, tmp_path / "report.html", "Only <some> seeds.")
    assert "Only &lt;some&gt; seeds." in out.read_text(encoding="utf-8")


def test_a_thousand_clients(tmp_path: Path) -> None:
    run = folder(tmp_path / "run", clients=1000, labels=tuple(f"class {k}" for k in range(100)))
    begun = time.perf_counter()
    out = write([run], tmp_path / "report.html")
    assert time.perf_counter() - begun < 5
    assert out.stat().st_size < 8_000_000
    heat = Page(out).traces("heatmap")[0]
    assert len(heat["z"]) == len(set(heat["y"])) == 1000
    assert len(next(t for t in Page(out).traces("bar") if t["name"] == "worst decile")["x"]) == 100


def test_folders_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ConfigError, match=r"no experiment\.toml"):
        write([tmp_path / "nothing"], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="at least one"):
        write([], tmp_path / "report.html")
    run = folder(tmp_path / "run")
    (run / "summary.json").write_text("{")
    with pytest.raises(DataError, match=r"summary\.json"):
        write([run], tmp_path / "report.html")
