"""The machine: which device, which type of numbers, and what a process that trains needs."""

import ctypes
import sys
from dataclasses import replace

import torch


def pick_device(name):
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # each kind of device has its own
        raise ValueError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}")
    return torch.device(name)


def pick_dtype(name, device):
    """`auto` is float32 on a CPU; on CUDA bfloat16, or float16 where there is no bfloat16."""
    if name != "auto":
        return name
    if device.type != "cuda":
        return "float32"
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def settle(config):
    """config with what its flags leave to the machine decided: device, dtype, compile."""
    device = pick_device(config.device)
    compiled = device.type == "cuda" if config.compile is None else config.compile
    dtype = pick_dtype(config.dtype, device)
    return replace(config, device=str(device), dtype=dtype, compile=compiled)


def autocast(device, dtype):
    """The context of forward passes: matrix products in dtype, weights and sums in float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def prepare(model, config):
    """The model, ready to be trained as the flags say."""
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # what is left in float32 goes through TF32
    model.checkpointing = config.checkpointing
    if config.compile:
        for block in model.blocks:
            block.compile(dynamic=True)  # in place: parameters keep their names
    return model


def tune_cpu():
    """What a process that computes on a CPU wants and does not get by default."""
    # pairs the model is sure of have gradients so small that a CPU computes them slowly
    torch.set_flush_denormal(True)
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # reuse the memory of freed tensors; the kernel would take it back and clear new pages
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
