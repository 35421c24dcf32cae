"""The weights of a Hugging Face folder: its *.safetensors, and what they are called in our model.

A weight for which our transformer has no parameter is refused by name. Tensors are copied a few
rows at a time, so that loading takes the memory of one copy.
"""

import functools
import math
import shlex
from contextlib import contextmanager
from pathlib import Path

from lib import checkpoint

import torch

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # safetensors' names
ELEMENTS_AT_ONCE = 2**20  # of a tensor that is read
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PICKLES = (
    "{}: its weights are pickles ({}), and reading a pickle can run code. "
    "Where you trust it, this writes them as safetensors: "
    "python -c 'import sys, torch, safetensors.torch as s; from pathlib import Path; "
    "[s.save_file({{k: v.clone() for k, v in torch.load(f, weights_only=True).items()}}, "
    """f.with_name(f.stem.removeprefix("pytorch_") + ".safetensors")) """
    "for f in map(Path, sys.argv[1:])]' {}/pytorch_model*.bin"
)


# --------------------------------------------------------------------------------------------------
# Our parameters


def empty_model(model_class, config, device, dtype=torch.float32):
    """A model whose weights are not yet written, so that there is never a second copy of them.

    dtype: of its matrices.
    """
    with torch.device("meta"):
        model = model_class(config)
    hold(model, dtype)
    try:
        model.to_empty(device=device)
    except RuntimeError as e:
        size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
        reason = str(e).splitlines()[0]
        raise ValueError(f"{size:.1f} GB of weights do not fit on {device} ({reason})")
    model.tie()
    return model


def hold(model, dtype):
    """Keep the matrices of the model in dtype, but for adapters: these and vectors stay float32."""
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "lora_" not in name:
            weight.data = weight.data.to(dtype)
    return model


def hold_frozen(model, dtype):
    """Where adapters learn, keep the blocks' matrices in dtype if that is narrower. It is the type
    of their products, and nothing else reads them: else they are cast for each micro-batch."""
    weight = model.blocks[0].mlp.down.weight
    if not weight.requires_grad and dtype.itemsize < weight.element_size():
        hold(model.blocks, dtype)


def held_in(model):
    """The name of the type in which its matrices are held."""
    return str(model.blocks[0].mlp.down.weight.dtype).removeprefix("torch.")


def weights_by_hf_name(model):
    """{Hugging Face's name: our parameter, or a view of that part of it which the name means}."""
    weights = {EMBEDDING: model.embedding.weight, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        for name, weight in block_weights(block, model.config).items():
            weights[f"model.layers.{i}.{name}"] = weight
    if not model.config.tied_head:
        weights[HEAD] = model.head.weight
    return weights


def block_weights(block, config):
    """The same for one layer. q, k and v are one matrix in our model, and so are gate and up."""
    gate, up = block.mlp.gate_up.weight.chunk(2)
    weights = {
        "input_layernorm.weight": block.attention_norm.weight,
        "self_attn.o_proj.weight": block.attention.out.weight,
        "post_attention_layernorm.weight": block.mlp_norm.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": block.mlp.down.weight,
    }
    rows = [heads * config.d_head for heads in (config.n_head, config.n_kv_head, config.n_kv_head)]
    for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
        qkv = getattr(block.attention.qkv, kind)
        for letter, part in zip("qkv", qkv.split(rows)):
            weights[f"self_attn.{letter}_proj.{kind}"] = part
    for letter, norm in zip("qk", block.attention.qk_norms):
        weights[f"self_attn.{letter}_norm.weight"] = norm.weight
    return weights


@torch.no_grad()
def load_weights(weights, files, ignored=()):
    """Copy the files' tensors into weights, {name: tensor}.

    files: {name: path}. ignored: a tuple; names that begin with one of its texts are not read.
    ValueError names what does not fit.
    """
    missing, folder = set(weights), next(iter(files.values())).parent
    for name in sorted(files, key=lambda name: name == HEAD):  # a tied head needs the embedding
        if name.endswith("rotary_emb.inv_freq") or name.startswith(ignored):
            continue
        path = files[name]
        tied = name == HEAD and HEAD not in weights
        weight = weights.get(EMBEDDING if tied else name)
        if weight is None:
            raise ValueError(
                f"{path}: {name} has no place in this transformer; expected Llama's names"
            )
        copy_tensor(path, name, weight, tied)
        missing.discard(name)
    if missing:
        raise ValueError(f"{folder}: {min(missing)} is missing from the weights")


def dtype_of(files):
    """The smallest dtype that holds all tensors of {name: path} exactly."""
    kinds = {tensor_header(path, name)[1] for name, path in files.items()}
    dtypes = [DTYPES[kind] for kind in kinds & DTYPES.keys()] or [torch.float32]
    return functools.reduce(torch.promote_types, dtypes)


def copy_tensor(path, name, weight, tied):
    """Copy a file's tensor into weight.

    tied: weight is the embedding, which is written already. The tensor must be the same.
    """
    shape, kind = tensor_header(path, name)
    if shape != weight.shape or kind not in DTYPES:
        raise ValueError(
            f"{path}: {name} is {shape} of {kind}; "
            f"expected {tuple(weight.shape)} of {', '.join(DTYPES)}"
        )
    rows = max(1, ELEMENTS_AT_ONCE // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        part = tensor_rows(path, name, start, start + rows)
        if not part.isfinite().all():
            raise ValueError(f"{path}: {name} holds weights that are no numbers")
        narrower = min(part.dtype, weight.dtype, key=lambda dtype: dtype.itemsize)
        if tied and not part.to(narrower).equal(weight[start : start + rows].to(narrower)):
            raise ValueError(
                f"{path}: lm_head.weight differs from the embedding, "
                "though config.json says tie_word_embeddings"
            )
        weight[start : start + rows] = part


# --------------------------------------------------------------------------------------------------
# Files


def weight_files(folder):
    """{tensor's name: the file that holds it}. ValueError says what to do where there is none.

    As for transformers, model.safetensors comes first, then the index.
    """
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.exists():
        files = dict.fromkeys(tensor_names(single), single)
    elif index.exists():
        files = read_index(index)
    else:
        shards = sorted(folder.glob("model-*.safetensors"))
        files = {name: shard for shard in shards for name in tensor_names(shard)}
    pickles = sorted(f.name for f in folder.glob("pytorch_model*.bin"))
    if not files and pickles:
        raise ValueError(PICKLES.format(folder, pickles[0], shlex.quote(str(folder))))
    if not files:
        raise ValueError(
            f"{folder}: holds no weights; expected model.safetensors, or several and their index"
        )
    return files


def read_index(path):
    """{tensor's name: the file that holds it} of a model.safetensors.index.json."""
    files = checkpoint.read_json(path, {"weight_map": dict})["weight_map"]
    for name, file in files.items():
        in_folder = isinstance(file, str) and Path(file).name == file
        if not in_folder or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path}: {name} is {str(file)[:60]!r}; "
                "expected the name of a file in the same folder"
            )
    return {name: path.parent / file for name, file in files.items()}


def safetensors_library():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face folders need safetensors: pip install safetensors")
    return safetensors


@contextmanager
def open_tensors(path):
    """The open safetensors file. ValueError if it cannot be read.

    It is opened anew for each read: it is mapped into memory, and what was read of it counts as
    the process's memory until it is closed.
    """
    library = safetensors_library()
    try:
        checkpoint.refuse_pointer(path)
        with library.safe_open(path, "pt") as file:
            yield file
    except (library.SafetensorError, OSError) as e:
        raise ValueError(f"{path}: cannot be read as safetensors ({e}); expected the whole file")


def tensor_names(path):
    with open_tensors(path) as file:
        return list(file.keys())


def tensor_header(path, name):
    """(shape, safetensors' name of the dtype)."""
    with open_tensors(path) as file:
        tensor = file.get_slice(name)
        return tuple(tensor.get_shape()), tensor.get_dtype()


def tensor_rows(path, name, start, end):
    with open_tensors(path) as file:
        return file.get_slice(name)[start:end]
