"""A run's policy as a Hugging Face folder, and what that folder keeps of what was learned."""

import shutil
from pathlib import Path

from lib import pretrained
from lib.policy import load_model, log_probs

from safedpo import implicit_reward

MOST_LOST = 0.05  # of the margin, for a type that is narrower than float32


def export(folder, target, dtype, held_out, beta, device):
    """Write the policy of the run in folder to target, a new folder, and say what it is.

    held_out: a function of a tokenizer that gives the run's held-out pairs as log_probs takes them.
    In a type that is narrower than float32 small updates are lost to rounding: with dtype "auto"
    the type in which the model came is taken only where the margin on these pairs stays, measured
    on the folder that was written.
    """
    folder, target = Path(folder), Path(target)
    pretrained.check_new(target)
    policy = load_model(folder / "policy.pt", device)
    dtypes = [pretrained.dtype_of(policy[1]), "float32"] if dtype == "auto" else [dtype]
    reference = logps_of(*load_model(folder / "reference.pt", device), held_out, device)
    margin = margin_of(logps_of(*policy, held_out, device), reference, beta)
    if margin is None:
        pretrained.export(*policy, target, dtypes[-1])
        print(
            f"{target}: the policy of {folder} in {dtypes[-1]}; no held-out pair to measure it on"
        )
        return
    for dtype in dtypes:
        pretrained.export(*policy, target, dtype)
        written = pretrained.load(target, None, 0, device, policy[1].date)
        kept = margin_of(logps_of(*written, held_out, device), reference, beta)
        if dtype == dtypes[-1] or abs(kept - margin) <= MOST_LOST * abs(margin):
            break
        shutil.rmtree(target)
        print(
            f"{dtype}, in which the model came, would turn a margin of {margin:.4g} into {kept:.4g}"
        )
    print(
        f"{target}: the policy of {folder} in {dtype}, with a margin of {kept:.4g} on "
        f"{len(reference)} held-out pairs; in the run it is {margin:.4g}"
    )


def logps_of(model, tokenizer, held_out, device):
    """(n, 2) log-probs of the held-out pairs' winners and losers."""
    pairs = held_out(tokenizer)
    return log_probs(model, pairs, device, "float32") if len(pairs) else None


def margin_of(logps, reference, beta):
    """The mean difference of the winners' and losers' implicit rewards, or None."""
    if reference is None:
        return None
    chosen, rejected = implicit_reward(logps, reference, beta).T
    return (chosen - rejected).mean().item()
