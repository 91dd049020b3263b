"""From an experiment to everything a run needs: backbone, technique, algorithm, and the sites of all clients."""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fedtailor.algorithms import ALGORITHMS
from fedtailor.backbone import Backbone, sample_inputs
from fedtailor.backbone import load as load_backbone
from fedtailor.config import DeviceSection, Experiment
from fedtailor.core import SERVER, Algorithm, ClientId, Device, Job, Site, seed_of, stream
from fedtailor.data.examples import Store, Subset
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.ledger import count_flops
from fedtailor.losses import classification, language
from fedtailor.metrics import Metric, metric
from fedtailor.techniques import TECHNIQUES, Technique

CODE = ("loss", "server_opt")  # parameters of an algorithm that are functions: set in code, never in a file
BASELINES = ("pooled",)  # algorithms that train where the data is pooled: nothing crosses a wire


class Split(NamedTuple):
    """A client's rows in the training store."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


class World(NamedTuple):
    """What a run works with. Sites are made when asked for: an idle client costs nothing."""

    experiment: Experiment
    backbone: Backbone
    technique: Technique
    algorithm: Algorithm
    metric: Metric
    clients: dict[ClientId, Split]
    counts: np.ndarray  # (clients, classes) training rows, for the picture; (clients, 1) without classes
    labels: list[str]
    store: Store
    test: Store
    device: str
    sites: Callable[[ClientId, int], Site]
    valid_sites: Callable[[ClientId, int], Site]
    flops: Callable[[int, int], float]
    columns: list[str]

    def without_training(self) -> dict[str, float]:
        """What needs no training: always the commonest training class."""
        if not self.labels:
            return {}
        common = int(self.counts.sum(0).argmax())
        label = self.test.fixed["labels"]
        outputs = {"nll": torch.zeros(len(label)), "predicted": torch.full_like(label, common), "label": label}
        return {"majority": self.metric.value(self.metric.tally(outputs))}


def build(experiment: Experiment) -> World:
    """Load and encode everything that the experiment names.

    Raises:
        ConfigError, DataError: one line: what, where, nearest valid choice.
    """
    from fedtailor.data.encode import encode
    from fedtailor.data.partition import describe, split
    from fedtailor.data.sources import load as load_source

    seed = experiment.seed
    device = pick_device(experiment.engine.device)
    source = load_source(experiment.data, seed)
    parts = split(source.train, experiment.clients, seed)
    dtype = torch.bfloat16 if experiment.engine.precision == "bf16" else torch.float32
    backbone = load_backbone(experiment.model, source.kind, source.labels, seed, device, dtype)
    technique = choose(TECHNIQUES, "technique", experiment.technique.kind)(
        backbone, **checked(TECHNIQUES[experiment.technique.kind], "technique", experiment.technique.options, "backbone")
    )
    store, test = (
        encode(part, source.kind, backbone.processor, experiment.data.max_length) for part in (source.train, source.test)
    )
    clients = {_safe(c): _split(c, rows, experiment, seed) for c, rows in parts.items()}
    if len(clients) != len(parts):
        raise DataError("client names differ only in characters that a file name cannot hold: rename them")
    found = metric(experiment.data.metric, source.kind, len(source.labels))
    job = Job(
        loss=language if source.kind in ("language", "instruction") else classification,
        judge=found.judge,
        tally=found.tally,
        plan=experiment.train.plan(),
        clients=len(clients),
        device=device,
    )
    factory = algorithm_named(experiment.algorithm.kind)
    algorithm = factory(job, **checked(factory, "algorithm", experiment.algorithm.options, "job"))
    labels = np.asarray(source.train["label"]) if source.labels else np.zeros(len(source.train), dtype=int)
    counts = describe({c: s.train for c, s in clients.items()}, labels)
    algorithm.init(technique.init)  # an algorithm that this technique does not suit says so now, not after the first round
    sites, valid_sites = _sites(experiment, technique, algorithm, clients, store, test)
    forward = technique.bind(False)

    def batch_of(width: int) -> dict[str, torch.Tensor]:
        inputs = sample_inputs(backbone, width)
        labels_of = inputs["input_ids"] if job.loss is language else torch.zeros(1, dtype=torch.long, device=device)
        return {**inputs, "labels": labels_of}

    # The personal part of an algorithm's tree costs as much as the technique's own: its count is everybody's.
    flops = count_flops(forward, job.loss, _on(technique.init, device), batch_of, bool(store.ragged))
    return World(
        experiment,
        backbone,
        technique,
        algorithm,
        found,
        clients,
        counts,
        source.labels,
        store,
        test,
        device,
        sites,
        valid_sites,
        flops,
        list(source.train.column_names),
    )


def choose(registry: Mapping[str, Any], section: str, kind: str) -> Any:
    if kind not in registry:
        raise ConfigError(f"unknown {section}.kind '{kind}': {nearest(kind, registry)}")
    return registry[kind]


def algorithm_named(kind: str) -> Callable[..., Algorithm]:
    """A registered algorithm, or the function in a file of the user's own: "path/to/file.py:function".

    Raises:
        ConfigError: no such algorithm, file or function.
    """
    path, found, name = kind.rpartition(":")
    if not found:
        return choose(ALGORITHMS, "algorithm", kind)  # type: ignore[no-any-return]
    if not Path(path).is_file():
        raise ConfigError(f"algorithm.kind '{kind}': there is no file '{path}' (seen from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(f"algorithm.kind '{kind}': '{path}' cannot be imported: {error}") from error
    if not callable(getattr(module, name, None)):
        functions = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ConfigError(f"algorithm.kind '{kind}': '{path}' has no function '{name}': {nearest(name, functions)}")
    return getattr(module, name)  # type: ignore[no-any-return]


def checked(factory: Callable[..., Any], section: str, options: Mapping[str, Any], first: str) -> dict[str, Any]:
    """The options, if they are keywords of this factory and of its annotated types: the signature is the configuration.

    Raises:
        ConfigError: an unknown option (with the nearest), or a value of a wrong type.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known = {n: p for n, p in inspect.signature(factory, eval_str=True).parameters.items() if n not in (first, *CODE)}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values()):
        return dict(options)
    out: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise ConfigError(
                f"unknown key '{section}.{name}' for {section}.kind '{factory.__name__}': "
                + (nearest(name, known) if known else "it has no options")
            )
        try:
            adapter = TypeAdapter(known[name].annotation, config=ConfigDict(arbitrary_types_allowed=True))
            out[name] = adapter.validate_python(value, strict=not isinstance(value, int))
        except ValidationError as error:
            problem = error.errors()[0]["msg"].replace("Input should be", "should be")
            raise ConfigError(f"'{section}.{name}' {problem} (got {value!r})") from error
    return out


def pick_device(wanted: str) -> str:
    """The device to use: CUDA where there is one, unless the experiment says otherwise."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", wanted)
    if not found:
        raise ConfigError(f"engine.device '{wanted}' is no device: choose auto, cpu, cuda or cuda:N")
    if wanted != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"engine.device '{wanted}': this machine has no CUDA; choose auto or cpu")
    if int(found[1] or 0) >= max(torch.cuda.device_count(), 1):
        raise ConfigError(f"engine.device '{wanted}': this machine has {torch.cuda.device_count()} CUDA devices, from cuda:0 on")
    return wanted


def device_of(section: DeviceSection) -> Device:
    return Device(
        name=section.name,
        flops=section.gflops * 1e9,
        memory=section.memory_mb * 1e6,
        uplink=section.uplink_mbps * 1e6 / 8,
        downlink=section.downlink_mbps * 1e6 / 8,
        latency=section.latency_ms / 1e3,
        dropout=section.dropout,
    )


def devices(experiment: Experiment, clients: list[ClientId]) -> dict[ClientId, Device]:
    """Each client's device, dealt by share in an order drawn from the seed."""
    profiles = experiment.clients.devices
    if not profiles:
        return dict.fromkeys(clients, Device())
    shares = np.cumsum([p.share for p in profiles]) / sum(p.share for p in profiles)
    order = torch.randperm(len(clients), generator=stream(experiment.seed, "devices")).tolist()
    places = (np.asarray(order) + 0.5) / len(clients)
    picked = np.minimum(np.searchsorted(shares, places), len(profiles) - 1)
    return {c: device_of(profiles[int(i)]) for c, i in zip(clients, picked, strict=True)}


def _sites(
    experiment: Experiment, technique: Technique, algorithm: Algorithm, clients: dict[ClientId, Split], store: Store, test: Store
) -> tuple[Callable[[ClientId, int], Site], Callable[[ClientId, int], Site]]:
    names = sorted(clients)
    device = devices(experiment, names)
    sizes = experiment.clients.ranks or experiment.clients.lengths
    if (experiment.clients.ranks and technique.kind == "prefix") or (experiment.clients.lengths and technique.kind == "lora"):
        raise ConfigError("clients.ranks goes with technique lora, clients.lengths with prefix and prompt")
    trees = {size: technique.resized(size) for size in sorted(set(sizes))}
    inits = {c: trees[sizes[i % len(sizes)]] if sizes else technique.init for i, c in enumerate(names)}
    everything = np.concatenate([clients[c].train for c in names])
    valid = np.concatenate([clients[c].valid for c in names])
    valid = _sample(valid, experiment.evaluate.valid_limit, seed_of(experiment.seed, "valid"))
    whole = Subset(test, np.arange(test.rows))
    glance = Subset(test, _sample(np.arange(test.rows), experiment.evaluate.sample, seed_of(experiment.seed, "sample")))

    def sites(client: ClientId, round: int) -> Site:
        if client == SERVER:
            data = {"train": Subset(store, everything), "test": whole}
            return Site(client, data, technique.init, round, experiment.seed)
        rows = clients[client]
        data = {"train": Subset(store, rows.train), "valid": Subset(store, rows.valid), "test": Subset(store, rows.test)}
        if algorithm.personal:
            data["global"] = glance
        return Site(client, data, inits[client], round, experiment.seed, device[client])

    def valid_sites(client: ClientId, round: int) -> Site:
        """The same sites, their validation rows in the place of the test rows."""
        site = sites(client, round)
        rows = valid if client == SERVER else clients[client].valid
        return site._replace(data={"test": Subset(store, rows)})

    return sites, valid_sites


def _split(client: ClientId, rows: np.ndarray, experiment: Experiment, seed: int) -> Split:
    """A client's rows in random order: its own test split, its validation split, and at least one row to train on."""
    order = torch.randperm(len(rows), generator=stream(seed, "split", client)).numpy()
    rows = np.asarray(rows)[order]
    test = min(round(experiment.clients.test * len(rows)), len(rows) - 1)
    valid = min(round(experiment.clients.valid * len(rows)), len(rows) - 1 - test)
    return Split(rows[test + valid :], rows[test : test + valid], rows[:test])


def _sample(rows: np.ndarray, limit: int, seed: int) -> np.ndarray:
    if len(rows) <= limit:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).numpy()
    return np.sort(rows[order[:limit]])


def _safe(client: ClientId) -> ClientId:
    """A client's name as a file name and a name on the wire."""
    return re.sub(r"[^\w.\-]", "_", client)


def _on(tree: dict[str, Any], device: str) -> dict[str, Any]:
    return {name: value.to(device) for name, value in tree.items()}
