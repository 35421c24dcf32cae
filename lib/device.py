"""The machine: which device, which type of numbers, and what a process that trains needs."""

import ctypes
import platform
import sys
import time
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from lib.hf_weights import hold_frozen

import torch

MOST_FREE = 2**29  # bytes that the heap keeps from step to step
LARGE = 256  # rows and columns of a factor that oneDNN multiplies with
LARGEST = 2**22  # elements of a factor that it may copy
ATEN = []  # what replaces functions of PyTorch; they do so as long as it is kept


def pick_device(name):
    """`auto` is the first CUDA device, or the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except Exception as e:  # each kind of device has its own
        raise ValueError(f"--device {name} cannot be used here: {str(e).splitlines()[0]}")
    device = torch.device(name)
    if device.type == "cuda":
        tune_cuda()
    return device


def tune_cuda():
    """What every process that computes on a GPU wants and does not get by default."""
    torch.set_float32_matmul_precision("high")  # what is left in float32 goes through TF32
    # cuDNN's attention makes a plan for each new length: tens of milliseconds and more
    torch.backends.cuda.enable_cudnn_sdp(False)


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
    compiled = config.compile
    if compiled is None:  # on Windows there may be no Triton
        compiled = device.type == "cuda" and find_spec("triton") is not None
    dtype = pick_dtype(config.dtype, device)
    return replace(config, device=str(device), dtype=dtype, compile=compiled)


def autocast(device, dtype):
    """The context of forward passes: matrix products in dtype, weights and sums in float32."""
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def prepare(model, config):
    """The model, ready to be trained as the flags say."""
    if not config.device.startswith("cuda"):
        use_cpu(model)
    hold_frozen(model, getattr(torch, config.dtype))
    model.checkpointing = config.checkpointing
    model.compiled = config.compile
    if config.compile:
        for block in model.blocks:
            block.compile()  # in place: parameters keep their names
    return model


def clock(device):
    """Seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tune_cpu():
    """What every process that computes on a CPU wants and does not get by default."""
    # pairs the model is sure of have gradients so small that a CPU computes them slowly
    torch.set_flush_denormal(True)


def use_cpu(model):
    """What a process wants that computes with this model on a CPU."""
    keep_memory()
    if is_amd() and model.config.d_model >= LARGE:  # a small model would only pay for the question
        onednn_products()


def is_amd():
    """Whether the processor is AMD's. On Intel's, MKL is a few percent faster than oneDNN."""
    linux = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (linux.read_text() if linux.exists() else platform.processor())


def onednn_products():
    """From now on large products of float32 matrices are computed by oneDNN, where `by_onednn` says
    so. By itself PyTorch takes MKL, which on AMD's newer processors uses half of their width.

    torch.mm and torch.addmm of PyTorch itself are replaced, so that layers and gradients need not
    know of it. The operator is a private one; where it is missing, all stays as it was."""
    if ATEN or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return
    ATEN.append(torch.library.Library("aten", "IMPL"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a function of PyTorch is replaced
        ATEN[0].impl("mm", mm, "CPU")
        ATEN[0].impl("addmm", addmm, "CPU")


def mm(a, b):
    """a @ b of matrices on a CPU, with the faster library."""
    if by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
    return torch.ops.aten.mm.out(a, b, out=a.new_empty(len(a), b.shape[1]))


def addmm(bias, a, b, *, beta=1, alpha=1):
    """beta · bias + alpha · a @ b of matrices on a CPU, with the faster library."""
    if by_onednn(a, b) and bias.dim() == beta == alpha == 1:
        return torch.ops.mkldnn._linear_pointwise(a, b.T, bias, "none", [], "")
    out = a.new_empty(len(a), b.shape[1])
    return torch.ops.aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)


def by_onednn(a, b):
    """Whether oneDNN multiplies a with b faster. It makes code for each new size, which takes a
    millisecond and does not pay in a small model; it has no fast code where there are gaps between
    rows; and it copies a transposed a, which may take too much memory."""
    fits = a.dtype == b.dtype == torch.float32 and a.shape[1] == len(b)
    fits = fits and (a.is_contiguous() or a.numel() < LARGEST)
    return fits and min(b.shape) >= LARGE and a.numel() > 0 and is_dense(a) and is_dense(b)


def is_dense(x):
    """Whether the matrix or its transpose lies in memory without gaps."""
    return x.is_contiguous() or x.T.is_contiguous()


def keep_memory():
    """From now on the memory of freed tensors is used again; by default the kernel takes it back,
    and clears new pages. Linux alone has this; with `give_back` the process does not grow."""
    if LIBC:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        LIBC.mallopt(M_MMAP_MAX, 0)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back(most_free=MOST_FREE):
    """Return freed memory to the system where there is much of it: rows of ever new lengths leave
    holes in it that nothing fits into. To be called once a step."""
    if hasattr(LIBC, "mallinfo2") and LIBC.mallinfo2().fordblks > most_free:
        LIBC.malloc_trim(0)


class MallInfo(ctypes.Structure):
    """What mallinfo2 of the C library tells of its heap, bytes; fordblks: free ones."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks")),
        ("keepcost", ctypes.c_size_t),
    ]


def c_library():
    """glibc, if it is this system's; else None. Before 2.33 it has no mallinfo2."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return None
    if hasattr(libc, "mallinfo2"):
        libc.mallinfo2.restype = MallInfo
    return libc


LIBC = c_library()
