"""A model with its tokenizer: saved and loaded, the log-probabilities that it gives to answers, and
answers sampled from it. Several processes share the last two.
"""

import hashlib
from dataclasses import asdict

from lib import checkpoint, hub, lora, parallel, pretrained
from lib.device import autocast, give_back, use_cpu
from lib.hf_weights import hold
from lib.sampling import generate
from lib.tokenizer import Tokenizer

import torch

from model import ModelConfig, Transformer, move, pack_rows

SLOTS_AT_ONCE = 2**12  # answers · tokens of the longest in one forward pass without a gradient
SAMPLES_AT_ONCE = 256  # prompts in one batch of samples
KEYS_AT_ONCE = 2**30  # bytes of their keys and values


# --------------------------------------------------------------------------------------------------
# Files


def load_model(path, device, dtype="float32"):
    """(model in eval mode, its tokenizer) from a checkpoint that train.py saved.

    dtype: of the matrices, by name; but adapters are float32. Where the checkpoint holds adapters
    the base is read from where it lies. ValueError if it is not the one with which they learned.
    """
    model, tokenizer = read_model(path, device)
    return for_inference(model, device, dtype), tokenizer


def for_inference(model, device, dtype):
    """The model in eval mode on the device, its matrices in dtype, but adapters in float32."""
    if torch.device(device).type == "cpu":
        use_cpu(model)
    model = hold(model, getattr(torch, dtype)).to(device).eval()
    give_back(most_free=0)  # what an earlier model took, or this one's wider type
    return model


def read_model(path, device):
    """(model, its tokenizer) of a checkpoint, each matrix in the type in which it was trained."""
    state = checkpoint.load(path, mapped=torch.device(device).type != "cpu")
    if not {"config", "model", "tokenizer"} <= state.keys():
        raise ValueError(f"{path}: holds no model; expected a run's reference.pt or policy.pt")
    about = state.get("adapters")
    try:
        with torch.device("meta"):  # no second copy of the weights
            model = Transformer(ModelConfig(**state["config"]))
        tokenizer = Tokenizer(**state["tokenizer"])
        if about is None:
            model.load_state_dict(state["model"], assign=True)
            model.tie()
    except Exception as e:  # the tokenizer's library raises nothing more specific
        raise ValueError(f"{path}: holds no model of ours ({str(e).splitlines()[0]})")
    if about is None:
        return model.to(device), tokenizer
    try:
        model = read_base(about["base"], tokenizer, about["base_dtype"], device)
    except (ValueError, OSError) as e:
        raise ValueError(f"{path}: holds adapters of {about['base']}, which cannot be read: {e}")
    if about["base_sha256"] != (found := digest(model)):
        raise ValueError(
            f"{path}: its adapters belong to {about['base']} as it was (sha256 "
            f"{about['base_sha256'][:8]}…), and that has changed ({found[:8]}…); expected the same "
            "weights there"
        )
    put_adapters(model, about, seed=0)
    try:
        missing, unexpected = model.load_state_dict(state["model"], strict=False)
    except RuntimeError as e:
        raise ValueError(f"{path}: holds no adapters of ours ({str(e).splitlines()[0]})")
    if unexpected or any("lora_" in name for name in missing):
        raise ValueError(f"{path}: holds no adapters of ours; expected a run's policy.pt")
    return model, tokenizer


def save_model(path, model, tokenizer):
    """Write a checkpoint: the weights that learned. FloatingPointError if a weight is no number:
    the last good one stays."""
    weights = parallel.model_state(model)
    if name := first_not_finite(weights):
        raise FloatingPointError(
            f"{path}: {name} holds weights that are no numbers; "
            "a smaller learning rate or Δ/β helps"
        )
    model = parallel.bare(model)
    state = {"config": asdict(model.config), "model": weights, "tokenizer": tokenizer.state()}
    checkpoint.save(path, {**state, "adapters": model.adapters})


def first_not_finite(weights):
    """The name of the first of {name: weight} with an infinity or a NaN in it, or None."""
    return next((name for name, weight in weights.items() if not weight.isfinite().all()), None)


# --------------------------------------------------------------------------------------------------
# Adapters and their base


def put_adapters(model, about, seed):
    """Put adapters on the model. about: {"rank", "alpha", "base", "base_dtype", "base_sha256"}."""
    if model.adapters:
        raise ValueError(
            f"{about['base']}: has adapters itself; expected a whole model as the base of others "
            "(--export makes one of it)"
        )
    lora.add(model, about["rank"], about["alpha"], seed)
    model.adapters = about


def read_base(name, tokenizer, base_dtype, device):
    """The model of a folder or checkpoint, without adapters; its tokenizer is known already."""
    source = hub.model_path(name)
    if not source.exists():
        raise ValueError("no such file or folder; expected it where it was")
    if (file := our_checkpoint(source)) is None:
        return pretrained.load_model(source, tokenizer, 0, device, base_dtype)[0]
    model, _ = read_model(file, device)
    return hold(model, torch.bfloat16 if base_dtype == "bfloat16" else torch.float32)


def our_checkpoint(source):
    """The file of ours that a path means, or None."""
    if (source / "policy.pt").exists():
        return source / "policy.pt"
    return source if source.is_file() else None


def digest(model):
    """The sha256 of all weights, in the type in which they are held."""
    sha = hashlib.sha256()
    for name, weight in model.named_parameters():
        sha.update(name.encode())
        sha.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


# --------------------------------------------------------------------------------------------------
# What a model says


@torch.no_grad()
def log_probs(model, examples, device, dtype, title=None):
    """log π(y | x) in nats of [(x, [y, …]), …], each x with as many y: (n, answers) float32, CPU.

    Several processes share the work, and each must call.
    """
    if not len(examples):
        return torch.zeros(0, 0)
    result = torch.zeros(len(examples), len(examples[0][1]), device=device)
    slots = [len(answers) * (len(x) + max(map(len, answers))) for x, answers in examples]
    # longest first: what does not fit into memory is met at once
    order = sorted(range(len(examples)), key=slots.__getitem__, reverse=True)
    batches = []
    while order:
        n = max(1, SLOTS_AT_ONCE // slots[order[0]])
        batches.append(order[:n])
        order = order[n:]
    for first in parallel.progress(range(0, len(batches), parallel.size()), title):
        mine = first + parallel.rank()
        batch = batches[min(mine, len(batches) - 1)]  # FSDP: every process in every forward pass
        with autocast(device, dtype):
            logps = model(move(pack_rows([examples[i] for i in batch]), device))
        if mine < len(batches):
            result[batch] = logps.view(len(batch), -1)
        give_back()
    parallel.end_inference(model)
    return parallel.total(result).cpu()


def sample_answers(model, prompts, ends, settings, device, dtype, title=None):
    """One answer (token ids) per prompt (token ids).

    Several processes share the work, and each must call. Neither their number nor the other
    prompts' answers change an answer: each has its own random numbers.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    uniforms = torch.rand(len(prompts), settings.max_new_tokens, generator=generator)
    answers = torch.zeros(uniforms.shape, dtype=torch.int64, device=device)  # 0: none; id + 1
    batches = list(sample_batches(model, prompts, settings.max_new_tokens))
    for batch in parallel.progress(batches[parallel.rank() :: parallel.size()], title):
        with autocast(device, dtype):
            sampled = generate(
                model,
                [prompts[i] for i in batch],
                settings.max_new_tokens,
                ends,
                settings.temperature,
                settings.top_p,
                uniforms[batch],
                settings.top_k,
                settings.sample_length,
            )
        for i, y in zip(batch, sampled):
            answers[i, : len(y)] = torch.tensor(y, device=device) + 1
        give_back()
    return [[id - 1 for id in y if id] for y in parallel.total(answers).tolist()]


def sample_batches(model, prompts, max_new_tokens):
    """Which prompts are answered together, longest first: at most SAMPLES_AT_ONCE, whose keys and
    values have at most KEYS_AT_ONCE bytes."""
    c, weight = model.config, model.blocks[0].attention.qkv.weight
    of_token = 2 * c.n_layer * c.n_kv_head * c.d_head * weight.element_size()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    while order:
        columns = len(prompts[order[0]]) + max_new_tokens
        n = max(1, min(SAMPLES_AT_ONCE, KEYS_AT_ONCE // (of_token * columns)))
        yield order[:n]
        order = order[n:]
