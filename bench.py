"""Speed and memory of train.py's own step, and of sampling: on random tokens with the lengths of
PKU-SafeRLHF, or on your model and your pairs.

    python bench.py --dtype bfloat16          one epoch, and the pass under the reference before it
    python bench.py --init_from Qwen/Qwen2.5-1.5B-Instruct --data my_pairs --lora_rank 16
                                              the same with your model, your pairs, and adapters
    python bench.py --vs trl                  in turns with TRL's DPOTrainer, on the same pairs
    python bench.py --sampling --vs transformers
                                              sampled answers, in turns with transformers' generate
    python bench.py --table                   how cost grows with pairs, lengths, vocabulary, layers
    python bench.py --memory --init_from Qwen/Qwen2.5-1.5B-Instruct --lora_rank 16
                                              what a run would need of memory; nothing is trained

Every measurement is a process of its own. The peers' settings are in lib/peers.py. "MFU" is model
FLOPs utilization: the share of the device's own rate of large matrix products, measured between the
steps. The work that is counted is what the algorithm needs: no padding, and nothing twice.
"""

import functools
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import ClassVar
from unittest import mock

from lib import initial, lora, memory, peers, policy
from lib.device import autocast, clock, give_back, pick_device, prepare, settle, tune_cpu
from lib.flags import flag, like, parse, run
from lib.settings import SIZE_FLAGS, TrainConfig, usual_alpha

import numpy as np
import torch
from torch.distributed import is_torchelastic_launched

import data
import train
from model import ModelConfig, Transformer
from safedpo import Pair

WARM_UP = 2  # steps that are not timed
# each times 1, 2 and 4
TABLE = ("batch_size", "prompt_tokens", "answer_tokens", "vocab_size", "n_layer")
BETA, DELTA, LEARNING_RATE, GRAD_CLIP = 0.1, 10.0, 1e-6, 1.0


@dataclass(frozen=True)
class Config:
    vs: str = flag(
        None,
        "also time this library; transformers: with --sampling",
        kind=str,
        choices=("trl", "transformers"),
    )
    sampling: bool = flag(False, "time sampled answers instead of training")
    table: bool = flag(False, "several sizes, one by one")
    memory: bool = flag(False, "say what a run would need of memory, and do nothing else")
    rounds: int = flag(1, "measurements of each, in turns; the median counts", above=0)
    steps: int = flag(12, "steps of the epoch", above=WARM_UP)
    init_from: str = like(TrainConfig, "init_from", "")
    lora_rank: int = like(TrainConfig, "lora_rank", 0)
    data: str = flag(
        "", "pairs of this data, named as for train.py; left out: random ones", path=True
    )
    max_length: int = like(TrainConfig, "max_length", 512)
    prompt_tokens: float = flag(25.0, "mean length of random prompts, log-normal", least=4)
    answer_tokens: float = flag(80.0, "mean length of random answers, log-normal", least=4)
    n_layer: int = like(TrainConfig, "n_layer", 6)
    n_head: int = like(TrainConfig, "n_head", 6)
    n_kv_head: int = like(TrainConfig, "n_kv_head", 6)
    d_model: int = like(TrainConfig, "d_model", 384)
    d_ff: int = like(TrainConfig, "d_ff", 1024)
    vocab_size: int = like(TrainConfig, "vocab_size", 32000)
    batch_size: int = like(TrainConfig, "batch_size", 8)
    micro_batch_size: int = like(TrainConfig, "micro_batch_size", 2)
    eval_prompts: int = flag(32, "with --sampling: prompts", above=0)
    max_new_tokens: int = flag(128, "tokens of each sampled answer", above=0)
    seed: int = like(TrainConfig, "seed", 0)
    device: str = like(TrainConfig, "device", "auto")
    dtype: str = like(TrainConfig, "dtype", "auto")
    compile: bool = like(TrainConfig, "compile", None)
    checkpointing: bool = like(TrainConfig, "checkpointing", False)
    trl_batch_size: int = flag(
        1, "with --vs trl: its pairs at once; on a CPU one by one is its best", above=0
    )
    devices: int = flag(1, "with --memory: processes that share the model (--fsdp)", above=0)

    IDLE: ClassVar = {
        "memory": ("table", "sampling", "vs", "rounds", "compile"),
        "table": ("sampling", "vs", "init_from"),
        "init_from": SIZE_FLAGS,
        "data": ("prompt_tokens", "answer_tokens"),
        "sampling": (
            "steps", "batch_size", "micro_batch_size", "checkpointing", "compile", "answer_tokens",
        ),
    }  # fmt: skip
    NEEDS: ClassVar = {
        "data": "init_from",
        "max_length": "data",
        "devices": "memory",
        "eval_prompts": "sampling",
        "trl_batch_size": "vs",
    }


# --------------------------------------------------------------------------------------------------
# What is measured


def sizes_of(c):
    """ModelConfig of --init_from, or of the size flags."""
    if c.init_from:
        return initial.facts(c.init_from)[0]
    return ModelConfig(**{name: getattr(c, name) for name in SIZE_FLAGS}, tied_head=True)


def make_model(c, device):
    if c.init_from:
        shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(c)}
        settings = TrainConfig(**{name: getattr(c, name) for name in shared})
        return initial.initial_model(settings, device)[0]
    model = Transformer(sizes_of(c)).to(device)
    if c.lora_rank:
        lora.add(model, c.lora_rank, usual_alpha(c.lora_rank), c.seed)
    return model


def make_pairs(c):
    """c.steps · c.batch_size pairs of token ids: of an epoch over --data, or random ones."""
    if not c.data:
        return random_pairs(c)
    split = data.load(c.data)["train"]
    pairs = data.held_out_pairs(split, initial.tokenizer_of(c.init_from), c.max_length)
    least = 1 if c.memory else WARM_UP * c.batch_size + 1
    if len(pairs) < least:
        raise ValueError(
            f"--data {c.data}: has {len(pairs)} pairs; expected {least} or more, or a smaller "
            "--batch_size"
        )
    order = data.epoch_order(len(pairs), c.seed, 0)[: c.steps * c.batch_size]
    return [pairs[i] for i in order.tolist()]


def make_prompts(c):
    """c.eval_prompts prompts, token ids."""
    if not c.data:
        return [pair.x for pair in random_pairs(replace(c, steps=1, batch_size=c.eval_prompts))]
    split, tokenizer = data.load(c.data)["test"], initial.tokenizer_of(c.init_from)
    return list(data.prompts(split, tokenizer, c.max_length, c.eval_prompts).values())


def random_pairs(c):
    """Pairs of random token ids, with log-normal lengths.

    Every answer ends in token 1, and every second loser is unsafe.
    """
    rng, vocab_size = np.random.default_rng(c.seed), sizes_of(c).vocab_size

    def ids(mean, spread):
        length = rng.lognormal(math.log(mean) - spread**2 / 2, spread)
        length = np.clip(round(length), 4, 5 * mean)
        return rng.integers(2, vocab_size, int(length)).tolist()

    pairs = []
    for i in range(c.steps * c.batch_size):
        x = ids(c.prompt_tokens, 0.45)
        y_w = ids(c.answer_tokens, 0.6) + [1]
        y_l = ids(c.answer_tokens, 0.6) + [1]
        pairs.append(Pair(x, y_w, y_l, 0, i % 2))
    return pairs


def operations(sizes, pairs):
    """Multiplications and additions of one forward pass over all pairs, each prompt once.

    A matrix product has two for every weight and token. Attention adds four for every layer, every
    number of a query, and every key that the query sees: two for its score, two for its value.
    """
    c, queries = sizes, sizes.n_head * sizes.d_head
    block = c.d_model * (2 * queries + 2 * c.n_kv_head * c.d_head + 3 * c.d_ff)  # weights
    prompt_tokens = sum(len(p.x) for p in pairs)
    answer_tokens = sum(len(p.y_w) + len(p.y_l) for p in pairs)
    keys_seen = 0
    for p in pairs:
        keys_seen += len(p.x) ** 2 / 2
        for y in (p.y_w, p.y_l):
            keys_seen += len(y) * (len(p.x) + len(y) / 2)
    blocks = c.n_layer * block * (prompt_tokens + answer_tokens)
    head = c.vocab_size * c.d_model * answer_tokens
    return 2 * (blocks + head) + 4 * c.n_layer * queries * keys_seen


def matmul_rate(device, dtype):
    """Multiplications and additions a second in a product of square matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    start, n = clock(device), 0
    while (spent := clock(device) - start) < 0.1:
        a @ a
        n += 1
    return 2 * size**3 * n / spent


def peak_memory(device):
    """Gigabytes: on CUDA the most that tensors took, on a CPU the most that the process took; there
    Windows does not say it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if not importlib.util.find_spec("resource"):
        return float("nan")
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# --------------------------------------------------------------------------------------------------
# Measurements


def report(c, pairs, reference_time, step_times, **more):
    """The figures of one epoch: of the pass under the reference, and of all steps.

    A step takes the mean of step_times, without the first ones.
    """
    seconds = reference_time + len(step_times) * statistics.mean(step_times[WARM_UP:])
    tokens = sum(len(p.x) + len(p.y_w) + len(p.y_l) for p in pairs)
    return {
        "pairs/s": len(pairs) / seconds,
        "tokens/s": tokens / seconds,
        "GB": peak_memory(torch.device(c.device)),
        "s": seconds,
        **more,
    }


def ours(c, pairs):
    """The figures of train.py's step."""
    tune_cpu()
    torch.manual_seed(c.seed)
    device, steps = pick_device(c.device), data.steps_per_epoch(pairs, c.batch_size)
    model = prepare(make_model(c, device), c)
    pairs = data.TokenPairs(pairs)
    rates, times = [matmul_rate(device, getattr(torch, c.dtype))], []
    if c.compile:
        # compiling is no part of an epoch
        some = [pairs[i] for i in range(min(len(pairs), c.batch_size))]
        policy.log_probs(model, data.Examples(some), device, c.dtype)
    start = clock(device)
    ref = policy.log_probs(model, data.Examples(pairs), device, c.dtype)
    reference_time = clock(device) - start
    optimizer = train.make_optimizer(model, 0.0, train.TrainConfig.beta2)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    scaler = torch.amp.GradScaler(device.type, enabled=c.dtype == "float16")
    loss, precision = train.preference_loss(BETA, DELTA), autocast(device, c.dtype)
    for batches in data.prefetch(
        data.step_batches(pairs, s, c.batch_size, c.micro_batch_size, c.seed, ref)
        for s in range(steps)
    ):
        start = clock(device)
        train.train_step(model, optimizer, scaler, batches, loss, GRAD_CLIP, precision)
        give_back()
        times.append(clock(device) - start)
        rates.append(matmul_rate(device, getattr(torch, c.dtype)))
    figures = report(c, pairs, reference_time, times)
    # reference, forward, and backward, which counts as two where W has a gradient of its own; what
    # adapters add is not counted
    is_frozen = not model.blocks[0].mlp.down.weight.requires_grad
    work = (3 if is_frozen else 4) * operations(model.config, pairs)
    return {**figures, "MFU": work / figures["s"] / statistics.mean(rates)}


def our_samples(c, prompts):
    """The figures of sampling as evaluation does it: weights in the type of their products."""
    tune_cpu()
    torch.manual_seed(c.seed)
    device, settings = pick_device(c.device), TrainConfig(max_new_tokens=c.max_new_tokens)
    model = policy.for_inference(make_model(c, device), device, c.dtype)
    sample = functools.partial(
        policy.sample_answers, model, ends=[-1], settings=settings, device=device, dtype=c.dtype
    )
    sample(prompts[:1], settings=replace(settings, max_new_tokens=2))  # what happens only once
    start = clock(device)
    answers = sample(prompts)
    return sampled(c, answers, clock(device) - start)


def sampled(c, answers, seconds):
    """The figures of sampling."""
    tokens = sum(map(len, answers))
    return {"tokens/s": tokens / seconds, "GB": peak_memory(torch.device(c.device)), "s": seconds}


def trl(c, pairs):
    """The figures of TRL's step on the same pairs, in the same order."""
    settings, at_once = dict(beta=BETA, learning_rate=LEARNING_RATE), c.trl_batch_size
    pairs = [pairs[i] for i in data.epoch_order(len(pairs), c.seed, 0).tolist()]
    reference_time, times = peers.trl_times(
        c, sizes_of(c), pairs, per_device_train_batch_size=at_once,
        gradient_accumulation_steps=c.batch_size // at_once, **settings,
    )  # fmt: skip
    return report(c, pairs, reference_time, times)


def transformers(c, prompts):
    """The figures of transformers' sampling."""
    return sampled(c, *peers.transformers_samples(c, sizes_of(c), prompts))


# --------------------------------------------------------------------------------------------------
# The command line


def in_own_process(measure, c, work, environment=None):
    """measure(c, work) in a new process, so that peak memory is of this measurement alone."""
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment or {}), ProcessPoolExecutor(1, spawn) as process:
        return process.submit(measure, c, work).result()


def medians(results):
    """The median of each figure over several measurements."""
    return {name: statistics.median(r[name] for r in results) for name in results[0]}


COLUMNS = {  # figure → heading, and how it is written
    "pairs/s": ("pairs/s", "{:.2f}"),
    "tokens/s": ("tokens/s", "{:.0f}"),
    "MFU": ("MFU", "{:.0%}"),
    "GB": ("peak GB", "{:.2f}"),
}


def print_line(name, figures):
    cells = (
        form.format(figures[figure]) if figure in figures else "–"
        for figure, (_, form) in COLUMNS.items()
    )
    print(f"{name:<34}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def print_table(config):
    """A line for each flag of TABLE, and for each of its values."""
    for name in TABLE:
        for factor in (1, 2, 4):
            value = getattr(config, name)
            value = type(value)(value * factor)
            changes = {name: value}
            if name == "batch_size":
                changes["micro_batch_size"] = config.micro_batch_size * factor
            changed = replace(config, **changes)
            pairs = make_pairs(changed)
            results = [in_own_process(ours, changed, pairs) for _ in range(config.rounds)]
            print_line(f"{name} {value:g}", medians(results))


def print_comparison(config):
    """Our line, that of --vs, and the ratios."""
    measures = {"ours": our_samples if config.sampling else ours}
    if config.vs:
        measures[config.vs] = {"trl": trl, "transformers": transformers}[config.vs]
    work = make_prompts(config) if config.sampling else make_pairs(config)
    results = {name: [] for name in measures}
    for _ in range(config.rounds):
        for name, measure in measures.items():
            theirs = {} if name == "ours" else peers.ENVIRONMENT
            results[name].append(in_own_process(measure, config, work, theirs))
    for name in measures:
        print_line(name, medians(results[name]))
    for name in list(measures)[1:]:
        rounds = zip(results["ours"], results[name])
        ratios = medians([{f: a[f] / b[f] for f in ("tokens/s", "GB")} for a, b in rounds])
        print(
            f"{ratios['tokens/s']:.2f} times the tokens a second of {name}, "
            f"in {ratios['GB']:.2f} of its memory"
        )


def print_memory(config):
    """What a run would need with such pairs and flags."""
    rank, base_dtype, sizes = config.lora_rank, config.dtype, sizes_of(config)
    if config.init_from:
        _, base_dtype, own_rank = initial.facts(config.init_from)
        rank = own_rank or rank
    base_dtype = base_dtype if rank else "float32"
    pairs, n = data.TokenPairs(make_pairs(config)), config.micro_batch_size
    largest, most = data.largest_batch(pairs, n), config.max_new_tokens
    how = config.dtype, base_dtype, rank, config.checkpointing, config.devices, most
    plan = memory.Plan(*how, device=torch.device(config.device).type)
    need = memory.need(sizes, largest, [p.x for p in pairs], plan)
    print(
        f"micro-batches of at most {len(largest.tokens)} tokens, those of the {n} largest pairs; "
        f"sampled answers of at most {most}"
    )
    print(memory.sentence(need, config.devices))


def refuse(config):
    """ValueError if this cannot be measured, or a library is missing."""
    if is_torchelastic_launched():
        raise ValueError(
            "torchrun starts this once a process, and each would measure alone; "
            "expected python bench.py"
        )
    if not config.vs:
        return
    if (config.vs == "transformers") != config.sampling:
        raise ValueError("--vs trl compares training, and --vs transformers needs --sampling")
    for library in (config.vs, *["peft"] * bool(config.lora_rank)):
        if not importlib.util.find_spec(library):
            raise ValueError(f"--vs {config.vs} needs {library}: pip install {library}")
    if config.init_from and policy.our_checkpoint(initial.source_of(config.init_from)):
        raise ValueError(
            f"--vs {config.vs}: {config.init_from} is a checkpoint of ours; expected a Hugging "
            "Face folder (eval.py --export makes one of it)"
        )
    if config.batch_size % config.trl_batch_size:
        raise ValueError(
            f"--trl_batch_size {config.trl_batch_size}: expected a divisor of --batch_size "
            f"{config.batch_size}"
        )


def main(argv=None):
    config = settle(Config(**parse(Config, argv, __doc__)))
    refuse(config)
    if config.memory:
        return print_memory(config)
    sizes = sizes_of(config)
    print(
        f"{sizes.n_layer} layers of {sizes.d_model}, vocabulary {sizes.vocab_size}, "
        f"{config.dtype}, {config.device}, {torch.get_num_threads()} threads"
    )
    print(f"{'':34}" + "".join(f"{heading:>11}" for heading, _ in COLUMNS.values()))
    if config.table:
        print_table(config)
    else:
        print_comparison(config)


if __name__ == "__main__":
    run(main)
