"""Using a run's model: on texts, pairs of texts, or images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedtailor.core import Predict, Tree, stream
from fedtailor.engines.answering import Workers, answer
from fedtailor.engines.states import States
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.evaluation import broadcast_of, workers
from fedtailor.folder import reopen
from fedtailor.metrics import scores
from fedtailor.simulation import Model

PAIR = "|||"


def tree_of(model: Model, state: Tree, states: States, client: str | None) -> Tree:
    """The global tree, or a client's personal one.

    Raises:
        ConfigError: no such client, or an algorithm without personal models.
    """
    if client is None:
        return model.algorithm.model(state)
    if client not in model.facts.clients:
        raise ConfigError(f"no client '{client}': {nearest(client, model.facts.clients)}")
    if model.algorithm.personal is None:
        raise ConfigError(f"algorithm '{model.experiment.algorithm.kind}' has no personal models: leave --client out")
    own = states.read_own(client).get("algorithm")
    return model.algorithm.personal(own, broadcast_of(model, state, client), model.site(client, 0))


def predict(run: Path, texts: list[str], client: str | None = None) -> list[dict[str, Any]]:
    """[{text, label, index, scores}] for classes; for language models `label` is the continuation."""
    model, state, states = reopen(run)
    pool = workers(model)
    try:
        return _predicted(model, pool, tree_of(model, state, states, client), texts)
    finally:
        pool.close()


def _predicted(model: Model, pool: Workers, tree: Tree, texts: list[str]) -> list[dict[str, Any]]:
    from fedtailor.data.encode import encode
    from fedtailor.data.examples import Subset
    from fedtailor.data.sources import Rows

    kind = model.backbone.kind
    if kind in ("language", "instruction"):
        return _continued(model, tree, texts)
    columns: dict[str, list[Any]] = {"label": [0] * len(texts)}
    if kind == "image":
        from PIL import Image

        try:
            columns["image"] = [Image.open(path).convert("RGB") for path in texts]
        except OSError as error:
            raise DataError(f"image cannot be read: {error}") from error
    else:
        halves = [text.split(PAIR) for text in texts]
        if any((len(half) == 2) != model.facts.pairs for half in halves):
            wanted = f"pairs: 'first {PAIR} second'" if model.facts.pairs else f"single texts (no {PAIR})"
            raise ConfigError(f"this model was trained on {wanted}")
        columns["text"] = [half[0].strip() for half in halves]
        if model.facts.pairs:
            columns["pair"] = [half[1].strip() for half in halves]
    store = encode(Rows(columns), kind, model.backbone.processor, model.experiment.data.max_length)
    ask = Predict(scores, tree, Subset(store, range(store.rows)))
    found = answer({"you": ask}, pool, lambda c: stream(0), False)["you"]["scores"]
    best = found.argmax(1).tolist()
    return [
        {"text": text, "label": model.facts.labels[i], "index": i, "scores": row.tolist()}
        for text, i, row in zip(texts, best, found, strict=True)
    ]


def _continued(model: Model, tree: Tree, texts: list[str]) -> list[dict[str, Any]]:
    """Greedy continuations, through PEFT's own generate."""
    import copy
    import tempfile

    from peft import PeftModel

    from fedtailor.data.encode import PROMPT

    tokenizer = model.backbone.processor
    with tempfile.TemporaryDirectory() as folder:
        model.technique.save(tree, Path(folder))
        if model.technique.kind == "full":
            from transformers import AutoModelForCausalLM

            speaker = AutoModelForCausalLM.from_pretrained(folder)
        else:
            speaker = PeftModel.from_pretrained(copy.deepcopy(model.backbone.model), folder)
    out = []
    for text in texts:
        # An instruction model is asked as it was trained.
        asked = PROMPT.format(instruction=text) if model.backbone.kind == "instruction" else text
        inputs = tokenizer(asked, return_tensors="pt").to(model.job.device)
        ids = speaker.eval().generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        new = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        out.append({"text": text, "label": new, "index": None, "scores": []})
    return out
