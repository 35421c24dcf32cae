"""Files: one way to save, one way to load, one way to read JSON, one process at a time in a folder.

A file is written whole or not at all. Reading one runs no code of its own, and what is damaged is recognised.
"""

import json
import os
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from lib import parallel

LARGEST = 2**26  # bytes of a JSON file, or of one line
DEEPEST = 100  # lists and objects within each other


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save(path, state, keep=False):
    """Write `state` to path, whole or not at all. keep: what stood there stays, as previous(path).

    Of several processes only the first writes.
    """
    if parallel.rank():
        return
    with replacing(path, "wb", keep) as f:
        torch.save(state, f)


def load(path):
    """The state saved at path, on the CPU; reading it runs no code of the file's. ValueError if it is no such file, or damaged."""
    try:
        with zipfile.ZipFile(
            path
        ) as file:  # torch.save writes checksums and torch.load does not look at them
            if any(part.compress_type or part.external_attr for part in file.infolist()):
                raise ValueError("a part is packed or a folder, which torch.save's never are")
            if damaged := file.testzip():
                raise ValueError(f"the checksum of {damaged} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:  # bytes of another kind, or cut short, raise nearly anything
        reason = str(e).partition("\n")[0][:100] or type(e).__name__
        raise ValueError(
            f"{path}: damaged, or not a checkpoint of ours ({reason}); expected a file that train.py saved, whole"
        )


def load_last(path):
    """The state last saved at path: where that is damaged the one before, with a warning; {} where there is none."""
    for file in (path, previous(path)):
        with suppress(FileNotFoundError):
            try:
                return load(file)
            except ValueError as e:
                print(f"warning: {e}. Going on from what was saved before it", file=sys.stderr)
    return {}


def previous(path):
    return path.with_suffix(".previous" + path.suffix)


@contextmanager
def replacing(path, mode="w", keep=False):
    """`with replacing(path, mode) as f:` writes a file that takes path's place once it is complete and on the disk.

    OSError names path where it cannot be written; then, as after any other error, path is as it was.
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if keep and path.exists():
            os.replace(path, previous(path))
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as e:
        with suppress(OSError):
            os.remove(temporary)
        cause = (
            e.__context__ if isinstance(e, RuntimeError) else e
        )  # torch.save may hide the system's error
        if isinstance(cause, OSError):
            raise OSError(f"{path}: cannot be written ({cause.strerror or cause})") from e
        raise


def sync_folder(folder):
    """Put a rename on the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folder, and some network file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def alone(folder):
    """Hold folder against other processes. ValueError if one holds it; the system frees it when that process ends, however."""
    try:
        with FileLock(folder / ".lock", timeout=0) if not parallel.rank() else nullcontext():
            yield
    except Timeout:
        raise ValueError(
            f"another process is at work on the run in {folder}; --out_dir FOLDER starts another"
        )


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def read_json(path, needed=None):
    """The JSON object in the file at path. ValueError names the file where it is anything else, or where a value of
    {name: type, types or None for any} is missing or of another type."""
    with open(path, "rb") as f:
        value = parse_json(f.read(LARGEST + 1), path)
    for name, kind in (needed or {}).items():
        if name not in value:
            raise ValueError(
                f"{path}: {name} is missing; expected a file that this version of train.py wrote"
            )
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if kind and type(value[name]) not in kinds:
            raise ValueError(
                f"{path}: {name} is {show(value[name])}; expected {' or '.join(k.__name__ for k in kinds)}"
            )
    return value


def parse_json(raw, place):
    """Bytes as a dict. ValueError names place, value and remedy."""
    if len(raw) > LARGEST:
        raise ValueError(f"{place}: more than {LARGEST >> 20} MiB of JSON at once; expected less")
    try:
        value = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_number
        )
    except UnicodeDecodeError as e:
        raise ValueError(f"{place}: byte {e.start + 1} is not UTF-8; expected text in UTF-8")
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{place}: not valid JSON ({e.msg} at line {e.lineno} column {e.colno}); expected one object"
        )
    except (
        ValueError,
        RecursionError,
    ) as e:  # a field twice, a number of thousands of digits, brackets nested as deep
        raise ValueError(
            f"{place}: JSON that cannot be read ({e}); expected an object with each field once, not nested deeply"
        )
    if raw.count(b"[") + raw.count(b"{") > DEEPEST and _deep(value):
        raise ValueError(f"{place}: JSON nested more than {DEEPEST} deep; expected less")
    if not isinstance(value, dict):
        raise ValueError(f"{place}: holds {show(value)}; expected a JSON object")
    return value


def _unique(fields):
    """A JSON object's fields as a dict; json itself would let the last of two labels win without a word."""
    value = dict(fields)
    if len(value) < len(fields):
        raise ValueError(
            f"{show(Counter(name for name, _ in fields).most_common(1)[0][0])} is given twice"
        )
    return value


def _no_number(name):
    raise ValueError(f"{name} is no number")


def _deep(value):
    level = [value]
    for _ in range(DEEPEST):
        level = [
            part
            for v in level
            if isinstance(v, (list, dict))
            for part in (v.values() if isinstance(v, dict) else v)
        ]
    return bool(level)


def show(value):
    """value in an error's line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
