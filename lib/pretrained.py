"""Hugging Face model folders in and out: Llama, Mistral, Qwen2, Qwen3, and the score models that judge answers.

A folder holds config.json, one or many *.safetensors (with an index) and tokenizer.json. What config.json asks for and our
transformer cannot do is refused by name, and so is a weight that has no place in it.
"""

import json
import math
import os
import shlex
import shutil
from pathlib import Path

import torch
import torch.nn as nn
from tokenizers import Tokenizer as BPE

from lib import checkpoint
from lib.tokenizer import Tokenizer
from model import ModelConfig, Transformer

FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}  # model_type → what sets it apart
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "is_causal": True,
}
TYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}  # by their names in safetensors
SLICE = 2**20  # elements of a tensor that are read at once
CARRIED = (  # what --export writes as it was read, beside the weights
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
PICKLES = (
    "{}: its weights are pickles ({}), and reading a pickle can run code. Where you trust it, this writes them as safetensors: "
    "python -c 'import sys, torch, safetensors.torch as s; [s.save_file({{k: v.clone() for k, v in torch.load(f, weights_only=True).items()}}, "
    """f[:-4].replace("/pytorch_", "/") + ".safetensors") for f in sys.argv[1:]]' {}/pytorch_model*.bin"""
)
MAKE_TOKENIZER = "this makes one: python -c 'import sys, transformers as t; t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])' {}"


# ---------------------------------------------------------------------------------------------------------------------
# config.json → ModelConfig


def read_config(folder, tokenizer, longest, **changes):
    """(config.json decoded, the ModelConfig it stands for). longest: tokens of the longest row that the model will see."""
    place = folder / "config.json"
    hf = checkpoint.read_json(place) | changes
    try:
        config = model_config(hf)
        config.check_length(longest)
    except ValueError as e:
        raise ValueError(f"{place}: {e}")
    except (TypeError, AttributeError) as e:  # a list where a number should be, and the like
        raise ValueError(f"{place}: cannot be read as a model's configuration ({e})")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{place}: vocab_size is {config.vocab_size}, and tokenizer.json has ids up to {tokenizer.vocab_size - 1}"
        )
    return hf, config


def model_config(hf):
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; expected one of {', '.join(FAMILIES)}")
    for name, value in FIXED.items():
        if hf.get(name, value) not in (value, None):
            raise ValueError(
                f"{name} is {str(hf[name])[:60]}; expected {value}, the only kind that this transformer computes"
            )

    def number(name, default=None, kind=int, most=2**24):
        value = default if hf.get(name) is None else hf[name]
        if type(value) not in (int, kind) or not 0 < value <= most:
            raise ValueError(
                f"{name} is {str(value)[:60]!r}; expected a number above 0, at most {most}"
            )
        return value

    slides = (
        hf.get("use_sliding_window", False)
        if family.startswith("qwen")
        else family == "mistral" or "sliding_window" in hf
    )
    layers = set(hf.get("layer_types") or ["sliding_attention" if slides else "full_attention"])
    if others := layers - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layer_types has {min(others)}; expected full_attention")
    if "sliding_window" in hf and hf["sliding_window"] is None:
        layers = {"full_attention"}
    return ModelConfig(
        vocab_size=number("vocab_size"),
        n_layer=number("num_hidden_layers", most=2**10),
        n_head=number("num_attention_heads"),
        n_kv_head=number(
            "num_key_value_heads", hf["num_attention_heads"] if family == "llama" else None
        ),
        d_model=number("hidden_size"),
        d_ff=number("intermediate_size"),
        d_head=0 if hf.get("head_dim") is None else number("head_dim"),
        norm_eps=number("rms_norm_eps", 1e-6, float),
        tied_head=hf.get("tie_word_embeddings") is True,
        window=number("sliding_window", 4096) if "sliding_attention" in layers else 0,
        **rotary(hf),
        **FAMILIES[family],
    )


def rotary(hf):
    """ModelConfig's fields on rotary positions, which stand under rope_parameters, or in older files rope_scaling and outside."""
    old, new = (
        {} if hf.get(name) is None else hf[name] for name in ("rope_scaling", "rope_parameters")
    )
    outside = {
        k: hf[k]
        for k in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        if hf.get(k) is not None
    }
    if old and new and old != new:
        raise ValueError("rope_scaling and rope_parameters differ; expected one of them")
    rope = {"rope_theta": 10000.0, **outside, **old, **new}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    needed = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ),
    }
    if kind not in needed:
        raise ValueError(
            f"the type of rotary scaling is {kind!r}; expected one of {', '.join(needed)}"
        )
    for name in ("rope_theta", *needed[kind]):
        if (
            type(rope.get(name)) not in (int, float)
            or not 0 < rope[name] < 2**64
            or outside.get(name, rope[name]) != rope[name]
        ):
            raise ValueError(
                f"{name} of its rotary positions is {str(rope.get(name))[:60]}; expected a number above 0, the same wherever it stands"
            )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; expected 1.0")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rotary positions that differ between layers; expected the same in all")
    factor, *llama3 = [float(rope[name]) for name in needed[kind]] or [1.0]
    if llama3 and not llama3[0] < llama3[1]:
        raise ValueError(
            f"low_freq_factor is {llama3[0]}; expected it below high_freq_factor, {llama3[1]}"
        )
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_factor": factor,
        "rope_llama3": tuple(llama3),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def places(model):
    """{Hugging Face's name: its place in model}, each a view: q, k and v are one matrix here, and so are gate and up."""
    c, found = (
        model.config,
        {
            "model.embed_tokens.weight": model.embedding.weight,
            "model.norm.weight": model.norm.weight,
        },
    )
    heads = [n * c.d_head for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for i, block in enumerate(model.blocks):
        a, m, at = block.attention, block.mlp, f"model.layers.{i}."
        for kind, whole in a.qkv.named_parameters():
            found |= {
                f"{at}self_attn.{n}_proj.{kind}": part for n, part in zip("qkv", whole.split(heads))
            }
        found |= {
            f"{at}self_attn.{n}_norm.weight": norm.weight for n, norm in zip("qk", a.qk_norms)
        }
        found |= {
            f"{at}mlp.{n}_proj.weight": part
            for n, part in zip(("gate", "up"), m.gate_up.weight.chunk(2))
        }
        found |= {
            f"{at}self_attn.o_proj.weight": a.out.weight,
            f"{at}mlp.down_proj.weight": m.down.weight,
        }
        found |= {
            f"{at}input_layernorm.weight": block.attention_norm.weight,
            f"{at}post_attention_layernorm.weight": block.mlp_norm.weight,
        }
    return found if c.tied_head else found | {"lm_head.weight": model.head.weight}


def library():
    try:
        import safetensors.torch
    except ImportError:
        raise ValueError("Hugging Face folders need safetensors: pip install safetensors")
    return safetensors


def tensor_files(folder):
    """{tensor's name: the file that holds it}, of one file, else of those in the index, else of model-*.safetensors."""
    index, shards = folder / "model.safetensors.index.json", [folder / "model.safetensors"]
    if not shards[0].exists() and index.exists():
        files = checkpoint.read_json(index, {"weight_map": dict})["weight_map"]
        for name, file in files.items():
            if (
                not isinstance(file, str)
                or Path(file).name != file
                or not file.endswith(".safetensors")
            ):
                raise ValueError(
                    f"{index}: {name} is {str(file)[:60]!r}; expected the name of a file in the same folder"
                )
        files = {name: folder / file for name, file in files.items()}
    else:
        shards = shards if shards[0].exists() else sorted(folder.glob("model-*.safetensors"))
        files = {name: path for path in shards for name in read(path, lambda f: list(f.keys()))}
    pickles = sorted(f.name for f in folder.glob("pytorch_model*.bin"))
    if not files and pickles:
        raise ValueError(PICKLES.format(folder, pickles[0], shlex.quote(str(folder))))
    if not files:
        raise ValueError(
            f"{folder}: holds no weights; expected model.safetensors, or several and their index"
        )
    return files


def read(path, wanted):
    """wanted(the open safetensors file). It is mapped into memory only meanwhile, since what was touched of it counts."""
    try:
        with library().safe_open(path, "pt") as f:
            return wanted(f)
    except (library().SafetensorError, OSError) as e:
        raise ValueError(f"{path}: cannot be read as safetensors ({e}); expected the whole file")


@torch.no_grad()
def fill(slots, files, unused=()):
    """Copy the files' tensors into their slots, a slice at a time. Returns the smallest type that holds all of them exactly."""
    dtype, empty = None, set(slots)
    for name, path in sorted(
        files.items(), key=lambda item: item[0] == "lm_head.weight"
    ):  # after the embedding
        if name.endswith("rotary_emb.inv_freq") or name.startswith(tuple(unused)):
            continue
        tied = name == "lm_head.weight" and name not in slots
        slot = slots.get("model.embed_tokens.weight" if tied else name)
        if slot is None:
            raise ValueError(
                f"{path}: {name} has no place in this transformer; expected Llama's names"
            )
        shape, kind = read(
            path, lambda f: (tuple(f.get_slice(name).get_shape()), f.get_slice(name).get_dtype())
        )
        if shape != slot.shape or kind not in TYPES:
            raise ValueError(
                f"{path}: {name} is {shape} of {kind}; expected {tuple(slot.shape)} of {', '.join(TYPES)}"
            )
        dtype = torch.promote_types(dtype or TYPES[kind], TYPES[kind])
        rows = max(1, SLICE // math.prod(shape[1:]))
        for start in range(0, shape[0], rows):
            part = read(path, lambda f: f.get_slice(name)[start : start + rows])
            if not part.isfinite().all():
                raise ValueError(f"{path}: {name} holds weights that are no numbers")
            if tied and not part.equal(slot[start : start + rows].to(part)):
                raise ValueError(
                    f"{path}: lm_head.weight differs from the embedding, though config.json says tie_word_embeddings"
                )
            slot[start : start + rows] = part
        empty.discard(name)
    if empty:
        raise ValueError(f"{path.parent}: {min(empty)} is missing from the weights")
    return dtype


def blank(kind, config, device):
    """A model of that kind whose weights are not yet written, so that there is one copy of them."""
    with torch.device("meta"):
        model = kind(config)
    try:
        model.to_empty(device=device)
    except RuntimeError as e:
        raise ValueError(
            f"{sum(p.numel() for p in model.parameters())} float32 weights do not fit on {device} ({str(e).splitlines()[0]})"
        )
    model.tie()
    return model


def load(folder, template, longest, device):
    """(model in float32, its tokenizer) of a Hugging Face folder. longest: tokens of the longest row that it will see."""
    folder = Path(folder)
    tokenizer, files = load_tokenizer(folder, template), tensor_files(folder)
    hf, config = read_config(folder, tokenizer, longest)
    model = blank(Transformer, config, device)
    dtype = str(fill(places(model), files)).removeprefix("torch.")
    tokenizer.files["config.json"] = json.dumps(
        {**hf, "dtype" if "dtype" in hf else "torch_dtype": dtype}, indent=2
    ).encode()
    return model.eval(), tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


def load_tokenizer(folder, template):
    """The folder's tokenizer.json. What stands before a text (BOS, or nothing) is what the file itself puts there."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{path}: no such file; where there is a tokenizer.model, {MAKE_TOKENIZER.format(shlex.quote(str(folder)))}"
        )
    files = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).exists()}
    settings, added = (
        {} if name not in files else checkpoint.read_json(folder / name)
        for name in ("tokenizer_config.json", "added_tokens.json")
    )
    if "special_tokens_map.json" in files:
        settings = checkpoint.read_json(folder / "special_tokens_map.json") | settings
    content = lambda token: (
        token["content"] if isinstance(token, dict) and "content" in token else token
    )
    try:
        bpe = BPE.from_str(files["tokenizer.json"].decode())
        bpe.no_padding()
        bpe.no_truncation()
        e = bpe.encode("x", add_special_tokens=True)
        known = {t.content: i for i, t in bpe.get_added_tokens_decoder().items()}
        eos = str(content(settings.get("eos_token")))
        elsewhere = {
            *added,
            *(
                str(content(token))
                for token in (settings.get("added_tokens_decoder") or {}).values()
            ),
        }
    except Exception as e:  # the library raises nothing more specific
        raise ValueError(
            f"{path}: cannot be used ({str(e).splitlines()[0]}); expected a file of the tokenizers library"
        )
    if eos not in known:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: eos_token is {eos}; expected one of tokenizer.json's added_tokens"
        )
    if elsewhere - known.keys():
        raise ValueError(
            f"{path}: lacks {min(elsewhere - known.keys())}, which files beside it add; {MAKE_TOKENIZER.format(shlex.quote(str(folder)))}"
        )
    first = e.ids[: e.special_tokens_mask.index(0)] if 0 in e.special_tokens_mask else []
    try:
        return Tokenizer(files["tokenizer.json"].decode(), template, known[eos], first, files)
    except ValueError as e:
        raise ValueError(f"{path}: {e}")


# ---------------------------------------------------------------------------------------------------------------------
# Out


def export(model, tokenizer, folder):
    """Write model and tokenizer as a Hugging Face folder: weights in the type they came in, all else as it was read."""
    folder = Path(folder)
    half = folder.with_name(folder.name + ".tmp")
    for path in (folder, half):
        if path.exists():
            raise ValueError(f"--export {path}: exists already; expected the name of a new folder")
    files = tokenizer.files or own_files(model.config, tokenizer)
    hf = json.loads(files["config.json"])
    dtype = getattr(torch, hf.get("dtype") or hf["torch_dtype"])
    weights = {name: place.detach().to("cpu", dtype) for name, place in places(model).items()}
    half.mkdir(parents=True)
    try:
        library().torch.save_file(weights, half / "model.safetensors", metadata={"format": "pt"})
        for name in files.keys() & set(CARRIED):
            (half / name).write_bytes(files[name])
        os.replace(half, folder)
    except BaseException:
        shutil.rmtree(half)
        raise


def own_files(c, tokenizer):
    """{name: bytes} beside the weights, for a model that was trained from nothing here: a Llama to everybody else."""
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.d_model,
        "intermediate_size": c.d_ff, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
        "head_dim": c.d_head, "hidden_act": "silu", "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta, "tie_word_embeddings": c.tied_head,
        "bos_token_id": None, "eos_token_id": tokenizer.eos, "torch_dtype": "float32",
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.bpe.id_to_token(tokenizer.eos),
    }
    contents = {
        "config.json": hf,
        "tokenizer_config.json": settings,
        "tokenizer.json": json.loads(tokenizer.serialized),
    }
    return {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Judges


class ScoreModel(Transformer):
    """A transformer with a head of one row, read at an answer's last token: a reward or a cost model."""

    def __init__(self, config):
        super().__init__(config)
        self.head = nn.Linear(config.d_model, 1)

    def forward(self, rows):
        """The score of each row's one answer: (A,) float32."""
        ends = (
            rows.predictor[rows.answer.bincount().cumsum(0) - 1] + 1
        )  # an answer's last token comes after what predicts it
        hidden = self.hidden(rows.tokens, rows.position, rows.sequences, rows.slot)
        return self.head(hidden[ends]).squeeze(-1).float()


def load_judge(folder, template, answers, device):
    """(model, [(ids, [[EOS]]), …]) of a score model's folder and [(prompt, answer), …], whose scores are then model(rows).

    Prompt and answer are encoded as one text here, as for these models in their training: scores depend on it. The head is
    score_head (beaver's) or score (transformers' sequence classifiers), its bias 0 where the files have none.
    """
    folder = Path(folder)
    tokenizer, files = load_tokenizer(folder, template), tensor_files(folder)
    prompts, texts = zip(*answers)
    examples = [(ids, [[tokenizer.eos]]) for ids in tokenizer.dialogues(prompts, texts)]
    longest = max(len(ids) + 1 for ids, _ in examples)
    hf, config = read_config(folder, tokenizer, longest, tie_word_embeddings=False)
    head = next((n for n in ("score_head", "score") if f"{n}.weight" in files), None)
    if head is None:
        raise ValueError(
            f"{folder}: no score_head.weight and no score.weight among its weights; expected a score model"
        )
    if hf.get("do_normalize") or hf.get("score_dim", 1) != 1:
        raise ValueError(
            f"{folder / 'config.json'}: do_normalize is true or score_dim is not 1; expected one score as the head gives it"
        )
    model = blank(ScoreModel, config, device)
    slots = places(model) | {f"{head}.weight": model.head.weight, f"{head}.bias": model.head.bias}
    del slots["lm_head.weight"]
    if f"{head}.bias" not in files:
        nn.init.zeros_(slots.pop(f"{head}.bias"))
    fill(slots, files, unused=("normalizer.", "lm_head."))
    return model.eval(), examples
