"""What a user watches while a run trains changes nothing in it."""

import importlib.machinery
import re

from lib import checkpoint, watch
from lib.settings import NEW_FLAGS

import pytest
import torch
from conftest import TINY, complaint

import train


def weights(folder):
    return checkpoint.load(folder / "policy.pt")["model"]


def test_samples_are_printed_every_so_many_steps_and_change_nothing(
    folder, finished, tmp_path, capsys, monkeypatch
):
    drawn = []
    monkeypatch.setattr(watch, "SECONDS", -1)
    monkeypatch.setattr(watch, "TOKENS", 2)
    monkeypatch.setattr(watch.report, "draw_curves", drawn.append)
    sampled, sample = [], watch.sample_answers
    monkeypatch.setattr(
        watch, "sample_answers", lambda *how: sampled.extend(found := sample(*how)) or found
    )
    capsys.readouterr()
    flags = ["--data", str(folder), "--delta", "5", "--sample_every", "3"]
    train.main([*TINY, *flags, "--out_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    steps = [(line["stage"], line["step"]) for line in train_lines(tmp_path / "run")]
    shown = re.findall(r"^(sft|safedpo) step (\d+):$", said, flags=re.M)
    expected = [(stage, str(step)) for stage, step in steps if step % 3 == 0]
    assert shown == expected and len({stage for stage, _ in shown}) == 2
    assert said.count("    sft:  ") == 3 * sum(stage == "sft" for stage, _ in shown)
    assert all(len(y) <= 2 for y in sampled)
    assert len(drawn) == 1 + sum(stage == "safedpo" for stage, _ in steps), "and at the end"
    ours, plain = weights(tmp_path / "run"), weights(finished)
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def train_lines(folder):
    return [checkpoint.parse_json(line, "") for line in open(folder / "metrics.jsonl", "rb")]


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_done(
    tmp_path, capsys, monkeypatch
):
    a_folder = importlib.machinery.ModuleSpec("wandb", None, is_package=True)
    for found in (None, a_folder):
        monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name, found=found: found)
        for log in ("tensorboard", "wandb"):
            argv = ["--log", log, "--out_dir", str(tmp_path / "run")]
            error = complaint(train.main, argv, capsys)
            assert f"--log {log} needs {log}: pip install {log}" in error
    there = importlib.machinery.ModuleSpec("wandb", None, origin="wandb/__init__.py")
    monkeypatch.setattr(watch.importlib.util, "find_spec", lambda name: there)
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    argv = ["--log", "wandb", "--out_dir", str(tmp_path / "run")]
    assert "WANDB_MODE is 'sometimes'; expected one of offline" in complaint(
        train.main, argv, capsys
    )
    assert not (tmp_path / "run").exists()


def test_sharded_models_print_no_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.runs.parallel, "size", lambda: 2)
    argv = ["--fsdp", "--sample_every", "5", "--out_dir", str(tmp_path / "run")]
    assert "--sample_every does not go with --fsdp" in complaint(train.main, argv, capsys)


def test_a_run_that_an_older_version_began_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *_: pytest.fail("stopped here"))
    argv = [*TINY, "--data", str(folder), "--out_dir", str(tmp_path / "run")]
    with pytest.raises(pytest.fail.Exception):
        train.main(argv)
    path = tmp_path / "run" / "config.json"
    state = checkpoint.read_json(path)
    for name in NEW_FLAGS:
        del state[name]
    path.write_text(checkpoint.json.dumps(state))
    with pytest.raises(pytest.fail.Exception, match="stopped here"):
        train.main(["--resume", "--out_dir", str(tmp_path / "run")])
