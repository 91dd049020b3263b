"""Discrete prompts: logits against texts put together by hand, and the search for them against what it must find."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federations import Outcome, by_hand, world_of
from fedtailor.algorithms.prompt_edits import Edits
from fedtailor.algorithms.prompt_search import deal, entries, leader_of, learned, prompt_search
from fedtailor.backbone import Backbone, load, similar_words
from fedtailor.config import ModelSection
from fedtailor.core import Job, Message, Tree
from fedtailor.data.encode import encode
from fedtailor.data.examples import Subset
from fedtailor.data.sources import Rows
from fedtailor.errors import ConfigError
from fedtailor.metrics import metric
from fedtailor.techniques import TECHNIQUES, Technique
from fedtailor.techniques.template import Words, readable, template
from tiny import LABELS

TEXTS = ["the quick brown fox", "lazy dog", "fox jumps over the lazy dog w1 w2", "w3"]
PROMPT = {"template": "over {text} w5 w6", "labels": ["good; fine w7", "bad", "the fine fox"], "examples": [["lazy fox", "bad"]]}


def logits_of(technique: Technique, texts: list[str], **more: Any) -> torch.Tensor:
    backbone = technique.backbone
    rows = encode(Rows({"text": texts, "label": [0] * len(texts)}), "text", backbone.processor, more.get("max_length", 64))
    data = Subset(rows, range(len(texts)))
    width = int(max(data.lengths)) + more.get("extra", 0)
    batch = data.batch(range(len(texts)), width, len(texts))
    with torch.no_grad():
        return technique.bind(False)(technique.init, batch)


def embedded(backbone: Backbone, text: str) -> torch.Tensor:
    inputs = backbone.processor(text, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model.base_model(inputs["input_ids"]).last_hidden_state[0]  # type: ignore[operator,union-attr]
    return hidden.mean(0) / hidden.mean(0).norm()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_encoder_logits_are_cosines_of_the_filled_texts(family: str, backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones(family)
    technique = template(backbone, **PROMPT)
    found = logits_of(technique, TEXTS)
    for row, text in enumerate(TEXTS):
        mine = embedded(backbone, f"over {text} w5 w6")
        classes = [["good", "fine w7"], ["bad", "over lazy fox w5 w6"], ["the fine fox"]]
        for k, said in enumerate(classes):
            mean = torch.stack([embedded(backbone, t) for t in said]).mean(0)
            assert float(found[row, k]) == pytest.approx(20 * float(mine @ mean / mean.norm()), abs=2e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("labels", [["good", "bad", "fine; w9"], ["good fox", "bad", "the fine fox; dog w8"]])
def test_causal_logits_are_mean_log_probabilities(family: str, labels: list[str], folders: Callable[[str], Path]) -> None:
    backbone = load(ModelSection(name=str(folders(family))), "text", LABELS, reads_words=True)
    assert type(backbone.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
    technique = template(backbone, **{**PROMPT, "labels": labels})
    found = logits_of(technique, TEXTS)
    ids = lambda text: backbone.processor(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    for row, text in enumerate(TEXTS):
        for k, label in enumerate(labels):
            scores = []
            for said in label.split("; "):
                read = ids(f"over lazy fox w5 w6 {labels[1].split('; ')[0]} over {text} w5 w6")
                whole = torch.tensor(
                    [[2, *read, *ids(said)]]
                )  # [CLS] opens; what closes stands after the answer and changes nothing
                with torch.no_grad():
                    told = backbone.model(whole).logits[0].float().log_softmax(-1)
                at = range(1 + len(read), whole.shape[1])
                scores.append(np.mean([float(told[i - 1, whole[0, i]]) for i in at]))
            assert float(found[row, k]) == pytest.approx(max(scores), abs=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_text_is_judged_alike_whatever_its_batch(family: str, backbones: Callable[[str], Backbone]) -> None:
    technique = template(backbones(family), **PROMPT)
    together = logits_of(technique, TEXTS, extra=3)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(together[row], logits_of(technique, [text])[0], rtol=0, atol=2e-5)


def test_a_long_text_gives_way_to_the_template(backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones("bert")  # 64 positions
    long = " ".join(["fox", "dog"] * 50)
    short = template(backbone, template="over {text} w5 w6", labels=LABELS)
    kept = " ".join(long.split()[: 64 - 3 - 2])
    torch.testing.assert_close(logits_of(short, [long]), logits_of(short, [kept]), rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match=r"take 6\d of the model's 64 positions"):
        template(backbone, template="w1 " * 58 + "{text}", labels=LABELS)


def test_language_models_read_what_stands_before_the_slot(backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones("llama")
    technique = template(backbone, template="the quick {text}")
    batch = {"input_ids": torch.tensor([[10, 11, 12]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    words = backbone.processor("the quick", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        whole = backbone.model(torch.tensor([[*words, 10, 11, 12]])).logits
        torch.testing.assert_close(technique.bind(False)(technique.init, batch), whole.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"template": "no slot"}, r"needs the slot \{text\}"),
        ({"template": "{text} {text}"}, "exactly once"),
        ({"labels": ["one"]}, "1 texts for 3 classes"),
        ({"labels": ["a", " ; ", "c"]}, "class's text is empty"),
        ({"examples": [["fox", "nice"]]}, "one of the classes"),
    ],
)
def test_what_a_template_refuses(options: dict[str, Any], says: str, backbones: Callable[[str], Backbone]) -> None:
    with pytest.raises(ConfigError, match=says):
        template(backbones("bert"), **options)


def test_images_have_no_template(backbones: Callable[[str], Backbone]) -> None:
    with pytest.raises(ConfigError, match="needs texts"):
        template(backbones("vit"))


def test_it_is_saved_as_it_reads(backbones: Callable[[str], Backbone], tmp_path: Path) -> None:
    technique = template(backbones("bert"), **PROMPT)
    technique.save(technique.init, tmp_path / "new")
    saved = json.loads((tmp_path / "new" / "prompt.json").read_text(encoding="utf-8"))
    assert {k: saved[k] for k in technique.init} == technique.init
    with pytest.raises(ConfigError, match="cannot be merged"):
        technique.merge(technique.init, tmp_path / "merged")


@pytest.mark.parametrize(
    ("name", "words"), [("card_arrival", "card arrival"), ("cardArrival", "card Arrival"), ("sci.space", "sci space"), ("0", "0")]
)
def test_class_names_become_words(name: str, words: str) -> None:
    assert readable(name) == words


def options_of(**changes: Any) -> dict[str, Any]:
    return {"candidates": 5, "keep": 2, "rows": 4, **changes}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "evolv"}, "algorithm.rule cannot be 'evolv': did you mean 'evolve'"),
        ({"by": "f1"}, "algorithm.by"),
        ({"budget": 0}, "algorithm.budget must be at least 1"),
        ({"rows": 0}, "algorithm.rows must be at least 1"),
        ({"keep": 5}, "leaves no room"),
        ({"templates": ["no slot"]}, "needs the slot"),
    ],
)
def test_what_the_search_refuses(options: dict[str, Any], says: str, world: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=says):
        world("prompt-search", technique="template", options=options_of(**options))


def test_the_search_edits_words_only(world: Callable[..., Any]) -> None:
    here = world("prompt-search", options=options_of())
    with pytest.raises(ConfigError, match=r"technique.kind = 'template'"):
        here.algorithm.init(here.technique.init)
    here = world("prompt-search", technique="template", options=options_of(descriptions=[["a"]]))
    with pytest.raises(ConfigError, match="1 lists for 3 classes"):
        here.algorithm.init(here.technique.init)


def tally(nll: float, n: int = 4, correct: int = 0) -> Tree:
    return {"n": torch.tensor(n), "nll": torch.tensor(nll, dtype=torch.float64), "correct": torch.tensor(correct)}


def test_a_candidate_counts_by_its_difference_to_the_leader_on_the_same_rows() -> None:
    pool = entries([{"p": 0}, {"p": 1}, {"p": 2}])
    # 1 is better than 0 where the rows are hard, 2 was only scored where they are easy.
    hard, easy = {"0": tally(8.0), "1": tally(6.0)}, {"0": tally(2.0), "2": tally(1.6)}
    told = learned(pool, [hard, easy], "loss")
    assert [told[n]["rows"] for n in "012"] == [8, 4, 4]
    assert [told[n]["gain"] for n in "012"] == pytest.approx([0, 2.0, 0.4])
    assert leader_of(told) == "1"
    # Now 1 leads with 0.5 a row: what beats it by 0.1 a row stands at (0.4 + 4 * 0.6) / 8.
    again = learned(told, [{"1": tally(4.0), "2": tally(3.6)}], "loss")
    assert again["2"]["gain"] / again["2"]["rows"] == pytest.approx((0.4 + 0.4 + 0.5 * 4) / 8)
    assert again["1"]["gain"] / again["1"]["rows"] == pytest.approx(0.5)
    assert again["0"] == told["0"]
    right = learned(pool, [{"0": tally(1.0, correct=1), "2": tally(9.0, correct=3)}], "accuracy")
    assert right["2"]["gain"] == 2


def test_few_clients_score_few_candidates() -> None:
    pool = entries([{"p": i} for i in range(9)])
    dealt = deal(pool, [f"c{i}" for i in range(6)], 4)
    assert all(len(set(names)) == 5 and names[0] == "0" for names in dealt.values())
    counts = [sum(name in names for names in dealt.values()) for name in map(str, range(1, 9))]
    assert max(counts) - min(counts) <= 1
    pool["0"]["rows"], pool["3"]["rows"], pool["3"]["gain"] = 4.0, 4.0, -1.0  # whoever was scored already comes last
    assert "3" not in deal(pool, ["c0"], 7)["c0"]


def test_the_budget_is_never_exceeded(federation: Callable[..., Outcome]) -> None:
    options = options_of(budget=100)
    spent = [
        int(federation("prompt-search", technique="template", options=options, rounds=n).state["queries"]) for n in (1, 2, 3, 4)
    ]
    assert spent[0] == 3 * 5 * 4
    assert spent[1] == 90  # what is left of the budget, 40, is two rows for each of the 15
    assert spent[3] <= 100
    with pytest.raises(ConfigError, match="does not pay for one row"):
        federation("prompt-search", technique="template", options=options_of(budget=14), rounds=1)


def test_the_bandit_halves_until_one_is_left(world: Callable[..., Any]) -> None:
    here, own = (
        world("prompt-search", technique="template", options={"rule": "bandit", "candidates": 9, "each": 4, "rows": 4}),
        {},
    )
    state, sizes = here.algorithm.init(here.technique.init), []
    for round in range(1, 7):
        state = by_hand(here, state, round, own)
        sizes.append(len(state["pool"]))
    assert sizes[:4] == [5, 3, 2, 1]
    assert state["best"] == next(iter(state["pool"].values()))["prompt"]
    letters = [seen.letter for seen in here.log if seen.letter.verb == "score"]
    assert len(letters) == 4 * 3  # then the search is over
    assert all(len(letter.body) <= 5 for letter in letters)


def test_only_words_go_down_and_only_sums_come_up(federation: Callable[..., Outcome]) -> None:
    outcome = federation("prompt-search", technique="template", options=options_of(), rounds=2)
    asked = [seen for seen in outcome.log if seen.letter.verb == "score"]
    assert len(asked) == 6
    for seen in asked:
        assert set(seen.letter.body["0"] if "0" in seen.letter.body else next(iter(seen.letter.body.values()))) == {
            "template", "labels", "shown", "shown_labels",
        }  # fmt: skip
        for sums in seen.reply.body.values():
            assert set(sums) == {"n", "nll", "correct"}


def test_edits_stay_prompts(backbones: Callable[[str], Backbone]) -> None:
    backbone = backbones("bert")
    start = template(backbone, examples=[["lazy fox", "bad"], ["w1", "good"]]).init
    judged = metric("auto", "text", 3)
    job = Job(len, judged.judge, judged.tally, similar=lambda word: ["fox", "dog"])  # type: ignore[arg-type]
    edits = Edits(job, ["{text}", "over {text}"], [["good"], ["bad", "lazy"], ["fine"]], start, 1)
    prompts = [start]
    for _ in range(300):
        prompts.append(edits.child(prompts[-5:]))
    kinds = set()
    for prompt in prompts:
        assert prompt["template"].count("{text}") == 1
        assert len(prompt["labels"]) == 3
        assert all(label.strip() for label in prompt["labels"])
        assert len(prompt["shown"]) == len(prompt["shown_labels"])
        assert len({*prompt["shown"]}) == len(prompt["shown"])
        kinds.add((prompt["template"] != "{text}", tuple(prompt["labels"]) != tuple(start["labels"]), len(prompt["shown"])))
    assert len(kinds) > 4


def test_similar_words_of_a_real_model() -> None:
    backbone = load(ModelSection(), "text", ["a", "b"])
    assert {"better", "great", "bad"} & set(similar_words(backbone, "good"))
    assert "good" not in similar_words(backbone, "good")
    assert similar_words(backbone, "unquestionablyrare") == []


@pytest.mark.parametrize("rule", ["evolve", "bandit"])
def test_a_search_on_a_real_model_finds_what_the_classes_are(rule: str) -> None:
    """Classes are named by letters; the right descriptions are among the wrong ones. Scores alone must find them."""
    sports = ["the striker scored twice", "our team won the final", "a fast marathon runner", "the coach praised the goalkeeper"]
    food = ["boil the pasta in salt water", "a spicy soup with beans", "bake the bread for an hour", "fresh basil and olive oil"]
    texts, labels = [*sports, *food] * 3, ([0] * 4 + [1] * 4) * 3
    backbone = load(ModelSection(), "text", ["x", "y"], reads_words=True)
    rows = encode(Rows({"text": texts, "label": labels}), "text", backbone.processor, 32)
    judged = metric("auto", "text", 2)
    told = [["a text about cooking", "sports", "the law"], ["a text about sports", "cooking", "a car"]]
    job = Job(len, judged.judge, judged.tally, seed=3)  # type: ignore[arg-type]
    algorithm = prompt_search(job, rule=rule, candidates=12, keep=3, each=6, rows=8, descriptions=told)
    technique = TECHNIQUES["template"](backbone)
    parts = {"a": np.arange(0, 8), "b": np.arange(8, 16)}

    def tallied(tree: Tree) -> Mapping[str, Any]:
        data = Subset(rows, np.arange(len(texts)))
        with torch.no_grad():
            batch = data.batch(range(len(texts)), int(max(data.lengths)), len(texts))
            return judged.tally(judged.judge(technique.bind(False), tree, batch))

    state = algorithm.init(technique.init)
    for round in range(1, 9):
        talk, replies = algorithm.round(state, list(parts)), None
        try:
            letters = next(talk)
            replies = {}
            for client, letter in letters.items():  # type: ignore[union-attr]
                sums = {}
                for name, candidate in letter.body.items():
                    data = Subset(rows, parts[client])
                    batch = data.batch(range(8), int(max(data.lengths)), 8)
                    with torch.no_grad():
                        sums[name] = judged.tally(judged.judge(technique.bind(False), candidate, batch))
                replies[client] = Message("scored", sums, {"n": 8.0, "queries": 8.0 * len(sums)})
            talk.send(replies)
        except StopIteration as end:
            state = end.value
        assert round
    before, after = tallied(technique.init), tallied(state["best"])
    assert float(after["nll"]) < float(before["nll"])
    if rule == "evolve":
        assert int(after["correct"]) >= 22
        assert "sports" in state["best"]["labels"][0] or "cooking" in state["best"]["labels"][1]


def test_passes_count_what_is_read(backbones: Callable[[str], Backbone], folders: Callable[[str], Path]) -> None:
    encoder = template(backbones("bert"))
    one, other = encoder.init, {**encoder.init, "template": "over {text}"}
    relabelled = {**one, "labels": ["w1", "w2", "w3"]}
    assert encoder.passes([one, other, relabelled]) == 2
    causal = template(load(ModelSection(name=str(folders("gpt2"))), "text", LABELS, reads_words=True))
    assert causal.passes([causal.init, {**causal.init, "labels": ["w1", "w2", "w3"]}]) == 1
    assert causal.passes([causal.init, {**causal.init, "labels": ["w1 w2", "w3; w4", "fox"]}]) == 1 + 4
    counted = 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    for technique, trees in (
        (encoder, [one, relabelled, other]),
        (causal, [causal.init, {**causal.init, "labels": ["w1 w2", "w3; w4", "fox"]}]),
    ):
        rows = encode(Rows({"text": TEXTS, "label": [0] * 4}), "text", technique.backbone.processor, 64)
        batch = Subset(rows, range(4)).batch(range(4), 16, 4)
        forward = technique.bind(False)
        for tree in trees:
            with torch.no_grad():
                forward(tree, batch)  # class texts are embedded once and kept
        counted = 0
        handle = next(m for n, m in technique.backbone.model.named_modules() if n).register_forward_hook(count)
        forward = technique.bind(False)
        handle.remove()
        with torch.no_grad():
            for tree in trees:
                forward(tree, batch)
        embeddings = (
            len({t for tree in trees for label in tree["labels"] for t in label.split("; ")}) if technique is encoder else 0
        )
        assert counted - embeddings == technique.passes(trees)


def test_the_engine_charges_forward_passes(federation: Callable[..., Outcome], techniques: Callable[..., Technique]) -> None:
    technique = techniques("bert", "template")
    assert world_of(technique, "bert", "prompt-search", options_of()).job.passes is technique.passes
    outcome = federation("prompt-search", technique="template", options=options_of(), rounds=1)
    pool = itertools.chain.from_iterable(seen.letter.body.values() for seen in outcome.log[:1])
    assert technique.passes(list(pool)) >= 1


def bpe() -> Any:
    """A byte-level tokenizer, to which a space before a word is a part of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(["This text says: hello", "good fox", "bad dog"] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="!")


def test_the_space_before_the_text_is_kept_where_spaces_count() -> None:
    words = Words(bpe())
    before, after = words.pieces({"template": "This text says: {text} It was"})
    text = words.tokens("hello")
    assert bpe().decode([*before, *text, *after]) == "This text says: hello It was"
    solved = {"template": "This text says: {text} It was", "labels": ["good"], "shown": ["fox"], "shown_labels": [0]}
    assert bpe().decode([*words.solved(solved), *before, *text]) == "This text says: fox It was good\n\nThis text says: hello"


def test_operations_of_several_tokens_are_not_counted_twice(folders: Callable[[str], Path]) -> None:
    """What a row is charged is what the real forwards do, whatever the classes' texts."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fedtailor.equip import Kit
    from fedtailor.simulation import _count

    backbone = load(ModelSection(name=str(folders("gpt2"))), "text", LABELS, reads_words=True)
    technique = template(backbone, labels=["w1 w2", "w3; w4 w5", "fox"])
    model = type("M", (), {"job": Job(len, len, len)})()  # type: ignore[arg-type]
    _, looks = _count(model, Kit(backbone, technique), True)
    rows = encode(Rows({"text": ["fox dog fox dog"], "label": [0]}), "text", backbone.processor, 64)
    batch = Subset(rows, range(1)).batch(range(1), 6, 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        technique.bind(False)(technique.init, batch)
    assert looks(1, 6) * technique.passes([technique.init]) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_prompts_never_grow_beyond_the_model(folders: Callable[[str], Path], backbones: Callable[[str], Backbone]) -> None:
    causal = template(load(ModelSection(name=str(folders("gpt2"))), "text", LABELS, reads_words=True))
    grown = {
        **causal.init,
        "template": "w1 w2 w3 w4 {text}",
        "shown": ["the lazy dog jumps over the fox"] * 8,
        "shown_labels": [0] * 8,
    }
    rows = encode(Rows({"text": TEXTS, "label": [0] * 4}), "text", causal.backbone.processor, 64)
    batch = Subset(rows, range(4)).batch(range(4), int(max(Subset(rows, range(4)).lengths)), 4)
    with torch.no_grad():
        assert torch.isfinite(causal.bind(False)(grown, batch)).all()
    language = template(backbones("gpt2"), template="the quick {text}")
    assert language.takes == 2 + 16
    long = {"input_ids": torch.full((1, 64 - language.takes), 9), "attention_mask": torch.ones(1, 64 - language.takes)}
    with torch.no_grad():
        found = language.bind(False)({**language.init, "template": "w1 " * 40 + "{text}"}, long)
    assert found.shape[1] == 64


def test_predict_goes_on_after_the_words_that_were_found(
    folders: Callable[[str], Path], tmp_path: Path, typed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.csv").write_text("text\n" + "\n".join(f"the fox w{k % 29}" for k in range(40)), encoding="utf-8")
    keys = f"model.name={folders('llama')}", "data.name=d.csv", "data.kind=language", "clients.count=3", "rounds=2"
    keys += (
        "technique.kind=template",
        "algorithm.kind=prompt-search",
        "algorithm.candidates=3",
        "algorithm.keep=1",
        "data.max_length=16",
    )
    (tmp_path / "e.toml").write_text("", encoding="utf-8")
    code, _, err = typed("run e.toml --out done " + " ".join(f"--set {key}" for key in keys))
    assert code == 0, err
    summary = json.loads((tmp_path / "done" / "summary.json").read_text(encoding="utf-8"))
    assert summary["prompt"]["template"].endswith("{text}")
    assert json.loads((tmp_path / "done" / "rounds.jsonl").read_text(encoding="utf-8").splitlines()[0])["replies"] == 3
    code, out, err = typed("predict done", "the fox")
    assert code == 0, err
    assert out.strip()
    assert "The prompt" in (tmp_path / "done" / "report.html").read_text(encoding="utf-8")
