"""Hugging Face's config.json to our ModelConfig, and back.

What config.json asks for and our transformer does not compute is refused by name.
"""

from lib import checkpoint

from model import ModelConfig

FAMILIES = {  # model_type → the options of ModelConfig that this family needs
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}
ONLY_VALUES = {  # field → the one value that this transformer computes
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "quantization_config": None,
    "is_causal": True,
}
SCALING_FIELDS = {  # type of rotary scaling → the numbers that belong to it
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROTARY_OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def read_config(folder, tokenizer, longest, **changes):
    """(the decoded config.json with `changes` made, its ModelConfig).

    longest: tokens of the longest row that the model will see. ValueError names file and field.
    """
    path = folder / "config.json"
    hf = checkpoint.read_json(path) | changes
    try:
        config = model_config(hf)
        config.check_length(longest)
    except ValueError as e:
        raise ValueError(f"{path}: {e}")
    except (TypeError, AttributeError) as e:  # a list where a number should be, and the like
        raise ValueError(f"{path}: cannot be read as a model's configuration ({e})")
    limit = hf.get("max_position_embeddings")
    if isinstance(limit, int) and longest > limit:
        print(
            f"warning: the model was made for {limit} tokens (max_position_embeddings), and rows "
            f"may have {longest}; expected a smaller --max_length or --max_new_tokens"
        )
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{path}: vocab_size is {config.vocab_size}, "
            f"and tokenizer.json has ids up to {tokenizer.vocab_size - 1}"
        )
    return hf, config


def model_config(hf):
    """The ModelConfig of a decoded config.json. ValueError names the field that does not fit."""
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type is {family!r}; expected one of {', '.join(FAMILIES)}")
    for name, value in ONLY_VALUES.items():
        if hf.get(name, value) not in (value, None):
            raise ValueError(
                f"{name} is {str(hf[name])[:60]}; "
                f"expected {value}, the only kind that this transformer computes"
            )
    slides = has_sliding_window(hf, family)
    return ModelConfig(
        vocab_size=positive_number(hf, "vocab_size"),
        n_layer=positive_number(hf, "num_hidden_layers", largest=2**10),
        n_head=positive_number(hf, "num_attention_heads"),
        n_kv_head=positive_number(
            hf, "num_key_value_heads", hf["num_attention_heads"] if family == "llama" else None
        ),
        d_model=positive_number(hf, "hidden_size"),
        d_ff=positive_number(hf, "intermediate_size"),
        d_head=0 if hf.get("head_dim") is None else positive_number(hf, "head_dim"),
        norm_eps=positive_number(hf, "rms_norm_eps", 1e-6, float),
        tied_head=hf.get("tie_word_embeddings") is True,
        window=positive_number(hf, "sliding_window", 4096) if slides else 0,
        **rotary(hf),
        **FAMILIES[family],
    )


def positive_number(hf, name, default=None, kind=int, largest=2**24):
    """The field's value, or default where it is missing or null. ValueError if it is no number."""
    value = default if hf.get(name) is None else hf[name]
    if type(value) not in (int, kind) or not 0 < value <= largest:
        raise ValueError(
            f"{name} is {str(value)[:60]!r}; expected a number above 0, at most {largest}"
        )
    return value


def has_sliding_window(hf, family):
    """Whether attention is limited to a window in any layer. Families say so in different ways."""
    if family.startswith("qwen"):
        slides = hf.get("use_sliding_window", False)
    else:
        slides = family == "mistral" or "sliding_window" in hf
    default = "sliding_attention" if slides else "full_attention"
    layer_types = set(hf.get("layer_types") or [default])
    others = layer_types - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(f"layer_types has {min(others)}; expected full_attention")
    if "sliding_window" in hf and hf["sliding_window"] is None:
        return False
    return "sliding_attention" in layer_types


def rotary(hf):
    """ModelConfig's fields on rotary positions. ValueError names the field that does not fit."""
    rope, outside = rotary_fields(hf)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SCALING_FIELDS:
        raise ValueError(
            f"the type of rotary scaling is {kind!r}; expected one of {', '.join(SCALING_FIELDS)}"
        )
    for name in ("rope_theta", *SCALING_FIELDS[kind]):
        value = rope.get(name)
        valid = type(value) in (int, float) and 0 < value < 2**64
        if not valid or outside.get(name, value) != value:
            raise ValueError(
                f"{name} of its rotary positions is {str(value)[:60]}; "
                "expected a number above 0, the same wherever it stands"
            )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor is {rope['partial_rotary_factor']}; expected 1.0")
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rotary positions that differ between layers; expected the same in all")
    factor, *llama3 = [float(rope[name]) for name in SCALING_FIELDS[kind]] or [1.0]
    if llama3 and llama3[0] >= llama3[1]:
        raise ValueError(
            f"low_freq_factor is {llama3[0]}; expected it below high_freq_factor, {llama3[1]}"
        )
    return {
        "rope_theta": float(rope["rope_theta"]),
        "rope_factor": factor,
        "rope_llama3": tuple(llama3),
    }


def rotary_fields(hf):
    """(all fields on rotary positions, those among them that stand outside).

    They stand under rope_parameters, or in older files under rope_scaling and outside.
    """
    newer = {} if hf.get("rope_parameters") is None else hf["rope_parameters"]
    older = {} if hf.get("rope_scaling") is None else hf["rope_scaling"]
    if older and newer and older != newer:
        raise ValueError("rope_scaling and rope_parameters differ; expected one of them")
    outside = {name: hf[name] for name in ROTARY_OUTSIDE if hf.get(name) is not None}
    return {"rope_theta": 10000.0, **outside, **older, **newer}, outside


def llama_config(c, eos):
    """A ModelConfig as a decoded config.json, for models trained from nothing: these are Llamas."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_ff,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head,
        "head_dim": c.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": None,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
