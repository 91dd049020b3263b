"""`submit`: hand an experiment to a federation that another framework runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from fedtailor.errors import ConfigError, one_of


def submit(
    experiment: Annotated[str, typer.Argument(help="EXPERIMENT.toml, or a name in experiments/.")],
    to: Annotated[str, typer.Option("--to", help="nvflare: NVIDIA FLARE 2.9.")],
    admin: Annotated[Path | None, typer.Option("--admin", help="Startup kit of a FLARE user who may submit jobs.")] = None,
    user: Annotated[str, typer.Option("--user", help="That user's name, where the kit's folder is called otherwise.")] = "",
    export: Annotated[Path | None, typer.Option("--export", help="Only write the job into this folder.")] = None,
    sites: Annotated[str, typer.Option("--sites", help="Run at these sites, separated by commas; without: at all.")] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Until the job is over.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random stream.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Apply the experiment's table [presets.NAME] first.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a key: section.key=value (repeatable).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on standard output.")] = False,
) -> None:
    """Submit an experiment as a job without code; fedtailor is installed at the sites."""
    from fedtailor import cli

    one_of("--to", to, ["nvflare"])
    if (admin is None) == (export is None):
        raise ConfigError("say either --admin KIT (submit the job) or --export DIR (only write it)")
    if export is not None and wait:
        raise ConfigError("--wait goes with --admin: a job that is only written does not run")
    named = [site.strip() for site in sites.split(",") if site.strip()]
    if bad := [site for site in named if not re.fullmatch(r"[\w.\-]+", site) or site == "server"]:
        raise ConfigError(f"--sites: '{bad[0]}' is no name of a site")
    if len(set(named)) < len(named):
        raise ConfigError("--sites names a site twice")
    chosen = cli._experiment(experiment, seed, set_, preset)
    from fedtailor.flare import job

    if export is not None:
        found = {"folder": str(job.export(chosen, export, named))}
    else:
        assert admin is not None
        found = job.submitted(chosen, admin, user, named, wait, lambda line: cli.err.print(line, soft_wrap=True))
    print(json.dumps(found) if as_json else "\n".join(f"{key} {value}" for key, value in found.items()))
