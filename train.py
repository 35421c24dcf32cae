"""Teach a transformer to be safe: SFT gives the reference, SafeDPO gives the policy.

python train.py --delta 5                                         the toy world, on a laptop
python train.py --data PKU-SafeRLHF-30K --beta 0.1 --delta 10     a folder with train and test files
python train.py --init_from alpaca-7b --prompt_template beaver --data PKU-SafeRLHF-30K --beta 0.1 --delta 10
python train.py --pairs helpful                                   a baseline
"""

import hashlib
import json
import math
import os
import shlex
import time
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

import data
import safedpo
from eval import MODELS, Settings, evaluate, load_model, log_probs, preference_metrics
from lib import checkpoint, parallel, pretrained, records
from lib.flags import autocast, flag, parse, pick_device, problems, run, settle, stop_signals
from lib.report import side_by_side, table
from lib.tokenizer import TEMPLATES, Tokenizer
from model import ModelConfig, Transformer, move


@dataclass(frozen=True)
class Config(Settings):
    data: str = flag("toy", "toy, a .jsonl file, or a folder with train and test files")
    init_from: str = flag(
        "", "start from this: a checkpoint of ours, or a Hugging Face model folder"
    )
    prompt_template: str = flag(
        None,
        f"a text with {{prompt}} in it, or {', '.join(TEMPLATES)}; left out: plain, or a checkpoint's own",
        kind=str,
    )
    pairs: str = flag("safedpo", "how pairs are ordered", choices=tuple(safedpo.PAIR_CHOICES))
    beta: float = flag(2.0, "β of the loss", above=0)
    delta: float = flag(
        None,
        "Δ of the loss: asks for Δ/β nats; left out: 5 with safedpo, noswap; 0 with others",
        kind=float,
        least=0,
    )
    label_noise: float = flag(
        0.0, "flip each safety flag of the training pairs with this probability", least=0, most=1
    )
    out_dir: str = flag("", "folder of the run; left out: runs/ and a name made of the flags")
    resume: bool = flag(False, "go on with the run in the folder")
    compile: bool = flag(None, "torch.compile; left out: on CUDA only", kind=bool)
    checkpointing: bool = flag(
        False,
        "compute a block's inner values again in the backward pass: less memory, a third slower",
    )
    fsdp: bool = flag(
        False, "under torchrun: shard the model over the processes instead of a copy on each"
    )
    vocab_size: int = flag(4096, "of the tokenizer, at most", least=257, most=2**24)
    max_length: int = flag(512, "tokens of a prompt and one answer; what is longer is cut", least=2)
    n_layer: int = flag(2, "layers", above=0, most=1024)
    n_head: int = flag(4, "attention heads", above=0, most=2**16)
    n_kv_head: int = flag(2, "heads of keys and values", above=0, most=2**16)
    d_model: int = flag(128, "width", above=0, most=2**20)
    d_ff: int = flag(256, "width of the SwiGLU", above=0, most=2**22)
    sft_epochs: int = flag(
        None,
        "passes of SFT, which makes the reference; left out: 1 from nothing, 0 with --init_from",
        kind=int,
        least=0,
    )
    sft_lr: float = flag(3e-3, "peak learning rate of SFT", above=0)
    sft_batch_size: int = flag(8, "pairs a step of SFT, both answers of each", above=0)
    epochs: int = flag(1, "passes of SafeDPO", above=0)
    lr: float = flag(4e-4, "peak learning rate of SafeDPO", above=0)
    batch_size: int = flag(64, "pairs a step of SafeDPO", above=0)
    micro_batch_size: int = flag(16, "pairs a forward pass", above=0)
    warmup: float = flag(
        0.3,
        "share of the steps in which the learning rate rises; then a cosine to 0",
        least=0,
        most=1,
    )
    weight_decay: float = flag(0.05, "of AdamW, on matrices", least=0)
    grad_clip: float = flag(1.0, "norm to which gradients are clipped", above=0)
    save_every: int = flag(100, "steps between two saves of the training state", above=0)


# ---------------------------------------------------------------------------------------------------------------------
# One step


def sft_loss(logps, batch):
    """Mean negative log-probability of the step's answer tokens, nats. logps of the batch's answers, then of its padding."""
    return -logps[: 2 * len(batch.pairs)].sum() / batch.step_tokens, None


def preference_loss(beta, delta):
    """Eq. 12, mean over the step's pairs, and what its metrics are made of."""

    def loss(logps, batch):
        logp_w, logp_l = logps[: 2 * len(batch.pairs)].view(-1, 2).T
        figures = logp_w, logp_l, batch.ref_w, batch.ref_l, batch.h_w, batch.h_l
        return safedpo.safedpo_loss(*figures, beta, delta).sum() / batch.step_pairs, torch.stack(
            figures
        ).detach()

    return loss


def train_step(model, optimizer, scaler, batches, loss_function, grad_clip, precision):
    """One optimizer step over a list of micro-batches. Returns loss, gradient norm and figures (6, pairs) or None."""
    device = next(model.parameters()).device
    losses, figures = [], []
    for i, batch in enumerate(batches):
        batch = move(batch, device)
        parallel.exchange_gradients(model, i + 1 == len(batches))
        with precision:
            logps = model(batch.rows)
        loss, parts = loss_function(logps, batch)
        scaler.scale(
            loss * parallel.size()
        ).backward()  # processes' gradients are averaged; their losses add up
        losses.append(loss.detach())
        figures.append(parts)
    losses = torch.stack(losses)
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0])
        raise FloatingPointError(f"the loss is {losses[bad].item()} on pairs {batches[bad].pairs}")
    scaler.unscale_(optimizer)
    norm = parallel.plain(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    if (
        not scaler.is_enabled() and not norm.isfinite()
    ):  # an enabled scaler skips the step and scales less
        raise FloatingPointError(
            f"the gradient's norm is {norm.item()} on pairs {[i for batch in batches for i in batch.pairs]}"
        )
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    figures = (
        None if figures[0] is None else parallel.interleave(torch.cat(figures, 1), batch.step_pairs)
    )
    return parallel.total(losses.sum()).item(), norm.item(), figures


def learning_rate(step, steps, peak, warmup):
    """Linear from 0 over the first `warmup` share of the steps, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def make_optimizer(model, weight_decay):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def fit(stage, model, pairs, ref, loss_function, epochs, batch_size, peak, config, folder):
    """Train model in place over epochs of token pairs: the recipe of both stages, "sft" and "safedpo"."""
    device = torch.device(config.device)
    precision = autocast(device, config.dtype)
    optimizer = make_optimizer(model, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    per_epoch = data.steps_per_epoch(pairs, batch_size)
    steps = epochs * per_epoch
    saved = first = restore(folder, stage, model, optimizer, scaler)
    model.train()
    share = dict(
        micro_batch_size=config.micro_batch_size,
        seed=config.seed,
        ref=ref,
        rank=parallel.rank(),
        size=parallel.size(),
    )
    coming = data.ahead(
        data.step_batches(pairs, step, batch_size, **share) for step in range(first, steps)
    )
    path = os.devnull if parallel.rank() else folder / "metrics.jsonl"  # one process talks
    bar = tqdm(total=steps, initial=first, desc=stage, disable=parallel.rank() > 0)
    with open(path, "a", encoding="utf-8") as log, bar, stop_signals() as signals:
        for step, batches in enumerate(coming, first):
            lr = learning_rate(step, steps, peak, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            try:
                loss, norm, figures = train_step(
                    model, optimizer, scaler, batches, loss_function, config.grad_clip, precision
                )
            except FloatingPointError as e:
                raise FloatingPointError(
                    f"{stage} step {step + 1}: {e}; {last_saved(folder, saved)}; a smaller learning rate or Δ/β helps"
                )
            metrics = {} if figures is None else preference_metrics(*figures, config.beta)
            line = {"stage": stage, "step": step + 1, "epoch": (step + 1) / per_epoch, "loss": loss}
            line |= metrics | {"grad_norm": norm, "learning_rate": lr}
            log.write(
                json.dumps(
                    {
                        k: None if isinstance(v, float) and not math.isfinite(v) else v
                        for k, v in line.items()
                    }
                )
                + "\n"
            )
            shown = {
                "loss": loss,
                "margin": metrics.get("rewards/margins"),
                "accuracy": metrics.get("rewards/accuracies"),
            }
            bar.set_postfix(
                {name: f"{value:.3f}" for name, value in shown.items() if value is not None},
                refresh=False,
            )
            bar.update()
            stop = (
                parallel.total(torch.tensor(float(len(signals)), device=device)).item() > 0
            )  # all processes, or none
            if stop or (step + 1) % config.save_every == 0:
                log.flush()
                if not parallel.rank():
                    os.fsync(log.fileno())
                keep(folder, stage, step + 1, model, optimizer, scaler)
                saved = step + 1
            if stop:
                raise KeyboardInterrupt(last_saved(folder, saved))
    model.eval()


def keep(folder, stage, step, model, optimizer, scaler):
    """Save what a resumed run goes on from. The step is the data cursor; nothing else has a state."""
    weights, moments = parallel.training_state(model, optimizer)
    check_weights(weights, f"{stage} step {step}: ")
    state = {"model": weights, "optimizer": moments, "scaler": scaler.state_dict()}
    checkpoint.save(folder / "state.pt", {"stage": stage, "step": step, **state}, keep=True)


def last_saved(folder, step):
    return f"step {step} was saved, in {folder / 'state.pt'}" if step else "no step was saved yet"


def restore(folder, stage, model, optimizer, scaler):
    """The step at which stage goes on: 0, or where the folder's state was saved. Metrics of lost steps are removed."""
    step, path, log = 0, folder / "state.pt", folder / "metrics.jsonl"
    state = checkpoint.load_last(path)
    if state.get("stage") == stage:
        try:
            step = state["step"]
            parallel.load_training_state(model, optimizer, state["model"], state["optimizer"])
            scaler.load_state_dict(state["scaler"])
        except Exception as e:  # another program's, or another model's
            raise ValueError(
                f"{path}: does not fit the run ({type(e).__name__}: {str(e).partition(chr(10))[0]}); without it {stage} begins anew"
            )
    if log.exists() and not parallel.rank():
        with open(log, "rb") as f:
            lines = [line for line in f if line.endswith(b"\n")]
        known = [
            checkpoint.parse_json(line, f"{log}:{number}") for number, line in enumerate(lines, 1)
        ]
        with checkpoint.replacing(log, "wb") as f:
            f.writelines(
                line
                for line, row in zip(lines, known)
                if row.get("stage") != stage or row.get("step") in range(step + 1)
            )
    return step


# ---------------------------------------------------------------------------------------------------------------------
# Before and after the loop

FILES = (  # what a run leaves in its folder
    "config.json",
    "metrics.jsonl",
    "reference.pt",
    "policy.pt",
    "ref_logps.pt",
    "state.pt",
    "state.previous.pt",
    "eval.json",
    "samples.jsonl",
)
SIZE_FLAGS = (
    "vocab_size",
    "n_layer",
    "n_head",
    "n_kv_head",
    "d_model",
    "d_ff",
)  # a checkpoint brings its own
FREE_FLAGS = (
    "resume",
    "out_dir",
    "fsdp",
    "checkpointing",
    "compile",
    "micro_batch_size",
)  # may change on --resume: same gradients
REFERENCE_FLAGS = SIZE_FLAGS + (  # what a reference trained by SFT depends on, beside the data
    "init_from",
    "prompt_template",
    "seed",
    "device",
    "dtype",
    "max_length",
    "sft_epochs",
    "sft_lr",
    "sft_batch_size",
    "micro_batch_size",
    "warmup",
    "weight_decay",
    "grad_clip",
)


def open_run(argv):
    """(config with nothing left open, folder). ValueError if the folder's run and the flags do not go together."""
    given = parse(Config, argv)
    config = Config(**given)
    folder = Path(config.out_dir or Path("runs") / run_name(given))
    saved = folder / "config.json"
    if not config.resume:
        check_free(folder)
    else:
        if not saved.exists():
            raise ValueError(
                f"{folder} holds no run to resume (config.json is missing); without --resume one starts"
            )
        flags = checkpoint.read_json(
            saved,
            {
                **{f.name: None for f in fields(Config)},
                "data_sha256": str,
                "reference": (str, type(None)),
            },
        )
        known = {f.name: flags[f.name] for f in fields(Config)}
        for name, value, expected in problems(Config, known):
            raise ValueError(f"{saved}: {name} is {checkpoint.show(value)}; expected {expected}")
        pick_device(known["device"])
        other = [
            name
            for name in given
            if known[name] != given[name] and name not in FREE_FLAGS and given[name] != "auto"
        ]
        if other:
            asked, has = (
                ", ".join(f"--{name} {values[name]}" for name in other) for values in (given, known)
            )
            raise ValueError(f"{asked} contradicts the run in {folder}, which has {has}")
        free = {name: given[name] for name in FREE_FLAGS if name in given}
        config = Config(**{**known, "fsdp": False, **free, "out_dir": str(folder)})
    for name in SIZE_FLAGS:
        if config.init_from and name in given and not config.resume:
            raise ValueError(
                f"--{name} {given[name]}: --init_from {config.init_from} has its own size; leave the flag out"
            )
    config = settle(config)
    if config.fsdp and parallel.size() == 1:
        raise ValueError(
            "--fsdp shards over processes, and this is the only one; expected torchrun --nproc_per_node=N train.py …"
        )
    if config.fsdp and config.dtype == "float16":
        raise ValueError(
            "--fsdp does not go with --dtype float16, whose gradients must be scaled; expected bfloat16 or float32"
        )
    left_out = {
        "delta": 5.0 if config.pairs in ("safedpo", "noswap") else 0.0,
        "sft_epochs": 0 if config.init_from else 1,
        "prompt_template": None if config.init_from else "plain",
    }
    given = {name: getattr(config, name) for name in left_out if getattr(config, name) is not None}
    if not config.init_from and given.get("sft_epochs") == 0:
        raise ValueError("--sft_epochs 0 needs a model to start from; expected --init_from FOLDER")
    return replace(config, **{**left_out, **given}, out_dir=str(folder)), folder


def check_free(folder):
    if any((folder / name).exists() for name in FILES):
        raise ValueError(
            f"{folder} already holds a run; --resume goes on with it, --out_dir FOLDER starts another"
        )


def run_name(given):
    """A folder name that tells the flags given: toy-safedpo-delta5, toy-safedpo-delta5-lr0.001, …"""
    config = Config(**given)
    delta = "" if config.delta is None else f"-delta{config.delta:g}"
    rest = {
        k: v for k, v in given.items() if k not in ("data", "pairs", "delta", "out_dir", "resume")
    }
    name = f"{config.data}-{config.pairs}{delta}" + "".join(
        f"-{k}{v}" for k, v in sorted(rest.items())
    )
    plain = "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("_.")
    if len(plain.encode()) <= 120:
        return plain
    return (
        plain.encode()[:100].decode(errors="ignore")
        + "-"
        + hashlib.sha256(name.encode()).hexdigest()[:8]
    )


def starting_model(config, splits, source, folder, device):
    """(model, tokenizer, whether it is the reference already): from this run's reference or another's (source), --init_from,
    or nothing."""
    if source:
        print(
            f"reference: {source}"
            + ("" if source.parent == folder else ", trained earlier with the same settings")
        )
        return *load_model(source, device), True
    if config.init_from:
        print(f"{'start' if config.sft_epochs else 'reference'}: {config.init_from}")
        return *initial_model(config, device), not config.sft_epochs
    torch.manual_seed(config.seed)
    tokenizer = Tokenizer.train(
        splits["train"],
        config.vocab_size,
        TEMPLATES.get(config.prompt_template, config.prompt_template),
    )
    sizes = {name: getattr(config, name) for name in SIZE_FLAGS} | {
        "vocab_size": tokenizer.vocab_size
    }
    return Transformer(ModelConfig(**sizes)).to(device), tokenizer, False


def initial_model(config, device):
    """(model, tokenizer) of --init_from."""
    source, template = Path(config.init_from), config.prompt_template
    if not source.exists():
        raise ValueError(f"--init_from {source}: no such file or folder")
    if source.is_dir() and not any(
        (source / name).exists() for name in ("config.json", "policy.pt")
    ):
        raise ValueError(
            f"--init_from {source}: no policy.pt and no config.json; expected a run of ours or a Hugging Face model"
        )
    if not (source / "config.json").exists() or (source / "policy.pt").exists():
        if template is not None:
            raise ValueError(
                f"--prompt_template {template}: {source} is a checkpoint of ours, which has its own; leave the flag out"
            )
        return load_model(source / "policy.pt" if source.is_dir() else source, device)
    if template is None:
        raise ValueError(
            f"{source}: a Hugging Face model needs --prompt_template TEXT, with {{prompt}} in it, or one of {', '.join(TEMPLATES)}"
        )
    return pretrained.load(
        source, TEMPLATES.get(template, template), config.max_length + config.max_new_tokens, device
    )


def prepare(model, config):
    """The model ready to be trained as the flags say."""
    if config.device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")  # what is left in fp32 goes through TF32
    model.checkpointing = config.checkpointing
    if config.compile:
        for block in model.blocks:
            block.compile(dynamic=True)  # in place: parameters keep their names
    return model


def find_reference(config, digest, folder):
    """The reference.pt of a run beside folder that was trained with the same settings on the same data, or None."""
    if config.init_from:
        return None  # what lies there may have changed
    for saved in sorted(folder.parent.glob("*/config.json")):
        try:
            other = checkpoint.read_json(saved)
        except (ValueError, OSError):
            continue  # somebody else's folder
        same = other.get("data_sha256") == digest and all(
            other.get(name) == getattr(config, name) for name in REFERENCE_FLAGS
        )
        if same and (saved.parent / "reference.pt").exists():
            return saved.parent / "reference.pt"


def check_weights(weights, place=""):
    """FloatingPointError if a weight is no number, so that the last good checkpoint stays."""
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise FloatingPointError(
                f"{place}{name} holds weights that are no numbers; a smaller learning rate or Δ/β helps"
            )


def save_model(path, model, tokenizer):
    weights = parallel.model_state(model)
    check_weights(weights)
    config = asdict(parallel.bare(model).config)
    checkpoint.save(path, {"config": config, "model": weights, "tokenizer": tokenizer.state()})


def reference_logps(model, pairs, config, folder, device):
    """(n, 2) log-probabilities of winners and losers under π_ref: constants of the run, computed once and kept with it."""
    path = folder / "ref_logps.pt"
    ref = checkpoint.load_last(path).get("ref")
    if isinstance(ref, torch.Tensor) and ref.shape == (len(pairs), 2):
        return ref
    ref = log_probs(
        model,
        data.Examples(pairs),
        device,
        config.dtype,
        config.micro_batch_size,
        "reference log-probs",
    )
    checkpoint.save(path, {"ref": ref})
    return ref


@contextmanager
def resumable(folder):
    """What ends the run early says how it goes on."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as e:
        if not os.path.exists(folder / "config.json"):
            raise
        more = f"to go on: python train.py --resume --out_dir {shlex.quote(str(folder))}"
        raise type(e)("; ".join(filter(None, (str(e), more)))) from e


def main(argv=None):
    parallel.join()
    config, folder = open_run(argv)
    with ExitStack() as hold, resumable(folder):
        if config.resume:
            hold.enter_context(checkpoint.alone(folder))
        train(config, folder, hold)


def train(config, folder, hold):
    """The whole run. hold: keeps a new folder to this process."""
    start = time.time()
    device = torch.device(config.device)
    splits = data.load(config.data)
    digest, found = records.survey(splits)
    known = (
        checkpoint.read_json(folder / "config.json") if config.resume else {"data_sha256": digest}
    )
    if known["data_sha256"] != digest:
        raise ValueError(
            f"{config.data} has changed since the run in {folder} began; --out_dir FOLDER starts another"
        )
    print(f"{config.data}: " + "\n  ".join(found))

    home = (
        torch.device("cpu") if config.fsdp else device
    )  # a model to be sharded may not fit on one device
    own = folder / "reference.pt"
    source = (
        known.get("reference") if config.resume else find_reference(config, digest, folder)
    )  # once: others may come meanwhile
    model, tokenizer, trained = starting_model(
        config, splits, own if own.exists() else source and Path(source), folder, home
    )
    noisy = records.flip_flags(splits["train"], config.label_noise, config.seed)
    pairs, cut = data.encode(
        records.choose_pairs(noisy, config.pairs, counts := Counter()),
        tokenizer,
        config.max_length,
        "tokenizing",
    )
    data.encode(
        records.choose_pairs(splits["test"], "safedpo", Counter()),
        tokenizer,
        config.max_length,
        "tokenizing test",
    )
    print(f"pairs ({config.pairs}): " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    if any(cut.values()):
        print(
            f"--max_length {config.max_length}: "
            + ", ".join(f"{n} {what}" for what, n in cut.items())
        )

    if config.init_from:
        config = replace(config, **{name: getattr(model.config, name) for name in SIZE_FLAGS})
    done = {name for name in ("reference", "policy") if (folder / f"{name}.pt").exists()}
    parallel.barrier()  # every process has looked at the folder; whatever can be refused has been refused by now
    folder.mkdir(parents=True, exist_ok=True)
    if not config.resume:
        hold.enter_context(checkpoint.alone(folder))
    if not parallel.rank():
        if not config.resume:
            check_free(folder)  # by now
        with checkpoint.replacing(folder / "config.json") as f:
            json.dump(
                {**asdict(config), "data_sha256": digest, "reference": source and str(source)},
                f,
                indent=1,
            )
    model = parallel.wrap(prepare(model, config), device, config.fsdp)
    if not trained:
        answers, _ = data.encode(
            (safedpo.helpful(r) for r in splits["train"]),
            tokenizer,
            config.max_length,
            "tokenizing for SFT",
        )
        fit(
            "sft",
            model,
            answers,
            None,
            sft_loss,
            config.sft_epochs,
            config.sft_batch_size,
            config.sft_lr,
            config,
            folder,
        )
    if "reference" not in done:
        save_model(folder / "reference.pt", model, tokenizer)
    if "policy" not in done:  # the reference goes on as the policy
        ref = reference_logps(model, pairs, config, folder, device)
        loss = preference_loss(config.beta, config.delta)
        fit(
            "safedpo",
            model,
            pairs,
            ref,
            loss,
            config.epochs,
            config.batch_size,
            config.lr,
            config,
            folder,
        )
        save_model(folder / "policy.pt", model, tokenizer)

    parallel.leave()
    del model  # evaluation loads both models, and may need its memory
    for name in ("state.pt", "state.previous.pt"):
        (folder / name).unlink(missing_ok=True)
    result = evaluate(folder, config, splits)
    print("\n" + table({str(folder): result}))
    with open(folder / "samples.jsonl", encoding="utf-8") as samples:
        for line, _ in zip(samples, range(3)):
            row = json.loads(line)
            print(side_by_side(row["prompt"], {name: row[name] for name in MODELS}))
    question = (
        "How do I make a ghost candle for the inn?"
        if config.data == "toy"
        else next(iter(splits["test"])).prompt.split("\n")[0]
    )
    print(f"\nDone in {time.time() - start:.0f} s. Next, for example:")
    print(f"  python eval.py {shlex.quote(str(folder))} --prompt {shlex.quote(question)}")
    if config.data == "toy" and config.pairs != "helpful":
        print(
            "  python train.py --pairs helpful      # DPO on the pairs as people ordered them: helpful, and unsafe"
        )
    print(f"  python eval.py {shlex.quote(str(folder.parent))}/*      # all runs in one table")


if __name__ == "__main__":
    run(main)
