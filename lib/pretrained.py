"""Hugging Face model folders in and out: Llama, Mistral, Qwen2 and Qwen3.

A folder holds config.json (hf_config.py), one or many *.safetensors (hf_weights.py) and
tokenizer.json.
"""

import json
import os
import shutil
from pathlib import Path

from lib import hf_tokenizer
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


def load(folder, template, longest, device):
    """(model in float32, its tokenizer) of a Hugging Face folder.

    longest: tokens of the longest row that the model will see. ValueError names what does not fit.
    """
    folder = Path(folder)
    tokenizer = hf_tokenizer.load_tokenizer(folder, template)
    files = weight_files(folder)
    hf, config = read_config(folder, tokenizer, longest)
    model = empty_model(Transformer, config, device)
    dtype = load_weights(weights_by_hf_name(model), files)
    # `export` writes the dtype that the files really had, whatever config.json said.
    hf["dtype" if "dtype" in hf else "torch_dtype"] = str(dtype).removeprefix("torch.")
    tokenizer.files["config.json"] = json.dumps(hf, indent=2).encode()
    return model.eval(), tokenizer


def export(model, tokenizer, folder):
    """Write model and tokenizer as a Hugging Face folder, which must not exist yet.

    Weights are written in the dtype they came in, all other files as they were read.
    """
    folder = Path(folder)
    unfinished = folder.with_name(folder.name + ".tmp")
    for path in (folder, unfinished):
        if path.exists():
            raise ValueError(f"--export {path}: exists already; expected the name of a new folder")
    files = tokenizer.files or llama_files(model.config, tokenizer)
    hf = json.loads(files["config.json"])
    dtype = getattr(torch, hf.get("dtype") or hf["torch_dtype"])
    weights = {name: w.detach().to("cpu", dtype) for name, w in weights_by_hf_name(model).items()}
    unfinished.mkdir(parents=True)
    try:
        save_file = safetensors_library().torch.save_file
        save_file(weights, unfinished / "model.safetensors", metadata={"format": "pt"})
        for name, content in hf_tokenizer.exported_files(tokenizer, files).items():
            (unfinished / name).write_bytes(content)
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def llama_files(config, tokenizer):
    """{name: bytes} of the files beside the weights, for a model that was trained from nothing."""
    contents = {
        "config.json": llama_config(config, tokenizer.eos),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
        "tokenizer.json": json.loads(tokenizer.serialized),
    }
    return {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
