"""Experiment trackers (tensorboard, mlflow, wandb, trackio), all through accelerate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtailor.config import Experiment
from fedtailor.errors import ConfigError
from fedtailor.folder import plain


def check_trackers(experiment: Experiment) -> None:
    """Accelerate would only warn of a tracker that is not installed, and log nothing."""
    if experiment.track.to:
        from accelerate.tracking import get_available_trackers

        there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
        missing = [name for name in experiment.track.to if name not in there]
        if missing:
            raise ConfigError(f"track.to: '{missing[0]}' is not installed: pip install {missing[0]}, or leave it out")


def tracker(experiment: Experiment, out: Path) -> Callable[[dict[str, Any] | None, int], None]:
    """Logs the numbers of a round to accelerate's trackers; called with None it closes them."""
    if not experiment.track.to:
        return lambda line, step: None
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(log_with=list(experiment.track.to), project_dir=str(out / "trackers"), cpu=True)
        flat = {k: str(v) for k, v in plain(experiment).items()}
        accelerator.init_trackers(experiment.track.project, config=flat)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"track.to {experiment.track.to}: {error}; install the tracker or leave it out") from error

    def log(line: dict[str, Any] | None, step: int) -> None:
        if line is None:
            accelerator.end_training()
        else:
            accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=step)

    return log
