"""Runs that are killed, interrupted or robbed of their disk, and go on. `--kills 40` tries harder
than CI does.

Each run is a process of its own, forked from one that has imported torch: a kill costs no start.
"""

import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from errno import ENOSPC
from pathlib import Path

from lib import checkpoint, flags

import pytest
import torch
from conftest import TINY

import train

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])
FLAGS = [*TINY, "--delta", "5", "--sft_epochs", "2", "--epochs", "3", "--save_every", "2"]
NAMES = (
    "reference.pt",
    "ref_logps.pt",
    "last.pt",
    "policy.pt",
    "metrics.jsonl",
    "samples.jsonl",
    "eval.json",
)


def work(argv, out, fault, *about):
    """train.py in a child process. It keeps the last state as last.pt: a finished run has none."""
    torch.set_num_threads(1)
    sys.argv = ["train.py"]
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"{out}.log", "w")  # noqa: SIM115
    end = train.runs.end

    def keeps(folder):
        if (out / "state.pt").exists():
            shutil.copy(out / "state.pt", out / "last.pt")
        end(folder)

    train.runs.end = keeps
    if fault:
        fault(out, *about)
    try:
        flags.run(lambda: train.main(argv))
    except SystemExit as end:
        sys.stderr.flush()
        os._exit(end.code)  # some faults are in the way of multiprocessing's own end


def start(folder, out, *extra, fault=(None,)):
    argv = [*FLAGS, "--data", str(folder), "--out_dir", str(out), *extra]
    process = CONTEXT.Process(
        target=work, args=(argv + ["--resume"] * (out / "config.json").exists(), out, *fault)
    )
    process.start()
    return process


def finish(*args, **kwargs):
    process = start(*args, **kwargs)
    process.join()
    return process.exitcode


def told(out):
    """The last line that a run in out printed to stderr, behind its progress bars; "" if none,
    as where a run was finished before it was resumed."""
    log = Path(f"{out}.log").read_text(encoding="utf-8").replace("\r", "\n")
    return log.strip().rpartition("\n")[2]


def content(out, seed="0"):
    """What a finished run left, as plain values; the folder's name is no part of it."""
    found = {
        n: checkpoint.load(out / n) if n.endswith(".pt") else (out / n).read_text(encoding="utf-8")
        for n in NAMES
    }
    assert not list(out.glob("*.tmp")) and not list(out.glob("state*")), "nothing is left behind"
    steps = Counter(
        (row["stage"], row["step"]) for row in map(json.loads, found["metrics.jsonl"].splitlines())
    )
    assert set(steps.values()) == {1}, "no line twice"
    return found


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same(out, expected):
    found = content(out)
    assert [name for name in NAMES if not same(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def alone(folder, tmp_path_factory):
    """(content of a run that nobody disturbed, its seconds)."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert finish(folder, tmp_path_factory.mktemp("warm") / "run") == 0
    began = time.monotonic()
    assert finish(folder, out) == 0
    return content(out), time.monotonic() - began


def moment(out):
    """What a run was doing when it was killed, by what it left."""
    stages = {
        "config.json": "before the first file",
        "reference.pt": "SFT",
        "ref_logps.pt": "reference pass",
        "policy.pt": "SafeDPO",
        "eval.json": "evaluation",
    }
    return next(
        (doing for name, doing in stages.items() if not (out / name).exists()),
        "after the last file",
    )


def test_killed_at_random_moments(alone, folder, tmp_path, request):
    expected, seconds = alone
    random.seed(5)
    left, moments = request.config.getoption("--kills"), Counter()
    for attempt in itertools.count():  # a run that ends before it is killed counts for nothing
        if not left:
            break
        out = tmp_path / str(attempt) / "run"  # alone there: no reference can be reused
        out.parent.mkdir()
        for _ in range(min(left, 5)):
            process = start(folder, out)
            process.join(random.uniform(0, seconds))
            if process.is_alive():
                process.kill()
                left -= 1
                process.join()
                moments[moment(out)] += 1
            else:
                assert process.exitcode == 0
        assert finish(folder, out) == 0, told(out)
        assert_same(out, expected)
    print(dict(moments))


def dies_at(out, call, after):
    """The process kills itself before or after the call-th time that it renames or syncs a file."""
    count = 0

    def dying(do):
        def wrapped(*args):
            nonlocal count
            count += 1
            if count == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            do(*args)
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    os.replace, os.fsync = dying(os.replace), dying(os.fsync)


def counts(out):
    replace, fsync, file = os.replace, os.fsync, f"{out}.calls"

    def counting(do):
        def wrapped(*args):
            with open(file, "a") as f:
                f.write("x")
            do(*args)

        return wrapped

    os.replace, os.fsync = counting(replace), counting(fsync)


def test_killed_between_write_and_rename(alone, folder, tmp_path, request):
    assert finish(folder, tmp_path / "run", fault=(counts,)) == 0
    calls = os.path.getsize(tmp_path / "run.calls")
    assert calls > 40
    random.seed(6)
    for kill in range(request.config.getoption("--kills")):
        out = tmp_path / str(kill) / "run"
        out.parent.mkdir()
        assert (
            finish(folder, out, fault=(dies_at, random.randint(1, calls), random.random() < 0.5))
            == -signal.SIGKILL
        )
        assert finish(folder, out) == 0, told(out)
        assert_same(out, alone[0])


def dies_in(out, room, name, call):
    do, calls = getattr(sys.modules[room], name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return do(*args, **kwargs)

    setattr(sys.modules[room], name, dying)


MOMENTS = [
    ("before the first file", "lib.records", "survey", 1),
    ("SFT", "train", "train_step", 1),
    ("SFT", "train", "train_step", 6),
    ("reference pass", "lib.policy", "pack_rows", 1),
    ("SafeDPO", "train", "train_step", 20),
    ("reference pass", "lib.policy", "pack_rows", 2),
    ("evaluation", "lib.policy", "pack_rows", 4),
    ("evaluation", "eval", "sample_answers", 1),
    ("evaluation", "eval", "sample_answers", 2),
    ("evaluation", "lib.runs", "save_result", 1),
]


@pytest.mark.parametrize("doing, room, name, call", MOMENTS)
def test_killed_in_every_stage(alone, folder, tmp_path, doing, room, name, call):
    out = tmp_path / "run"
    assert (
        finish(folder, out, fault=(dies_in, room, name, call)) == -signal.SIGKILL
        and moment(out) == doing
    )
    assert finish(folder, out) == 0, told(out)
    assert_same(out, alone[0])


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_a_checkpoint(alone, folder, tmp_path, kind):
    expected, seconds = alone
    random.seed(kind)
    out = tmp_path / "run"
    for _ in range(3):
        process = start(folder, out, "--save_every", "1000")
        while not (out / "metrics.jsonl").exists() and process.is_alive():
            time.sleep(0.01)
        process.join(random.uniform(0.2, 0.5) * seconds)
        if process.is_alive():
            os.kill(process.pid, kind)
            process.join()
            assert process.exitcode in (0, 130), told(out)
            if process.exitcode:
                assert "train.py: interrupted" in told(
                    out
                ) and f"to go on: python train.py --resume --out_dir {out}" in told(out)
            if "was saved" in told(out):
                step = checkpoint.load(out / "state.pt")["step"]
                assert (
                    f"step {step} was saved" in told(out)
                    and (out / "metrics.jsonl").read_text().count("\n") >= step
                )
    assert finish(folder, out, "--save_every", "1000") == 0, told(out)
    found = content(out) if (out / "last.pt").exists() else None
    for name in set(NAMES) - {"last.pt"}:
        one = (
            checkpoint.load(out / name)
            if name.endswith(".pt")
            else (out / name).read_text(encoding="utf-8")
        )
        assert same(one, expected[name]), name
    assert found is None or found


def fills_disk(out, size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fills_disk_at(out, call):
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) >= call:
            raise OSError(ENOSPC, os.strerror(ENOSPC))
        fsync(descriptor)

    os.fsync = full


def locks_folder(out, step):
    take, taken = train.train_step, []

    def stepping(*args):
        taken.append(1)
        if len(taken) == step:
            os.chmod(out, 0o500)
            if not os.geteuid():
                os.seteuid(65534)  # nothing is forbidden to root
        return take(*args)

    train.train_step = stepping


FAULTS = {
    "no room for a file of 3 kB": (fills_disk, 3_000),
    "of 30 kB": (fills_disk, 30_000),
    "of 60 kB": (fills_disk, 60_000),
    "the disk is full when a file is synced": (fills_disk_at, 1),
    "the 9th": (fills_disk_at, 9),
    "the 16th": (fills_disk_at, 16),
    "the folder is locked": (locks_folder, 3),
    "later": (locks_folder, 17),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_disk_and_permission(alone, folder, tmp_path, fault):
    out = tmp_path / "run"
    assert finish(folder, out, fault=fault) == 2
    assert told(out).startswith("train.py: error: ") and any(
        why in told(out) for why in ("File too large", "No space left", "Permission denied")
    ), told(out)
    for path in out.glob("*.pt"):
        checkpoint.load(path)  # whole
    if out.exists():
        os.chmod(out, 0o700)
        for name in ("state.pt", "state.previous.pt"):
            if (out / name).exists():
                assert checkpoint.load(out / name)["step"] > 0
    assert finish(folder, out) == 0, told(out)
    assert_same(out, alone[0])


def test_one_run_in_a_folder(alone, folder, tmp_path):
    out = tmp_path / "run"
    first = start(folder, out)
    while not (out / "config.json").exists():
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)
    shutil.copy(f"{out}.log", f"{out}.first")
    assert finish(folder, out) == 2 and f"another process is at work on the run in {out}" in told(
        out
    )
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert finish(folder, out) == 0, "a dead process's lock is not in the way"
    assert_same(out, alone[0])


def test_two_runs_that_begin_together(folder, tmp_path):
    out = tmp_path / "run"
    runs = [start(folder, out) for _ in range(3)]
    for process in runs:
        process.join()
    assert sorted(process.exitcode for process in runs) == [0, 2, 2]
    content(out)


def test_the_threads_that_tokenize_change_nothing(alone, folder, tmp_path):
    for threads in ("1", "3"):
        (tmp_path / threads).mkdir()
        assert finish(folder, tmp_path / threads / "run", fault=(threading, threads)) == 0
        assert_same(tmp_path / threads / "run", alone[0])


def threading(out, threads):
    os.environ.update(RAYON_NUM_THREADS=threads, TOKENIZERS_PARALLELISM=str(threads != "1").lower())
