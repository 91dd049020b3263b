"""What a cut costs before anything is trained: counted on small steps, told for any batch, and the cut that a device should have."""

from __future__ import annotations

import functools
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import Printed, csv_of, in_process, lines, read, sets, write_experiment
from fedtailor.config import load
from fedtailor.core import HIDDEN, Device, Job, Layers, Part, PartCost, Plan, Tree
from fedtailor.cut import parts
from fedtailor.engines.splitting import through
from fedtailor.errors import ConfigError
from fedtailor.losses import classification, language
from fedtailor.part_costs import _batch, both_ends, costed, costs, step_line, step_memory, uncut_cost
from fedtailor.planning import RULES, chosen, estimates, letter_bytes
from fedtailor.rehearsal import rehearse
from fedtailor.simulation import build
from fedtailor.techniques import TECHNIQUES
from fedtailor.techniques.parts import layers, on_part
from fedtailor.trees import numel, tensors
from tiny import CAUSAL, LABELS, TEXT

Techniques = Callable[..., Any]
CUT = parts(2, 0, 1)
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("bert", "lora", {"rank": 2}),
    ("vit", "lora", {"rank": 2}),
    ("gpt2", "lora", {"rank": 2}),
    ("bert", "full", {}),
    ("gpt2", "full", {}),
    ("llama", "prefix", {"length": 2}),
]


def job_of(family: str, **plan: Any) -> Job:
    return Job(language if family in CAUSAL else classification, lambda *_: {}, lambda tree: tree, Plan(**plan))


def over(techniques: Techniques, family: str, kind: str, options: dict[str, Any], **plan: Any) -> tuple[Any, Layers]:
    technique = techniques(family, kind, **options)
    found = costed(layers(technique), technique, functools.partial(TECHNIQUES[kind], **options), job_of(family, **plan))
    assert found
    return technique, found


def cost(found: Layers, part: Part, rows: int = 3, width: int = 10) -> PartCost:
    assert found.cost
    return found.cost(part, rows, width)


# Parts


@pytest.mark.parametrize(("family", "kind", "options"), CASES)
def test_parts_add_up_to_the_whole(family: str, kind: str, options: dict[str, Any], techniques: Techniques) -> None:
    """Weights (a tied table is at both ends) and trained numbers."""
    technique, found = over(techniques, family, kind, options)
    cut = (Part(0, 1, True, False), Part(1, 2, False, True)) if found.least else CUT
    each = [cost(found, part) for part in cut]
    weights = sum(p.numel() * p.element_size() for p in technique.backbone.model.parameters())
    assert sum(c.weights - c.tied for c in each) == weights
    assert (each[-1].tied > 0) == (family == "gpt2")
    assert sum(c.trained for c in each) == numel(technique.init)
    assert all(c.memory > c.held > c.weights or not c.trained for c in each)


@pytest.mark.parametrize(("family", "kind", "options"), CASES)
def test_six_small_steps_tell_any_step(family: str, kind: str, options: dict[str, Any], techniques: Techniques) -> None:
    """The highest point of a step of other rows and width, counted there, is the one that was told."""
    technique, found = over(techniques, family, kind, options)
    job, make = job_of(family), functools.partial(TECHNIQUES[kind], **options)
    for part in (Part(0, 1, True, False), Part(1, 2, False, True), Part(0, 2, True, True)):
        own = on_part(technique, part, make) if not (part.first and part.last) else technique
        tree = found.part(technique.init, part)
        memory = step_memory(own, tree, part, job, not part.first)
        for rows, width in ((5, 11), (4, 20)):
            there = step_line(own.bind(False), tree, _batch(own, part, job, rows, width), part, job, not part.first)
            assert memory.at(rows, width) == pytest.approx((there.bytes.max(), float(there.waiting)))


def test_what_waits_is_what_autograd_saves(techniques: Techniques) -> None:
    """Beside the batch and the outputs, and not counting weights and trained tensors."""
    technique, found = over(techniques, "bert", "lora", {"rank": 2})
    part = Part(0, 1, True, False)
    own = on_part(technique, part, functools.partial(TECHNIQUES["lora"], rank=2))
    batch = _batch(own, part, job_of("bert"), 4, 12)
    own.bind(False)(own.init, batch)
    forward, known = own.bind(False), {t.untyped_storage().data_ptr() for _, t in tensors(own.init)}
    known |= {p.untyped_storage().data_ptr() for p in (*own.backbone.model.parameters(), *own.backbone.model.buffers())}
    saved: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if not isinstance(t, torch.nn.Parameter) and t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        outputs, _kept = through(forward, own.init, batch)
    for t in (outputs, *batch.values()):
        note(t)
    assert cost(found, part, 4, 12).kept == pytest.approx(sum(saved.values()), rel=0.02)


def test_memory_grows_with_rows_width_and_trained_numbers(techniques: Techniques) -> None:
    _, small = over(techniques, "bert", "lora", {"rank": 2})
    _, large = over(techniques, "bert", "lora", {"rank": 8})
    _, full = over(techniques, "bert", "full", {})
    for part in (Part(0, 1, True, False), Part(1, 2, False, True)):
        assert cost(small, part, 6).memory > cost(small, part, 3).memory
        assert cost(small, part, 3, 20).memory > cost(small, part, 3, 10).memory
        assert cost(full, part).memory > cost(large, part).memory > cost(small, part).memory


@pytest.mark.parametrize(("plan", "copies"), [({}, 2), ({"optimizer": "sgd"}, 0), ({"optimizer": "sgd", "momentum": 0.9}, 1)])
def test_moments_are_the_optimisers(plan: dict[str, Any], copies: int, techniques: Techniques) -> None:
    """Between steps a client holds the weights, its tensors as they were given and as they are, and their moments."""
    _, found = over(techniques, "bert", "full", {}, **plan)
    last = cost(found, CUT[2])
    assert last.held == last.weights + 4 * last.trained * (2 + copies)


def test_operations_are_those_that_a_run_charges(techniques: Techniques) -> None:
    """A frozen front: what its parts cost is what the uncut model costs."""
    technique, found = over(techniques, "bert", "lora", {"rank": 2})
    job = job_of("bert")
    plain = costs(technique, Part(0, 2, True, True), job)[1](3, 10)
    assert sum(cost(found, part).flops for part in CUT) == plain == uncut_cost(technique, job)(3, 10).flops


def test_images_have_tokens_of_their_own(techniques: Techniques) -> None:
    technique, found = over(techniques, "vit", "lora", {"rank": 2})
    assert (found.tokens, found.hidden) == (17, 32)  # 4 x 4 patches and one more
    one = estimates(found, Device(), Device(), 3, 1)[0]
    assert (one.bytes_up, one.bytes_down) == (2 * 4 * 3 * 17 * 32, 4 * 3 * 17 * 32)
    plain = costs(technique, Part(0, 2, True, True), job_of("vit"))[1](3, 1)
    assert one.client_flops + one.server_flops == plain


@pytest.mark.parametrize("family", TEXT)
def test_who_holds_both_ends_needs_less_than_two_who_hold_one(family: str, techniques: Techniques) -> None:
    _, found = over(techniques, family, "lora", {"rank": 2})
    front, last = cost(found, Part(0, 1, True, False)), cost(found, Part(1, 2, False, True))
    assert max(front.memory, last.memory) < both_ends(front, last) < front.memory + last.memory


# The choice


def made(part: Part, rows: int, width: int) -> PartCost:
    """A model of six layers: 10 bytes and 100 operations a layer; ends of 5 bytes and 20 operations."""
    size = part.stop - part.start
    return PartCost(10.0 * size + 5, 10.0 * size, 4 * size, 100.0 * size + 20 * (part.first or part.last), 10.0 * size + 5)


HAND = Layers(6, lambda tree, part: tree, lambda trees: trees[0], cost=made, hidden=8)
PHONE = Device("phone", flops=100, uplink=1000, downlink=500, latency=0.25)
FAST = Device("server", flops=200)


def away(front: int, back: int) -> float:
    return (front - 3.0) ** 2


def test_the_optimum_is_the_closed_forms() -> None:
    """A layer takes 1 s at the client and 1/2 at the server: J = front / 2 + (front - 3)^2 + constant is least at 2.75, so at 3."""
    found = estimates(HAND, PHONE, FAST, 2, 5, penalty=away)
    assert [e.front for e in found] == [0, 1, 2, 3, 4]
    sent = 4 * 2 * 5 * 8
    for e in found:
        up, down = 2 * sent + 10, (1 + (e.front > 0)) * sent
        assert (e.bytes_up, e.bytes_down, e.memory) == (up, down, 10 * e.front + 5 + 15)
        assert e.seconds == pytest.approx(1.4 + e.front + (5 - e.front) / 2 + up / 1000 + down / 500 + 1)
        assert e.objective == pytest.approx(e.seconds + (e.front - 3) ** 2)
    assert chosen(found).front == 3
    # Without a penalty, and with one that weighs little, time decides.
    assert chosen(estimates(HAND, PHONE, FAST, 2, 5)).front == 0
    assert chosen(estimates(HAND, PHONE, FAST, 2, 5, penalty=away, weight=0.01)).front == 0


def test_memory_bounds_the_choice_and_the_memory_rule_takes_all_of_it() -> None:
    tight = PHONE._replace(memory=45.0)  # front 2 takes 40, front 3 takes 50
    found = estimates(HAND, tight, FAST, 2, 5, penalty=away)
    assert [e.fits for e in found] == [True, True, True, False, False]
    assert chosen(found).front == 2
    assert chosen(found, "memory").front == 2
    assert chosen(estimates(HAND, tight, FAST, 2, 5), "memory").front == 2
    assert chosen(estimates(HAND, tight, FAST, 2, 5)).front == 0
    assert chosen(estimates(HAND, PHONE, FAST, 2, 5), "memory").front == 4  # no limit


def test_of_equals_the_client_has_fewer_layers() -> None:
    found = estimates(HAND, Device(), Device(), 2, 5, backs=(2, 1))
    assert len({e.objective for e in found}) == 1
    assert (chosen(found).front, chosen(found).back) == (0, 1)


def test_only_admissible_cuts_are_in_the_grid() -> None:
    found = estimates(HAND._replace(least=1), PHONE, FAST, 2, 5, fronts=range(9), backs=(0, 1, 3))
    assert [(e.front, e.back) for e in found] == [*((a, 0) for a in range(1, 6)), *((a, 1) for a in range(1, 5)), (1, 3), (2, 3)]


@pytest.mark.parametrize("family", ["bert", "gpt2", "vit"])
def test_a_head_alone_costs_little(family: str, techniques: Callable[..., Any], federation: Callable[..., Any]) -> None:
    whole = techniques(family, "head" if family != "gpt2" else "lora")
    job = federation("local", family=family, technique=whole.kind, topts={}, rounds=1).world.job
    own = on_part(whole, Part(2, 2, False, True), lambda b: TECHNIQUES[whole.kind](b))
    there, both = costs(own, Part(2, 2, False, True), job)
    least, _ = costs(whole, Part(0, 2, True, True), job)
    assert 0 < there(3, 8) < both(3, 8)
    assert there(3, 8) < (0.1 if family != "gpt2" else 1) * least(3, 8)


def test_a_head_that_reads_one_token_is_sent_one() -> None:
    """With the head alone at the client: of the last layer's tokens the first comes down, and its gradient goes up."""
    whole, one = (estimates(HAND._replace(read=read), PHONE, FAST, 2, 5, fronts=[1], backs=(0,))[0] for read in (0, 1))
    token = 4 * 2 * HAND.hidden
    assert (whole.bytes_up - one.bytes_up, whole.bytes_down - one.bytes_down) == (4 * token, 4 * token)


def test_there_must_be_memory_for_the_longest_batch() -> None:
    grows = HAND._replace(cost=lambda part, rows, width: made(part, rows, width)._replace(memory=10.0 * width))
    found = [estimates(grows, PHONE, FAST, 2, 5, widest=widest)[0] for widest in (0, 5, 50)]
    assert found[0] == found[1]
    assert found[2].memory > found[1].memory
    assert found[2].seconds == found[1].seconds


def test_a_device_that_fits_nothing_is_told_in_one_line() -> None:
    small = Device("watch", memory=12.0)
    with pytest.raises(ConfigError) as raised:
        chosen(estimates(HAND, small, FAST, 2, 5))
    line = str(raised.value)
    assert "\n" not in line
    assert all(word in line for word in ("'watch'", "memory_mb = 1.2e-05", "front 0, back 1", "train.batch"))


def test_what_cannot_be_chosen_is_said() -> None:
    with pytest.raises(ConfigError, match="optimal"):
        chosen(estimates(HAND, PHONE, FAST, 2, 5), "optimum")
    with pytest.raises(ConfigError, match="no admissible cut"):
        chosen([])
    with pytest.raises(ConfigError, match="give algorithm"):
        estimates(HAND._replace(cost=None), PHONE, FAST, 2, 5)
    assert RULES == ("optimal", "memory")


# The command


ROWS = [(f"{LABELS[k % 3]} w{k % 29} fox", LABELS[k % 3], f"u{k % 3}") for k in range(30)]
DEVICES = '[{name="phone", memory_mb=0.2, gflops=0.001, uplink_mbps=1}, {name="watch", memory_mb=0.01}]'


@pytest.fixture
def home(tmp_path: Path, folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "d.csv").write_text(csv_of(ROWS), encoding="utf-8")
    write_experiment(tmp_path, folders("bert"), 1, 'name = "d.csv"', "count = 3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command_tells_every_device_and_technique(home: Path, typed: Callable[..., Printed]) -> None:
    printed = typed(
        f"plan e.toml --json {sets(clients__devices=DEVICES, algorithm__kind='flexp', algorithm__front=0, algorithm__least_front=0)}"
    )
    assert printed.code == 0, printed.err
    found = json.loads(printed.out)
    phone, watch = found["devices"]
    assert (found["rows"], found["technique"], phone["device"], phone["memory_bytes"]) == (4, "lora", "phone", 200_000)
    assert [(cut["front"], cut["back"]) for cut in phone["cuts"]] == [(0, 1)]
    for line in (phone["uncut"], *phone["cuts"]):
        assert line["fits"] == (line["memory_bytes"] <= 200_000)
        assert line["seconds_per_round"] > 0
    assert watch["chosen"] is None
    assert "device 'watch'" in watch["why"]
    assert not watch["uncut"]["fits"]
    techniques = {line["technique"]: line for line in found["techniques"]}
    assert list(techniques) == ["full", "lora", "prefix", "prompt", "head", "ia3"]
    assert techniques["full"]["trained"] > techniques["lora"]["trained"] > techniques["head"]["trained"] > 0
    assert not list(home.glob("runs"))  # nothing was trained


def test_the_command_prints_tables(home: Path, typed: Callable[..., Printed]) -> None:
    printed = typed("plan e.toml --set technique.kind=prompt")
    assert printed.code == 0, printed.err
    assert all(
        word in printed.out for word in ("server-grade", "uncut", "technique prompt is not cut by layers", "ia3", "bytes up")
    )


def test_a_technique_that_does_not_fit_has_a_dash(
    home: Path, typed: Callable[..., Printed], folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtailor.planning.COMPARED", ("head",))
    words = sets(data__kind="language", model__name=folders("gpt2"))
    assert "classification head" in json.loads(typed(f"plan e.toml --json {words}").out)["techniques"][0]["why_not"]
    row = typed(f"plan e.toml {words}").out.splitlines()[-2]
    assert "head" in row
    assert row.count("-") == 5


@pytest.mark.parametrize(
    ("command", "code", "word"),
    [
        ("plan f.toml", 2, "'f.toml' does not exist"),
        ("plan e.toml --set technique.rnk=3", 2, "did you mean 'rank'?"),
        ("plan e.toml --set data.name=gone.csv", 3, "gone.csv"),
        ("plan e.toml --preset small", 2, "no preset 'small'"),
    ],
)
def test_the_commands_errors_are_one_line(command: str, code: int, word: str, home: Path, typed: Callable[..., Printed]) -> None:
    printed = typed(command)
    assert (printed.code, printed.out) == (code, "")
    assert word in printed.err
    assert len(printed.err.strip().splitlines()) == 1


@pytest.mark.parametrize("filters", [{}, {"filters__up": '["int8"]', "filters__down": '["bf16"]'}])
def test_bytes_are_those_of_a_real_runs_ledger(
    filters: dict[str, str], home: Path, typed: Callable[..., Printed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Down to the byte; up to the byte with the loss that the run had, and within 16 bytes of it before."""
    monkeypatch.setattr("fedtailor.planning.COMPARED", ())
    planned = json.loads(typed(f"plan e.toml --json {sets(**filters)}").out)["devices"][0]["uncut"]
    assert in_process("run", "e.toml", "--out", "run", *shlex.split(sets(**filters)), folder=home) == 0
    spent = lines(home / "run")[0]["clients"]
    init = TECHNIQUES["lora"](backbone_of(home), rank=2).init
    for line in spent.values():
        assert line["bytes_down"] == planned["bytes_down_per_round"]
        assert abs(line["bytes_up"] - planned["bytes_up_per_round"]) <= 16
        steps = math.ceil(line["examples"] / 4)
        rate = sum([0.05] * steps) / steps
        info = {"n": line["examples"], "steps": float(steps), "examples": line["examples"], "flops": line["flops"]}
        assert (
            letter_bytes(init, load(home / "run/experiment.toml"), {**info, "loss": line["loss"], "lr": rate})[0]
            == line["bytes_up"]
        )
    assert read(home / "run/summary.json")["trainable_parameters"] == planned["trained"]


def backbone_of(home: Path) -> Any:
    from fedtailor.backbone import load as load_backbone

    return load_backbone(load(home / "e.toml").model, "text", LABELS)


def test_steps_of_parts_are_given_what_a_part_is_given(techniques: Techniques) -> None:
    """A middle sees hidden states and no labels."""
    technique, _ = over(techniques, "bert", "lora", {"rank": 2})
    own = on_part(technique, CUT[1], functools.partial(TECHNIQUES["lora"], rank=2))
    batch: Tree = dict(_batch(own, CUT[1], job_of("bert"), 3, 10))
    assert {name: t.shape for name, t in batch.items()} == {HIDDEN: (3, 10, 32)}


CUTS: list[tuple[str, dict[str, Any]]] = [
    ("flexp", {"cache_mb": 0}),
    ("flexp", {"train_front": "false"}),
    ("flexp", {"train_front": "false", "back": 0, "front": 0}),
    ("flexp", {"delta": 0.1}),
    ("splitfed", {}),
    ("splitfed", {"version": "v2", "delta": 0.5}),
    ("splitlora", {"back": 0}),
    ("phsfl", {"personal": 1, "edges": 2}),
    ("pfsl", {"personal": 1}),
    ("pfsl", {"personal": 1, "cache_mb": 0}),
]


@pytest.mark.parametrize(("kind", "options"), CUTS)
@pytest.mark.parametrize("filters", [{}, {"filters__up": '["topk-plain=0.25@gradient"]', "filters__down": '["int8-plain"]'}])
def test_bytes_of_a_cut_are_those_of_a_real_runs_ledger(
    kind: str, options: dict[str, Any], filters: dict[str, str], home: Path
) -> None:
    """To the byte, of each client, with headers and filters, with the cache and without."""
    back, front = options.get("back", 1), options.get("front", 1 if options.get("back") == 0 else 0)
    given = {**options, "kind": kind, "front": front, "back": back}
    changes = {**filters, **{f"algorithm__{k}": v for k, v in given.items()}, "rounds": 3}
    if kind == "pfsl":
        changes["train__steps"] = 3
    words = shlex.split(sets(**changes))
    assert in_process("run", "e.toml", "--out", "run", *words, folder=home) == 0
    world = build(load(Path("e.toml"), [word for word in words if word != "--set"]))
    planned = rehearse(world, front, back, 3).clients
    for client in world.clients:
        for way in ("bytes_up", "bytes_down", "letters", "replies"):
            spent = [line["clients"].get(client, {}).get(way, 0.0) for line in lines(home / "run")]
            assert planned[client][way] == sum(spent) > 0
