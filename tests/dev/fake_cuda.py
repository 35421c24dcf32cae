"""What a GPU would be asked to do, looked at on a machine that has none. It is not a part of the
tests, for it needs g++:

    python tests/dev/fake_cuda.py

PyTorch's fake tensors have a shape, a type and a device, and no values. Here their device is CUDA:
steps of SFT and SafeDPO, adapters, the reference pass and sampling run on them in float32, float16
(with a scaler) and bfloat16. It fails where an operation mixes devices, where a weight or a state
of the optimizer is elsewhere, where a matrix product has another type than it should have, and
where the device is waited for more often than said. It says nothing about values or speed.
"""

import collections
import contextlib
import ctypes
import importlib.util
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

A_DEVICE_THAT_DOES_NOTHING = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

using c10::DeviceIndex;

namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, FakeGuardImpl<DeviceType::CUDA>) }

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
"""


def pretend():
    """A CPU's PyTorch finds a CUDA device from now on. To be called before torch is imported: that
    is when it looks."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/fake.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-w", "-x", "c++", "-", "-o", library]
        command += [f"-I{torch}/include", f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
        subprocess.run(command, input=A_DEVICE_THAT_DOES_NOTHING, text=True, check=True)
        for name in (f"{torch}/lib/libtorch_cpu.so", library):
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)


pretend()
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from lib import lora, policy, sampling  # noqa: E402
from lib.device import autocast  # noqa: E402
from lib.hf_weights import hold, hold_frozen  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses import fake_tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import bench  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402

CUDA = torch.device("cuda")
TOKENS = 9  # of a sampled answer: the only whole number that values tell


class Watch(TorchDispatchMode):
    """Counts waits for the device and the types of products, and answers what only values tell."""

    def __init__(self):
        super().__init__()
        self.waits, self.products = 0, collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name == "_local_scalar_dense":
            self.waits += args[0].device.type == "cuda"
            return True if args[0].dtype == torch.bool else TOKENS
        if name == "nonzero":  # all are
            self.waits += 1
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        result = function(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "addmm_"):
            self.products[result.dtype] += 1
        return result


@contextlib.contextmanager
def watching():
    """A Watch that also counts copies to the host: one, however many values it takes."""

    def tolist(x):
        watch.waits += x.device.type == "cuda"
        return np.ones(x.shape, int).tolist()

    def cpu(x):
        watch.waits += x.device.type == "cuda"
        return x.to("cpu")

    patched, fake = mock.patch.object, fake_tensor.FakeTensor
    with Watch() as watch, patched(fake, "tolist", tolist), patched(fake, "cpu", cpu):
        yield watch


def check(name, condition):
    if not condition:
        raise SystemExit(f"{name}: not so")


def look(dtype, n_kv_head, qk_norm, tied, rank):
    """Everything once, with such a model."""
    type_ = getattr(torch, dtype)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=n_kv_head, d_model=64, d_ff=128, vocab_size=500)
    c = bench.Config(steps=3, batch_size=16, **sizes)
    pairs = data.TokenPairs(bench.random_pairs(c))
    with torch.device(CUDA):
        model = Transformer(ModelConfig(**sizes, qk_norm=qk_norm, tied_head=tied))
    if rank:
        lora.add(model, rank, rank, 0)
        hold_frozen(model, type_)
    optimizer = train.make_optimizer(model, 0.05, 0.95)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    precision, found = autocast(CUDA, dtype), {}

    def watched(title, most_waits, run, *args):
        with watching() as watch:
            result = run(*args)
        found[title] = watch.waits
        check(f"{title}: {watch.waits} waits, at most {most_waits}", watch.waits <= most_waits)
        check(f"{title}: products in {dtype}", set(watch.products) == {type_})
        return result

    ref = watched("reference", 1, policy.log_probs, model, data.Examples(pairs), CUDA, dtype)
    check("the reference's log-probs are on the CPU", ref.device.type == "cpu")
    ref = torch.zeros(len(pairs), 2)
    for kind, loss, of_reference in (
        ("SFT", train.sft_loss, None),
        ("SafeDPO", train.preference_loss(0.1, 10.0), ref),
    ):
        batches = data.step_batches(pairs, 0, 16, 4, 0, of_reference)
        check("there are several micro-batches", len(batches) > 1)
        for model.checkpointing in (False, True):
            step = model, optimizer, scaler, batches, loss, 1.0, precision
            watched(kind + ", checkpointing" * model.checkpointing, 2, train.train_step, *step)
    states = [t for s in optimizer.state.values() for t in s.values() if t.dim()]
    kept = [*model.parameters(), *states]
    check("weights and states stay there", all(t.device.type == "cuda" for t in kept))
    check("AdamW is fused", all(g["fused"] for g in optimizer.param_groups))
    model.checkpointing = False
    hold(model, type_).eval()  # as policy.for_inference does
    with precision:
        prompts, waits = [[1, 2, 3], [4, 5, 6, 7]], TOKENS + 3  # one a token: who has ended?
        watched("sampling", waits, sampling.generate, model, prompts, TOKENS, [499])
    return found


def main():
    torch.cuda.is_available = lambda: True  # else autocast is switched off
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda._lazy_init = lambda: None
    torch.Tensor.pin_memory = lambda self: self
    torch._C._set_only_lift_cpu_tensors(True)  # a list becomes a tensor here, and moves then
    fake_tensor.CONSTANT_NUMEL_LIMIT = -1  # it would compute with values where there are few
    with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        for dtype, rank in itertools.product(("float32", "float16", "bfloat16"), (0, 4)):
            for n_kv_head, qk_norm, tied in ((4, False, False), (2, True, True)):
                found = look(dtype, n_kv_head, qk_norm, tied, rank)
                waits = ", ".join(f"{name} {n}" for name, n in found.items())
                print(f"{dtype}, rank {rank}, {n_kv_head} key heads. Waits: {waits}", flush=True)


if __name__ == "__main__":
    main()
