import json
import os
from pathlib import Path

from lib import flags

import pytest
import torch

import train
from village import world

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network

SHORT = (
    "--batch_size 16 --sft_batch_size 16 --micro_batch_size 8 --epochs 1 "
    "--eval_prompts 8 --max_new_tokens 12 --device cpu"
).split()
TINY = (
    "--n_layer 1 --n_head 2 --n_kv_head 1 --d_model 16 --d_ff 16 --vocab_size 400".split() + SHORT
)  # a second or two
ROW = {  # in PKU-SafeRLHF's format
    "prompt": "x?",
    "response_0": "yes",
    "response_1": "no",
    "is_response_0_safe": True,
    "is_response_1_safe": False,
    "better_response_id": 0,
    "safer_response_id": 0,
}


def row(**changes):
    """ROW with changes; ... takes a field out."""
    return {k: v for k, v in {**ROW, **changes}.items() if v is not ...}


def pytest_addoption(parser):
    parser.addoption(
        "--kills",
        type=int,
        default=5,
        help="how often tests/dev/test_survival.py kills a run, in each of its ways",
    )


@pytest.fixture(scope="session")
def rows():
    """A folder with a small train and test split of the village, as JSON lines."""
    return world.splits(n_train=96)


@pytest.fixture(scope="session")
def folder(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for split, n in (("train", 96), ("test", 24)):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[split][:n]))
    return path


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    """The folder of a finished run on that data: Δ = 5."""
    out = tmp_path_factory.mktemp("runs") / "delta5"
    train.main([*TINY, "--data", str(folder), "--delta", "5", "--out_dir", str(out)])
    return out


def complaint(main, argv, capsys):
    """The one line that a command ends with; its exit code is 2."""
    with pytest.raises(SystemExit) as end:
        flags.run(lambda: main(argv))
    torch.set_flush_denormal(False)  # flags.run sets it; hypothesis wants its numbers whole
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "error: " in error
    return error
