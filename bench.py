"""Speed and memory of train.py's own step, on random tokens with the lengths of PKU-SafeRLHF: one
epoch, and the pass under the reference that comes before it.

    python bench.py --dtype bfloat16          matrix products in bf16
    python bench.py --table                   how cost grows with pairs a step, lengths, vocabulary
    python bench.py --vs trl                  in turns with TRL's DPOTrainer, on the same pairs
    python bench.py --memory --init_from Qwen2.5-1.5B-Instruct --lora_rank 16
                                              what a run would need of memory; nothing is trained

TRL gets its best settings: the reference's log-probabilities are computed ahead, and activations
are kept unless --checkpointing. It is measured twice: a whole step at once, as it does by default,
and pair by pair with the gradient accumulated, which pads less. What lib/device.py:keep_memory sets
for our process is not set for TRL's (docs/speed.md says what it would gain); how threads wait
(lib/__init__.py) is the same in both.

Every measurement is a process of its own. "of matmul" is the share of the device's own rate of
matrix products, measured between the steps. The work that is counted is what the algorithm needs:
no padding, and nothing twice.
"""

import contextlib
import functools
import importlib.util
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from lib import memory
from lib.device import autocast, give_back, prepare, settle, tune_cpu
from lib.flags import flag, like, parse, run
from lib.policy import log_probs, sizes_of
from lib.settings import SIZE_FLAGS, TrainConfig

import numpy as np
import torch
from torch.distributed import is_torchelastic_launched

import data
import train
from model import ModelConfig, Transformer
from safedpo import Pair

WARM_UP = 2  # steps that are not timed
TABLE = ("batch_size", "prompt_tokens", "answer_tokens", "vocab_size")  # each times 1, 2 and 4
BETA, DELTA, LEARNING_RATE, GRAD_CLIP = 0.1, 10.0, 1e-6, 1.0


@dataclass(frozen=True)
class Config:
    vs: str = flag(None, "also time this library", kind=str, choices=("trl",))
    table: bool = flag(False, "several sizes, one by one")
    rounds: int = flag(1, "measurements of each, in turns; the median counts", above=0)
    steps: int = flag(12, "steps of the epoch", above=WARM_UP)
    prompt_tokens: float = flag(25.0, "mean length of prompts, log-normal", least=4)
    answer_tokens: float = flag(80.0, "mean length of answers, log-normal", least=4)
    n_layer: int = like(TrainConfig, "n_layer", 6)
    n_head: int = like(TrainConfig, "n_head", 6)
    n_kv_head: int = like(TrainConfig, "n_kv_head", 6)
    d_model: int = like(TrainConfig, "d_model", 384)
    d_ff: int = like(TrainConfig, "d_ff", 1024)
    vocab_size: int = like(TrainConfig, "vocab_size", 32000)
    batch_size: int = like(TrainConfig, "batch_size", 8)
    micro_batch_size: int = like(TrainConfig, "micro_batch_size", 2)
    seed: int = like(TrainConfig, "seed", 0)
    device: str = like(TrainConfig, "device", "auto")
    dtype: str = like(TrainConfig, "dtype", "auto")
    compile: bool = like(TrainConfig, "compile", None)
    checkpointing: bool = like(TrainConfig, "checkpointing", False)
    memory: bool = flag(False, "say what a run would need of memory, and do nothing else")
    init_from: str = flag(
        "", "with --memory: a Hugging Face folder or a checkpoint, instead of sizes", path=True
    )
    lora_rank: int = flag(0, "with --memory: rank of adapters; 0: the whole model", least=0)
    devices: int = flag(1, "with --memory: processes that share the model (--fsdp)", above=0)


def make_pairs(c):
    """TokenPairs: c.steps · c.batch_size pairs of random token ids, with log-normal lengths.

    Every answer ends in token 1, and every second loser is unsafe.
    """
    rng = np.random.default_rng(c.seed)

    def ids(mean, spread):
        length = rng.lognormal(math.log(mean) - spread**2 / 2, spread)
        length = np.clip(round(length), 4, 5 * mean)
        return rng.integers(2, c.vocab_size, int(length)).tolist()

    pairs = []
    for i in range(c.steps * c.batch_size):
        x = ids(c.prompt_tokens, 0.45)
        y_w = ids(c.answer_tokens, 0.6) + [1]
        y_l = ids(c.answer_tokens, 0.6) + [1]
        pairs.append(Pair(x, y_w, y_l, 0, i % 2))
    return data.TokenPairs(pairs)


def operations(c, pairs):
    """Multiplications and additions of one forward pass over all pairs, each prompt once.

    A matrix product has two for every weight and token. Attention adds four for every layer, every
    number of a query, and every key that the query sees: two for its score, two for its value.
    """
    d_head = c.d_model // c.n_head
    block = c.d_model * (2 * c.d_model + 2 * c.n_kv_head * d_head + 3 * c.d_ff)  # weights
    prompt_tokens = sum(len(p.x) for p in pairs)
    answer_tokens = sum(len(p.y_w) + len(p.y_l) for p in pairs)
    keys_seen = 0
    for p in pairs:
        keys_seen += len(p.x) ** 2 / 2
        for y in (p.y_w, p.y_l):
            keys_seen += len(y) * (len(p.x) + len(y) / 2)
    blocks = c.n_layer * block * (prompt_tokens + answer_tokens)
    head = c.vocab_size * c.d_model * answer_tokens
    return 2 * (blocks + head) + 4 * c.n_layer * c.d_model * keys_seen


def clock(device):
    """Seconds, once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


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
    """Gigabytes: on CUDA the most that tensors took, on a CPU the most that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def report(c, pairs, reference_time, step_times, **more):
    """The figures of one epoch: of the pass under the reference, and of all steps.

    A step takes the mean of step_times, without the first ones.
    """
    seconds = reference_time + c.steps * statistics.mean(step_times[WARM_UP:])
    tokens = sum(len(p.x) + len(p.y_w) + len(p.y_l) for p in pairs)
    return {
        "pairs/s": len(pairs) / seconds,
        "tokens/s": tokens / seconds,
        "GB": peak_memory(torch.device(c.device)),
        "s": seconds,
        **more,
    }


def ours(c):
    """The figures of train.py's step."""
    tune_cpu()
    torch.manual_seed(c.seed)
    device, pairs = torch.device(c.device), make_pairs(c)
    sizes = {name: getattr(c, name) for name in SIZE_FLAGS}
    model = prepare(Transformer(ModelConfig(**sizes, tied_head=True)).to(device), c)
    rates, times = [matmul_rate(device, getattr(torch, c.dtype))], []
    if c.compile:
        # compiling is no part of an epoch
        log_probs(model, data.Examples([pairs[0]]), device, c.dtype)
    start = clock(device)
    ref = log_probs(model, data.Examples(pairs), device, c.dtype)
    reference_time = clock(device) - start
    optimizer = train.make_optimizer(model, 0.0, train.TrainConfig.beta2)
    for group in optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    scaler = torch.amp.GradScaler(device.type, enabled=c.dtype == "float16")
    loss, precision = train.preference_loss(BETA, DELTA), autocast(device, c.dtype)
    for batches in data.prefetch(
        data.step_batches(pairs, s, c.batch_size, c.micro_batch_size, c.seed, ref)
        for s in range(c.steps)
    ):
        start = clock(device)
        train.train_step(model, optimizer, scaler, batches, loss, GRAD_CLIP, precision)
        give_back()
        times.append(clock(device) - start)
        rates.append(matmul_rate(device, getattr(torch, c.dtype)))
    figures = report(c, pairs, reference_time, times)
    work = 4 * operations(c, pairs)  # reference, forward, and backward, which counts as two
    share = work / figures["s"] / statistics.mean(rates)
    return {**figures, "share": share, "parameters": sum(p.numel() for p in model.parameters())}


def trl_trainer(model, pairs, c, **settings):
    """TRL's DPOTrainer on pairs of token ids, after its pass under the reference.

    trainer.reference_time: seconds of that pass. trainer.clock.times: when training began, and when
    each step ended. settings: of DPOConfig.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    device = torch.device(c.device)

    class TimedTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already

        def _precompute_ref_logps(self, *args):
            start = clock(device)
            dataset = super()._precompute_ref_logps(*args)
            self.reference_time = clock(device) - start
            return dataset

    class StepClock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.times = [clock(device)]

        def on_step_end(self, *_, **__):
            self.times.append(clock(device))

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=c.steps,
        max_length=None,
        lr_scheduler_type="constant",
        precompute_ref_log_probs=True,
        gradient_checkpointing=c.checkpointing,
        bf16=c.dtype == "bfloat16",
        fp16=c.dtype == "float16",
        use_cpu=c.device == "cpu",
        seed=c.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=c.device != "cpu",
        **settings,
    )
    vocabulary = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<eos>"
    )
    rows = [{"prompt_ids": p.x, "chosen_ids": p.y_w, "rejected_ids": p.y_l} for p in pairs]
    step_clock = StepClock()
    trainer = TimedTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[step_clock],
    )
    trainer.clock = step_clock
    return trainer


def trl(c, at_once):
    """The figures of TRL on the same epoch, at_once pairs at once, with a Llama of these sizes."""
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    warnings.simplefilter("ignore")  # of settings that TRL or transformers will rename
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(c.seed)
    pairs = make_pairs(c)
    llama = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    trainer = trl_trainer(
        LlamaForCausalLM(llama),
        pairs,
        c,
        beta=BETA,
        learning_rate=LEARNING_RATE,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=c.batch_size // at_once,
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        trainer.train()
    return report(c, pairs, trainer.reference_time, np.diff(trainer.clock.times).tolist())


# --------------------------------------------------------------------------------------------------
# The command line


def in_own_process(measure, c):
    """measure(c) in a new process, so that peak memory is of this measurement alone."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, c).result()


def medians(results):
    """The median of each figure over several measurements."""
    return {name: statistics.median(r[name] for r in results) for name in results[0]}


def print_line(name, figures):
    share = f"{100 * figures['share']:9.0f} %" if "share" in figures else f"{'–':>11}"
    rates = f"{figures['pairs/s']:9.2f}{figures['tokens/s']:11.0f}"
    print(f"{name:<34}{rates}{share}{figures['GB']:9.2f}", flush=True)


def print_table(config):
    """A line for each flag of TABLE, and for each of its values."""
    for name in TABLE:
        for factor in (1, 2, 4):
            value = getattr(config, name)
            value = type(value)(value * factor)
            changes = {name: value}
            if name == "batch_size":
                changes["micro_batch_size"] = value
            changed = replace(config, **changes)
            results = [in_own_process(ours, changed) for _ in range(config.rounds)]
            print_line(f"{name} {value:g}", medians(results))


def print_comparison(config):
    """Our line, and with --vs trl two of TRL's: a whole step at once, and pair by pair."""
    peers = {}
    if config.vs:
        for n in (config.batch_size, 1):
            peers[f"trl, {n} at once"] = functools.partial(trl, at_once=n)
    measures = {"ours": ours, **peers}
    results = {name: [] for name in measures}
    for _ in range(config.rounds):
        for name, measure in measures.items():
            results[name].append(in_own_process(measure, config))
    for name in measures:
        print_line(name, medians(results[name]))
    for name in peers:
        ratios = medians(
            [
                {figure: a[figure] / b[figure] for figure in ("pairs/s", "GB")}
                for a, b in zip(results["ours"], results[name])
            ]
        )
        print(
            f"{ratios['pairs/s']:.1f} times the pairs a second of {name}, "
            f"in {ratios['GB']:.2f} of its memory"
        )


def print_memory(config):
    """What a run would need with pairs of these lengths, and answers of at most 256 tokens."""
    if config.init_from:
        sizes, base_dtype = sizes_of(config.init_from)
    else:
        sizes, base_dtype = {name: getattr(config, name) for name in SIZE_FLAGS}, config.dtype
        sizes = ModelConfig(**sizes)
    if not config.lora_rank:
        base_dtype = "float32"
    pairs = make_pairs(replace(config, vocab_size=sizes.vocab_size))
    how = config.dtype, base_dtype, config.lora_rank, config.checkpointing, config.devices
    plan = memory.Plan(*how, device=torch.device(config.device).type)
    largest = data.largest_batch(pairs, config.micro_batch_size)
    need = memory.need(sizes, largest, [p.x for p in pairs], plan)
    print(memory.sentence(need, config.devices))


def main(argv=None):
    given = parse(Config, argv, __doc__)
    config = settle(Config(**given))
    if is_torchelastic_launched():
        raise ValueError(
            "torchrun starts this once a process, and each would measure alone; "
            "expected python bench.py"
        )
    if config.vs and config.table:
        raise ValueError(f"--table measures this code alone; leave it out, or --vs {config.vs}")
    if config.vs and not importlib.util.find_spec(config.vs):
        raise ValueError(f"--vs {config.vs} needs that library: pip install {config.vs}")
    if config.memory:
        return print_memory(config)
    for name in ("init_from", "lora_rank", "devices"):
        if name in given:
            raise ValueError(f"--{name} {given[name]}: acts with --memory only")
    print(
        f"{config.n_layer} layers of {config.d_model}, vocabulary {config.vocab_size}, "
        f"{config.dtype}, {config.device}, {torch.get_num_threads()} threads"
    )
    print(f"{'':34}{'pairs/s':>9}{'tokens/s':>11}{'of matmul':>11}{'peak GB':>9}")
    if config.table:
        print_table(config)
    else:
        print_comparison(config)


if __name__ == "__main__":
    run(main)
