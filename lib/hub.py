"""Models and data sets by their names on the Hugging Face hub, which are fetched once and kept.

OWNER/NAME, OWNER/NAME/FOLDER, and either with @REVISION. Nothing is fetched whose reading can run
code. What lies here under that name comes first.
"""

import functools
import re
from pathlib import Path

from lib import hf_adapter
from lib.hf_tokenizer import COPIED_FILES
from lib.rows import KINDS, PACKABLE, PACKED, parts_of_name

NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<inside>(/[\w.-]+)*)/?(@(?P<revision>.+))?")
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
ROWS = [f"*{kind}{packed}" for kind in PACKABLE for packed in PACKED] + ["*.parquet"]


def model_path(name):
    """The folder of a model or of adapters, or a checkpoint of ours."""
    return path_of(name, "model", (*COPIED_FILES, *WEIGHTS, *hf_adapter.FILES))


def data_path(name):
    """The file or folder of a data set."""
    return path_of(name, "dataset", (*ROWS, *map(str.upper, ROWS)))


@functools.cache
def path_of(name, kind, patterns):
    """The path that a name means: one that is here, or what the hub has. ValueError if neither.

    A name that cannot be the hub's is a path, whether there is something or not.
    """
    path, parts = Path(name), NAME.fullmatch(str(name))
    if path.exists() or not parts or path.suffix == ".pt":
        return path
    repo, inside, revision = parts["repo"], parts["inside"].strip("/"), parts["revision"]
    is_file = kind == "dataset" and bool(parts_of_name(inside or repo)[1])
    if is_file and not inside:
        return path
    within = [f"{inside}/{pattern}" for pattern in patterns] if inside else patterns
    try:
        from huggingface_hub import snapshot_download

        deeper = f"{inside}/*/*" if inside else "*/*"  # other formats of the same weights
        folder = snapshot_download(
            repo,
            repo_type=kind,
            revision=revision,
            allow_patterns=[inside] if is_file else within,
            ignore_patterns=deeper if kind == "model" else None,
        )
    except Exception as e:  # the network's, the hub's, the disk's
        reason = f"{type(e).__name__}: {' '.join(str(e).split())}"[:300]
        raise ValueError(
            f"{name}: no such file or folder here, and not to be had from the Hugging Face hub "
            f"({reason})"
        )
    path = Path(folder, inside)
    files = [path, *path.rglob("*")]  # the cache may hold others too
    if kind == "model":
        found = any(file.suffix == ".safetensors" for file in files)
    else:
        found = any(parts_of_name(file)[1] and file.is_file() for file in files)
    if not found and kind == "model":
        raise ValueError(
            f"{name}: the Hugging Face hub has no model*.safetensors there (nor "
            f"{hf_adapter.WEIGHTS}), and nothing else is "
            f"fetched; `hf download {repo} --local-dir FOLDER` brings all, and --init_from FOLDER "
            "says how pickles are converted"
        )
    if not found:
        raise ValueError(f"{name}: the Hugging Face hub has no file of rows there; {KINDS}")
    print(f"{name}: {repo} of the Hugging Face hub, revision {Path(folder).name}")
    return path
