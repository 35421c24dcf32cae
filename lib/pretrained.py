"""Hugging Face model folders in and out: Llama, Mistral, Qwen2 and Qwen3.

A folder holds config.json (hf_config.py), one or many *.safetensors (hf_weights.py) and
tokenizer.json.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

from lib import checkpoint
from lib.hf_config import llama_config, read_config
from lib.hf_weights import (
    empty_model,
    load_weights,
    safetensors_library,
    weight_files,
    weights_by_hf_name,
)
from lib.tokenizer import Tokenizer

import torch
from tokenizers import Tokenizer as BPE

from model import Transformer

COPIED_FILES = (  # what --export writes as it was read, except for the dtype in config.json
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MAKE_TOKENIZER = (
    "this makes one: python -c 'import sys, transformers as t; "
    "t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])' {}"
)


def load(folder, template, longest, device):
    """(model in float32, its tokenizer) of a Hugging Face folder.

    longest: tokens of the longest row that the model will see. ValueError names what does not fit.
    """
    folder = Path(folder)
    tokenizer = load_tokenizer(folder, template)
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
        for name in files.keys() & set(COPIED_FILES):
            (unfinished / name).write_bytes(files[name])
        os.replace(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished)
        raise


def llama_files(config, tokenizer):
    """{name: bytes} of the files beside the weights, for a model that was trained from nothing."""
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.bpe.id_to_token(tokenizer.eos),
    }
    contents = {
        "config.json": llama_config(config, tokenizer.eos),
        "tokenizer_config.json": tokenizer_config,
        "tokenizer.json": json.loads(tokenizer.serialized),
    }
    return {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}


def load_tokenizer(folder, template):
    """The Tokenizer of the folder's tokenizer.json. ValueError names what is missing or unusable.

    Special tokens that tokenizer.json puts before each text, such as BOS, stand before prompts.
    """
    path = folder / "tokenizer.json"
    make_tokenizer = MAKE_TOKENIZER.format(shlex.quote(str(folder)))
    if not path.exists():
        raise ValueError(
            f"{path}: no such file; where there is a tokenizer.model, {make_tokenizer}"
        )
    files = {n: (folder / n).read_bytes() for n in COPIED_FILES if (folder / n).exists()}
    tokenizer_config, added_elsewhere, special_tokens = (
        checkpoint.read_json(folder / name) if name in files else {}
        for name in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    )
    settings = special_tokens | tokenizer_config
    try:
        serialized = files["tokenizer.json"].decode()
        bpe = BPE.from_str(serialized)
        bpe.no_padding()
        bpe.no_truncation()
        encoded = bpe.encode("x", add_special_tokens=True)
        added = {token.content: i for i, token in bpe.get_added_tokens_decoder().items()}
        eos = token_text(settings.get("eos_token"))
        decoder = settings.get("added_tokens_decoder") or {}
        missing = {*added_elsewhere, *map(token_text, decoder.values())} - added.keys()
    except Exception as e:  # the library raises nothing more specific
        raise ValueError(
            f"{path}: cannot be used ({str(e).splitlines()[0]}); "
            "expected a file of the tokenizers library"
        )
    if eos not in added:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: eos_token is {eos}; "
            "expected one of tokenizer.json's added_tokens"
        )
    if missing:
        raise ValueError(
            f"{path}: lacks {min(missing)}, which files beside it add; {make_tokenizer}"
        )
    mask = encoded.special_tokens_mask  # 1 at special tokens, 0 at those of "x"
    first = encoded.ids[: mask.index(0)] if 0 in mask else []
    try:
        return Tokenizer(serialized, template, added[eos], first, files)
    except ValueError as e:
        raise ValueError(f"{path}: {e}")


def token_text(token):
    """A token's text. Files give a token as a string, or as an object with its content."""
    if isinstance(token, dict) and "content" in token:
        token = token["content"]
    return str(token)
