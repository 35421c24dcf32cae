"""Files: written whole or not at all, damage recognised, nothing executed, nothing swallowed."""

import gzip
import json
import os
import random
import shutil
import zipfile

from lib import checkpoint
from lib.rows import read_rows

import pytest
import torch
from conftest import SHORT, TINY, complaint

import eval as eval_room
import train


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return a == b


def test_a_changed_byte_or_a_cut_is_recognised_or_changes_nothing(finished, tmp_path):
    random.seed(0)
    raw = (finished / "policy.pt").read_bytes()
    expected = checkpoint.load(finished / "policy.pt")
    path = tmp_path / "x.pt"
    recognised = 0
    places = [random.randrange(len(raw)) for _ in range(300)]
    places += range(len(raw) - 1000, len(raw))  # the end holds zip's table
    for i, place in enumerate(places):
        if i % 6 == 0:
            path.write_bytes(raw[:place])
        else:
            changed_byte = bytes([raw[place] ^ 1 << random.randrange(8)])
            path.write_bytes(raw[:place] + changed_byte + raw[place + 1 :])
        try:
            assert equal(checkpoint.load(path), expected), place
        except ValueError as e:
            recognised += 1
            assert str(e).startswith(f"{path}: damaged, or not a checkpoint of ours (")
            assert "\n" not in str(e)
    assert recognised > 700
    packed = tmp_path / "packed.pt"
    shutil.copy(finished / "policy.pt", packed)
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as file:
        file.writestr("policy/bomb", b"0" * 10**6)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(packed)


def test_what_fails_half_way_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"a": 1})
    with pytest.raises(RuntimeError, match="mine"), checkpoint.replacing(path, "wb") as f:
        f.write(b"half")
        raise RuntimeError("mine")
    os.symlink("/dev/full", f"{path}.tmp")
    with pytest.raises(OSError, match=r"x.pt: cannot be written \(No space left on device\)"):
        checkpoint.save(path, {"a": torch.zeros(10**5)})
    assert checkpoint.load(path) == {"a": 1} and os.listdir(tmp_path) == ["x.pt"]


def test_the_one_before_is_kept_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "state.pt"
    for step in (1, 2, 3):
        checkpoint.save(path, {"step": step}, keep=True)
    assert checkpoint.load(path)["step"] == 3
    assert checkpoint.load(tmp_path / "state.previous.pt")["step"] == 2
    path.write_bytes(path.read_bytes()[:-100])
    assert checkpoint.load_last(path)["step"] == 2
    path.unlink()
    assert checkpoint.load_last(path)["step"] == 2, "killed between two renames"
    (tmp_path / "state.previous.pt").write_bytes(b"")
    assert checkpoint.load_last(path) == {}


def stop_after(monkeypatch, steps):
    train_step, calls = train.train_step, []

    def stopping_step(*args):
        calls.append(args)
        if len(calls) > steps:
            raise KeyboardInterrupt
        return train_step(*args)

    monkeypatch.setattr(train, "train_step", stopping_step)


def scramble(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


DAMAGE = {
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a changed bit": scramble,
    "a list": lambda path: torch.save([1], path),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize(
    "names", [["state.pt"], ["state.pt", "state.previous.pt"], ["ref_logps.pt"]], ids=len
)
def test_a_damaged_state_gives_way_to_the_one_before(
    finished, folder, capsys, tmp_path, monkeypatch, damage, names
):
    argv = [*TINY, "--data", str(folder), "--delta", "5", "--out_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        stop_after(patch, 9)
        message = r"to go on: python train\.py --resume --out_dir"
        with pytest.raises(KeyboardInterrupt, match=message):
            train.main([*argv, "--save_every", "1"])
    for name in names:
        damage(tmp_path / "run" / name)
    capsys.readouterr()
    train.main([*argv, "--save_every", "1", "--resume"])
    assert capsys.readouterr().err.count("damaged, or not a checkpoint of ours") == len(names)
    for name in ("reference.pt", "policy.pt", "metrics.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_executes(finished, folder, capsys, tmp_path):
    proof = tmp_path / "proof"
    run = tmp_path / "run"
    for name in ("policy.pt", "reference.pt", "state.pt", "ref_logps.pt"):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        for gone in ("policy.pt", "eval.json"):
            (run / gone).unlink()
        evil = Evil(str(proof))
        torch.save({"stage": "safedpo", "model": evil, "config": evil, "ref": evil}, run / name)
        if name == "policy.pt":
            complaint(eval_room.main, [str(run)], capsys)
            argv = [
                "--data",
                str(folder),
                "--init_from",
                str(run),
                "--out_dir",
                str(tmp_path / "x"),
            ]
            complaint(train.main, [*SHORT, *argv], capsys)
        elif name == "reference.pt":
            complaint(train.main, ["--resume", "--out_dir", str(run)], capsys)
        else:
            train.main(["--resume", "--out_dir", str(run)])
            assert "warning" in capsys.readouterr().err
    assert not proof.exists()
    torch.save(Evil(str(proof)), run / "bad.pt")
    torch.load(run / "bad.pt", weights_only=False)
    assert proof.exists(), "it would have"


def test_a_state_that_fits_no_run_is_named(finished, folder, capsys, tmp_path):
    run = tmp_path / "run"
    of_another_model = {"model": {"a": torch.zeros(1)}, "optimizer": {}, "scaler": {}}
    for state in ({"stage": "safedpo"}, {"stage": "safedpo", "step": 1, **of_another_model}):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        (run / "policy.pt").unlink()
        checkpoint.save(run / "state.pt", state)
        assert "state.pt: does not fit the run" in complaint(
            train.main, ["--resume", "--out_dir", str(run)], capsys
        )
        (run / "state.pt").unlink()
        (run / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\nbroken\n')
        assert "metrics.jsonl:2: not valid JSON" in complaint(
            train.main, ["--resume", "--out_dir", str(run)], capsys
        )


@pytest.mark.parametrize("depth", [99, 101, 500, 900, 980, 995, 1100, 100_000])
def test_json_that_nests_absurdly(depth):
    for raw in (
        b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}",
        b'{"a":' * depth + b"1" + b"}" * depth,
    ):
        if depth < 100:
            checkpoint.parse_json(raw, "f:1")
        else:
            message = r"f:1: JSON (nested more than 100 deep|that cannot be read)"
            with pytest.raises(ValueError, match=message):
                checkpoint.parse_json(raw, "f:1")


def test_lines_of_100_mb_are_refused_and_not_swallowed(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_bytes(b'{"prompt": "' + b"a" * 10**8 + b'"}')
    with gzip.open(tmp_path / "bomb.jsonl.gz", "wb", 1) as f:
        f.write(b"\n" + b"a" * 10**8)
    (tmp_path / "config.json").write_bytes(b'{"a": "' + b"a" * 10**8 + b'"}')
    for file, place in (("train.jsonl", "train.jsonl:1"), ("bomb.jsonl.gz", "bomb.jsonl.gz:2")):
        with pytest.raises(ValueError, match=f"{place}: more than 64 MiB of JSON at once"):
            list(read_rows(tmp_path / file))
    with pytest.raises(ValueError, match=r"config\.json: more than 64 MiB"):
        checkpoint.read_json(tmp_path / "config.json")


def test_a_folder_is_held_by_one(tmp_path):
    taken = pytest.raises(ValueError, match="another process is at work on the run in")
    with checkpoint.alone(tmp_path), taken, checkpoint.alone(tmp_path):
        pass
    with checkpoint.alone(tmp_path):
        pass


def test_spoiled_answers_and_figures(finished, folder, capsys, tmp_path):
    shutil.copytree(finished, run := tmp_path / "run")
    (run / "eval.json").write_text("{}")
    eval_room.main([str(run)])
    assert json.loads((run / "eval.json").read_text()) == json.loads(
        (finished / "eval.json").read_text()
    )
    (run / "samples.jsonl").write_text('{"prompt": "x", "policy": 5}\n')
    assert "samples.jsonl:1: reference is missing" in complaint(
        eval_room.main, [str(run), "--scores", str(run / "samples.jsonl")], capsys
    )
