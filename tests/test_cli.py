"""The commands, as a user types them, on a tiny model: what they print, what they write, and that the two agree."""

from __future__ import annotations

import csv
import inspect
import json
import math
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationMixin

from commands import Printed, csv_of, in_process, lines, read, sets, write_experiment
from fedtailor import __version__, wire
from fedtailor.algorithms import ALGORITHMS
from fedtailor.backbone import Backbone
from fedtailor.config import load
from fedtailor.core import Message
from fedtailor.folder import written
from fedtailor.ledger import COLUMNS
from fedtailor.options import CODE
from fedtailor.predict import _asked
from fedtailor.techniques import TECHNIQUES
from tiny import LABELS

# Owner u0 has 20 rows, u1 16, u2 12; the test file has rows of its own.
OWNERS = [*["u0"] * 20, *["u1"] * 16, *["u2"] * 12]
TRAIN = [(f"{LABELS[k % 3]} w{k % 29} fox {LABELS[k % 3]}", LABELS[k % 3], owner) for k, owner in enumerate(OWNERS)]
TEST = [(f"w{k} {LABELS[k % 3]} dog", LABELS[k % 3], "u0") for k in range(13)]
FILES = {
    "experiment.toml",
    "environment.json",
    "facts.json",
    "rounds.jsonl",
    "clients.csv",
    "summary.json",
    "report.html",
    "state",
    "adapter",
}
SUMMARY = {
    "metric",
    "global_test",
    "clients_mean",
    "clients_worst_decile",
    "bytes_up_per_client_round",
    "bytes_down_per_client_round",
    "bytes_total",
    "trainable_parameters",
    "flops_per_example",
    "peak_memory_bytes",
    "seconds",
    "rounds",
    "state_hash",
}
Call = Callable[..., Printed]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, folders: Callable[[str], Path]) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "train.csv").write_text(csv_of(TRAIN), encoding="utf-8")
    (folder / "test.csv").write_text(csv_of(TEST), encoding="utf-8")
    write_experiment(folder, folders("bert"), 2, 'name = "train.csv"\ntest = "test.csv"', "count = 3")
    return folder


@pytest.fixture
def call(home: Path, monkeypatch: pytest.MonkeyPatch, typed: Call) -> Call:
    """Runs a command line in the folder `home`; it has to end with `code`."""
    monkeypatch.chdir(home)

    def run(command: str, *words: str, code: int = 0) -> Printed:
        printed = typed(command, *words)
        assert printed.code == code, printed.err
        return printed

    return run


@pytest.fixture(scope="module")
def ran(home: Path) -> Callable[[str], Path]:
    """options -> the folder of a run with them, made once."""
    made: dict[str, Path] = {}

    def run(options: str = "") -> Path:
        if options not in made:
            folder = home / "made" / str(len(made))
            assert in_process("run", "e.toml", "--out", str(folder), *shlex.split(options), folder=home) == 0
            made[options] = folder
        return made[options]

    return run


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "clients.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------------------------------- run


def test_a_run_folder_is_complete(ran: Callable[..., Path], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ran()
    assert {path.name for path in folder.iterdir()} == FILES
    summary = read(folder / "summary.json")
    assert set(summary) >= SUMMARY
    resolved = tomllib.loads((folder / "experiment.toml").read_text(encoding="utf-8"))
    monkeypatch.chdir(home)
    assert resolved == written(load(home / "e.toml"))
    assert read(folder / "environment.json")["packages"]["torch"] == torch.__version__
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    assert [line["round"] for line in lines(folder)] == [1, 2] == list(range(1, summary["rounds"] + 1))
    assert [row["client"] for row in table(folder)] == ["u0", "u1", "u2"]


def test_the_numbers_of_a_run_agree(ran: Callable[..., Path]) -> None:
    """summary.json, rounds.jsonl, clients.csv and the state say the same, as far as each says it."""
    folder = ran()
    summary, rounds, clients = read(folder / "summary.json"), lines(folder), table(folder)
    assert summary["bytes_total"] == sum(line["bytes_up"] + line["bytes_down"] for line in rounds)
    for column in COLUMNS:
        per_round = [sum(c[column] for c in line["clients"].values()) for line in rounds]
        assert per_round == [line[column] for line in rounds]
        assert sum(float(row[column]) for row in clients) == pytest.approx(sum(per_round))
    assert summary["bytes_up_per_client_round"] == sum(line["bytes_up"] for line in rounds) / 6
    assert summary["flops_total"] == sum(line["flops"] for line in rounds)
    # u0: 20 rows, a fifth for its test, a tenth for validation; the whole test file is the global test set.
    assert [(int(r["train"]), int(r["valid"]), int(r["test"])) for r in clients] == [(14, 2, 4), (11, 2, 3), (9, 1, 2)]
    assert summary["train_rows"] == 34 == rounds[0]["examples"]
    scores = [float(row["metric"]) for row in clients]
    assert summary["clients_mean"] == pytest.approx(np.mean(scores))
    assert summary["clients_worst_decile"] == pytest.approx(min(scores))
    assert summary["global_test"] * 13 == pytest.approx(round(summary["global_test"] * 13))
    counts = np.asarray(summary["partition"]["counts"])
    assert counts.sum(1).tolist() == [int(row["train"]) for row in clients]
    common = summary["partition"]["labels"][counts.sum(0).argmax()]
    assert summary["majority"] == pytest.approx(sum(label == common for _, label, _ in TEST) / 13)
    with np.errstate(all="raise"):
        assert summary["seconds"] == pytest.approx(sum(line["seconds"] for line in rounds))
    assert summary["seconds_total"] >= summary["seconds"]


def test_bytes_are_those_of_the_encoded_messages(home: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message of the run, caught where it is encoded: a broadcast once for all clients, a reply for each."""
    encode, seen = wire.encode, []

    def watched(message: Message, *bound: int) -> bytes:
        blob = encode(message, *bound)
        seen.append((message.verb, len(blob)))
        return blob

    monkeypatch.setattr(wire, "encode", watched)
    summary = json.loads(call(f"run e.toml --json --out counted {sets(filters__up=['int8'], filters__down=['bf16'])}").out)
    down, up = [n for verb, n in seen if verb == "train"], [n for verb, n in seen if verb == "update"]
    assert (len(down), len(up)) == (2, 6)
    assert summary["bytes_total"] == 3 * sum(down) + sum(up)
    rounds = lines(home / "counted")
    assert [line["bytes_down"] for line in rounds] == [3 * n for n in down]
    assert [line["bytes_up"] for line in rounds] == [sum(up[:3]), sum(up[3:])]


def test_filters_make_messages_smaller(ran: Callable[..., Path]) -> None:
    plain_run = read(ran() / "summary.json")
    filtered = read(ran(sets(filters__up=["bf16"], filters__down=["bf16"])) / "summary.json")
    for way in ("up", "down"):  # two bytes a number; the header differs a little
        saved = plain_run[f"bytes_{way}_per_client_round"] - filtered[f"bytes_{way}_per_client_round"]
        assert saved == pytest.approx(2 * plain_run["trainable_parameters"], abs=100)


def test_seeds(call: Call, ran: Callable[..., Path]) -> None:
    first = json.loads(call("run e.toml --json --out s0 --seed 0").out)
    other = json.loads(call("run e.toml --json --out s5 --seed 5").out)
    assert first["state_hash"] == read(ran() / "summary.json")["state_hash"] != other["state_hash"]
    assert (first["seed"], other["seed"]) == (0, 5)


def test_runs_are_numbered(home: Path, call: Call) -> None:
    small = sets(rounds=1, evaluate__every=0)
    found = [json.loads(call(f"run e.toml --json {small}").out)["run"] for _ in range(3)]
    assert found == [str(Path("runs") / name) for name in ("tiny", "tiny-2", "tiny-3")]
    again = json.loads(call(f"run e.toml --json --resume {small}").out)  # the latest one, which is done
    assert again["run"] == found[-1]
    assert again["state_hash"] == read(home / found[0] / "summary.json")["state_hash"]


def test_a_name_in_experiments(home: Path, call: Call) -> None:
    (home / "experiments").mkdir()
    (home / "experiments" / "named.toml").write_text((home / "e.toml").read_text("utf-8").replace("tiny", "named"), "utf-8")
    assert json.loads(call(f"run named --json {sets(rounds=1)}").out)["name"] == "named"


def test_what_people_see(home: Path, call: Call) -> None:
    printed = call("run e.toml --out seen")
    assert "global test (accuracy)" in printed.out
    assert f"run     {Path('seen')}" in printed.out
    assert [line.split(",")[0] for line in printed.err.splitlines()] == ["round 1/2", "round 2/2"]
    assert "accuracy" in call("evaluate seen").out
    label, score, text = call("predict seen", "good fox").out.rstrip("\n").split("\t")
    assert (label in LABELS, text) == (True, "good fox")
    assert 1 / 3 <= float(score) <= 1
    assert call("report seen").out.strip() == str(Path("seen") / "report.html")
    assert call("export seen --to out").out.strip() == "out"
    assert "rank = 8" in call("list techniques").out
    assert call("--version").out.strip() == __version__
    assert "compare" in call("--help").out
    assert "Usage" in call("", code=2).err


# ------------------------------------------------------------------------------------------- evaluate, predict, export, report


def test_json_is_one_document(home: Path, call: Call, ran: Callable[..., Path]) -> None:
    folder = ran()
    summary = read(folder / "summary.json")
    again = json.loads(call(f"evaluate {folder} --json").out)
    assert again["run"] == str(folder)
    assert set(again) >= SUMMARY
    for key in ("global_test", "clients_mean", "clients_worst_decile", "global_test_loss"):
        assert again[key] == pytest.approx(summary[key], abs=1e-6)
    assert again["per_client"] == {row["client"]: pytest.approx(float(row["metric"])) for row in table(folder)}
    page = json.loads(call(f"report {folder} {folder} -o page.html --json").out)
    assert page == {"report": "page.html"}
    assert (home / "page.html").stat().st_size > 1000
    checks = json.loads(call("doctor --json").out)
    assert all({"name", "ok", "found"} <= set(check) for check in checks)
    assert all(check["ok"] for check in checks)


@pytest.mark.parametrize("what", ["techniques", "algorithms", "datasets", "models", "partitions", "filters", "metrics"])
def test_lists(what: str, call: Call) -> None:
    entries = json.loads(call(f"list {what} --json").out)
    names = [entry["name"] for entry in entries]
    assert names == sorted(set(names)) or what == "metrics"
    assert all(entry["summary"].strip() for entry in entries)
    registry = {"techniques": list(TECHNIQUES), "algorithms": list(ALGORITHMS), "models": ["minilm"], "datasets": ["pydocs"]}
    assert sorted(registry.get(what, names)) == sorted(names)
    assert [line.split()[0] for line in call(f"list {what}").out.splitlines() if not line.startswith(" ")] == names
    for entry in entries if what == "algorithms" else ():  # every option that an experiment may give
        made = inspect.signature(ALGORITHMS[entry["name"]]).parameters.values()
        given = {p.name for p in made if p.name != "job" and p.name not in CODE and p.kind is not p.VAR_KEYWORD}
        assert set(entry["options"]) == given


def test_options_are_told_as_toml_has_them(call: Call) -> None:
    told = call("list algorithms").out
    for words in ("depths = []", "anchors = unset, tied = []", "renormalise = true", "rule = interpolate"):
        assert words in told


def test_predictions(call: Call, ran: Callable[..., Path], folders: Callable[[str], Path]) -> None:
    """What `predict` says is what transformers and PEFT say of the exported folder, merged or not."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = ran()
    texts = ["good fox", "the quick brown dog jumps bad", "w3"]
    found = json.loads(call(f"predict {folder} --json", *texts).out)["predictions"]
    assert [one["text"] for one in found] == texts
    for one in found:
        assert set(one) == {"text", "label", "index", "scores"}
        assert sum(one["scores"]) == pytest.approx(1)
        assert one["index"] == int(np.argmax(one["scores"]))
        assert one["label"] == sorted(LABELS)[one["index"]]
    assert json.loads(call(f"export {folder} --to peft --json").out) == {"run": str(folder), "to": "peft", "merged": False}
    call(f"export {folder} --to merged --merge")
    base = AutoModelForSequenceClassification.from_pretrained(folders("bert"), num_labels=3)
    assert [path.name for path in Path("merged").glob("*.safetensors")] == ["model.safetensors"]
    for model, where in (
        (PeftModel.from_pretrained(base, "peft"), "peft"),
        (AutoModelForSequenceClassification.from_pretrained("merged"), "merged"),
    ):
        inputs = AutoTokenizer.from_pretrained(where)(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            theirs = model.eval()(**inputs).logits.softmax(-1)
        np.testing.assert_allclose(theirs.numpy(), [one["scores"] for one in found], atol=1e-5)
    assert AutoModelForSequenceClassification.from_pretrained("merged").config.id2label == dict(enumerate(sorted(LABELS)))
    written = {p.name: p.read_bytes() for p in Path("peft").iterdir() if p.suffix == ".safetensors"}
    assert written == {name: (folder / "adapter" / name).read_bytes() for name in written}


def test_predictions_of_pairs(home: Path, call: Call) -> None:
    rows = [(text, f"{label} dog", label, owner) for text, label, owner in TRAIN]
    (home / "pairs.csv").write_text(csv_of(rows, "premise,hypothesis,label,user"), encoding="utf-8")
    call(f"run e.toml --out paired {sets(data__name='pairs.csv', data__test=0.25, rounds=1)}")
    found = json.loads(call("predict paired --json", "good fox ||| bad", "a|||b").out)["predictions"]
    assert [len(one["scores"]) for one in found] == [3, 3]


def test_continuations(home: Path, call: Call, folders: Callable[[str], Path]) -> None:
    """A causal model answers with text; greedy decoding by hand says the same."""
    options = sets(model__name=folders("gpt2"), data__kind="language", rounds=1)
    summary = json.loads(call(f"run e.toml --out told --json {options}").out)
    assert summary["metric"] == "perplexity"
    assert summary["clients_worst_decile"] >= summary["clients_mean"]  # of perplexities the worst is the largest
    assert "majority" not in summary
    (found,) = json.loads(call("predict told --json", "the quick").out)["predictions"]
    assert (found["text"], found["index"], found["scores"]) == ("the quick", None, [])

    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders("gpt2"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders("gpt2")), "told/adapter").eval()
    ids = tokenizer("the quick", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        while ids.shape[1] < start + 40:
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) == model.config.eos_token_id:
                break
    assert found["label"] == tokenizer.decode(ids[0, start:], skip_special_tokens=True)


@pytest.mark.parametrize("technique", ["lora", "prefix", "prompt", "full"])
def test_continuations_end_where_the_positions_end(
    technique: str, home: Path, call: Call, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 positions, of which a prompt or prefix takes 5: a text of any length is continued, and its end counts."""
    taken = 5 if technique in ("prefix", "prompt") else 0
    length = {"technique__length": taken} if taken else {}
    options = sets(technique__kind=technique, **length, model__name=folders("gpt2"), data__kind="language", rounds=1)
    out = f"told-{technique}"
    call(f"run e.toml --out {out} {options}")
    generated: list[tuple[int, int]] = []
    generate = GenerationMixin.generate

    def counted(*given: Any, **asked: Any) -> Any:
        ids = generate(*given, **asked)
        generated.append((asked["input_ids"].shape[1], ids.shape[1]))
        return ids

    monkeypatch.setattr(GenerationMixin, "generate", counted)
    room = 64 - taken
    ends = "w2 fox " * 30
    texts = ["w1 " * n for n in (3, 17, 18, 22, 23, 58, 62, 63, 64)] + ["w1 " * 500, "w3 " * 70 + ends, "w4 w5 " * 700 + ends]
    found = json.loads(call(f"predict {out} --json", *texts).out)["predictions"]
    assert [one["text"] for one in found] == texts
    assert [start for start, _ in generated] == [min(len(text.split()) + 2, room - room // 2) for text in texts]
    assert all(start < whole <= min(start + 40, room) for start, whole in generated)
    assert found[-1]["label"] == found[-2]["label"]


def test_a_long_instruction_loses_its_middle(backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones("gpt2")._replace(kind="instruction")
    whole = _asked(backbone, "w1 " * 100, None)
    cut = _asked(backbone, "w1 " * 100, 64)
    assert (len(cut), cut[:24], cut[-8:]) == (32, whole[:24], whole[-8:])
    assert _asked(backbone, "w1", 64) == _asked(backbone, "w1", None)


def test_images(home: Path, call: Call, folders: Callable[[str], Path]) -> None:
    from PIL import Image

    for k in range(24):
        path = home / "pictures" / LABELS[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), tuple(200 * (c == k % 3) + k for c in range(3))).save(path)  # type: ignore[arg-type]
    (home / "i.toml").write_text(
        f'[model]\nname = "{folders("vit")}"\n[data]\nname = "pictures"\n[clients]\ncount = 2\n[train]\nbatch = 4\n', "utf-8"
    )
    summary = json.loads(call(f"run i.toml --out seen-images --json {sets(rounds=1, technique__length=2)}").out)
    assert summary["train_rows"] <= 19
    found = json.loads(call("predict seen-images --json pictures/good/0.png pictures/bad/1.png").out)["predictions"]
    assert [len(one["scores"]) for one in found] == [3, 3]
    assert "cannot be read" in call("predict seen-images i.toml", code=3).err


# ---------------------------------------------------------------------------------------------------------------------- compare


@pytest.fixture(scope="module")
def compared(home: Path) -> tuple[Path, list[dict[str, Any]]]:
    text = (home / "e.toml").read_text(encoding="utf-8")
    text += (
        '[compare]\nseeds = [0, 1, 2]\nbaselines = ["pooled", "local", "majority"]\n[compare.vary]\n"technique.rank" = [1, 2]\n'
    )
    (home / "c.toml").write_text(text.replace("rounds = 2", "rounds = 1"), encoding="utf-8")
    assert in_process("compare", "c.toml", "--out", "cmp", folder=home) == 0
    return home / "cmp", read(home / "cmp" / "compare.json")


def test_a_comparison(compared: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = compared
    varied = [f"{kind}technique.rank={rank}" for rank in (1, 2) for kind in ("", "pooled, ", "local, ")]
    assert [row["name"] for row in rows] == [*varied, "majority"]
    for row in rows[:-1]:
        values = [read(folder.parent / run / "summary.json") for run in row["runs"]]
        assert [v["seed"] for v in values] == [0, 1, 2]
        assert {v["technique"] for v in values} == {"lora"}
        for measure in ("global_test", "clients_mean", "bytes_total", "seconds"):
            numbers = [v[measure] for v in values]
            half = 4.302652729911275 * np.std(numbers, ddof=1) / math.sqrt(3)  # t(0.975, 2): from a table
            assert row[measure]["mean"] == pytest.approx(np.mean(numbers))
            assert row[measure]["high"] - row[measure]["mean"] == pytest.approx(half)
            assert row[measure]["mean"] - row[measure]["low"] == pytest.approx(half)
    by_name = {row["name"]: row for row in rows}
    assert (
        by_name["technique.rank=2"]["trainable_parameters"]["mean"] > by_name["technique.rank=1"]["trainable_parameters"]["mean"]
    )
    assert by_name["pooled, technique.rank=1"]["bytes_total"]["mean"] == 0
    passes = [read(folder.parent / by_name[n]["runs"][0] / "summary.json")["example_passes"] for n in varied if "pooled" not in n]
    assert passes == [34] * 4  # one round over 14 + 11 + 9 rows
    majority = [read(folder.parent / run / "summary.json")["majority"] for run in rows[0]["runs"]]
    assert rows[-1]["global_test"]["mean"] == pytest.approx(np.mean(majority))
    text = (folder / "compare.md").read_text(encoding="utf-8")
    assert all(f"| {row['name']} |" in text for row in rows)
    assert "first seed; means over all 3 stand in compare.md" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_comparison_skips_what_is_done_and_resumes_what_was_cut(
    compared: tuple[Path, list[dict[str, Any]]], home: Path, call: Call
) -> None:
    _, rows = compared
    done, cut = (home / row["runs"][0] for row in rows[:2])
    before = (done / "summary.json").stat().st_mtime_ns
    hashed = read(cut / "summary.json")["state_hash"]
    (cut / "summary.json").unlink()  # the state is kept: a kill while the test sets were judged
    printed = call("compare c.toml --out cmp --json")
    again = json.loads(printed.out)
    assert [(one["case"], one["run"]) for one in again] == [(row["name"], run) for row in rows[:-1] for run in row["runs"]]
    assert (done / "summary.json").stat().st_mtime_ns == before
    assert read(cut / "summary.json")["state_hash"] == hashed
    assert "resuming after round 1" in printed.err
    assert "round 1/1" not in printed.err  # nothing was trained again
    for one in again:
        assert one == {"case": one["case"], **read(home / one["run"] / "summary.json"), "run": one["run"]}
    assert [row["global_test"] for row in read(home / "cmp" / "compare.json")] == [row["global_test"] for row in rows]
    assert "other settings" in call("compare c.toml --out cmp --set train.lr=0.2", code=2).err


def test_a_comparison_of_given_cases(home: Path, call: Call) -> None:
    text = (home / "e.toml").read_text(encoding="utf-8")
    for case in ('"algorithm.kind" = "fedit"', '"technique.kind" = "prefix"\n"technique.length" = 2\n"train.lr" = 0.1'):
        text += f"[[compare.sets]]\n{case}\n"
    (home / "g.toml").write_text(text, encoding="utf-8")
    told = json.loads(call(f"compare g.toml --json --seed 5 {sets(rounds=1)}").out)
    assert [(one["seed"], Path(one["run"]).name) for one in told] == [(5, "seed-5")] * 2
    rows = read(home / "runs" / "tiny-compare" / "compare.json")
    assert (
        [row["name"] for row in rows]
        == [one["case"] for one in told]
        == [
            "algorithm.kind=fedit",
            "technique.kind=prefix, technique.length=2, train.lr=0.1",
        ]
    )
    assert rows[0]["global_test"]["low"] == rows[0]["global_test"]["high"]  # one seed has no interval


# ------------------------------------------------------------------------------------------------ kinds of runs a user may want


@pytest.mark.parametrize("kind", ["local", "fedsa"])
def test_personal_models(kind: str, home: Path, call: Call, ran: Callable[..., Path]) -> None:
    folder = ran(sets(algorithm__kind=kind))
    personal = folder / "adapter" / "personal"
    assert {path.name for path in personal.iterdir()} == {"u0", "u1", "u2"}
    weights = {path.name: (path / "adapter_model.safetensors").read_bytes() for path in personal.iterdir()}
    assert len(set(weights.values())) == 3
    shown = [json.loads(call(f"predict {folder} --json --client {c}", "good w1").out)["predictions"][0] for c in ("u0", "u1")]
    assert shown[0]["scores"] != shown[1]["scores"]
    call(f"export {folder} --to {kind}-u1 --client u1")
    assert (home / f"{kind}-u1" / "adapter_model.safetensors").read_bytes() == weights["u1"]
    rows = table(folder)
    assert all(0 <= float(row["metric_global"]) <= 1 for row in rows)
    again = json.loads(call(f"evaluate {folder} --json").out)
    assert again["global_test"] == pytest.approx(read(folder / "summary.json")["global_test"])
    assert again["per_client"] == {row["client"]: pytest.approx(float(row["metric"])) for row in rows}


def test_client_names_that_mean_something_to_a_file_system(home: Path, call: Call) -> None:
    names = {"a/b": "a_b", "..": ".._", "server": "server_", "c d": "c_d"}  # the server's own name among them
    rows = [(text, label, list(names)[k % 4]) for k, (text, label, _) in enumerate(TRAIN)]
    (home / "named.csv").write_text(csv_of(rows), encoding="utf-8")
    words = sets(data__name="named.csv", data__test=0.25, clients__count=4, algorithm__kind="local", clients__per_round=3)
    whole = json.loads(call(f"run e.toml --json --out whole {words} {sets(rounds=3)}").out)
    call(f"run e.toml --out grown {words} {sets(rounds=1)}")
    grown = json.loads(call(f"run e.toml --json --out grown --resume {words} {sets(rounds=3)}").out)
    assert grown["state_hash"] == whole["state_hash"]
    folder = home / "grown"
    assert {path.name for path in folder.iterdir()} == FILES
    assert {path.name for path in (folder / "adapter" / "personal").iterdir()} == set(names.values())
    assert {row["client"] for row in table(folder)} == set(names.values())
    again = json.loads(call("evaluate grown --json").out)
    assert again["per_client"] == {row["client"]: pytest.approx(float(row["metric"])) for row in table(folder)}
    for k, (name, safe) in enumerate(names.items()):
        told = [call(f"predict grown --json 'good w1' --client '{one}'").out for one in (name, safe)]
        assert told[0] == told[1]
        call(f"export grown --to named-{k} --client '{name}'")
        weights = (home / f"named-{k}" / "adapter_model.safetensors").read_bytes()
        assert weights == (folder / "adapter" / "personal" / safe / "adapter_model.safetensors").read_bytes()


def test_devices_deadlines_and_lost_letters(home: Path, call: Call) -> None:
    text = (home / "e.toml").read_text(encoding="utf-8") + "[[clients.devices]]\n"
    text += 'name = "phone"\nshare = 1\ngflops = 0.001\nuplink_mbps = 1\nlatency_ms = 50\ndropout = 0.3\n'
    text += '[[clients.devices]]\nname = "laptop"\nshare = 2\ngflops = 10\n'
    (home / "devices.toml").write_text(text, encoding="utf-8")
    printed = call(f"run devices.toml --json --out devices {sets(rounds=3, clients__deadline=30)}")
    summary, rounds = json.loads(printed.out), lines(home / "devices")
    rows = {row["client"]: row for row in table(home / "devices")}
    assert sorted(row["device"] for row in rows.values()) == ["laptop", "laptop", "phone"]
    phone = next(c for c, row in rows.items() if row["device"] == "phone")
    assert summary["simulated_seconds"] == rounds[-1]["clock"]
    last = 0.0
    for line in rounds:
        assert line["letters"] == 3
        took = {c: own["simulated_seconds"] for c, own in line["clients"].items() if own["replies"]}
        complete = len(took) == 3 and max(took.values()) <= 30
        assert line["clock"] - last == pytest.approx(max(took.values()) if complete else 30)
        if phone in took:  # 50 ms each way, the bytes at 1 Mbit/s, the operations at a million a second
            own = line["clients"][phone]
            assert took[phone] == pytest.approx(0.1 + own["bytes_up"] / 125_000 + own["flops"] / 1e6)
        if not complete:
            assert f"round {line['round']}: no reply in time from" in printed.err
        last = line["clock"]


def test_without_waiting(ran: Callable[..., Path]) -> None:
    devices = "[{name='slow',gflops=0.001},{name='fast',gflops=1,share=2}]"
    folder = ran(sets(algorithm__kind="asynchronous", algorithm__buffer=1, clients__devices=devices, rounds=4))
    rounds = lines(folder)
    clocks = [line["clock"] for line in rounds]
    assert clocks == sorted(clocks)
    assert rounds[0]["letters"] == 3
    assert sum(line["letters"] for line in rounds[1:]) < 9  # who is busy is not asked again
    assert read(folder / "summary.json")["rounds"] == 4


def test_cohorts(ran: Callable[..., Path]) -> None:
    rounds = lines(ran(sets(clients__per_round=2, rounds=4)))
    assert [(line["cohort"], len(line["clients"])) for line in rounds] == [(2, 2)] * 4
    assert len({tuple(sorted(line["clients"])) for line in rounds}) > 1


def test_validation_every_other_round(ran: Callable[..., Path]) -> None:
    assert ["valid" in line for line in lines(ran(sets(evaluate__every=2, rounds=3)))] == [False, True, True]
    assert ["valid" in line for line in lines(ran(sets(evaluate__every=0)))] == [False, False]


def test_ranks_by_client(ran: Callable[..., Path]) -> None:
    folder = ran(sets(algorithm__kind="flora", clients__ranks="[1, 2, 3]"))
    rounds = lines(folder)
    sizes = [own["bytes_up"] for _, own in sorted(rounds[0]["clients"].items())]
    assert sizes[0] < sizes[1] < sizes[2]


def test_a_partition_that_is_drawn(ran: Callable[..., Path]) -> None:
    folder = ran(sets(clients__partition__kind="iid", clients__count=6, rounds=1))
    rows = table(folder)
    assert [row["client"] for row in rows] == [f"client-{k}" for k in range(6)]
    assert [sum(int(row[part]) for part in ("train", "valid", "test")) for row in rows] == [8] * 6


def test_stacked_is_one_by_one(ran: Callable[..., Path]) -> None:
    stacked, alone = (read(ran(sets(engine__stacked=value)) / "summary.json") for value in ("true", "false"))
    assert stacked["global_test_loss"] == pytest.approx(alone["global_test_loss"], abs=1e-4)
    assert stacked["bytes_total"] == pytest.approx(alone["bytes_total"], rel=0.01)
    assert stacked["flops_total"] == alone["flops_total"]


def test_a_tracker(home: Path, ran: Callable[..., Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = ran(sets(track__to="['tensorboard']"))
    (events,) = [
        p for p in (folder / "trackers").rglob("events.out.tfevents.*") if EventAccumulator(str(p)).Reload().Tags()["scalars"]
    ]
    logged = EventAccumulator(str(events)).Reload()
    for name in ("loss", "valid", "bytes_up"):
        told = [(event.step, event.value) for event in logged.Scalars(name)]
        assert told == [(line["round"], pytest.approx(line[name], rel=1e-6)) for line in lines(folder)]


def test_an_algorithm_in_a_file(home: Path, ran: Callable[..., Path]) -> None:
    (home / "mine.py").write_text(
        '"""Mine."""\n\nfrom fedtailor.algorithms import ALGORITHMS\n\n\n'
        'def half(job, lr: float = 0.5):\n    return ALGORITHMS["fedavgm"](job, lr=lr, beta=0.0)\n',
        encoding="utf-8",
    )
    found = read(ran(sets(algorithm__kind="mine.py:half", algorithm__lr=1)) / "summary.json")
    ours = read(ran(sets(algorithm__kind="fedavgm", algorithm__lr=1, algorithm__beta=0)) / "summary.json")
    assert found["state_hash"] == ours["state_hash"]
