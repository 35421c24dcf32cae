"""What a user watches while a run trains: some prompts answered now and then (--sample_every), a
picture of its curves, and its numbers in TensorBoard or Weights & Biases (--log).
"""

import importlib.util
import os
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from lib import parallel, report
from lib.chat import as_json
from lib.policy import sample_answers

import torch
from tqdm import tqdm

PROMPTS = 3  # that are answered
TOKENS = 64  # of such an answer, at most
SECONDS = 60  # between two pictures
WANDB_MODES = ("offline", "online", "disabled")


class Watch:
    """prompts: {prompt: its token ids} of the test split."""

    def __init__(self, config, prompts, tokenizer):
        self.config, self.folder, self.tokenizer = config, Path(config.out_dir), tokenizer
        self.questions = dict(list(prompts.items())[:PROMPTS])
        self.drawn_at = time.monotonic()

    def after_step(self, stage, step, model):
        """Print samples and draw the curves, if it is time. Each process must call."""
        if self.config.sample_every and step % self.config.sample_every == 0:
            self.print_samples(stage, step, model)
        is_due = stage == "safedpo" and time.monotonic() > self.drawn_at + SECONDS
        if is_due and not parallel.rank():
            report.draw_curves(self.folder)
            self.drawn_at = time.monotonic()

    def print_samples(self, stage, step, model):
        """What the model in training says to the first prompts of the test split."""
        most = min(TOKENS, self.config.max_new_tokens)
        settings = replace(self.config, max_new_tokens=most)
        how = settings, torch.device(self.config.device), self.config.dtype
        questions = list(self.questions.values())
        with torch.compiler.set_stance("force_eager"):  # a graph for so few rows would not pay
            said = sample_answers(parallel.bare(model), questions, self.tokenizer.ends, *how)
        texts = [self.tokenizer.decode(y) for y in said]
        if not parallel.rank():
            pairs = zip(map(as_json, self.questions), texts)
            shown = "".join(report.side_by_side(x, {stage: text}) for x, text in pairs)
            tqdm.write(f"\n{stage} step {step}:{shown}\n")

    @contextmanager
    def tracker(self, stage, first_step):
        """`with watch.tracker(…) as log:` log(step, metrics) writes a step's numbers. A stage is a
        run of its own there. Names are TRL's: "train/loss", "train/rewards/margins", …"""
        if self.config.log == "none" or parallel.rank():
            yield lambda step, metrics: None
        elif self.config.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            place = self.folder / "tensorboard" / stage
            with SummaryWriter(place, purge_step=first_step + 1) as writer:

                def log(step, metrics):
                    for name, value in metrics.items():
                        writer.add_scalar(f"train/{name}", value, step)

                yield log
        else:
            with self.wandb_run(stage) as run:
                run.define_metric("*", step_metric="train/global_step")
                yield lambda step, metrics: run.log(
                    {f"train/{name}": value for name, value in metrics.items()}
                    | {"train/global_step": step}
                )

    def wandb_run(self, stage):
        """A run in Weights & Biases, of the group that has the folder's name."""
        import wandb

        group = self.folder.name
        names = dict(project="safedpo", group=group, name=f"{group}-{stage}", dir=self.folder)
        try:
            return wandb.init(**names, config=asdict(self.config), mode=wandb_mode())
        except wandb.errors.Error as e:
            reason = str(e).partition("\n")[0]
            raise ConnectionError(f"--log wandb: {reason}; WANDB_MODE=offline needs no account")


def check(log):
    """ValueError where --log cannot do its work."""
    found = importlib.util.find_spec(log) if log != "none" else None
    if log != "none" and (found is None or found.origin is None):  # a folder of that name
        raise ValueError(f"--log {log} needs {log}: pip install {log}")
    if log == "wandb" and wandb_mode() not in WANDB_MODES:
        modes = ", ".join(WANDB_MODES)
        raise ValueError(f"WANDB_MODE is {wandb_mode()!r}; expected one of {modes}")


def wandb_mode():
    return os.environ.get("WANDB_MODE") or "offline"
