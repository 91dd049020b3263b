"""Co-LoRA: the pieces against the model's own weights, alignment against the formulas as they are written, clients of different models together."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Printed
from federations import Seen, watched
from fedtailor.algorithms.alignment import align, carried, cosines, nearness, polar
from fedtailor.algorithms.colora_pieces import pieces, rest
from fedtailor.algorithms.fedmosaic import weights
from fedtailor.algorithms.gates import mixed
from fedtailor.backbone import Backbone
from fedtailor.config import parse
from fedtailor.core import Plan, Tree, Work
from fedtailor.engines.answering import answer, drive
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.errors import ConfigError
from fedtailor.evaluation import workers
from fedtailor.filters import chain
from fedtailor.ledger import Ledger
from fedtailor.simulation import World, build
from fedtailor.techniques import TECHNIQUES
from fedtailor.techniques.base import WITHIN
from fedtailor.techniques.colora import ends
from fedtailor.trees import nbytes, signature, weighted_mean
from fedtailor.wire import encode
from tiny import batch_of, distance, randomized, same

RANK = 3


# The technique


def test_the_last_layer_of_each_block() -> None:
    """As the comments in the authors' `train_abalign.py` list them."""
    assert ends(28, 4) == [6, 13, 20, 27]
    assert ends(32, 4) == [7, 15, 23, 31]
    assert ends(36, 4) == [8, 17, 26, 35]
    assert ends(28, 8) == [2, 5, 8, 11, 14, 17, 20, 27]
    assert ends(6, 4) == [0, 1, 2, 5]
    assert ends(2, 4) == [0, 1]


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "vit"])
def test_pieces_are_what_they_say(family: str, backbones: Callable[[str], Backbone]) -> None:
    """Against the model itself with s B P^T A added to each of its weights and s B Q to its outputs."""
    backbone = backbones(family)
    technique = TECHNIQUES["colora"](backbone, rank=RANK, blocks=1)
    forward, batch = technique.bind(False), batch_of(family)
    plain = TECHNIQUES["lora"](backbone, rank=RANK).bind(False)(TECHNIQUES["lora"](backbone, rank=RANK).init, batch)
    torch.testing.assert_close(forward(technique.init, batch), plain)
    tree = {n: t + 0.5 * torch.randn(t.shape) if n.startswith("colora.") else t for n, t in technique.init.items()}

    model: Any = copy.deepcopy(backbone.model)
    stack = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
    adapted = [m for n, m in stack[-1].named_modules() if n.rpartition(".")[2] in usual(family)]
    assert len(pieces(tree)) == 2 * len(adapted)
    hooks = []
    for number, module in enumerate(adapted):
        a, b = technique.frozen[f"colora.0.{number}.A"], technique.frozen[f"colora.0.{number}.B"]
        torch.testing.assert_close(a @ a.T, torch.eye(RANK))
        torch.testing.assert_close(b.T @ b, torch.eye(RANK))
        p, q = tree[f"colora.0.{number}.P"], tree[f"colora.0.{number}.Q"]

        def shifted(m: Any, given: Any, output: torch.Tensor, a: Any = a, b: Any = b, p: Any = p, q: Any = q) -> torch.Tensor:
            return output + 2.0 * (given[0] @ a.T @ p + q) @ b.T

        hooks.append(module.register_forward_hook(shifted))
    inputs = {n: t for n, t in batch.items() if n != "labels"}
    with torch.no_grad():
        expected = model(**inputs).logits
    torch.testing.assert_close(forward(tree, batch), expected, atol=1e-5, rtol=1e-4)
    assert float((expected - plain).abs().max()) > 1e-2


def usual(family: str) -> tuple[str, ...]:
    return {
        "bert": ("query", "value"),
        "distilbert": ("q_lin", "v_lin"),
        "gpt2": ("c_attn",),
        "vit": ("q_proj", "v_proj", "query", "value"),
    }.get(family, ("q_proj", "v_proj"))


def test_pieces_are_alike_in_models_that_are_not(wide: Path, backbones: Callable[[str], Backbone]) -> None:
    first = TECHNIQUES["colora"](backbones("bert"), rank=RANK, blocks=2)
    for other in (loaded(wide), backbones("distilbert"), backbones("llama")):
        technique = TECHNIQUES["colora"](other, rank=RANK, blocks=2)
        assert signature(pieces(technique.init)) == signature(pieces(first.init))
        assert technique.frozen.keys() == first.frozen.keys()
    # Of four layers two hold pieces, the others plain factors.
    names = rest(TECHNIQUES["colora"](loaded(wide), rank=RANK, blocks=2).init)
    assert {n.split("layer.")[1][0] for n in names if "layer." in n} == {"0", "2"}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_is_exported_as_a_lora_with_a_bias(family: str, backbones: Callable[[str], Backbone], tmp_path: Path) -> None:
    from peft import PeftModel

    technique = TECHNIQUES["colora"](backbones(family), rank=RANK, blocks=1)
    tree, batch = randomized(technique.init), batch_of(family)
    # Factors that an algorithm has put in their place are used.
    tree |= {"colora.0.0.A": torch.randn_like(technique.frozen["colora.0.0.A"])}
    technique.save(tree, tmp_path / "adapter")
    technique.merge(tree, tmp_path / "merged")
    here = technique.bind(False)(tree, batch)
    base = type(technique.backbone.model).from_pretrained(technique.backbone.source)
    merged = type(technique.backbone.model).from_pretrained(tmp_path / "merged").eval()
    whole = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(**batch).logits, here, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(merged(**batch).logits, here, atol=1e-4, rtol=1e-4)


def test_a_shift_cannot_be_merged_where_there_is_no_bias(backbones: Callable[[str], Backbone], tmp_path: Path) -> None:
    technique = TECHNIQUES["colora"](backbones("llama"), rank=RANK, blocks=1)
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.q_proj' puts out, which has no bias .* without --merge"):
        technique.merge(technique.init, tmp_path / "merged")


def test_what_enters_a_module_has_every_token(backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones("bert")
    assert backbone.unread  # of the last layer this classifier needs the first token alone
    technique = TECHNIQUES["colora"](backbone, rank=RANK, blocks=1)
    batch = batch_of("bert")
    came: list[torch.Tensor] = []
    model: Any = copy.deepcopy(backbone.model)
    model.bert.encoder.layer[-1].register_forward_pre_hook(lambda m, given: came.append(given[0]))
    with torch.no_grad():
        model(**batch)
    found = technique.bind(False)({**technique.init, WITHIN: True}, batch)
    torch.testing.assert_close(found, torch.cat([came[0], came[0]], -1), atol=1e-5, rtol=1e-5)


def test_a_mixture_of_pieces_is_a_mixture_of_adapters(backbones: Callable[[str], Backbone]) -> None:
    """g B (P'A x + Q) + (1 - g) B (P A x + Q) has one B and one A."""
    technique = TECHNIQUES["colora"](backbones("bert"), rank=RANK, blocks=1)
    one, two = randomized(technique.init, 1), randomized(technique.init, 2)
    gates = {n: torch.tensor(0.4 * i - 1) for i, n in enumerate(sorted({n.rpartition(".")[0] for n in pieces(one)}))}
    made = mixed(gates, pieces(one), pieces(two))
    for name, tensor in made.items():
        g = torch.sigmoid(gates[name.rpartition(".")[0]])
        torch.testing.assert_close(tensor, g * one[name] + (1 - g) * two[name])


@pytest.mark.parametrize(
    ("options", "says"),
    [({"rank": 0}, "at least 1"), ({"blocks": 0}, "at least 1"), ({"target": ["quer"]}, "did you mean 'query'")],
)
def test_what_the_technique_refuses(options: dict[str, Any], says: str, backbones: Callable[[str], Backbone]) -> None:
    with pytest.raises(ConfigError, match=says):
        TECHNIQUES["colora"](backbones("bert"), **options)


# The alignment


def test_b_in_the_span_is_b_as_it_is_written() -> None:
    """Against the whole matrices, as the authors compute them: S33^1/2 U V^T S11^-1/2 B1."""
    chance = torch.Generator().manual_seed(0)
    b1, b3 = (torch.linalg.qr(torch.randn(d, 4, generator=chance, dtype=torch.float64))[0] for d in (6, 9))
    z1 = torch.randn(400, 4, generator=chance, dtype=torch.float64)
    z3 = z1 @ torch.randn(4, 4, generator=chance, dtype=torch.float64) + 0.1 * torch.randn(
        400, 4, generator=chance, dtype=torch.float64
    )
    x1, x3 = ((z - z.mean(0)) @ b.T for z, b in ((z1, b1), (z3, b3)))
    s11, s33 = (x.T @ x + 1e-4 * torch.eye(x.shape[1], dtype=torch.float64) for x in (x1, x3))

    def power(s: torch.Tensor, exponent: float) -> torch.Tensor:
        u, values, v = torch.linalg.svd(s)
        return u @ torch.diag(values**exponent) @ v

    u, _, v = torch.linalg.svd(power(s33, -0.5) @ x3.T @ x1 @ power(s11, -0.5), full_matrices=False)
    theirs = (power(s11, -0.5) @ v.T @ u.T @ power(s33, 0.5).T).T @ b1
    torch.testing.assert_close(carried(b3, z3, z1), theirs, atol=1e-9, rtol=1e-9)


def test_the_loss_of_a_is_the_authors() -> None:
    """Their statements on one row without padding: `torch.mean((output - target) ** 2)`, masked cosines of normalised columns."""
    a = [torch.randn(3, 7), torch.randn(3, 5)]
    x, t = [torch.randn(1, 6, 7), torch.randn(1, 6, 5)], [torch.randn(1, 6, 3), torch.randn(1, 6, 3)]
    near = sum(torch.mean((x[k] @ a[k].T - t[k]) ** 2) for k in range(2))
    leaning = []
    for table in a:
        columns = torch.nn.functional.normalize(table, dim=0)
        matrix = columns.T @ columns
        leaning.append((matrix[~torch.eye(len(matrix), dtype=torch.bool)] ** 2).mean())
    counts = torch.ones(1, 6, dtype=torch.bool)
    torch.testing.assert_close(nearness(a, x, t, counts), near + 0.5 * sum(leaning) / 2)
    torch.testing.assert_close(cosines(a[0]), leaning[0])
    # Padding counts for nothing.
    wider = [torch.cat([y, 9 * torch.ones(1, 2, y.shape[2])], 1) for y in x]
    more = [torch.cat([y, torch.zeros(1, 2, 3)], 1) for y in t]
    counts = torch.tensor([[True] * 6 + [False] * 2])
    torch.testing.assert_close(nearness(a, wider, more, counts), near + 0.5 * sum(leaning) / 2)


def test_the_polar_factor_is_the_nearest_with_orthonormal_rows() -> None:
    table = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    nearest = polar(table)
    torch.testing.assert_close(nearest @ nearest.T, torch.eye(3), atol=1e-6, rtol=0)
    for seed in range(20):
        other = torch.linalg.qr(nearest.T + 0.1 * torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)))[0].T
        signs = (other * nearest).sum(1, keepdim=True).sign()
        assert float((signs * other - table).norm()) > float((nearest - table).norm())


# Clients of different models


EXPERIMENT = """
rounds = {rounds}
[model]
name = "{bert}"
[data]
name = "rows.csv"
public = "others.csv"
max_length = 16
[clients]
count = 6
kinds = [{{}}, {{ model = {{ name = "{wide}" }} }}, {{ model = {{ name = "{distilbert}" }} }}]
[technique]
kind = "colora"
rank = 3
blocks = 2
[algorithm]
kind = "fedmosaic"
samples = 2
align_rows = 20
align_steps = 30
[train]
batch = 4
lr = 1e-2
"""


@pytest.fixture
def wide(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A BERT of 48 x 4 layers, where the other has 32 x 2."""
    import transformers as t

    sizes = {"vocab_size": 45, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    folder = tmp_path / "wide"
    torch.manual_seed(1)
    config = t.BertConfig(**sizes, initializer_range=0.2, max_position_embeddings=64, num_labels=3)
    t.BertForSequenceClassification(config).save_pretrained(folder)
    t.AutoTokenizer.from_pretrained(folders("bert")).save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Backbone:
    from fedtailor.backbone import load
    from fedtailor.config import ModelSection

    return load(ModelSection(name=str(folder)), "text", ["bad", "fine", "good"])


@pytest.fixture
def written(
    folders: Callable[[str], Path], wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    import tomllib

    monkeypatch.chdir(tmp_path)
    words = ["good fox", "bad dog", "fine w1"]
    lines = [f"{words[k % 3]} w{k % 29},{words[k % 3].split()[0]}" for k in range(60)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(lines), encoding="utf-8")
    (tmp_path / "others.csv").write_text("text\n" + "\n".join(f"lazy w{k % 29} fox" for k in range(24)), encoding="utf-8")

    def write(rounds: int = 3) -> dict[str, Any]:
        names = {family: folders(family) for family in ("bert", "distilbert")}
        text = EXPERIMENT.format(rounds=rounds, wide=wide, **names)
        (tmp_path / "e.toml").write_text(text, encoding="utf-8")
        return tomllib.loads(text)

    return write


def federated(values: dict[str, Any], folder: Path, stacked: bool = True) -> tuple[World, Tree, list[Seen], States, Ledger]:
    world, log, ledger, states = build(parse(values)), list[Seen](), Ledger(), States(folder)
    algorithm = watched(world.algorithm, log)
    engine = Local(algorithm, world.sites, workers(world), states, ledger, chain([]), chain([]), stacked=stacked)
    try:
        state = algorithm.init(world.technique.init)
        for number in range(1, values["rounds"] + 1):
            state = engine.converse(algorithm.round(state, world.facts.clients), number)
            states.commit(number, state, engine.dump(), ledger.dump())
    finally:
        engine.close()
    return world, state, log, states, ledger


def test_who_is_given_what_of_whom(written: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    world, state, log, states, ledger = federated(written(rounds=2), tmp_path / "state")
    names = world.facts.clients
    assert [kind.same for kind in world.job.kinds] == [True, False, False]
    assert [state["kinds"][c] for c in names] == [0, 1, 2, 0, 1, 2]
    first = {s.client: s for s in log if s.round == 1}
    assert all(not s.letter.body["global"] for s in first.values())  # each begins with its own
    shares = weights({c: s.reply.body["sketch"] for c, s in sorted(first.items())}, 0.5)
    trees = {c: dict(s.reply.body["tree"].items()) for c, s in first.items()}
    for i, client in enumerate(names):
        letter = next(s.letter.body["global"] for s in log if s.round == 2 and s.client == client)
        others = [c for c in names if c != client]
        each = dict(zip(names, shares[client].tolist(), strict=True))
        assert (
            distance(pieces(dict(letter.items())), weighted_mean([pieces(trees[c]) for c in others], [each[c] for c in others]))
            < 1e-6
        )
        # Of two clients of a kind each is given the other's factors and head.
        assert same(rest(dict(letter.items())), rest(trees[names[(i + 3) % 6]]))
        sent = [len(encode(s.letter)) for s in log if s.client == client]
        assert ledger.clients[client]["bytes_down"] == sum(sent)
        assert nbytes(pieces(trees[client])) == 2 * 2 * 4 * (RANK * RANK + RANK)  # blocks, modules, float32
    # Both clients of a kind have aligned themselves, and alike; A and B stay at home.
    own = {c: states.read_own(c)["algorithm"] for c in names}
    for one, other in ((1, 4), (2, 5)):
        assert distance(own[names[one]]["frozen"], own[names[other]]["frozen"]) < 1e-6
        assert own[names[one]]["frozen"].keys() == world.job.frozen.keys()
    assert not own[names[0]]["frozen"]
    assert not any(".A" in n or n.endswith(".B") for s in log for n in s.reply.body.get("tree", {}) if n.startswith("colora."))
    assert world.algorithm.check
    assert all(not world.algorithm.check(s.letter, s.reply) for s in log)
    bad = first[names[0]].reply
    assert "kind 3" in world.algorithm.check(first[names[0]].letter, bad._replace(info={**bad.info, "kind": 3.0}))
    # The server's own model: its first kind's head, everybody's pieces.
    made = world.algorithm.model(state)
    last = {s.client: dict(s.reply.body["tree"].items()) for s in log if s.round == 2}
    assert signature(made) == signature(world.technique.init)
    assert distance(pieces(made), weighted_mean([pieces(last[c]) for c in names], [1.0] * 6)) < 1e-6
    assert distance(rest(made), weighted_mean([rest(last[c]) for c in (names[0], names[3])], [1.0, 1.0])) < 1e-6


def test_stacked_as_one_by_one(written: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = written(rounds=2)
    _, one, _, _, _ = federated(values, tmp_path / "one", stacked=False)
    _, many, _, _, _ = federated(values, tmp_path / "many", stacked=True)
    assert distance(one["trees"], many["trees"]) < 1e-4
    assert distance(one["sketches"], many["sketches"]) < 1e-3


def test_sketches_are_of_the_servers_model(written: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A client's sketch does not depend on the model that it has."""
    values = written(rounds=1)
    values["algorithm"]["noise"] = 0.0
    values["train"] |= {"batch": 64, "lr": 0.1, "optimizer": "sgd"}  # all rows in one step
    world, state, _, _, _ = federated(values, tmp_path / "all")
    values["clients"]["kinds"] = [{}]
    plain, other, _, _, _ = federated(values, tmp_path / "one")
    assert state["on"] == other["on"] == "colora.1.1.P"
    assert distance(state["sketches"], other["sketches"]) < 1e-4
    assert world.job.plan.batch == plain.job.plan.batch == Plan(batch=64).batch


@pytest.mark.parametrize("place", [1, 2])
def test_aligned_adapters_say_more_alike(place: int, written: Callable[..., dict[str, Any]]) -> None:
    """On rows that the alignment has not seen: what leaves A, in this model and in the server's."""
    world = build(parse(written()))
    crew, client = workers(world), world.facts.clients[place]
    site, kind = world.sites(client, 0), world.job.kinds[place]
    assert site.reference
    flow: Any = align(site, kind.frozen, world.job.frozen, 20, 200, 1e-2)

    worked = []

    def answered(asks: dict[str, Any]) -> dict[str, Any]:
        if isinstance(asks[client], Work):
            worked.append(asks[client])
            return {client: None}
        return answer(asks, crew.of("server" if asks[client].reference else client), lambda c: torch.Generator(), False)

    found = drive({client: flow}, answered)[client]
    assert worked[0].flops > 0
    if place == 2:  # DistilBERT here has the same tokens
        assert world.kit(client).backbone.processor is not None

    def apart(factors: Tree) -> float:
        total = []
        data, theirs = site.data["train"], site.reference.data["train"]  # type: ignore[union-attr]
        width = int(max(data.lengths))
        mine = world.kit(client).technique.bind(False)(
            {**site.init, WITHIN: True}, unlabelled(data.batch(range(len(data)), width, len(data)))
        )
        said = world.technique.bind(False)(
            {**world.technique.init, WITHIN: True}, unlabelled(theirs.batch(range(len(data)), width, len(data)))
        )
        names = [n for n in kind.frozen if n.endswith(".A")]
        for name, x, y in zip(
            names,
            mine.split([factors[n].shape[1] for n in names], -1),
            said.split([world.job.frozen[n].shape[1] for n in names], -1),
            strict=True,
        ):
            z, target = x @ factors[name].T, y @ world.job.frozen[name].T
            total.append(torch.nn.functional.cosine_similarity(z, target, dim=-1).mean())
        return float(torch.stack(total).mean())

    assert apart(found) > apart(kind.frozen) + 0.2
    for name in (n for n in found if n.endswith(".A")):
        torch.testing.assert_close(found[name] @ found[name].T, torch.eye(RANK), atol=1e-5, rtol=0)


def unlabelled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in batch.items() if n != "labels"}


def test_a_run_of_three_models(written: Callable[..., dict[str, Any]], typed: Callable[..., Printed]) -> None:
    written(rounds=2)
    code, _, err = typed("run e.toml --out straight")
    assert code == 0, err
    summary = json.loads(Path("straight/summary.json").read_text(encoding="utf-8"))
    assert summary["clients_mean"] is not None
    assert typed("run e.toml --out cut --set rounds=1")[0] == 0
    code, _, err = typed("run e.toml --out cut --resume")
    assert code == 0, err
    assert json.loads(Path("cut/summary.json").read_text(encoding="utf-8"))["state_hash"] == summary["state_hash"]
    for client in ("client-0", "client-1", "client-2"):
        code, out, err = typed(f"predict straight --client {client}", "good fox")
        assert code == 0, err
        assert out.split("\t")[0] in ("good", "bad", "fine")
    code, _, err = typed("export straight --client client-1 --to new")
    assert code == 0, err
    assert '"lora_bias": true' in Path("new/adapter_config.json").read_text(encoding="utf-8")
    assert typed("evaluate straight")[0] == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"technique.kind": "lora", "technique.blocks": None}, "technique.kind = 'colora'"),
        ({"data.public": None}, "set data.public"),
        (
            {"clients.kinds": [{}, {"technique": {"kind": "colora", "rank": 4, "blocks": 2}}]},
            "rank 4, the server's 2 blocks of 2 modules, rank 3",
        ),
        (
            {"clients.kinds": [{}, {"technique": {"kind": "colora", "rank": 3, "blocks": 2, "alpha": 3}}]},
            "the same alpha everywhere",
        ),
        ({"technique.blocks": 4}, "and one has 4 blocks of 2 modules, rank 3, the server's 2 blocks"),
        ({"algorithm.align_rows": 0}, "align_rows >= 1"),
    ],
)
def test_what_the_algorithm_refuses(changes: dict[str, Any], says: str, written: Callable[..., dict[str, Any]]) -> None:
    values = written()
    for key, value in changes.items():
        section, name = key.split(".")
        if value is None:
            del values[section][name]
        else:
            values[section][name] = value
    with pytest.raises(ConfigError, match=says):
        build(parse(values))
