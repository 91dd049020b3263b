"""Filters: what they save on the wire, what they lose, and that error feedback loses nothing for good."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fedtailor.core import Message, Tree, stream
from fedtailor.errors import ConfigError
from fedtailor.filters import FILTERS, NOTHING, chain, quantize
from fedtailor.trees import nbytes, tensors
from fedtailor.wire import WireError, decode, encode
from tiny import same


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=stream(seed, "filters", *shape))


def body() -> Tree:
    return {
        "w": noise(8, 64),
        "h": {"b": noise(33), "deep": {"c": noise(2, 3, 5)}},
        "scalar": torch.tensor(1.5),
        "counts": torch.arange(5),
        "mask": noise(4) > 0,
        "empty": torch.empty(0, 4),
        "text": "kept",
        "list": [1, 2],
    }


def received(names: list[str], tree: Tree, memory: Tree | None = None) -> tuple[Tree, Tree]:
    """(what arrives through filter, wire and inverse; the sender's new memory)."""
    made = chain(names)
    message, memory = made.apply(Message("update", tree, {"n": 3}), memory or {})
    got = made.undo(decode(encode(message)))
    assert (got.verb, got.info) == ("update", {"n": 3})
    return got.body, memory


@pytest.mark.parametrize("names", [[], *([name] for name in FILTERS), ["bf16", "int8"], ["int8", "bf16"]], ids=str)
def test_what_arrives_has_the_names_and_shapes_that_were_sent(names: list[str]) -> None:
    sent = body()
    got, _ = received(names, sent)
    assert {p: t.shape for p, t in tensors(got)} == {p: t.shape for p, t in tensors(sent)}
    for kept in ("counts", "mask", "empty", "text", "list"):
        assert same(got[kept], sent[kept])
    for (path, a), (_, b) in zip(tensors(got), tensors(sent), strict=True):
        assert a.dtype == b.dtype, path


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_changes_nothing_it_was_given(name: str) -> None:
    made, sent = chain([name]), body()
    message, memory = made.apply(Message("update", sent), {})
    assert same(sent, body())
    frozen = {k: v.clone() for k, v in tensors(memory)}
    blob = encode(message)
    made.undo(message)
    made.apply(Message("update", sent), memory)
    assert encode(message) == blob
    assert same(dict(tensors(memory)), frozen)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_cast_is_torchs_cast_and_half_the_bytes(name: str, dtype: torch.dtype) -> None:
    sent = {"w": noise(16, 64), "h": {"b": noise(10)}}
    message, _ = chain([name]).apply(Message("x", sent), {})
    assert nbytes(message.body) * 2 == nbytes(sent)
    assert len(encode(Message("x", sent))) - len(encode(message)) == pytest.approx(nbytes(sent) / 2, abs=16)
    got, memory = received([name], sent)
    assert torch.equal(got["w"], sent["w"].to(dtype).float())
    assert torch.equal(got["h"]["b"], sent["h"]["b"].to(dtype).float())
    assert memory == {}


@pytest.mark.parametrize("name", ["int8", "int8-plain"])
def test_int8_is_one_byte_a_number_and_four_a_row(name: str) -> None:
    sent = {"w": noise(16, 256), "h": {"b": noise(100)}}
    message, _ = chain([name]).apply(Message("x", sent), {})
    assert nbytes(message.body) == 16 * 256 + 16 * 4 + 100 + 4
    # What is beside the bytes of the tensors, four entries and their names, is a header below 1 kB.
    assert 0 < len(encode(message)) - nbytes(message.body) < 1_000


def test_the_second_half_of_a_quantum_is_never_lost() -> None:
    t = noise(50, 60) * torch.logspace(-6, 4, 50)[:, None]
    values, step = quantize(t)
    assert values.dtype == torch.int8
    assert step.shape == (50, 1)
    torch.testing.assert_close(step[:, 0], t.abs().max(1).values / 127, rtol=1e-6, atol=0)
    assert bool(((values.float() * step - t).abs() <= step / 2 * (1 + 1e-5)).all())
    # The largest number of each row is met exactly, up to the rounding of float32.
    rows, largest = torch.arange(50), t.abs().argmax(1)
    torch.testing.assert_close((values.float() * step)[rows, largest], t[rows, largest], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(384, 2), (2, 384), (384, 384), (8, 3, 30), (5,), ()])
def test_scales_lie_along_the_longest_axis(shape: tuple[int, ...]) -> None:
    """A tall matrix is its transpose's: LoRA's B of rank 2 costs 2 scales, as its A does."""
    t = noise(*shape)
    values, step = quantize(t)
    assert values.shape == t.shape
    assert step.numel() == t.numel() // max(shape, default=1)
    if len(shape) == 2 and shape[0] != shape[1]:
        turned, other = quantize(t.mT)
        assert torch.equal(turned.mT, values)
        assert torch.equal(other.mT, step)


@pytest.mark.parametrize("name", ["int8", "int8-plain"])
def test_int8_is_the_closed_form(name: str) -> None:
    sent = {"w": noise(6, 30), "v": noise(30)}
    got, _ = received([name], sent)
    step = sent["w"].abs().amax(1, keepdim=True) / 127
    torch.testing.assert_close(got["w"], torch.round(sent["w"] / step) * step)
    step = sent["v"].abs().max() / 127
    torch.testing.assert_close(got["v"], torch.round(sent["v"] / step) * step)


@pytest.mark.parametrize("name", ["int8", "int8-plain"])
@pytest.mark.parametrize(
    "t",
    [
        torch.zeros(3, 4),
        torch.zeros(5),
        torch.tensor(0.0),
        torch.tensor(-2.5),
        torch.full((2, 3), 7.0),
        torch.full((4,), -0.125),
        torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
        torch.tensor([[127.0, -127.0, 3.0]]),
        torch.empty(0),
        torch.empty(2, 0),
    ],
    ids=lambda t: str(t.tolist()),
)
def test_zeros_constant_rows_scalars_and_whole_quanta_arrive_unchanged(name: str, t: Tensor) -> None:
    got, _ = received([name], {"t": t})
    assert got["t"].shape == t.shape
    assert bool(torch.isfinite(got["t"]).all())
    torch.testing.assert_close(got["t"], t, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e30, 3.4e38])
def test_the_smallest_and_largest_numbers_stay_finite(size: float) -> None:
    t = torch.tensor([[size, -size, size / 3]])
    got, _ = received(["int8"], {"t": t})
    assert bool(torch.isfinite(got["t"]).all())
    assert float((got["t"] - t).abs().max()) <= max(size / 127, 1.2e-38)


def test_with_error_feedback_the_running_mean_of_what_arrives_converges_to_the_true_value() -> None:
    # A number far below half a step beside a large one: forgotten by plain int8, sent in time with feedback.
    true = torch.cat([torch.tensor([100.0, 0.01, -0.2]), noise(50)])
    step = 100.0 / 127

    def running(name: str, rounds: int) -> list[float]:
        memory: Tree = {}
        total = torch.zeros_like(true)
        errors = []
        for count in range(1, rounds + 1):
            got, memory = received([name], {"w": true}, memory)
            total += got["w"]
            errors.append(float((total / count - true).abs().max()))
        return errors

    feedback, plain = running("int8", 64), running("int8-plain", 64)
    # The sum of what arrived differs from the sum of what was meant by one memory: at most half a step (a little more where
    # the memory raised the largest number and so the step).
    for count, error in enumerate(feedback, start=1):
        assert error <= 0.51 * step * 1.01 / count + 1e-5
    assert feedback[-1] < 0.02 * feedback[0]
    assert plain[-1] == pytest.approx(plain[0], rel=1e-3)


def test_memory_is_what_rounding_lost_and_is_the_senders_own_plain_tree() -> None:
    sent = {"w": noise(4, 8), "h": {"b": noise(5)}, "n": torch.arange(3)}
    got, memory = received(["int8"], sent)
    kept = memory["0"]["update"]
    torch.testing.assert_close(kept["w"], sent["w"] - got["w"])
    torch.testing.assert_close(kept["h"]["b"], sent["h"]["b"] - got["h"]["b"])
    assert "n" not in kept
    # It is saved between rounds as any state.
    again = decode(encode(Message("state", memory))).body
    assert same(received(["int8"], sent, again)[0], received(["int8"], sent, memory)[0])


def test_memory_of_another_shape_is_let_go() -> None:
    _, memory = received(["int8"], {"w": noise(4, 8), "x": noise(3)})
    fresh, _ = received(["int8"], {"w": noise(2, 8), "x": {"y": noise(3)}})
    assert same(received(["int8"], {"w": noise(2, 8), "x": {"y": noise(3)}}, memory)[0], fresh)


def test_memory_of_another_verb_is_left_alone() -> None:
    made = chain(["int8"])
    sent = {"w": noise(4, 8)}
    _, memory = made.apply(Message("update", sent), {})
    other, both = made.apply(Message("answer", sent), memory)
    fresh, _ = made.apply(Message("answer", sent), {})
    assert same(dict(other.body), dict(fresh.body))
    assert same(both["0"]["update"], memory["0"]["update"])


def test_two_rounds_by_hand() -> None:
    # Scale 1: 127 is the largest. 0.4 is sent as 0 and kept; 0.4 + 0.4 is sent as 1 and -0.2 is kept.
    sent = {"w": torch.tensor([127.0, 0.4])}
    first, memory = received(["int8"], sent)
    assert first["w"].tolist() == [127.0, 0.0]
    second, memory = received(["int8"], sent, memory)
    assert second["w"].tolist() == [127.0, 1.0]
    assert memory["0"]["update"]["w"].tolist() == pytest.approx([0.0, -0.2], abs=1e-6)


def test_no_names_are_nothing_at_all() -> None:
    assert chain([]) is NOTHING
    message = Message("x", body())
    assert NOTHING.apply(message, {})[0] is message
    assert NOTHING.undo(message) is message


@pytest.mark.parametrize("names", list(itertools.permutations(["bf16", "int8-plain", "fp16"], 2)), ids=str)
def test_a_chain_applies_in_order_and_undoes_in_reverse(names: tuple[str, str]) -> None:
    first, second = (FILTERS[name][0]() for name in names)
    message = Message("x", {"w": noise(4, 8), "h": {"b": noise(5)}})
    by_hand = second.apply(first.apply(message, {})[0], {})[0]
    both = chain(names)
    assert encode(both.apply(message, {})[0]) == encode(by_hand)
    assert same(both.undo(by_hand).body, first.undo(second.undo(by_hand)).body)


def test_filters_of_a_chain_keep_their_memories_apart() -> None:
    sent = {"w": noise(3, 9)}
    message, memory = chain(["int8", "bf16", "int8"]).apply(Message("x", sent), {})
    assert set(memory) <= {"0", "1", "2"}
    alone = FILTERS["int8"][0]().apply(Message("x", sent), {})[1]
    assert same(memory["0"], alone)
    assert message.body["w"].dtype == torch.int8


@pytest.mark.parametrize(
    ("name", "hint"), [("bf61", "did you mean 'bf16'"), ("int", "did you mean 'int8'"), ("zzz", "choose one of: bf16")]
)
def test_an_unknown_filter_is_a_config_error_with_the_nearest_name(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown filter '{name}': {hint}"):
        chain(["bf16", name])


# The largest entries


@pytest.mark.parametrize(("share", "size"), [(0.5, 64), (0.1, 1000), (0.001, 100_000), (1.0, 7)])
def test_topk_sends_the_largest_and_says_where(share: float, size: int) -> None:
    sent = {"w": noise(size), "m": noise(4, size)}
    got, memory = received([f"topk={share}"], sent)
    for name, t in sent.items():
        count = max(1, math.ceil(share * t.numel()))
        least = t.abs().flatten().topk(count).values.min()
        assert same(got[name], torch.where(t.abs() >= least, t, 0))
        assert same(memory["0"]["update"][name], t - got[name])
    packed = nbytes(chain([f"topk={share}"]).apply(Message("update", {"w": sent["w"]}), {})[0].body)
    count = max(1, math.ceil(share * size))
    assert packed == 4 * count + min(4 * count, -(-size // 8)) + 8  # values, where they stand, the shape


def test_what_topk_left_out_is_sent_later() -> None:
    """Sums of what arrives follow sums of what was given, although each time a tenth is sent."""
    memory: Tree = {}
    given, got = torch.zeros(200), torch.zeros(200)
    for step in range(60):
        update = noise(200, seed=step) + 0.5
        body, memory = received(["topk=0.1"], {"w": update}, memory)
        given, got = given + update, got + body["w"]
    assert float((given - got).abs().max()) < 0.5 * float(given.abs().max())
    plain = sum(received(["topk-plain=0.1"], {"w": noise(200, seed=step) + 0.5})[0]["w"] for step in range(60))
    assert float((given - got).norm()) < 0.5 * float((given - plain).norm())


def test_topk_of_one_tensor_leaves_the_others() -> None:
    sent = {"gradient": noise(40), "hidden": noise(40), "deep": {"gradient": noise(40)}}
    got, _ = received(["topk-plain=0.25@gradient", "int8-plain"], sent)
    assert int((got["gradient"] != 0).sum()) == int((got["deep"]["gradient"] != 0).sum()) == 10
    assert float((got["hidden"] - sent["hidden"]).abs().max()) < 0.05


@pytest.mark.parametrize("at", [torch.tensor([9], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)])
def test_places_outside_the_tensor_are_refused(at: Tensor) -> None:
    made = chain(["topk=0.5"])
    with pytest.raises(WireError, match="topk: 1 values"):
        made.undo(Message("update", {"w": torch.ones(1), "w#at": at, "w#shape": torch.tensor([4])}))
    with pytest.raises(WireError, match="topk: 1 values"):
        made.undo(
            Message("update", {"w": torch.ones(1), "w#at": torch.zeros(1, dtype=torch.int32), "w#shape": torch.tensor([1 << 40])})
        )


@pytest.mark.parametrize(
    ("name", "line"), [("topk=2", "at most 1"), ("topk=x", "at most 1"), ("bf16=3", "bf16 has no argument"), ("topq=1", "topk")]
)
def test_arguments_that_do_not_fit(name: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        chain([name])
