"""Arithmetic on trees against closed forms, and the equalities of LoRA aggregation that are about trees."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fedtailor import trees
from fedtailor.core import Tree, stream
from fedtailor.trees import add, aggregation_error, cut, leaves, lora_pairs, moved, overlapping_mean, weighted_mean
from tiny import same


def noise(*shape: int, seed: str = "") -> Tensor:
    return torch.randn(shape, generator=stream(0, "trees", seed, *shape), dtype=torch.float64)


def tree(seed: str, dtype: torch.dtype = torch.float32) -> Tree:
    return {"w": noise(3, 4, seed=seed).to(dtype), "h": {"b": noise(5, seed=seed).to(dtype)}, "kind": "lora"}


def factors(ranks: list[int], d_in: int, d_out: int) -> list[tuple[Tensor, Tensor]]:
    """(B, A) of each client."""
    return [(noise(d_out, r, seed=f"B{i}"), noise(r, d_in, seed=f"A{i}")) for i, r in enumerate(ranks)]


def lora(b: Tensor, a: Tensor, module: str = "m") -> Tree:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


# Names.


def test_leaves_come_in_sorted_order_with_their_paths() -> None:
    got = list(leaves({"b": {"y": 1, "x": 2}, "a": "text", "c": {}}))
    assert got == [("a", "text"), ("b/x", 2), ("b/y", 1)]


def test_arithmetic_is_torchs_leaf_by_leaf_and_changes_no_argument() -> None:
    a, b = tree("a"), tree("b")
    before = [trees.tree_map(torch.clone, t) for t in (a, b)]
    for got, want in (
        (trees.add(a, b), lambda x, y: x + y),
        (trees.subtract(a, b), lambda x, y: x - y),
        (trees.scale(a, 3), lambda x, y: 3 * x),
        (trees.zeros_like(a), lambda x, y: 0 * x.abs()),
    ):
        assert torch.equal(got["w"], want(a["w"], b["w"]))
        assert torch.equal(got["h"]["b"], want(a["h"]["b"], b["h"]["b"]))
        assert got["kind"] == "lora"
    assert same([a, b], before)


def test_a_name_that_another_tree_lacks_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="h"):
        trees.add(tree("a"), {"w": torch.ones(3, 4)})


def test_unstack_of_stack_gives_each_tree_back_with_memory_of_its_own() -> None:
    many = [tree(str(i)) for i in range(3)]
    stacked = trees.stack(many)
    assert stacked["w"].shape == (3, 3, 4)
    for i, one in enumerate(many):
        got = trees.unstack(stacked, i)
        assert same(got, one)
        assert got["w"].untyped_storage().nbytes() == one["w"].numel() * 4


def test_select_keeps_the_names_that_are_there_in_the_order_asked_for() -> None:
    assert list(trees.select({"a": 1, "b": 2, "c": 3}, ["c", "x", "a"])) == ["c", "a"]


def test_norm_and_counts_are_those_of_one_long_vector() -> None:
    t = tree("n")
    flat = torch.cat([t["w"].flatten(), t["h"]["b"]]).double()
    assert trees.norm(t) == pytest.approx(float(torch.linalg.vector_norm(flat)), rel=1e-12)
    assert trees.numel(t) == 17
    assert trees.nbytes({**t, "half": torch.ones(3).half(), "bool": torch.ones(2) > 0}) == 17 * 4 + 3 * 2 + 2
    assert trees.norm({}) == 0.0


def test_norm_does_not_overflow_where_the_dtype_would() -> None:
    assert trees.norm({"w": torch.full((4,), 300.0).half()}) == 600.0  # 300^2 is beyond float16


@pytest.mark.parametrize(("value", "finite"), [(1.0, True), (math.nan, False), (math.inf, False), (-math.inf, False)])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(value: float, finite: bool) -> None:
    assert trees.is_finite({"a": torch.ones(2), "h": {"i": torch.arange(3), "b": torch.tensor([0.0, value])}}) is finite


def test_signatures_are_equal_exactly_when_trees_can_be_stacked() -> None:
    first = tree("a")
    alike = {"h": {"b": torch.zeros(5)}, "w": torch.zeros(3, 4), "kind": "other"}
    assert trees.signature(first) == trees.signature(alike)
    assert trees.signature(first) == (("h/b", (5,), "torch.float32"), ("w", (3, 4), "torch.float32"))
    for other in (tree("a", torch.float16), {**first, "w": torch.zeros(4, 3)}, {**first, "x": torch.zeros(1)}, {"w": first["w"]}):
        assert trees.signature(first) != trees.signature(other)


# The weighted mean.


@pytest.mark.parametrize("weights", [[1, 1, 1], [0.3, 0.7, 1.5], [0, 1, 0], [5, 20, 75]])
def test_weighted_mean_is_its_closed_form(weights: list[float]) -> None:
    many = [tree(str(i), torch.float64) for i in range(3)]
    mean = weighted_mean(many, weights)
    p = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    for got, parts in ((mean["w"], [t["w"] for t in many]), (mean["h"]["b"], [t["h"]["b"] for t in many])):
        torch.testing.assert_close(got, torch.einsum("k,k...->...", p, torch.stack(parts)), rtol=0, atol=1e-15)
    assert mean["kind"] == "lora"


def test_the_mean_of_one_tree_is_that_tree_and_the_mean_changes_no_argument() -> None:
    one = tree("a")
    assert same(weighted_mean([one], [7]), one)
    many = [tree("a"), tree("b")]
    weighted_mean(many, [1, 2])
    assert same(many, [tree("a"), tree("b")])


def test_only_proportions_of_weights_matter() -> None:
    many = [tree("a"), tree("b")]
    assert same(weighted_mean(many, [1, 3]), weighted_mean(many, [0.25, 0.75]))


def test_the_mean_sums_in_the_order_given_so_callers_sort_by_client() -> None:
    # 1e8 + 1 - 1e8 depends on the order in float32: equal bits need one order, and replies are averaged in client order.
    replies = {"c2": 1.0, "c0": 1e8, "c1": -1e8}
    values = {c: {"w": torch.tensor([v])} for c, v in replies.items()}
    arrivals = [["c2", "c0", "c1"], ["c0", "c2", "c1"], ["c1", "c0", "c2"]]
    as_they_arrived = {float(weighted_mean([values[c] for c in order], [1, 1, 1])["w"]) for order in arrivals}
    by_client = {float(weighted_mean([values[c] for c in sorted(order)], [1, 1, 1])["w"]) for order in arrivals}
    assert len(as_they_arrived) > 1
    assert len(by_client) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_single(dtype: torch.dtype) -> None:
    # 1 + 500 times 2^-9: in bfloat16 (or float16, from 2^-11 on) each addition to 1 would be lost or rounded.
    many = [{"w": torch.tensor([1.0]).to(dtype)}] + [{"w": torch.tensor([2.0**-9]).to(dtype)} for _ in range(500)]
    mean = weighted_mean(many, [1.0] * 501)["w"]
    assert mean.dtype == dtype
    exact = torch.tensor([(1 + 500 * 2.0**-9) / 501]).to(dtype)
    assert torch.equal(mean, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_beyond_the_range_of_the_dtype(dtype: torch.dtype) -> None:
    large = torch.tensor([60_000.0]).to(dtype)
    assert torch.equal(weighted_mean([{"w": large}] * 4, [1, 1, 1, 1])["w"], large)


@pytest.mark.parametrize("count", [3, 2**24 + 1, 2**40 + 1])
@pytest.mark.parametrize("clients", [2, 3, 7, 49])
def test_a_count_that_is_equal_everywhere_is_its_own_mean(count: int, clients: int) -> None:
    weights = [1.0 + i for i in range(clients)]
    mean = weighted_mean([{"n": torch.tensor(count)}] * clients, weights)["n"]
    assert mean.dtype == torch.int64
    assert int(mean) == count


@pytest.mark.parametrize(
    ("many", "weights"),
    [
        ([], []),
        ([{"w": torch.ones(1)}], []),
        ([{"w": torch.ones(1)}], [1, 2]),
        ([{"w": torch.ones(1)}], [0]),
        ([{"w": torch.ones(1)}] * 2, [1, -1]),
        ([{"w": torch.ones(1)}], [math.nan]),
        ([{"w": torch.ones(3)}, {"w": torch.ones(1)}], [1, 1]),
        ([{"w": torch.ones(1)}, {"w": torch.ones(3)}], [1, 1]),
    ],
)
def test_a_mean_that_does_not_exist_is_a_value_error(many: list[Tree], weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weighted_mean"):
        weighted_mean(many, weights)


def test_the_mean_of_trees_with_other_names_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="w"):
        weighted_mean([{"w": torch.ones(1)}, {"v": torch.ones(1)}], [1, 1])


# LoRA.


def test_lora_pairs_are_modules_with_both_factors() -> None:
    flat = {
        "z.q.lora_A.weight": 0,
        "z.q.lora_B.weight": 0,
        "a.v.lora_A.weight": 0,
        "a.v.lora_B.weight": 0,
        "only.lora_A.weight": 0,
        "sole.lora_B.weight": 0,
        "head.weight": 0,
    }
    assert lora_pairs(flat) == {
        "a.v": ("a.v.lora_A.weight", "a.v.lora_B.weight"),
        "z.q": ("z.q.lora_A.weight", "z.q.lora_B.weight"),
    }
    assert list(lora_pairs(flat)) == ["a.v", "z.q"]


def test_stacked_factors_of_unequal_ranks_multiply_to_the_mean_product() -> None:
    p = [0.3, 0.7]
    both = factors([2, 3], 5, 7)
    stacked = lora(torch.cat([b for b, _ in both], dim=1), torch.cat([w * a for w, (_, a) in zip(p, both, strict=True)]))
    assert aggregation_error([lora(b, a) for b, a in both], p, stacked) < 1e-15


def test_mean_factors_plus_the_residual_are_exact_and_the_transpose_is_not() -> None:
    clients = factors([2, 2, 2], 6, 6)
    mean = weighted_mean([lora(b, a) for b, a in clients], [1, 1, 1])
    product = mean["m.lora_B.weight"] @ mean["m.lora_A.weight"]
    exact = sum(b @ a for b, a in clients) / 3
    residual = exact - product
    torch.testing.assert_close(product + residual, exact, rtol=0, atol=1e-14)
    assert float((product + residual.T - exact).abs().max()) > 0.5


@pytest.mark.parametrize(("d_in", "d_out"), [(6, 6), (30, 40)])
def test_the_rank_of_the_residual_is_one_clients_less(d_in: int, d_out: int) -> None:
    clients = factors([2, 2, 2], d_in, d_out)
    mean = weighted_mean([lora(b, a) for b, a in clients], [1, 1, 1])
    residual = sum(b @ a for b, a in clients) / 3 - mean["m.lora_B.weight"] @ mean["m.lora_A.weight"]
    assert int(torch.linalg.matrix_rank(residual)) == (3 - 1) * 2


def test_the_error_is_the_centred_form_for_any_weights() -> None:
    p = [0.1, 0.2, 0.3, 0.4]
    clients = factors([2] * 4, 30, 40)
    many = [lora(b, a) for b, a in clients]
    mean = weighted_mean(many, [10 * w for w in p])
    mean_b, mean_a = mean["m.lora_B.weight"], mean["m.lora_A.weight"]
    centred = sum(w * (b - mean_b) @ (a - mean_a) for w, (b, a) in zip(p, clients, strict=True))
    exact = sum(w * b @ a for w, (b, a) in zip(p, clients, strict=True))
    assert isinstance(centred, Tensor)
    assert isinstance(exact, Tensor)
    torch.testing.assert_close(centred, exact - mean_b @ mean_a, rtol=0, atol=1e-13)
    assert int(torch.linalg.matrix_rank(centred)) == 6
    assert aggregation_error(many, p, mean) == pytest.approx(float(centred.norm() / exact.norm()), rel=1e-12)


def test_the_error_of_several_modules_is_that_of_their_block_diagonal() -> None:
    one, two = factors([2, 2], 5, 7), factors([3, 3], 4, 6)
    many = [{**lora(*f, "x"), **lora(*g, "y"), "head": noise(2)} for f, g in zip(one, two, strict=True)]
    mean = weighted_mean(many, [1, 3])
    exact = torch.block_diag(*(0.25 * f[0][0] @ f[0][1] + 0.75 * f[1][0] @ f[1][1] for f in (one, two)))
    kept = torch.block_diag(*(mean[f"{m}.lora_B.weight"] @ mean[f"{m}.lora_A.weight"] for m in "xy"))
    assert aggregation_error(many, [1, 3], mean) == pytest.approx(float((exact - kept).norm() / exact.norm()), rel=1e-12)


def test_the_norm_of_a_product_needs_only_small_matrices() -> None:
    b, a = factors([3], 30, 40)[0]
    assert trees.norm({"w": b @ a}) == pytest.approx(float(((b.T @ b) * (a @ a.T)).sum().sqrt()), rel=1e-12)


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_averaging_is_exact_when_all_clients_share_one_factor_and_wrong_otherwise(frozen: str) -> None:
    clients = factors([2, 2, 2], 5, 7)
    assert (
        aggregation_error([lora(b, a) for b, a in clients], [1, 1, 1], weighted_mean([lora(b, a) for b, a in clients], [1] * 3))
        > 0.1
    )
    common_b, common_a = clients[0]
    many = [lora(b, common_a) if frozen == "A" else lora(common_b, a) for b, a in clients]
    assert aggregation_error(many, [1, 2, 3], weighted_mean(many, [1, 2, 3])) < 1e-15


def test_there_is_no_error_without_factors_or_with_zero_ones() -> None:
    assert aggregation_error([{"w": noise(3)}], [1.0], {"w": noise(3)}) == 0.0
    zero = lora(torch.zeros(4, 2), noise(2, 3))
    assert aggregation_error([zero, zero], [1, 1], zero) == 0.0


@pytest.mark.parametrize("sizes", [(3, 3, 3), (3, 1, 2)])
def test_moving_tensor_by_tensor_is_adding_the_mean(sizes: tuple[int, ...]) -> None:
    params = {"a": torch.randn(3, 4), "b": torch.randn(3)}
    held = [{"a": torch.randn(size, 4), "b": torch.randn(size)} for size in sizes]
    at_once = add(params, overlapping_mean(held, [1.0, 2.0, 0.5], params))
    assert same(moved(params, held, [1.0, 2.0, 0.5]), at_once)
    if len(set(sizes)) == 1:
        deep = moved({"deep": params}, [{"deep": tree} for tree in held], [1.0, 2.0, 0.5])
        assert same(deep["deep"], at_once)


def test_a_tree_that_needs_no_cut_stays_the_same_object() -> None:
    """What everybody was sent is stacked as one where it is one object."""
    whole = {"w": noise(4, 3), "kind": "lora"}
    assert cut(whole, {"w": torch.empty(4, 3)}) is whole
    assert cut(whole, {}) is whole
    part = cut(whole, {"w": torch.empty(2, 3)})
    assert same(part, {"w": whole["w"][:2], "kind": "lora"})
    assert whole["w"].shape == (4, 3)
