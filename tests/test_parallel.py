"""Two processes are one: the same losses, gradients, weights and checkpoints. gloo, on the CPU."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHORT, TINY

import train

# 7 pairs a step: the shares are uneven, and in an epoch's last step one process may have nothing
FLAGS = [
    *TINY,
    "--batch_size",
    "7",
    "--sft_batch_size",
    "48",
    "--micro_batch_size",
    "2",
    "--delta",
    "5",
    "--lr",
    "1e-4",
    "--save_every",
    "3",
]


def torchrun(*flags, script=ROOT / "train.py", processes=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        script,
        *flags,
    ]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8")


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    train.main([*FLAGS, "--data", str(folder), "--out_dir", str(out)])
    return out


@pytest.fixture(scope="module")
def adapted(alone, folder, tmp_path_factory):
    """(flags that put adapters on the reference of `alone`, the run of one process with them)."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    sizes = TINY[: -len(SHORT)]
    flags = [*FLAGS[len(sizes) :], "--init_from", str(alone / "reference.pt"), "--lora_rank", "3"]
    train.main([*flags, "--sft_epochs", "1", "--data", str(folder), "--out_dir", str(out)])
    return [*flags, "--sft_epochs", "1"], out


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("extra", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_are_one(alone, adapted, folder, tmp_path, extra, lora):
    flags, alone = adapted if lora else (FLAGS, alone)
    ended = torchrun(*flags, *extra, "--data", folder, "--out_dir", tmp_path / "run")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("Done in") == 1
    ours, theirs = metrics(tmp_path / "run"), metrics(alone)
    assert len(ours) == len(theirs) > 8 and {line["stage"] for line in ours} == {"sft", "safedpo"}
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        assert a["loss"] == pytest.approx(
            b["loss"], rel=1e-5, abs=3e-5
        )  # log-probabilities of hundreds of nats, in float32
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=3e-5)
    for name in ("reference", "policy"):
        ours, theirs = (torch.load(run / f"{name}.pt") for run in (tmp_path / "run", alone))
        assert ours["config"] == theirs["config"] and list(ours["model"]) == list(theirs["model"])
        assert ours["adapters"] == theirs["adapters"]
        assert all(("lora_" in weight) == lora for weight in ours["model"])
        for a, b in zip(ours["model"].values(), theirs["model"].values()):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    ours, theirs = (torch.load(run / "ref_logps.pt")["ref"] for run in (tmp_path / "run", alone))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


STOPS = """
import sys
sys.path.insert(0, {root!r})
import train
step = train.train_step
calls = []
def stops(*args):
    calls.append(1)
    if len(calls) > {after}:
        raise KeyboardInterrupt
    return step(*args)
train.train_step = stops
train.main()
"""


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import train
from lib import checkpoint, parallel
save = checkpoint.save
def slow(path, *rest, **about):
    if path.name == "policy.pt" and not parallel.rank():
        time.sleep(3)
    save(path, *rest, **about)
checkpoint.save = slow
train.main()
"""


def test_all_wait_until_the_policy_is_written(alone, folder, tmp_path):
    script, start = tmp_path / "slow.py", ["--init_from", str(alone / "policy.pt")]
    script.write_text(SLOW.format(root=str(ROOT)))
    flags = [*SHORT, *start, "--data", folder, "--out_dir", tmp_path / "run"]
    ended = torchrun(*flags, script=script)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "eval.json").exists()


ALIVE = """
import sys, weakref
sys.path.insert(0, {root!r})
import train
make, refs = train.make_optimizer, []
def noted(model, *rest):
    optimizer = make(model, *rest)
    weights = [getattr(p, "_local_tensor", p) for p in model.parameters()]
    refs.extend(weakref.ref(x) for x in (model, optimizer, *weights))
    return optimizer
def alive(*_):
    assert len(refs) > 10
    print("alive", sum(ref() is not None for ref in refs))
    sys.stdout.flush()
    train.parallel.leave()
    train.parallel.end()
train.make_optimizer, train.evaluate = noted, alive
train.main()
"""


@pytest.mark.parametrize("extra", [[], ["--fsdp"]], ids=["ddp", "fsdp"])
def test_nothing_that_was_trained_is_alive_when_evaluation_begins(folder, tmp_path, extra):
    script = tmp_path / "alive.py"
    script.write_text(ALIVE.format(root=str(ROOT)))
    ended = torchrun(*FLAGS, *extra, "--data", folder, "--out_dir", tmp_path / "run", script=script)
    assert ended.returncode == 0, ended.stderr
    assert "alive 0" in ended.stdout, ended.stdout


def test_a_run_goes_on_with_another_number_of_processes(alone, folder, tmp_path):
    flags = [*FLAGS, "--data", folder, "--out_dir", tmp_path / "run"]
    script = tmp_path / "stops.py"
    script.write_text(
        STOPS.format(root=str(ROOT), after=6)
    )  # 2 steps of SFT, 4 of SafeDPO; saved after the third
    one = subprocess.run(
        list(map(str, [sys.executable, script, *flags])), capture_output=True, text=True
    )
    assert "KeyboardInterrupt" in one.stderr and torch.load(tmp_path / "run/state.pt")["step"] == 3
    script.write_text(STOPS.format(root=str(ROOT), after=4))
    assert "KeyboardInterrupt" in torchrun(*flags, "--resume", "--fsdp", script=script).stderr
    state = torch.load(tmp_path / "run/state.pt")
    assert state["stage"] == "safedpo" and state["step"] == 6
    train.main([*map(str, flags), "--resume"])
    weights = (torch.load(run / "policy.pt")["model"] for run in (tmp_path / "run", alone))
    for a, b in zip(*(w.values() for w in weights)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [
        line["step"] for line in metrics(alone)
    ]


JUDGES = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from lib import parallel, policy
from lib.settings import Settings
import eval
policy.SAMPLES_AT_ONCE = 5
parallel.join()
asked = []
generate = policy.generate
policy.generate = lambda model, prompts, *rest: asked.append(len(prompts)) or generate(
    model, prompts, *rest
)
eval.evaluate(Path(sys.argv[1]), Settings(device="cpu", eval_prompts=24, max_new_tokens=12))
print("asked", sum(asked), parallel.size())
parallel.leave()
parallel.end()
"""


def test_all_processes_judge_and_the_figures_are_one_process_s(alone, tmp_path):
    script, figures, asked = tmp_path / "judges.py", {}, {}
    script.write_text(JUDGES.format(root=str(ROOT)))
    for n in (1, 2):
        run = tmp_path / str(n)
        run.mkdir()
        for name in ("config.json", "reference.pt", "policy.pt"):
            (run / name).write_bytes((alone / name).read_bytes())
        ended = torchrun(run, script=script, processes=n)
        assert ended.returncode == 0, ended.stderr
        figures[n] = [
            (run / name).read_bytes()
            for name in ("eval-eval_prompts24.json", "samples-eval_prompts24.jsonl")
        ]
        _, asked[n], size = ended.stdout.splitlines()[-1].split()  # gloo may talk
        assert int(size) == n
    assert figures[1] == figures[2] and 0 < int(asked[2]) < int(asked[1])


def test_fsdp_shards_every_block(tmp_path):
    script = tmp_path / "wraps.py"
    script.write_text(WRAPS.format(root=str(ROOT)))
    ended = torchrun(script=script)
    assert ended.returncode == 0, ended.stderr


WRAPS = """
import sys
sys.path.insert(0, {root!r})
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from lib import parallel
from model import ModelConfig, Transformer
parallel.join()
model = Transformer(ModelConfig(60))
whole = sum(p.numel() for p in model.parameters())
model = parallel.wrap(model, torch.device("cpu"), fsdp=True)
assert all(isinstance(part, FSDPModule) for part in (model, *model.blocks))
assert all(isinstance(p, DTensor) for p in model.parameters())
own = sum(p.to_local().numel() for p in model.parameters())
assert 0.4 * whole < own < 0.6 * whole, (own, whole)
parallel.leave()
parallel.end()
"""


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_fsdp_alone_is_refused(finished, folder, tmp_path, resume):
    with pytest.raises(ValueError, match="torchrun"):
        train.main(
            [*FLAGS, "--fsdp", "--data", str(folder), "--out_dir", str(tmp_path)]
            if not resume
            else ["--fsdp", "--resume", "--out_dir", str(finished)]
        )


GATHERS = """
import sys
from collections import Counter
sys.path.insert(0, {root!r})
import torch
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
import data, train
from lib import parallel
from lib.device import autocast
from lib.policy import log_probs
from model import ModelConfig, Transformer
from safedpo import Pair

dtype, tied = sys.argv[1], sys.argv[2] == "tied"
parallel.join()
cpu, (mine, n) = torch.device("cpu"), (parallel.rank(), parallel.size())
torch.manual_seed(0)
sizes = dict(n_layer=4, d_model=64, d_ff=128, tied_head=tied)
model = Transformer(ModelConfig(300, **sizes))
P = sum(p.numel() for p in model.parameters())
matrices = {{tuple(p.shape) for p in model.parameters() if p.dim() == 2}}
model = parallel.wrap(model, cpu, True, dtype)
ids = lambda k: torch.randint(1, 300, (k,)).tolist()
pairs = [Pair(ids(5), ids(6 + i % 5), ids(9 - i % 3), 0, i % 2) for i in range(24)]
pairs = data.TokenPairs(pairs)
ref = log_probs(model, data.Examples(pairs), cpu, dtype)
optimizer = train.make_optimizer(model, 0.0, 0.99)
for group in optimizer.param_groups:
    group["lr"] = 1e-3
scaler = torch.amp.GradScaler("cpu", enabled=False)


class Bytes(TorchDispatchMode):
    gathered = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        if str(f).startswith("c10d._allgather_base"):
            self.gathered += args[0].untyped_storage().nbytes()
        return f(*args, **(kwargs or {{}}))


kept, gradients, backward = [], [], parallel.backward


def pack(x):
    if x.dtype == torch.bfloat16 and ({{tuple(x.shape), tuple(x.shape[::-1])}} & matrices):
        kept.append(x)
    return x


def then_look(loss):
    backward(loss)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for p in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                whole = p.unsharded_accumulated_grad
                if whole is None:
                    whole = getattr(p, "_unsharded_param", torch.tensor(0)).grad
                gradients.append(0 if whole is None else whole.numel())
    # FSDP itself frees what it gathered; what autograd kept beside that would still have memory
    gradients.append(sum(x.numel() for x in kept if x.untyped_storage().nbytes()))
    kept.clear()


parallel.backward = then_look
losses = []
for step in range(2):
    batches = data.step_batches(pairs, step, 12, 2, 0, ref, mine, n)
    assert len(batches) == 12 // 2 // n
    loss = train.preference_loss(0.1, 10.0)
    count = Bytes()
    with count, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        precision = autocast(cpu, dtype)
        losses.append(train.train_step(model, optimizer, scaler, batches, loss, 1.0, precision)[0])
assert not any(gradients), "whole gradients, or copies of weights, outlive a micro-batch"
if not mine:
    print("losses", *losses, "bytes", count.gathered / P / len(batches))
parallel.leave()
parallel.end()
"""


@pytest.mark.parametrize("tied", ["tied", "apart"])
def test_fsdp_in_bf16_gathers_half_and_keeps_nothing(tmp_path, tied):
    script = tmp_path / "gathers.py"
    script.write_text(GATHERS.format(root=str(ROOT)))
    said = {}
    for dtype in ("bfloat16", "float32"):
        ended = torchrun(dtype, tied, script=script)
        assert ended.returncode == 0, ended.stderr
        said[dtype] = ended.stdout.splitlines()[-1].split()
    losses = {dtype: list(map(float, words[1:3])) for dtype, words in said.items()}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3)
    low, high = (float(said[dtype][-1]) for dtype in ("bfloat16", "float32"))
    assert low == pytest.approx(high / 2, rel=0.01) and low < 4.1
