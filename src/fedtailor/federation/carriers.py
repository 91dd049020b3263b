"""What the conversation asks of whoever carries its parcels: gRPC lines (post.py, dial.py), or the calls of another framework."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from fedtailor.core import ClientId
from fedtailor.federation.frames import Header, Parcel


class Event(NamedTuple):
    """What the conversation is told."""

    kind: str  # attached | detached | parcel
    member: ClientId
    parcel: Parcel | None = None
    header: Header = {}


class Carrier(Protocol):
    """The way to one member."""

    @property
    def idle(self) -> bool:
        """Whether everything has arrived."""

    @property
    def bytes_in(self) -> int: ...

    @property
    def bytes_out(self) -> int: ...


class Attached(NamedTuple):
    """A member as the server's end sees it."""

    line: Carrier
    since: float | None  # seconds (monotonic) when it attached; None: it is away
    left: float  # when it was last cut off


class Events(Protocol):
    def get(self, block: bool = ..., timeout: float | None = ...) -> Event: ...


class ServerEnd(Protocol):
    """Post, or what takes its place."""

    members: dict[ClientId, Attached]

    @property
    def session(self) -> str: ...

    @property
    def events(self) -> Events: ...

    def send(self, member: ClientId, parcel: Parcel, reply: bool = True) -> None: ...

    def recall(self, member: ClientId, id: str) -> None: ...

    def tell(self, member: ClientId, header: Header) -> None: ...

    def attached(self, member: ClientId) -> bool: ...


class MemberEnd(Protocol):
    """Dial, or what takes its place."""

    @property
    def inbox(self) -> Any:
        """A queue of parcels, and of a RunError that ends it."""

    def send(self, parcel: Parcel) -> None: ...

    def drain(self, seconds: float) -> None: ...
