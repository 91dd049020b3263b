"""The command line. Standard output is for results, standard error for progress; exit codes: 0 done, 2 usage or experiment,
3 data, 4 the run failed, 130 interrupted."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from fedtailor import __version__, cli_federation, cli_submit, tables
from fedtailor.cli_keys import app as keys_app
from fedtailor.errors import ConfigError, FedtailorError, RunError, nearest

# Heavy imports (torch, transformers) stay inside the commands: `--help` and a wrong flag answer at once.
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(keys_app, name="keys")
err = Console(stderr=True, highlight=False)
USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError of the click that this typer uses: its own, or the package

As_json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value (repeatable).")]
Out = Annotated[Path | None, typer.Option("--out", help="The run folder itself.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")]
Preset = Annotated[str | None, typer.Option("--preset", help="Apply the experiment's table [presets.NAME] first.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random stream.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")]


app.command()(cli_federation.serve)
app.command()(cli_federation.join)
app.command()(cli_federation.status)
app.command()(cli_submit.submit)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Customize pretrained models to data that never leaves its owners."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    experiment: Annotated[
        str | None,
        typer.Argument(
            help="EXPERIMENT.toml, or a name in experiments/. Without: the defaults (MiniLM, prefix, pydocs, 20 clients)."
        ),
    ] = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
    preset: Preset = None,
    set_: Set = None,
    as_json: As_json = False,
) -> None:
    """Run one experiment and write its run folder."""
    from fedtailor.progress import watching
    from fedtailor.report import write
    from fedtailor.run import run as run_experiment

    chosen = _experiment(experiment, seed, set_, preset)
    folder = out or _free(Path("runs") / chosen.name, resume)
    with watching(err, chosen.rounds) as watch:
        summary = run_experiment(chosen, folder, resume, watch)
    page = write([folder], folder / "report.html")
    result = {**summary, "run": str(folder)}
    if as_json:
        print(json.dumps(result))
        return
    console = _console()
    _table(console, *_summary_table(result))
    console.print(f"run     {folder}\nadapter {folder / 'adapter'}\nreport  {page}")


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(help="EXPERIMENT.toml with a [compare] section.")],
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="Finished cases are kept and cut ones resumed in any case.")] = False,
    seed: Seed = None,
    preset: Preset = None,
    set_: Set = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this set or task of [compare], by its name. Repeatable.")
    ] = None,
    as_json: As_json = False,
) -> None:
    """Vary keys and seeds, run what is missing, print and write one table."""
    from fedtailor.compare import compare as compare_cases
    from fedtailor.compare import table
    from fedtailor.progress import watching
    from fedtailor.report import write
    from fedtailor.report.folders import summary_of

    changes = [*(set_ or []), *([f"compare.seeds=[{seed}]"] if seed is not None else [])]
    chosen = _experiment(experiment, seed, changes, preset)
    folder = out or Path("runs") / f"{chosen.name}-compare"
    with watching(err, chosen.rounds, many=True) as watch:
        rows = compare_cases(chosen, folder, watch, only or ())
    seeds = max((row["seeds"] for row in rows), default=1)
    note = f"Each case's first seed; means over all {seeds} stand in compare.md." if seeds > 1 else ""
    page = write([Path(r) for row in rows for r in row["runs"][:1]], folder / "report.html", note)
    if as_json:
        runs = [(row["name"], Path(run)) for row in rows for run in row["runs"]]
        print(json.dumps([{"case": name, **summary_of(run), "run": str(run)} for name, run in runs]))
        return
    console = _console()
    _table(console, *table(rows))
    console.print(f"table  {folder / 'compare.md'}\nreport {page}")


@app.command()
def plan(
    experiment: Annotated[
        str | None, typer.Argument(help="EXPERIMENT.toml, or a name in experiments/. Without: the defaults.")
    ] = None,
    preset: Preset = None,
    set_: Set = None,
    as_json: As_json = False,
) -> None:
    """Tell what an experiment will cost its devices, uncut and cut by layers, and with other techniques; nothing is trained."""
    from fedtailor.planning import plan as planned

    found = planned(_experiment(experiment, None, set_, preset))
    if as_json:
        print(json.dumps(found))
        return
    console = _console()
    console.print(
        f"{found['model']}, technique {found['technique']}; batches of {found['rows']} x {found['width']} tokens (median; the longest, for which "
        f"there must be memory, {found['widest']}), {found['steps']} steps a client and round (median); bytes of cuts: means over clients and "
        f"{found['rounds_rehearsed']} rounds"
    )
    for device in found["devices"]:
        memory = f"{device['memory_bytes'] / 1e6:,.1f} MB" if device["memory_bytes"] else "any memory"
        console.print(f"\ndevice {device['device']} ({memory})")
        _table(console, *_cuts_table(device))
        console.print(device["why"], soft_wrap=True)
    if found["techniques"]:
        console.print("\ntechniques with their default options, uncut; bytes are those of a round's letter as fedavg sends it")
        _table(console, *_techniques_table(found["techniques"]))


@app.command()
def evaluate(run: RunFolder, as_json: As_json = False) -> None:
    """Judge a run's model again, on the global test set and on every client's own test split."""
    from fedtailor.evaluation import judge_again
    from fedtailor.report.folders import summary_of

    summary = summary_of(run)
    scores = judge_again(run)
    result = {
        **summary,
        **{k: v for k, v in scores.items() if not k.startswith("clients") or k in ("clients_mean", "clients_worst_decile")},
    }
    result |= {"run": str(run), "per_client": scores["clients"]}
    if as_json:
        print(json.dumps(result))
    else:
        _table(_console(), *_summary_table(result))


@app.command()
def predict(
    run: RunFolder,
    texts: Annotated[list[str], typer.Argument(help="Texts (for pairs: 'first ||| second'), or image files.", metavar="TEXT...")],
    client: Annotated[str | None, typer.Option("--client", help="Use this client's personal model.")] = None,
    as_json: As_json = False,
) -> None:
    """Label texts or images, or continue texts, with a run's model; after retrieval, with the passages cited by client."""
    from fedtailor.predict import predict as label

    found = label(run, texts, client)
    if as_json:
        print(json.dumps({"predictions": found}))
        return
    for one in found:
        best = f"{max(one['scores']):.3f}" if one["scores"] else ""
        print(f"{one['label']}\t{best}\t{one['text']}")
        for number, passage in enumerate(one.get("passages", []), 1):
            print(_cited(number, passage))


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option("--to", help="The folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge into the weights: a plain transformers folder.")] = False,
    client: Annotated[str | None, typer.Option("--client", help="Export this client's personal model.")] = None,
    as_json: As_json = False,
) -> None:
    """Write a run's adapter as a folder that PEFT loads, or merged as one that transformers loads."""
    from fedtailor.folder import reopen
    from fedtailor.predict import tree_of

    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"--to '{to}' exists and is not an empty folder: name another one")
    model, state, states = reopen(run)
    model, tree = tree_of(model, state, states, client)
    try:
        (model.technique.merge if merge else model.technique.save)(tree, to)
    except OSError as error:
        raise RunError(f"cannot write to '{error.filename or to}': {error.strerror or error}") from error
    print(json.dumps({"run": str(run), "to": str(to), "merged": merge}) if as_json else to)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.", metavar="RUN...")],
    out: Annotated[
        Path | None, typer.Option("-o", help="The HTML file; report.html in the first run folder unless given.")
    ] = None,
    as_json: As_json = False,
) -> None:
    """Write one self-contained HTML page about one or more runs."""
    from fedtailor.report import write

    page = write(runs, out or runs[0] / "report.html")
    print(json.dumps({"report": str(page)}) if as_json else page)


def spelled(value: Any) -> str:
    """An option's default as TOML has it, texts without quotes."""
    return "unset" if value is None else value if isinstance(value, str) else json.dumps(value)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="techniques, algorithms, datasets, models, partitions, filters or metrics")],
    as_json: As_json = False,
) -> None:
    """List what an experiment may name, with the options of each."""
    from fedtailor.listing import LISTS, listing

    if what not in LISTS:
        raise ConfigError(f"cannot list '{what}': {nearest(what, LISTS)}")
    entries = listing(what)
    if as_json:
        print(json.dumps(entries))
        return
    for entry in entries:
        options = ", ".join(f"{k} = {spelled(v)}" for k, v in entry.get("options", {}).items())
        print(f"{entry['name']:<16}{entry['summary']}" + (f"\n{'':<16}options: {options}" if options else ""))
        if "gives" in entry:
            rest = f"up {entry['up']}, down {entry['down']}; rule: {entry['rule']}; techniques: {entry['takes']}"
            print(f"{'':<16}{entry['gives']}; {rest}")


@app.command()
def doctor(as_json: As_json = False) -> None:
    """Check what this machine offers and whether the main job can run here."""
    from fedtailor.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps(checks))
    else:
        for check in checks:
            print(f"{'ok ' if check['ok'] else 'BAD'} {check['name']:<12}{check['found']}")
    if not all(check["ok"] for check in checks):
        raise typer.Exit(4)


def _experiment(name: str | None, seed: int | None, overrides: list[str] | None, preset: str | None = None) -> Any:
    from fedtailor.config import load, override, parse

    changes = [*(overrides or []), *([f"seed={seed}"] if seed is not None else [])]
    if name is None:
        if preset:
            raise ConfigError(f"--preset {preset}: presets are tables of an experiment file: name one")
        values: dict[str, Any] = {}
        for item in changes:
            override(values, item)
        return parse(values, where="--set")
    path = Path(name)
    if not path.is_file() and not path.suffix:
        known = sorted(p.stem for p in Path("experiments").glob("*.toml"))
        if name not in known:
            raise ConfigError(f"no experiment '{name}': " + (nearest(name, known) if known else "name a .toml file"))
        path = Path("experiments") / f"{name}.toml"
    return load(path, changes, preset)


def _free(folder: Path, resume: bool) -> Path:
    """A folder that holds no run yet; with `resume` the latest one that does."""
    number, last = 1, folder
    current = folder
    while current.exists():
        number, last = number + 1, current
        current = folder.with_name(f"{folder.name}-{number}")
    return last if resume else current


def _summary_table(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    shown = {
        f"global test ({summary['metric']})": ("global_test", "{:.4f}"),
        "without retrieval": ("without_retrieval", "{:.4f}"),
        "clients' mean": ("clients_mean", "{:.4f}"),
        "clients' worst decile": ("clients_worst_decile", "{:.4f}"),
        "clients' mean, shared model": ("clients_mean_shared", "{:.4f}"),
        "newcomers' mean, as they come": ("newcomers_mean", "{:.4f}"),
        "newcomers' mean, joined": ("newcomers_joined_mean", "{:.4f}"),
        "majority class": ("majority", "{:.4f}"),
        "trained numbers": ("trainable_parameters", "{:,}"),
        "bytes up, a client and round": ("bytes_up_per_client_round", "{:,.0f}"),
        "bytes down, a client and round": ("bytes_down_per_client_round", "{:,.0f}"),
        "bytes in all": ("bytes_total", "{:,}"),
        "peak memory, MB": ("peak_memory_bytes", "{:,}"),
        "seconds": ("seconds", "{:.1f}"),
        "seconds of the clients, real" if summary.get("served") else "simulated seconds": ("simulated_seconds", "{:.1f}"),
    }
    rows = []
    for title, (key, form) in shown.items():
        value = summary.get(key)
        if value is not None:
            rows.append([title, form.format(value // 1_000_000 if key == "peak_memory_bytes" else value)])
    return ["measure", "value"], rows


def _cuts_table(device: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["front | back", "trained", "memory, MB", "Mflop a step", "kB up a round", "kB down a round", "s a round", "fits"]
    lines = [("uncut", device["uncut"]), *((f"{cut['front']} | {cut['back']}", cut) for cut in device["cuts"])]
    body = [
        [
            name,
            f"{line['trained']:,}",
            f"{line['memory_bytes'] / 1e6:,.1f}",
            f"{line['flops_per_step'] / 1e6:,.1f}",
            f"{line['bytes_up_per_round'] / 1e3:,.1f}",
            f"{line['bytes_down_per_round'] / 1e3:,.1f}",
            f"{line['seconds_per_round']:,.2f}",
            "yes" if line["fits"] else "no",
        ]
        for name, line in lines
    ]
    return head, body


def _techniques_table(lines: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    shown = {"trained": 1, "bytes_up": 1, "bytes_down": 1, "memory_bytes": 1e6, "flops_per_step": 1e6}
    head = ["technique", "trained", "bytes up", "bytes down", "memory, MB", "Mflop a step"]
    body = [
        [
            line["technique"],
            *("-" if key not in line else f"{line[key] / unit:,.{0 if unit == 1 else 1}f}" for key, unit in shown.items()),
        ]
        for line in lines
    ]
    return head, body


def _cited(number: int, passage: dict[str, Any], width: int = 100) -> str:
    """A passage that an answer rests on, in one line; what stays with its client is left out."""
    name, row, text = passage["client"], passage["row"], passage["text"]
    client = name if name.startswith("client") else f"client {name}"
    line = f"  [{number}] {client}" + (f", row {row}" if row is not None else "") + f", {passage['score']:.2f}"
    line += f": {' '.join(text.split())}" if text is not None else ""
    return line if len(line) <= width else f"{line[: width - 3]}..."


def _console() -> Console:
    """Standard output; into a file or pipe as wide as the table needs."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _table(console: Console, head: list[str], body: list[list[str]]) -> None:
    console.print(tables.table(head, body))


def main() -> None:
    """The entry point: every failure that a user can act on is one line and its documented exit code."""
    if not sys.warnoptions:  # about calls between third parties: nobody here can act on them
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        code = app(standalone_mode=False)  # else typer would explain wrong usage in four lines, and an interrupt in none
    except USAGE as error:
        if error.format_message().count("\n"):  # no arguments at all: the help
            error.show()
            sys.exit(error.exit_code)
        _fail(_usage(error), error.exit_code)
    except FedtailorError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        then = "join again to go on" if "join" in sys.argv[1:2] else "the last checkpoint is kept; add --resume to go on"
        err.print(f"interrupted: {then}", soft_wrap=True)
    sys.exit(code or 0)


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"error: {' '.join(message.splitlines())}", style="red", markup=False, soft_wrap=True)
    sys.exit(code)


def _usage(error: Any) -> str:
    """What is wrong with the command line, and where its help is."""
    return f"{error.format_message().rstrip('.')} (see {error.ctx.command_path if error.ctx else 'fedtailor'} --help)"


if __name__ == "__main__":
    main()
