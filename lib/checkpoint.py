"""Files: one way to save, one way to load, one way to read JSON, one process at a time in a folder.

A file is written whole or not at all. Code in a file that is read is never executed, and damage is
recognised.
"""

import json
import os
import sys
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from lib import parallel

import torch
from filelock import FileLock, Timeout

LARGEST = 2**26  # bytes of a JSON file, or of one line
DEEPEST = 100  # lists and objects within each other
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


# --------------------------------------------------------------------------------------------------
# Checkpoints


def save(path, state, keep=False):
    """Write state to path, whole or not at all. Of several processes only the first writes.

    keep: the file that was there before stays, as previous(path).
    """
    if parallel.rank():
        return
    with replacing(path, "wb", keep) as f:
        torch.save(state, f)


def load(path, mapped=False):
    """The state saved at path, on the CPU. ValueError if the file is damaged, or is none of ours.

    Code in the file is never executed. mapped: tensors stay in the file, for what is copied
    elsewhere at once: so it is never a second time in memory.
    """
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(state, dict):
            raise ValueError("it holds no dictionary")
        return state
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:  # bytes of another kind, or cut short, raise nearly anything
        reason = str(e).partition("\n")[0][:100] or type(e).__name__
        raise ValueError(
            f"{path}: damaged, or not a checkpoint of ours ({reason}); "
            "expected a file that train.py saved, whole"
        )


def check_archive(path):
    """ValueError if a checksum is wrong: torch.save writes checksums, torch.load ignores them."""
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type or member.external_attr for member in archive.infolist()):
            raise ValueError("a part is packed or a folder, which torch.save's never are")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")


def load_last(path):
    """The state last saved at path: if that is damaged, the one before, with a warning; else {}."""
    for file in (path, previous(path)):
        try:
            return load(file, mapped=parallel.size() > 1)  # each process takes its share of it
        except FileNotFoundError:
            continue
        except ValueError as e:
            print(f"warning: {e}. Going on from what was saved before it", file=sys.stderr)
    return {}


def previous(path):
    """Where `save` keeps the file that was at path before: state.pt → state.previous.pt."""
    return path.with_suffix(".previous" + path.suffix)


@contextmanager
def replacing(path, mode="w", keep=False):
    """`with replacing(path) as f:` writes a file that takes path's place once it is complete.

    After any error, path is as it was. OSError names path where it cannot be written.
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
        # torch.save may raise a RuntimeError that hides the system's error.
        cause = e.__context__ if isinstance(e, RuntimeError) else e
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
    """Lock folder against other processes. ValueError if another process has the lock.

    The system frees the lock when its process ends, also when it is killed.
    """
    lock = nullcontext() if parallel.rank() else FileLock(folder / ".lock", timeout=0)
    try:
        with lock:
            yield
    except Timeout:
        raise ValueError(
            f"another process is at work on the run in {folder}; --out_dir FOLDER starts another"
        )


# --------------------------------------------------------------------------------------------------
# JSON


def read_json(path, needed=None):
    """The JSON object in the file at path, as a dict. ValueError names the file and what is wrong.

    needed: {name: type, several types, or None for any} of the fields that it must have.
    """
    refuse_pointer(path)
    with open(path, "rb") as f:
        value = parse_json(f.read(LARGEST + 1), path)
    for name, types in (needed or {}).items():
        if name not in value:
            raise ValueError(
                f"{path}: {name} is missing; expected a file that this version of train.py wrote"
            )
        if types is None:
            continue
        types = types if isinstance(types, tuple) else (types,)
        if type(value[name]) not in types:
            expected = " or ".join(t.__name__ for t in types)
            raise ValueError(f"{path}: {name} is {show(value[name])}; expected {expected}")
    return value


def unique(fields):
    """A JSON object's fields as a dict. json alone would silently use the last of two labels."""
    value = dict(fields)
    if len(value) < len(fields):
        ((name, _),) = Counter(name for name, _ in fields).most_common(1)
        raise ValueError(f"{show(name)} is given twice")
    return value


def _no_number(name):
    raise ValueError(f"{name} is no number")


DECODER = json.JSONDecoder(object_pairs_hook=unique, parse_constant=_no_number)


def parse_json(raw, place, decoder=DECODER):
    """The JSON object in raw, bytes, as a dict. ValueError names place, value and remedy."""
    if len(raw) > LARGEST:
        raise ValueError(f"{place}: more than {LARGEST >> 20} MiB of JSON at once; expected less")
    try:
        value = decoder.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"{place}: byte {e.start + 1} is not UTF-8; expected text in UTF-8")
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{place}: not valid JSON ({e.msg} at line {e.lineno} column {e.colno}); "
            "expected one object"
        )
    except (ValueError, RecursionError) as e:
        raise unreadable(e, place)
    return checked_object(value, place)


def unreadable(e, place):
    """The error of JSON that is valid and no good: a field twice, a number of a thousand digits."""
    return ValueError(
        f"{place}: JSON that cannot be read ({e}); "
        "expected an object with each field once, not nested deeply"
    )


def checked_object(value, place):
    """The value, if it is a dict that is not nested deeply."""
    if not isinstance(value, dict):
        raise ValueError(f"{place}: holds {show(value)}; expected a JSON object")
    if _is_too_deep(value):
        raise ValueError(f"{place}: JSON nested more than {DEEPEST} deep; expected less")
    return value


def _is_too_deep(value):
    level = [value]
    for _ in range(DEEPEST):
        children = []
        for parent in level:
            if isinstance(parent, dict):
                children += parent.values()
            elif isinstance(parent, list):
                children += parent
        if not children:
            return False
        level = children
    return True


def refuse_pointer(path):
    """ValueError if Git has left a pointer in the place of a large file."""
    with open(path, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(
                f"{path}: is a pointer of Git LFS and not the file; `git lfs pull` brings the file"
            )


def show(value):
    """value as JSON, cut to what fits into an error's line."""
    text = json.dumps(value, default=str)  # Parquet has values that JSON does not
    return text if len(text) <= 60 else text[:57] + "..."
