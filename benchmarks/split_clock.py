"""Nobody waits: when do clients of flexp end their passes if one of them is twenty times slower, or lost half-way?

    python benchmarks/split_clock.py [--clients 8] [--rounds 3]

MiniLM with LoRA on the embedded documentation texts, cut 1 | 4 | 1, a server of 200 GFLOP/s that all share. Prints a markdown table: simulated
seconds until the last pass of a client that is neither slow nor lost has ended, their mean and their largest difference to the run of equals.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from fedtailor.config import Experiment, parse
from fedtailor.core import ClientId, Device, Site
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.evaluation import workers
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.simulation import World, build

PHONE = {"name": "phone", "gflops": 10, "uplink_mbps": 20, "downlink_mbps": 50, "latency_ms": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    world = build(experiment(asked.clients, asked.rounds))
    one = sorted(world.clients)[0]
    fast = world.site(one, 0).device
    slow = fast._replace(flops=fast.flops / 20, uplink=fast.uplink / 20, downlink=fast.downlink / 20, latency=20 * fast.latency)
    equals, _ = ends(world, asked.rounds, one, lambda clock: fast)
    half = max(equals.values()) / 2
    cases = {
        "all alike": lambda clock: fast,
        "one 20 times slower": lambda clock: slow,
        "one lost at half time": lambda clock: fast if clock < half else fast._replace(dropout=1.0),
    }
    print("| case | the others' last pass ends after, s | largest difference | the one's |\n|---|---|---|---|")
    for name, device in cases.items():
        found, passes = ends(world, asked.rounds, one, device)
        others = {client: found[client] for client in equals if client != one}
        worst = max(abs(others[client] / equals[client] - 1) for client in others)
        own = f"{found[one]:.2f} s" if passes[one] == asked.rounds else f"{passes[one]} of {asked.rounds} passes"
        print(f"| {name} | {sum(others.values()) / len(others):.2f} | {100 * worst:.2f} % | {own} |", flush=True)


def experiment(clients: int, rounds: int) -> Experiment:
    values: dict[str, Any] = {
        "rounds": rounds,
        "data": {"limit": 40 * clients, "max_length": 48},
        "clients": {"count": clients, "devices": [PHONE]},
        "technique": {"kind": "lora", "rank": 8},
        "train": {"lr": 1e-3, "batch": 4},
        "algorithm": {"kind": "flexp", "front": 1, "back": 1},
        "engine": {"server_gflops": 200},
        "evaluate": {"every": 0},
    }
    return parse(values)


def ends(world: World, rounds: int, one: ClientId, device: Any) -> tuple[dict[ClientId, float], dict[ClientId, int]]:
    """(simulated seconds at which each client's last pass ended, passes that it ended); `device(clock)` is that of `one`."""
    with tempfile.TemporaryDirectory() as folder:
        engine: Local
        last: dict[ClientId, float] = {}
        passes: dict[ClientId, int] = {}

        def sites(client: ClientId, round: int) -> Site:
            site = world.sites(client, round)
            given: Device = device(engine.clock)
            return site._replace(device=given) if client == one else site

        def taken(wanted: Any) -> Any:
            found = take(wanted)
            for client, message in found.items():
                if message.verb == "rested":
                    last[client], passes[client] = engine.clock, passes.get(client, 0) + 1
            return found

        nothing = chain([])
        engine = Local(
            world.algorithm, sites, workers(world, world.flops, world.looks), States(Path(folder)), Ledger(), nothing, nothing,
            server=world.job.server,
        )  # fmt: skip
        take, engine._take = engine._take, taken  # type: ignore[method-assign]
        state = world.algorithm.init(world.technique.init)
        for number in range(1, rounds + 1):
            state = engine.converse(world.algorithm.round(state, sorted(world.clients)), number)
        engine.close()
        return last, passes


if __name__ == "__main__":
    main()
