"""From an experiment to everything a run needs: the model (equip.py), the data, and every client's part of it."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtailor.backbone import sample_inputs
from fedtailor.config import Experiment
from fedtailor.core import SERVER, ClientId, Reference, Site, seed_of, stream
from fedtailor.data.examples import Store, Subset
from fedtailor.data.sources import Source, owned
from fedtailor.ends import Ends
from fedtailor.engines.training import Flops, no_flops
from fedtailor.equip import Facts, Kit, Model, equip
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.ledger import count_flops
from fedtailor.losses import language
from fedtailor.trees import leaves, numel, signature, tree_map

OWN = "own"
"""The name of data that is not here."""
BASELINES = ("pooled",)  # algorithms that train where the data is pooled: nothing crosses a wire


class Split(NamedTuple):
    """A client's rows in the training store."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class World(Model):
    """What a run works with. Sites are made when asked for: an idle client costs nothing."""

    clients: dict[ClientId, Split]
    newcomers: dict[ClientId, Split]
    counts: np.ndarray  # (clients, classes) training rows, for the picture; (clients, 1) without classes
    store: Store
    test: Store
    sites: Callable[[ClientId, int], Site]
    valid_sites: Callable[[ClientId, int], Site]
    flops: Flops  # what the server's kit costs
    looks: Flops

    def without_training(self) -> dict[str, float]:
        """What needs no training: always the commonest training class."""
        if not self.facts.labels or not self.counts.sum() or not self.test.rows:
            return {}
        common = int(self.counts.sum(0).argmax())
        label = self.test.fixed["labels"]
        nothing, sure = torch.zeros(len(label)), torch.ones(len(label))
        outputs = {"nll": nothing, "predicted": torch.full_like(label, common), "confidence": sure, "label": label}
        return {"majority": self.metric.value(self.metric.tally(outputs))}


def build(experiment: Experiment) -> World:
    """Load and encode everything that the experiment names.

    Raises:
        ConfigError, DataError: one line: what, where, nearest valid choice.
    """
    from fedtailor.data.partition import split
    from fedtailor.data.sources import load as load_source

    seed = experiment.seed
    options = [
        item for t in (experiment.technique, *(k.technique for k in experiment.clients.kinds)) if t for item in t.options.items()
    ]
    for name, value in options:
        if name.endswith("dropout") and value and not experiment.train.dropout:
            raise ConfigError(
                f"technique.{name} = {value} does nothing unless the model is trained with dropout: set train.dropout = true"
            )
    if experiment.data.name == OWN:
        raise ConfigError(f"data.name '{OWN}' is what the members of a federation bring: use serve and join, or name data")
    source = load_source(experiment.data, seed)
    parts = split(source.train, experiment.clients, seed)
    clients = {safe(c): _split(c, rows, experiment, seed) for c, rows in parts.items()}
    if len(clients) != len(parts):
        raise DataError("client names differ only in characters that a file name cannot hold: rename them")
    late = joining_later(sorted(clients), experiment)
    newcomers, clients = {c: clients[c] for c in late}, {c: rows for c, rows in clients.items() if c not in late}
    pairs, public = "pair" in source.train.column_names, len(source.public) if source.public else 0
    facts = Facts(source.kind, source.labels, pairs, sorted(clients), public, late)
    return furnish(experiment, source, clients, facts, newcomers=newcomers)


def joining_later(clients: list[ClientId], experiment: Experiment) -> list[ClientId]:
    """Those of these clients that take no part in the training, sorted.

    Raises:
        ConfigError: no such client, nobody would be left to train, or they would have no rows to be judged on.
    """
    asked = experiment.clients.newcomers
    if not asked:
        return []
    if not experiment.clients.test:
        raise ConfigError("clients.newcomers are judged on their own test rows: set clients.test above 0")
    if isinstance(asked, list):
        found = sorted({safe(name) for name in asked})
        for name in found:
            if name not in clients:
                raise ConfigError(f"clients.newcomers: there is no client '{name}': {nearest(name, clients)}")
    else:
        order = torch.randperm(len(clients), generator=stream(experiment.seed, "newcomers")).tolist()
        found = sorted(clients[i] for i in order[:asked])
    if len(found) == len(clients) or (isinstance(asked, int) and asked > len(clients)):
        raise ConfigError(f"clients.newcomers leaves none of {len(clients)} clients to train: name {len(clients) - 1} or fewer")
    return found


def federates(experiment: Experiment) -> None:
    """Raises:
    ConfigError: the experiment is for a simulation alone.
    """
    kind = experiment.algorithm.kind
    if kind in BASELINES:
        raise ConfigError(f"algorithm.kind '{kind}' trains where all data is in one place: use run")
    if experiment.clients.newcomers:
        raise ConfigError("clients.newcomers are judged in a simulation only: use run, or leave it out")


def furnish(
    experiment: Experiment,
    source: Source,
    clients: dict[ClientId, Split],
    facts: Facts,
    ends: Ends | None = None,
    newcomers: dict[ClientId, Split] = {},  # noqa: B006 (never written to)
) -> World:
    """The world of these facts with the data that is here: of all clients in a simulation, of one or of none in a federation. With
    `ends` only these of the model are here.

    Raises: as `build`.
    """
    from fedtailor.data.encode import encode
    from fedtailor.data.partition import describe

    model = equip(experiment, facts, ends)
    if not ends:  # else the server has looked
        model.algorithm.init(
            model.technique.init
        )  # an algorithm that this technique does not suit says so now, not after a round

    @functools.cache
    def encoded(at: int) -> Stores:
        """The data as this backbone's tokens; by place, as models have no hash: equal ones are one object."""
        processor, longest = backbones[at].processor, model.experiment.data.max_length
        train, test = (encode(part, source.kind, processor, longest) for part in (source.train, source.test))
        return Stores(train, test, encode(source.public, source.kind, processor, longest) if source.public else None)

    backbones = [model.backbone, *(kit.backbone for kit in model.kits)]
    first = [next(i for i, other in enumerate(backbones) if other is backbone) for backbone in backbones]
    stores = [encoded(at) for at in first]
    store, test = stores[0].train, stores[0].test
    labels = np.asarray(source.train["label"]) if source.labels and len(source.train) else np.zeros(len(source.train), dtype=int)
    counts = describe({c: s.train for c, s in clients.items()}, labels)
    sites, valid_sites = _sites(model, clients, newcomers, stores)
    ragged = source.kind != "image"
    # Parts are counted by themselves (part_costs.py).
    flops, looks = (no_flops, no_flops) if ends else _counted(model, Kit(model.backbone, model.technique), ragged)
    costs = [_counted(model, kit, ragged) for kit in model.kits]
    kits = tuple(kit._replace(flops=train, looks=look) for kit, (train, look) in zip(model.kits, costs, strict=True))
    return World(
        **{**vars(model), "kits": kits},
        clients=clients,
        newcomers=newcomers,
        counts=counts,
        store=store,
        test=test,
        sites=sites,
        valid_sites=valid_sites,
        flops=flops,
        looks=looks,
    )


def of_member(experiment: Experiment, facts: Facts, client: ClientId, ends: Ends | None = None) -> World:
    """The world of one member, who has no data but its own, and where a model is cut no more of it than its ends.

    Raises:
        DataError: its data does not suit the federation: another kind, a column that is not there, a class that nobody else has.
    """
    source = owned(experiment.data, facts.kind, facts.labels, facts.pairs, experiment.seed)
    rows = np.arange(len(source.train))
    return furnish(experiment, source, {client: _split(client, rows, experiment, experiment.seed)}, _told(facts, source), ends)


def of_server(experiment: Experiment, facts: Facts) -> World:
    """The world of a server that has no training data; a test set where `data.test` names one.

    Raises: as `build`.
    """
    source = owned(experiment.data.model_copy(update={"name": OWN}), facts.kind, facts.labels, facts.pairs, experiment.seed)
    return furnish(experiment, source, {}, _told(facts, source))


def _told(facts: Facts, source: Source) -> Facts:
    """How many public examples there are is counted here, whatever others say."""
    return facts._replace(public=len(source.public) if source.public else 0)


_COUNTED: dict[Any, tuple[Flops, Flops]] = {}


def _counted(model: Model, kit: Kit, ragged: bool) -> tuple[Flops, Flops]:
    """What a training step and a forward pass cost with this kit, (rows, width) -> operations; counted once in a process for all models
    and trees of the same shapes, unless a tree has texts."""
    network: Any = kit.backbone.model
    sections = model.experiment.technique, *model.experiment.clients.kinds
    made = type(network), network.dtype, network.config.to_json_string(), *(s.model_dump_json() for s in sections)
    key = *made, kit.technique.kind, signature(kit.technique.init), model.job.loss, model.job.device, ragged
    if key in _COUNTED:
        return _COUNTED[key]
    found = _count(model, kit, ragged)
    if all(isinstance(leaf, torch.Tensor) for _, leaf in leaves(kit.technique.init)):
        _COUNTED[key] = found
    return found


def _count(model: Model, kit: Kit, ragged: bool) -> tuple[Flops, Flops]:
    job, technique = model.job, kit.technique
    forward = technique.bind(False)

    def batch_of(width: int) -> dict[str, torch.Tensor]:
        inputs = sample_inputs(kit.backbone, width)
        labels = inputs["input_ids"] if job.loss is language else torch.zeros(1, dtype=torch.long, device=job.device)
        return {**inputs, "labels": labels}

    # The personal part of an algorithm's tree costs as much as the technique's own: its count is everybody's.
    tree = _on(technique.init, job.device)
    with torch.no_grad():
        forward(tree, batch_of(8))  # what a technique keeps after its first call (embedded class texts) is not counted
    looks = count_flops(forward, None, tree, batch_of, ragged)
    flops = count_flops(forward, job.loss, tree, batch_of, ragged) if numel(technique.init) else looks
    each = technique.passes([technique.init])  # that a row was read more than once is said by the one who asks
    return flops, lambda rows, width: looks(rows, width) / each  # of numbers alone: nothing here keeps a model


class Stores(NamedTuple):
    """The data in one backbone's tokens."""

    train: Store
    test: Store
    public: Store | None


def _sites(
    model: Model, clients: dict[ClientId, Split], newcomers: dict[ClientId, Split], stores: Sequence[Stores]
) -> tuple[Callable[[ClientId, int], Site], Callable[[ClientId, int], Site]]:
    """The model's sites with their data, and the same for validation. Stores: the server's, then one a kit."""
    experiment = model.experiment
    none = np.arange(0)
    everything = np.concatenate([none, *(clients[c].train for c in sorted(clients))])
    valid = np.concatenate([none, *(clients[c].valid for c in sorted(clients))])
    valid = _sample(valid, experiment.evaluate.valid_limit, seed_of(experiment.seed, "valid"))
    test_rows = np.arange(stores[0].test.rows)
    glance = _sample(test_rows, experiment.evaluate.sample, seed_of(experiment.seed, "sample"))
    places = {c: i for i, c in enumerate(model.facts.everybody)}
    held = {**clients, **newcomers}  # what is pooled above is of `clients` alone

    def of(client: ClientId) -> Stores:
        return stores[1 + places[client] % len(model.kits)] if model.kits and client != SERVER else stores[0]

    def sites(client: ClientId, round: int) -> Site:
        store, test, public = of(client)
        if client == SERVER:
            data = {"train": Subset(store, everything), "valid": Subset(store, valid), "test": Subset(test, test_rows)}
        else:
            rows = held[client]
            data = {"train": Subset(store, rows.train), "valid": Subset(store, rows.valid), "test": Subset(store, rows.test)}
            if model.algorithm.personal:
                data["global"] = Subset(test, glance)
        if public is not None:
            data["public"] = Subset(public, np.arange(public.rows))
        site = model.site(client, round)._replace(data=data)
        return site._replace(reference=referred(client)) if model.kits and client != SERVER else site

    def referred(client: ClientId) -> Reference:
        data = {"train": Subset(stores[0].train, held[client].train)}
        if stores[0].public is not None:
            data["public"] = Subset(stores[0].public, np.arange(stores[0].public.rows))
        return Reference(model.technique.init, data)

    def valid_sites(client: ClientId, round: int) -> Site:
        """The same sites, their validation rows in the place of the test rows."""
        site = sites(client, round)
        rows, store = valid if client == SERVER else held[client].valid, of(client).train
        return site._replace(data={"train": site.data["train"], "test": Subset(store, rows)})

    return sites, valid_sites


def _split(client: ClientId, rows: np.ndarray, experiment: Experiment, seed: int) -> Split:
    """A client's rows in random order: its own test split, its validation split, and at least one row to train on."""
    order = torch.randperm(len(rows), generator=stream(seed, "split", client)).numpy()
    rows = np.asarray(rows)[order]
    test = min(round(experiment.clients.test * len(rows)), len(rows) - 1)
    valid = min(round(experiment.clients.valid * len(rows)), len(rows) - 1 - test)
    return Split(rows[test + valid :], rows[test : test + valid], rows[:test])


def rows_of(train: int, valid: int, test: int) -> Split:
    """So many rows, somewhere else. They take no memory: how many there are is what a member says, and it may say anything."""
    return Split(*(np.broadcast_to(np.int64(0), n) for n in (train, valid, test)))


def _sample(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    if len(rows) <= limit:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(rows[order[:limit]])


def safe(client: ClientId) -> ClientId:
    """A client's name as a file name and a name on the wire, also where the name means something else there."""
    name = re.sub(r"[^\w.\-]", "_", client)
    return f"{name}_" if name in (".", "..", SERVER) else name


def _on(tree: dict[str, Any], device: str) -> dict[str, Any]:
    return tree_map(lambda t: t.to(device), tree)
