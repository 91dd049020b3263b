"""Using a run's model: on texts, pairs of texts, or images; and asking its clients, where the answer is with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedtailor.backbone import Backbone, positions
from fedtailor.core import SERVER, Predict, Site, Tree, stream
from fedtailor.data.encode import PROMPT, encode, shortened
from fedtailor.engines.answering import Crew, Workers, answer
from fedtailor.engines.states import States
from fedtailor.equip import Model
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.evaluation import broadcast_of, gathered, workers
from fedtailor.folder import reopen, writing
from fedtailor.metrics import scores
from fedtailor.simulation import safe
from fedtailor.techniques.generator import greedy
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
    """[{text, label, index, scores}] for classes; for language models `label` is the continuation. Where the clients are asked,
    also what the answer rests on: passages [{client, row, score, text}], row or text None where it stays with its client."""
    model, state, states = reopen(run)
    model, tree = tree_of(model, state, states, client)
    if model.algorithm.consult:
        return _consulted(run, texts)
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
        raise ConfigError(
            "a retriever gives embeddings and no classes: set algorithm.kind = 'rag' for answers with what was found"
        )
    if kind in ("language", "instruction"):
        return _continued(model, tree, texts)
    if kind == "image":
        from PIL import Image

        try:
            columns: dict[str, list[Any]] = {"image": [Image.open(path).convert("RGB") for path in texts]}
        except OSError as error:
            raise DataError(f"image cannot be read: {error}") from error
    else:
        columns = _halves(model, texts)
    columns["label"] = [0] * len(texts)
    store = encode(Rows(columns), kind, model.backbone.processor, model.experiment.data.max_length)
    ask = Predict(scores, tree, Subset(store, range(store.rows)))
    found = answer({"you": ask}, pool.of("you"), lambda c: stream(0), False)["you"]["scores"]
    return [_labelled(model, text, row) for text, row in zip(texts, found, strict=True)]


def _halves(model: Model, texts: list[str]) -> dict[str, list[Any]]:
    """The texts as columns: one, or two where the model reads pairs.

    Raises:
        ConfigError: a pair for a model of single texts, or the other way round.
    """
    halves = [text.split(PAIR) for text in texts]
    if any((len(half) == 2) != model.facts.pairs for half in halves):
        wanted = f"pairs: 'first {PAIR} second'" if model.facts.pairs else f"single texts (no {PAIR})"
        raise ConfigError(f"this model was trained on {wanted}")
    names = ("text", "pair") if model.facts.pairs else ("text",)
    return {name: [half[i].strip() for half in halves] for i, name in enumerate(names)}


def _labelled(model: Model, text: str, scores: torch.Tensor) -> dict[str, Any]:
    best = int(scores.argmax())
    return {"text": text, "label": model.facts.labels[best], "index": best, "scores": scores.tolist()}


def _consulted(run: Path, texts: list[str]) -> list[dict[str, Any]]:
    """The texts put to the clients of the run, in the place of the server's test texts."""
    from fedtailor.data.examples import Subset
    from fedtailor.data.sources import Rows

    with gathered(run) as (world, engine, state):
        kind, processor = world.backbone.kind, world.backbone.processor
        asked = [PROMPT.format(instruction=text) for text in texts] if kind == "instruction" else texts
        columns = _halves(world, texts) if kind == "text" else {"text": asked}
        # Without an answer: all of it is the question, as it is of a text with a class.
        store = encode(Rows({**columns, "label": [0] * len(texts)}), "text", processor, world.experiment.data.max_length)

        def sites(client: str, round: int) -> Site:
            site = world.sites(client, round)
            return site._replace(data={**site.data, "test": Subset(store, range(store.rows))}) if client == SERVER else site

        assert world.algorithm.consult
        talk = world.algorithm.consult(state, sorted(world.clients))
        answers = engine.converse(talk, world.experiment.rounds, sites)
        out: list[dict[str, Any]] = []
        for text, said in zip(texts, answers, strict=True):
            if "scores" in said:
                # A vote knows the classes that it found.
                shares = torch.nn.functional.pad(said["scores"], (0, len(world.facts.labels) - len(said["scores"])))
                line = _labelled(world, text, shares)
            else:
                line = {"text": text, "label": said["text"], "index": None, "scores": []}
            cited = [
                {**{name: one[name] for name in ("client", "row", "score")}, "text": _text(processor, one["tokens"])}
                for one in said["passages"]
            ]
            out.append({**line, "passages": cited})
        return out


def _text(processor: Any, tokens: list[int] | None) -> str | None:
    return None if tokens is None else str(processor.decode(tokens, skip_special_tokens=True))


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
    out: list[dict[str, Any]] = []
    for text in texts:
        asked = [*before, *_asked(model.backbone, text, room)]
        most = NEW if room is None else min(NEW, room + len(before) - len(asked))
        out.append({"text": text, "label": greedy(speaker, tokenizer, asked, most), "index": None, "scores": []})
    return out


def _asked(backbone: Backbone, text: str, room: int | None) -> list[int]:
    """The tokens to go on from. With room for so many in all, part of it is left to the answer: a long text loses its
    beginning, a long instruction its middle, as in training."""
    instruction = backbone.kind == "instruction"  # asked as it was trained
    ids: list[int] = backbone.processor(PROMPT.format(instruction=text) if instruction else text, verbose=False)["input_ids"]
    if room is None:
        return ids
    return shortened(ids, NEW, room) if instruction else ids[-(room - min(NEW, room // 2)) :]
