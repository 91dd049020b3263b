"""What is done with the passages that were found: a generator reads them, `predict` cites them; and what they may say of a client."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from commands import Printed
from federations import Outcome, world_of
from fedtailor.config import Experiment, parse
from fedtailor.core import SERVER, Told
from fedtailor.data.examples import Subset
from fedtailor.equip import Facts, equip
from fedtailor.errors import ConfigError
from fedtailor.folder import plain
from fedtailor.predict import predict
from fedtailor.run import run
from fedtailor.simulation import build
from fedtailor.techniques import Technique
from fedtailor.techniques.generator import reader
from fedtailor.trees import leaves
from stories import converted, stories
from test_rag import embedded, occurs, written
from tiny import CAUSAL, LABELS

Federation = Callable[..., Outcome]
Techniques = Callable[..., Technique]
Folders = Callable[[str], Path]


class Plain:
    """The same model through transformers alone: no cache, no padding, a forward for each text."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"][:-1])  # [CLS] ... [SEP]: the text goes on

    def told(self, before: list[int], answer: str) -> Told:
        after = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            chances = self.model(torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)[len(before) - 1 : -1]
        hits = (chances.argmax(-1) == torch.tensor(after)).sum()
        return Told(-sum(float(row[token]) for row, token in zip(chances, after, strict=True)), len(after), int(hits))

    def likeliest(self, prompt: str, answers: list[str]) -> int:
        told = [self.told(self.ids(prompt), answer) for answer in answers]
        return min(range(len(told)), key=lambda i: told[i].nll / told[i].tokens)


def agree(ours: Told, theirs: Told) -> None:
    assert ours.nll == pytest.approx(theirs.nll, abs=1e-4)
    assert ours[1:] == theirs[1:]


# The generator


@pytest.mark.parametrize("family", CAUSAL)
def test_likelihoods_and_answers_are_those_of_transformers(family: str, folders: Folders, techniques: Techniques) -> None:
    technique = techniques("bert", "retriever", generator=str(folders(family)), new_tokens=5)
    reads, known = technique.reader, Plain(folders(family))
    assert reads
    assert reads.labels == LABELS
    assert reads.read([2, 5, 6, 3, 0]) == "good bad"
    passages, question, answers = ["w1 fox\ngood\n\n", "w2 dog w3\nbad\n\n"], "the fox\n", ["good", "w4 w5 dog", "bad fine"]
    prompt = "w2 dog w3\nbad\n\nw1 fox\ngood\n\nthe fox\n"  # the nearest last
    for ours, answer in zip(reads.score(passages, question, answers), answers, strict=True):
        agree(ours, known.told(known.ids(prompt), answer))
    agree(reads.score([], question, ["good"])[0], known.told(known.ids(question), "good"))
    assert reads.score(passages, question, [""]) == [Told(0.0, 0, 0)]
    ids = known.ids(prompt)
    for _ in range(5):
        with torch.no_grad():
            ids.append(int(known.model(torch.tensor([ids])).logits[0, -1].argmax()))
    end = ids[len(known.ids(prompt)) :]
    stop = end.index(3) if 3 in end else len(end)  # the model's end of text
    assert reads.write(passages, question) == known.tokenizer.decode(end[:stop], skip_special_tokens=True)


@pytest.mark.parametrize("family", CAUSAL)
def test_what_does_not_fit_goes_the_furthest_first(family: str, folders: Folders, techniques: Techniques) -> None:
    """64 positions, learned or computed."""
    reads = techniques("bert", "retriever", generator=str(folders(family))).reader
    known = Plain(folders(family))
    assert reads
    passages = [f"{f'w{i} ' * 18}\n\n" for i in range(4)]
    fits = passages[2] + passages[1] + passages[0] + "the fox"
    agree(reads.score(passages, "the fox", ["dog w1"])[0], known.told(known.ids(fits), "dog w1"))
    long = "w7 w8 " * 50
    cut = known.ids(long)
    agree(reads.score(passages, long, ["dog w1"])[0], known.told([*cut[:1], *cut[1:][-61:]], "dog w1"))
    assert reads.score(passages, "the fox", ["dog " * 100])[0].tokens == 32  # an answer has half of the positions
    assert isinstance(reads.write(passages, long), str)


# Texts with classes


def found_for(outcome: Outcome, query: torch.Tensor, k: int) -> list[tuple[int, int]]:
    """(client, row) of the k nearest of all rows, the nearest first."""
    names = [(i, r) for i, n in enumerate((6, 7, 8)) for r in range(n)]
    train = embedded(outcome.world, outcome.world.sites(SERVER, 1).data["train"], {})  # type: ignore[arg-type]
    return [names[i] for i in (train @ query).argsort(descending=True)[:k].tolist()]


@pytest.mark.parametrize("access", ["passages", ["passages", "embeddings", "passages"], ["answers", "passages", "nothing"]])
def test_neighbours_as_examples_are_a_prompt_written_by_hand(
    access: Any, folders: Folders, federation: Federation, techniques: Techniques
) -> None:
    topts = {"generator": str(folders("gpt2"))}
    outcome = federation(
        "rag", technique="retriever", topts=topts, options={"use": "prompt", "k": 3, "access": access, "queries": 4}, rounds=1
    )
    known, data = Plain(folders("gpt2")), outcome.world.sites(SERVER, 1).data["test"]
    rules = [access] * 3 if isinstance(access, str) else access
    vectors, right, alone = embedded(outcome.world, data, {}), 0, 0  # type: ignore[arg-type]

    def text(part: Any, row: int) -> tuple[str, str]:
        batch = part.batch([row], int(part.lengths[row]), 1)
        return known.tokenizer.decode(batch["input_ids"][0]), LABELS[int(batch["labels"][0])]

    for q in range(len(data)):
        query, label = text(data, q)
        read = [(i, r) for i, r in found_for(outcome, vectors[q], 99) if rules[i] in ("passages", "embeddings")][:3]
        shown = [text(outcome.world.sites(f"c{i}", 1).data["train"], r) for i, r in read if rules[i] == "passages"]
        prompt = "".join(f"{t}\n{y}\n\n" for t, y in reversed(shown)) + f"{query}\n"
        right += LABELS[known.likeliest(prompt, LABELS)] == label
        alone += LABELS[known.likeliest(f"{query}\n", LABELS)] == label
    told = outcome.answers[SERVER]
    assert (int(told.body["test"]["correct"]), int(told.body["without"]["correct"])) == (right, alone)
    assert told.info["recall_at_k"] == (1.0 if rules[0] == "passages" else pytest.approx(told.info["recall_at_k"]))
    # The generator stands at the server: no client's own test text is asked for.
    assert {s.client for s in outcome.log if s.reply.verb == "embedded"} == {SERVER}
    assert all("test" not in outcome.answers[c].body for c in ("c0", "c1", "c2"))


def test_a_passage_may_be_nobodys_to_read(folders: Folders, federation: Federation) -> None:
    """Where nothing came with text, the prompt has only the query."""
    options = {"use": "prompt", "k": 1, "access": ["passages", "embeddings", "embeddings"]}
    topts = {"generator": str(folders("gpt2"))}
    outcome = federation("rag", technique="retriever", topts=topts, options=options, empty=("c0",), rounds=1)
    told = outcome.answers[SERVER].body
    assert float(told["test"]["nll"]) == float(told["without"]["nll"])


# Texts without classes


@pytest.mark.parametrize("access", ["passages", ["passages", "embeddings", "nothing"]])
def test_perplexity_with_and_without_what_was_found(access: Any, folders: Folders, federation: Federation) -> None:
    """A row is looked up by its first half; the second half is judged after the passages and the first."""
    topts = {"generator": str(folders("llama"))}
    options = {"k": 2, "access": access, "queries": 4}
    outcome = federation("rag", family="gpt2", technique="retriever", topts=topts, options=options)
    known, server = Plain(folders("llama")), outcome.world.sites(SERVER, 1).data
    rules = [access] * 3 if isinstance(access, str) else access
    forward = outcome.world.technique.bind(False)

    def ids(data: Any, row: int) -> list[int]:
        found: list[int] = data.batch([row], int(data.lengths[row]), 1)["input_ids"][0].tolist()
        return found

    def vector(data: Any, row: int) -> torch.Tensor:
        half = torch.tensor([ids(data, row)[: (int(data.lengths[row]) + 1) // 2]])
        return forward({}, {"input_ids": half, "attention_mask": torch.ones_like(half)})[0]

    names = [(i, r) for i, n in enumerate((6, 7, 8)) for r in range(n)]
    with torch.no_grad():
        train = {(i, r): vector(server["train"], at) for at, (i, r) in enumerate(names) if rules[i] != "nothing"}
        sums = {"test": [0.0, 0, 0], "without": [0.0, 0, 0]}
        for q in range(len(server["test"])):
            own, query = ids(server["test"], q), vector(server["test"], q)
            cut = (len(own) + 1) // 2
            question, answer = (known.tokenizer.decode(part) for part in (own[:cut], own[cut:]))
            near = sorted(train, key=lambda at: -float(train[at] @ query))[:2]
            texts = [known.tokenizer.decode(ids(server["train"], names.index(at))) for at in near if rules[at[0]] == "passages"]
            for name, before in (("test", "".join(f"{t}\n\n" for t in reversed(texts))), ("without", "")):
                for place, value in enumerate(known.told(known.ids(before + question), answer)):
                    sums[name][place] += value
    for name, (nll, tokens, hits) in sums.items():
        told = outcome.answers[SERVER].body[name]
        assert float(told["nll"]) == pytest.approx(nll, rel=1e-4)
        assert (int(told["tokens"]), int(told["correct"]), int(told["n"])) == (tokens, hits, 8)
    assert sums["test"] != sums["without"]
    # What leaves a client: no label, and text only where the rule lets it go.
    for s in outcome.log:
        if s.reply.verb == "found":
            rule, data = rules[int(s.client[1])], outcome.world.sites(s.client, 1).data["train"]
            assert "labels" not in s.reply.body
            assert ("passages" in s.reply.body) == (rule == "passages")
            if rule != "passages":
                assert not any(occurs(ids(data, r), t) for r in range(len(data)) for _, t in leaves(s.reply.body))


def instructions(folder: Path, model: Path, generator: Path) -> Experiment:
    folder.mkdir()
    rows = [
        {"instruction": f"the w{i % 7} fox w{i % 5}", "response": f"w{i % 7} dog w{i % 3}", "user": f"u{i % 3}"}
        for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return parse(
        {
            "rounds": 1,
            "model": {"name": str(model)},
            "data": {"name": str(folder / "rows.jsonl")},
            "clients": {"count": 3, "partition": {"kind": "natural", "column": "user"}},
            "technique": {"kind": "retriever", "generator": str(generator), "new_tokens": 4},
            "algorithm": {"kind": "rag", "k": 2, "queries": 4},
        }
    )


def test_instructions_are_answered_with_and_without(folders: Folders, tmp_path: Path, typed: Callable[..., Printed]) -> None:
    experiment = instructions(tmp_path / "data", folders("distilbert"), folders("gpt2"))  # an encoder that has no language head
    summary = run(experiment, tmp_path / "run")
    assert summary["metric"] == "perplexity"
    assert summary["global_test"] == pytest.approx(math.exp(summary["global_test_loss"]))
    assert 1 < summary["without_retrieval"] != summary["global_test"]
    assert summary["clients_mean"] is None
    assert summary["recall_at_k"] == 1.0
    (line,) = predict(tmp_path / "run", ["the w1 fox w2"])
    world = build(experiment)
    assert world.technique.reader
    shown = [f"{p['text']}\n\n" for p in line["passages"]]
    processor = world.backbone.processor
    asked = processor.decode(
        processor("### Instruction:\nthe w1 fox w2\n\n### Response:\n")["input_ids"], skip_special_tokens=True
    )
    assert line["label"] == world.technique.reader.write(shown, asked)
    assert all("the w1 fox" in p["text"] or "fox w2" in p["text"] for p in line["passages"])  # looked up by the instruction
    again = json.loads(typed(f"evaluate {tmp_path / 'run'} --json").out)
    assert (again["global_test"], again["without_retrieval"]) == (summary["global_test"], summary["without_retrieval"])


# Predict


RULES = ["passages", "embeddings", "answers", "nothing"]


@pytest.mark.parametrize("use", ["vote", "prompt"])
def test_predict_cites_what_brute_force_finds(use: str, folders: Folders, tmp_path: Path, typed: Callable[..., Printed]) -> None:
    sections = {
        "algorithm": {"kind": "rag", "k": 3, "queries": 5, "access": RULES, "use": use},
        "clients": {"count": 4, "test": 0.1, "valid": 0.1},
        "technique": {"kind": "retriever", "generator": str(folders("llama"))},
    }
    experiment = written(tmp_path / "data", folders("bert"), **sections)
    run(experiment, tmp_path / "run")
    texts = ["good fox", "w1 w2 lazy dog"]
    found = json.loads(typed(f"predict {tmp_path / 'run'} --json", *texts).out)["predictions"]
    world = build(experiment)
    encoder, tokenizer = transformers.AutoModel.from_pretrained(folders("bert")).eval(), world.backbone.processor

    def vector(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.normalize(encoder(torch.tensor([ids])).last_hidden_state[0].mean(0), dim=0)

    open_rows, own, every = {}, {}, sorted(world.clients)
    for client, rule in zip(every, RULES, strict=True):
        data = world.sites(client, 0).data["train"]
        assert isinstance(data, Subset)
        ids = {r: data.batch([r], int(data.lengths[r]), 1)["input_ids"][0].tolist() for r in range(len(data))}
        vectors = {(client, r): (vector(tokens), tokens) for r, tokens in ids.items()}
        open_rows |= vectors if rule in RULES[:2] else {}
        own |= vectors if rule == "answers" else {}
    for line, text in zip(found, texts, strict=True):
        query = vector(tokenizer(text)["input_ids"])
        cosine = {at: float(v @ query) for at, (v, _) in (open_rows | own).items()}
        best = sorted(open_rows, key=lambda at: -cosine[at])[:3]
        wanted: list[Any] = [(c, r, pytest.approx(cosine[c, r], abs=1e-5)) for c, r in best]
        if use == "vote":  # its answer counts; it names no row
            wanted.append((every[2], None, pytest.approx(max(cosine[at] for at in own), abs=1e-5)))
        assert [(p["client"], p["row"], p["score"]) for p in line["passages"]] == wanted
        for p in line["passages"]:
            there = p["client"] == every[0]
            shown = tokenizer.decode(open_rows[p["client"], p["row"]][1], skip_special_tokens=True) if there else None
            assert p["text"] == shown
        assert line["label"] == world.facts.labels[line["index"]]
        assert len(line["scores"]) == 3
        assert sum(line["scores"]) == pytest.approx(1, abs=1e-5)
    if use == "prompt":
        return
    lines = typed(f"predict {tmp_path / 'run'}", *texts).out.splitlines()
    assert len(lines) == sum(1 + len(line["passages"]) for line in found)
    assert max(map(len, lines)) <= 100
    first = found[0]["passages"][0]
    assert lines[1].startswith(f"  [1] {first['client']}, row {first['row']}, {first['score']:.2f}")
    code, _, err = typed(f"predict {tmp_path / 'run'} good --client {every[0]}")
    assert (code, err.count("\n")) == (2, 1)
    assert "'rag' has no personal models" in err


def test_a_run_may_be_asked_from_another_folder(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folders("gpt2").parent)
    experiment = written(
        tmp_path / "data", folders("bert"), technique={"kind": "retriever", "generator": f"./{folders('gpt2').name}"}
    )
    assert plain(experiment)["technique"]["generator"] == str(folders("gpt2").resolve())


# Mistakes


@pytest.mark.parametrize(
    ("generator", "line"),
    [
        ("bert", "is no causal model (BertForSequenceClassification)"),
        ("./nowhere", "technique.generator: model folder './nowhere' does not exist"),
        ("minilmm", "technique.generator: unknown model 'minilmm': did you mean 'minilm'?"),
    ],
)
def test_what_cannot_read_says_so(generator: str, line: str, folders: Folders, techniques: Techniques) -> None:
    encoder = techniques("bert", "retriever").backbone
    with pytest.raises(ConfigError) as caught:
        reader(str(folders(generator)) if generator == "bert" else generator, encoder, 40)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "generator", "options", "line"),
    [
        ("bert", False, {"use": "prompt"}, "algorithm.use = 'prompt' needs a model that reads: set technique.generator"),
        ("bert", True, {"use": "prompt", "access": "answers"}, "algorithm.access lets no text leave any client"),
        ("bert", True, {"use": "prompt", "access": ["nothing", "embeddings"]}, "algorithm.access lets no text leave any client"),
        ("bert", True, {"use": "promt"}, "algorithm.use cannot be 'promt': did you mean 'prompt'?"),
        ("gpt2", True, {"access": "embeddings"}, "algorithm.access lets no text leave any client"),
        ("gpt2", True, {"access": ["passages", "answers"]}, "'answers' are votes for classes, and this data has none"),
    ],
)
def test_bad_options_are_explained(
    family: str, generator: bool, options: dict[str, Any], line: str, folders: Folders, techniques: Techniques
) -> None:
    technique = techniques(family, "retriever", **({"generator": str(folders("gpt2"))} if generator else {}))
    with pytest.raises(ConfigError) as caught:
        world_of(technique, family, "rag", options)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_too_few_words_and_no_classes(folders: Folders, techniques: Techniques, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"technique\.new_tokens must be at least 1"):
        reader(str(folders("gpt2")), techniques("bert", "retriever").backbone, 0)
    experiment = instructions(tmp_path / "data", folders("bert"), folders("gpt2"))
    alone = experiment.model_copy(update={"algorithm": parse({"algorithm": {"kind": "zero-shot"}}).algorithm})
    with pytest.raises(ConfigError, match=r"set algorithm\.kind = 'rag'"):
        run(alone, tmp_path / "run")


@pytest.mark.parametrize(("kind", "technique"), [("rag", "retriever"), ("distil", "lora"), ("prompt-search", "template")])
def test_error_feedback_is_for_updates(kind: str, technique: str, folders: Folders, tmp_path: Path) -> None:
    facts = Facts("text", LABELS, False, ["a", "b", "c"], public=4)
    sections = {"technique": {"kind": technique}, "algorithm": {"kind": kind}}
    for name in ("int8-plain", "int8"):
        experiment = written(tmp_path / name, folders("bert"), **sections, filters={"up": [name]})
        if name == "int8-plain":
            assert not equip(experiment, facts).algorithm.updates
            continue
        with pytest.raises(ConfigError) as caught:
            equip(experiment, facts)
        assert f"algorithm {kind} are not about the same things: use 'int8-plain'" in str(caught.value)


# Trained weights


def test_a_trained_model_reads_as_transformers_does(backbones: Callable[[str], Any], tmp_path: Path) -> None:
    folder = converted(stories(), tmp_path / "stories")
    read = reader(str(folder), backbones("bert"), 40)
    passages, question = ["Tim had a red ball.\n\n", "Sue had a dog.\n\n"], "Once upon a time, there was a"
    likely, odd = read.score(passages, question, [" little girl named Lily.", " tree the the the the."])
    assert likely.nll / likely.tokens < 0.5 * odd.nll / odd.tokens
    plainly = Plain(folder)
    ids = plainly.tokenizer(
        "Sue had a dog.\n\nTim had a red ball.\n\n" + question + " little girl named Lily.", return_tensors="pt"
    )
    with torch.no_grad():
        chances = plainly.model(**ids).logits[0, :-1].log_softmax(-1)
    nll = -chances.gather(1, ids["input_ids"][0, 1:, None])[-likely.tokens :].sum()
    assert likely.nll == pytest.approx(float(nll), rel=1e-4)
    assert "girl" in read.write([], question)
