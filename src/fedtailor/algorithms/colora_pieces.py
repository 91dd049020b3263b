"""What clients of different models have alike: Co-LoRA's pieces P and Q (arXiv 2506.11024)."""

from __future__ import annotations

from collections.abc import Mapping

from fedtailor.core import Job, Tree
from fedtailor.errors import ConfigError
from fedtailor.techniques.colora import PIECES


def alike(job: Job) -> None:
    """Raises:
    ConfigError: kinds of clients have no pieces of one size, or there is nothing to align their models on.
    """
    server = {name.removesuffix(".A"): t.shape[0] for name, t in job.frozen.items() if name.endswith(".A")}
    for kind in job.kinds:
        theirs = {name.removesuffix(".A"): t.shape[0] for name, t in kind.frozen.items() if name.endswith(".A")}
        if not theirs or not server:
            raise ConfigError(
                "clients.kinds: of models that differ algorithm fedmosaic averages what technique colora has alike in all of them: set "
                "technique.kind = 'colora' and leave the techniques of the kinds out, or set algorithm.kind to distil or local"
            )
        if theirs != server:
            raise ConfigError(
                f"clients.kinds: algorithm fedmosaic needs pieces alike in all models, and one has {spelled(theirs)}, the server's "
                f"{spelled(server)}: give technique colora the same rank and blocks everywhere, and as many technique.target"
            )
        if kind.scaling != job.scaling:
            raise ConfigError(
                f"clients.kinds: pieces mean the same in all models at one scale, and one has alpha / rank = {kind.scaling:g}, the server's "
                f"{job.scaling:g}: give technique colora the same alpha everywhere"
            )
        if not kind.same and not job.public:
            raise ConfigError(
                "clients.kinds: algorithm fedmosaic aligns models on examples that everybody has: set data.public (a data set, or a "
                "share), or algorithm.kind to local"
            )


def spelled(pieces: Mapping[str, int]) -> str:
    blocks = {name.split(".")[1] for name in pieces}
    return f"{len(blocks)} blocks of {len(pieces) // len(blocks)} modules, rank {max(pieces.values())}"


def pieces(tree: Tree) -> Tree:
    """What has one size in every model."""
    return {name: t for name, t in tree.items() if name.startswith(PIECES)}


def rest(tree: Tree) -> Tree:
    return {name: t for name, t in tree.items() if not name.startswith(PIECES)}
