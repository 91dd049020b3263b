"""Who opens to whom: from folders of keys to what the two ends of a line show each other."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import grpc

from fedtailor.errors import ConfigError
from fedtailor.federation import keys
from fedtailor.federation.dial import Credentials, ask
from fedtailor.federation.post import Keys


class Doors(NamedTuple):
    """Who one is, and what one shows; no credentials where `--insecure` was typed."""

    name: str
    credentials: Credentials | None


def server_doors(folder: Path | None) -> Keys:
    """Raises:
    ConfigError: no authority in the folder. RunError: its certificate has expired.
    """
    if folder is None:
        return Keys()
    if not (folder / "authority.pem").is_file():
        raise ConfigError(f"'{folder}' holds no authority: make one with `fedtailor keys init`, or name its folder with --keys")
    mine = keys.server_identity(folder)
    credentials = grpc.ssl_server_credentials([(mine.key, mine.certificate)], mine.authority, require_client_auth=True)

    def enrol(certificate: bytes, request: bytes) -> bytes:
        return keys.enrol(folder, certificate, request)

    return Keys(
        credentials,
        lambda certificate: keys.member_of(folder, certificate),
        enrol,
        lambda certificate: keys.may_look(folder, certificate),
    )


def member_doors(server: str, home: Path, token: str | None, name: str) -> Doors:
    """What a member shows: its identity, enrolled with the token where it has none yet.

    Raises:
        ConfigError: neither token nor identity, or no token. RunError: the server refuses, or is not there.
    """
    if name:
        return Doors(name, None)
    mine = keys.identity(home)
    if token is not None:
        given = keys.read_token(token)
        if mine is None or mine.authority != given.authority or mine.name != given.name:
            key, request = keys.request(given.name)
            shown = Credentials(given.key, given.certificate, given.authority)
            mine = keys.Identity(given.name, key, ask(server, shown, "Enrol", request), given.authority)
            keys.keep(home, mine)
    if mine is None:
        raise ConfigError(f"'{home}' has no identity yet: join with the --token that `fedtailor keys invite NAME` printed")
    return Doors(mine.name, Credentials(mine.key, mine.certificate, mine.authority))


def asking_doors(folder: Path | None, home: Path | None) -> Doors:
    """What one shows who asks for the status: a member, or the authority itself.

    Raises: as `member_doors`, `server_doors`.
    """
    if home is not None:
        return member_doors("", home, None, "")
    if folder is None:
        return Doors("status", None)
    mine = keys.operator_identity(folder)
    return Doors(mine.name, Credentials(mine.key, mine.certificate, mine.authority))
