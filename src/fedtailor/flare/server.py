"""The class that a job names for its server: it conducts the experiment that the job carries as values."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.collab import collab

log = logging.getLogger("fedtailor")


class Conductor:
    """Conducts one run, from its last checkpoint where there is one."""

    def __init__(self, experiment: list[str], digest: str) -> None:
        """`experiment`: the lines of its file; `digest`: that of these lines, as FLARE puts variables into texts of a job."""
        self.experiment, self.digest = experiment, digest

    @collab.main  # type: ignore[untyped-decorator]
    def main(self, context: Any) -> dict[str, Any]:
        """Raises: as `serve`; FLARE then ends the job, and its log says why."""
        from fedtailor import wire
        from fedtailor.federation.serve import Standing, gather
        from fedtailor.flare.calls import Calls
        from fedtailor.flare.job import opened
        from fedtailor.folder import check_folder
        from fedtailor.run import Watch

        sites = {str(proxy.name): _site(proxy) for proxy in context.clients}
        experiment = opened(self.experiment, self.digest, sorted(sites))
        out = _folder(context, experiment.name)
        check_folder(experiment, out, resume=True)
        with tempfile.TemporaryDirectory(prefix="fedtailor-") as folder:
            post = Calls(sites, Path(folder), wire.MAX_BYTES, experiment.clients.min_clients, context.is_aborted)
            watch = Watch(log.info, log.info, round=lambda line: log.info("round %s is over", line["round"]))
            try:
                summary = gather(experiment, out, post, watch, Standing(experiment.name, experiment.rounds))
            finally:
                post.close()
        log.info("the run is in %s, state_hash %s", out, summary["state_hash"])
        return summary


def _folder(context: Any, name: str) -> Path:
    """Where the server keeps its runs: so a job that is submitted again goes on. Else in the job's own folder, which goes with it."""
    from fedtailor.flare.brought import RUN

    if RUN in os.environ:
        return Path(os.environ[RUN]).expanduser() / name
    job = context.app.get_prop("__fl_context__").get_job_id()
    return Path(context.workspace.get_run_dir(job)) / "fedtailor" / name


def _site(proxy: Any) -> Any:
    from fedtailor.flare.calls import Site

    def deliver(id: str, note: Mapping[str, Any], cargo: Any, seconds: float, patience: float) -> Any:
        return proxy(timeout=patience).deliver(id=id, note=dict(note), cargo=cargo, seconds=seconds)

    def collect(id: str, seconds: float, patience: float) -> Any:
        return proxy(timeout=patience).collect(id=id, seconds=seconds)

    return Site(deliver, collect)
