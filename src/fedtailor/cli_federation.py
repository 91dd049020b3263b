"""`serve`, `join` and `status`: the commands of a federation between owners."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtailor.errors import ConfigError
from fedtailor.tables import lines_of

As_json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Without TLS and without certificates: whoever reaches the port takes part under any name."),
]
Keys = Annotated[Path, typer.Option("--keys", help="The authority's folder (`fedtailor keys init`).")]
Home = Annotated[Path, typer.Option("--home", help="What this member keeps: its key, its state, the model that comes of it.")]
RED = "--insecure: nothing is encrypted, and nobody is who they say they are"


def address_of(text: str, port: int = 0) -> str:
    """HOST:PORT.

    Raises:
        ConfigError: it is none.
    """
    found = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s/]+):(\d{1,5})", text)
    if not found or int(found[2]) > 65535:
        raise ConfigError(f"'{text}' is no address: write HOST:PORT, such as server.example.org:{port or 8470}")
    return text


def serve(
    experiment: Annotated[str, typer.Argument(help="EXPERIMENT.toml, or a name in experiments/.")],
    at: Annotated[str, typer.Option("--at", help="HOST:PORT to listen on.")] = "0.0.0.0:8470",
    keys: Keys = Path("keys"),
    insecure: Insecure = False,
    out: Annotated[Path | None, typer.Option("--out", help="The run folder itself.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the run folder.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random stream.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Apply the experiment's table [presets.NAME] first.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value (repeatable).")] = None,
    as_json: As_json = False,
) -> None:
    """Conduct an experiment with members that dial in: their data stays with them."""
    from fedtailor import cli

    needed()
    from fedtailor.federation.doors import server_doors
    from fedtailor.federation.serve import serve as conduct
    from fedtailor.progress import watching
    from fedtailor.report import write

    chosen = cli._experiment(experiment, seed, set_, preset)
    folder = out or cli._free(Path("runs") / chosen.name, resume)
    if insecure:
        cli.err.print(RED, style="bold red")
    with watching(cli.err, chosen.rounds, live=not as_json) as watch:
        summary = conduct(chosen, folder, address_of(at), server_doors(None if insecure else keys), resume, watch)
    page = write([folder], folder / "report.html")
    result = {**summary, "run": str(folder)}
    if as_json:
        print(json.dumps(result))
        return
    console = cli._console()
    cli._table(console, *cli._summary_table(result))
    console.print(f"run     {folder}\nadapter {folder / 'adapter'}\nreport  {page}")


def join(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the server.")],
    token: Annotated[
        str | None, typer.Option("--token", help="The invitation (`fedtailor keys invite`), once; or @FILE.")
    ] = None,
    data: Annotated[str, typer.Option("--data", help="Your data: a path to csv/tsv/jsonl/parquet/image folder or zip.")] = "",
    home: Home = Path("member"),
    text: Annotated[str, typer.Option("--text", help="Your column of the text, where it is called otherwise.")] = "",
    pair: Annotated[str, typer.Option("--pair", help="Your two columns of pairs of texts: FIRST,SECOND.")] = "",
    label: Annotated[str, typer.Option("--label", help="Your column of the label.")] = "",
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="Folder of the backbone here, where the experiment names one of the server's; NAME=FOLDER, once each, where it names two.",
        ),
    ] = None,
    public: Annotated[str, typer.Option("--public", help="Public examples, where the experiment uses some.")] = "",
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.")] = "",
    verbs: Annotated[str, typer.Option("--verbs", help="Answer only these, separated by commas.")] = "",
    mb: Annotated[
        float, typer.Option("--mb-a-round", min=0, help="Refuse more than so many megabytes a round; 0: no limit.")
    ] = 0,
    epochs: Annotated[float, typer.Option("--epochs", min=0, help="Refuse more passes over your rows a round; 0: no limit.")] = 0,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Take this member's part of the experiment's own data, which is on this machine too."),
    ] = False,
    insecure: Insecure = False,
    name: Annotated[str, typer.Option("--name", help="With --insecure: who you are.")] = "",
    as_json: As_json = False,
) -> None:
    """Take part in a federation with your own data, which stays here."""
    from fedtailor import cli

    needed()
    address_of(server)
    from fedtailor.federation.doors import member_doors
    from fedtailor.federation.join import join as take_part
    from fedtailor.federation.member import Limits, Own

    if not data and not simulate:
        raise ConfigError("name your data with --data PATH (or --simulate, where this machine has the experiment's own)")
    if re.search(r"^[.~/]|\.\w+$", data) and not Path(data).expanduser().exists():
        from fedtailor.data.readers import absent

        raise absent(Path(data).expanduser())
    both = tuple(part.strip() for part in pair.split(",")) if pair else None
    if both is not None and len(both) != 2:
        raise ConfigError(f"--pair '{pair}': write two columns, FIRST,SECOND")
    if name and not insecure:
        raise ConfigError("--name goes with --insecure: else the certificate says who you are")
    if insecure and not re.fullmatch(r"[\w.\-]{1,64}", name):
        raise ConfigError("--insecure: say who you are with --name NAME (letters, digits, dots, dashes)")
    if insecure:
        cli.err.print(RED, style="bold red")
    own = Own(data, text, both, label, tuple(model or ()), public, device, simulate)
    limits = Limits(frozenset(v.strip() for v in verbs.split(",") if v.strip()), 1e6 * mb, epochs)
    doors = member_doors(server, home, None if insecure else _token(token), name if insecure else "")
    told = take_part(server, doors, home, own, limits, lambda line: cli.err.print(line, soft_wrap=True))
    if as_json:
        print(json.dumps(told))
        return
    cli._console().print(f"done after {told['rounds']} rounds\nadapter {told['adapter']}")


def status(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the server.")],
    keys: Keys = Path("keys"),
    home: Annotated[Path | None, typer.Option("--home", help="Ask as this member instead of as the authority.")] = None,
    insecure: Insecure = False,
    as_json: As_json = False,
) -> None:
    """How a federation is getting on, asked from another terminal."""
    from fedtailor import cli

    needed()
    from fedtailor.federation.dial import ask
    from fedtailor.federation.doors import asking_doors

    doors = asking_doors(None if insecure else keys, home)
    found: dict[str, Any] = json.loads(ask(address_of(server), doors.credentials, "Status", b"{}", doors.name))
    if as_json:
        print(json.dumps(found))
        return
    console = cli._console()
    console.print(f"{found['name']}: {found['stage']}, round {found['round']}/{found['rounds']}")
    cli._table(console, *lines_of(found["members"]))


def needed() -> None:
    """Raises:
    ConfigError: the packages of the extra are not installed.
    """
    try:
        import cryptography  # noqa: F401
        import grpc  # noqa: F401
    except ImportError as error:
        raise ConfigError("a federation needs an extra: pip install 'fedtailor[grpc]'") from error


def _token(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--token {given}: cannot be read") from error
