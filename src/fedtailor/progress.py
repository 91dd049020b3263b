"""Live progress on standard error: a bar on a terminal, a line a round elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedtailor.run import Watch


@contextmanager
def watching(console: Console, rounds: int, many: bool = False) -> Iterator[Any]:
    """A `Watch` that shows a run; with `many`, a function (title, rounds) -> Watch for a comparison."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def watch(title: str, total: int) -> Watch:
            task = progress.add_task(title or "starting", total=total)
            prefix = f"{title}: " if title else ""

            def stage(name: str) -> None:
                progress.update(task, description=prefix + name)

            def line(values: dict[str, Any]) -> None:
                parts = [f"round {values['round']}/{total}"]
                parts += [f"{k} {values[k]:.4f}" for k in ("loss", "valid") if values.get(k) is not None]
                parts.append(f"{values['seconds']:.1f} s")
                progress.update(task, completed=values["round"], description=prefix + ", ".join(parts[:3]))
                if not console.is_terminal:
                    console.print(prefix + ", ".join(parts), soft_wrap=True)

            return Watch(notice=lambda text: console.print(prefix + text, soft_wrap=True), stage=stage, round=line)

        if many:
            yield watch
        else:
            yield watch("", rounds)
