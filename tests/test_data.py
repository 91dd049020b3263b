"""Sources: the same rows through every format, real benchmark files, wrong files; and their encoding."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtailor.config import DataSection
from fedtailor.data import pydocs as library
from fedtailor.data.encode import TAIL, encode
from fedtailor.data.examples import IGNORED, Subset
from fedtailor.data.sources import EMBEDDED, Rows, Source, load
from fedtailor.errors import ConfigError, DataError

SHARED = Path(os.environ.get("FEDTAILOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
# Quotes, delimiters, newlines, a separator that str.splitlines takes for a newline, words that readers of tables take for "missing".
TEXTS = ["plain", 'a "quoted", word', "two\nlines", "next\x85line", "NA", "null", "007", "naïve 漢字", " spaced ", "tab\there"]
LINES = [text.replace("\n", " ").replace("\t", " ") for text in TEXTS]


def read(path: Path | str, seed: int = 0, **options: Any) -> Source:
    return load(DataSection(name=str(path), **options), seed)


def pairs(rows: Rows) -> list[tuple[Any, ...]]:
    return list(zip(*(rows[name] for name in ("text", "label")), strict=True))


def everything(source: Source) -> list[tuple[Any, ...]]:
    return sorted(pairs(source.train) + pairs(source.test))


def table(path: Path, rows: list[list[Any]], **options: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **options).writerows(rows)
    return path


def rows_of(texts: list[str] = LINES) -> list[dict[str, Any]]:
    return [{"text": text, "label": "yes" if k % 2 else "no", "user": f"u{k % 3}"} for k, text in enumerate(texts)]


def picture(shade: int, suffix: str = "png") -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (6, 4), (shade, 255 - shade, 7)).save(file, "JPEG" if suffix == "jpg" else suffix.upper())
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------------- formats


def as_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return table(folder / "d.csv", [list(rows[0]), *(list(row.values()) for row in rows)])


def as_tsv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    (folder / "d.tsv").write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    return folder / "d.tsv"


def as_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "d.jsonl").write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return folder / "d.jsonl"


def as_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder / "d.json"


def as_json_in_a_key(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "k.json").write_text(json.dumps({"version": 1, "data": rows}), encoding="utf-8")
    return folder / "k.json"


def as_json_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return as_jsonl(folder, rows).rename(folder / "lines.json")


def as_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "d.parquet")
    return folder / "d.parquet"


def as_saved(folder: Path, rows: list[dict[str, Any]]) -> Path:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


FORMATS = (as_csv, as_tsv, as_jsonl, as_json, as_json_in_a_key, as_json_lines, as_parquet, as_saved)


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: str(write.__name__))
def test_every_format_gives_the_same_rows(tmp_path: Path, write: Callable[..., Path]) -> None:
    texts = LINES if write is as_tsv else TEXTS  # a tsv has no way to write a tab or a newline
    source = read(write(tmp_path, rows_of(texts)))
    assert (source.kind, source.labels) == ("text", ["no", "yes"])
    assert everything(source) == sorted((text, k % 2) for k, text in enumerate(texts))
    assert sorted(source.train["user"] + source.test["user"]) == sorted(row["user"] for row in rows_of(texts))


def test_pieces_of_a_split_are_one_split(tmp_path: Path) -> None:
    rows = rows_of()
    for k, part in enumerate((rows[:4], rows[4:8])):
        as_jsonl(tmp_path, part).rename(tmp_path / f"train-0000{k}-of-00002.jsonl")
    as_jsonl(tmp_path, rows[8:]).rename(tmp_path / "test-00000-of-00001.jsonl")
    source = read(tmp_path)
    assert source.train["text"] == LINES[:8]
    assert source.test["text"] == LINES[8:]


# ------------------------------------------------------------------------------------------------------- columns and labels


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    path = table(tmp_path / "d.csv", [["review", "sentiment", "stars"], *([f"r{k}", "ab"[k % 2], str(k % 3)] for k in range(12))])
    assert read(path).labels == ["a", "b"]
    named = read(path, text="sentiment", label="stars")
    assert named.labels == ["0", "1", "2"]
    assert set(named.train["text"]) == {"a", "b"}
    assert set(named.train["review"]) <= {f"r{k}" for k in range(12)}


def test_numbers_are_ordered_by_value_and_words_by_alphabet(tmp_path: Path) -> None:
    for values, names in (([10, 9, 2], ["2", "9", "10"]), ([1.0, 0.0], ["0", "1"]), ([True, False], ["False", "True"])):
        path = as_json(tmp_path, [{"text": f"t{k}", "label": values[k % len(values)]} for k in range(12)])
        source = read(path)
        assert source.labels == names
        assert everything(source) == sorted(
            (f"t{k}", names.index(str(values[k % len(values)]).removesuffix(".0"))) for k in range(12)
        )


def test_pairs_and_their_names(tmp_path: Path) -> None:
    rows = [["premise", "hypothesis", "label"], *([f"p{k}", f"h{k}", k % 2] for k in range(10))]
    source = read(table(tmp_path / "d.csv", rows))
    assert [p[1:] for p in source.train["text"]] == [h[1:] for h in source.train["pair"]]
    swapped = read(tmp_path / "d.csv", pair=("hypothesis", "premise"))
    assert (swapped.train["text"], swapped.train["pair"]) == (source.train["pair"], source.train["text"])
    assert "pair" not in read(tmp_path / "d.csv", text="premise").train.column_names


def test_class_names_of_datasets_are_kept(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    data = {"text": [f"t{k}" for k in range(10)], "label": [k % 2 for k in range(10)]}
    unlabelled = datasets.Dataset.from_dict({**data, "label": [-1] * 10}, features)
    train = datasets.Dataset.from_dict(data, features)
    datasets.DatasetDict({"train": train, "test": unlabelled, "validation": train.select(range(4))}).save_to_disk(tmp_path / "s")
    source = read(tmp_path / "s")
    assert source.labels == ["pos", "neg"]  # not by alphabet
    assert source.train["label"] == data["label"]
    assert source.test["text"] == data["text"][:4]  # a test split with labels of -1 is none


def test_rows_without_text_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": text, "label": k % 2} for k, text in enumerate(["a", "", "b", "  ", "c", "d", None, "e"])]
    with caplog.at_level(logging.WARNING, "fedtailor"):
        source = read(as_json(tmp_path, rows))
    assert sorted(source.train["text"] + source.test["text"]) == ["a", "b", "c", "d", "e"]
    assert "3 rows without text left out" in caplog.text


def test_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(f"line {k}" for k in range(10)), encoding="utf-8")
    book = read(tmp_path / "book.txt")
    assert (book.kind, book.labels, len(book.train), len(book.test)) == ("language", [], 8, 2)
    (tmp_path / "e2e.txt").write_text("\n".join(f"name[{k}]||It is {k}." for k in range(5)), encoding="utf-8")
    told = read(tmp_path / "e2e.txt")
    assert told.kind == "instruction"
    assert {i[5:-1] for i in told.train["instruction"]} == {r[6:-1] for r in told.train["response"]}
    alpaca = read(
        as_json(tmp_path, [{"instruction": f"i{k}", "input": f"c{k}" if k else "", "output": f"o{k}"} for k in range(5)])
    )
    assert {*zip(alpaca.train["instruction"], alpaca.train["response"], strict=True)} < {(f"i{k}", f"o{k}") for k in range(5)}
    assert all(c in ("", f"c{i[1]}") for i, c in zip(alpaca.train["instruction"], alpaca.train["context"], strict=True))
    assert read(as_csv(tmp_path, rows_of()), kind="language").kind == "language"


# ----------------------------------------------------------------------------------------------------- test sets and limits


def test_test_sets_by_file_split_and_fraction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of([f"t{k}" for k in range(40)])
    for name, part in (("train", rows[:30]), ("dev", rows[30:36]), ("test", rows[36:])):
        as_csv(tmp_path, part).rename(tmp_path / f"{name}.csv")
    assert read(tmp_path).test["text"] == ["t36", "t37", "t38", "t39"]
    assert len(read(tmp_path, test="dev").test) == 6
    assert len(read(tmp_path / "train.csv", test="dev.csv").test) == 6  # beside the training file
    monkeypatch.chdir(tmp_path)
    assert len(read("train.csv", test="test.csv").test) == 4
    held = read(tmp_path, test=0.1)
    assert (len(held.train), len(held.test)) == (27, 3)
    assert not set(held.train["text"]) & set(held.test["text"])


def test_a_single_file_is_never_both_training_and_test(tmp_path: Path) -> None:
    """GLUE's QNLI comes as a lone dev.tsv."""
    as_csv(tmp_path, rows_of([f"t{k}" for k in range(20)])).rename(tmp_path / "dev.csv")
    source = read(tmp_path)
    assert not set(source.train["text"]) & set(source.test["text"])
    assert len(source.train) + len(source.test) == 20


def test_a_test_file_without_labels_gives_way_to_dev(tmp_path: Path) -> None:
    as_csv(tmp_path, rows_of()).rename(tmp_path / "train.csv")
    as_csv(tmp_path, rows_of()[:4]).rename(tmp_path / "dev.csv")
    table(tmp_path / "test.csv", [["index", "text"], [0, "x"]])
    assert read(tmp_path).test["text"] == LINES[:4]


def test_held_out_rows_have_the_mix_of_classes(tmp_path: Path) -> None:
    sizes = {"common": 60, "rare": 30, "rarest": 10}
    rows = [{"text": f"{name} {k}", "label": name} for name, size in sizes.items() for k in range(size)]
    path = as_jsonl(tmp_path, rows)
    tests = [read(path, seed).test for seed in (0, 1, 0)]
    for test in tests:
        assert Counter(text.split()[0] for text in test["text"]) == {"common": 12, "rare": 6, "rarest": 2}
    assert tests[0]["text"] == tests[2]["text"] != tests[1]["text"]


def test_limits_are_drawn_by_the_seed(tmp_path: Path) -> None:
    path = as_jsonl(tmp_path, rows_of([f"t{k}" for k in range(100)]))
    whole, some, again, other = (
        read(path, s, limit=n, test_limit=m) for s, n, m in ((0, None, None), (0, 30, 5), (0, 30, 5), (1, 30, 5))
    )
    assert (len(some.train), len(some.test)) == (30, 5)
    assert set(some.train["text"]) < set(whole.train["text"])
    assert set(some.test["text"]) < set(whole.test["text"])
    assert some.train["text"] == again.train["text"] != other.train["text"]


# ------------------------------------------------------------------------------------------------------------------- images


def photographs(domains: bool) -> dict[str, bytes]:
    return {
        f"{f'{domain}/' if domains else ''}{name}/{domain}{k}.png": picture(9 * k)
        for domain in ("art", "photo")
        for name in ("cat", "dog")
        for k in range(3)
    }


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def unpacked(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("domains", [True, False])
def test_a_zip_of_images_is_its_folder(tmp_path: Path, domains: bool) -> None:
    files = photographs(domains)
    extra = {"__MACOSX/cat/._art0.png": b"junk", "readme.txt": b"no image"}
    around = {f"set/{name}": data for name, data in files.items()}  # a folder around everything
    sources = [
        read(zipped(tmp_path / "a.zip", files | extra)),
        read(zipped(tmp_path / "b.zip", around)),
        read(unpacked(tmp_path / "c", files)),
    ]
    for source in sources:
        assert (source.kind, source.labels, len(source.train), len(source.test)) == ("image", ["cat", "dog"], 10, 2)
        assert ("domain" in source.train.column_names) == domains
        assert source.train["label"] == sources[0].train["label"]
        assert not domains or source.train["domain"] == sources[0].train["domain"]
    decoded = [encode(s.train, "image", shades, 0).fixed["pixel_values"] for s in sources]
    assert (decoded[0] == decoded[1]).all()
    assert (decoded[0] == decoded[2]).all()


def test_splits_in_a_zip(tmp_path: Path) -> None:
    files = {
        f"{split}/{name}/{k}.jpg": picture(k, "jpg")
        for split, n in (("train", 4), ("test", 2))
        for name in "ab"
        for k in range(n)
    }
    source = read(zipped(tmp_path / "z.zip", files))
    assert (len(source.train), len(source.test), source.labels) == (8, 4, ["a", "b"])


def test_images_in_tables_of_datasets(tmp_path: Path) -> None:
    import datasets

    bytes_of = [{"bytes": picture(k), "path": None} for k in range(10)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    made = datasets.Dataset.from_dict({"image": bytes_of, "label": [k % 2 for k in range(10)]}, features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(str(tmp_path / "d.parquet"))
    saved, parquet = read(tmp_path / "saved"), read(tmp_path / "d.parquet")
    assert (saved.kind, saved.labels, parquet.kind) == ("image", ["b", "a"], "image")
    one, other = (encode(s.train, "image", shades, 0).fixed["pixel_values"] for s in (saved, parquet))
    assert (one == other).all()


def shades(images: list[Any], return_tensors: str) -> dict[str, Any]:
    """An image processor by hand: channels first, 0 to 1."""
    import torch

    assert return_tensors == "pt"
    return {"pixel_values": torch.from_numpy(np.stack([np.asarray(i).transpose(2, 0, 1) / np.float32(255) for i in images]))}


# ------------------------------------------------------------------------------------------------------------------- wrong


def written(name: str, text: str | bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
        return str(folder / name)

    return write


def many(files: dict[str, str | bytes], name: str = "") -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        for path, text in files.items():
            written(path, text)(folder)
        return str(folder / name)

    return write


def archive(files: dict[str, bytes], damage: bool = False) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        path = zipped(folder / "z.zip", files)
        if damage:
            path.write_bytes(path.read_bytes()[:-30])
        return str(path)

    return write


GOOD = "text,label\n" + "".join(f"t{k},{'ab'[k % 2]}\n" for k in range(10))
NINE = "".join(f"t{k},a\n" for k in range(9))
IDS = "text,label\n" + "".join(f"t{k},{k / 7}\n" for k in range(40))

WRONG: dict[str, tuple[Callable[[Path], str], dict[str, Any], str]] = {
    "missing file": (many({"train.csv": GOOD}, "trian.csv"), {}, r"'.*trian.csv' does not exist: did you mean 'train.csv'\?"),
    "missing folder": (lambda folder: str(folder / "no" / "train.csv"), {}, r"'.*no/train.csv' does not exist$"),
    "nearly embedded": (lambda folder: "pydoc", {}, r"unknown data 'pydoc': did you mean 'pydocs'\?"),
    "empty file": (written("d.csv", ""), {}, r"d.csv' is empty"),
    "blank file": (written("d.csv", "\n\n \n"), {}, r"d.csv' has a header but no rows"),
    "header only": (written("d.csv", "text,label\n"), {}, r"d.csv' has a header but no rows"),
    "empty list": (written("d.json", "[]"), {}, r"d.json' is empty"),
    "unknown suffix": (
        written("d.xlsx", "x"),
        {},
        r"unknown kind '.xlsx': use one of .csv, .tsv, .jsonl, .json, .parquet, .txt or .zip",
    ),
    "too many cells": (written("d.csv", "text,label\na,0\nb,1,2\n"), {}, r"d.csv', line 3: 3 cells where the first line has 2"),
    "after two lines": (written("d.csv", 'text,label\n"a\na",0\nb\n'), {}, r"d.csv', line 4: 1 cells where the first line has 2"),
    "open quote": (written("d.csv", 'text,label\na,0\n"b,1\n'), {}, r"d.csv', line 3: unexpected end of data"),
    "stray quote": (written("d.csv", 'text,label\n"a"b,0\n'), {}, r"d.csv', line 2: ',' expected after '\"'"),
    "column twice": (written("d.csv", "text,text\na,b\n"), {}, r"two columns have the name 'text'"),
    "not utf-8": (written("d.csv", b"text,label\ncaf\xe9,0\n"), {}, r"d.csv' is not UTF-8 \(byte 14\): save it as UTF-8"),
    "bad json line": (written("d.jsonl", '{"text": "a"}\n\n{"text": \n'), {}, r"d.jsonl', line 3: not JSON"),
    "json without objects": (written("d.json", "[1, 2]"), {}, r"d.json', row 1: a int where an object was expected"),
    "json with a gap": (written("d.json", '[{"text": "a"}, {}]'), {}, r"d.json', row 2: no 'text', which the first row has"),
    "not json": (written("d.json", "{'a': 1}"), {}, r"d.json' cannot be read: .* line 1 column 2"),
    "not parquet": (written("d.parquet", "PAR?"), {}, r"d.parquet' cannot be read"),
    "no text column": (
        written("d.csv", "words,label\na,0\nb,1\n"),
        {},
        r"no column for the text among words, label: set data.text",
    ),
    "wrong text column": (written("d.csv", GOOD), {"text": "tekst"}, r"no column 'tekst' \(train\): did you mean 'text'\?"),
    "wrong label column": (written("d.csv", GOOD), {"label": "lable"}, r"no column 'lable' \(train\): did you mean 'label'\?"),
    "wrong pair": (
        written("d.csv", GOOD),
        {"pair": ("text", "other")},
        r"no column 'other' \(train\): choose one of: label, text",
    ),
    "no label column": (
        written("d.csv", "text,x\na,1\n"),
        {"kind": "text"},
        r"no column for the label among text, x: set data.label",
    ),
    "not images": (written("d.csv", GOOD), {"kind": "image"}, r"no column for the image among text, label$"),
    "one class": (written("d.csv", "text,label\n" + NINE), {}, r"all 7 training rows have one class: a classifier needs two"),
    "one class by limit": (written("d.csv", GOOD), {"limit": 1}, r"all 1 training rows have one class"),
    "label missing": (written("d.csv", GOOD + "t10,\n"), {}, r"train row 11: no label in column 'label'"),
    "labels are no classes": (written("d.csv", IDS), {}, r"40 labels in 40 rows are no classes: set data.label"),
    "no text at all": (written("d.csv", "text,label\n,a\n ,b\n"), {}, r"\(train\): no row has text in 'text'"),
    "no response": (
        written("d.json", '[{"instruction": "i", "response": ""}]'),
        {},
        r"no row has text in 'instruction' and 'response'",
    ),
    "too few rows": (written("d.csv", "text,label\na,0\nb,1\n"), {}, r"2 rows are too few to hold out 20% for testing"),
    "unseen label": (
        many({"train.csv": GOOD, "test.csv": "text,label\nx,a\ny,bb\n"}),
        {},
        r"test row 2: label 'bb' is not among the training labels: did you mean 'b'\?",
    ),
    "missing test file": (
        many({"d.csv": GOOD, "test.csv": GOOD}, "d.csv"),
        {"test": "tset.csv"},
        r"tset.csv' does not exist: did you mean 'test.csv'\?",
    ),
    "missing split": (many({"train.csv": GOOD, "dev.csv": GOOD}), {"test": "dve"}, r"has no split 'dve': did you mean 'dev'\?"),
    "no split at all": (written("d.csv", GOOD), {"test": "test"}, r"no split 'test': name a file \(.*\) or a fraction"),
    "no train file": (many({"a.csv": GOOD, "b.csv": GOOD}), {}, r"has no file named train among a.csv, b.csv: name one of them"),
    "columns differ": (
        many({"train-0-of-2.csv": GOOD, "train-1-of-2.csv": GOOD.replace("label", "y")}),
        {},
        r"one file has the columns text, label, another text, y",
    ),
    "empty folder": (
        lambda folder: str(folder),
        {},
        r"holds nothing that can be read: put files \(csv, .*\) or class folders there",
    ),
    "damaged saved folder": (many({"saved/dataset_info.json": "{"}, "saved"), {}, r"saved' cannot be read"),
    "no tab": (many({"books.task.train": "1\tgood\nbad\n"}), {}, r"books.task.train', line 2: no tab between a label and a text"),
    "not a zip": (written("z.zip", "PK?"), {}, r"z.zip' is no zip file, or a damaged one"),
    "cut zip": (archive(photographs(False), damage=True), {}, r"z.zip' is no zip file, or a damaged one"),
    "zip without images": (archive({"a.txt": b""}), {}, r"z.zip' holds no images"),
    "zip without classes": (archive({"a.png": b"", "b/c.png": b""}), {}, r"image 'a.png' lies in no class folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_data_is_explained_in_one_line(tmp_path: Path, case: str) -> None:
    write, options, message = WRONG[case]
    name = write(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        read(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1.5, -0.1])
def test_fractions_that_are_none(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"data.test = {fraction}: as a number it is the fraction to hold out"):
        read(as_csv(tmp_path, rows_of()), test=fraction)


def test_the_hub_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data 'nobody/nothing' is no file, no embedded name \(pydocs\) and cannot be had"
    ) as caught:
        read("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert hub.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


@pytest.mark.parametrize("data", [b"no image", picture(3, "jpg")[:300]], ids=["junk", "cut"])
def test_an_unreadable_image_is_named(tmp_path: Path, data: bytes) -> None:
    files = photographs(False) | {"dog/broken.jpg": data}
    for path in (zipped(tmp_path / "z.zip", files), unpacked(tmp_path / "f", files)):
        source = read(path)
        images = Rows({name: source.train[name] + source.test[name] for name in ("image", "label")})
        with pytest.raises(DataError, match=r"image '.*dog/broken.jpg' cannot be read"):
            encode(images, "image", shades, 0)


# ----------------------------------------------------------------------------------------------------------------- embedded


@pytest.fixture(scope="module")
def docs() -> dict[str, list[Any]]:
    return library.pydocs()


def test_pydocs(docs: dict[str, list[Any]]) -> None:
    counts = Counter(docs["label"])
    assert len(docs["text"]) > 4000
    assert len(counts) == len(library.LABELS) == 10
    assert max(counts.values()) / len(docs["text"]) < 0.25
    assert min(counts.values()) > 200
    assert len(set(docs["text"])) == len(docs["text"])
    assert len(set(docs["module"])) > 100


def test_pydocs_holds_what_the_modules_say(docs: dict[str, list[Any]]) -> None:
    import inspect
    import textwrap
    import threading

    for thing, module, chapter in (
        (textwrap.dedent, "textwrap", "text and data types"),
        (threading.Thread.join, "threading", "concurrency"),
        (json.JSONDecoder, "json", "markup and messages"),
    ):
        first = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")
        row = docs["text"].index(first)
        assert (docs["module"][row], library.LABELS[docs["label"][row]]) == (module, chapter)


def test_each_module_has_one_chapter() -> None:
    assert [m for m, n in Counter(" ".join(library.CHAPTERS.values()).split()).items() if n > 1] == []


def test_embedded_data_are_listed_and_load(docs: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all((function.__doc__ or "").strip() for function in EMBEDDED.values())
    monkeypatch.setattr("fedtailor.data.sources.EMBEDDED", {"pydocs": lambda: docs})
    source = read("pydocs", limit=500)
    assert (source.kind, source.labels, len(source.train)) == ("text", library.LABELS, 500)
    assert source.train.column_names == ["text", "label", "module"]
    number = dict(zip(docs["text"], docs["label"], strict=True))
    assert all(number[text] == label for text, label in pairs(source.train))


# ------------------------------------------------------------------------------------------------------------ encoding


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from fedtailor.backbone import EMBEDDED as MODELS

    return AutoTokenizer.from_pretrained(MODELS["minilm"]())


def rows_in(store: Any, name: str) -> list[list[int]]:
    return [part.tolist() for part in np.split(store.ragged[name], store.offsets[1:-1])]


def test_texts_and_pairs_are_what_the_tokenizer_says(tokenizer: Any) -> None:
    texts, seconds = ["One.", "A much longer text, to be cut."], ["Two?", "Three and four."]
    alone = encode(Rows({"text": texts, "label": [1, 0]}), "text", tokenizer, 6)
    assert rows_in(alone, "input_ids") == [tokenizer(t, truncation=True, max_length=6)["input_ids"] for t in texts]
    assert alone.fixed["labels"].tolist() == [1, 0]
    assert set(alone.ragged) == {"input_ids"}
    both = encode(Rows({"text": texts, "pair": seconds, "label": [1, 0]}), "text", tokenizer, 32)
    for name in ("input_ids", "token_type_ids"):
        assert rows_in(both, name) == [tokenizer(a, b)[name] for a, b in zip(texts, seconds, strict=True)]


def test_a_padded_batch_is_the_tokenizers(tokenizer: Any) -> None:
    texts = ["One.", "A longer text.", "x"]
    store = encode(Rows({"text": texts, "label": [0, 1, 0]}), "text", tokenizer, 16)
    ours = Subset(store, range(3)).batch(range(3), 8, 3)
    theirs = tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
    for name in ("input_ids", "attention_mask"):
        assert (ours[name] == theirs[name]).all()


@pytest.fixture
def ending(tokenizer: Any) -> Iterator[Any]:
    """The tokenizer with an end-of-text token, as causal models have one."""
    tokenizer.eos_token = "[unused5]"
    yield tokenizer
    tokenizer.eos_token = None


def test_language_rows_end_and_are_cut(ending: Any) -> None:
    store = encode(Rows({"text": ["a b", "a b c d e f g"]}), "language", ending, 6)
    short, long = rows_in(store, "input_ids")
    assert short == [*ending("a b")["input_ids"], ending.eos_token_id]
    assert long == ending("a b c d e f g")["input_ids"][:6]
    assert rows_in(store, "labels") == [short, long]


def test_an_instructions_labels_are_its_response(ending: Any) -> None:
    rows = {"instruction": ["Add.", "Greet."], "context": ["1 and 2", ""], "response": ["It is 3.", "Hello!"]}
    store = encode(Rows(rows), "instruction", ending, 64)
    for ids, labels, response, context in zip(
        rows_in(store, "input_ids"), rows_in(store, "labels"), rows["response"], rows["context"], strict=True
    ):
        answer = [*ending(response, add_special_tokens=False)["input_ids"], ending.eos_token_id]
        counted = [k for k in labels if k != IGNORED]
        assert counted == answer == ids[-len(answer) :]
        assert labels[: -len(answer)] == [IGNORED] * (len(ids) - len(answer))
        assert ("context" in ending.decode(ids)) == bool(context)


def test_a_long_prompt_leaves_room_for_the_answer(ending: Any) -> None:
    rows = {"instruction": ["why " * 200, "why " * 200], "context": ["", ""], "response": ["yes", "no " * 200]}
    store = encode(Rows(rows), "instruction", ending, 40)
    assert store.lengths.tolist() == [40, 40]
    counted = [[k for k in labels if k != IGNORED] for labels in rows_in(store, "labels")]
    assert counted[0] == [*ending("yes", add_special_tokens=False)["input_ids"], ending.eos_token_id]
    assert len(counted[1]) == 20
    whole = ending("why " * 200 + "\n\n### Response:\n")["input_ids"]
    assert rows_in(store, "input_ids")[1][20 - TAIL : 20] == whole[-TAIL:]
    tiny = encode(Rows(rows), "instruction", ending, 4)
    assert tiny.lengths.tolist() == [4, 4]


def test_pixels_are_resized_and_normalised() -> None:
    from PIL import Image
    from transformers import ViTImageProcessorPil

    images = [
        Image.open(io.BytesIO(picture(k))).convert(mode) for k, mode in ((10, "RGB"), (200, "RGB"), (90, "L"), (70, "RGBA"))
    ]
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    store = encode(Rows({"image": images * 20, "label": [0, 1, 0, 1] * 20}), "image", processor, 0)
    pixels = store.fixed["pixel_values"]
    assert pixels.shape == (80, 3, 8, 8)
    assert str(pixels.dtype) == "torch.float32"
    by_hand = [
        (np.asarray(i.convert("RGB").resize((8, 8), Image.Resampling.BILINEAR), dtype=np.float32).transpose(2, 0, 1) / 255 - 0.5)
        / 0.25
        for i in images
    ]
    np.testing.assert_allclose(pixels[76:].numpy(), np.stack(by_hand), atol=1e-5)
    assert store.rows == 80
    assert set(store.lengths.tolist()) == {1}


# ---------------------------------------------------------------------------------------------------------- real benchmarks


def real(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {path}: put the data sets there, or set FEDTAILOR_DATA to their folder")
    return path


@pytest.mark.parametrize(
    ("name", "options", "kind", "train", "test", "classes", "columns"),
    [
        ("glue/sst2", {}, "text", 67349, 872, 2, {"text", "label"}),
        ("glue/cola", {}, "text", 8551, 1043, 2, {"text", "label", "column0", "column2"}),
        ("glue/mrpc", {}, "text", 3667, 408, 2, {"text", "pair", "label", "#1 ID", "#2 ID"}),
        ("glue/qnli", {}, "text", 4370, 1093, 2, {"text", "pair", "label", "index"}),
        ("banking77", {}, "text", 10003, 3080, 77, {"text", "label"}),
        ("fdu_mtl", {}, "text", 25379, 6400, 2, {"text", "label", "domain"}),
        ("dolly_shepherd", {}, "instruction", 20705, 160, 0, {"instruction", "context", "response", "category", "client"}),
        ("e2e/src1_valid.txt", {"test": "src1_test.txt"}, "instruction", 4672, 4693, 0, {"instruction", "context", "response"}),
        ("pacs/pacs64.zip", {}, "image", 7993, 1998, 7, {"image", "label", "domain"}),
        ("cifar10/cifar10_jpg_20k_train_10k_test.zip", {}, "image", 20000, 10000, 10, {"image", "label"}),
    ],
    ids=lambda value: value if isinstance(value, str) and "/" in value else None,
)
def test_real_sets(name: str, options: dict[str, Any], kind: str, train: int, test: int, classes: int, columns: set[str]) -> None:
    source = read(real(name), **options)
    assert (source.kind, len(source.train), len(source.test), len(source.labels)) == (kind, train, test, classes)
    assert set(source.train.column_names) == columns
    if classes:
        assert set(source.train["label"]) == set(range(classes))


def test_real_domains_are_whole() -> None:
    source = read(real("fdu_mtl"))
    counts = Counter(zip(source.test["domain"], source.test["label"], strict=True))
    assert set(counts) == {(domain, label) for domain in set(source.train["domain"]) for label in (0, 1)}
    assert set(Counter(source.test["domain"]).values()) == {400}
    assert len(set(source.train["domain"])) == 16
