"""From an experiment to the model that it names, for data of which no more is known than a few facts; simulation.py adds the data."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from fedtailor.backbone import Backbone, hidden_width, positions, sample_inputs, similar_words
from fedtailor.backbone import load as load_backbone
from fedtailor.config import DeviceSection, Experiment, ModelSection, TechniqueSection
from fedtailor.core import Algorithm, ClientId, Device, Job, Kind, Site, stream
from fedtailor.cut import ends_class
from fedtailor.ends import Ends, technique_of
from fedtailor.engines.training import Flops, no_flops
from fedtailor.errors import ConfigError, first_line
from fedtailor.filters import FEEDBACK, base
from fedtailor.losses import classification, language
from fedtailor.metrics import Metric, metric
from fedtailor.options import algorithm_named, checked, choose
from fedtailor.part_costs import costed
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.techniques.parts import layers
from fedtailor.techniques.peft import positions_taken
from fedtailor.trees import numel

TEXT = 24  # positions that must be left to a text: steps of up to so many tokens are counted before a run (ledger.py)


class Facts(NamedTuple):
    """All that a model has to know about the data. A run folder keeps it, so that the model can be used without the data."""

    kind: str  # text | image | language | instruction
    labels: list[str]  # class names; [] for language and instruction
    pairs: bool  # a text is two texts
    clients: list[ClientId]  # sorted: ranks, lengths and devices are dealt in this order
    public: int = 0  # examples that everybody has
    newcomers: list[ClientId] = []  # sorted: those that only join after the last round

    @property
    def everybody(self) -> list[ClientId]:
        """In the order in which is dealt: who trains, then who joins."""
        return [*self.clients, *self.newcomers]


class Kit(NamedTuple):
    """What a kind of client works with."""

    backbone: Backbone
    technique: Technique
    flops: Flops = no_flops  # (rows, width) -> operations of a training step
    looks: Flops = no_flops  # the same of a forward pass


@dataclass(frozen=True)
class Model:
    """What can be had without data: the model, how it is trained, and the clients with empty hands."""

    experiment: Experiment  # as given, but for a max_length that the model has room for
    facts: Facts
    backbone: Backbone
    technique: Technique
    algorithm: Algorithm
    metric: Metric
    job: Job
    site: Callable[[ClientId, int], Site]  # with the client's initial tree and device, and no data
    kits: tuple[Kit, ...]  # dealt to the clients in turn; () where all work with what the server has
    joining: Algorithm  # the same algorithm at the rate of its first round

    def kit(self, client: ClientId) -> Kit:
        """What this client works with, or the server."""
        if not self.kits or client not in self.facts.everybody:
            return Kit(self.backbone, self.technique)
        return self.kits[self.facts.everybody.index(client) % len(self.kits)]

    def seen_by(self, client: ClientId) -> Model:
        """The model of one kind of client, for using its own tree."""
        kit = self.kit(client)
        return replace(self, backbone=kit.backbone, technique=kit.technique, kits=())


def equip(experiment: Experiment, facts: Facts, ends: Ends | None = None) -> Model:
    """Load the model that the experiment names, for data of which no more is known than these facts; with `ends`, these and no more.

    Raises:
        ConfigError, DataError: one line: what, where, nearest valid choice.
    """
    seed = experiment.seed
    device = pick_device(experiment.engine.device)
    dtype = torch.bfloat16 if experiment.engine.precision == "bf16" else torch.float32
    kind = experiment.technique.kind

    @functools.cache
    def loaded(model: str, reads_words: bool, embeds: bool) -> Backbone:
        """A backbone once, however many kinds of clients use it; the section as text, as it has no hash."""
        section = ModelSection.model_validate_json(model)
        if not ends:
            return load_backbone(section, facts.kind, facts.labels, seed, device, dtype, reads_words, embeds)
        made = functools.partial(ends_class, front=ends.front, back=ends.back)
        found = load_backbone(section, facts.kind, facts.labels, seed, device, dtype, made=made)
        return found._replace(unread=ends.unread)

    def kit(model: ModelSection, technique: TechniqueSection) -> Kit:
        options = checked(choose(TECHNIQUES, "technique", technique.kind), "technique", technique.options, "backbone")
        backbone = loaded(model.model_dump_json(), technique.kind == "template", technique.kind == "retriever")
        try:
            make = functools.partial(TECHNIQUES[technique.kind], **options)
            return Kit(backbone, technique_of(ends, technique.kind, backbone, make) if ends else make(backbone))
        except (RuntimeError, MemoryError) as error:  # torch's word for memory that there is not
            raise ConfigError(f"technique.kind '{technique.kind}' with {options} does not fit: {first_line(error)}") from error

    backbone, technique, *_ = kit(experiment.model, experiment.technique)
    kits = tuple(kit(k.model or experiment.model, k.technique or experiment.technique) for k in experiment.clients.kinds)
    for each in kits:
        if not numel(each.technique.init) or each.technique.loss:
            raise ConfigError(f"clients.kinds: technique '{each.technique.kind}' trains no class logits: choose another")
    sizes = experiment.clients.ranks or experiment.clients.lengths
    if sizes and kits:
        raise ConfigError("clients.kinds has techniques with ranks and lengths of their own: leave clients.ranks and lengths out")
    fitting = {"ranks": ("lora", "peft"), "lengths": ("prefix", "prompt")}["ranks" if experiment.clients.ranks else "lengths"]
    if sizes and kind not in fitting:
        raise ConfigError(f"clients.ranks goes with technique lora, clients.lengths with prefix and prompt (here it is {kind})")
    trees = {size: technique.resized(size) for size in sorted(set(sizes))}
    if sizes:
        technique = technique._replace(init=trees[max(sizes)])  # the server holds the largest
    found = metric(experiment.data.metric, facts.kind, experiment.model.labels or len(facts.labels))
    found = technique.metric(found) if technique.metric else found
    job = Job(
        loss=technique.loss or (language if facts.kind in ("language", "instruction") else classification),
        judge=found.judge,
        tally=found.tally,
        plan=experiment.train.plan(experiment.rounds),
        clients=len(facts.clients),
        device=device,
        names=facts.clients,
        sizes=tuple(sizes),
        exact_down=not experiment.filters.down,
        exact_up=all(name.endswith("@gradient") for name in experiment.filters.up),
        valid=experiment.clients.valid,
        seed=seed,
        passes=technique.passes,
        classes=experiment.model.labels or len(facts.labels),
        pixels=tuple(shown.shape[1:]) if (shown := sample_inputs(backbone, 1).get("pixel_values")) is not None else (),
        public=facts.public,
        hidden=hidden_width(backbone),
        similar=functools.partial(similar_words, backbone),
        reader=technique.reader,
        server=Device("server", flops=1e9 * experiment.engine.server_gflops),
        kinds=tuple(Kind(k.technique.init, k.technique.frozen, k.backbone is backbone, k.technique.scaling) for k in kits),
        frozen=technique.frozen,
        scaling=technique.scaling,
    )
    remake = functools.partial(TECHNIQUES[kind], **experiment.technique.options)
    job = job._replace(layers=costed(layers(technique), technique, remake, job))
    factory = algorithm_named(experiment.algorithm.kind)
    options = checked(factory, "algorithm", experiment.algorithm.options, "job")
    algorithm = factory(job, **options)
    if facts.newcomers and algorithm.consult:
        raise ConfigError(
            f"clients.newcomers: algorithm {experiment.algorithm.kind} answers from the rows of whoever is asked, and has nothing for "
            "clients that join: leave clients.newcomers out"
        )
    steady = job._replace(plan=job.plan._replace(decay="constant"))
    joining = algorithm if job.plan == steady.plan or not facts.newcomers else factory(steady, **options)
    if not algorithm.splits:
        for each in (Kit(backbone, technique), *kits):
            _fits_memory(experiment, each.backbone)
    if algorithm.trains and not (ends or numel(technique.init)):
        raise ConfigError(
            f"technique '{kind}' has nothing to train: algorithm {experiment.algorithm.kind} needs another one, "
            "or set algorithm.kind to prompt-search (template), rag (retriever) or zero-shot"
        )
    again = [name for name in experiment.filters.up if base(name) in FEEDBACK]
    if not algorithm.updates and again:
        raise ConfigError(
            f"filters.up: '{again[0]}' gives what a reply lost with the next one, and replies of algorithm {experiment.algorithm.kind} "
            f"are not about the same things: use '{base(again[0])}-plain'"
        )
    if kits and not algorithm.of_all_kinds:
        raise ConfigError(
            f"clients.kinds: algorithm {experiment.algorithm.kind} exchanges trees, which must be alike: "
            "set algorithm.kind to distil or local, or to fedmosaic with technique colora"
        )
    profiles = devices(experiment, facts.clients)
    own_length = "max_length" in experiment.data.model_fields_set
    for each in (Kit(backbone, technique), *kits):
        experiment = with_room(experiment, each.backbone, positions_taken(each.technique), own_length)
    places = {c: i for i, c in enumerate(facts.everybody)}
    inits = {c: trees[sizes[i % len(sizes)]] for c, i in places.items()} if sizes else {}
    inits |= {c: kits[i % len(kits)].technique.init for c, i in places.items()} if kits else {}

    def site(client: ClientId, round: int) -> Site:
        device, number = profiles.get(client, Device()), places.get(client, 0)
        return Site(client, {}, inits.get(client, technique.init), round, seed, device, number)

    return Model(experiment, facts, backbone, technique, algorithm, found, job, site, kits, joining)


def with_room(experiment: Experiment, backbone: Backbone, taken: int, own: bool) -> Experiment:
    """The experiment with a max_length that fits beside `taken` tokens of prompt: unless it is the user's own, it is lowered.

    Raises:
        ConfigError: the model has fewer positions.
    """
    limit, asked = positions(backbone), experiment.data.max_length
    if limit is None or asked + taken <= limit:
        return experiment
    has = f"the model has {limit} positions" + (f", the prompt takes {taken}" if taken else "")
    if limit - taken < TEXT:
        raise ConfigError(f"technique: {has}: make the prompt {limit - TEXT} tokens long or shorter")
    if own:
        raise ConfigError(f"data.max_length = {asked}: {has}: set data.max_length to {limit - taken} or less")
    return experiment.model_copy(update={"data": experiment.data.model_copy(update={"max_length": limit - taken})})


def _fits_memory(experiment: Experiment, backbone: Backbone) -> None:
    needed = sum(p.numel() * p.element_size() for p in backbone.model.parameters())
    for device in map(device_of, experiment.clients.devices):
        if 0 < device.memory < needed:
            raise ConfigError(
                f"clients.devices '{device.name}': memory_mb = {device.memory / 1e6:g}, but the model alone takes "
                f"{needed / 1e6:.1f} MB: raise memory_mb to what the device has, or choose a smaller model"
            )


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
        packet_loss=section.packet_loss,
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
