"""TensorBoard and Weights & Biases are given the numbers of metrics.jsonl, under TRL's names."""

import json
import os

from lib.settings import TrainConfig
from lib.watch import Watch

import pytest
from conftest import TINY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train

METRICS = {"loss": 0.5, "rewards/margins": 1.5, "grad_norm": 2.0}


def test_tensorboard_has_each_steps_numbers(folder, tmp_path):
    train.main([*TINY, "--data", str(folder), "--log", "tensorboard", "--out_dir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for stage in ("sft", "safedpo"):
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage))
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
    (run,) = (folder / "wandb").glob("offline-run-*")
    (written,) = run.glob("*.wandb")
    content = written.read_bytes()
    for name in ("train/rewards/margins", "train/global_step", "a-run-safedpo"):
        assert name.encode() in content
    assert os.environ.get("WANDB_MODE") is None
