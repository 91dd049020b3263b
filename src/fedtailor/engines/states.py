"""State that survives a kill at any byte: new files beside the old ones, then one atomic manifest, then the clean-up."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from fedtailor import wire
from fedtailor.core import ClientId, Message, Tree
from fedtailor.errors import RunError
from fedtailor.trees import nbytes

MANIFEST = "checkpoint.json"
LARGE = 256_000_000
"""Bytes above which a server's state is not copied into memory to be read or hashed."""
OWN = sys.maxsize
"""What is read here was written here: no bound against strangers. A state may have a tree a client, by name."""


class States:
    """Server state, every client's own state, and what the engine carries, in one folder.

    A client's own state lies on disk while the client is idle. `write_own` never overwrites a file that the manifest names.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own: dict[ClientId, str] = {}
        self.elsewhere: dict[ClientId, str] = {}  # digests of own states that lie with their owners
        self.digests: dict[str, str] = {}
        self._count = 0
        self._named: set[str] = set()  # by the last checkpoint
        folder.mkdir(parents=True, exist_ok=True)

    def read_own(self, client: ClientId) -> Tree:
        """{} for a client that has no state yet."""
        return dict(self._read(self.own[client]).body) if client in self.own else {}

    def write_own(self, client: ClientId, own: Tree) -> None:
        before = self.own.get(client)
        if own:
            self.own[client] = self._write(f"own-{client}", own)
        else:
            self.own.pop(client, None)
        if before and before not in self._named:  # a client may write many times a round: only the last one will be wanted
            (self.folder / before).unlink(missing_ok=True)

    def commit(self, round: int, server: Tree, engine: Tree, ledger: dict[str, Any]) -> None:
        """Make (round, server state, engine state, all own states) the checkpoint."""
        manifest: dict[str, Any] = {
            "round": round,
            "server": self._write("server", server),
            "engine": self._write("engine", engine),
            "own": self.own,
            "elsewhere": self.elsewhere,
            "ledger": ledger,
            "count": self._count,
        }
        named = {manifest["server"], manifest["engine"], *self.own.values()}
        manifest["digests"] = self.digests = {name: self.digests[name] for name in sorted(named)}
        text = json.dumps(manifest, sort_keys=True)
        body = json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text})
        try:
            wire.atomically(self.folder / MANIFEST, lambda path: path.write_text(body, encoding="utf-8"))
        except OSError as error:
            raise RunError(f"{self.folder}: cannot write state ({error.strerror}): free space, then --resume") from error
        self._named = named
        self._sweep(named)

    def resume(self) -> tuple[int, Tree, Tree, dict[str, Any]] | None:
        """(round, server state, engine state, ledger) of the last checkpoint, or None where there is none.

        Raises:
            RunError: a file of the checkpoint is missing or altered.
        """
        path = self.folder / MANIFEST
        if not path.is_file():
            self._sweep(set())
            return None
        try:
            outer = json.loads(path.read_text(encoding="utf-8"))
            text = outer["manifest"]
            intact = hashlib.sha256(text.encode()).hexdigest() == outer["sha256"]
            manifest = json.loads(text)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RunError(f"{path}: corrupt checkpoint ({type(error).__name__}): start afresh with another --out") from error
        if not intact:
            raise RunError(f"{path}: corrupt checkpoint (its sum does not match): start afresh with another --out")
        self.own, self.digests, self._count = manifest["own"], manifest["digests"], manifest["count"]
        self.elsewhere = manifest.get("elsewhere", {})
        self._named = {manifest["server"], manifest["engine"], *self.own.values()}
        self._sweep(self._named)
        server, engine = self._read(manifest["server"], mapped=True).body, self._read(manifest["engine"]).body
        for name in self.own.values():
            self._verify(name)
        return manifest["round"], server, engine, manifest["ledger"]

    def hash(self, server: Tree) -> str:
        """sha256 over the server state and every client's own state: equal runs have equal ones."""
        digest = self._hashed(Message("state", server))
        own = {client: self.digests[name] for client, name in self.own.items()} | self.elsewhere
        for client in sorted(own):
            digest.update(client.encode() + bytes.fromhex(own[client]))
        return str(digest.hexdigest())

    def _hashed(self, message: Message) -> Any:
        """sha256 of a message's bytes, of large ones through a file: in memory they would be a second copy."""
        if nbytes(message.body) <= LARGE:
            return hashlib.sha256(wire.encode(message, OWN))
        path = self.folder / ".writing-to-hash"
        try:
            wire.write(message, path, OWN)
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256")
        finally:
            path.unlink(missing_ok=True)

    def _write(self, stem: str, tree: Tree) -> str:
        self._count += 1
        name = f"{stem}-{self._count:08d}.safetensors"
        try:
            wire.write(Message("state", tree), self.folder / name, OWN)
        except OSError as error:
            raise RunError(f"{self.folder}: cannot write state ({error.strerror}): free space, then --resume") from error
        self.digests[name] = wire.sha256_of(self.folder / name)
        return name

    def _read(self, name: str, mapped: bool = False) -> Message:
        """A file of the checkpoint; with `mapped` a large one is not copied into memory."""
        self._verify(name)
        path = self.folder / name
        return wire.read(path, max_bytes=OWN, mapped=mapped and path.stat().st_size > LARGE, max_header=OWN)

    def _verify(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file() or wire.sha256_of(path) != self.digests.get(name):
            raise RunError(f"{path}: corrupt checkpoint (missing or altered): start afresh with another --out")

    def _sweep(self, named: set[str]) -> None:
        for path in self.folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)
        for path in self.folder.glob(".writing-*"):
            path.unlink(missing_ok=True)
