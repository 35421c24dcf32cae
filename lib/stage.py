"""One stage of training ("sft" or "safedpo") in a run's folder: the step at which it goes on, its
lines in metrics.jsonl, its progress bar, its saved state, and its end when it is told to stop.

The step is the data cursor. Beside model, optimizer and scaler nothing has a state.
"""

import json
import math
import os
import signal
import time
from contextlib import ExitStack, contextmanager

from lib import checkpoint, parallel
from lib.device import give_back
from lib.policy import first_not_finite

from tqdm import tqdm

SAVE_SECONDS = 900  # a state is saved at least this often, if a step is not longer


class Stage:
    """`with Stage(…) as stage:` around the loop over the steps from stage.first_step on.

    Each pass of the loop ends in stage.finish_step. SIGINT and SIGTERM let a step finish and are
    obeyed there: the state is saved, and KeyboardInterrupt says where. watch: a Watch, which shows
    the user what happens.
    """

    def __init__(self, name, folder, model, optimizer, scaler, steps, save_every, watch):
        self.name, self.steps, self.save_every, self.watch = name, steps, save_every, watch
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self.state_file, self.log_file = folder / "state.pt", folder / "metrics.jsonl"
        self.first_step = self.saved_step = self.steps_done = self.restore()
        self.saved_at, self.began_at = time.monotonic(), time.perf_counter()
        self.tokens = 0  # since then

    def __enter__(self):
        writes = not parallel.rank()  # one process talks
        with ExitStack() as stack:
            path = self.log_file if writes else os.devnull
            self.log = stack.enter_context(open(path, "a", encoding="utf-8"))
            bar = tqdm(
                total=self.steps, initial=self.first_step, desc=self.name, disable=not writes
            )
            self.bar = stack.enter_context(bar)
            self.track = stack.enter_context(self.watch.tracker(self.name, self.first_step))
            self.signals = stack.enter_context(stop_signals())
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace):
        self.stack.close()
        if isinstance(error, FloatingPointError):
            raise FloatingPointError(
                f"{self.name} step {self.steps_done + 1}: {error}; {self.last_saved()}; "
                "a smaller learning rate or Δ/β helps"
            ) from error

    def finish_step(self, metrics, tokens):
        """Write the step's line; save the state if that is due; end if a signal came.

        tokens: how many this process computed in the step.
        """
        step = self.steps_done + 1
        line = {"stage": self.name, "step": step, **metrics}
        self.log.write(json.dumps({name: finite(value) for name, value in line.items()}) + "\n")
        self.log.flush()
        self.track(step, metrics)
        shown = {
            "loss": metrics["loss"],
            "margin": metrics.get("rewards/margins"),
            "accuracy": metrics.get("rewards/accuracies"),
        }
        shown = {name: f"{value:.3f}" for name, value in shown.items() if value is not None}
        self.tokens += tokens * parallel.size()
        shown["tokens/s"] = f"{self.tokens / (time.perf_counter() - self.began_at):.0f}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        device = next(self.model.parameters()).device
        is_late = not parallel.rank() and time.monotonic() > self.saved_at + SAVE_SECONDS
        must_stop, is_late = parallel.any_process((self.signals, is_late), device)
        if must_stop or is_late or step % self.save_every == 0:
            if not parallel.rank():
                os.fsync(self.log.fileno())
            self.save(step)
        self.steps_done = step
        if not must_stop:
            began = time.perf_counter()
            self.watch.after_step(self.name, step, self.model)
            self.began_at += time.perf_counter() - began
        give_back()
        if must_stop:
            raise KeyboardInterrupt(self.last_saved())

    def last_saved(self):
        if not self.saved_step:
            return "no step was saved yet"
        return f"step {self.saved_step} was saved, in {self.state_file}"

    def save(self, step):
        """Save what a resumed run goes on from."""
        weights, moments = parallel.training_state(self.model, self.optimizer)
        if name := first_not_finite(weights):
            raise FloatingPointError(f"{name} holds weights that are no numbers")
        state = {"model": weights, "optimizer": moments, "scaler": self.scaler.state_dict()}
        state |= {"stage": self.name, "step": step, "adapters": parallel.bare(self.model).adapters}
        checkpoint.save(self.state_file, state, keep=True)
        self.saved_step, self.saved_at = step, time.monotonic()

    def restore(self):
        """The step at which the stage goes on: 0, or where the folder's state was saved."""
        step = 0
        state = checkpoint.load_last(self.state_file)
        if state.get("stage") == self.name:
            try:
                step = state["step"]
                if state.get("adapters") != parallel.bare(self.model).adapters:
                    raise ValueError("its adapters have another base")
                weights, moments = state["model"], state["optimizer"]
                parallel.load_training_state(self.model, self.optimizer, weights, moments)
                self.scaler.load_state_dict(state["scaler"])
            except Exception as e:  # another program's, or another model's
                reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"
                raise ValueError(
                    f"{self.state_file}: does not fit the run ({reason}); "
                    f"without it {self.name} begins anew"
                )
        if self.log_file.exists() and not parallel.rank():
            self.remove_lines_after(step)
        return step

    def remove_lines_after(self, step):
        """Metrics of this stage's steps that were not saved: they will be taken again."""
        with open(self.log_file, "rb") as f:
            lines = [line for line in f if line.endswith(b"\n")]
        with checkpoint.replacing(self.log_file, "wb") as f:
            for number, line in enumerate(lines, 1):
                row = checkpoint.parse_json(line, f"{self.log_file}:{number}")
                if row.get("stage") != self.name or row.get("step") in range(step + 1):
                    f.write(line)


def finite(value):
    """JSON has no infinity and no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def stop_signals():
    """`with stop_signals() as came:` lists SIGINT and SIGTERM in came and lets the work go on.

    The second one interrupts at once.
    """
    came, kinds = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        came.append(number)
        for kind in kinds:
            signal.signal(kind, signal.default_int_handler)

    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
