"""What a member keeps between letters: its own state, by the name of its content, and the replies it has given.

The server says with each letter which own state it goes on from, and which one its checkpoint has: so a letter that comes again, from
the same server or from one that was killed and goes on from its checkpoint, takes effect once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtailor import wire
from fedtailor.core import ClientId, Message, Tree
from fedtailor.errors import RunError


def arriving(home: Path) -> Path:
    """The folder in which what is large arrives, empty: what a process that was killed left is of no use.

    Raises:
        RunError: it cannot be written.
    """
    folder = home / "line"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to '{home}': {error.strerror}") from error
    return folder


class Full(RunError):
    """Nothing more can be kept: it is no use to go on."""


class Shelf:
    """A folder; the `Owner` of engines/clients.py for one client. `begin` says which own state is the present one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot write to '{folder}': {error.strerror}") from error
        for path in (*folder.glob(".writing-*"), *folder.glob("arriving-*")):
            path.unlink(missing_ok=True)

    def begin(self, digest: str, kept: str) -> None:
        """Go on from this own state ("": none); what is neither it, nor the latest, nor the checkpoint's is not needed any more.

        Raises:
            RunError: it is not here.
        """
        if digest and not self._path(digest).is_file():
            raise RunError("its own state is gone: was its folder emptied? Start the federation afresh with another --out")
        keep = {self._path(d).name for d in (digest, kept, self.now) if d}
        self.now = digest
        for path in self.folder.glob("own-*.safetensors"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def read_own(self, client: ClientId) -> Tree:
        if not self.now:
            return {}
        path = self._path(self.now)
        if wire.sha256_of(path) != self.now:
            raise RunError(f"{path}: altered or cut short: start the federation afresh with another --out")
        return dict(wire.read(path).body)

    def write_own(self, client: ClientId, own: Tree) -> None:
        if not own:
            self.now = ""
            return
        temporary = self.folder / "own.safetensors"
        try:
            wire.write(Message("state", own), temporary)
            self.now = wire.sha256_of(temporary)
            temporary.replace(self._path(self.now))
        except OSError as error:
            raise Full(f"{self.folder}: cannot write state ({error.strerror}): free space, then join again") from error

    def replied(self, id: str) -> tuple[Mapping[str, Any], Path] | None:
        """(note, content) of the reply to this letter, if it was the last one answered."""
        try:
            told = json.loads((self.folder / "reply.json").read_text(encoding="utf-8"))
            content = self.folder / told["content"]
            if told["id"] == id and content.is_file():
                return told["note"], content
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return None

    def reply(self, id: str, note: Mapping[str, Any], message: Message) -> Path:
        """Keep a reply until the next one; a kill leaves the one before or this one."""
        before = list(self.folder.glob("reply-*.safetensors"))
        content = self.folder / f"reply-{hashlib.sha256(id.encode()).hexdigest()[:16]}.safetensors"
        try:
            wire.write(message, content)
            text = json.dumps({"id": id, "note": dict(note), "content": content.name})
            wire.atomically(self.folder / "reply.json", lambda path: path.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise Full(f"{self.folder}: cannot write a reply ({error.strerror}): free space, then join again") from error
        for path in before:
            if path != content:
                path.unlink(missing_ok=True)
        return content

    def _path(self, digest: str) -> Path:
        if len(digest) != 64 or not all(c in "0123456789abcdef" for c in digest):
            raise RunError("the server names an own state that has no such name")
        return self.folder / f"own-{digest}.safetensors"
