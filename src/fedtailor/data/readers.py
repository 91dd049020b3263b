"""Readers of data files and folders: each gives columns, or splits of columns by name, as they are found there."""

from __future__ import annotations

import csv
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from fedtailor.config import DataSection
from fedtailor.errors import DataError, nearest

LABEL_NAMES = ("label", "labels", "category", "class", "target", "coarse_label", "fine_label", "Quality", "sentiment")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TESTS = ("test", "validation", "valid", "dev", "val")  # what stands in for a test set, the best first

Columns = dict[str, list[Any]]
Found = tuple[dict[str, Columns], list[str]]  # splits by name; class names in their order, where the source knows them


def absent(path: Path) -> DataError:
    there = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return DataError(f"data file '{path}' does not exist" + (f": {nearest(path.name, there)}" if there else ""))


def splits_of(found: Any, config: DataSection) -> Found:
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


def table(path: Path) -> Columns:
    """A csv, tsv, jsonl, json, parquet or txt file as columns."""
    if not path.is_file():
        raise absent(path)
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


# Another format is another function here.
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
        return splits_of(datasets.load_from_disk(str(folder)), config)
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
    clients = {path.stem.removeprefix("local_training_"): table(path) for path in sorted(folder.glob("local_training_*.json"))}
    if not clients:
        return None
    parts = [part | {"client": [name] * len(next(iter(part.values())))} for name, part in clients.items()]
    test = folder / "global_test.json"
    held = {"test": (columns := table(test)) | {"client": [""] * len(next(iter(columns.values())))}} if test.is_file() else {}
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
    return ({split: _joined([table(p) for p in paths], folder) for split, paths in pieces.items()}, []) if tables else None


def _image_folder(folder: Path, config: DataSection) -> Found | None:
    """[train|test/][domain/]class/image files."""
    files = {p.relative_to(folder).parts: str(p) for p in sorted(folder.rglob("*")) if _is_image(p.relative_to(folder))}
    return _images(files, str(folder)) if files else None


# Another layout of folders is another function here; the first that finds its files reads them.
FOLDERS: tuple[Callable[[Path, DataSection], Found | None], ...] = (_saved, _domains, _shepherd, _image_folder, _files)


def zipped(path: Path) -> Found:
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
