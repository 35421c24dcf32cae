"""Where a run starts: its first model, whole or with adapters, and the tokenizer."""

import os
from pathlib import Path

from lib import checkpoint, hf_adapter, hf_config, hf_tokenizer, hub, pretrained
from lib.hf_weights import held_in, hold, weight_files
from lib.policy import digest, our_checkpoint, put_adapters, read_model
from lib.settings import SIZE_FLAGS, usual_alpha
from lib.tokenizer import Tokenizer

import torch

from model import ModelConfig, Transformer


def starting_model(config, records, reference, device):
    """(model, tokenizer, whether it is the reference already).

    reference: the file of a reference that is trained already, or None. Without one the model comes
    from --init_from, or is new, and its tokenizer is trained on the records.
    """
    if reference:
        earlier = reference.parent != Path(config.out_dir)
        print(f"reference: {reference}" + ", trained earlier with the same settings" * earlier)
        return *read_model(reference, device), True
    if config.init_from:
        print(f"{'start' if config.sft_epochs else 'reference'}: {config.init_from}")
        return *initial_model(config, device), not config.sft_epochs
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.train(records, config.vocab_size, config.prompt_template)
    sizes = {name: getattr(config, name) for name in SIZE_FLAGS}
    sizes["vocab_size"] = tokenizer.vocab_size
    return Transformer(ModelConfig(**sizes)).to(device), tokenizer, False


def source_of(name):
    """The file or folder of --init_from. ValueError if there is none."""
    source = hub.model_path(name)
    if not source.exists():
        raise ValueError(
            f"--init_from {source}: no such file or folder; it takes these, or OWNER/NAME on the "
            "Hugging Face hub"
        )
    return source


def facts(name):
    """(ModelConfig, the type in which the matrices would be held as a frozen base, rank of adapters
    or 0) of --init_from, whose weights are not read."""
    source = source_of(name)
    if hf_adapter.is_adapter(source):
        raise ValueError(f"{source}: holds adapters alone; expected the model that they belong to")
    if file := our_checkpoint(source):
        state = checkpoint.load(file)
        if not isinstance(state, dict) or "config" not in state:
            raise ValueError(f"{file}: holds no model; expected a run's reference.pt or policy.pt")
        about = state.get("adapters") or {"base_dtype": "float32", "rank": 0}
        return ModelConfig(**state["config"]), about["base_dtype"], about["rank"]
    sizes = hf_config.model_config(checkpoint.read_json(source / "config.json"))
    return sizes, pretrained.base_type(weight_files(source)), 0


def tokenizer_of(name):
    """The tokenizer of --init_from, whose weights are not read."""
    source = source_of(name)
    if file := our_checkpoint(source):
        return Tokenizer(**checkpoint.load(file)["tokenizer"])
    return hf_tokenizer.load_tokenizer(source, None)


def initial_model(config, device):
    """(model, tokenizer) of --init_from: whole, or with adapters on a frozen base."""
    source = source_of(config.init_from)
    if hf_adapter.is_adapter(source):
        rank, alpha, base = hf_adapter.read_config(source)
        check_adapters(config, rank, alpha)
        if not hub.model_path(base).exists():
            raise ValueError(
                f"{source / hf_adapter.CONFIG}: its base_model_name_or_path is {base}, and there "
                "is no such folder; expected the model that the adapters belong to"
            )
        model, tokenizer = whole_model(base, config, device, config.base_dtype)
        fit_adapters(model, rank, alpha, base, config)
        if others := hf_adapter.load(model, source):
            print(f"{config.init_from}: {others} of our linear layers have no adapter there; new")
        return model, tokenizer
    base_dtype = config.base_dtype if config.lora_rank else "float32"
    model, tokenizer = whole_model(config.init_from, config, device, base_dtype)
    held = model.adapters["base_dtype"] if model.adapters else "float32"
    if config.base_dtype not in ("auto", held) and (model.adapters or not config.lora_rank):
        raise ValueError(
            f"--base_dtype {config.base_dtype}: the weights of {config.init_from} are held in "
            f"{held}; the flag needs --lora_rank and a whole model"
        )
    if model.adapters:
        check_adapters(config, model.adapters["rank"], model.adapters["alpha"])
    elif config.lora_rank:
        fit_adapters(model, config.lora_rank, alpha_of(config), config.init_from, config)
    return model, tokenizer


def whole_model(name, config, device, base_dtype):
    """(model, tokenizer) of a checkpoint of ours or a Hugging Face folder."""
    source, template = hub.model_path(name), config.prompt_template
    file = our_checkpoint(source)
    if file is None and not (source / "config.json").exists():
        raise ValueError(
            f"--init_from {source}: no policy.pt and no config.json; "
            "expected a run of ours or a Hugging Face model"
        )
    if file and template is not None:
        raise ValueError(
            f"--prompt_template {template}: {source} is a checkpoint of ours, which has its own; "
            "leave the flag out"
        )
    if file:
        model, tokenizer = read_model(file, device)
        if base_dtype == "bfloat16" and not model.adapters:
            hold(model, torch.bfloat16)
        return model, tokenizer
    longest = config.max_length + config.max_new_tokens
    return pretrained.load(source, template, longest, device, config.date, base_dtype)


def alpha_of(config):
    """α of the adapters that the flags ask for."""
    return config.lora_alpha or usual_alpha(config.lora_rank)


def fit_adapters(model, rank, alpha, base, config):
    """New adapters on a model that was just read, whose name is base."""
    about = {
        "rank": rank,
        "alpha": alpha,
        "base": os.path.abspath(base) if os.path.exists(base) else base,
        "base_dtype": held_in(model),
        "base_sha256": digest(model),
    }
    put_adapters(model, about, config.seed)


def check_adapters(config, rank, alpha):
    """ValueError if the flags ask for other adapters than those with which --init_from comes."""
    if config.lora_rank and (config.lora_rank, alpha_of(config)) != (rank, alpha):
        raise ValueError(
            f"--lora_rank {config.lora_rank} with α = {alpha_of(config):g}: {config.init_from} has "
            f"adapters of rank {rank} with α = {alpha:g}, which are trained on; leave the flags out"
        )
