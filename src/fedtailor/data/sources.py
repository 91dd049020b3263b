"""Where data comes from: embedded, a file, a folder, a zip of images, or the hub. `load` normalises the columns.

    text         text, [pair], label        image         image, label
    language     text                       instruction   instruction, context, response
Other columns are kept: a partition may be natural by one of them.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from fedtailor.config import DataSection
from fedtailor.core import seed_of
from fedtailor.data.pydocs import LABELS, pydocs
from fedtailor.errors import ConfigError, DataError, nearest

EMBEDDED: Mapping[str, Callable[[], dict[str, list[object]]]] = {"pydocs": pydocs}
TEXTS = ("text", "sentence", "sentence1", "content", "review", "question", "comment", "utterance", "document", "#1 String")
PAIRS = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("#1 String", "#2 String"),
)
LABEL_NAMES = ("label", "labels", "category", "class", "target", "coarse_label", "fine_label", "Quality", "sentiment")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt")
HELD_OUT = 0.2
Columns = dict[str, list[Any]]


class Rows:
    """Columns of equal length. Plain lists: `datasets` and its tables (90 MB) are loaded only where a file needs them."""

    def __init__(self, columns: Columns) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        return self.columns[name]

    @property
    def column_names(self) -> list[str]:
        return list(self.columns)

    def select(self, rows: np.ndarray) -> Rows:
        return Rows({name: [values[k] for k in rows] for name, values in self.columns.items()})


class Source(NamedTuple):
    kind: str  # text | image | language | instruction
    train: Rows
    test: Rows
    labels: list[str]  # class names; [] for language and instruction
    name: str


def load(config: DataSection, seed: int) -> Source:
    """The rows that `[data]` names, columns normalised, limited and with a test set.

    Raises:
        DataError: missing, empty or malformed files, one class only, a label that training lacks: what, where, what to do.
    """
    train, test, names = _read(config)
    kind = _kind(config, train)
    train = _normalised(config, kind, train)
    test = _normalised(config, kind, test) if test is not None else None
    labels: list[str] = []
    if kind in ("text", "image"):
        labels = names or _labels(train)
        train = _indexed(train, labels, config.name)
        test = _indexed(test, labels, config.name) if test is not None else None
        if len(set(train["label"])) < 2:
            raise DataError(
                f"data '{config.name}': all {len(train['label'])} training rows have one class: a classifier needs two"
            )
    rows, held = Rows(train), Rows(test or {})
    if test is None:
        rows, held = _hold_out(rows, config.test if isinstance(config.test, float) else HELD_OUT, seed, config.name)
    return Source(
        kind, _limited(rows, config.limit, seed, "limit"), _limited(held, config.test_limit, seed, "test"), labels, config.name
    )


def _read(config: DataSection) -> tuple[Columns, Columns | None, list[str]]:
    """(training columns, test columns if there are any, class names if the source knows them)."""
    if config.name in EMBEDDED:
        return EMBEDDED[config.name](), None, list(LABELS)
    path = Path(config.name).expanduser()
    if path.is_dir():
        for reader in FOLDERS:
            found = reader(path, config)
            if found is not None:
                return found
        raise DataError(
            f"data folder '{path}' holds nothing that can be read: put csv, tsv, jsonl or parquet files or class folders there"
        )
    if path.is_file():
        if path.suffix == ".zip":
            return _zipped(path)
        test = _table(_beside(path, config.test)) if isinstance(config.test, str) else None
        return _table(path), test, []
    if path.suffix in (*TABLES, ".zip") or path.is_absolute() or config.name.startswith((".", "~")):
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data file '{path}' does not exist" + (f": {nearest(path.name, there)}" if there else ""))
    if "/" not in config.name and nearest(config.name, EMBEDDED).startswith("did"):
        raise DataError(f"unknown data '{config.name}': {nearest(config.name, EMBEDDED)}")
    return _hub(config)


def _hub(config: DataSection) -> tuple[Columns, Columns | None, list[str]]:
    import datasets

    try:
        found = datasets.load_dataset(config.name, config.subset)
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"data '{config.name}' is no file, no embedded name ({', '.join(EMBEDDED)}) and cannot be had from the hub: {reason}"
        ) from error
    return _splits(found, config)


def _splits(found: Any, config: DataSection) -> tuple[Columns, Columns | None, list[str]]:
    splits = dict(found) if hasattr(found, "keys") else {"train": found}
    train = splits.get("train", next(iter(splits.values())))
    wanted = config.test if isinstance(config.test, str) else next((n for n in ("test", "validation") if n in splits), None)
    if isinstance(config.test, str) and config.test not in splits:
        raise DataError(f"data '{config.name}' has no split '{config.test}': {nearest(config.test, splits)}")
    column = config.label or next((n for n in LABEL_NAMES if n in train.column_names), "")
    names = getattr(train.features.get(column), "names", None) or []
    test = splits[wanted].to_dict() if wanted else None
    return train.to_dict(), test, list(names)


def _table(path: Path) -> Columns:
    """A csv, tsv, jsonl, json, parquet or txt file as columns."""
    if not path.is_file():
        there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data file '{path}' does not exist: {nearest(path.name, there)}")
    if path.stat().st_size == 0:
        raise DataError(f"data file '{path}' is empty")
    try:
        rows = _READERS[path.suffix](path)
    except KeyError as error:
        raise DataError(f"data file '{path}': unknown kind '{path.suffix}': use one of {', '.join(_READERS)}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"data file '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    if not rows or not len(next(iter(rows.values()))):
        raise DataError(f"data file '{path}' has a header but no rows")
    return rows


def _delimited(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Columns:
    with path.open(encoding="utf-8-sig", newline="", errors="strict") as file:
        lines = list(csv.reader(file, delimiter=delimiter, quoting=quoting, strict=quoting != csv.QUOTE_NONE))
    lines = [line for line in lines if line]
    head, body = lines[0], lines[1:]
    if any(cell.strip().lstrip("-").isdigit() for cell in head):  # CoLA: no header, the second cell is a label
        head, body = [f"column{k}" for k in range(len(head))], lines
    for number, line in enumerate(body, 2):
        if len(line) != len(head):
            raise DataError(f"data file '{path}', row {number}: {len(line)} cells where the header has {len(head)}")
    return {name: [line[k] for line in body] for k, name in enumerate(head)}


def _csv(path: Path) -> Columns:
    return _delimited(path, ",", csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Columns:
    return _delimited(path, "\t", csv.QUOTE_NONE)  # GLUE's files have stray quotes


def _jsonl(path: Path) -> Columns:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"data file '{path}', line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"data file '{path}', line {number}: a {type(row).__name__} where an object was expected")
            rows.append(row)
    return _columns(rows, path)


def _json(path: Path) -> Columns:
    rows = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(rows, dict):
        rows = next((v for v in rows.values() if isinstance(v, list)), [])
    return _columns(rows, path)


def _columns(rows: list[dict[str, Any]], path: Path) -> Columns:
    names = list(rows[0]) if rows else []
    for number, row in enumerate(rows, 1):
        missing = [name for name in names if name not in row]
        if missing:
            raise DataError(f"data file '{path}', row {number}: no '{missing[0]}', which the first row has")
    return {name: [row[name] for row in rows] for name in names}


def _parquet(path: Path) -> Columns:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pydict()  # type: ignore[no-any-return]


def _txt(path: Path) -> Columns:
    """Lines of text; `meaning||text` lines become instructions (E2E)."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if lines and all("||" in line for line in lines[:20]):
        halves = [line.split("||", 1) for line in lines]
        return {
            "instruction": [h[0].strip() for h in halves],
            "context": [""] * len(halves),
            "response": [h[-1].strip() for h in halves],
        }
    return {"text": lines}


_READERS: Mapping[str, Callable[[Path], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}


Found = tuple[Columns, Columns | None, list[str]]


def _saved(folder: Path, config: DataSection) -> Found | None:
    """A folder written by `datasets.save_to_disk`."""
    if not ((folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()):
        return None
    import datasets

    return _splits(datasets.load_from_disk(str(folder)), config)


def _domains(folder: Path, config: DataSection) -> Found | None:
    """FDU-MTL: `<domain>.task.train` and `.task.test` files of label<TAB>text."""
    if not any(folder.glob("*.task.train")):
        return None
    out = []
    for part in ("train", "test"):
        columns: Columns = {"text": [], "label": [], "domain": []}
        for path in sorted(folder.glob(f"*.task.{part}")):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                label, _, text = line.partition("\t")
                for name, value in zip(columns, (text, label, path.name.split(".")[0]), strict=True):
                    columns[name].append(value)
        out.append(columns)
    return out[0], out[1], []


def _shepherd(folder: Path, config: DataSection) -> Found | None:
    """Shepherd's split of dolly: `local_training_<k>.json` a client, `global_test.json`."""
    files = sorted(folder.glob("local_training_*.json"))
    if not files:
        return None
    parts = [_table(path) | {"client": [path.stem.rsplit("_", 1)[1]]} for path in files]
    columns = {
        name: [v for p in parts for v in (p[name] if name != "client" else p["client"] * len(p["instruction"]))]
        for name in parts[0]
    }
    test = _table(folder / "global_test.json") if (folder / "global_test.json").is_file() else None
    return columns, test, []


def _files(folder: Path, config: DataSection) -> Found | None:
    """train and test (or dev) tables by their names."""
    tables = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in TABLES}
    if not tables:
        return None
    path = next((tables[n] for n in tables if n.startswith("train")), next(iter(tables.values())))
    train = _table(path)
    if isinstance(config.test, str):
        return train, _table(tables.get(config.test) or _beside(path, config.test)), []
    for name in ("test", "validation", "valid", "dev"):
        found = _table(tables[name]) if name in tables else {}
        if found.keys() == train.keys():  # GLUE's test files have no labels
            return train, found, []
    return train, None, []


def _image_folder(folder: Path, config: DataSection) -> Found | None:
    """[train|test/][domain/]class/image files."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
    return _images([p.relative_to(folder).parts for p in files], files, str(folder)) if files else None


FOLDERS: tuple[Callable[[Path, DataSection], Found | None], ...] = (_saved, _domains, _shepherd, _image_folder, _files)


def _zipped(path: Path) -> Found:
    """A zip of images, decoded from the zip itself."""
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if Path(n).suffix.lower() in IMAGES)
            images = []
            for name in names:
                try:
                    images.append(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
                except (UnidentifiedImageError, OSError) as error:
                    raise DataError(f"data file '{path}': '{name}' is no readable image") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"data file '{path}' is no zip file, or a damaged one") from error
    if not names:
        raise DataError(f"data file '{path}' holds no images ({', '.join(IMAGES)}) in class folders")
    return _images([Path(n).parts for n in names], images, str(path))


def _images(parts: list[tuple[str, ...]], images: list[Any], where: str) -> Found:
    splits: dict[str, Columns] = {}
    for path, image in zip(parts, images, strict=True):
        folders = list(path[:-1])
        split = folders.pop(0) if folders and folders[0] in ("train", "test", "valid", "validation") else "train"
        if not folders:
            raise DataError(f"data '{where}': image '{path[-1]}' lies in no class folder")
        columns = splits.setdefault(split, {"image": [], "label": [], "domain": []})
        for name, value in zip(columns, (image, folders[-1], folders[0]), strict=True):
            columns[name].append(value)
    if "train" not in splits:
        raise DataError(f"data '{where}' has no training images")
    return splits["train"], splits.get("test", splits.get("validation")), []


def _beside(path: Path, name: str | float | None) -> Path:
    """`data.test` as a path of its own, or beside the training file."""
    given = Path(str(name)).expanduser()
    return given if given.is_file() else path.parent / given


def _kind(config: DataSection, columns: Columns) -> str:
    if config.kind != "auto":
        return config.kind
    if "image" in columns or "img" in columns:
        return "image"
    if "instruction" in columns and "response" in columns:
        return "instruction"
    has_label = config.label is not None or any(n in columns for n in LABEL_NAMES) or "column1" in columns
    return "text" if has_label else "language"


def _normalised(config: DataSection, kind: str, columns: Columns) -> Columns:
    """The columns under their common names, rows without text left out."""

    def pick(given: str | None, guesses: tuple[str, ...], what: str) -> str:
        if given is not None and given not in columns:
            raise DataError(f"data '{config.name}' has no column '{given}': {nearest(given, columns)}")
        name = given or next((g for g in guesses if g in columns), None)
        if name is None:
            raise DataError(f"data '{config.name}': no column for the {what} among {', '.join(columns)}: set data.{what}")
        return name

    if kind == "instruction":
        wanted = {
            "instruction": pick(None, ("instruction", "prompt"), "text"),
            "response": pick(None, ("response", "output"), "label"),
        }
    elif kind == "image":
        wanted = {"image": pick(None, ("image", "img"), "text"), "label": pick(config.label, LABEL_NAMES, "label")}
    elif kind == "language":
        wanted = {"text": pick(config.text, TEXTS, "text")}
    else:
        pair = config.pair or (None if config.text else next((p for p in PAIRS if set(p) <= set(columns)), None))
        first = pick(pair[0] if pair else config.text, (*TEXTS, "column3"), "text")
        wanted = {"text": first, "label": pick(config.label, (*LABEL_NAMES, "column1"), "label")}
        if pair:
            wanted["pair"] = pick(pair[1], (), "pair")
    out = {new: columns[old] for new, old in wanted.items()}
    out |= {
        name: values for name, values in columns.items() if name not in wanted.values() and name not in out and _simple(values)
    }
    if "text" in out:
        keep = [k for k, text in enumerate(out["text"]) if text is not None and str(text).strip()]
        if not keep:
            raise DataError(f"data '{config.name}': column '{wanted['text']}' has no text in any row")
        out = {name: [values[k] for k in keep] for name, values in out.items()}
        out["text"] = [str(text) for text in out["text"]]
    return out


def _simple(values: list[Any]) -> bool:
    return all(isinstance(v, str | int | float) for v in values[:50])


def _labels(columns: Columns) -> list[str]:
    """Class names in order: numbers by value, words by alphabet."""
    found = {str(v) for v in columns["label"]}
    return sorted(found, key=lambda v: (0, int(v), "") if v.lstrip("-").isdigit() else (1, 0, v))


def _indexed(columns: Columns, labels: list[str], name: str) -> Columns:
    """Labels as class numbers."""
    number = {label: k for k, label in enumerate(labels)}
    values = columns["label"]
    if values and isinstance(values[0], int) and max(values) < len(labels) and min(values) >= 0 and str(values[0]) not in number:
        return columns  # the source gave class numbers and names
    for row, value in enumerate(values, 1):
        if str(value) not in number:
            raise DataError(
                f"data '{name}', test row {row}: label '{value}' is not among the training labels: {nearest(str(value), labels)}"
            )
    return {**columns, "label": [number[str(v)] for v in values]}


def _hold_out(rows: Rows, fraction: float, seed: int, name: str) -> tuple[Rows, Rows]:
    if not 0 < fraction < 1:
        raise ConfigError(f"data.test = {fraction}: as a number it is the fraction to hold out, between 0 and 1")
    order = np.random.default_rng(seed_of(seed, "held out")).permutation(len(rows))
    count = round(fraction * len(rows))
    if count < 1 or count >= len(rows):
        raise DataError(f"data '{name}': {len(rows)} rows are too few to hold out {fraction:.0%} for testing")
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))


def _limited(rows: Rows, limit: int | None, seed: int, purpose: str) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    order = np.random.default_rng(seed_of(seed, purpose)).permutation(len(rows))
    return rows.select(np.sort(order[:limit]))
