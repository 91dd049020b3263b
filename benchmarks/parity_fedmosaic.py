"""FedMosaic's RELA beside its authors' code (snumprlab/fedmosaic, tried at 7887f5f); parity_colora.py has the other half.

    python benchmarks/parity_fedmosaic.py CHECKOUT

Two rounds of `fedmosaic` on a small random Llama, six clients of two tasks (which tokens occur). Beside it, from the same weights and rows,
run out of their files: `get_grad_penultimate`, the loop over columns that makes their similarity matrix, and
`fedmosaic_homo_load_state_dict`. Float64, also where theirs says bfloat16, unless said otherwise; no noise, which is drawn.
Prints the largest differences, and what comes of what the two do otherwise: the last norm's Jacobian, and cohorts that are a part of the clients.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from parity import ours
from torch import Tensor
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM

from fedtailor.algorithms import ALGORITHMS
from fedtailor.algorithms.fedmosaic import leading, weights
from fedtailor.core import Job, Layers, Plan, Tree
from fedtailor.data.examples import Subset, store
from fedtailor.losses import language
from fedtailor.metrics import metric

CLIENTS, ROWS, LENGTH, WORDS, FEW, WIDTH, INNER, SHARE, TAU = 6, 24, 12, 60, 8, 64, 48, 0.4, 0.5
DOWN = "model.layers.1.mlp.down_proj.weight"  # INNER is less than WIDTH: rows of the longer axis are outputs, as theirs are


class Wide:
    """torch, but that its short floats are long."""

    bfloat16 = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def parsed(checkout: Path, name: str) -> ast.Module:
    return ast.parse((checkout / name).read_text(encoding="utf-8"))


def function(checkout: Path, file: str, name: str, known: dict[str, Any]) -> Any:
    """A function of one of their files, without what that file imports."""
    found = next(n for n in ast.walk(parsed(checkout, file)) if isinstance(n, ast.FunctionDef) and n.name == name)
    exec(compile(ast.Module([found], []), file, "exec"), known)
    return known[name]


def similarities(checkout: Path, sketches: list[Tensor]) -> Tensor:
    """Their matrix: the statements from `sims = []` to the mean, out of the round's loop."""
    name = "train_VLM_CL.py"
    bodies = [n.body for n in ast.walk(parsed(checkout, name)) if isinstance(n, ast.If)]
    lines = next(b for b in bodies if any(ast.unparse(line) == "sims = []" for line in b))
    start = next(i for i, line in enumerate(lines) if ast.unparse(line) == "sims = []")
    end = next(i for i, line in enumerate(lines) if ast.unparse(line).startswith("sim = torch.stack"))
    known: dict[str, Any] = {"torch": torch, "F": F, "task_vectors": sketches}
    exec(compile(ast.Module(lines[start : end + 1], []), name, "exec"), known)
    found: Tensor = known["sim"]
    return found


def customised(aggregate: Any, trees: list[Tree], sim: Tensor, client: int, active: list[int]) -> Tree:
    """The "global" adapter that their function loads into a client's model."""
    loaded: list[Tree] = []
    model = SimpleNamespace(load_state_dict=lambda tree, strict: loaded.append(dict(tree)))
    locals_ = [{f"lora2.{name}": t for name, t in tree.items()} for tree in trees]
    args = SimpleNamespace(deepspeed="", softmax_temp=TAU)
    told = {"curr_round": 1, "task_similarity": sim, "selected_ids": active}
    aggregate(model, {f"lora1.{name}": t for name, t in trees[0].items()}, locals_, client, args, told)
    return {name.removeprefix("lora1."): t for name, t in loaded[1].items()}


def seen(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[str, Any]:
    """What their function is given: what their hooks note of one forward pass, at the tokens that count."""
    noted: dict[str, Tensor] = {}
    inner: Any = model.model
    hooks = [
        inner.layers[-1].mlp.down_proj.register_forward_hook(lambda m, i, o: noted.__setitem__("inner", i[0])),
        inner.norm.register_forward_hook(lambda m, i, o: noted.__setitem__("before", i[0])),
    ]
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for hook in hooks:
        hook.remove()
    labels = batch["labels"][:, 1:]
    at = labels != -100
    return {
        "logit": logits[:, :-1][at],
        "label": labels[at],
        "weight_last": model.lm_head.weight.detach(),
        "input_penultimate": noted["inner"][:, :-1][at],
        "norm_layer": inner.norm,
        "hidden_states_before_norm": noted["before"][:, :-1][at],
    }


def closed_form(given: dict[str, Any]) -> Tensor:
    """The exact gradient by the last down_proj, with the whole Jacobian of the norm."""
    x, norm = given["hidden_states_before_norm"], given["norm_layer"]
    wrong = given["logit"].softmax(-1) - F.one_hot(given["label"], given["logit"].shape[-1])
    back = (wrong / len(wrong)) @ given["weight_last"] * norm.weight.detach()
    s = (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    back = s * back - x * s**3 * (x * back).mean(-1, keepdim=True)
    return back.T @ given["input_penultimate"]  # type: ignore[no-any-return]


def apart(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def main(folder: str) -> None:
    checkout = Path(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, initializer_range=0.2, **sizes)).double().eval()
    norm: Any = model.model.norm  # the library's computes in float32
    norm.forward = lambda x: norm.weight * x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    ids = [torch.randint(FEW, (LENGTH,)) + FEW * (k // ROWS % 2) for k in range(CLIENTS * ROWS)]
    rows = store({"input_ids": [r.tolist() for r in ids], "labels": [r.tolist() for r in ids]}, {"input_ids": 0, "labels": -100})
    names = [f"c{k}" for k in range(CLIENTS)]
    data = {c: Subset(rows, range(k * ROWS, (k + 1) * ROWS)) for k, c in enumerate(names)}
    tree = {n: p.detach().clone() for n, p in model.named_parameters() if "_proj" in n}

    def part(tree: Tree, wanted: Any) -> Tree:
        return {n: t for n, t in tree.items() if f"layers.{wanted.start}." in n}

    def forward(params: Tree, batch: Any) -> Tensor:
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask")}
        return functional_call(model, params, (), inputs).logits  # type: ignore[no-any-return]

    judged = metric("auto", "language", 0)
    plan = Plan(epochs=2, batch=ROWS, optimizer="sgd", lr=0.05)
    layers = Layers(2, part, lambda trees: {})
    job = Job(language, judged.judge, judged.tally, plan, clients=CLIENTS, layers=layers)
    algorithm = ALGORITHMS["fedmosaic"](job, samples=1, noise=0.0, memory=0.0, share=SHARE, tau=TAU)
    once, twice = (ours(algorithm, forward, tree, dict.fromkeys(names, tree), data, rounds) for rounds in (1, 2))
    mine, trees = list(once[0]["sketches"].values()), list(once[0]["trees"].values())
    assert once[0]["on"] == DOWN

    given = [seen(model, data[c].batch(range(ROWS), LENGTH, ROWS)) for c in names]
    wide = function(checkout, "federated_methods/fedmosaic.py", "get_grad_penultimate", {"torch": Wide(), "F": F})
    theirs = [leading(wide(**g), SHARE) for g in given]
    exact = [leading(closed_form(g), SHARE) for g in given]
    print(
        f"sketch: ours and the exact closed form differ by at most {apart(mine, exact):.1e} of {apart(exact, [0 * t for t in exact]):.1e}"
    )
    near = [float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(mine, theirs, strict=True)]
    print(
        f"sketch: theirs keeps the norm's diagonal: cosine to ours {min(near):.4f} to {max(near):.4f}, difference {apart(mine, theirs):.1e}"
    )
    short = function(checkout, "federated_methods/fedmosaic.py", "get_grad_penultimate", {"torch": torch, "F": F})
    cut = [{n: t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in g.items()} for g in given]
    rounded = [leading(short(**g).double(), SHARE) for g in cut]
    print(f"sketch: theirs in bfloat16, as it runs, differs from theirs in float64 by {apart(rounded, theirs):.1e}")

    sim = similarities(checkout, mine)
    shares = torch.stack(list(weights(dict(zip(names, mine, strict=True)), TAU).values()))
    own_out = sim.clone().fill_diagonal_(-1e9).div(TAU).softmax(1)
    said = " ".join(f"{w:.3f}" for w in shares[0].tolist())
    print(f"weights from one set of sketches differ by at most {apart(shares, own_out):.1e}; the first client's: {said}")
    other = similarities(checkout, theirs).fill_diagonal_(-1e9).div(TAU).softmax(1)
    print(f"weights from their sketches differ from ours by at most {apart(shares, other):.1e}")

    known = {"torch": torch, "load_deepspeed": None}
    aggregate = function(checkout, "federated_methods/fedmosaic_utils.py", "fedmosaic_homo_load_state_dict", known)
    everybody = list(range(CLIENTS))
    found = [customised(aggregate, trees, sim, k, everybody) for k in everybody]
    got = [twice[1][c]["global"] for c in names]
    worst = max(apart([a[n] for n in tree], [b[n] for n in tree]) for a, b in zip(found, got, strict=True))
    moved = max(apart([a[n] for n in tree], [tree[n] for n in tree]) for a in found)
    print(f"customised trees differ by at most {worst:.1e}, which are up to {moved:.1e} from the initial one")
    some = [0, 1, 2]
    part_of = customised(aggregate, trees, sim, 0, some)
    short_by = float(part_of[DOWN].norm() / got[0][DOWN].norm())
    print(
        f"with a cohort of {len(some)} of {CLIENTS} their weights add up to {float(own_out[0, some].sum()):.2f}: a tree {short_by:.2f} as long"
    )


if __name__ == "__main__":
    main(sys.argv[1])
