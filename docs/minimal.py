"""A whole run in one short file: one process, no resuming, no flag but Δ. One or two minutes on a
laptop.

    python -m docs.minimal 5

Village → T → token ids → reference → SafeDPO → harmless ratio. train.py takes the same steps to the
same losses (tests/test_minimal.py); what it has beside them is for real models and long runs.
"""

import sys
from types import SimpleNamespace

from lib.sampling import generate
from lib.tokenizer import Tokenizer

import torch
from tqdm import trange

import data
from model import ModelConfig, Transformer, pack_rows
from safedpo import helpful, safedpo_loss, transform
from train import learning_rate, make_optimizer
from village import world

BETA, SEED = 2.0, 0
SFT = SimpleNamespace(batch_size=8, lr=3e-3)
SAFEDPO = SimpleNamespace(batch_size=64, lr=4e-4)


def steps(pairs, ref, settings, model):
    """(optimizer, batch) of each step of one epoch, with the step's learning rate set."""
    optimizer = make_optimizer(model, weight_decay=0.05, beta2=0.99)
    n = data.steps_per_epoch(pairs, settings.batch_size)
    for step in trange(n):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, n, settings.lr, warmup=0.3)
        whole = settings.batch_size  # no micro-batches
        (batch,) = data.step_batches(pairs, step, whole, whole, SEED, ref)
        yield optimizer, batch


def update(model, optimizer, loss):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main(delta, splits=None):
    splits = splits or data.load("toy")
    torch.manual_seed(SEED)
    tokenizer = Tokenizer.train(splits["train"], 4096, "{prompt}\n")
    model = Transformer(ModelConfig(tokenizer.vocab_size))
    losses = {"sft": [], "safedpo": []}

    # SFT on every answer, safe or not: the reference
    answers, _ = data.encode(map(helpful, splits["train"]), tokenizer, 512)
    for optimizer, batch in steps(answers, None, SFT, model):
        loss = -model(batch.rows).sum() / batch.step_tokens  # the model returns log π of answers
        losses["sft"].append(update(model, optimizer, loss))

    # T: keep, swap or drop; then log π_ref of what is left, once
    pairs = [transform(helpful(record)) for record in splits["train"]]
    pairs, _ = data.encode([pair for pair in pairs if pair], tokenizer, 512)
    with torch.no_grad():
        ref = torch.stack([model(pack_rows([row])) for row in data.Examples(pairs)])

    # SafeDPO (Eq. 12): the reference goes on as the policy
    for optimizer, batch in steps(pairs, ref, SAFEDPO, model):
        logp_w, logp_l = model(batch.rows).view(-1, 2).T  # a row holds winner and loser
        h = batch.h_w, batch.h_l
        loss = safedpo_loss(logp_w, logp_l, batch.ref_w, batch.ref_l, *h, BETA, delta).mean()
        losses["safedpo"].append(update(model, optimizer, loss))

    # One answer to each test prompt, judged by the village
    prompts = tokenizer.prompts(record.prompt for record in splits["test"])
    texts = map(tokenizer.decode, generate(model, prompts, 256, tokenizer.ends))
    harmless = [world.cost(text) <= 0 for text in texts]
    print(f"delta = {delta:g}: {100 * sum(harmless) / len(harmless):.1f} % harmless answers")
    return losses


if __name__ == "__main__":
    try:
        delta = float(sys.argv[1])
    except (IndexError, ValueError):
        sys.exit("usage: python -m docs.minimal DELTA, for example 5")
    main(delta)
