"""Hugging Face model folders in and out: Llama, Mistral, Qwen2 and Qwen3.

A folder holds config.json (hf_config.py), one or many *.safetensors (hf_weights.py) and
tokenizer.json.
"""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from lib import hf_tokenizer, hf_weights
from lib.hf_config import llama_config, read_config
from lib.hf_weights import (
    empty_model,
    load_weights,
    safetensors_library,
    weight_files,
    weights_by_hf_name,
)

import torch

from model import Transformer


def load(folder, template, longest, device, date=None, base_dtype="float32"):
    """(model, its tokenizer) of a Hugging Face folder.

    longest: tokens of the longest row that the model will see. date: the day that a chat template
    calls today; None is today. base_dtype: see `load_model`. ValueError names what does not fit.
    """
    folder = Path(folder)
    tokenizer = hf_tokenizer.load_tokenizer(folder, template, date)
    model, hf = load_model(folder, tokenizer, longest, device, base_dtype)
    tokenizer.files["config.json"] = json.dumps(hf, indent=2).encode()
    return model, tokenizer


def load_model(folder, tokenizer, longest, device, base_dtype):
    """(model, config.json as a dict) of a folder whose tokenizer is loaded already.

    base_dtype: of the matrices. "auto" is bfloat16 where the files are in it, else float32.
    """
    files = weight_files(folder)
    hf, config = read_config(folder, tokenizer, longest)
    held = base_type(files) if base_dtype == "auto" else base_dtype
    model = empty_model(Transformer, config, device, getattr(torch, held))
    load_weights(weights_by_hf_name(model), files)
    # `export` writes the dtype that the files really had, whatever config.json said.
    dtype = str(hf_weights.dtype_of(files)).removeprefix("torch.")
    hf["dtype" if "dtype" in hf else "torch_dtype"] = dtype
    return model.eval(), hf


def base_type(files):
    """The type in which a frozen model's matrices are held, by name: bfloat16 if the files are."""
    return "bfloat16" if hf_weights.dtype_of(files) == torch.bfloat16 else "float32"


def dtype_of(tokenizer):
    """The dtype in which the weights of a tokenizer's folder came: its name."""
    hf = json.loads(tokenizer.files.get("config.json", b"{}"))
    return hf.get("dtype") or hf.get("torch_dtype") or "float32"


@contextmanager
def new_folder(folder):
    """`with new_folder(folder) as part:` The folder part gets the name once it is complete.

    ValueError if there is something of that name already. After any error there is nothing.
    """
    folder = Path(folder)
    part = folder.with_name(folder.name + ".tmp")
    for path in (folder, part):
        if path.exists():
            raise ValueError(f"{path}: exists already; expected the name of a new folder")
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, folder)
    except BaseException:
        shutil.rmtree(part)
        raise


def export(model, tokenizer, folder, dtype=None):
    """Write model and tokenizer into a folder, as a Hugging Face folder.

    dtype: of the weights, by name; None takes that in which they came. All other files are written
    as they were read, but for what was trained.
    """
    dtype = dtype or dtype_of(tokenizer)
    files = tokenizer.files or llama_files(model.config, tokenizer)
    hf = json.loads(files["config.json"])
    hf["dtype" if "dtype" in hf else "torch_dtype"] = dtype
    files = files | {"config.json": json.dumps(hf, indent=2).encode()}
    weights = {
        name: weight.detach().to("cpu", getattr(torch, dtype))
        for name, weight in weights_by_hf_name(model).items()
    }
    for name, content in hf_tokenizer.exported_files(tokenizer, files).items():
        (folder / name).write_bytes(content)
    save_file = safetensors_library().torch.save_file
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # as the umask says


def llama_files(config, tokenizer):
    """{name: bytes} of the files beside the weights, for a model that was trained from nothing."""
    contents = {
        "config.json": llama_config(config, tokenizer.eos),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer.json": json.loads(tokenizer.serialized),
    }
    return {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
