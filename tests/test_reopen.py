"""A run that is opened again: its model needs no data, and no file has to be named as it was seen from another directory."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from safetensors.torch import load_file

from fedtailor import cli, run, simulation
from fedtailor.config import override, parse
from fedtailor.folder import plain

WORDS = ("good", "bad", "fine")
EXPERIMENT: dict[str, Any] = {
    "name": "again",
    "rounds": 1,
    "data": {"name": "d.csv", "test": 0.25},
    "clients": {"count": 3, "partition": {"kind": "natural", "column": "user"}},
    "technique": {"kind": "lora", "rank": 2},
    "train": {"batch": 4, "lr": 0.05},
}
MINE = 'from fedtailor.algorithms import ALGORITHMS\n\nmine = ALGORITHMS["fedavg"]\n'
Call = Callable[..., tuple[str, str]]
Home = Callable[..., Path]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command line that has to end with `code`: (standard output, standard error)."""

    def run(command: str, *words: str, code: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["fedtailor", *shlex.split(command), *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert (ended.value.code or 0) == code, err
        return out, err

    return run


@pytest.fixture
def home(tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Home:
    """Goes to a folder with d.csv and e.toml: home("algorithm.kind=local", ...) changes keys of the experiment."""

    def make(*changes: str, columns: str = "text,label,user", family: str = "bert") -> Path:
        cells = {"text": "{0} w{1} fox", "premise": "{0} w{1}", "hypothesis": "fox w{1}", "label": "{0}", "user": "u{2}"}
        row = ",".join(cells[name] for name in columns.split(","))
        rows = [row.format(WORDS[k % 3], k % 29, k % 7 % 3) for k in range(48)]
        (tmp_path / "d.csv").write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")
        values = tomllib.loads(tomli_w.dumps({"model": {"name": str(folders(family))}, **EXPERIMENT}))
        for change in changes:
            override(values, change)
        (tmp_path / "e.toml").write_text(tomli_w.dumps(values), encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


def told(call: Call, *texts: str, options: str = "") -> Any:
    return json.loads(call(f"predict done --json {options}", *texts)[0])["predictions"]


def weights(folder: Path) -> dict[str, list[Any]]:
    return {name: value.tolist() for name, value in load_file(folder / "adapter_model.safetensors").items()}


def test_predict_and_export_read_no_data(home: Home, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    here = home()
    call("run e.toml --out done")
    assert json.loads((here / "done/facts.json").read_text("utf-8")) == {
        "kind": "text",
        "labels": ["bad", "fine", "good"],
        "pairs": False,
        "clients": ["u0", "u1", "u2"],
        "public": 0,
        "newcomers": [],
    }
    before = told(call, "good w1 fox", "bad")
    call("export done --to first")
    (here / "d.csv").unlink()
    monkeypatch.delattr(simulation, "_sites")  # what the data is needed for
    assert told(call, "good w1 fox", "bad") == before
    call("export done --to second")
    call("export done --to merged --merge")
    assert weights(here / "first") == weights(here / "second") == weights(here / "done/adapter")
    assert (here / "merged/model.safetensors").is_file()


def test_evaluate_needs_the_data(home: Home, call: Call) -> None:
    here = home()
    call("run e.toml --out done")
    (here / "d.csv").unlink()
    for command in ("evaluate done", "run e.toml --out done --resume"):
        out, err = call(command, code=3)
        assert out == ""
        assert err.startswith("error: data file '")
        assert "d.csv' does not exist" in err
        assert err.count("\n") == 1


def test_an_interrupted_run_is_enough(home: Home, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    here = home()

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_finish", interrupted)  # after the checkpoint, before any summary
        call("run e.toml --out done", code=130)
    assert not (here / "done/summary.json").exists()
    (here / "d.csv").unlink()
    assert len(told(call, "good")[0]["scores"]) == 3


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        (["algorithm.kind=fedsa"], [2, 2, 2]),
        (["algorithm.kind=local", "clients.ranks=[1, 2, 3]"], [1, 2, 3]),
        # Who never trained has the initial tree, which only the experiment and the place among the names tell.
        (["algorithm.kind=local", "clients.ranks=[1, 2, 3]", "clients.per_round=1"], [1, 2, 3]),
    ],
)
def test_personal_models(changes: list[str], ranks: list[int], home: Home, call: Call) -> None:
    here, clients = home(*changes), ("u0", "u1", "u2")
    call("run e.toml --out done")
    before = {client: told(call, "good w1", options=f"--client {client}") for client in clients}
    (here / "d.csv").unlink()
    for client, rank in zip(clients, ranks, strict=True):
        assert told(call, "good w1", options=f"--client {client}") == before[client]
        call(f"export done --to {client} --client {client}")
        found = weights(here / client)
        assert found == weights(here / "done/adapter/personal" / client)
        assert {len(value) for name, value in found.items() if "lora_A" in name} == {rank}
    assert "no client 'u7'" in call("predict done good --client u7", code=2)[1]


def test_a_global_model_of_clients_with_ranks_of_their_own(home: Home, call: Call) -> None:
    here = home("algorithm.kind=hetlora", "clients.ranks=[1, 2, 3]")
    call("run e.toml --out done")
    before = told(call, "good w1")
    (here / "d.csv").unlink()
    assert told(call, "good w1") == before


def test_pairs_are_remembered(home: Home, call: Call) -> None:
    here = home(columns="premise,hypothesis,label,user")
    call("run e.toml --out done")
    before = told(call, "good w1 ||| fox")
    (here / "d.csv").unlink()
    assert told(call, "good w1 ||| fox") == before
    assert "pairs" in call("predict done good", code=2)[1]


def test_continuations_need_no_data(home: Home, call: Call) -> None:
    here = home('data.kind="language"', columns="text,user", family="gpt2")
    call("run e.toml --out done")
    before = told(call, "the quick")
    (here / "d.csv").unlink()
    assert told(call, "the quick") == before


def test_a_folder_of_an_earlier_version(home: Home, call: Call) -> None:
    here = home()
    call("run e.toml --out done")
    before = told(call, "good w1 fox")
    (here / "done/facts.json").write_text('{"kind": "text"', encoding="utf-8")
    assert "facts.json: corrupt" in call("predict done good", code=4)[1]
    (here / "done/facts.json").unlink()
    assert told(call, "good w1 fox") == before
    (here / "d.csv").unlink()
    assert "d.csv' does not exist" in call("predict done good", code=3)[1]


# ----------------------------------------------------------------------------------------------------------- other directories


def test_a_run_goes_on_in_another_directory(
    home: Home, call: Call, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = home("data.name=../shared/d.csv", "data.test=t.csv", "model.name=./model", 'algorithm.kind="mine.py:mine"')
    (here.parent / "shared").mkdir(exist_ok=True)
    shutil.copy(here / "d.csv", here.parent / "shared/d.csv")
    (here / "d.csv").rename(here / "t.csv")
    shutil.copytree(folders("bert"), here / "model")
    (here / "mine.py").write_text(MINE, encoding="utf-8")
    summary = json.loads(call("run e.toml --out done --json")[0])
    found = tomllib.loads((here / "done/experiment.toml").read_text(encoding="utf-8"))
    assert found["data"]["name"] == str(here.parent / "shared/d.csv")
    assert found["data"]["test"] == str(here / "t.csv")
    assert found["model"]["name"] == str(here / "model")
    assert found["algorithm"]["kind"] == f"{here / 'mine.py'}:mine"
    before = told(call, "good w1")

    (here / "deep").mkdir()
    monkeypatch.chdir(here / "deep")
    for name in ("t.csv", "d.csv"):  # files of the same names that are not meant
        (here / "deep" / name).write_text("text,label,user\nx,good,u0\n", encoding="utf-8")
    again = json.loads(call("evaluate ../done --json")[0])
    assert again["global_test_loss"] == pytest.approx(summary["global_test_loss"])
    assert json.loads(call("predict ../done --json", "good w1")[0])["predictions"] == before
    words = ["--set", "data.name=../../shared/d.csv", "--set", "data.test=../t.csv", "--set", "model.name=../model"]
    words += ["--set", "algorithm.kind=../mine.py:mine", "--set", "rounds=2"]
    assert "resuming after round 1" in call("run ../e.toml --out ../done --resume", *words)[1]
    assert call("run ../done/experiment.toml --out ../done --resume")[0]
    assert "section 'data' differs" in call("run ../e.toml --out ../done --resume", *words, "--set", "data.name=d.csv", code=2)[1]


def test_folders_with_relative_paths_are_resumed_where_they_were_begun(home: Home, call: Call) -> None:
    here = home()
    call("run e.toml --out done")
    path = here / "done/experiment.toml"
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    values["data"]["name"] = "d.csv"  # as earlier versions wrote it
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    call("run e.toml --out done --resume --set rounds=2")


def test_a_run_that_moved_with_its_files(home: Home, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    here = home('algorithm.kind="mine.py:mine"')
    (here / "mine.py").write_text(MINE, encoding="utf-8")
    call("run e.toml --out runs/done")
    before = json.loads(call("evaluate runs/done --json")[0])
    moved = here / "moved"
    moved.mkdir()
    for name in ("runs", "d.csv", "e.toml", "mine.py"):
        (here / name).rename(moved / name)
    assert json.loads(call("evaluate moved/runs/done --json")[0])["global_test_loss"] == before["global_test_loss"]
    monkeypatch.chdir(moved)
    call("run e.toml --out runs/done --resume --set rounds=2")
    (moved / "d.csv").rename(here / "d.csv")  # now the data alone is elsewhere
    assert "d.csv' does not exist" in call("evaluate runs/done", code=3)[1]
    assert "'data' differs" in call("run e.toml --out runs/done --resume --set data.name=../d.csv", code=2)[1]
    (moved / "runs/done/environment.json").write_text("{", encoding="utf-8")
    assert "d.csv' does not exist" in call("evaluate runs/done", code=3)[1]


def test_names_that_are_no_files_stay(home: Home) -> None:
    here = home()
    for name in ("pydocs", "minilm", "test"):
        (here / name).mkdir()
    same = {"data": {"name": "pydocs", "test": "test"}, "model": {"name": "minilm"}}
    hub = {"data": {"name": "nyu-mll/glue", "test": "beside.csv"}, "model": {"name": "meta-llama/Llama-3.2-1B"}}
    for values in (same, hub):
        found = plain(parse(values))
        assert found["data"] | values["data"] == found["data"]
        assert found["model"] | values["model"] == found["model"]
    (here / "meta-llama/Llama-3.2-1B").mkdir(parents=True)  # a folder of the user's stands in for the hub
    assert plain(parse(hub))["model"]["name"] == str(here / "meta-llama/Llama-3.2-1B")
