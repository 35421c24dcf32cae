"""Teach a transformer to be safe: SFT gives the reference, SafeDPO gives the policy.

python train.py --delta 5                                         the toy village, on a laptop
python train.py --pairs helpful                                   a baseline
python train.py --init_from Qwen/Qwen2.5-1.5B-Instruct --data my_pairs --lr 1e-6 --beta 0.1
                                                                  your model and your data
python train.py --resume --out_dir runs/toy-safedpo-delta5        go on with a run
"""

import math
import time
from dataclasses import replace

from lib import checkpoint, initial, losses, memory, parallel, policy, records, report, runs
from lib.device import autocast, prepare
from lib.flags import parse, run
from lib.metrics import preference_metrics
from lib.settings import SIZE_FLAGS, TrainConfig
from lib.stage import Stage
from lib.watch import Watch

import torch

import data
import safedpo
from eval import evaluate
from model import move

# --------------------------------------------------------------------------------------------------
# One step


def sft_loss(logps, batch):
    """−log π(y|x), mean over the step's answer tokens, nats; and no columns, (0, B), to log."""
    return -logps.sum() / batch.step_tokens, logps.new_zeros(0, len(batch.h_w))


def over_pairs(loss_of_pairs):
    """The mean of loss_of_pairs, (B,), over the step's pairs; and what preference_metrics are made
    of, (6, B)."""

    def loss(logps, batch):
        logp_w, logp_l = logps.view(-1, 2).T
        columns = logp_w, logp_l, batch.ref_w, batch.ref_l, batch.h_w, batch.h_l
        of_pairs = loss_of_pairs(*columns, batch.pairs)
        return of_pairs.sum() / batch.step_pairs, torch.stack(columns).detach()

    return loss


def preference_loss(beta, delta, g=losses.logistic, anchor=0.0):
    """g of Eq. 12's logits, by default Eq. 12 itself, plus anchor times −log π(y_w|x)."""

    def of_pairs(logp_w, logp_l, ref_w, ref_l, h_w, h_l, _):
        z = safedpo.pair_logits(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta)
        return g(z) - anchor * logp_w

    return over_pairs(of_pairs)


def chosen_loss(config, *_):
    """The preference loss that the flags ask for, as a function of the share of the steps done.

    The anchor falls as (1 − done)²: with a constant one another policy than Eq. 9 would be best.
    """
    g = losses.choose(config.loss, config.epsilon)

    def loss_at(done):
        anchor = config.anchor * (1 - done) ** 2
        return preference_loss(config.beta, config.delta, g, anchor)

    return loss_at


def train_step(model, optimizer, scaler, batches, loss_function, grad_clip, precision):
    """One optimizer step over a list of micro-batches, whose losses add up to the step's.

    Returns the loss, the gradient's norm, and the loss function's columns of all the step's pairs.
    FloatingPointError, before any weight changes, if one of the first two is no number.
    """
    device = next(model.parameters()).device
    shares, columns = [], []
    with precision:  # one context for all micro-batches: autocast casts weights once a step
        for batch in parallel.sync_on_last(model, batches):
            batch = move(batch, device)
            loss, of_pairs = loss_function(model(batch.rows), batch)
            parallel.backward(scaler.scale(loss))
            shares.append(loss.detach())
            columns.append(of_pairs)
    scaler.unscale_(optimizer)
    norm = parallel.clip_gradients(model, grad_clip)
    *values, norm = torch.stack([*shares, norm]).tolist()  # here the device is waited for
    for value, batch in zip(values, batches):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} on pairs {batch.pairs}")
    if not scaler.is_enabled() and not math.isfinite(norm):  # a scaler skips such a step by itself
        numbers = [i for batch in batches for i in batch.pairs]
        raise FloatingPointError(f"the gradient's norm is {norm} on pairs {numbers}")
    scaler.step(optimizer)
    scaler.update()
    parallel.clear_gradients(model, optimizer)
    loss, columns = parallel.gather(sum(shares), torch.cat(columns, 1), batches[0].step_pairs)
    return loss, norm, columns


def learning_rate(step, steps, peak, warmup):
    """Linear from 0 over the first `warmup` share of the steps, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def make_optimizer(model, weight_decay, beta2):
    """AdamW; weight decay on matrices only."""
    weights = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in weights if p.dim() >= 2]
    others = [p for p in weights if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)


# --------------------------------------------------------------------------------------------------
# The loop


def fit(stage_name, model, pairs, ref, loss_at, config, folder, watch):
    """Train the model in place: the recipe of both stages, "sft" and "safedpo".

    pairs: token pairs. ref: (n, 2) log-probs of their answers under π_ref, or None. loss_at: the
    share of the steps done → the loss function of the next step. watch: shows the user what
    happens.
    """
    device = torch.device(config.device)
    precision = autocast(device, config.dtype)
    optimizer = make_optimizer(model, config.weight_decay, config.beta2)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    per_epoch = data.steps_per_epoch(pairs, config.batch_size)
    steps = config.epochs * per_epoch
    about = stage_name, folder, model, optimizer, scaler, steps, config.save_every
    stage = Stage(*about, watch)
    todo = range(stage.first_step, steps)
    model.train()
    with stage:
        for step, batches in data.prefetch(step_batches(pairs, ref, todo, config)):
            lr = learning_rate(step, steps, config.lr, config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, norm, columns = train_step(
                model,
                optimizer,
                scaler,
                batches,
                loss_at(step / steps),
                config.grad_clip,
                precision,
            )
            metrics = {"epoch": (step + 1) / per_epoch, "loss": loss}
            if len(columns):
                metrics |= preference_metrics(*columns, config.beta)
            metrics |= {"grad_norm": norm, "learning_rate": lr}
            stage.finish_step(metrics, sum(len(batch.rows.tokens) for batch in batches))
    model.eval()


def step_batches(pairs, ref, steps, config):
    """(step, its micro-batches) of each step: this process's share of the step's pairs."""
    sizes = config.batch_size, config.micro_batch_size
    mine = parallel.rank(), parallel.size()
    for step in steps:
        yield step, data.step_batches(pairs, step, *sizes, config.seed, ref, *mine)


# --------------------------------------------------------------------------------------------------
# The recipe


def main(argv=None, loss=chosen_loss):
    parallel.join()
    config, folder = runs.open_run(parse(TrainConfig, argv, __doc__))
    with runs.claim(folder, config) as lock:
        train(config, folder, lock, loss)


def train(config, folder, lock, loss):
    """The whole run. Whatever can be refused is refused before runs.begin writes the first file.

    loss(config, pairs, tokenizer, reference) makes the second stage's loss_at.
    """
    start, device = time.time(), torch.device(config.device)
    splits = data.load(config.data)
    digest, findings = records.survey(splits)
    print(f"{config.data}: " + "\n  ".join(findings))

    done = runs.done_before(config, digest, folder)
    at_first = torch.device("cpu") if config.fsdp else device  # it may not fit on one device
    model, tokenizer, is_reference = initial.starting_model(
        config, splits["train"], done.reference, at_first
    )
    pairs = data.training_pairs(splits, tokenizer, config)  # through T
    if config.init_from:
        config = replace(config, **{name: getattr(model.config, name) for name in SIZE_FLAGS})
    steps = config.epochs * data.steps_per_epoch(pairs, config.batch_size)
    held_out = data.prompts(splits["test"], tokenizer, config.max_length, config.eval_prompts)
    report.warn_before(config, steps, len(held_out), bool(tokenizer.files), bool(model.adapters))
    largest = data.largest_batch(pairs, config.micro_batch_size)
    memory.tell(model, config, largest, list(held_out.values()))
    runs.begin(folder, config, digest, done.borrowed, lock)
    model = parallel.wrap(prepare(model, config), device, config.fsdp, config.dtype)
    watch = Watch(config, held_out, tokenizer)

    if not is_reference:  # SFT
        answers = data.sft_pairs(splits["train"], tokenizer, config)
        sft = dict(epochs=config.sft_epochs, batch_size=config.sft_batch_size, lr=config.sft_lr)
        fit("sft", model, answers, None, lambda _: sft_loss, replace(config, **sft), folder, watch)
    if not done.has_reference:
        policy.save_model(folder / "reference.pt", model, tokenizer)
    if not done.has_policy:  # SafeDPO: the reference goes on as the policy
        ref = reference_logps(model, pairs, config, folder) if steps else None
        loss_at = loss(config, pairs, tokenizer, model)
        fit("safedpo", model, pairs, ref, loss_at, config, folder, watch)
        policy.save_model(folder / "policy.pt", model, tokenizer)
    del model  # evaluation may need its memory
    runs.end(folder)

    result = evaluate(folder, config, splits)
    parallel.leave()
    print(report.first_look(folder, config, result))
    report.warn_after(result)
    report.draw_curves(folder)
    print(f"\nDone in {time.time() - start:.0f} s.")


def reference_logps(model, pairs, config, folder):
    """(n, 2) log-probs of winners and losers under π_ref: constants, computed once and kept."""
    path = folder / "ref_logps.pt"
    ref = checkpoint.load_last(path).get("ref")
    if not isinstance(ref, torch.Tensor) or ref.shape != (len(pairs), 2):
        device, examples = torch.device(config.device), data.Examples(pairs)
        ref = policy.log_probs(model, examples, device, config.dtype, "reference log-probs")
        checkpoint.save(path, {"ref": ref})
    return ref


if __name__ == "__main__":
    run(main)
