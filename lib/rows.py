"""Files of rows: found in a folder, and read one row at a time.

JSON lines, a JSON array of objects, CSV with a heading, and Parquet. The first three may be packed,
as .gz or .xz.
"""

import codecs
import csv
import functools
import gzip
import io
import json
import lzma
import re
import zlib
from pathlib import Path

from lib import checkpoint
from lib.checkpoint import LARGEST

PACKED = {"": open, ".gz": gzip.open, ".xz": lzma.open}
KINDS = "expected .jsonl, .json, .csv (these three also as .gz or .xz) or .parquet"
SPLITS = {  # split → words in the names of its files: the first of these that any file has
    "train": ("train(ing|set|val)?",),
    "test": ("test(ing|set)?", "validation|valid|val|dev|eval(uation)?"),
}
EVERY = "|".join(words for kinds in SPLITS.values() for words in kinds)
NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
AT_ONCE = 2**20  # characters of an array that are read
ROWS_AT_ONCE = 1000  # of Parquet
BETWEEN = re.compile(r"[\s,]*")  # the objects of an array
DECODER = json.JSONDecoder(object_pairs_hook=checkpoint.unique)  # it takes a NaN: who needs it?

csv.field_size_limit(LARGEST)


# --------------------------------------------------------------------------------------------------
# Finding


def parts_of_name(path):
    """(name without endings, ".jsonl" or another kind, ".gz", ".xz" or ""); the kind may be ""."""
    path = Path(path)
    packed = path.suffix.lower()
    packed = packed if packed in PACKED else ""
    whole = path.with_suffix("") if packed else path
    kind = whole.suffix.lower()
    readers = PACKABLE if packed else READERS
    return (
        (whole.with_suffix("").name, kind, packed) if kind in readers else (path.name, "", packed)
    )


def find_files(folder):
    """{"train": paths, "test": paths}: the folder's files of rows by split, at any depth.

    A file's name tells its split, else the folders above it; "test" may be a validation split. One
    of the two may be missing. Where no name tells one, all files are "train". Hidden folders are
    left out. ValueError if there is no file, or if the same rows would be read twice.
    """
    files = {}  # path → its place in the folder
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts)
        if parts_of_name(path)[1] and not hidden and path.name not in NO_ROWS and path.is_file():
            files[path] = inside
    found = {}
    for split, kinds in SPLITS.items():
        for words in kinds:
            chosen = [path for path, inside in files.items() if says(inside, words)]
            if chosen:
                found[split] = chosen
                break
    if files and not found:
        found["train"] = list(files)
    if not found:
        arrow = any(folder.rglob("*.arrow"))
        raise ValueError(
            f"{folder}: no train file; {KINDS}, with train in its name"
            + ", where to_parquet writes it instead of save_to_disk" * arrow
        )
    for paths in found.values():
        refuse_twice(paths, files)
    return found


def says(inside, words):
    """Whether a file's name says a split, by its last word that says any; where it has none, the
    name of the folder above it tells."""
    for part in reversed(inside.parts):
        part = re.sub(r"([a-z])([A-Z])", r"\1_\2", part)  # myTrain
        if found := list(re.finditer(rf"(?<![a-z])({EVERY})(?![a-z])", part, re.IGNORECASE)):
            return bool(re.fullmatch(words, found[-1][0], re.IGNORECASE))
    return False


def refuse_twice(paths, files):
    """ValueError if two files are one in different packings, or two sizes of one data set."""
    seen = {}
    for path in paths:
        name, _, _ = parts_of_name(path)
        unsized = re.sub(r"\d+k(?![a-z])", "#", str(files[path].with_name(name)), flags=re.I)
        other = seen.setdefault(unsized.lower(), path)
        if other is not path:
            raise ValueError(
                f"{path}: seems to hold rows of {other} once more, or another size of the same "
                "set; name the one that you mean, by its file or its own folder"
            )


# --------------------------------------------------------------------------------------------------
# Reading


def read_rows(path, needed=list):
    """({field: value}, "file:line") of each row. ValueError names the place, and what is wrong.

    needed: which of the columns of a CSV or Parquet file to read, a function of their names.
    """
    path = Path(path)
    _, kind, packed = parts_of_name(path)
    if not kind:
        raise ValueError(f"{path}: unknown kind of file; {KINDS}")
    checkpoint.refuse_pointer(path)
    if kind == ".parquet":
        yield from parquet_rows(path, needed)
        return
    place = path  # the last one that was read
    try:
        with PACKED[packed](path, "rb") as file:
            for row, place in READERS[kind](file, path, needed):
                yield row, place
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as e:
        raise ValueError(
            f"{path}: cannot be unpacked ({e}), after {place}; "
            "expected a whole file, packed as its name says"
        )
    except UnicodeDecodeError as e:
        after = f", after {place}" if place != path else ""
        raise ValueError(f"{path}: not UTF-8 ({e.reason}{after}); expected text in UTF-8")


def json_rows(file, path, needed):
    """Lines, each an object; or one array of objects."""
    beginning = file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip()
    if beginning.startswith(b"["):
        yield from array_rows(file, path)
        return
    # A line may be too large for the memory: parse_json refuses it by its first bytes.
    lines = iter(functools.partial(file.readline, LARGEST + 1), b"")
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if line.strip():
            place = f"{path}:{number}"
            yield checkpoint.parse_json(line, place, DECODER), place


def array_rows(file, path):
    """The objects of a JSON array, which need not fit into the memory together."""
    file = io.TextIOWrapper(file, "utf-8-sig")
    text, at, number = file.read(AT_ONCE).lstrip(), 1, 1  # behind the bracket
    while True:
        at = BETWEEN.match(text, at).end()
        if text.startswith("]", at):
            if (text[at + 1 :] + file.read(AT_ONCE)).strip():
                raise ValueError(f"{path}: goes on behind its array; expected one array of objects")
            return
        place = f"{path}, object {number}"
        try:
            value, at = DECODER.raw_decode(text, at)
        except json.JSONDecodeError as e:  # wrong, or not read to its end
            more = file.read(AT_ONCE)
            if not more or len(text) - at > LARGEST:
                raise ValueError(f"{place}: not valid JSON ({e.msg}); expected an array of objects")
            text, at = text[at:] + more, 0
            continue
        except (ValueError, RecursionError) as e:
            raise checkpoint.unreadable(e, place)
        yield checkpoint.checked_object(value, place), place
        number += 1


def csv_rows(file, path, needed):
    """Every cell is a text."""
    place = f"{path}:1"
    rows = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    try:
        names = rows.fieldnames or []
        if len(names) == 1 and ";" in names[0]:
            raise ValueError(f"{place}: the heading has semicolons; expected commas between cells")
        names = once(needed(names), names, path)
        while True:
            place = f"{path}:{rows.line_num + 1}"
            row = next(rows, None)
            if row is None:
                return
            if None in row:
                raise ValueError(f"{place}: has more cells than the heading")
            yield {name: row[name] for name in names}, place
    except csv.Error as e:
        raise ValueError(f"{place}: not valid CSV ({e})")


def once(chosen, names, path):
    """The chosen names of columns. ValueError if two columns have one of them."""
    for name in chosen:
        if names.count(name) > 1:
            raise ValueError(f"{path}: two columns are called {name}; expected one")
    return chosen


def parquet_rows(path, needed):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            names, number = file.schema_arrow.names, 0
            names = once(needed(names), names, path)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}:{number}"
    except (ArrowException, OSError, UnicodeDecodeError) as e:
        reason = str(e).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read as Parquet ({reason}); expected the whole file")


PACKABLE = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows}
READERS = PACKABLE | {".parquet": parquet_rows}
