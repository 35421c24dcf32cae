"""PEFT's folders of LoRA adapters, in and out: a config and one file of weights."""

import json
import shutil
from pathlib import Path

from lib import checkpoint
from lib.hf_weights import copy_tensor, safetensors_library, tensor_header, tensor_names

import torch

FILES = CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {  # our layer → what its parts are called
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down": ("mlp.down_proj",),
}
PLAIN = {  # field → what it must say if it is there: other adapters are not LoRA as we have it
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", None),  # others change the base as well
    **dict.fromkeys(
        ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
         "alpha_pattern", "target_parameters", "trainable_token_indices",
         "alora_invocation_tokens", "corda_config", "eva_config", "loftq_config",
         "lora_ga_config", "use_qalora", "use_bdlora", "arrow_config", "layer_replication",
         "kasa_config", "velora_config", "monteclora_config"),
        (False, None, {}, []),
    ),
}  # fmt: skip


def is_adapter(folder):
    return (Path(folder) / CONFIG).exists()


def read_config(folder):
    """(rank, alpha, the base's name) of a PEFT folder. ValueError if it is no plain LoRA."""
    path = Path(folder) / CONFIG
    config = checkpoint.read_json(path)
    needed = {"r": (int,), "lora_alpha": (int, float), "base_model_name_or_path": (str,)}
    for name, kinds in needed.items():
        if type(config.get(name)) not in kinds:
            raise ValueError(
                f"{path}: {name} is {checkpoint.show(config.get(name))}; expected "
                f"{' or '.join(kind.__name__ for kind in kinds)}, as PEFT writes it for LoRA"
            )
    for name, expected in PLAIN.items():
        if name in config and config[name] not in expected:
            raise ValueError(
                f"{path}: {name} is {checkpoint.show(config[name])}; "
                f"expected {checkpoint.show(expected[0])}, as plain LoRA has it"
            )
    rank, alpha = config["r"], float(config["lora_alpha"])
    if rank < 1:
        raise ValueError(f"{path}: r is {rank}; expected at least 1")
    if config.get("use_rslora"):  # its scale is α/√r
        alpha *= rank**0.5
    return rank, alpha, config["base_model_name_or_path"]


def adapters_by_peft_name(model):
    """{PEFT's name: our A or B of that part, a view}."""
    weights = {}
    for i, block in enumerate(model.blocks):
        for layer, names in NAMES.items():
            for name, (A, B) in zip(names, block.get_submodule(layer).parts()):
                prefix = f"base_model.model.model.layers.{i}.{name}"
                weights |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    return weights


@torch.no_grad()
def load(model, folder):
    """Copy a PEFT folder's adapters into the model's. Where it has none, ours stay as they are.

    Returns how many of the model's parts have none there. ValueError if one has no place here.
    """
    path = Path(folder) / WEIGHTS
    if not path.exists():
        raise ValueError(f"{folder}: {WEIGHTS} is missing; expected a whole PEFT folder of LoRA")
    weights = adapters_by_peft_name(model)
    names = tensor_names(path)
    for name in names:
        if name not in weights:
            raise ValueError(
                f"{path}: {name} has no place; expected adapters on linear layers of Llama's blocks"
            )
        shape, kind = tensor_header(path, name)
        if shape != weights[name].shape:
            raise ValueError(
                f"{path}: {name} is {shape} of {kind}; expected {tuple(weights[name].shape)} of "
                "numbers: the adapters were made for another model or rank"
            )
        copy_tensor(path, name, weights[name], tied=False)
        other = name.translate(str.maketrans("AB", "BA"))
        if other not in names:
            raise ValueError(f"{path}: {name} is there and {other} is missing; expected both")
    return (len(weights) - len(names)) // 2


def export(model, folder):
    """Write the model's adapters into a folder as PEFT keeps them."""
    about = model.adapters
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": about["base"],
        "r": about["rank"],
        "lora_alpha": about["alpha"],
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [name.rpartition(".")[2] for names in NAMES.values() for name in names],
        "inference_mode": True,
    }
    weights = {k: w.detach().cpu().clone() for k, w in adapters_by_peft_name(model).items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2))
    safetensors_library().torch.save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # as the umask says
