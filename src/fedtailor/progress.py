"""Live progress on standard error: a bar on a terminal, a line a round elsewhere; with the members of a run that is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedtailor.run import Members, Watch
from fedtailor.tables import lines_of, table

MOST = 20
"""Members that a terminal shows: of more, those for whom the run has waited longest."""


class Bars(Progress):
    """Bars, and below them who is attached."""

    members: Callable[[], Members] = dict

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        found = self.members()
        if found:
            shown = sorted(sorted(found, key=lambda name: (-found[name]["waiting"], name))[:MOST])
            yield table(*lines_of({name: found[name] for name in shown}))
        if len(found) > MOST:
            yield f"and {len(found) - MOST} more"


@contextmanager
def watching(console: Console, rounds: int, many: bool = False, live: bool = True) -> Iterator[Any]:
    """A `Watch` that shows a run; with `many`, a function (title, rounds) -> Watch for a comparison. Without `live` there is a line a round
    on a terminal too."""
    live = live and console.is_terminal
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, disable=not live, refresh_per_second=4) as bars:

        def watch(title: str, total: int) -> Watch:
            task = bars.add_task(title or "starting", total=total)
            prefix = f"{title}: " if title else ""

            def stage(name: str) -> None:
                bars.update(task, description=prefix + name)

            def line(values: dict[str, Any]) -> None:
                parts = [f"round {values['round']}/{total}"]
                parts += [f"{k} {values[k]:.4f}" for k in ("loss", "valid") if values.get(k) is not None]
                parts.append(f"{values['seconds']:.1f} s")
                bars.update(task, completed=values["round"], description=prefix + ", ".join(parts[:3]))
                if not live:
                    console.print(prefix + ", ".join(parts), soft_wrap=True)

            def members(ask: Callable[[], Members]) -> None:
                bars.members = ask

            return Watch(lambda text: console.print(prefix + text, soft_wrap=True), stage, round=line, members=members)

        if many:
            yield watch
        else:
            yield watch("", rounds)
