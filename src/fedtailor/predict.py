"""Using a run's model: on texts, pairs of texts, or images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtailor.core import Predict, Tree, stream
from fedtailor.engines.answering import answer
from fedtailor.engines.local import Local
from fedtailor.engines.states import States
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.metrics import scores
from fedtailor.run import broadcast_of, reopen
from fedtailor.simulation import World

PAIR = "|||"


def tree_of(world: World, state: Tree, states: States, client: str | None) -> Tree:
    """The global tree, or a client's personal one.

    Raises:
        ConfigError: no such client, or an algorithm without personal models.
    """
    if client is None:
        return world.algorithm.model(state)
    if client not in world.clients:
        raise ConfigError(f"no client '{client}': {nearest(client, world.clients)}")
    if world.algorithm.personal is None:
        raise ConfigError(f"algorithm '{world.experiment.algorithm.kind}' has no personal models: leave --client out")
    own = states.read_own(client).get("algorithm")
    return world.algorithm.personal(own, broadcast_of(world, state, client), world.sites(client, 0))


def predict(run: Path, texts: list[str], client: str | None = None) -> list[dict[str, Any]]:
    """[{text, label, index, scores}] for classes; for language models `label` is the continuation."""
    world, engine, state, states = reopen(run)
    try:
        return _predicted(world, engine, tree_of(world, state, states, client), texts)
    finally:
        engine.close()


def _predicted(world: World, engine: Local, tree: Tree, texts: list[str]) -> list[dict[str, Any]]:
    from fedtailor.data.encode import encode
    from fedtailor.data.examples import Subset
    from fedtailor.data.sources import Rows

    kind = world.backbone.kind
    if kind in ("language", "instruction"):
        return _continued(world, tree, texts)
    columns: dict[str, list[Any]] = {"label": [0] * len(texts)}
    if kind == "image":
        from PIL import Image

        try:
            columns["image"] = [Image.open(path).convert("RGB") for path in texts]
        except OSError as error:
            raise DataError(f"image cannot be read: {error}") from error
    else:
        halves = [text.split(PAIR) for text in texts]
        pairs = "pair" in world.columns
        if any((len(half) == 2) != pairs for half in halves):
            wanted = f"pairs: 'first {PAIR} second'" if pairs else f"single texts (no {PAIR})"
            raise ConfigError(f"this model was trained on {wanted}")
        columns["text"] = [half[0].strip() for half in halves]
        if pairs:
            columns["pair"] = [half[1].strip() for half in halves]
    store = encode(Rows(columns), kind, world.backbone.processor, world.experiment.data.max_length)
    ask = Predict(scores, tree, Subset(store, range(store.rows)))
    found = answer({"you": ask}, engine.workers, lambda c: stream(0), False)["you"]["scores"]
    best = found.argmax(1).tolist()
    return [
        {"text": text, "label": world.labels[i], "index": i, "scores": row.tolist()}
        for text, i, row in zip(texts, best, found, strict=True)
    ]


def _continued(world: World, tree: Tree, texts: list[str]) -> list[dict[str, Any]]:
    """Greedy continuations, through PEFT's own generate."""
    import copy
    import tempfile

    from peft import PeftModel

    from fedtailor.data.encode import PROMPT

    tokenizer = world.backbone.processor
    with tempfile.TemporaryDirectory() as folder:
        world.technique.save(tree, Path(folder))
        if world.technique.kind == "full":
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(folder)
        else:
            model = PeftModel.from_pretrained(copy.deepcopy(world.backbone.model), folder)
    out = []
    for text in texts:
        # An instruction model is asked as it was trained.
        asked = PROMPT.format(instruction=text) if world.backbone.kind == "instruction" else text
        inputs = tokenizer(asked, return_tensors="pt").to(world.device)
        ids = model.eval().generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        out.append({"text": text, "label": new, "index": None, "scores": []})
    return out
