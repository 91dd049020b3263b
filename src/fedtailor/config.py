"""The experiment file: TOML in, checked values out. An unknown key names the nearest known one and its line."""

from __future__ import annotations

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
)

from fedtailor.core import Plan
from fedtailor.errors import ConfigError, nearest


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should be a finite number")
    return value


class OpenSection(BaseModel):
    """`kind` and the options of that kind, which its own signature checks."""

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Annotated[Any, AfterValidator(_finite)]] = Field(init=False)
    kind: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelSection(Section):
    name: str = Field("minilm", description="hub id, local folder, or an embedded name")
    revision: str | None = Field(None, description="hub revision")
    labels: int | None = Field(None, ge=2, description="classes, when the data does not say")


class DataSection(Section):
    name: str = Field("pydocs", description="embedded name, hub id, or a path to csv/tsv/jsonl/parquet/images/zip")
    subset: str | None = Field(None, description="configuration of a hub data set")
    kind: Literal["auto", "text", "image", "language", "instruction"] = "auto"
    text: str | None = Field(None, description="column of the text")
    pair: tuple[str, str] | None = Field(None, description="two columns, for pairs of texts")
    label: str | None = Field(None, description="column of the label")
    labels: list[str] = Field(
        [], description="names of the classes, where the data is with the members of a federation (name = 'own')"
    )
    test: str | float | None = Field(None, description="a file or split, or the fraction held out (0.2 without a test set)")
    public: str | float | None = Field(
        None, description="public examples: a data set of the same kind, or the share of the training rows to be held by nobody"
    )
    public_limit: int | None = Field(2000, ge=1, description="public examples, drawn by the seed")
    limit: int | None = Field(None, ge=1, description="training examples, drawn by the seed")
    test_limit: int | None = Field(None, ge=1, description="test examples, drawn by the seed")
    max_length: int = Field(128, ge=2, description="tokens; longer texts are cut, at 128 or where the model's positions end")
    metric: Literal["auto", "accuracy", "f1", "macro_f1", "matthews", "ece", "perplexity"] = "auto"


class DeviceSection(Section):
    name: str
    share: float = Field(1.0, gt=0, description="weight of this profile among the clients")
    gflops: float = Field(0, ge=0, description="1e9 operations a second; 0 takes no simulated time")
    memory_mb: float = Field(0, ge=0)
    uplink_mbps: float = Field(0, ge=0, description="1e6 bits a second; 0 is unlimited")
    downlink_mbps: float = Field(0, ge=0)
    latency_ms: float = Field(0, ge=0)
    dropout: float = Field(0, ge=0, lt=1, description="probability that a letter is lost")
    packet_loss: float = Field(0, ge=0, lt=1, description="share of packets that are sent again")


class PartitionSection(OpenSection):
    kind: str = "iid"


class TechniqueSection(OpenSection):
    kind: str = "prefix"


class KindSection(Section):
    model: ModelSection | None = Field(None, description="the experiment's own when absent")
    technique: TechniqueSection | None = Field(None, description="the experiment's own when absent")


def _some(value: Any) -> Any:
    """How many, or which: what a union would refuse with a line for each of its parts."""
    counted = type(value) is int and value >= 0
    if not counted and not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise ValueError("should be a number of clients, or a list of their names")
    return value


class ClientsSection(Section):
    count: int = Field(20, ge=1)
    per_round: int | None = Field(None, ge=1, description="clients drawn each round; all when absent")
    partition: PartitionSection = PartitionSection(kind="iid")
    newcomers: Annotated[int | list[str], BeforeValidator(_some)] = Field(
        0, description="clients that only join after the last round: how many, drawn by the seed, or their names"
    )
    joining: int = Field(1, ge=1, description="rounds that newcomers take part in before they are judged once more")
    test: float = Field(0.2, ge=0, lt=1, description="fraction of a client's rows kept as its own test split")
    valid: float = Field(0.1, ge=0, lt=1, description="fraction kept for validation")
    devices: list[DeviceSection] = []
    deadline: float = Field(
        0,
        ge=0,
        description="seconds after which a reply is too late, on the virtual clock or in a federation on everybody's; 0: none",
    )
    min_clients: int = Field(
        1, ge=1, description="serve: members that a round needs to begin, and replies to end at its deadline"
    )
    grace: float = Field(60, gt=0, description="serve: seconds that a member may be cut off before its letter counts as lost")
    ranks: list[PositiveInt] = Field([], description="LoRA ranks, dealt to the clients in turn")
    lengths: list[PositiveInt] = Field([], description="prefix or prompt lengths, dealt to the clients in turn")
    kinds: list[KindSection] = Field(
        [], description="models and techniques, dealt to the clients in turn (distil, fedmosaic and local)"
    )


class AlgorithmSection(OpenSection):
    kind: str = "fedavg"


class TrainSection(Section):
    epochs: float = Field(1.0, gt=0)
    steps: int = Field(0, ge=0, description="optimiser steps a round instead of epochs")
    batch: int = Field(16, ge=1)
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(1e-2, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.0, ge=0, lt=1)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the rate, over a client's steps in a round"
    )
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="of the rate, over the rounds")
    clip: float = Field(0.0, ge=0)
    dropout: bool = False

    def plan(self, rounds: int) -> Plan:
        return Plan(**self.model_dump(), rounds=rounds)


class FiltersSection(Section):
    up: list[str] = Field([], description="bf16, fp16, int8, topk=0.1: what a client's reply goes through")
    down: list[str] = []


class EngineSection(Section):
    kind: Literal["local", "ray"] = "local"
    address: str = Field("", description='of a Ray cluster: "auto" or host:port; "" starts one on this machine')
    actors: int = Field(0, ge=0, description="of Ray; 0: one a GPU of the cluster, or without GPUs one for every two cores")
    stacked: bool = Field(True, description="train many clients in one stacked call; false gives the bits of a deployment")
    group: int = Field(0, ge=0, description="clients in a stacked call; 0 chooses")
    workers: int = Field(0, ge=0, description="threads that each train a group; 0 chooses")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1")
    precision: Literal["fp32", "bf16"] = "fp32"
    ordered: bool = Field(
        False, description="serve: take replies in client order where they are taken as they come, as a simulation does"
    )
    server_gflops: float = Field(0, ge=0, description="speed of the server on the virtual clock; 0: its work takes no time")


class EvaluateSection(Section):
    every: int = Field(1, ge=0, description="validate every so many rounds; 0 only at the end")
    valid_limit: int = Field(500, ge=1, description="validation examples a round, drawn by the seed")
    sample: int = Field(100, ge=0, description="global test examples that a personal model is judged on, a client")


class TrackSection(Section):
    to: list[Literal["tensorboard", "mlflow", "wandb", "trackio"]] = []
    project: str = "fedtailor"


class CompareSection(Section):
    vary: dict[str, list[Any]] = Field({}, description='dotted keys and their values: "technique.kind" = ["prefix", "lora"]')
    seeds: list[NonNegativeInt] = Field([], description="seeds of each case; the experiment's own when absent")
    baselines: list[Literal["pooled", "local", "zero-shot", "majority"]] = []
    sets: list[dict[str, Any]] = Field([], description="cases given one by one: tables of dotted keys")
    tasks: list[dict[str, Any]] = Field([], description="what each case is run on: tables of dotted keys, each with a name")
    choose: dict[str, list[Any]] = Field({}, description="dotted keys and values to choose among, a case, on validation data")


class Experiment(Section):
    name: str = Field("experiment", pattern=r"^[\w.\-]+$")
    seed: int = Field(0, ge=0)
    rounds: int = Field(10, ge=1)
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    clients: ClientsSection = ClientsSection()
    technique: TechniqueSection = TechniqueSection(kind="prefix")
    algorithm: AlgorithmSection = AlgorithmSection(kind="fedavg")
    train: TrainSection = TrainSection()
    filters: FiltersSection = FiltersSection()
    engine: EngineSection = EngineSection()
    evaluate: EvaluateSection = EvaluateSection()
    track: TrackSection = TrackSection()
    compare: CompareSection = CompareSection()


def load(path: Path, overrides: Sequence[str] = (), preset: str | None = None) -> Experiment:
    """The experiment in a TOML file, with the dotted keys of its table `[presets.<preset>]` and `a.b=value` overrides on top.

    Raises:
        ConfigError: no such file, not TOML, an unknown key, a wrong type, an impossible value.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.toml") if p.name != "pyproject.toml"] if path.parent.is_dir() else []
        hint = f": {nearest(path.name, beside)}" if beside else ""
        raise ConfigError(f"experiment file '{path}' does not exist{hint}")
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error
    presets = values.pop("presets", {})
    if not isinstance(presets, dict) or not all(isinstance(keys, dict) for keys in presets.values()):
        raise ConfigError(f'{path}: write presets as [presets.small] with dotted keys in quotes, such as "data.limit" = 100')
    if preset is not None and preset not in presets:
        raise ConfigError(f"{path} has no preset '{preset}'" + (f": {nearest(preset, presets)}" if presets else ""))
    for key, value in presets.get(preset, {}).items():
        assign(values, key.split("."), value)
    for item in overrides:
        override(values, item)
    return parse(values, text, str(path))


def parse(values: Mapping[str, Any], text: str = "", where: str = "experiment") -> Experiment:
    """Checked values. `text` is searched for the line of a bad key."""
    try:
        return Experiment.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_explain(error, text, where)) from error


def override(values: dict[str, Any], item: str) -> None:
    """Set `a.b=value` in nested dicts; the value is read as TOML, or as text where it is not TOML.

    Raises:
        ConfigError: no `=`, an empty key, or a key that goes through something that is not a section.
    """
    key, found, raw = item.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not found or not all(parts):
        raise ConfigError(f"--set '{item}': write it as section.key=value, for example train.lr=0.01")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    assign(values, parts, value)


def assign(values: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(f"'{'.'.join(parts)}': '{part}' is a value, not a section")
    if parts[-1] == "kind" and parts[0] != "data" and section.get("kind") not in (None, value):
        section.clear()  # options belong to a kind: another kind starts with its own defaults
    section[parts[-1]] = value


def _explain(error: ValidationError, text: str, where: str) -> str:
    """One line: the first problem, where it stands, and the nearest valid choice."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path)
    place = f"{where}{_line(text, path)}"
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key '{key}': {nearest(path[-1], _fields(path[:-1]))}"
    if first["type"] == "missing" and path[-1].isdigit():  # an entry of a list of fixed length
        field = _model(path[:-2]).model_fields[path[-2]]
        return f"{place}: '{'.'.join(path[:-1])}' needs {field.description} (got {path[-1]})"
    if first["type"] == "missing":
        return f"{place}: '{key}' is missing"
    given = first.get("input")
    if first["type"] == "model_type":
        example = (
            f"{path[-1]} = {{ kind = {json.dumps(given)} }}" if isinstance(given, str) and "kind" in _fields(path) else f"[{key}]"
        )
        return f"{place}: '{key}' is a section, not a value: write it as {example}"
    shown = f" (got {given!r})" if not isinstance(given, dict | list) else ""
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if first["type"] == "literal_error" and isinstance(given, str):
        choices = re.findall(r"'([^']*)'", first["msg"])
        return f"{place}: '{key}' cannot be '{given}': {nearest(given, choices)}"
    return f"{place}: '{key}' {message}{shown}"


def _fields(path: Sequence[str]) -> list[str]:
    return list(getattr(_model(path), "model_fields", {}))


def _model(path: Sequence[str]) -> Any:
    """The section at this path."""
    model: Any = Experiment
    for part in path:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        model = next((a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)), annotation)
    return model


def _line(text: str, path: Sequence[str]) -> str:
    """`:12` where the key's line can be found in the file, else nothing."""
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        header = re.match(r"\s*\[+\s*([^\]]+?)\s*\]+", line)
        if header:
            section = header.group(1)
        key = re.match(r"\s*([\w\-.\"]+)\s*=", line)
        full = ".".join(p for p in (section, key.group(1).strip('"') if key else "") if p)
        named = [part for part in path if not part.isdigit()]
        if full == ".".join(named) or (key and len(named) > 1 and full == ".".join(named[:-1]) and named[-1] in line):
            return f":{number}"
    return ""
