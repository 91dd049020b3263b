"""Tiny random models on disk, and federations that take a moment: what all tests share. Nothing here needs a network."""

from __future__ import annotations

import copy
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from fedtailor import cli
from fedtailor.algorithms import ALGORITHMS
from fedtailor.backbone import Backbone, load, quiet
from fedtailor.config import ModelSection
from fedtailor.core import SERVER, Algorithm, Device, Fit, Job, Letters, Message, Plan, Predict, Site, Tree, seed_of, stream
from fedtailor.data.examples import Store, Subset, store
from fedtailor.engines.answering import Workers, answer
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.losses import classification, language
from fedtailor.metrics import metric
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.trees import leaves

LABELS = ["good", "bad", "fine"]
WORDS = [*LABELS, "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", *(f"w{i}" for i in range(29))]
TEXT = ("bert", "roberta", "distilbert")
CAUSAL = ("gpt2", "llama")
FAMILIES = (*TEXT, *CAUSAL, "vit")
KINDS = {**dict.fromkeys(TEXT, "text"), **dict.fromkeys(CAUSAL, "language"), "vit": "image"}
PADS = {"bert": 0, "roberta": 1, "distilbert": 0, "gpt2": 0, "llama": 0}  # RoBERTa counts positions from its pad token's id
FIRST = 5  # ids from here on are words


def tokenizer(pad: int) -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(pad, special.pop(0))
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def _tiny(family: str) -> Any:
    """A random model of this family; weights are large enough for every path through it to show in the logits."""
    import transformers as t

    words = 45
    common = {"vocab_size": words, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    wide = {"initializer_range": 0.2}
    ends = {"bos_token_id": 2, "eos_token_id": 3}
    if family == "bert":
        return t.BertForSequenceClassification(t.BertConfig(**common, **wide, max_position_embeddings=64, num_labels=3))
    if family == "roberta":
        sizes = {"max_position_embeddings": 66, "pad_token_id": 1, "num_labels": 3, "type_vocab_size": 1}
        return t.RobertaForSequenceClassification(t.RobertaConfig(**common, **wide, **sizes))
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64, "num_labels": 3}
        return t.DistilBertForSequenceClassification(t.DistilBertConfig(vocab_size=words, **sizes, **wide))
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64}
        return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=words, **sizes, **wide, **ends))
    if family == "llama":
        sizes = {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
        return t.LlamaForCausalLM(t.LlamaConfig(**common, **sizes, **wide, **ends))
    assert family == "vit"
    common.pop("vocab_size")
    return t.ViTForImageClassification(t.ViTConfig(**common, **wide, image_size=32, patch_size=8, num_labels=3))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices: a second thread costs more than it brings, and one thread adds in one order."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> a folder written by save_pretrained."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(family))
                model = _tiny(family)
            with torch.no_grad():  # biases start at zero: give them something to say
                for name, p in model.named_parameters():
                    if p.dim() == 1:
                        p.add_(torch.randn(p.shape, generator=stream(0, name)) * 0.1)
            with quiet():
                model.save_pretrained(made[family])
            if KINDS[family] == "image":
                from transformers import ViTImageProcessor

                ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(made[family])
            else:
                tokenizer(PADS[family]).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.fixture(scope="session")
def backbones(folders: Callable[[str], Path]) -> Callable[[str], Backbone]:
    """family -> its frozen backbone, loaded once."""
    made: dict[str, Backbone] = {}

    def backbone(family: str) -> Backbone:
        if family not in made:
            labels = [] if family in CAUSAL else LABELS
            made[family] = load(ModelSection(name=str(folders(family))), KINDS[family], labels)
        return made[family]

    return backbone


@pytest.fixture(scope="session")
def techniques(backbones: Callable[[str], Backbone]) -> Callable[..., Technique]:
    """(family, kind, **options) -> the technique, made once."""
    made: dict[str, Technique] = {}

    def technique(family: str, kind: str, **options: Any) -> Technique:
        key = repr((family, kind, sorted(options.items())))
        if key not in made:
            made[key] = TECHNIQUES[kind](backbones(family), **options)
        return made[key]

    return technique


def rows_of(family: str, count: int = 60, seed: int = 0) -> Store:
    """Random encoded examples for this family, each of another length."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count)
    if family == "vit":
        return store({"pixel_values": torch.randn(count, 3, 32, 32, generator=stream(seed, "images")), "labels": labels}, {})
    ids = [random.integers(FIRST, 45, random.integers(4, 10)).tolist() for _ in range(count)]
    if family in CAUSAL:
        return store({"input_ids": ids, "labels": ids}, {"input_ids": PADS[family], "labels": -100})
    return store({"input_ids": ids, "labels": labels}, {"input_ids": PADS[family]})


def batch_of(family: str, rows: int = 3, extra: int = 0, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of this family, without labels; `extra`: that many columns of padding more."""
    data = Subset(rows_of(family, rows, seed), np.arange(rows))
    out = data.batch(range(rows), int(max(data.lengths)) + extra, rows)
    return {name: t for name, t in out.items() if name != "labels"}


def randomized(tree: Tree, seed: int = 0, size: float = 0.3) -> Tree:
    """A tree of the same shapes that differs everywhere from what nothing learned: B of LoRA starts at zero."""
    return {name: t + size * torch.randn(t.shape, generator=stream(seed, name)) for name, t in tree.items()}


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, types included; mappings of any class."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def distance(a: Tree, b: Tree) -> float:
    """The largest difference of two trees, relative to the largest number of that tensor."""
    worst = 0.0
    for (name, x), (other, y) in zip(leaves(a), leaves(b), strict=True):
        assert name == other
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
            assert x.shape == y.shape, name
            scale = max(float(x.abs().max()), 1e-3)
            worst = max(worst, float((x.double() - y.double()).abs().max()) / scale)
    return worst


class Seen(NamedTuple):
    """What one client handler was given and what it replied."""

    client: str
    round: int
    letter: Message
    reply: Message
    unchanged: bool  # own, letter and initial tree are what they were before


def watched(algorithm: Algorithm, log: list[Seen]) -> Algorithm:
    """The same algorithm; every handled letter is written to `log`."""

    def watch(handler: Any) -> Any:
        def handle(own: Tree | None, msg: Message, site: Site) -> Generator[Any, Any, Any]:
            given = (own, msg.body, dict(msg.info), site.init)
            before = copy.deepcopy(given)
            new, reply = yield from handler(own, msg, site)
            log.append(Seen(site.id, site.round, msg, reply, same(list(given), list(before))))
            return new, reply

        return handle

    return algorithm._replace(client={verb: watch(handler) for verb, handler in algorithm.client.items()})


class World(NamedTuple):
    """A federation that is ready to run: clients c0, c1, ... hold unequal numbers of rows."""

    algorithm: Algorithm
    technique: Technique
    sites: Callable[[str, int], Site]
    clients: list[str]
    job: Job
    log: list[Seen]
    rows: Store


class Outcome(NamedTuple):
    state: Tree
    own: dict[str, Tree]
    hash: str
    ledger: Ledger
    answers: dict[str, Message]
    clock: list[float]  # after each round
    notices: list[str]
    log: list[Seen]
    world: World


PLAN = Plan(epochs=1, batch=4, lr=1e-2)


def world_of(
    technique: Technique,
    family: str,
    kind: str,
    options: Mapping[str, Any] | None = None,
    plan: Plan = PLAN,
    clients: int = 3,
    sizes: Mapping[str, int] | None = None,
    devices: Mapping[str, Device] | None = None,
    equal: bool = False,
    empty: tuple[str, ...] = (),
    seed: int = 0,
) -> World:
    """`sizes`: LoRA rank or prefix length by client; `equal`: all clients hold the same rows; `empty`: those hold none."""
    data = rows_of(family)
    judged = metric("auto", KINDS[family], 3)
    loss = language if family in CAUSAL else classification
    job = Job(loss, judged.judge, judged.tally, plan, clients=clients, sizes=tuple((sizes or {}).values()))
    log: list[Seen] = []
    algorithm = watched(ALGORITHMS[kind](job, **(options or {})), log)
    names = [f"c{i}" for i in range(clients)]
    train = {
        c: np.arange(0) if c in empty else np.arange(8) if equal else np.arange(i * 10, i * 10 + 6 + i)
        for i, c in enumerate(names)
    }
    everybody = np.concatenate([train[c] for c in names])
    inits = {c: technique.resized(sizes[c]) for c in names} if sizes else dict.fromkeys(names, technique.init)

    def sites(client: str, round: int) -> Site:
        if client == SERVER:
            return Site(
                SERVER, {"train": Subset(data, everybody), "test": Subset(data, np.arange(52, 60))}, technique.init, round, seed
            )
        parts = {"train": Subset(data, train[client]), "test": Subset(data, train[client][:3])}
        if algorithm.personal:
            parts["global"] = Subset(data, np.arange(52, 60))
        return Site(client, parts, inits[client], round, seed, (devices or {}).get(client, Device()))

    return World(algorithm, technique, sites, names, job, log, data)


def run_world(
    world: World,
    folder: Path,
    rounds: int = 2,
    start: int = 0,
    cohorts: Mapping[int, list[str]] | None = None,
    stacked: bool = False,
    up: tuple[str, ...] = (),
    seed: int = 0,
    flops: Callable[[int, int], float] = lambda rows, width: 0.0,
    deadline: float = 0.0,
) -> Outcome:
    """`rounds` rounds on the local engine, from the checkpoint in `folder` where `start` says that it holds so many."""
    states, ledger, notices, clock = States(folder), Ledger(), [], []
    workers = Workers(world.technique.bind, 1, flops=flops)
    engine = Local(
        world.algorithm, world.sites, workers, states, ledger, chain(up), chain(()), seed, stacked, deadline, notices.append
    )
    try:
        state = world.algorithm.init(world.technique.init)
        if start:
            found = states.resume()
            assert found is not None
            done, state, carried, kept = found
            assert done == start
            engine.load(carried)
            ledger.load(kept)
        for round in range(start + 1, start + rounds + 1):
            cohort = (cohorts or {}).get(round, world.clients)
            state = engine.converse(world.algorithm.round(state, cohort), round)
            states.commit(round, state, engine.dump(), ledger.dump())
            clock.append(engine.clock)
        answers = engine.converse(world.algorithm.answer(state, world.clients), start + rounds, world.sites)
        own = {c: states.read_own(c).get("algorithm", {}) for c in world.clients}
        return Outcome(state, own, states.hash(state), ledger, answers, clock, notices, world.log, world)
    finally:
        engine.close()


def by_hand(
    world: World,
    state: Tree,
    round: int,
    own: dict[str, Tree | None],
    cohort: list[str] | None = None,
    lost: tuple[str, ...] = (),
    backwards: bool = False,
    seed: int = 0,
) -> Tree:
    """A round without engine and wire: letters are handed over, clients work one by one; `own` is updated in place."""
    workers = Workers(world.technique.bind, 1)
    talk = world.algorithm.round(state, world.clients if cohort is None else cohort)
    inbox: dict[str, Message] | None = None
    step = 0
    while True:
        try:
            letters = next(talk) if inbox is None else talk.send(inbox)
        except StopIteration as end:
            return end.value
        step += 1
        to = letters.to if isinstance(letters, Letters) else letters
        inbox = {}
        for client in sorted(to, reverse=backwards):
            if client in lost:
                continue
            flow = world.algorithm.client[to[client].verb](own.get(client), to[client], world.sites(client, round))
            asked, result = 0, None
            while True:
                try:
                    ask: Fit | Predict = flow.send(result)
                except StopIteration as end:
                    own[client], inbox[client] = end.value
                    break
                asked += 1
                random = stream(seed, "fit", client, round, step, asked)
                pace = seed_of(seed, "pace", round, step)
                result = answer({client: ask}, workers, lambda c, random=random: random, False, pace)[client]


@pytest.fixture
def federation(techniques: Callable[..., Technique], tmp_path: Path) -> Callable[..., Outcome]:
    """Run any algorithm for a few rounds: federation("fedit", technique="lora", topts={"rank": 2}, rounds=3, ...)."""
    count = 0

    def run(
        kind: str,
        family: str = "bert",
        technique: str = "lora",
        topts: Mapping[str, Any] | None = None,
        folder: Path | None = None,
        rounds: int = 2,
        start: int = 0,
        cohorts: Mapping[int, list[str]] | None = None,
        stacked: bool = False,
        up: tuple[str, ...] = (),
        flops: Callable[[int, int], float] = lambda rows, width: 0.0,
        deadline: float = 0.0,
        **world: Any,
    ) -> Outcome:
        nonlocal count
        count += 1
        made = techniques(family, technique, **(topts or ({"rank": 2} if technique == "lora" else {})))
        where = folder or tmp_path / f"run-{count}"
        ready = world_of(made, family, kind, **world)
        return run_world(ready, where, rounds, start, cohorts, stacked, up, world.get("seed", 0), flops, deadline)

    return run


@pytest.fixture
def world(techniques: Callable[..., Technique]) -> Callable[..., World]:
    """A federation to drive by hand."""

    def make(
        kind: str, family: str = "bert", technique: str = "lora", topts: Mapping[str, Any] | None = None, **options: Any
    ) -> World:
        made = techniques(family, technique, **(topts or ({"rank": 2} if technique == "lora" else {})))
        return world_of(made, family, kind, **options)

    return make


# ------------------------------------------------------------------------------------------------------------ the command line

COMMAND = [sys.executable, "-m", "fedtailor.cli"]
EXPERIMENT = """\
name = "tiny"
rounds = {rounds}
[model]
name = "{model}"
[data]
{data}
[clients]
{clients}
partition = {{ kind = "natural", column = "user" }}
[technique]
kind = "lora"
rank = 2
[train]
batch = 4
lr = 0.05
"""


def write_experiment(folder: Path, model: Path, rounds: int, data: str, clients: str) -> None:
    """The file e.toml; `data` and `clients` are lines of those sections."""
    text = EXPERIMENT.format(model=model, rounds=rounds, data=data, clients=clients)
    (folder / "e.toml").write_text(text, encoding="utf-8")


def csv_of(rows: Iterable[tuple[str, ...]], columns: str = "text,label,user") -> str:
    """The text of a csv file; no cell needs quotes."""
    return "".join(",".join(row) + "\n" for row in (columns.split(","), *rows))


def sets(**changes: Any) -> str:
    """--set options; dots are written as two underscores."""
    return " ".join(shlex.join(["--set", f"{key.replace('__', '.')}={value}"]) for key, value in changes.items())


def in_process(*words: str, folder: Path | None = None) -> int:
    """The exit code of `fedtailor` with these words, run in this process and in `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        if folder is not None:
            patch.chdir(folder)
        patch.setattr(sys, "argv", ["fedtailor", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


class Printed(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Runs a command line in the current folder: its exit code and what it printed."""

    def run(command: str, *words: str) -> Printed:
        capsys.readouterr()
        code = in_process(*shlex.split(command), *words)
        return Printed(code, *capsys.readouterr())

    return run


def until_checkpoint(process: subprocess.Popen[Any], folder: Path) -> None:
    """Waits until the run in `folder` has its first checkpoint, or is over."""
    until = time.monotonic() + 120
    while not (folder / "state" / "checkpoint.json").is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(folder: Path) -> list[dict[str, Any]]:
    """What a run folder tells of each round."""
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines()]
