"""Using a run's model: on texts, pairs of texts, or images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from fedtailor.backbone import Backbone, positions
from fedtailor.core import Predict, Tree, stream
from fedtailor.data.encode import PROMPT, encode, shortened
from fedtailor.engines.answering import Crew, Workers, answer
from fedtailor.engines.states import States
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.evaluation import broadcast_of, workers
from fedtailor.folder import reopen, writing
from fedtailor.metrics import scores
from fedtailor.simulation import Model, safe
from fedtailor.techniques.peft import positions_taken
from fedtailor.techniques.template import Words

PAIR = "|||"
NEW = 40  # tokens that a continuation has at most


def tree_of(model: Model, state: Tree, states: States, client: str | None) -> tuple[Model, Tree]:
    """The global tree, or a client's personal one, and the model that it bends.

    Raises:
        ConfigError: no such client, or an algorithm without personal models.
    """
    if client is None:
        return model, model.algorithm.model(state)
    client = safe(client)  # also as the data writes it
    if client not in model.facts.clients:
        raise ConfigError(f"no client '{client}': {nearest(client, model.facts.clients)}")
    if model.algorithm.personal is None:
        raise ConfigError(f"algorithm '{model.experiment.algorithm.kind}' has no personal models: leave --client out")
    own = states.read_own(client).get("algorithm")
    tree = model.algorithm.personal(own, broadcast_of(model, state, client), model.site(client, 0))
    return model.seen_by(client), tree


def predict(run: Path, texts: list[str], client: str | None = None) -> list[dict[str, Any]]:
    """[{text, label, index, scores}] for classes; for language models `label` is the continuation."""
    model, state, states = reopen(run)
    model, tree = tree_of(model, state, states, client)
    pool = workers(model)
    try:
        return _predicted(model, pool, tree, texts)
    finally:
        pool.close()


def _predicted(model: Model, pool: Workers | Crew, tree: Tree, texts: list[str]) -> list[dict[str, Any]]:
    from fedtailor.data.examples import Subset
    from fedtailor.data.sources import Rows

    kind = model.backbone.kind
    if model.technique.kind == "retriever":
        raise ConfigError("a retriever gives embeddings and no classes: `fedtailor evaluate` says what is found with it")
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
    found = answer({"you": ask}, pool.of("you"), lambda c: stream(0), False)["you"]["scores"]
    best = found.argmax(1).tolist()
    return [
        {"text": text, "label": model.facts.labels[i], "index": i, "scores": row.tolist()}
        for text, i, row in zip(texts, best, found, strict=True)
    ]


def _continued(model: Model, tree: Tree, texts: list[str]) -> list[dict[str, Any]]:
    """Greedy continuations of up to NEW tokens, through PEFT's own generate; they end where the model's positions end.

    Raises:
        RunError: the temporary folder is full.
    """
    import copy
    import tempfile

    from peft import PeftModel

    tokenizer = model.backbone.processor
    with writing(), tempfile.TemporaryDirectory() as folder:
        model.technique.save(tree, Path(folder))
        if model.technique.kind == "template":
            speaker: Any = model.backbone.model
        elif model.technique.kind == "full":
            from transformers import AutoModelForCausalLM

            speaker = AutoModelForCausalLM.from_pretrained(folder)
        else:
            speaker = PeftModel.from_pretrained(copy.deepcopy(model.backbone.model), folder)
    speaker = speaker.eval().to(model.job.device)
    limit = positions(model.backbone)
    room = None if limit is None else limit - positions_taken(model.technique)
    before = Words(tokenizer).pieces(tree).before[-model.technique.takes :] if model.technique.kind == "template" else []
    out = []
    for text in texts:
        asked = torch.tensor([[*before, *_asked(model.backbone, text, room)]], device=model.job.device)
        start = asked.shape[1]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported")  # PEFT, of what transformers gives it
            ids = speaker.generate(
                input_ids=asked,
                attention_mask=torch.ones_like(asked),
                max_new_tokens=NEW if room is None else min(NEW, room + len(before) - start),
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        out.append({"text": text, "label": new, "index": None, "scores": []})
    return out


def _asked(backbone: Backbone, text: str, room: int | None) -> list[int]:
    """The tokens to go on from. With room for so many in all, part of it is left to the answer: a long text loses its
    beginning, a long instruction its middle, as in training."""
    instruction = backbone.kind == "instruction"  # asked as it was trained
    ids: list[int] = backbone.processor(PROMPT.format(instruction=text) if instruction else text, verbose=False)["input_ids"]
    if room is None:
        return ids
    return shortened(ids, NEW, room) if instruction else ids[-(room - min(NEW, room // 2)) :]
