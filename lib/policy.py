"""A model with its tokenizer: from nothing, a checkpoint of ours or a Hugging Face folder; what it
makes of answers (log-probabilities), and its own answers (samples)."""

from dataclasses import asdict
from pathlib import Path

from lib import checkpoint, hub, parallel, pretrained
from lib.device import autocast
from lib.sampling import generate
from lib.settings import SIZE_FLAGS
from lib.tokenizer import Tokenizer

import torch

from model import ModelConfig, Transformer, move, pack_rows

ROWS_AT_ONCE = 64  # rows in one forward pass
SAMPLES_AT_ONCE = 256  # prompts in one batch of samples


# --------------------------------------------------------------------------------------------------
# Files


def load_model(path, device):
    """(model in eval mode, its tokenizer) from a checkpoint that train.py saved."""
    state = checkpoint.load(path)
    if not isinstance(state, dict) or not {"config", "model", "tokenizer"} <= state.keys():
        raise ValueError(f"{path}: holds no model; expected a run's reference.pt or policy.pt")
    try:
        with torch.device("meta"):  # no second copy of the weights
            model = Transformer(ModelConfig(**state["config"]))
        tokenizer = Tokenizer(**state["tokenizer"])
        model.load_state_dict(state["model"], assign=True)
        model.tie()
    except Exception as e:  # the tokenizer's library raises nothing more specific
        raise ValueError(f"{path}: holds no model of ours ({str(e).splitlines()[0]})")
    return model.to(device).eval(), tokenizer


def save_model(path, model, tokenizer):
    """Write a checkpoint. FloatingPointError if a weight is no number: the last good one stays."""
    weights = parallel.model_state(model)
    if name := first_not_finite(weights):
        raise FloatingPointError(
            f"{path}: {name} holds weights that are no numbers; "
            "a smaller learning rate or Δ/β helps"
        )
    config = asdict(parallel.bare(model).config)
    checkpoint.save(path, {"config": config, "model": weights, "tokenizer": tokenizer.state()})


def first_not_finite(weights):
    """The name of the first of {name: weight} with an infinity or a NaN in it, or None."""
    return next((name for name, weight in weights.items() if not weight.isfinite().all()), None)


# --------------------------------------------------------------------------------------------------
# Where a run starts


def starting_model(config, records, reference, device):
    """(model, tokenizer, whether it is the reference already).

    reference: the file of a reference that is trained already, or None. Without one the model comes
    from --init_from, or is new, and its tokenizer is trained on the records.
    """
    if reference:
        earlier = reference.parent != Path(config.out_dir)
        print(f"reference: {reference}" + ", trained earlier with the same settings" * earlier)
        return *load_model(reference, device), True
    if config.init_from:
        print(f"{'start' if config.sft_epochs else 'reference'}: {config.init_from}")
        return *initial_model(config, device), not config.sft_epochs
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.train(records, config.vocab_size, config.prompt_template)
    sizes = {name: getattr(config, name) for name in SIZE_FLAGS}
    sizes["vocab_size"] = tokenizer.vocab_size
    return Transformer(ModelConfig(**sizes)).to(device), tokenizer, False


def initial_model(config, device):
    """(model, tokenizer) of --init_from."""
    source, template = hub.model_path(config.init_from), config.prompt_template
    if not source.exists():
        raise ValueError(
            f"--init_from {source}: no such file or folder; it takes these, or OWNER/NAME on the "
            "Hugging Face hub"
        )
    is_ours = (source / "policy.pt").exists() or source.is_file()
    if not is_ours and not (source / "config.json").exists():
        raise ValueError(
            f"--init_from {source}: no policy.pt and no config.json; "
            "expected a run of ours or a Hugging Face model"
        )
    if is_ours and template is not None:
        raise ValueError(
            f"--prompt_template {template}: {source} is a checkpoint of ours, which has its own; "
            "leave the flag out"
        )
    if is_ours:
        return load_model(source / "policy.pt" if source.is_dir() else source, device)
    longest = config.max_length + config.max_new_tokens
    return pretrained.load(source, template, longest, device, config.date)


# --------------------------------------------------------------------------------------------------
# What a model says


@torch.no_grad()
def log_probs(model, examples, device, dtype, rows_at_once=ROWS_AT_ONCE, title=None):
    """log π(y | x) in nats of [(x, [y, …]), …], each x with as many y: (n, answers) float32, CPU.

    Several processes share the work, and each must call.
    """
    lengths = [len(x) + max(map(len, answers)) for x, answers in examples]
    order = sorted(range(len(examples)), key=lengths.__getitem__)
    batches = [order[i : i + rows_at_once] for i in range(0, len(order), rows_at_once)]
    result = torch.zeros(len(examples), len(examples[0][1]), device=device)
    for first in parallel.progress(range(0, len(batches), parallel.size()), title):
        mine = first + parallel.rank()
        batch = batches[min(mine, len(batches) - 1)]  # FSDP: every process in every forward pass
        with autocast(device, dtype):
            logps = model(move(pack_rows([examples[i] for i in batch]), device))
        if mine < len(batches):
            result[batch] = logps.view(len(batch), -1)
    parallel.end_inference(model)
    return parallel.total(result).cpu()


def sample_answers(model, prompts, ends, settings, device, dtype, title=None):
    """One answer (token ids) per prompt (token ids)."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generator = torch.Generator(device).manual_seed(settings.seed)
    how = settings.temperature, settings.top_p, generator, settings.top_k, settings.sample_length
    answers = [None] * len(prompts)
    for start in parallel.progress(range(0, len(order), SAMPLES_AT_ONCE), title):
        batch = order[start : start + SAMPLES_AT_ONCE]
        texts = [prompts[i] for i in batch]
        with autocast(device, dtype):
            sampled = generate(model, texts, settings.max_new_tokens, ends, *how)
        for i, y in zip(batch, sampled):
            answers[i] = y
    return answers
