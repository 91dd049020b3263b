"""Where data comes from: embedded, a file, a folder, a zip of images, or the hub. `load` normalises the columns.

    text         text, [pair], label        image         image, label
    language     text                       instruction   instruction, context, response
Other columns are kept: a partition may be natural by one of them. A reader gives splits by name; adding a layout of folders
is a function in FOLDERS, adding a format is one in TABLES.
"""

from __future__ import annotations

import csv
import json
import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
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
IMAGE_NAMES = ("image", "img")
INSTRUCTIONS, CONTEXTS, RESPONSES = ("instruction", "prompt"), ("context", "input"), ("response", "output", "completion")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TESTS = ("test", "validation", "valid", "dev", "val")  # what stands in for a test set, the best first
HELD_OUT = 0.2

Columns = dict[str, list[Any]]
Found = tuple[dict[str, Columns], list[str]]  # splits by name; class names in their order, where the source knows them
log = logging.getLogger(__name__)


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
    splits, labels = _read(config)
    columns, tested = _chosen(splits, config)
    kind = _kind(config, columns)
    columns = _normalised(config, kind, columns, "train")
    tested = _normalised(config, kind, tested, "test") if tested is not None else None
    if kind in ("text", "image"):
        labels = labels or _labels(columns["label"], config.name)
        columns = _indexed(columns, labels, config.name)
        tested = _indexed(tested, labels, config.name) if tested is not None else None
    else:
        labels = []
    train, test = Rows(columns), Rows(tested or {})
    if tested is None:
        train, test = _held_out(train, config.test if isinstance(config.test, float) else HELD_OUT, seed, config.name)
    train, test = _limited(train, config.limit, seed, "limit"), _limited(test, config.test_limit, seed, "test")
    if labels and len(set(train["label"])) < 2:
        raise DataError(f"data '{config.name}': all {len(train)} training rows have one class: a classifier needs two")
    return Source(kind, train, test, labels, config.name)


def _read(config: DataSection) -> Found:
    if config.name in EMBEDDED:
        columns = EMBEDDED[config.name]()
        return {"train": columns | {"label": [LABELS[int(str(k))] for k in columns["label"]]}}, list(LABELS)
    path = Path(config.name).expanduser()
    if path.is_dir():
        found = next(filter(None, (reader(path, config) for reader in FOLDERS)), None)
        if found is None:
            kinds = ", ".join(kind[1:] for kind in TABLES)
            raise DataError(f"data folder '{path}' holds nothing that can be read: put files ({kinds}) or class folders there")
        return found
    if path.is_file():
        return _zipped(path) if path.suffix.lower() == ".zip" else ({"train": _table(path)}, [])
    if path.suffix.lower() in (*TABLES, ".zip") or path.is_absolute() or config.name.startswith((".", "~")):
        raise _missing(path)
    if "/" not in config.name and nearest(config.name, EMBEDDED).startswith("did"):
        raise DataError(f"unknown data '{config.name}': {nearest(config.name, EMBEDDED)}")
    return _hub(config)


def _missing(path: Path) -> DataError:
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return DataError(f"data file '{path}' does not exist" + (f": {nearest(path.name, there)}" if there else ""))


def _chosen(splits: Mapping[str, Columns], config: DataSection) -> tuple[Columns, Columns | None]:
    """The training columns, and the test columns that are asked for or at hand; None: hold some out."""
    if "train" not in splits and len(splits) > 1:
        raise DataError(f"data '{config.name}' has no split 'train', only {', '.join(splits)}")
    train = splits["train"] if "train" in splits else next(iter(splits.values()))
    if isinstance(config.test, float):
        return train, None
    if config.test is None:
        return train, next((splits[n] for n in TESTS if n in splits and _usable(splits[n], train, config)), None)
    if config.test in splits:
        return train, splits[config.test]
    beside, path = Path(config.name).expanduser(), Path(config.test).expanduser()
    folder = beside if beside.is_dir() else beside.parent
    if path.suffix.lower() in TABLES:
        return train, _table(path if path.is_file() else folder / path)
    others = [name for name in splits if name != "train"]
    hint = nearest(config.test, others) if others else f"name a file ({', '.join(TABLES)}) or a fraction"
    raise DataError(f"data '{config.name}' has no split '{config.test}': {hint}")


def _usable(part: Columns, train: Columns, config: DataSection) -> bool:
    """Test files of public benchmarks often come without labels, or with -1 in their place."""
    label = config.label or next((n for n in LABEL_NAMES if n in train), None)
    return set(train) <= set(part) and (label not in part or any(v not in (None, "", -1, "-1") for v in part[label]))


def _hub(config: DataSection) -> Found:
    import datasets
    import huggingface_hub.constants as hub

    known = hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    try:
        # Without a network the client would retry for half a minute; said to be offline it looks into its cache at once.
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = known[0] or not _reachable(hub.ENDPOINT)
        return _splits(datasets.load_dataset(config.name, config.subset), config)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"data '{config.name}' is no file, no embedded name ({', '.join(EMBEDDED)}) and cannot be had from the hub: {reason}"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = known


def _reachable(address: str) -> bool:
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    if getproxies():  # a proxy looks names up itself
        return True
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, 443))
    except OSError:
        return False


def _splits(found: Any, config: DataSection) -> Found:
    """A datasets.Dataset or DatasetDict: class numbers become names, images stay encoded until encode.py wants them."""
    import datasets

    parts = dict(found) if hasattr(found, "keys") else {"train": found}
    out: dict[str, Columns] = {}
    labels: list[str] = []
    for split, part in parts.items():
        if len(parts) > 1 and split not in ("train", *TESTS, config.test):
            continue
        for name, feature in part.features.items():
            if isinstance(feature, datasets.Image):
                part = part.cast_column(name, datasets.Image(decode=False))
        out[split] = part.to_dict()
        label = config.label or next((n for n in LABEL_NAMES if n in part.features), None)
        for name, feature in part.features.items():
            if isinstance(feature, datasets.ClassLabel):
                out[split][name] = [feature.names[k] if k is not None and k >= 0 else None for k in out[split][name]]
                labels = list(feature.names) if name == label else labels
    return out, labels


def _table(path: Path) -> Columns:
    """A csv, tsv, jsonl, json, parquet or txt file as columns."""
    if not path.is_file():
        raise _missing(path)
    if path.suffix.lower() not in TABLES:
        raise DataError(f"data file '{path}': unknown kind '{path.suffix}': use one of {', '.join(TABLES)} or .zip")
    try:
        columns = TABLES[path.suffix.lower()](path) if path.stat().st_size else {}
    except UnicodeDecodeError as error:
        raise DataError(f"data file '{path}' is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (OSError, ValueError) as error:
        raise DataError(f"data file '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    if not any(columns.values()):
        raise DataError(f"data file '{path}' " + ("has a header but no rows" if columns else "is empty"))
    return columns


def _lines(path: Path, errors: str = "strict") -> list[tuple[int, str]]:
    """(line number, line) of each line that is not blank; only a newline ends one, as texts hold stranger separators."""
    lines = path.read_bytes().decode("utf-8-sig", errors).split("\n")
    return [(number, line.rstrip("\r")) for number, line in enumerate(lines, 1) if line.strip()]


def _delimited(path: Path, delimiter: str, quoting: Literal[0, 3]) -> Columns:
    csv.field_size_limit(2**31 - 1)  # a field may be a whole document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=quoting != csv.QUOTE_NONE)
        try:
            lines = [(reader.line_num, cells) for cells in reader if any(cells)]
        except csv.Error as error:
            raise DataError(f"data file '{path}', line {reader.line_num}: {error}") from error
    if not lines:
        return {}
    head = lines[0][1]
    if any(cell.strip().lstrip("-").isdecimal() for cell in head):  # CoLA: no header, the second cell is a label
        head = [f"column{k}" for k in range(len(head))]
    else:
        lines = lines[1:]
    twice = next((name for k, name in enumerate(head) if name in head[:k]), None)
    if twice is not None:
        raise DataError(f"data file '{path}': two columns have the name '{twice}'")
    for number, cells in lines:
        if len(cells) != len(head):
            raise DataError(f"data file '{path}', line {number}: {len(cells)} cells where the first line has {len(head)}")
    return {name: [cells[k] for _, cells in lines] for k, name in enumerate(head)}


def _csv(path: Path) -> Columns:
    return _delimited(path, ",", csv.QUOTE_MINIMAL)


def _tsv(path: Path) -> Columns:
    return _delimited(path, "\t", csv.QUOTE_NONE)  # GLUE's files have stray quotes


def _jsonl(path: Path) -> Columns:
    rows = []
    for number, line in _lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise DataError(f"data file '{path}', line {number}: not JSON ({error})") from error
    return _columns(rows, path)


def _json(path: Path) -> Columns:
    """A list of objects, an object that holds one, or, under this name too, an object a line."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return _jsonl(path)
        raise
    if isinstance(rows, dict):
        rows = next((v for v in rows.values() if isinstance(v, list)), [rows])
    return _columns(rows if isinstance(rows, list) else [rows], path)


def _columns(rows: list[Any], path: Path) -> Columns:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"data file '{path}', row {number}: a {type(row).__name__} where an object was expected")
        missing = next((name for name in rows[0] if name not in row), None)
        if missing is not None:
            raise DataError(f"data file '{path}', row {number}: no '{missing}', which the first row has")
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}


def _parquet(path: Path) -> Columns:
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pydict()  # type: ignore[no-any-return]


def _txt(path: Path) -> Columns:
    """Lines of text; `meaning||text` lines become instructions (E2E)."""
    lines = [line.strip() for _, line in _lines(path, "replace")]
    if not lines or not all("||" in line for line in lines):
        return {"text": lines}
    halves = [line.split("||", 1) for line in lines]
    return {"instruction": [h[0].strip() for h in halves], "response": [h[1].strip() for h in halves]}


TABLES: Mapping[str, Callable[[Path], Columns]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}


def _joined(parts: Sequence[Columns], where: Path) -> Columns:
    for part in parts:
        if part.keys() != parts[0].keys():
            raise DataError(f"data folder '{where}': one file has the columns {', '.join(parts[0])}, another {', '.join(part)}")
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def _saved(folder: Path, config: DataSection) -> Found | None:
    """A folder written by `datasets.save_to_disk`."""
    if not ((folder / "dataset_info.json").is_file() or (folder / "dataset_dict.json").is_file()):
        return None
    import datasets

    try:
        return _splits(datasets.load_from_disk(str(folder)), config)
    except Exception as error:  # a damaged folder fails in as many ways as Arrow has
        raise DataError(f"data folder '{folder}' cannot be read: {str(error).splitlines()[0]}") from error


def _domains(folder: Path, config: DataSection) -> Found | None:
    """FDU-MTL: `<domain>.task.train` and `.task.test` files of label<TAB>text."""
    splits: dict[str, Columns] = {}
    for path in sorted(folder.glob("*.task.*")):
        domain, _, split = path.name.split(".", 2)
        columns = splits.setdefault(split, {"text": [], "label": [], "domain": []})
        for number, line in _lines(path, "replace"):
            label, tab, text = line.partition("\t")
            if not tab:
                raise DataError(f"data file '{path}', line {number}: no tab between a label and a text")
            for name, value in (("text", text), ("label", label), ("domain", domain)):
                columns[name].append(value)
    return (splits, []) if splits else None


def _shepherd(folder: Path, config: DataSection) -> Found | None:
    """Shepherd's split of dolly: `local_training_<client>.json`, `global_test.json`."""
    clients = {path.stem.removeprefix("local_training_"): _table(path) for path in sorted(folder.glob("local_training_*.json"))}
    if not clients:
        return None
    parts = [part | {"client": [name] * len(next(iter(part.values())))} for name, part in clients.items()]
    test = folder / "global_test.json"
    held = {"test": (columns := _table(test)) | {"client": [""] * len(next(iter(columns.values())))}} if test.is_file() else {}
    return {"train": _joined(parts, folder), **held}, []


def _files(folder: Path, config: DataSection) -> Found | None:
    """Tables named train, test, validation, valid, dev or val, also in the hub's numbered pieces; or one table alone."""
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLES)
    named: dict[str, list[Path]] = {}
    for path in tables:
        if match := re.fullmatch(r"(train|test|validation|valid|dev|val)(?:ing)?(?:-\d+-of-\d+)?", path.stem.lower()):
            named.setdefault(match[1], []).append(path)
    if len(tables) == 1:
        named = {"train": tables}
    if tables and "train" not in named:
        names = ", ".join(p.name for p in tables)
        raise DataError(f"data folder '{folder}' has no file named train among {names}: name one of them, and data.test")
    pieces = {split: [p for p in paths if p.suffix == paths[0].suffix] for split, paths in named.items()}
    return ({split: _joined([_table(p) for p in paths], folder) for split, paths in pieces.items()}, []) if tables else None


def _image_folder(folder: Path, config: DataSection) -> Found | None:
    """[train|test/][domain/]class/image files."""
    files = {p.relative_to(folder).parts: str(p) for p in sorted(folder.rglob("*")) if _is_image(p.relative_to(folder))}
    return _images(files, str(folder)) if files else None


FOLDERS: tuple[Callable[[Path, DataSection], Found | None], ...] = (_saved, _domains, _shepherd, _image_folder, _files)


def _zipped(path: Path) -> Found:
    """A zip of images in class folders, read without unpacking it; encode.py decodes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(name) for name in sorted(archive.namelist()) if _is_image(PurePosixPath(name))]
            images = {n.parts: {"bytes": archive.read(str(n)), "path": f"{path}:{n}"} for n in names}
    except zipfile.BadZipFile as error:
        raise DataError(f"data file '{path}' is no zip file, or a damaged one: {error}") from error
    except (RuntimeError, OSError) as error:  # encrypted, or packed in a way that Python lacks
        raise DataError(f"data file '{path}' cannot be read: {error}") from error
    if not images:
        raise DataError(f"data file '{path}' holds no images ({', '.join(IMAGES)}) in class folders")
    return _images(images, str(path))


def _is_image(path: Path | PurePosixPath) -> bool:
    """Not the hidden doubles that some systems put into a zip."""
    return path.suffix.lower() in IMAGES and not any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _images(images: Mapping[tuple[str, ...], Any], where: str) -> Found:
    """Images by the parts of their path. A folder around everything says nothing and is left out."""
    paths, splits = list(images), ("train", *TESTS)
    while min(map(len, paths)) > 2 and len({path[0] for path in paths}) == 1 and paths[0][0] not in splits:
        paths = [path[1:] for path in paths]
    domains = all(len(path) > (3 if path[0] in splits else 2) for path in paths)
    out: dict[str, Columns] = {}
    for path, image in zip(paths, images.values(), strict=True):
        folders = list(path[:-1])
        split = folders.pop(0) if folders and folders[0] in splits else "train"
        if not folders:
            raise DataError(f"data '{where}': image '{path[-1]}' lies in no class folder")
        row = {"image": image, "label": folders[-1]} | ({"domain": folders[-2]} if domains else {})
        columns = out.setdefault(split, {name: [] for name in row})
        for name, value in row.items():
            columns[name].append(value)
    return out, []


def _kind(config: DataSection, columns: Columns) -> str:
    if config.kind != "auto":
        return config.kind
    if any(name in columns for name in IMAGE_NAMES):
        return "image"
    if any(name in columns for name in INSTRUCTIONS) and any(name in columns for name in RESPONSES):
        return "instruction"
    return "text" if config.label or any(name in columns for name in (*LABEL_NAMES, "column1")) else "language"


def _normalised(config: DataSection, kind: str, columns: Columns, part: str) -> Columns:
    """The columns under their common names, rows without text left out."""

    def pick(given: str | None, guesses: tuple[str, ...], option: str) -> str:
        if given is not None and given not in columns:
            raise DataError(f"data '{config.name}' has no column '{given}' ({part}): {nearest(given, columns)}")
        name = given or next((g for g in guesses if g in columns), None)
        if name is None:
            hint = f": set data.{option}" if option in DataSection.model_fields else ""
            raise DataError(f"data '{config.name}': no column for the {option} among {', '.join(columns)}{hint}")
        return name

    if kind == "instruction":
        wanted = {"instruction": pick(config.text, INSTRUCTIONS, "text"), "response": pick(config.label, RESPONSES, "label")}
        context = next((name for name in CONTEXTS if name in columns), None)
        wanted |= {"context": context} if context else {}
    elif kind == "image":
        wanted = {"image": pick(None, IMAGE_NAMES, "image"), "label": pick(config.label, LABEL_NAMES, "label")}
    else:
        guess = next((p for p in PAIRS if set(p) <= set(columns)), None) if kind == "text" and not config.text else None
        pair = config.pair or guess
        wanted = {"text": pick(pair[0] if pair else config.text, (*TEXTS, "column3"), "text")}
        wanted |= {"pair": pick(pair[1], (), "pair")} if pair else {}
        wanted |= {"label": pick(config.label, (*LABEL_NAMES, "column1"), "label")} if kind == "text" else {}
    out = {new: columns[old] for new, old in wanted.items()}
    if kind == "instruction":
        out.setdefault("context", [""] * len(out["response"]))
    out |= {n: v for n, v in columns.items() if n not in wanted.values() and n not in out and _simple(v)}
    for row, label in enumerate(out["label"] if kind in ("text", "image") else (), 1):
        if label is None or label == "":
            raise DataError(f"data '{config.name}', {part} row {row}: no label in column '{wanted['label']}'")
    for name in ("text", "pair", "instruction", "context", "response"):
        if name in out:
            out[name] = ["" if text is None else str(text) for text in out[name]]
    needed = [name for name in ("text", "instruction", "response") if name in wanted]
    keep = [k for k, texts in enumerate(zip(*(out[name] for name in needed), strict=True)) if all(t.strip() for t in texts)]
    if needed and not keep:
        raise DataError(f"data '{config.name}' ({part}): no row has text in {' and '.join(repr(wanted[n]) for n in needed)}")
    if needed and len(keep) < len(out[needed[0]]):
        log.warning("data '%s' (%s): %d rows without text left out", config.name, part, len(out[needed[0]]) - len(keep))
        out = {name: [values[k] for k in keep] for name, values in out.items()}
    return out


def _simple(values: list[Any]) -> bool:
    return all(v is None or isinstance(v, str | int | float) for v in values[:50])


def _class(value: Any) -> str:
    """The name of a class: 1, 1.0 and " 1" are one."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _labels(values: list[Any], where: str) -> list[str]:
    """Class names in order: numbers by value, words by alphabet."""
    found = {_class(v) for v in values}
    if len(found) > max(10, len(values) // 2):
        raise DataError(
            f"data '{where}': {len(found)} labels in {len(values)} rows are no classes: set data.label to their column"
        )
    return sorted(found, key=lambda v: (0, int(v), v) if v.lstrip("-").isdecimal() else (1, 0, v))


def _indexed(columns: Columns, labels: list[str], where: str) -> Columns:
    """Labels as class numbers."""
    number = {label: k for k, label in enumerate(labels)}
    for row, value in enumerate(columns["label"], 1):
        if _class(value) not in number:
            hint = nearest(_class(value), labels)
            raise DataError(f"data '{where}', test row {row}: label '{value}' is not among the training labels: {hint}")
    return {**columns, "label": [number[_class(v)] for v in columns["label"]]}


def _held_out(rows: Rows, fraction: float, seed: int, where: str) -> tuple[Rows, Rows]:
    """(the rest, a fraction of every class): shuffled, sorted by class, and then every so many rows one."""
    if not 0 < fraction < 1:
        raise ConfigError(f"data.test = {fraction}: as a number it is the fraction to hold out, between 0 and 1")
    count = round(fraction * len(rows))
    if count < 1 or count >= len(rows):
        raise DataError(f"data '{where}': {len(rows)} rows are too few to hold out {fraction:.0%} for testing")
    order = np.random.default_rng(seed_of(seed, "held out")).permutation(len(rows))
    if "label" in rows.column_names:
        order = order[np.argsort([str(rows["label"][k]) for k in order], kind="stable")]
    chosen = np.zeros(len(rows), dtype=bool)
    chosen[order[((np.arange(count) + 0.5) * len(rows) / count).astype(int)]] = True
    return rows.select(np.flatnonzero(~chosen)), rows.select(np.flatnonzero(chosen))


def _limited(rows: Rows, limit: int | None, seed: int, purpose: str) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    order = np.random.default_rng(seed_of(seed, purpose)).permutation(len(rows))
    return rows.select(np.sort(order[:limit]))
