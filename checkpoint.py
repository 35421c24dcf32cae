"""One way to save and one way to load. A file is written whole or not at all, and reading one runs no code of its own."""
import json
import os

import torch

import parallel


def save(path, state):
    """Write `state` to path. It is written beside path, synced and renamed, so path always holds one whole file.

    Of several processes only the first writes.
    """
    if parallel.rank():
        return
    with replacing(path, "wb") as f:
        torch.save(state, f)


def load(path):
    """The state saved at path, on the CPU; reading it runs no code of the file's. ValueError if it is no such file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as e:  # bytes of another kind, or cut short, raise nearly anything
        raise ValueError(f"{path}: not a checkpoint of ours ({type(e).__name__}); expected a file that train.py saved, whole")


def read_json(path, needed=()):
    """The JSON object in the file at path. ValueError names the file where it is anything else, or lacks a needed name."""
    try:
        with open(path, encoding="utf-8") as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})")
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no JSON object")
    for name in needed:
        if name not in value:
            raise ValueError(f"{path}: {name} is missing; expected a file that this version of train.py wrote")
    return value


class replacing:
    """`with replacing(path, mode) as f:` writes a file that takes path's place once it is complete and on the disk."""

    def __init__(self, path, mode="w"):
        self.path, self.mode = str(path), mode
        self.temporary = self.path + ".tmp"

    def __enter__(self):
        self.file = open(self.temporary, self.mode, encoding=None if "b" in self.mode else "utf-8")
        return self.file

    def __exit__(self, error, *_):
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if error is None:
            os.replace(self.temporary, self.path)
        else:
            os.remove(self.temporary)
