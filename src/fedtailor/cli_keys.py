"""The commands `fedtailor keys ...`: a federation's authority, its invitations and its members."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

# What needs `cryptography` stays inside the commands: it is an extra, and other commands do without.
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Say who may take part in a federation over a network.")

Keys = Annotated[Path, typer.Option("--keys", help="The folder of the federation's authority.", metavar="DIR")]
As_json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")]
Name = Annotated[str, typer.Argument(help="A client's name.", metavar="NAME")]


@app.command()
def init(keys: Keys = Path("keys"), as_json: As_json = False) -> None:
    """Make a federation's authority and its server's certificate."""
    from fedtailor.federation.keys import init as make

    make(keys)
    print(json.dumps({"keys": str(keys)}) if as_json else keys)


@app.command()
def invite(
    name: Name,
    keys: Keys = Path("keys"),
    hours: Annotated[float, typer.Option("--hours", help="How long the token can be used.")] = 24,
    as_json: As_json = False,
) -> None:
    """Print a token with which NAME can join once; an unused one of before is void."""
    from fedtailor.federation.keys import invite as token_for

    token = token_for(keys, name, hours)
    print(json.dumps({"name": name, "token": token, "hours": hours}) if as_json else token)
    print(f"'{name}' joins with: fedtailor join HOST:PORT --token TOKEN --data PATH", file=sys.stderr)


@app.command()
def revoke(name: Name, keys: Keys = Path("keys"), as_json: As_json = False) -> None:
    """Shut NAME out: its certificate and its invitation are void."""
    from fedtailor.federation.keys import revoke as shut_out

    shut_out(keys, name)
    print(json.dumps({"name": name, "state": "revoked"}) if as_json else f"{name} revoked")


@app.command(name="list")
def list_(keys: Keys = Path("keys"), as_json: As_json = False) -> None:
    """List who was invited, is enrolled or was revoked, and until when."""
    from fedtailor.federation.keys import members

    found = members(keys)
    if as_json:
        print(json.dumps([{"name": name, "state": state, "expires": expires} for name, state, expires in found]))
        return
    for name, state, expires in found:
        print(f"{name:<24}{state:<10}{expires}")
