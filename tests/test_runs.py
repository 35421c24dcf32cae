"""A run's folder: its name, its flags after a resume."""

import json

from lib.flags import parse
from lib.runs import open_run, run_name
from lib.settings import TrainConfig

import pytest


def given(*flags):
    return parse(TrainConfig, [str(flag) for flag in flags])


def test_flags_of_the_machine_may_change_on_resume(finished):
    other = "--resume", "--checkpointing", "--compile", "--micro_batch_size", 2
    config, _ = open_run(given(*other, "--out_dir", finished))
    assert (config.checkpointing, config.compile, config.micro_batch_size) == (True, True, 2)
    config, _ = open_run(given("--resume", "--out_dir", finished))
    assert (config.checkpointing, config.compile, config.micro_batch_size) == (False, False, 8)


def test_a_model_from_elsewhere_may_have_sizes_that_no_flag_takes(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    config |= {"init_from": "a model", "vocab_size": 200}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_run(given("--resume", "--out_dir", tmp_path))[0].vocab_size == 200
    for wrong in ({"vocab_size": "many"}, {"n_layer": 0}):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is .*; expected"):
            open_run(given("--resume", "--out_dir", tmp_path))


def test_out_dir_follows_from_the_flags():
    def name(*flags):
        return run_name(given(*flags))

    assert name() == name("--delta", 5) == name("--seed", 0, "--lr", 4e-4) == "toy-safedpo-delta5"
    assert name("--pairs", "helpful") == name("--pairs", "helpful", "--delta", 0) == "toy-helpful"
    assert name("--pairs", "noswap", "--delta", 0) == "toy-noswap-delta0"
    assert name("--delta", 5) == name("--delta", 5, "--verbose"), "what is printed is no setting"
    runs = [
        [],
        ["--delta", 0.5],
        ["--delta", 0],
        ["--pairs", "helpful"],
        ["--lr", 1e-3],
        ["--seed", 1],
        ["--data", "a/b"],
    ]
    assert len({name(*flags) for flags in runs}) == len(runs)
    assert name("--delta", 5, "--resume") == name("--delta", 5) == name("--delta", "5.0")
    assert "/" not in name("--data", "../a/b", "--init_from", "/c/d")
    long = [name("--init_from", "ü" * 300 + end) for end in "ab"]
    assert len(set(long)) == 2
    assert max(len(n.encode()) for n in long) <= 120, "a file system's limit is 255 bytes"


def test_a_run_from_before_losses_goes_on_with_the_logistic_one(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text())
    del saved["loss"], saved["epsilon"], saved["anchor"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    config, _ = open_run(given("--resume", "--out_dir", tmp_path))
    assert (config.loss, config.anchor) == ("logistic", 0.0)
    for flags in (("--loss", "hinge"), ("--anchor", "1")):
        with pytest.raises(ValueError, match="contradicts the run"):
            open_run(given("--resume", "--out_dir", tmp_path, *flags))


def test_a_run_from_before_verbose_goes_on_and_verbose_does_not_stay(finished, tmp_path):
    saved = json.loads((finished / "config.json").read_text())
    for value in ({}, {"verbose": True}):
        del saved["verbose"]
        saved |= value
        (tmp_path / "config.json").write_text(json.dumps(saved))
        config, _ = open_run(given("--resume", "--out_dir", tmp_path))
        assert config.verbose is False
        saved["verbose"] = False
