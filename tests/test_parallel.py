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


def torchrun(*flags, script=ROOT / "train.py"):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
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
"""


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["new", "resumed"])
def test_fsdp_alone_is_refused(finished, folder, tmp_path, resume):
    with pytest.raises(ValueError, match="torchrun"):
        train.main(
            [*FLAGS, "--fsdp", "--data", str(folder), "--out_dir", str(tmp_path)]
            if not resume
            else ["--fsdp", "--resume", "--out_dir", str(finished)]
        )
