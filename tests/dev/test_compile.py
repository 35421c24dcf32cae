"""torch.compile, which CUDA runs use by default, on the CPU: the same steps, up to rounding."""

import json

import pytest
import torch
from conftest import ROOT, SHORT, TINY
from test_parallel import torchrun

import train


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_compiled_run_is_the_eager_run(finished, folder, tmp_path, lora):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags, eager = [*TINY, "--data", str(folder), "--delta", "5"], finished
    if lora:
        eager = tmp_path / "eager"
        start = ["--init_from", str(finished / "reference.pt"), "--lora_rank", "3"]
        flags = [*SHORT, *flags[len(TINY) :], *start, "--lr", "0.01"]
        train.main([*flags, "--out_dir", str(eager)])
    train.main([*flags, "--compile", "--out_dir", str(tmp_path / "run")])
    compiled, eager = (
        [json.loads(line) for line in (run / "metrics.jsonl").open()]
        for run in (tmp_path / "run", eager)
    )
    assert len(compiled) == len(eager) > 4
    for a, b in zip(compiled, eager):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
    # with and without gradients, and one pair alone: not a graph a batch
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


GRAPHS = """
import sys

sys.path.insert(0, {root!r})
from lib import lora, parallel, policy
from lib.device import autocast, prepare

import torch
from torch._dynamo.utils import counters

import bench
import data
import train
from model import ModelConfig, Transformer

kind, dtype = sys.argv[1:]
inductor = torch.nn.Module.compile  # graphs are the same, and need not become programs
torch.nn.Module.compile = lambda block, **how: inductor(block, backend="aot_eager", **how)
c = bench.Config(
    steps=30, d_model=64, n_layer=3, n_head=4, n_kv_head=2, d_ff=128, vocab_size=500,
    batch_size=24, micro_batch_size=4, device="cpu", dtype=dtype, compile=True,
    checkpointing=kind == "checkpointing",
)
parallel.join()
torch.manual_seed(0)
pairs = data.TokenPairs(bench.make_pairs(c))
cpu, mine, n = torch.device("cpu"), parallel.rank(), parallel.size()
model = Transformer(bench.sizes_of(c))
if kind == "lora":
    lora.add(model, 4, 8.0, 0)
model = parallel.wrap(prepare(model, c), cpu, kind == "fsdp", dtype)
ref = policy.log_probs(model, data.Examples(pairs), cpu, dtype)
optimizer = train.make_optimizer(model, 0.0, 0.99)
for group in optimizer.param_groups:
    group["lr"] = 1e-5
scaler, loss = torch.amp.GradScaler("cpu", enabled=False), train.preference_loss(0.1, 10.0)
precision, losses = autocast(cpu, dtype), []
for step in range(c.steps):
    batches = data.step_batches(pairs, step, 24, 4, 0, ref, mine, n)
    value, _, _ = train.train_step(model, optimizer, scaler, batches, loss, 1.0, precision)
    losses.append(value)
if not mine:
    breaks = sum(counters["graph_break"].values())
    print(counters["stats"]["unique_graphs"], breaks, len(set(losses)))
parallel.leave()
parallel.end()
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["alone", "checkpointing", "lora", "ddp", "fsdp"])
def test_rows_of_all_lengths_share_two_graphs(tmp_path, kind, dtype):
    """With gradients and without; also with one process's share, sharded, or beside adapters."""
    script = tmp_path / "graphs.py"
    script.write_text(GRAPHS.format(root=str(ROOT)))
    processes = 2 if kind in ("ddp", "fsdp") else 1
    ended = torchrun(kind, dtype, script=script, processes=processes)
    assert ended.returncode == 0, ended.stderr
    graphs, breaks, losses = map(int, ended.stdout.splitlines()[-1].split())  # gloo may talk
    assert (graphs, breaks) == (2, 0) and losses > 25
