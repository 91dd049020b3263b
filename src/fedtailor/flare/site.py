"""The class that a job names for its sites. Heavy imports wait: FLARE gives a site a minute to answer."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from fedtailor.errors import FedtailorError, RunError, first_line

log = logging.getLogger("fedtailor")
SERVER_SITE = "server"


class Participant:
    """Takes part with what this site brings; the server's calls are the only ones that it answers."""

    def __init__(self, name: str) -> None:
        """`name`: the experiment's."""
        self.name = name
        self._desk: Any = None

    @collab.init  # type: ignore[untyped-decorator]
    def begin(self, context: Any) -> None:
        from fedtailor.flare.desk import Desk

        root, site = Path(context.workspace.get_root_dir()), str(context.app.name)
        local = Path(context.workspace.get_site_config_dir())
        self._desk = Desk()
        threading.Thread(target=self._take_part, args=(root, local, site), name="member", daemon=True).start()

    @collab.publish  # type: ignore[untyped-decorator]
    def deliver(self, id: str, note: dict, cargo: Any, seconds: float, context: Any) -> Any:  # type: ignore[type-arg]
        _only_the_server(context)
        return self._desk.deliver(id, note, cargo, seconds)

    @collab.publish  # type: ignore[untyped-decorator]
    def collect(self, id: str, seconds: float, context: Any) -> Any:
        _only_the_server(context)
        return self._desk.collect(id, seconds)

    def _take_part(self, root: Path, local: Path, site: str) -> None:
        try:
            told = self._served(root, local, site)
            log.info("done after %s rounds: adapter %s", told["rounds"], told["adapter"])
            self._desk.end("")
        except Exception as error:
            if not isinstance(error, FedtailorError):
                log.exception("the member has ended")
            self._desk.end(first_line(error)[:500])

    def _served(self, root: Path, local: Path, site: str) -> dict[str, Any]:
        """Raises: as `Member.serve`."""
        from fedtailor.federation.member import Member
        from fedtailor.federation.shelf import arriving
        from fedtailor.flare.brought import brought
        from fedtailor.simulation import safe

        own, limits, chosen = brought(local, site)
        home = (Path(chosen).expanduser() if chosen else root / "fedtailor") / safe(self.name)
        self._desk.open(arriving(home), limits.memory)
        return Member(site, self._desk, home, own, limits, log.info).serve()


def _only_the_server(context: Any) -> None:
    """Other sites of the job could call too.

    Raises:
        RunError: one of them does.
    """
    if context.caller != SERVER_SITE:
        raise RunError(f"'{context.caller}' has no letters for this site: only the server has")
