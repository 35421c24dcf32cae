"""A run's folder: its name and flags, who may write into it, and the figures in it."""

import datetime
import gc
import hashlib
import json
import os
import shlex
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple

from lib import checkpoint, parallel, watch
from lib.device import give_back, pick_device, settle
from lib.flags import problems
from lib.losses import LOSSES
from lib.settings import (
    EVAL_FLAGS,
    FREE_FLAGS,
    MODELS,
    NEW_FLAGS,
    REFERENCE_FLAGS,
    SIZE_FLAGS,
    EvalConfig,
    Settings,
    TrainConfig,
)

import torch

from safedpo import PAIR_CHOICES

DELTA = {pairs: 5.0 if pairs in ("safedpo", "noswap") else 0.0 for pairs in PAIR_CHOICES}
FILES = (  # what a run leaves in its folder
    "config.json", "metrics.jsonl", "reference.pt", "policy.pt", "ref_logps.pt", "state.pt",
    "state.previous.pt", "eval.json", "samples.jsonl", "curves.png",
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Before training: flags and folder


def open_run(given):
    """(config with nothing left open, folder) of the flags given, {name: value}.

    ValueError if the flags do not go together, or not with the run in the folder.
    """
    config = TrainConfig(**given)
    folder = Path(config.out_dir or Path("runs") / run_name(given))
    if config.resume:
        config = resumed(folder, given)
    else:
        check_free(folder)
        for name in SIZE_FLAGS:
            if config.init_from and name in given:
                raise ValueError(
                    f"--{name} {given[name]}: --init_from {config.init_from} has its own size; "
                    "leave the flag out"
                )
    config = settle(config)
    if config.fsdp and parallel.size() == 1:
        raise ValueError(
            "--fsdp shards over processes, and this is the only one; "
            "expected torchrun --nproc_per_node=N train.py …"
        )
    if config.fsdp and config.dtype == "float16":
        raise ValueError(
            "--fsdp does not go with --dtype float16, whose gradients must be scaled; "
            "expected bfloat16 or float32"
        )
    if config.fsdp and config.sample_every:
        raise ValueError("--sample_every does not go with --fsdp; expected --sample_every 0")
    watch.check(config.log)
    try:
        datetime.date.fromisoformat(config.date or "2026-01-31")
    except ValueError:
        raise ValueError(f"--date {config.date}: is no day; expected one as 2026-01-31")
    if not config.init_from and config.sft_epochs == 0:
        raise ValueError("--sft_epochs 0 needs a model to start from; expected --init_from FOLDER")
    if config.lora_rank and not config.init_from:
        raise ValueError(
            f"--lora_rank {config.lora_rank} needs a trained model to put adapters on; expected "
            "--init_from, for example with the reference.pt of an earlier run"
        )
    if "epsilon" in given and config.loss != "robust":
        raise ValueError(f"--epsilon {config.epsilon:g} needs --loss robust")
    if config.lora_alpha is not None and not config.lora_rank:
        raise ValueError(f"--lora_alpha {config.lora_alpha:g} needs --lora_rank")
    defaults = {
        "delta": DELTA[config.pairs],
        "sft_epochs": 0 if config.init_from else 1,
        "prompt_template": None if config.init_from else "plain",
        "date": datetime.date.today().isoformat(),
    }
    left_out = {k: v for k, v in defaults.items() if getattr(config, k) is None}
    return replace(config, **left_out, out_dir=str(folder)), folder


def resumed(folder, given):
    """The config of the run in folder; of the flags given, FREE_FLAGS may differ from it."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(
            f"{folder} holds no run to resume (config.json is missing); without --resume one starts"
        )
    names = [f.name for f in fields(TrainConfig) if f.name != "verbose"]
    needed = [name for name in names if name not in NEW_FLAGS]
    expected = {**dict.fromkeys(needed), "data_sha256": str, "reference": (str, type(None))}
    expected["vocab_size"] = int
    saved = checkpoint.read_json(path, expected)
    saved = {name: saved.get(name, getattr(TrainConfig, name)) for name in names}
    # a model from elsewhere may have fewer tokens than the flag takes
    checked = saved.keys() - {"vocab_size"} if saved["init_from"] else saved.keys()
    check_flags(TrainConfig, {name: saved[name] for name in checked}, path)
    pick_device(saved["device"])
    differs = [
        name
        for name, value in given.items()
        if name not in FREE_FLAGS and value not in (saved[name], "auto")
    ]
    if differs:
        asked = ", ".join(f"--{name} {given[name]}" for name in differs)
        has = ", ".join(f"--{name} {saved[name]}" for name in differs)
        raise ValueError(f"{asked} contradicts the run in {folder}, which has {has}")
    free = {name: given[name] for name in FREE_FLAGS if name in given}
    return TrainConfig(**{**saved, "fsdp": False, "verbose": False, **free, "out_dir": str(folder)})


def check_flags(settings, values, path):
    for name, value, expected in problems(settings, values):
        raise ValueError(f"{path}: {name} is {checkpoint.show(value)}; expected {expected}")


def check_free(folder):
    if any((folder / name).exists() for name in FILES):
        raise ValueError(
            f"{folder} already holds a run; --resume goes on with it, --out_dir FOLDER starts "
            "another"
        )


def run_name(given):
    """A folder name made of what the flags say: toy-safedpo-delta5, toy-safedpo-delta5-lr0.001, …

    A flag that gives a default says nothing.
    """
    config, default = TrainConfig(**given), TrainConfig()
    unnamed = ("data", "pairs", "delta", "out_dir", "resume", "verbose")
    delta = DELTA[config.pairs] if config.delta is None else config.delta
    name = f"{config.data}-{config.pairs}" + (
        f"-delta{delta:g}" if delta or DELTA[config.pairs] else ""
    )
    for flag in sorted(given):
        if flag not in unnamed and given[flag] != getattr(default, flag):
            name += f"-{flag}{given[flag]}"
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("_.")
    if len(plain.encode()) <= 120:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return plain.encode()[:100].decode(errors="ignore") + "-" + digest


class Done(NamedTuple):
    """What is trained already when a run begins or goes on."""

    has_reference: bool  # in its own folder
    has_policy: bool
    borrowed: Path | None  # the reference of another run with the same settings and data
    reference: Path | None  # its own, else the borrowed one


def done_before(config, digest, folder):
    """Done. ValueError if a resumed run's data have changed since it began."""
    own, borrowed = folder / "reference.pt", borrowed_reference(config, digest, folder)
    has_reference, has_policy = own.exists(), (folder / "policy.pt").exists()
    return Done(has_reference, has_policy, borrowed, own if has_reference else borrowed)


def borrowed_reference(config, digest, folder):
    """The reference.pt of another run, or None. A resumed run stays with what it chose at first."""
    if config.resume:
        saved = checkpoint.read_json(folder / "config.json")
        if saved["data_sha256"] != digest:
            raise ValueError(
                f"{config.data} has changed since the run in {folder} began; "
                "--out_dir FOLDER starts another"
            )
        return Path(saved["reference"]) if saved["reference"] else None
    if config.init_from:
        return None  # what lies there may have changed
    for path in sorted(folder.parent.glob("*/config.json")):
        try:
            other = checkpoint.read_json(path)
        except (ValueError, OSError):
            continue  # somebody else's folder
        same = all(other.get(name) == getattr(config, name) for name in REFERENCE_FLAGS)
        reference = path.parent / "reference.pt"
        if same and other.get("data_sha256") == digest and reference.exists():
            return reference
    return None


@contextmanager
def claim(folder, config):
    """`with claim(folder, config) as lock:` Of several processes one works in a folder.

    A resumed run's folder is locked at once, a new one by lock(). What ends a run early says how it
    goes on.
    """
    with ExitStack() as locks:

        def lock():
            locks.enter_context(checkpoint.alone(folder))

        if config.resume:
            lock()
        try:
            yield lock
        except (KeyboardInterrupt, OSError) as e:
            if not os.path.exists(folder / "config.json"):
                raise
            command = f"python train.py --resume --out_dir {shlex.quote(str(folder))}"
            if config.loss not in LOSSES:
                command = "the same command with --resume"  # not train.py's
            message = f"{e}; " if str(e) else ""
            raise type(e)(f"{message}to go on: {command}") from e


def begin(folder, config, digest, reference, lock):
    """Create the folder and its config.json. Whatever can be refused has been refused by now."""
    parallel.barrier()  # every process has looked at the folder
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        lock()
    if parallel.rank():
        return
    if not config.resume:
        check_free(folder)  # still
    state = {**asdict(config), "data_sha256": digest, "reference": reference and str(reference)}
    with checkpoint.replacing(folder / "config.json") as f:
        json.dump(state, f, indent=1)


def end(folder):
    """Training is done: the training state goes, and the memory that the model took."""
    parallel.barrier()  # process 0 has written the policy
    gc.collect()  # a model is part of circles, so that `del` alone frees nothing
    give_back(most_free=0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not parallel.rank():
        for name in ("state.pt", "state.previous.pt"):
            (folder / name).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# After training: figures


def finished_run(folder):
    """The flags of the run in folder. ValueError if it holds no finished run."""
    folder, number = Path(folder), (int, float)
    for name in ("config.json", "reference.pt", "policy.pt"):
        if not (folder / name).exists():
            raise ValueError(
                f"{folder}: holds no finished run ({name} is missing); expected a folder that "
                "train.py wrote; train.py --resume goes on with a stopped run"
            )
    path = folder / "config.json"
    expected = {"data": str, "pairs": str, "beta": number, "delta": number}
    config = checkpoint.read_json(path, {**expected, **dict.fromkeys(EVAL_FLAGS, number)})
    check_flags(Settings, config, path)
    return config


def settings_of(flags, given):
    """The settings of an evaluation: those given, else those of the run with these flags. The type
    of its numbers is the run's on the same kind of device; elsewhere there may be a better one."""
    own = {name: flags[name] for name in EVAL_FLAGS}
    if flags["device"].split(":")[0] == pick_device(given.get("device", "auto")).type:
        own["dtype"] = flags["dtype"]
    return EvalConfig(**own | given)


def result_files(folder, settings):
    """(figures, answers): eval.json and samples.jsonl in folder. What differs from the run's own
    settings stands in the name, as in eval-splitunseen.json."""
    own = {**finished_run(folder), "split": "test"}
    names = [name for name in (*EVAL_FLAGS, "data", "split") if settings[name] != own[name]]
    suffix = "".join(f"-{name}{Path(str(settings[name])).name}" for name in names)
    return Path(folder) / f"eval{suffix}.json", Path(folder) / f"samples{suffix}.jsonl"


def earlier_result(folder, description):
    """What the folder holds of the same description, or None."""
    path, _ = result_files(folder, description["settings"])
    if path.exists():
        with suppress(ValueError):  # what cannot be read is made anew
            expected = {**dict.fromkeys(MODELS, dict), "optimum": (dict, type(None))}
            earlier = checkpoint.read_json(path, expected)
            if {name: earlier.get(name) for name in description} == description:
                return earlier
    return None


def save_result(folder, result, rows):
    if parallel.rank():
        return
    figures, samples = result_files(folder, result["settings"])
    with checkpoint.replacing(samples) as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with checkpoint.replacing(figures) as f:
        json.dump(result, f, indent=1)
