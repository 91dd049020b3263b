"""Which data a run has: `load` finds what `[data]` names and normalises its columns; readers.py reads the files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedtailor.config import DataSection
from fedtailor.core import seed_of
from fedtailor.data.pydocs import LABELS, pydocs
from fedtailor.data.readers import FOLDERS, LABEL_NAMES, TABLES, TESTS, Columns, Found, absent, splits_of, table, zipped
from fedtailor.errors import ConfigError, DataError, nearest
from fedtailor.hub import as_reachable

EMBEDDED: Mapping[str, Callable[[], dict[str, list[object]]]] = {"pydocs": pydocs}
TEXTS = ("text", "sentence", "sentence1", "content", "review", "question", "comment", "utterance", "document", "#1 String")
PAIRS = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("#1 String", "#2 String"),
)
IMAGE_NAMES = ("image", "img")
INSTRUCTIONS, CONTEXTS, RESPONSES = ("instruction", "prompt"), ("context", "input"), ("response", "output", "completion")
HELD_OUT = 0.2

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
    public: Rows | None = None  # what everybody may see; its labels are all 0, whatever they were


def load(config: DataSection, seed: int) -> Source:
    """The rows that `[data]` names, columns normalised, limited and with a test set.

        text         text, [pair], label        image         image, label
        language     text                       instruction   instruction, context, response
    Other columns are kept: a partition may be natural by one of them.

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
    public = None
    if config.public is not None:
        train, public = _public(config, kind, train, seed)
    if labels and len(set(train["label"])) < 2:
        raise DataError(f"data '{config.name}': all {len(train)} training rows have one class: a classifier needs two")
    return Source(kind, train, test, labels, config.name, public)


def owned(config: DataSection, kind: str, labels: list[str], pairs: bool, seed: int) -> Source:
    """What one member of a federation has, or its server: `load`, but for data whose kind and classes are agreed already. A test set is
    only what `data.test` names; with the name "own" there are no rows to train on.

    Raises:
        ConfigError: `data.public` is a share of rows that nobody holds. DataError: as `load`; a label that the federation does not have.
    """
    if isinstance(config.public, float):
        raise ConfigError("data.public: members that bring their own data need a data set that all can read, not a share of one")
    train, test = Rows({}), Rows({})

    def rows(columns: Columns, part: str) -> Rows:
        columns = _normalised(config, kind, columns, part)
        if pairs != ("pair" in columns):
            raise DataError(f"data '{config.name}': the federation's texts are {'pairs' if pairs else 'no pairs'}: set data.pair")
        return Rows(_indexed(columns, labels, config.name, part) if kind in ("text", "image") else columns)

    if config.name != "own":
        splits, _ = _read(config)
        train = rows(_chosen(splits, config.model_copy(update={"test": None}))[0], "train")
        train = _limited(train, config.limit, seed, "limit")
    elif isinstance(config.test, str):
        test = _limited(rows(table(Path(config.test).expanduser()), "test"), config.test_limit, seed, "test")
    public = _public(config, kind, train, seed)[1] if config.public is not None else None
    return Source(kind, train, test, labels, config.name, public)


def _public(config: DataSection, kind: str, train: Rows, seed: int) -> tuple[Rows, Rows]:
    """(what is left to train on, the public rows without their labels).

    Raises:
        ConfigError: language data, or pairs from another data set. DataError: that data set cannot be read or has no such column.
    """
    if kind not in ("text", "image"):
        raise ConfigError(f"data.public goes with classes: this is {kind} data; leave it out")
    if isinstance(config.public, float):
        if not 0 < config.public < 1:
            raise ConfigError(f"data.public = {config.public}: as a number it is the share that nobody holds, between 0 and 1")
        train, rows = _held_out(train, config.public, seed, config.name, "as public")
    else:
        if "pair" in train.column_names:
            raise ConfigError(
                "data.public: pairs of texts need a share of the training rows (0.1, for example), not another data set"
            )
        other = config.model_copy(update={"name": config.public, "label": None, "subset": None, "test": None})
        splits, _ = _read(other)
        columns = splits.get("train") or next(iter(splits.values()))
        other = other.model_copy(update={"text": config.text if config.text in columns else None})
        # As language data: one column of texts, and no label is looked for.
        rows = Rows(_normalised(other, "language", columns, "public") if kind == "text" else _images(other, columns))
    rows = _limited(rows, config.public_limit, seed, "public")
    wanted = [name for name in ("text", "pair", "image") if name in rows.column_names]
    return train, Rows({**{name: rows[name] for name in wanted}, "label": [0] * len(rows)})


def _images(config: DataSection, columns: Columns) -> Columns:
    name = next((name for name in IMAGE_NAMES if name in columns), None)
    if name is None:
        raise DataError(f"data.public '{config.name}' has no images: its columns are {', '.join(columns)}")
    return {"image": columns[name]}


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
        return zipped(path) if path.suffix.lower() == ".zip" else ({"train": table(path)}, [])
    if path.suffix.lower() in (*TABLES, ".zip") or path.is_absolute() or config.name.startswith((".", "~")):
        raise absent(path)
    if "/" not in config.name and nearest(config.name, EMBEDDED).startswith("did"):
        raise DataError(f"unknown data '{config.name}': {nearest(config.name, EMBEDDED)}")
    return _hub(config)


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
        return train, table(path if path.is_file() else folder / path)
    others = [name for name in splits if name != "train"]
    hint = nearest(config.test, others) if others else f"name a file ({', '.join(TABLES)}) or a fraction"
    raise DataError(f"data '{config.name}' has no split '{config.test}': {hint}")


def _usable(part: Columns, train: Columns, config: DataSection) -> bool:
    """Test files of public benchmarks often come without labels, or with -1 in their place."""
    label = config.label or next((n for n in LABEL_NAMES if n in train), None)
    return set(train) <= set(part) and (label not in part or any(v not in (None, "", -1, "-1") for v in part[label]))


def _hub(config: DataSection) -> Found:
    import datasets

    try:
        with as_reachable(config.name):
            return splits_of(datasets.load_dataset(config.name, config.subset), config)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(
            f"data '{config.name}' is no file, no embedded name ({', '.join(EMBEDDED)}) and cannot be had from the hub: {reason}"
        ) from error


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


def _indexed(columns: Columns, labels: list[str], where: str, part: str = "test") -> Columns:
    """Labels as class numbers."""
    number = {label: k for k, label in enumerate(labels)}
    for row, value in enumerate(columns["label"], 1):
        if _class(value) not in number:
            hint = nearest(_class(value), labels)
            raise DataError(f"data '{where}', {part} row {row}: label '{value}' is not among the training labels: {hint}")
    return {**columns, "label": [number[_class(v)] for v in columns["label"]]}


def _held_out(rows: Rows, fraction: float, seed: int, where: str, use: str = "for testing") -> tuple[Rows, Rows]:
    """(the rest, a fraction of every class): shuffled, sorted by class, and then every so many rows one."""
    if not 0 < fraction < 1:
        raise ConfigError(f"data.test = {fraction}: as a number it is the fraction to hold out, between 0 and 1")
    count = round(fraction * len(rows))
    share = f"{fraction:.0%}" if fraction >= 0.01 else f"{fraction:.2%}"
    if count < 1 or count >= len(rows):
        raise DataError(f"data '{where}': {len(rows)} rows are too few to hold out {share} {use}")
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
