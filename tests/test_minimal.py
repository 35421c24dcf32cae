"""docs/minimal.py takes train.py's steps: the same losses from the same data."""

import json

import pytest

import data
import train
from docs import minimal
from village import world


def test_its_losses_are_those_of_train(tmp_path, capsys):
    rows = {"train": world.splits(n_train=160)["train"], "test": world.splits()["test"][:8]}
    (tmp_path / "data").mkdir()
    for split, some in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    losses = minimal.main(5.0, data.load(str(tmp_path / "data")))
    assert "delta = 5" in capsys.readouterr().out

    flags = (
        "--delta 5 --micro_batch_size 64 --eval_prompts 1 --max_new_tokens 1 --device cpu".split()
    )
    out = ["--out_dir", str(tmp_path / "run")]
    train.main([*flags, "--data", str(tmp_path / "data"), *out])
    with open(tmp_path / "run" / "metrics.jsonl") as f:
        metrics = [json.loads(line) for line in f]
    for stage in ("sft", "safedpo"):
        theirs = [line["loss"] for line in metrics if line["stage"] == stage]
        assert len(theirs) == len(losses[stage]) > 1
        assert losses[stage] == pytest.approx(theirs, rel=1e-5)
