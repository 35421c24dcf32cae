"""TensorBoard and Weights & Biases are given the numbers of metrics.jsonl, under TRL's names."""

import contextlib
import json
import os

from lib.settings import TrainConfig
from lib.watch import Watch

import pytest
import wandb
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train

METRICS = {"loss": 0.5, "rewards/margins": 1.5, "grad_norm": 2.0}


def test_tensorboard_has_each_steps_numbers(folder, tmp_path):
    out = tmp_path / "run"  # no other run lies beside it, whose reference would be taken
    train.main([*TINY, "--data", str(folder), "--log", "tensorboard", "--out_dir", str(out)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for stage in ("sft", "safedpo"):
        events = EventAccumulator(str(out / "tensorboard" / stage))
        events.Reload()
        of_stage = [line for line in lines if line["stage"] == stage]
        for name in of_stage[0].keys() - {"stage", "step"}:
            written = [(e.step, e.value) for e in events.Scalars(f"train/{name}")]
            assert [step for step, _ in written] == [line["step"] for line in of_stage]
            values = [line[name] for line in of_stage]
            assert [value for _, value in written] == pytest.approx(values, rel=1e-6)
    assert "train/rewards/accuracies" in events.Tags()["scalars"]


def test_steps_that_are_taken_again_stand_once(tmp_path):
    watch = Watch(TrainConfig(log="tensorboard", out_dir=str(tmp_path)), {}, None)
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # stopped after 3, saved at 2
        with watch.tracker("safedpo", first) as log:
            for step in steps:
                log(step, METRICS)
    events = EventAccumulator(str(tmp_path / "tensorboard" / "safedpo"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/rewards/margins")] == [1, 2, 3, 4]


def test_wandb_writes_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "a-run"
    folder.mkdir()
    watch = Watch(TrainConfig(log="wandb", out_dir=str(folder)), {}, None)
    with watch.tracker("safedpo", 0) as log:
        for step in (1, 2):
            log(step, METRICS)
    wandb.teardown()  # the process that writes the file may be at it after the run's end
    (run,) = (folder / "wandb").glob("offline-run-*")
    (written,) = run.glob("*.wandb")
    content = written.read_bytes()
    for name in ("train/rewards/margins", "train/global_step", "a-run-safedpo"):
        assert name.encode() in content
    assert os.environ.get("WANDB_MODE") is None


def test_wandb_gets_each_steps_numbers(tmp_path, monkeypatch):
    sent, names = [], {}

    class Run:
        define_metric = lambda self, name, step_metric: sent.append((name, step_metric))
        log = lambda self, row: sent.append(row)

    def init(**given):
        names.update(given)
        return contextlib.nullcontext(Run())

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_MODE", "")
    watch = Watch(TrainConfig(log="wandb", delta=3.0, out_dir=str(tmp_path / "r")), {}, None)
    with watch.tracker("sft", 4) as log:
        log(5, METRICS)
    assert (names["mode"], names["group"], names["name"]) == ("offline", "r", "r-sft")
    assert names["config"]["delta"] == 3.0
    of_step = {"train/loss": 0.5, "train/rewards/margins": 1.5, "train/grad_norm": 2.0}
    assert sent == [("*", "train/global_step"), of_step | {"train/global_step": 5}]

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured.\nMore text.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(OSError, match="wandb: No API key configured.; WANDB_MODE=offline needs"):
        watch.wandb_run("sft")
