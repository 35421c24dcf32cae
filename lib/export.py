"""A run's policy as a Hugging Face folder, and what that folder keeps of what was learned; or its
adapters alone, as PEFT keeps them."""

from pathlib import Path

from lib import hf_adapter, lora, pretrained
from lib.policy import load_model, log_probs

from safedpo import implicit_reward

MOST_LOST = 0.05  # of the margin, for a type that is narrower than float32


def export(folder, target, dtype, held_out, beta, device):
    """Write the policy of the run in folder to target, a new folder, and say what it is.

    held_out: a function of a tokenizer that gives the run's held-out pairs as log_probs takes them.
    In a type that is narrower than float32 small updates are lost to rounding: with dtype "auto"
    the type in which the model came is taken only where the margin on these pairs stays, measured
    on the folder that was written. Adapters are added to the weights that they stand beside. There
    is one model in memory at a time.
    """
    folder, target = Path(folder), Path(target)
    with pretrained.new_folder(target) as part:
        policy = load_policy(folder, device)
        tokenizer = policy[1]
        wanted = [pretrained.dtype_of(tokenizer), "float32"] if dtype == "auto" else [dtype]
        try:
            pairs = held_out(tokenizer)
            if not len(pairs):
                raise ValueError("the test split's first rows are no pairs, or T drops them")
        except (ValueError, OSError) as e:
            pairs, policy, wanted = None, None, wanted[-1:]
            print(f"not measured on held-out pairs: {e}")
        else:
            logps, policy = logps_of(policy, pairs, device), None
            reference = logps_of(load_model(folder / "reference.pt", device), pairs, device)
            margin = margin_of(logps, reference, beta)
        for dtype in wanted:
            pretrained.export(*load_policy(folder, device), part, dtype)
            if pairs is None:
                break
            written = pretrained.load(part, None, 0, device, tokenizer.date)
            kept = margin_of(logps_of(written, pairs, device), reference, beta)
            del written
            if dtype == wanted[-1] or abs(kept - margin) <= MOST_LOST * abs(margin):
                break
            print(
                f"{dtype}, in which the model came, would turn a margin of {margin:.4g} into "
                f"{kept:.4g}"
            )
    said = f"{target}: the policy of {folder} in {dtype}"
    if pairs is not None:
        said += (
            f", with a margin of {kept:.4g} on {len(pairs)} held-out pairs; in the run it is "
            f"{margin:.4g}"
        )
    print(said)


def load_policy(folder, device):
    """(model in float32, adapters added to the weights that they stand beside; its tokenizer)."""
    model, tokenizer = load_model(folder / "policy.pt", device)
    lora.merge(model)
    return model, tokenizer


def logps_of(policy, pairs, device):
    """(n, 2) log-probs of the pairs' winners and losers under (model, its tokenizer)."""
    return log_probs(policy[0], pairs, device, "float32")


def margin_of(logps, reference, beta):
    """The mean difference of the winners' and losers' implicit rewards."""
    chosen, rejected = implicit_reward(logps, reference, beta).T
    return (chosen - rejected).mean().item()


def export_adapter(folder, target):
    """Write the adapters of the run's policy to target, a new folder, as PEFT keeps them."""
    folder, target = Path(folder), Path(target)
    model, _ = load_model(folder / "policy.pt", "cpu")
    if not model.adapters:
        raise ValueError(
            f"{folder}: the whole model was trained, and there are no adapters; --export writes it"
        )
    with pretrained.new_folder(target) as part:
        hf_adapter.export(model, part)
    print(
        f"{target}: the adapters of {folder}, of rank {model.adapters['rank']}, which belong to "
        f"{model.adapters['base']}"
    )
