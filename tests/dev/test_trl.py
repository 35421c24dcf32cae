"""The same weights and pairs through TRL's DPOTrainer: step after step the same loss, gradient norm
and weights."""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

from lib import peers
from lib.device import autocast
from lib.policy import log_probs

import pytest
import torch
from conftest import ROOT, complaint
from test_peers import EOS, both, copy_weights

import bench
import data
import train
from conformance import run
from safedpo import Pair

CPU, BETA, STEPS = torch.device("cpu"), 0.5, 5
ADAMW = {"adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.0, "learning_rate": 1e-3}


@dataclass
class Sizes:
    steps: int = STEPS
    device: str = "cpu"
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0


def token_pairs(n=8):
    g = torch.Generator().manual_seed(1)

    def ids():
        length = int(torch.randint(1, 9, (1,), generator=g))
        return torch.randint(1, EOS, (length,), generator=g).tolist()

    return data.TokenPairs(Pair(ids(), ids() + [EOS], ids() + [EOS], 0, i % 2) for i in range(n))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--trl_batch_size", "3"], "--trl_batch_size 3: expected a divisor of --batch_size 8"),
        (["--init_from", "RUN"], "is a checkpoint of ours; expected a Hugging Face folder"),
    ],
)
def test_what_trl_cannot_take_is_said(flags, message, finished, capsys):
    flags = [str(finished) if flag == "RUN" else flag for flag in flags]
    assert message in complaint(bench.main, ["--vs", "trl", *flags], capsys)


@pytest.mark.parametrize("delta", [0.0, 5.0])
def test_five_steps_equal_trls(delta):
    net, peer = both()
    pairs = token_pairs()
    trainer = peers.trl_trainer(
        peer, pairs, Sizes(), beta=BETA, per_device_train_batch_size=len(pairs), **ADAMW
    )
    # TRL has no Δ. A reference that gives the winner (h_l − h_w)·Δ/β nats more has the same logits.
    dataset = trainer.train_dataset
    margins = [(p.h_l - p.h_w) * delta / BETA for p in pairs]
    shifted = [ref + margin for ref, margin in zip(dataset["ref_chosen_logps"], margins)]
    trainer.train_dataset = dataset.remove_columns("ref_chosen_logps").add_column(
        "ref_chosen_logps", shifted
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]

    ref = log_probs(net, [(p.x, [p.y_w, p.y_l]) for p in pairs], CPU, "float32")
    optimizer, scaler = (
        train.make_optimizer(net, 0.0, 0.99),
        torch.amp.GradScaler("cpu", enabled=False),
    )
    loss, precision = train.preference_loss(BETA, delta), autocast(CPU, "float32")
    for group in optimizer.param_groups:
        group["lr"] = ADAMW["learning_rate"]
    assert len(theirs) == STEPS
    for step in range(STEPS):
        batches = data.step_batches(pairs, step, 8, 3, 0, ref)
        value, norm, _ = train.train_step(
            net, optimizer, scaler, batches, loss, trainer.args.max_grad_norm, precision
        )
        assert value == pytest.approx(theirs[step]["loss"], rel=1e-4)
        assert norm == pytest.approx(theirs[step]["grad_norm"], rel=1e-4)
    expected, _ = both()
    copy_weights(peer, expected)
    for (name, a), b in zip(net.named_parameters(), expected.parameters()):
        assert (a - b).norm() <= 1e-4 * b.norm(), name


def test_the_pages_block_trains_with_delta(folder, tmp_path, monkeypatch):
    """The block on docs/real_models.md: ln 2 on safe-safe pairs at first, softplus(Δ) on others."""
    from test_pretrained import make
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make(tmp_path / "hf", "qwen2")
    page = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    (block,) = [block for block in blocks if "DPOTrainer" in block]
    small = (
        f"output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False, max_steps=1, logging_steps=1, "
        "per_device_train_batch_size=96, report_to='none', "
    )
    block = block.replace("PKU-SafeRLHF-30K", str(folder))
    block = block.replace("DPOConfig(b", f"DPOConfig({small}b")
    names = {
        "model": AutoModelForCausalLM.from_pretrained(tmp_path / "hf"),
        "tokenizer": AutoTokenizer.from_pretrained(tmp_path / "hf"),
    }
    exec(block, names)
    margins = [row["shift"] * names["beta"] for row in names["rows"]]
    assert set(margins) == {0.0, 10.0}
    expected = sum(math.log1p(math.exp(margin)) for margin in margins) / len(margins)
    assert names["trainer"].state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


class Says(torch.nn.Module):
    """A model whose answers have one token, and the log-probabilities that it is given."""

    def __init__(self, logp_w, logp_l):
        super().__init__()
        self.logps = torch.nn.Parameter(torch.tensor([*logp_w, *logp_l]))

    def forward(self, input_ids, **_):
        nothing = torch.zeros(len(input_ids), 1)  # what TRL logs beside the loss
        others = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        return SimpleNamespace(log_probs=self.logps[:, None], **others)


def through_trl(trainer, logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    """[(TRL's loss, its derivatives)] of each pair, with Δ in the reference as on the page."""
    trainer.beta, found = beta, []
    for w, l, rw, rl, hw, hl in zip(logp_w, logp_l, ref_w, ref_l, h_w, h_l):
        model = Says([w], [l])
        inputs = {
            "input_ids": torch.tensor([[0, 1], [0, 2]]),
            "attention_mask": torch.ones(2, 2, dtype=torch.long),
            "completion_mask": torch.tensor([[0, 1], [0, 1]]),
            "ref_chosen_logps": torch.tensor([rw + (hl - hw) * delta / beta]),
            "ref_rejected_logps": torch.tensor([rl]),
        }
        loss = trainer._compute_loss(model, inputs, False)
        (slope,) = torch.autograd.grad(loss, model.logps)
        found.append((loss.item(), *slope.tolist()))
    return found


def test_trl_passes_the_vectors():
    trainer = peers.trl_trainer(both()[1], token_pairs(), Sizes(), beta=BETA, **ADAMW)
    trainer.model.eval()
    functions = {
        "loss": lambda **given: [each[0] for each in through_trl(trainer, **given)],
        "gradient": lambda **given: list(map(list, zip(*through_trl(trainer, **given))))[1:],
    }
    assert run.failures(functions) == []
