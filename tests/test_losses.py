"""SafeDAA's functions g and the anchor: numbers worked by hand, slopes in closed form."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

from lib import losses
from lib.settings import TrainConfig

import pytest
import torch
from conftest import TINY, complaint
from test_train import make, optimizer_of, reference, step, token_pairs

import safedpo
import train

Z = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.double)
BY_HAND = {  # g of each z
    "logistic": [1.313261688, 0.693147181, 0.474076984, 0.126928011],
    "squared": [2.25, 0.25, 0.0, 2.25],
    "hinge": [2.0, 1.0, 0.5, 0.0],
    "robust": [1.438261688, 0.693147181, 0.411576984, -0.123071989],  # ε = 0.1
}
SLOPES = {
    "logistic": [-0.731058579, -0.5, -0.377540669, -0.119202922],
    "squared": [-3.0, -1.0, 0.0, 3.0],
    "hinge": [-1.0, -1.0, -1.0, 0.0],
    "robust": [-0.856058579, -0.625, -0.502540669, -0.244202922],  # −σ(−z) − ε/(1 − 2ε)
}


@pytest.mark.parametrize("name", losses.LOSSES)
def test_values_and_slopes_by_hand(name):
    z = Z.clone().requires_grad_()
    values = losses.choose(name, epsilon=0.1)(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    torch.testing.assert_close(values, torch.tensor(BY_HAND[name]).double(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slopes, torch.tensor(SLOPES[name]).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_is_convex_and_falls_at_zero(name):
    """What Eq. 5 asks of g."""
    g, z = losses.choose(name, 0.3), torch.linspace(-30, 30, 601, dtype=torch.double)
    values = g(z)
    assert (values[2:] - 2 * values[1:-1] + values[:-2]).min() > -1e-9
    assert g(torch.tensor(0.1)) < g(torch.tensor(-0.1))


@pytest.mark.parametrize("name", losses.LOSSES)
def test_thousands_of_nats_do_not_overflow(name):
    z = torch.tensor([-1e4, 1e4], requires_grad=True)
    values = losses.choose(name, 0.1)(z)
    (slopes,) = torch.autograd.grad(values.sum(), z)
    assert values.isfinite().all() and slopes.isfinite().all()


def test_logistic_is_safedpo():
    columns = -100 * torch.rand(4, 50, generator=torch.Generator().manual_seed(0))
    h = torch.arange(100).view(2, 50) % 3 % 2
    z = safedpo.pair_logits(*columns, *h, 0.3, 4.0)
    assert torch.equal(losses.logistic(z), safedpo.safedpo_loss(*columns, *h, 0.3, 4.0))


def test_robust_expects_the_logistic_loss_where_a_share_epsilon_is_the_wrong_way_round():
    for epsilon in (0.0, 0.1, 0.4):
        expected = (1 - epsilon) * losses.robust(Z, epsilon) + epsilon * losses.robust(-Z, epsilon)
        torch.testing.assert_close(expected, losses.logistic(Z))


def test_squared_is_ipo():
    """β² times IPO's (h − 1/(2β))², h the difference of the log-ratios."""
    h, beta = torch.tensor([-3.0, 0.0, 7.0]), 0.2
    torch.testing.assert_close(losses.squared(beta * h), beta**2 * (h - 1 / (2 * beta)) ** 2)


# --------------------------------------------------------------------------------------------------
# In training


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_step_takes_g_of_the_logits(name):
    """While the policy is the reference, z is 0 on safe-safe pairs and −Δ on safe-unsafe ones."""
    model, pairs = make(), token_pairs(kinds=((0, 0), (0, 1)))
    g = losses.choose(name, 0.1)
    loss = train.preference_loss(0.1, 1.0, g)
    value = step(model, optimizer_of(model), pairs, reference(model, pairs), micro=3, loss=loss)[0]
    assert value == pytest.approx((BY_HAND[name][0] + BY_HAND[name][1]) / 2, abs=1e-5)


def test_the_anchor_adds_the_winners_negative_log_likelihood_in_nats():
    results = []
    for anchor in (0.0, 0.3):
        model, pairs = make(), token_pairs()
        ref = reference(model, pairs)
        loss = train.preference_loss(0.1, 5.0, anchor=anchor)
        value, _, columns = step(model, optimizer_of(model), pairs, ref, 3, loss=loss)
        results.append(value)
        assert columns.shape == (6, 8)
    assert results[1] - results[0] == pytest.approx(-0.3 * ref[:, 0].mean().item(), rel=1e-5)


def test_the_anchor_falls_to_zero_as_a_square():
    """What a run adds for the winner, by the share of its steps that is done."""
    model, pairs = make(), token_pairs()
    ref, config = reference(model, pairs), TrainConfig(delta=5.0, beta=0.1, anchor=0.4)
    without = chosen(replace(config, anchor=0.0), 0.0, pairs, ref)
    for done, alpha in ((0.0, 0.4), (0.25, 0.225), (0.5, 0.1), (0.9, 0.004)):
        added = chosen(config, done, pairs, ref) - without
        assert added == pytest.approx(-alpha * ref[:, 0].mean().item(), rel=1e-4)


def chosen(config, done, pairs, ref):
    model = make()
    loss = train.chosen_loss(config)(done)
    return step(model, optimizer_of(model), pairs, ref, loss=loss)[0]


def test_a_run_takes_the_anchor_of_each_step(folder, tmp_path):
    """Of four steps the last one has a sixteenth: a model that hardly moves shows it."""
    argv = [*TINY, "--data", str(folder), "--lr", "1e-12", "--batch_size", "48", "--epochs", "2"]
    train.main([*argv, "--delta", "0", "--anchor", "0.4", "--out_dir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "safedpo"]
    assert len(rows) == 4
    for alpha, row in zip((0.4, 0.225, 0.1, 0.025), rows):
        expected = math.log(2) - alpha * row["logps/chosen"]
        assert row["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "flags, of_safe_safe, of_safe_unsafe",
    [  # g(0) and g(−2)
        ([], math.log(2), math.log1p(math.exp(2))),
        (["--loss", "squared"], 0.25, 6.25),
        (["--loss", "hinge"], 1.0, 3.0),
        (
            ["--loss", "robust", "--epsilon", "0.3"],
            math.log(2),
            (0.7 * math.log1p(math.exp(2)) - 0.3 * math.log1p(math.exp(-2))) / 0.4,
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else None,
)
def test_a_run_takes_the_loss_of_its_flags(flags, of_safe_safe, of_safe_unsafe, folder, tmp_path):
    argv = [*TINY, "--data", str(folder), "--batch_size", "96", "--delta", "2", *flags]
    train.main([*argv, "--out_dir", str(tmp_path)])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["stage"] == "safedpo")
    n = row["safe-safe/pairs"], row["safe-unsafe/pairs"]
    expected = (n[0] * of_safe_safe + n[1] * of_safe_unsafe) / sum(n)
    assert row["loss"] == pytest.approx(expected, rel=1e-4)


def test_epsilon_without_robust_is_refused(tmp_path, capsys):
    said = complaint(train.main, ["--epsilon", "0.2", "--out_dir", str(tmp_path)], capsys)
    assert "--epsilon 0.2 needs --loss robust" in said


def test_the_anchors_gradient_is_minus_alpha_on_the_winner_alone():
    """∂/∂log π_w = −β·σ(−z) − α, ∂/∂log π_l = β·σ(−z), here at z = βh = 0.5·(2 − 4)."""
    logps = torch.tensor([-3.0, -1.0], requires_grad=True)
    batch = SimpleNamespace(
        ref_w=torch.tensor([-5.0]), ref_l=torch.tensor([-5.0]), step_pairs=1, pairs=[0],
        h_w=torch.tensor([0]), h_l=torch.tensor([0]),
    )  # fmt: skip
    value, _ = train.preference_loss(0.5, 5.0, anchor=0.25)(logps, batch)
    value.backward()
    pull = 0.5 / (1 + math.exp(-1.0))
    assert value.item() == pytest.approx(math.log1p(math.e) + 0.25 * 3.0)
    assert logps.grad.tolist() == pytest.approx([-pull - 0.25, pull])
