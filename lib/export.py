"""A run's policy as a Hugging Face folder, and what that folder keeps of what was learned."""

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
    with pretrained.new_folder(target) as part:
        policy = load_model(folder / "policy.pt", device)
        reference = load_model(folder / "reference.pt", device)
        wanted = [pretrained.dtype_of(policy[1]), "float32"] if dtype == "auto" else [dtype]
        try:
            reference = logps_of(*reference, held_out, device)
            margin = margin_of(logps_of(*policy, held_out, device), reference, beta)
        except (ValueError, OSError) as e:
            margin, wanted = None, wanted[-1:]
            print(f"not measured on held-out pairs: {e}")
        for dtype in wanted:
            pretrained.export(*policy, part, dtype)
            if margin is None:
                break
            written = pretrained.load(part, None, 0, device, policy[1].date)
            kept = margin_of(logps_of(*written, held_out, device), reference, beta)
            if dtype == wanted[-1] or abs(kept - margin) <= MOST_LOST * abs(margin):
                break
            print(
                f"{dtype}, in which the model came, would turn a margin of {margin:.4g} into "
                f"{kept:.4g}"
            )
    said = f"{target}: the policy of {folder} in {dtype}"
    if margin is not None:
        said += (
            f", with a margin of {kept:.4g} on {len(reference)} held-out pairs; in the run it is "
            f"{margin:.4g}"
        )
    print(said)


def logps_of(model, tokenizer, held_out, device):
    """(n, 2) log-probs of the held-out pairs' winners and losers. ValueError if there is none."""
    pairs = held_out(tokenizer)
    if not len(pairs):
        raise ValueError("T drops the test split's first rows")
    return log_probs(model, pairs, device, "float32")


def margin_of(logps, reference, beta):
    """The mean difference of the winners' and losers' implicit rewards."""
    chosen, rejected = implicit_reward(logps, reference, beta).T
    return (chosen - rejected).mean().item()
