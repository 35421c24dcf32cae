"""The forecast of memory: what is counted without values is what lives with them."""

import gc
import subprocess
import sys

from lib import memory
from lib.device import LIBC, autocast
from lib.memory import Live, Plan
from lib.settings import TrainConfig

import pytest
import torch
from conftest import ROOT
from test_model import examples, make

from model import pack_rows

PLANS = {
    "whole": Plan(),
    "bf16": Plan(dtype="bfloat16"),
    "adapters": Plan(rank=3, base_dtype="bfloat16"),
    "bf16 adapters": Plan(dtype="bfloat16", rank=3),
    "checkpointing": Plan(checkpointing=True),
}


def test_what_lives_is_counted_and_what_is_gone_is_not():
    with Live() as live:
        a = torch.zeros(1000)
        b = a[10:].view(-1, 10)  # no memory of its own
        assert live.now == 4000
        c = a + 1
        assert live.now == live.peak == 8000
        del a
        assert live.now == 8000, "the view keeps it"
        del b, c
        assert live.now == 0 and live.peak == 8000


@pytest.mark.parametrize("name", PLANS)
def test_tensors_without_values_take_what_real_ones_take(name):
    plan, rows = PLANS[name], pack_rows(examples())
    sizes = make(qkv_bias=True, tied_head=True).config
    said = memory.need(sizes, rows, [[1, 2, 3], [4]], plan)
    gc.collect()
    with Live() as live:
        net = memory.build(sizes, plan)
        assert said.weights == sum(p.numel() * p.element_size() for p in net.parameters())
        for _ in range(2):
            before, live.peak = live.now, 0
            with autocast(torch.device("cpu"), plan.dtype):
                logps = net(rows)
            logps.sum().backward()
            del logps
    assert said.micro_batch == live.peak - before > 0
    trained = [p for p in net.parameters() if p.requires_grad]
    assert said.state == 12 * sum(p.numel() for p in trained)


def test_fsdp_shares_weights_and_state():
    sizes, rows = make(n_layer=4).config, pack_rows(examples())
    one, two = (memory.need(sizes, rows, [[1]], Plan(shards=n)) for n in (1, 2))
    assert two.weights == one.weights / 2 and two.state == one.state / 2
    whole = one.weights / 4  # numbers
    block = sum(p.numel() for p in make(n_layer=1).blocks.parameters())
    root = whole - 4 * block
    # of weights the root and two blocks, of gradients the root, one block, and that block again
    assert one.gathered == 0 and two.gathered == 4 * (2 * root + 3 * block + block)
    assert two.micro_batch == one.micro_batch and two.evaluation == one.evaluation


def test_a_run_is_told_what_it_needs_and_whether_it_is_there(capsys, monkeypatch):
    net, rows = make(), pack_rows(examples())
    memory.tell(net, TrainConfig(device="cpu", dtype="float32"), rows, [[1]])
    assert capsys.readouterr().out == "", "a tiny model fits anywhere"
    monkeypatch.setattr(memory, "TINY", 0)
    memory.tell(net, TrainConfig(device="cpu", dtype="float32"), rows, [[1]])
    said = capsys.readouterr().out
    assert said.startswith("memory, GB: 0.0 weights + ") and said.count("\n") == 1
    monkeypatch.setattr(memory, "there_is", lambda device: 1e8)
    memory.tell(net, TrainConfig(device="cpu", dtype="float32"), rows, [[1]])
    assert "warning: that is 1.0 GB, and cpu has 0.1; a smaller" in capsys.readouterr().out


HEAP = """
import sys
sys.path.insert(0, {root!r})
import torch
from lib import device
size = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
device.keep_memory()
tensors = [torch.ones(2**18 + 999 * i) for i in range(800)]  # about 1 MB each
tensors = tensors[::40]  # holes between those that stay
kept = size()
device.give_back()
print(kept, size())
"""


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="asks glibc 2.33 or later")
def test_freed_memory_between_what_stays_is_given_back():
    command = [sys.executable, "-c", HEAP.format(root=str(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kept, left = map(float, done.stdout.split())
    assert kept > 1000 and left < kept - 700


SHAPES = """
import sys
sys.path.insert(0, {root!r})
from lib import device
import torch
W = torch.randn(256, 64).bfloat16()
used = []
for T in range(2, 402):
    torch.randn(T, 64).bfloat16() @ W.T
    used.append(device.LIBC.mallinfo2().uordblks / 1e6)
print(used[149], used[-1])
"""


@pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="asks glibc 2.33 or later")
def test_code_for_shapes_that_do_not_come_again_is_not_kept():
    command = [sys.executable, "-c", SHAPES.format(root=str(ROOT))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    early, late = map(float, done.stdout.split())
    assert late < early + 20  # of 250 shapes a quarter of a megabyte and more
