"""What a GPU computes, beside what the CPU computes. It is not a part of the tests, for it needs a
GPU:

    python tests/dev/on_cuda.py

The same steps of SFT and of SafeDPO, the reference's log-probabilities and greedy answers, in each
type of numbers, with adapters, with checkpointing and compiled. It fails where the two differ by
more than the type's rounding, where a step waits for the device more often than said, and where
blocks are compiled more often than said.
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from lib import lora, policy, sampling
from lib.device import autocast, pick_device, prepare

import torch

import bench
import data
import train
from model import ModelConfig, Transformer

SIZES = dict(n_layer=3, n_head=4, n_kv_head=2, d_model=128, d_ff=256, vocab_size=500)
# of losses and gradients' norms, relative; float32 is TF32 there, and later steps add to it
BOUNDS = {"float32": 0.02, "float16": 0.02, "bfloat16": 0.05}
STEPS, WAITS, GRAPHS = 6, 2, 3


def watched(device, run, *args):
    """(what run returns, how often it waited for the device)."""
    if device.type == "cpu":
        return run(*args), 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        result = run(*args)
        torch.cuda.set_sync_debug_mode("default")
    return result, sum("synchronizing" in str(w.message) for w in said)


def losses(device, dtype="float32", rank=0, compiled=False, checkpointing=False):
    """(log-probs under the reference, losses and gradient norms of all steps, waits of a step)."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**SIZES, qk_norm=True, tied_head=True))
    for p in model.parameters():  # far from what it begins with, so that no loss is ln 2
        p.data.mul_(1.5)
    model.to(device)
    if rank:
        lora.add(model, rank, rank, 0)
    how = dict(device=str(device), dtype=dtype, compile=compiled, checkpointing=checkpointing)
    c = bench.Config(steps=STEPS, batch_size=16, **SIZES, **how)
    model = prepare(model, c)
    pairs = data.TokenPairs(bench.random_pairs(c))
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == "float16")
    optimizer, precision = train.make_optimizer(model, 0.05, 0.95), autocast(device, dtype)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    ref = policy.log_probs(model, data.Examples(pairs), device, dtype)
    found, most = [], 0
    for loss, of_reference in ((train.sft_loss, None), (train.preference_loss(0.1, 10.0), ref)):
        for step in range(STEPS):
            batches = data.step_batches(pairs, step, 16, 4, 0, of_reference)
            step_of = model, optimizer, scaler, batches, loss, 1.0, precision
            result, waits = watched(device, train.train_step, *step_of)
            most = max(most, waits if step else 0)  # compiling in the first step has its own
            found += result[:2]
    return ref, torch.tensor(found, dtype=torch.float64), most


def answers(device):
    """Greedy answers of a random model, in float32 without TF32."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = Transformer(ModelConfig(**SIZES)).to(device).eval()
    prompts = [list(range(2, 2 + n)) for n in (3, 9, 1, 30)]
    with torch.no_grad():
        return sampling.generate(model, prompts, 24, [499], temperature=0)


def main():
    cpu, cuda = torch.device("cpu"), pick_device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    wrong = [] if answers(cuda) == answers(cpu) else ["greedy answers differ"]
    print("greedy answers " + ("differ" if wrong else "are the same"), flush=True)
    torch.set_float32_matmul_precision("high")
    expected = {rank: losses(cpu, rank=rank) for rank in (0, 4)}
    for dtype, bound in BOUNDS.items():
        for how in (
            dict(), dict(rank=4), dict(checkpointing=True), dict(compiled=True),
            dict(compiled=True, checkpointing=True), dict(compiled=True, rank=4),
        ):  # fmt: skip
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            ref, found, waits = losses(cuda, dtype, **how)
            ref_cpu, found_cpu, _ = expected[how.get("rank", 0)]
            off = (found / found_cpu - 1).abs().max().item()
            ref_off = ((ref - ref_cpu).norm() / ref_cpu.norm()).item()
            counted = torch._dynamo.utils.counters
            graphs, breaks = counted["stats"]["unique_graphs"], counted["graph_break"].total()
            name = f"{dtype} {' '.join(how)}"
            print(
                f"{name:<36} losses and norms off by {off:.1e}, log-probs by {ref_off:.1e}; "
                f"waits {waits}, graphs {graphs}, breaks {breaks}", flush=True,
            )  # fmt: skip
            if not max(off, ref_off) < bound:
                wrong.append(f"{name}: off by more than {bound}")
            if waits > WAITS or breaks or graphs > GRAPHS:
                wrong.append(f"{name}: waits, graphs or breaks")
    print("\n".join(wrong) or "all as expected")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
