"""Distillation: what is agreed on against the formulas, what crosses, and clients that differ in technique and backbone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from commands import Printed
from federations import PLAN, Outcome, by_hand
from fedtailor.algorithms.distil import consensus, heard_of, spoken
from fedtailor.core import SERVER, Fit, Message
from fedtailor.data.examples import Subset
from fedtailor.errors import ConfigError
from fedtailor.losses import distilling
from tiny import rows_of, same

LOGITS = [torch.randn(6, 4, generator=torch.Generator().manual_seed(k)) * 2 for k in range(3)]


def softmax(row: Any) -> np.ndarray:
    e = np.exp(np.asarray(row, dtype=float) - np.max(np.asarray(row)))
    return np.asarray(e / e.sum())


@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("by_confidence", [False, True])
def test_consensus_row_by_row(average: str, by_confidence: bool) -> None:
    shares = [1.0, 3.0, 2.0]
    found = consensus(LOGITS, shares, average, by_confidence)
    for row in range(6):
        weights = np.array(shares)
        if by_confidence:
            for k, logits in enumerate(LOGITS):
                p = softmax(logits[row])
                weights[k] *= max(1 + float((p * np.log(p)).sum()) / math.log(4), 1e-3)
        weights = weights / weights.sum()
        if average == "logits":
            wanted = sum(w * logits[row].numpy().astype(float) for w, logits in zip(weights, LOGITS, strict=True))
            np.testing.assert_allclose(found[row].numpy(), wanted, atol=1e-5)
        else:
            mean = sum(w * softmax(logits[row]) for w, logits in zip(weights, LOGITS, strict=True))
            np.testing.assert_allclose(softmax(found[row].numpy()), mean, atol=1e-6)


@pytest.mark.parametrize("top", [0, 1, 3, 4, 9])
def test_top_logits_keep_their_probability_and_share_the_rest(top: int) -> None:
    body = spoken(LOGITS[0], top)
    heard = heard_of(body, 4).softmax(-1)
    true = LOGITS[0].softmax(-1)
    if top in (0, 4, 9):
        assert set(body) == {"logits"}
        torch.testing.assert_close(heard, true)
        return
    assert body["values"].shape == (6, top)
    for row in range(6):
        best = true[row].topk(top).indices
        torch.testing.assert_close(heard[row, best], true[row, best])
        rest = [k for k in range(4) if k not in best.tolist()]
        assert heard[row, rest].tolist() == pytest.approx([float(1 - true[row, best].sum()) / len(rest)] * len(rest), abs=1e-5)


def test_the_loss_is_the_divergence_of_softened_classes() -> None:
    teacher, said = LOGITS[0], LOGITS[1]
    labels = torch.tensor([0, 0, 0, 0, -100, -100])  # two rows of padding
    batch = {"labels": labels, "teacher": teacher}
    found = float(distilling(2.0)(lambda params, b: said, {}, batch, {}))
    wanted = 0.0
    for row in range(4):
        p, q = softmax(teacher[row] / 2), softmax(said[row] / 2)
        wanted += 4 * float((p * np.log(p / q)).sum()) / 4
    assert found == pytest.approx(wanted, rel=1e-5)
    assert distilling(2.0) == distilling(2.0)
    assert distilling(2.0) != distilling(1.0)


def test_a_column_follows_its_rows() -> None:
    data = Subset(rows_of("bert"), np.arange(10, 30)).take([3, 7, 1])
    column = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    batch = data.having("teacher", column).batch([2, 0], 10, 3)
    assert batch["teacher"].tolist() == [[5, 6], [1, 2], [0, 0]]
    assert "teacher" not in data.batch([0], 10, 1)


def options_of(**changes: Any) -> dict[str, Any]:
    return {"rows": 8, **changes}


@pytest.mark.parametrize("rule", ["fedmd", "feddf"])
def test_a_round_is_digest_revisit_speak(rule: str, world: Callable[..., Any]) -> None:
    """What each side is asked to do, and with what, in the second round."""
    here, own = world("distil", options=options_of(rule=rule, digest=2.0, student=3.0)), {}
    first = by_hand(here, here.algorithm.init(here.technique.init), 1, own)
    said = [seen.reply.body["logits"] for seen in here.log if seen.reply.verb == "said"]
    taught = next(seen.reply.body["logits"] for seen in here.log if seen.reply.verb == "taught")
    agreed = torch.stack(said).double().mean(0).float()
    torch.testing.assert_close(first["teacher"]["teacher"], agreed if rule == "fedmd" else taught)
    assert not torch.equal(first["rows"], first["teacher"]["taught"])
    site, letter = here.sites("c0", 2), Message("exchange", {"rows": first["rows"], **first["teacher"]})
    flow = here.algorithm.client["exchange"](own["c0"], letter, site)
    digest = next(flow)
    assert isinstance(digest, Fit)
    assert digest.plan.epochs == 2.0
    assert len(digest.data) == 8
    whole = digest.data.batch(range(8), 12, 8)
    torch.testing.assert_close(whole["teacher"], first["teacher"]["teacher"])
    public = site.data["public"].take(first["teacher"]["taught"].tolist()).batch(range(8), 12, 8)
    assert torch.equal(whole["input_ids"], public["input_ids"])
    assert same(digest.params, own["c0"]["params"])


def test_only_logits_cross(federation: Callable[..., Outcome]) -> None:
    outcome = federation("distil", options=options_of(), rounds=3)
    for seen in outcome.log:
        if seen.client == SERVER or seen.reply.verb == "judged":
            continue  # the student is beside the server
        assert set(seen.reply.body) == {"logits"}
        assert seen.reply.body["logits"].shape == (8, 3)
        assert set(seen.letter.body) == ({"rows"} if seen.round == 1 else {"rows", "taught", "teacher"})
    assert set(outcome.answers) == {"c0", "c1", "c2", SERVER}


def test_public_labels_are_never_read(federation: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    import federations

    plain = federation("distil", options=options_of(), rounds=2)
    rows = rows_of("bert")
    labels = rows.fixed["labels"].clone()
    labels[40:52] = (labels[40:52] + 1) % 3
    monkeypatch.setattr(federations, "rows_of", lambda family: rows._replace(fixed={"labels": labels}))
    assert federation("distil", options=options_of(), rounds=2).hash == plain.hash


def test_the_student_learns_what_the_clients_know(federation: Callable[..., Outcome]) -> None:
    """The student never sees a private row, yet it comes closer to what the clients agreed on."""
    outcome = federation("distil", options=options_of(rows=12, student=20.0), rounds=5, plan=PLAN._replace(epochs=5))
    site, forward = outcome.world.sites(SERVER, 9), outcome.world.technique.bind(False)
    batch = site.data["public"].batch(range(12), 12, 12)
    with torch.no_grad():
        agreed = torch.stack([forward(outcome.own[c]["params"], batch) for c in ("c0", "c1", "c2")]).mean(0)
        before, after = (forward(params, batch).log_softmax(-1) for params in (site.init, outcome.state["params"]))

    def apart(said: torch.Tensor) -> float:
        return float((agreed.softmax(-1) * (agreed.log_softmax(-1) - said)).sum(-1).mean())

    assert apart(after) < 0.3 * apart(before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "feddm"}, "algorithm.rule cannot be 'feddm'"),
        ({"average": "mean"}, "algorithm.average"),
        ({"weights": "all"}, "algorithm.weights"),
        ({"rows": 0}, "algorithm.rows must be above 0"),
        ({"temperature": 0.0}, "algorithm.temperature"),
        ({"top": -1}, "algorithm.top"),
    ],
)
def test_what_it_refuses(options: dict[str, Any], says: str, world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=says):
        world("distil", options=options)


def test_no_public_examples(world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=r"needs public examples: set data.public"):
        world("distil", family="gpt2")


EXPERIMENT = """
name = "kinds"
rounds = 2
[model]
name = "{bert}"
[data]
name = "rows.csv"
public = {public}
max_length = 16
[clients]
count = 3
kinds = [
  {{ technique = {{ kind = "lora", rank = 2 }} }},
  {{ model = {{ name = "{distilbert}" }}, technique = {{ kind = "prefix", length = 2 }} }},
  {{ model = {{ name = "{roberta}" }}, technique = {{ kind = "full" }} }},
]
[technique]
kind = "head"
[algorithm]
kind = "{algorithm}"
[train]
batch = 4
"""


@pytest.fixture
def kinds(folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.chdir(tmp_path)
    words = ["good fox", "bad dog", "fine w1"]
    lines = [f"{words[k % 3]} w{k % 29},{words[k % 3].split()[0]}" for k in range(60)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "others.csv").write_text("text\n" + "\n".join(f"lazy w{k % 29}" for k in range(20)), encoding="utf-8")

    def write(algorithm: str = "distil", public: str = '"others.csv"') -> None:
        names = {family: folders(family) for family in ("bert", "distilbert", "roberta")}
        text = EXPERIMENT.format(algorithm=algorithm, public=public, **names)
        (tmp_path / "e.toml").write_text(text, encoding="utf-8")

    return write


@pytest.mark.parametrize("public", ['"others.csv"', "0.25"])
def test_clients_of_three_backbones_in_a_run(public: str, kinds: Callable[..., None], typed: Callable[..., Printed]) -> None:
    kinds(public=public)
    code, _, err = typed("run e.toml --out straight")
    assert code == 0, err
    summary = json.loads(Path("straight/summary.json").read_text(encoding="utf-8"))
    assert summary["global_test"] is not None
    assert summary["clients_mean"] is not None
    personal = Path("straight/adapter/personal")
    assert (personal / "client-0" / "adapter_config.json").is_file()
    assert "PREFIX" in (personal / "client-1" / "adapter_config.json").read_text(encoding="utf-8")
    assert (personal / "client-2" / "config.json").is_file()  # full: a transformers folder
    assert "roberta" in (personal / "client-2" / "config.json").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in Path("straight/rounds.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[1]["clients"]["client-0"]["bytes_up"] < 2000

    assert typed("run e.toml --out cut --set rounds=1")[0] == 0
    code, _, err = typed("run e.toml --out cut --resume")
    assert code == 0, err
    assert json.loads(Path("cut/summary.json").read_text(encoding="utf-8"))["state_hash"] == summary["state_hash"]
    assert typed("evaluate straight")[0] == 0
    for client in ("client-0", "client-1", "client-2"):
        code, out, err = typed(f"predict straight --client {client}", "good fox")
        assert code == 0, err
        assert out.split("\t")[0] in ("good", "bad", "fine")
    code, _, err = typed("export straight --client client-2 --to new")
    assert code == 0, err
    assert Path("new/model.safetensors").is_file()


def test_kinds_train_alone_too_and_trees_must_be_alike(kinds: Callable[..., None], typed: Callable[..., Printed]) -> None:
    kinds("local")
    assert typed("run e.toml --out alone")[0] == 0
    kinds("fedavg")
    code, _, err = typed("run e.toml --out new")
    assert code == 2
    assert "clients.kinds: algorithm fedavg exchanges trees" in err
    kinds("distil", public="1.5")
    code, _, err = typed("run e.toml --out new")
    assert code == 2
    assert "data.public = 1.5" in err
    kinds("distil", public='"gone.csv"')
    code, _, err = typed("run e.toml --out new")
    assert code == 3
    assert "gone.csv" in err


def test_what_stays_at_the_server_is_not_rounded(kinds: Callable[..., None], typed: Callable[..., Printed]) -> None:
    """In the first round clients are sent row numbers only: a filter on letters down changes nothing."""
    kinds()
    hashes = []
    for extra in ("", "--set 'filters.down=[\"int8-plain\"]'"):
        out = f"run-{len(hashes)}"
        code, _, err = typed(f"run e.toml --out {out} --set rounds=1 --set clients.kinds=[] --set technique.kind=full {extra}")
        assert code == 0, err
        hashes.append(json.loads(Path(out, "summary.json").read_text(encoding="utf-8"))["state_hash"])
    assert hashes[0] == hashes[1]


def test_kinds_and_public_data_are_found_from_anywhere(
    kinds: Callable[..., None], typed: Callable[..., Printed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds()
    text = (tmp_path / "e.toml").read_text(encoding="utf-8")
    import re
    import shutil

    model = re.search(r'kind = "lora".*?name = "([^"]+)"', text, re.S)
    assert model
    shutil.copytree(model.group(1), tmp_path / "other-encoder")
    (tmp_path / "e.toml").write_text(text.replace(model.group(1), "other-encoder"), encoding="utf-8")
    assert typed("run e.toml --out done")[0] == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert typed("evaluate ../done")[0] == 0
    assert typed("predict ../done --client client-1", "good fox")[0] == 0


@pytest.mark.parametrize("technique", ['{ kind = "template" }', '{ kind = "retriever", rank = 2 }'])
def test_kinds_that_train_no_logits(
    technique: str, kinds: Callable[..., None], typed: Callable[..., Printed], tmp_path: Path
) -> None:
    kinds()
    text = (tmp_path / "e.toml").read_text(encoding="utf-8")
    (tmp_path / "e.toml").write_text(text.replace('{ kind = "lora", rank = 2 }', technique), encoding="utf-8")
    code, _, err = typed("run e.toml --out new")
    assert code == 2
    assert "trains no class logits" in err
