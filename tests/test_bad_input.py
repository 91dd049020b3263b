"""Whatever a user gets wrong is one line on standard error (what, where, the nearest valid choice) and its exit code, no traceback."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import SafetensorError

from commands import COMMAND, Printed, csv_of, in_process, lines, read, sets, until_checkpoint, write_experiment
from fedtailor import run as run_module
from fedtailor import wire
from fedtailor.engines import local
from tiny import LABELS

Typed = Callable[..., Printed]
ROWS = [(f"{LABELS[k % 3]} w{k % 29} fox", LABELS[k % 3], f"u{k % 3}") for k in range(30)]
GOOD = csv_of(ROWS)
USAGE, DATA, FAILED = 2, 3, 4
MISSING = next(name for name in ("trackio", "wandb", "mlflow", "tensorboard") if importlib.util.find_spec(name) is None)


class Case(NamedTuple):
    command: str
    code: int
    words: tuple[str, ...]  # each stands in the error line
    files: dict[str, str | bytes] = {}
    prepare: Callable[[Path], object] = lambda folder: None


def run(code: int, *words: str, prepare: Callable[[Path], object] = lambda folder: None, **changes: Any) -> Case:
    """`fedtailor run` with these keys: dots are written as two underscores."""
    return Case(f"run e.toml {sets(**changes)}", code, words, prepare=prepare)


def data(name: str, content: str | bytes, *words: str, **changes: Any) -> Case:
    """`fedtailor run` on this data file."""
    return run(DATA, *words, data__name=name, **changes)._replace(files={name: content})


def toml(text: str, *words: str) -> Case:
    """`fedtailor run` of an experiment file with these lines in it."""
    return Case("run x.toml", USAGE, words, {"x.toml": text})


def mine(code: str, *words: str, **changes: Any) -> Case:
    """`fedtailor run` with an algorithm from this file of the user's own."""
    return run(USAGE, *words, algorithm__kind="mine.py:rule", **changes)._replace(files={"mine.py": code})


def flipped(folder: Path) -> None:
    path = next(folder.glob("state/server-*.safetensors"))
    blob = bytearray(path.read_bytes())
    blob[-3] ^= 1
    path.write_bytes(blob)


def cut(folder: Path) -> None:
    path = next(folder.glob("state/server-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def model_without(name: str) -> Callable[[Path], object]:
    def prepare(folder: Path) -> None:
        source = folder / "e.toml"
        model = source.read_text(encoding="utf-8").split('[model]\nname = "')[1].split('"')[0]
        shutil.copytree(model, folder / "broken")
        (folder / "broken" / name).unlink()

    return prepare


def model_cut(folder: Path) -> None:
    model_without("config.json")(folder)
    (folder / "broken" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    weights = folder / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def images(folder: Path) -> None:
    from PIL import Image

    for k in range(12):
        path = folder / "pictures" / LABELS[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k * 20, 0, 0)).save(path)


def changed_state(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / "done")


def zip_of(folder: Path) -> None:
    with zipfile.ZipFile(folder / "z.zip", "w") as archive:
        archive.writestr("readme.txt", "no image")


def unwritable(folder: Path) -> None:
    (folder / "file").write_text("", encoding="utf-8")


CASES: dict[str, Case] = {
    # ------------------------------------------------------------------------------------------------------ the command line
    "unknown command": Case("runn e.toml", USAGE, ("No such command 'runn'", "'run'")),
    "unknown flag": Case("run e.toml --resum", USAGE, ("No such option: --resum", "--resume", "run --help")),
    "negative seed flag": Case("run e.toml --seed -1", USAGE, ("--seed", "greater than or equal to 0")),
    "seed that is no number": Case("run e.toml --seed one", USAGE, ("--seed", "integer")),
    "missing argument": Case("evaluate", USAGE, ("Missing argument", "evaluate --help")),
    "export without --to": Case("export done", USAGE, ("--to", "export --help")),
    "compare without experiment": Case("compare", USAGE, ("Missing argument",)),
    "list of nonsense": Case("list algoritms", USAGE, ("algoritms", "did you mean 'algorithms'?")),
    "no such preset": Case("run e.toml --preset small", USAGE, ("has no preset 'small'",)),
    "preset of nothing": Case("run --preset small", USAGE, ("presets are tables of an experiment file",)),
    "set without =": Case("run e.toml --set rounds", USAGE, ("--set 'rounds'", "section.key=value")),
    "set without key": Case("run e.toml --set =3", USAGE, ("--set '=3'", "section.key=value")),
    "set through a value": Case("run e.toml --set rounds.x=3", USAGE, ("rounds.x", "'rounds' is a value, not a section")),
    # ---------------------------------------------------------------------------------------------------- the experiment file
    "no such experiment file": Case("run f.toml", USAGE, ("'f.toml' does not exist", "did you mean 'e.toml'?")),
    "no such experiment name": Case("run ticker", USAGE, ("no experiment 'ticker'",), {"experiments/tickets.toml": ""}),
    "compare: no such file": Case("compare f.toml", USAGE, ("'f.toml' does not exist",)),
    "not TOML": toml("rounds = = 3\n", "x.toml", "not valid TOML", "line 1"),
    "not text": Case("run x.toml", USAGE, ("x.toml", "not valid TOML"), {"x.toml": b"\xff\xfe\x00"}),
    "unknown section": toml("rounds = 3\n[clints]\ncount = 3\n", "x.toml:2", "'clints'", "did you mean 'clients'?"),
    "unknown key": toml("[train]\nbatch = 4\nlearn = 1\n", "x.toml:3", "unknown key 'train.learn'"),
    "unknown top key": toml("round = 3\n", "x.toml:1", "'round'", "did you mean 'rounds'?"),
    "unknown key of a device": toml(
        '[[clients.devices]]\nname = "phone"\ngflop = 3\n', "x.toml:3", "gflop", "did you mean 'gflops'?"
    ),
    "wrong type": toml("[train]\nbatch = [4]\n", "x.toml:2", "'train.batch'", "integer"),
    "section that is a value": toml("train = 3\n", "x.toml:1", "'train'"),
    "zero rounds": run(USAGE, "'rounds'", "greater than or equal to 1", "(got 0)", rounds=0),
    "negative rate": run(USAGE, "'train.lr'", "greater than 0", train__lr=-0.1),
    "zero batch": run(USAGE, "'train.batch'", train__batch=0),
    "rate that is a word": run(USAGE, "'train.lr'", "number", "'fast'", train__lr="fast"),
    "no clients": run(USAGE, "'clients.count'", "(got 0)", clients__count=0),
    "dropout of one": toml('[[clients.devices]]\nname = "a"\ndropout = 1.0\n', "x.toml:3", "dropout", "less than 1"),
    "unknown optimizer": run(USAGE, "'train.optimizer'", "did you mean 'adam'?", train__optimizer="adamv"),
    "unknown metric": run(USAGE, "'data.metric'", "did you mean 'accuracy'?", data__metric="acuracy"),
    "unknown tracker": run(USAGE, "track.to", "tensorboard", track__to='["tensorbord"]'),
    "name with a slash": run(USAGE, "'name'", "pattern", name="a/b"),
    "negative seed to compare": Case("compare e.toml --set compare.seeds=[-1]", USAGE, ("'compare.seeds.0'", "(got -1)")),
    "unknown baseline": Case(
        "compare e.toml --set \"compare.baselines=['poled']\"", USAGE, ("compare.baselines", "did you mean 'pooled'?")
    ),
    "unknown key to vary": Case(
        "compare v.toml", USAGE, ("train.rate", "unknown key"), {"v.toml": '[compare.vary]\n"train.rate" = [1, 2]\n'}
    ),
    "impossible value to vary": Case(
        "compare v.toml", USAGE, ("'train.lr'", "greater than 0"), {"v.toml": '[compare.vary]\n"train.lr" = [0.1, -1]\n'}
    ),
    "nothing to vary": Case("compare v.toml", USAGE, ("compare.vary", "train.lr"), {"v.toml": '[compare.vary]\n"train.lr" = []\n'}),
    "partition that is a word": run(USAGE, "'clients.partition' is a section", 'partition = { kind = "iid" }', clients__partition="iid"),
    "half a pair": run(USAGE, "e.toml", "'data.pair' needs two columns", data__pair='["text"]'),
    "endless option of a technique": run(USAGE, "'technique.alpha'", "finite", technique__alpha="nan"),
    "endless option of an algorithm": Case(
        "run e.toml --set algorithm.kind=fedprox --set algorithm.mu=inf", USAGE, ("'algorithm.mu'", "finite", "(got inf)")
    ),
    # ------------------------------------------------------------------------------------------- kinds and what they can take
    "unknown technique": run(USAGE, "technique.kind 'lorra'", "did you mean 'lora'?", technique__kind="lorra"),
    "template without its slot": run(
        USAGE, "technique.template 'about'", "slot {text}", technique__kind="template", technique__template="about",
        algorithm__kind="prompt-search",
    ),
    "a class without words": run(
        USAGE, "technique.labels has 1 texts for 3 classes", technique__kind="template", technique__labels='["one"]',
        algorithm__kind="prompt-search",
    ),
    "nothing to train": run(USAGE, "technique 'template' has nothing to train", "prompt-search", technique__kind="template"),
    "search of what is no text": run(USAGE, "prompt-search edits words", "'template'", algorithm__kind="prompt-search"),
    "a budget of nothing": run(
        USAGE, "algorithm.budget must be at least 1", technique__kind="template", algorithm__kind="prompt-search",
        algorithm__budget=0,
    ),
    "a template merged": Case(
        "export words --merge --to new", USAGE, ("cannot be merged",),
        prepare=lambda folder: in_process(
            *shlex.split("run e.toml --out words --set technique.kind=template --set algorithm.kind=zero-shot"), folder=folder
        ),
    ),
    "zeroth-order without a step": run(USAGE, "algorithm.steps must be above 0", algorithm__kind="zeroth-order", algorithm__steps=0),
    "distillation without public examples": run(USAGE, "set data.public", algorithm__kind="distil"),
    "public examples that are not there": run(
        DATA, "gone.csv", algorithm__kind="distil", data__public="gone.csv"
    ),
    "a public share of all": run(USAGE, "data.public = 1.0", algorithm__kind="distil", data__public=1.0),
    "kinds of clients that average": toml(
        'clients = { kinds = [{ technique = { kind = "head" } }] }', "clients.kinds: algorithm fedavg exchanges trees"
    ),
    "kinds of clients without one reference model": toml(
        'algorithm = { kind = "fedmosaic" }\nclients = { kinds = [{ technique = { kind = "head" } }] }',
        "clients.kinds: of models that differ",
        "technique.kind = 'colora'",
    ),
    "nothing whose gradient tells tasks apart": run(
        USAGE, "has nothing to train", "prompt-search", algorithm__kind="fedmosaic", technique__kind="template"
    ),
    "a kind of client that is none": toml(
        'clients = { kinds = [{ technique = { kind = "hed" } }] }', "technique.kind 'hed'", "did you mean 'head'"
    ),
    "unknown technique option": run(USAGE, "technique.rnk", "did you mean 'rank'?", technique__rnk=3),
    "rank 0": run(USAGE, "technique.rank", "at least 1", technique__rank=0),
    "negative rank": run(USAGE, "technique.rank", "at least 1", technique__rank=-2),
    "rank that is a word": run(USAGE, "technique.rank", "'two'", technique__rank="two"),
    "rank beyond all memory": run(USAGE, "rank 1000000000", "32 or less", technique__rank=1000000000),
    "length beyond all memory": Case(
        "run e.toml --set technique.kind=prefix --set technique.length=1000000000", USAGE, ("technique.kind 'prefix'", "memory")
    ),
    "prefix beyond the positions": Case(
        "run e.toml --set technique.kind=prefix --set technique.length=100", USAGE, ("64 positions", "40 tokens long or shorter")
    ),
    "prompt beyond the positions": Case(
        "run e.toml --set technique.kind=prompt --set technique.length=50", USAGE, ("64 positions", "40 tokens long or shorter")
    ),
    "lengths beyond the positions": Case(
        "run e.toml --set technique.kind=prompt --set clients.lengths=[4,50]", USAGE, ("64 positions", "40 tokens long or shorter")
    ),
    "texts beyond the positions": run(USAGE, "data.max_length = 500", "64 positions", "to 64 or less", data__max_length=500),
    "texts beyond the positions, as usual but asked for": run(
        USAGE, "data.max_length = 128", "64 positions", "to 64 or less", data__max_length=128
    ),
    "texts beyond the positions, with a prompt": Case(
        "run e.toml --set technique.kind=prompt --set technique.length=10 --set data.max_length=60",
        USAGE,
        ("data.max_length = 60", "the prompt takes 10", "to 54 or less"),
    ),
    "texts beyond GPT-2's positions": Case(
        "run e.toml --set data.kind=language --set model.name={gpt2} --set data.max_length=65", USAGE, ("data.max_length = 65", "64")
    ),
    "texts beyond RoBERTa's positions": Case(
        "run e.toml --set model.name={roberta} --set data.max_length=65", USAGE, ("data.max_length = 65", "64 positions")
    ),
    "dropout that is never on": run(USAGE, "technique.dropout = 0.9", "train.dropout = true", technique__dropout=0.9),
    "metric of language models": run(USAGE, "'perplexity' for 3 classes", "macro_f1", data__metric="perplexity"),
    "metric of two classes": run(USAGE, "'f1' for 3 classes", "macro_f1", data__metric="f1"),
    "metric of classes": Case(
        "run e.toml --set data.kind=language --set data.metric=f1 --set model.name={gpt2}", USAGE, ("'f1' for language", "perplexity")
    ),
    "too few labels": run(USAGE, "model.labels = 2", "3 classes", model__labels=2),
    "model larger than a device": run(
        USAGE, "'watch'", "memory_mb = 0.001", "MB", clients__devices='[{name="watch", memory_mb=0.001}]'
    ),
    "length 0": Case("run e.toml --set technique.kind=prefix --set technique.length=0", USAGE, ("technique.length", "at least 1")),
    "unknown target": run(USAGE, "technique.target", "'qery'", "did you mean 'query'?", technique__target='["qery"]'),
    "unknown PEFT method": Case(
        "run e.toml --set technique.kind=peft --set technique.peft_type=LORRA", USAGE, ("technique.peft_type", "LORA")
    ),
    "unknown key of a PEFT method": Case(
        "run e.toml --set technique.kind=peft --set technique.peft_type=LORA --set technique.lora_alfa=2",
        USAGE,
        ("technique.lora_alfa", "did you mean 'lora_alpha'?"),
    ),
    "PEFT number that is a word": Case(
        "run e.toml --set technique.kind=peft --set technique.peft_type=LORA --set technique.r=abc", USAGE, ("technique.r", "'abc'")
    ),
    "PEFT method for other models": Case(
        "run e.toml --set technique.kind=peft --set technique.peft_type=XLORA", USAGE, ("'XLORA' does not fit this model",)
    ),
    "PEFT method that warns": Case(
        "run e.toml --set technique.kind=peft --set technique.peft_type=BOFT --set technique.boft_block_size=7",
        USAGE,
        ("'BOFT' does not fit this model",),
    ),
    "prompt on images": Case(
        "run e.toml --set technique.kind=prompt --set data.name=pictures --set model.name={vit} "
        "--set clients.partition.kind=iid --set clients.count=2",
        USAGE,
        ("'prompt'", "'prefix' for images"),
        prepare=images,
    ),
    "head on a causal model": Case(
        "run e.toml --set technique.kind=head --set data.kind=language --set model.name={gpt2}",
        USAGE,
        ("'head'", "classification head"),
    ),
    "causal data on an encoder": run(DATA, "cannot be loaded for image data", data__name="pictures", prepare=images,
                                     clients__partition__kind="iid", clients__count=2),
    "ranks with prefix": Case(
        "run e.toml --set technique.kind=prefix --set clients.ranks=[1,2]", USAGE, ("clients.ranks", "lora")
    ),
    "lengths with lora": run(USAGE, "clients.lengths", "prefix", clients__lengths="[2, 3]"),
    "ranks of nothing": run(USAGE, "'clients.ranks.0'", "greater than 0", clients__ranks="[0, 2]"),
    "unknown algorithm": run(USAGE, "algorithm.kind 'fedvag'", "did you mean 'fedavg'?", algorithm__kind="fedvag"),
    "unknown algorithm option": run(USAGE, "algorithm.weights", "'fedavg'", "did you mean 'weighting'?", algorithm__weights=1),
    "option set only in code": run(USAGE, "algorithm.server_opt", "'fedavg'", "weighting", algorithm__server_opt="adam"),
    "algorithm in no file": run(USAGE, "mine.py", "no file", algorithm__kind="mine.py:rule"),
    "algorithm that cannot be imported": mine("1 / 0", "mine.py", "ZeroDivisionError"),
    "algorithm that leaves": mine("import sys; sys.exit(3)", "mine.py", "SystemExit: 3"),
    "algorithm that fails": mine("def rule(job):\n    return job.clint", "mine.py:rule", "AttributeError", "clint"),
    "algorithm that is none": mine("def rule(job):\n    return {}", "mine.py:rule", "returned a dict", "Algorithm"),
    "algorithm of unknown types": mine("def rule(job: 'Job'):\n    return {}", "mine.py:rule", "'Job' is not defined"),
    "unknown option of an own algorithm": mine("def rule(job, mu=1.0): ...", "algorithm.mv", "did you mean 'mu'?", algorithm__mv=2),
    "algorithm without LoRA": Case(
        "run e.toml --set technique.kind=prefix --set algorithm.kind=fedsa", USAGE, ("fedsa", 'technique.kind = "lora"')
    ),
    "scaffold with adamw": run(USAGE, "scaffold", 'train.optimizer = "sgd"', algorithm__kind="scaffold"),
    "empty buffer": Case(
        "run e.toml --set algorithm.kind=asynchronous --set algorithm.buffer=0", USAGE, ("algorithm.buffer", "at least 1")
    ),
    "unknown filter": run(USAGE, "unknown filter 'int4'", "int8", filters__up='["int4"]'),
    "unknown partition": run(USAGE, "partition.kind 'dirichlett'", "'dirichlet'?", clients__partition__kind="dirichlett"),
    "unknown partition option": Case(
        "run e.toml --set clients.partition.kind=dirichlet --set clients.partition.alfa=1",
        USAGE,
        ("clients.partition.alfa", "did you mean 'alpha'?"),
    ),
    "negative alpha": Case(
        "run e.toml --set clients.partition.kind=dirichlet --set clients.partition.alpha=-1", USAGE, ("partition.alpha", "positive")
    ),
    "more clients than rows": Case(
        "run e.toml --set clients.partition.kind=iid --set clients.count=500", DATA, ("clients.count = 500", "24 training rows")
    ),
    "more clients than owners": run(USAGE, "clients.count = 9", "3 values", clients__count=9),
    "natural column missing": run(USAGE, "column 'usr'", "did you mean 'user'?", clients__partition__column="usr"),
    "cuda without CUDA": run(USAGE, "engine.device 'cuda'", "no CUDA", engine__device="cuda"),
    "card that is not there": run(USAGE, "engine.device 'cuda:99'", engine__device="cuda:99"),
    "nonsense device": run(USAGE, "engine.device 'gpu'", "choose auto, cpu, cuda", engine__device="gpu"),
    "device for other programs": run(USAGE, "engine.device 'meta'", "choose auto, cpu, cuda", engine__device="meta"),
    "tracker not installed": run(USAGE, "track.to", MISSING, "install", track__to=f'["{MISSING}"]'),
    # --------------------------------------------------------------------------------------------------------------- the data
    "missing csv": run(DATA, "'dd.csv' does not exist", "did you mean 'd.csv'?", data__name="dd.csv"),
    "empty csv": data("x.csv", "", "x.csv", "empty"),
    "header only": data("x.csv", "text,label\n", "x.csv", "no rows"),
    "ragged csv": data("x.csv", "text,label\na,b\nc\n", "x.csv", "line 3", "1 cells", "2"),
    "ragged tsv": data("x.tsv", "text\tlabel\na\tb\tc\n", "x.tsv", "line 2"),
    "broken quote": data("x.csv", 'text,label\n"a,b\n', "x.csv", "line"),
    "broken jsonl": data("x.jsonl", '{"text": "a"}\n{"text"\n', "x.jsonl", "line 2", "JSON"),
    "missing jsonl": run(DATA, "'x.jsonl' does not exist", data__name="x.jsonl"),
    "broken parquet": data("x.parquet", b"PAR1nothing", "x.parquet", "cannot be read"),
    "empty parquet": data("x.parquet", b"", "x.parquet", "empty"),
    "broken zip": data("x.zip", b"PK\x03\x04nothing", "x.zip", "zip"),
    "missing zip": run(DATA, "'x.zip' does not exist", data__name="x.zip"),
    "zip without images": run(DATA, "z.zip", "no images", data__name="z.zip", prepare=zip_of),
    "unknown suffix": data("x.xlsx", b"no", "x.xlsx", ".csv"),
    "not UTF-8": data("x.csv", b"text,label\ncaf\xe9,a\n", "x.csv", "not UTF-8"),
    "wrong text column": run(DATA, "'txt'", "did you mean 'text'?", data__text="txt"),
    "wrong label column": run(DATA, "'lable'", "did you mean 'label'?", data__label="lable"),
    "one class": data("x.csv", "text,label,user\n" + "a,b,u0\n" * 20, "x.csv", "one class"),
    "no text at all": data("x.csv", "text,label\n ,b\n ,c\n", "x.csv", "no row has text"),
    "label unseen in training": Case(
        "run e.toml --set data.test=t.csv", DATA, ("test row 1", "'god'", "did you mean 'good'?"), {"t.csv": "text,label,user\nx,god,u0\n"}
    ),
    "missing test file": run(DATA, "'t.csv' does not exist", data__test="t.csv"),
    "fraction above one": run(USAGE, "data.test = 1.5", "between 0 and 1", data__test=1.5),
    "limit 0": run(USAGE, "'data.limit'", data__limit=0),
    "owner missing": data("x.csv", GOOD + "a,good,\n" * 9, "column 'user' is empty", "row"),
    # -------------------------------------------------------------------------------------------------------------- the model
    "model folder missing": run(DATA, "'./nowhere' does not exist", "minilm", model__name="./nowhere"),
    "model folder without weights": run(
        DATA, "'broken' has no weights", "safetensors", model__name="broken", prepare=model_without("model.safetensors")
    ),
    "model folder without config": run(
        DATA, "'broken' has no config.json", model__name="broken", prepare=model_without("config.json")
    ),
    "model folder with cut weights": run(DATA, "'broken' cannot be loaded", model__name="broken", prepare=model_cut),
    "unknown model": run(DATA, "'minilmm'", "did you mean 'minilm'?", model__name="minilmm"),
    "unreachable model": run(DATA, "'nobody/nothing'", "cannot be loaded", model__name="nobody/nothing"),
    # ---------------------------------------------------------------------------------------------------------- run folders
    "out is a file": Case("run e.toml --out file", USAGE, ("'file' is a file",), prepare=unwritable),
    "out holds something else": Case("run e.toml --out stuff", USAGE, ("'stuff' is not empty",), {"stuff/notes.txt": "mine"}),
    "out holds this run": Case("run e.toml --out done", USAGE, ("'done' already holds a run", "--resume")),
    "resume with a changed experiment": Case(
        "run e.toml --out done --resume --set train.lr=0.5", USAGE, ("'done' holds another experiment", "'train'")
    ),
    "resume backwards": Case(
        "run e.toml --out paired --resume --set data.name=p.csv", USAGE, ("'paired' is already at round 2", "set rounds to 2 or more")
    ),
    "resume with a flipped byte": Case(
        "run e.toml --out done --resume --set rounds=2", FAILED, ("server-", "corrupt checkpoint"), prepare=changed_state(flipped)
    ),
    "resume with a cut file": Case(
        "run e.toml --out done --resume --set rounds=2", FAILED, ("server-", "corrupt checkpoint"), prepare=changed_state(cut)
    ),
    "resume with a missing file": Case(
        "run e.toml --out done --resume --set rounds=2",
        FAILED,
        ("engine-", "corrupt checkpoint"),
        prepare=changed_state(lambda done: next(done.glob("state/engine-*")).unlink()),
    ),
    "resume with a broken manifest": Case(
        "run e.toml --out done --resume --set rounds=2",
        FAILED,
        ("checkpoint.json", "corrupt checkpoint"),
        prepare=changed_state(lambda done: (done / "state" / "checkpoint.json").write_text("{", encoding="utf-8")),
    ),
    "evaluate a corrupt run": Case("evaluate done", FAILED, ("corrupt checkpoint",), prepare=changed_state(flipped)),
    "evaluate without checkpoint": Case(
        "evaluate done", FAILED, ("'done' has no checkpoint yet",), prepare=changed_state(lambda d: shutil.rmtree(d / "state"))
    ),
    "evaluate no run": Case("evaluate nowhere", USAGE, ("'nowhere' is not a run folder", "experiment.toml")),
    "predict with no run": Case("predict nowhere good", USAGE, ("'nowhere' is not a run folder",)),
    "export of no run": Case("export nowhere --to x", USAGE, ("'nowhere' is not a run folder",)),
    "report of no run": Case("report nowhere", USAGE, ("'nowhere' is not a run folder",)),
    "broken summary": Case(
        "evaluate done", DATA, ("summary.json",), prepare=changed_state(lambda d: (d / "summary.json").write_text("{", "utf-8"))
    ),
    "summary that is none": Case(
        "evaluate done", DATA, ("summary.json", "list"), prepare=changed_state(lambda d: (d / "summary.json").write_text("[]", "utf-8"))
    ),
    "report of a summary that is none": Case(
        "report done", DATA, ("summary.json", "int"), prepare=changed_state(lambda d: (d / "summary.json").write_text("3", "utf-8"))
    ),
    "broken experiment in a run": Case(
        "evaluate done", USAGE, ("experiment.toml",), prepare=changed_state(lambda d: (d / "experiment.toml").write_text("x", "utf-8"))
    ),
    "a pair to single texts": Case("predict done 'a ||| b'", USAGE, ("single texts",)),
    "a single text to pairs": Case("predict paired a", USAGE, ("pairs", "|||")),
    "no text": Case("predict done", USAGE, ("Missing argument",)),
    "unknown client": Case("predict done good --client u9", USAGE, ("no client 'u9'", "did you mean 'u2'?")),
    "client of a global model": Case("predict done good --client u0", USAGE, ("'fedavg' has no personal models",)),
    "export to a full folder": Case("export done --to stuff", USAGE, ("'stuff'", "not an empty folder"), {"stuff/a": ""}),
    "export to a file": Case("export done --to file", USAGE, ("'file'", "not an empty folder"), prepare=unwritable),
    "export below a file": Case("export done --to file/x", FAILED, ("file",), prepare=unwritable),
    "report below a file": Case("report done -o file/x.html", FAILED, ("file/x.html",), prepare=unwritable),
    "merge of a prefix": Case("export prefixed --to x --merge", USAGE, ("prefix", "cannot be merged", "without --merge")),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Path:
    """A folder with an experiment, its data, and three finished runs: done, paired and prefixed."""
    folder = tmp_path_factory.mktemp("made")
    write_experiment(folder, folders("bert"), 1, 'name = "d.csv"', "count = 3")
    (folder / "d.csv").write_text(GOOD, encoding="utf-8")
    pairs = [(row[0], *row) for row in ROWS]
    (folder / "p.csv").write_text(csv_of(pairs, "sentence1,sentence2,label,user"), encoding="utf-8")
    runs = {"done": "", "paired": "--set data.name=p.csv --set rounds=2", "prefixed": "--set technique.kind=prefix"}
    for name, changes in runs.items():
        assert in_process("run", "e.toml", "--out", name, *shlex.split(changes), folder=folder) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def one_line(err: str) -> str:
    """The only line of standard error."""
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("name", CASES)
def test_one_line_and_the_exit_code(name: str, here: Path, folders: Callable[[str], Path], typed: Typed) -> None:
    case = CASES[name]
    for path, content in case.files.items():
        (here / path).parent.mkdir(exist_ok=True)
        (here / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    case.prepare(here)
    command = case.command.replace("{vit}", str(folders("vit"))).replace("{gpt2}", str(folders("gpt2")))
    command = command.replace("{roberta}", str(folders("roberta")))
    code, out, err = typed(command)
    line = one_line(err)
    assert code == case.code, line
    assert out == ""
    assert [word for word in case.words if word not in line] == [], line


def test_a_mistake_leaves_no_folder_behind(here: Path, typed: Typed) -> None:
    """So that the corrected command runs as it is."""
    for wrong in ("technique.rank=0", "algorithm.kind=scaffold", "data.text=txt", f"track.to=['{MISSING}']", "clients.count=9"):
        code, _, _ = typed(f'run e.toml --out new --set "{wrong}"')
        assert code in (USAGE, DATA)
        assert not (here / "new").exists(), wrong


def test_a_run_without_a_checkpoint_is_none_yet(here: Path, typed: Typed) -> None:
    (here / "done" / "state" / "checkpoint.json").unlink()
    assert typed("run e.toml --out done --set technique.rank=1")[0] == 0
    assert read(here / "done" / "adapter" / "adapter_config.json")["r"] == 1


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 45
    assert {case.code for case in CASES.values()} == {USAGE, DATA, FAILED}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing(code: int, here: Path, monkeypatch: pytest.MonkeyPatch, typed: Typed) -> None:
    """From the second write on: the first makes the folder."""
    atomically, count = wire.atomically, 0

    def full(path: Path, write: Callable[[Path], object]) -> int:
        nonlocal count
        count += 1
        if count > 1:
            raise OSError(code, os.strerror(code), str(path))
        return atomically(path, write)

    with monkeypatch.context() as patch:
        patch.setattr(wire, "atomically", full)
        got, out, err = typed("run e.toml --out new")
    assert got == FAILED
    assert os.strerror(code) in one_line(err)
    assert "--resume" in err
    assert out == ""
    got, _, err = typed("run e.toml --out new --resume")  # space was made
    assert got == 0, err
    assert (here / "new" / "summary.json").is_file()


def full_disk(size: int = 3000) -> None:
    """From now on no file can grow beyond so many bytes: real writes fail, also those of libraries."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@contextmanager
def disk_again_afterwards() -> Iterator[None]:
    """Lifts `full_disk` within the test: pytest's own output, after it, may go to a file that is longer already."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("merge", ["", "--merge"])
def test_an_export_to_a_full_disk(merge: str, here: Path, typed: Typed) -> None:
    with disk_again_afterwards():
        full_disk()
        code, out, err = typed(f"export done --to new {merge}")
    assert code == FAILED
    assert os.strerror(errno.EFBIG) in one_line(err)
    assert out == ""


@pytest.mark.parametrize("technique", ["lora", "full"])
def test_a_disk_that_is_full_when_the_adapter_is_written(
    technique: str, here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = run_module.evaluate

    def then_full(*given: Any) -> Any:
        full_disk()
        return judge(*given)

    monkeypatch.setattr(run_module, "evaluate", then_full)
    with disk_again_afterwards():
        code, out, err = typed(f"run e.toml --out new --set technique.kind={technique} --set evaluate.every=0")
    assert code == FAILED
    line = err.splitlines()[-1]
    assert line.startswith("error: cannot write to")
    assert os.strerror(errno.EFBIG) in line
    assert "--resume" in line
    assert "Traceback" not in err
    assert out == ""


def test_replies_that_the_temporary_folder_cannot_hold(here: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(local, "SPOOL", 1)
    write = wire.write

    def write_to(message: Any, path: Path) -> int:
        if path.parent.name != "state":
            monkeypatch.setattr(wire, "save_file", full)
        return write(message, path)

    monkeypatch.setattr(wire, "write", write_to)
    code, _, err = typed("run e.toml --out new")
    assert code == FAILED
    assert err.splitlines()[-1].startswith("error: cannot write to")
    assert os.strerror(errno.ENOSPC) in err
    assert "Traceback" not in err


@pytest.mark.parametrize("size", [0, 3000])  # no folder can be made, or no file in it
@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_judging_and_telling_with_a_full_temporary_folder(
    command: str, size: int, here: Path, typed: Typed, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "evaluate" and size:
        pytest.skip("it makes a folder and writes nothing there")
    assert typed(f"run e.toml --out told {sets(data__kind='language', model__name=folders('gpt2'))}").code == 0
    with disk_again_afterwards():
        if not size:
            monkeypatch.setattr(tempfile, "tempdir", None)  # looked for again, as in a new process
        full_disk(size)
        code, out, err = typed(f"{command} told", *(["fox"] if command == "predict" else []))
    assert code == FAILED
    assert one_line(err).startswith("error: cannot write to")
    assert "TMPDIR" in err
    assert "--resume" not in err
    assert out == ""


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (GOOD.replace("fine", "fair"), "labels"),
        (GOOD.replace("u2", "u7"), "clients"),
        (csv_of([(row[0], *row) for row in ROWS], "sentence1,sentence2,label,user"), "pairs"),
    ],
)
def test_a_run_is_not_resumed_with_other_data(content: str, name: str, here: Path, typed: Typed) -> None:
    (here / "d.csv").write_text(content, encoding="utf-8")
    code, out, err = typed("run e.toml --out done --resume --set rounds=2")
    assert code == USAGE
    assert f"'done': the data is no longer what the run began with ({name} differ): name another --out" in one_line(err)
    assert out == ""
    (here / "d.csv").write_text(GOOD, encoding="utf-8")
    assert typed("run e.toml --out done --resume --set rounds=2").code == 0
    assert [line["round"] for line in lines(here / "done")] == [1, 2]


@pytest.mark.parametrize("algorithm", ["fedavg", "pooled", "local"])
def test_a_run_that_diverges_from_the_start(algorithm: str, here: Path, typed: Typed) -> None:
    code, out, err = typed(
        f"run e.toml --out new --json --set train.lr=1e30 --set train.epochs=3 --set algorithm.kind={algorithm}"
    )
    assert code == FAILED
    assert err.splitlines()[-1].startswith("error: no client was heard in 1 rounds")
    assert "lower train.lr" in err
    assert out == ""
    assert lines(here / "new")[0]["loss"] is None
    assert not (here / "new" / "summary.json").exists()


@pytest.mark.parametrize("algorithm", ["fedavg", "local"])
def test_a_run_that_diverges_at_its_end_is_told_in_valid_json(algorithm: str, here: Path, typed: Typed) -> None:
    def refused(constant: str) -> Any:
        raise AssertionError(constant)

    code, out, _ = typed(f"run e.toml --out new --json --set train.lr=1e30 --set train.steps=1 --set algorithm.kind={algorithm}")
    assert code == 0
    assert json.loads(out, parse_constant=refused)["global_test_loss"] is None
    for name in ("summary.json", "rounds.jsonl"):
        json.loads((here / "new" / name).read_text(encoding="utf-8"), parse_constant=refused)
    assert json.loads(typed("evaluate new --json").out, parse_constant=refused)["global_test_loss"] is None


def test_the_usual_length_of_texts_is_that_of_a_small_model(here: Path, typed: Typed) -> None:
    """128 where nothing is said, and the model has 64 positions; a run folder says no more."""
    (here / "d.csv").write_text(csv_of([(f"{text} {'w1 ' * 150}", label, user) for text, label, user in ROWS]), encoding="utf-8")
    assert typed("run e.toml --out new --set technique.kind=prompt --set technique.length=5").code == 0
    assert typed("evaluate new").code == 0
    assert typed("predict new", "w1 " * 150).code == 0
    assert typed("run new/experiment.toml --out again").code == 0
    path = here / "new" / "experiment.toml"
    path.write_text(path.read_text("utf-8").replace("[data]\n", "[data]\nmax_length = 128\n"), "utf-8")  # an earlier version's
    assert typed("evaluate new").code == 0
    assert typed("predict new", "w1 " * 150).code == 0
    assert typed("run e.toml --out new --resume --set technique.kind=prompt --set technique.length=5 --set rounds=2").code == 0


@pytest.mark.parametrize("length", [128, 64, 16])
def test_a_length_that_was_asked_for_is_kept(length: int, here: Path, typed: Typed, folders: Callable[[str], Path]) -> None:
    """In the folder of a model that has room for it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    config = AutoConfig.from_pretrained(folders("bert"), max_position_embeddings=128)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(here / "roomy")
    AutoTokenizer.from_pretrained(folders("bert")).save_pretrained(here / "roomy")
    changes = f"--set model.name=roomy --set data.max_length={length}"
    assert typed(f"run e.toml --out new {changes}").code == 0
    assert tomllib.loads((here / "new" / "experiment.toml").read_text("utf-8"))["data"]["max_length"] == length
    for command in ("evaluate new", "predict new good", f"run e.toml --out new --resume {changes} --set rounds=2"):
        assert typed(command).code == 0


def test_a_folder_that_may_not_be_written(here: Path, typed: Typed) -> None:
    (here / "locked").mkdir(mode=0o500)
    if os.access(here / "locked", os.W_OK):
        pytest.skip("root may write everywhere")
    code, _, err = typed("run e.toml --out locked/new")
    assert code == FAILED
    assert "locked/new" in one_line(err)


# ------------------------------------------------------------------------------------------------------------- real processes


@pytest.mark.parametrize("name", ["unknown flag", "not UTF-8", "resume with a flipped byte"])
def test_in_a_process_of_its_own(name: str, here: Path) -> None:
    case = CASES[name]
    for path, content in case.files.items():
        (here / path).write_bytes(content if isinstance(content, bytes) else content.encode())
    case.prepare(here)
    done = subprocess.run([*COMMAND, *shlex.split(case.command)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (case.code, "")
    assert all(word in one_line(done.stderr) for word in case.words)


def test_an_interrupt_is_one_line_and_can_be_resumed(here: Path) -> None:
    command = [*COMMAND, "run", "e.toml", "--out", "long", "--json", "--set", "rounds=400", "--set", "evaluate.every=0"]
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # else a suite run in the background would hand on that it is ignored
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    until_checkpoint(process, here / "long")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    told = [line for line in err.splitlines() if not line.startswith("round ")]
    assert told == ["interrupted: the last checkpoint is kept; add --resume to go on"]
    done = len(lines(here / "long"))
    assert 1 <= done < 400
    assert in_process(*command[3:9], f"rounds={done + 2}", *command[10:], "--resume") == 0
    assert read(here / "long" / "summary.json")["rounds"] == done + 2
    assert [line["round"] for line in lines(here / "long")] == list(range(1, done + 3))
