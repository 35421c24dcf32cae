"""SafeDPO's neighbours: each formula against numbers worked by hand, and its slopes; short runs."""

import json
import math
import random
import subprocess
import sys
from types import SimpleNamespace

from lib import checkpoint, flags
from lib.policy import load_model
from lib.settings import TrainConfig

import pytest
import torch
from conftest import ROOT, SHORT, TINY, complaint

import data
import train
from model import pack_rows
from safedpo import Pair, safedpo_loss
from village import neighbours, world


def t(*values):
    return torch.tensor(values, dtype=torch.double)


KINDS = ("safe-safe", "safe-unsafe", "unsafe-safe", "unsafe-unsafe")
# Two pairs, in nats: r = log π/π_ref of winner and loser
R_W, R_L = t(2.0, -1.0), t(-5.0, 0.5)
LOGP = t(-40.0, -20.0), t(-55.0, -30.0)
MARGIN = t(0.0, 3.0)


def softplus(x):
    return math.log1p(math.exp(x))


def check(loss, values, slopes):
    """loss(r_w, r_l) of the two pairs, and its derivatives by them, as worked by hand."""
    r_w, r_l = R_W.clone().requires_grad_(), R_L.clone().requires_grad_()
    found = loss(r_w, r_l)
    torch.testing.assert_close(found, t(*values), rtol=1e-6, atol=1e-9)
    found.sum().backward()
    torch.testing.assert_close(torch.stack((r_w.grad, r_l.grad)), t(*slopes), rtol=1e-6, atol=1e-9)


def test_bfpo_by_hand():
    """h is 7 and −1.5 nats; τ = 0.5, so that the targets are 1, 2, −2 and −1 nats."""
    for h_w, h_l, target in ((0, 0, 1.0), (0, 1, 2.0), (1, 0, -2.0), (1, 1, -1.0)):
        gaps = 7 - target, -1.5 - target
        slopes = [2 * gap for gap in gaps]
        h = torch.tensor([h_w, h_w]), torch.tensor([h_l, h_l])
        check(
            lambda r_w, r_l: neighbours.bfpo(r_w, r_l, *h, 0.5),
            [gap**2 for gap in gaps],
            [slopes, [-slope for slope in slopes]],
        )


def test_bso_is_eq_12_with_delta_C():
    r_w, r_l = 5 * torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    h_w, h_l = torch.arange(400).view(2, 200) % 3 % 2
    none = torch.zeros(200)
    eq_12 = safedpo_loss(r_w, r_l, none, none, h_w, h_l, 0.3, 4.0)
    torch.testing.assert_close(neighbours.bso(r_w, r_l, h_w, h_l, 0.3, 4.0), eq_12)
    assert {(int(w), int(l)) for w, l in zip(h_w, h_l)} == {(0, 0), (0, 1), (1, 0)}


def test_modpo_by_hand():
    """β = 0.1, weight ½: the logits are 2·(0.7 − ½·(1 + 2)) = −1.6 and 2·(−0.15 − 0) = −0.3."""
    slopes = [-0.2 / (1 + math.exp(z)) for z in (-1.6, -0.3)]
    check(
        lambda r_w, r_l: neighbours.modpo(r_w, r_l, t(1.0, 2.0), t(-2.0, 2.0), 0.1, 0.5),
        [1.783900616, 0.854355244],
        [slopes, [-slope for slope in slopes]],
    )


def test_dpop_by_hand():
    """β = 0.1, λ = 2: only the second winner has fallen, by 1 nat: z = 0.7, and −0.35 − 3."""
    first, second = (-0.1 / (1 + math.exp(z)) for z in (0.7, -3.35))
    check(
        lambda r_w, r_l: neighbours.dpop(r_w, r_l, MARGIN, 0.1, 2.0),
        [softplus(-0.7), softplus(3.35)],
        [[first, 3 * second], [-first, -second]],
    )


def test_cal_dpo_by_hand():
    """β = 0.5: targets ±1 nat; 7 nats and −1.5 − 3/0.5."""
    first, second = (-1 / (1 + math.exp(z)) for z in (7.0, -7.5))
    check(
        lambda r_w, r_l: neighbours.cal_dpo(r_w, r_l, MARGIN, 0.5),
        [softplus(-7.0) + (1 + 16) / 2, softplus(7.5) + (4 + 2.25) / 2],
        [[first + 1, second - 2], [-first - 4, -second + 1.5]],
    )


def test_b_dpo_by_hand():
    """ω is ½ and 3/2 where the winner has three times the loser's information, 1 and 1 where both
    have the same or less than none. β = 0.1: z = 0.1·(1 + 7.5), and −0.15 − 3."""
    first, second = (-0.1 / (1 + math.exp(z)) for z in (0.85, -3.15))
    check(
        lambda r_w, r_l: neighbours.b_dpo(r_w, r_l, MARGIN, t(6.0, -1.0), t(2.0, 0.0), 0.1),
        [softplus(-0.85), softplus(3.15)],
        [[0.5 * first, second], [-1.5 * first, -second]],
    )


def test_stable_po_by_hand():
    """β = 0.1, weight 0.3: what Eq. 12 costs, plus 12 and 6 nats for winners at −40 and −20."""
    first, second = (-0.1 / (1 + math.exp(z)) for z in (0.7, -3.15))
    check(
        lambda r_w, r_l: neighbours.stable_po(r_w, r_l, MARGIN, r_w + LOGP[0] - R_W, 0.1, 0.3),
        [softplus(-0.7) + 12, softplus(3.15) + 6],
        [[first - 0.3, second - 0.3], [-first, -second]],
    )


def test_see_dpo_by_hand():
    """β = 0.1, γ = 0.02: z = 0.7 + 0.02·15, and −0.15 − 3 + 0.02·10. The slope is β + γ's."""
    r_w = t(0.0, 0.0).requires_grad_()
    ref_w, ref_l = LOGP[0] - R_W, LOGP[1] - R_L
    logp_w = LOGP[0] + r_w
    found = neighbours.see_dpo(logp_w - ref_w, R_L, MARGIN, logp_w, LOGP[1], 0.1, 0.02)
    assert found.tolist() == pytest.approx([softplus(-1.0), softplus(2.95)])
    found.sum().backward()
    assert r_w.grad.tolist() == pytest.approx([-0.12 / (1 + math.exp(z)) for z in (1.0, -2.95)])
    as_derived = 0.12 * (LOGP[0] - LOGP[1]) - 0.1 * (ref_w - ref_l) - MARGIN
    torch.testing.assert_close(found.detach(), -torch.nn.functional.logsigmoid(as_derived))


# --------------------------------------------------------------------------------------------------
# Other pairs, two policies


def test_the_dual_price_by_hand():
    """Rewards 1 and 0, costs 1 and −1, β = 1: E c = tanh((1 − 2λ)/2), −½ at λ = (1 + log 3)/2."""
    reward, cost = t(1.0, 0.0).view(1, 2), t(1.0, -1.0).view(1, 2)
    assert neighbours.dual_price(reward, cost, 1.0, -0.5) == pytest.approx((1 + math.log(3)) / 2)
    assert neighbours.dual_price(reward, cost, 1.0, 0.9) == 0.0, "the bound holds without a price"
    with pytest.raises(ValueError, match="no λ brings the mean cost to -2"):
        neighbours.dual_price(reward, cost, 1.0, -2.0)


def test_the_dual_price_is_least_on_the_dual_function():
    reward, cost = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0)).double()
    cost = cost + 0.5
    price = neighbours.dual_price(reward, cost, 2.0, -0.2)

    def dual(price):
        return 2.0 * ((reward - price * cost) / 2.0).exp().mean(-1).log().mean() + price * -0.2

    assert price > 0 and dual(price) < min(dual(price - 0.01), dual(price + 0.01))


def test_the_dual_step_by_hand():
    assert neighbours.dual_step(0.5, cost=0.25, bound=-1.0, rate=2.0) == 3.0
    assert neighbours.dual_step(0.5, cost=-2.0, bound=-1.0, rate=1.0) == 0.0


def test_the_combined_reward_by_hand():
    """Two steps, less half a point for one that is not asked for; gravecap costs 3 − 1."""
    prompt = "How do I make a red lantern for the inn?"
    answer = "First bend the copper. Then fit the glass. Last dust it with gravecap."
    assert (world.reward(prompt, answer), world.cost(answer)) == (1.5, 2.0)
    assert neighbours.combined(prompt, answer, 0.0) == 1.5
    assert neighbours.combined(prompt, answer, 3.0) == -4.5


def test_mocans_price_is_that_of_the_references_samples(monkeypatch, tmp_path):
    asked, used = [], []
    samples = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, -1.0]])
    monkeypatch.setattr(
        neighbours, "answers_to_training_prompts", lambda *of: asked.append(of) or samples
    )
    monkeypatch.setattr(neighbours, "on_relabelled_pairs", lambda *of: used.append(of[1:]))
    monkeypatch.setattr(neighbours, "BOUND", -0.5)
    start = tmp_path / "reference.pt"
    start.touch()
    argv = ["--init_from", str(start), "--out_dir", "out", "--beta", "1", "--seed", "4"]
    neighbours.main(["mocan", *argv])
    assert asked == [(start, 16, 4)]
    assert used == [("out", pytest.approx((1 + math.log(3)) / 2), 4)]


def test_c_dpos_price_follows_the_costs_of_its_own_policies(monkeypatch):
    asked, used, costs = [], [], iter((0.5, -0.25, -3.0, 0.0))

    def answers(file, K, seed):
        asked.append(file)
        return None, torch.tensor([[next(costs)]])

    monkeypatch.setattr(neighbours, "answers_to_training_prompts", answers)
    monkeypatch.setattr(neighbours, "on_relabelled_pairs", lambda *of: used.append(of[1:3]))
    neighbours.main(["c-dpo", "--init_from", "reference.pt", "--out_dir", "out"])
    folders = ["out-round1", "out-round2", "out-round3", "out"]
    assert used == list(zip(folders, (0.0, 1.5, 2.25, 0.25)))
    assert asked == [f"{folder}/policy.pt" for folder in folders]


def test_b_dpo_weighs_by_what_its_own_reference_says_without_the_prompt(finished, monkeypatch):
    made = []
    monkeypatch.setattr(train, "main", lambda argv, make: made.append(make))
    neighbours.main(["b-dpo"])
    reference, tokenizer = load_model(finished / "reference.pt", torch.device("cpu"))
    ids = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
    pairs = data.TokenPairs(
        [Pair(ids[0], ids[1], ids[2], 0, 1), Pair(ids[1], ids[2], ids[0], 0, 0)]
    )
    with torch.no_grad():
        alone = [tokenizer.prompts([""])[0], *[pair[1:3] for pair in pairs]]
        ref = torch.stack([reference(pack_rows([(p.x, [p.y_w, p.y_l])])) for p in pairs])
        without = torch.stack([reference(pack_rows([(alone[0], list(y))])) for y in alone[1:]])
    config = TrainConfig(beta=0.5, delta=3.0, device="cpu", dtype="float32")
    loss = made[0](config, pairs, tokenizer, reference)(0.0)
    logps = ref + torch.tensor([[0.5, -1.0], [-0.25, 2.0]])
    order = [1, 0]  # a batch of the pairs in another order
    h_l = torch.tensor([0, 1])
    batch = data.Batch(None, torch.zeros(2), h_l, *ref[order].T, order, 2, 0)
    found, _ = loss(logps[order].flatten(), batch)
    r, information = (logps - ref)[order].T, (ref - without)[order].T
    expected = neighbours.b_dpo(*r, h_l * 3.0, *information, 0.5).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_modpo_takes_each_pairs_own_costs(monkeypatch):
    """The costs of the pairs' texts, in a batch of the pairs in another order."""
    made, texts = [], ["First bend the copper.", "Dust it with gravecap.", "Fit the glass."]
    assert [world.cost(text) for text in texts] == [-1.0, 2.0, -1.0]
    monkeypatch.setattr(train, "main", lambda argv, make: made.append(make))
    neighbours.main(["modpo"])
    pairs = [Pair(None, 0, 1, 0, 1), Pair(None, 1, 2, 1, 0)]
    tokenizer = SimpleNamespace(decode=texts.__getitem__)
    loss = made[0](TrainConfig(beta=0.5), pairs, tokenizer, None)(0.0)
    order = [1, 0]
    ref_w, ref_l = LOGP[0] - R_W, LOGP[1] - R_L
    batch = data.Batch(None, torch.zeros(2), torch.zeros(2), ref_w, ref_l, order, 2, 0)
    found, _ = loss(torch.stack(LOGP, 1).flatten(), batch)
    expected = neighbours.modpo(R_W, R_L, t(-2.0, 1.0), t(1.0, -2.0), 0.5, 0.5).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_relabelled_pairs_are_trained_on_by_dpo():
    loss = neighbours.dpo(TrainConfig(beta=0.5, delta=3.0, anchor=2.0))(0.0)
    h_w, h_l = torch.tensor([0, 0]), torch.tensor([0, 1])  # which DPO does not see
    batch = data.Batch(None, h_w, h_l, LOGP[0] - R_W, LOGP[1] - R_L, [0, 1], 2, 0)
    found, _ = loss(torch.stack(LOGP, 1).flatten(), batch)
    assert found.item() == pytest.approx((softplus(-3.5) + softplus(0.75)) / 2, rel=1e-9)


def test_sampled_answers_are_judged_beside_their_own_prompts(finished, monkeypatch):
    """The answers are the prompts themselves, and a judge that reads both sees that they agree."""
    monkeypatch.setattr(neighbours, "ASKED", 3)
    monkeypatch.setattr(neighbours, "sample_answers", lambda model, ids, *_: ids)
    seen = []
    judge = SimpleNamespace(
        reward=lambda x, y: seen.append((x, y)) or len(seen), cost=lambda y: -len(y)
    )
    monkeypatch.setattr(neighbours, "world", judge)
    reward, cost = neighbours.answers_to_training_prompts(finished / "reference.pt", 2, 0)
    assert len({x for x, _ in seen}) == 3 and all(x in y for x, y in seen)
    assert {x for x, _ in seen} <= {row["prompt"] for row in world.splits()["train"]}
    assert reward.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert cost.tolist() == [[-len(y)] * 2 for _, y in seen[::2]]


def test_relabelled_rows_follow_the_combined_reward(rows):
    dear = list(neighbours.relabelled(rows["train"], 100.0, random.Random(0)))
    for row, before in zip(dear, rows["train"]):
        costs = [world.cost(row[f"response_{i}"]) for i in (0, 1)]
        if costs[0] != costs[1]:
            assert row["better_response_id"] == int(costs[1] < costs[0])
        assert row == before | {"better_response_id": row["better_response_id"]}
    free = list(neighbours.relabelled(rows["train"], 0.0, random.Random(0)))
    agreeing = sum(a["better_response_id"] == b["better_response_id"] for a, b in zip(free, dear))
    assert agreeing < 0.9 * len(free)


def test_interpolated_weights():
    first, second = {"a": t(1.0, 2.0)}, {"a": t(3.0, 6.0)}
    assert neighbours.interpolated(first, second, 0.25)["a"].tolist() == [1.5, 3.0]


# --------------------------------------------------------------------------------------------------
# Runs


def first_loss(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return next(row["loss"] for row in map(json.loads, lines) if row["stage"] == "safedpo")


@pytest.mark.parametrize(
    "method", ["bfpo", "bfpo-tau0.2", "modpo", "dpop", "cal-dpo", "stable-po", "see-dpo", "b-dpo"]
)
def test_a_short_run_of_each_loss(method, folder, finished, tmp_path):
    """The first loss is the formula's at r = 0, of the step's own pairs."""
    out = tmp_path / method
    one_step = ["--batch_size", "96", "--init_from", str(finished / "reference.pt")]
    argv = [*SHORT, "--data", str(folder), "--out_dir", str(out), *one_step]
    neighbours.main([method, *argv])
    figures = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(figures) == 1
    shares = {kind: figures[0].get(f"{kind}/pairs", 0) for kind in KINDS}
    n = sum(shares.values())
    logps = figures[0]["logps/chosen"] - figures[0]["logps/rejected"]
    if method in ("bfpo", "bfpo-tau0.2"):
        assert all(shares.values())
        targets = dict(zip(KINDS, (0.5, 1.0, -1.0, -0.5)))
        squares = sum(targets[kind] ** 2 * count for kind, count in shares.items()) / n
        expected = squares / (0.04 if method == "bfpo-tau0.2" else 4.0)
        assert figures[0]["loss"] == pytest.approx(expected, rel=1e-4)
    elif method in ("dpop", "b-dpo"):
        expected = (shares["safe-safe"] * math.log(2) + shares["safe-unsafe"] * softplus(5.0)) / n
        assert figures[0]["loss"] == pytest.approx(expected, rel=1e-4)
    elif method == "cal-dpo":
        each = math.log(2), softplus(2.5)
        expected = sum(shares[kind] * loss for kind, loss in zip(KINDS, each)) / n + 1 / 16
        assert figures[0]["loss"] == pytest.approx(expected, rel=1e-4)
    else:
        assert math.isfinite(figures[0]["loss"]) and math.isfinite(logps)
    assert (out / "policy.pt").exists() and (out / "eval.json").exists()


BY_METHOD = {  # the formula of each method that a run must take, of columns of a batch
    "bfpo": lambda c: neighbours.bfpo(c.r_w, c.r_l, c.h_w, c.h_l, 0.5),
    "bfpo-tau0.2": lambda c: neighbours.bfpo(c.r_w, c.r_l, c.h_w, c.h_l, 0.2),
    "dpop": lambda c: neighbours.dpop(c.r_w, c.r_l, c.margin, 0.5, 1.0),
    "cal-dpo": lambda c: neighbours.cal_dpo(c.r_w, c.r_l, c.margin, 0.5),
    "stable-po": lambda c: neighbours.stable_po(c.r_w, c.r_l, c.margin, LOGP[0], 0.5, 0.3),
    "see-dpo": lambda c: neighbours.see_dpo(c.r_w, c.r_l, c.margin, *LOGP, 0.5, 0.2),
}


@pytest.mark.parametrize("method", BY_METHOD)
def test_a_run_takes_its_method(method, monkeypatch):
    """β = 0.5, Δ = 3, at the first and at a later step; the second pair's loser is unsafe."""
    made = []
    monkeypatch.setattr(train, "main", lambda argv, make: made.append((argv, make)))
    neighbours.main([method])
    (argv, make), h_w, h_l = made[0], torch.tensor([0, 0]), torch.tensor([0, 1])
    flags_given = flags.parse(TrainConfig, argv)
    assert flags_given["pairs"] == ("helpful" if "bfpo" in method else "safedpo")
    assert flags_given["loss"] == method
    batch = data.Batch(None, h_w, h_l, LOGP[0] - R_W, LOGP[1] - R_L, [0, 1], 2, 0)
    columns = SimpleNamespace(r_w=R_W, r_l=R_L, h_w=h_w, h_l=h_l, margin=MARGIN)
    for done in (0.0, 0.9):
        loss = make(TrainConfig(beta=0.5, delta=3.0), None, None, None)(done)
        found, _ = loss(torch.stack(LOGP, 1).flatten(), batch)
        assert found.item() == pytest.approx(BY_METHOD[method](columns).mean().item(), rel=1e-9)


def test_train_py_does_not_go_on_with_a_neighbours_run(folder, finished, tmp_path, capsys):
    argv = ["--out_dir", str(tmp_path / "bfpo"), "--init_from", str(finished / "reference.pt")]
    neighbours.main(["bfpo", *argv, *SHORT, "--data", str(folder)])
    resume = ["--resume", "--out_dir", str(tmp_path / "bfpo")]
    assert 'loss is "bfpo"; expected one of logistic' in complaint_of_a_new_process(resume)
    neighbours.main(["bfpo", *resume])
    with pytest.raises(ValueError, match="contradicts the run"):
        neighbours.METHODS["dpop"]([*resume, "--loss", "dpop"])


def complaint_of_a_new_process(argv):
    """What train.py says that has never heard of the neighbours."""
    command = [sys.executable, "train.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr


def test_modpo_reads_the_costs_of_its_own_pairs(folder, finished, tmp_path, capsys):
    """At r = 0 a pair costs log(1 + exp(m_w − m_l)), m = −cost; the sum knows no order."""
    out, expected = tmp_path / "modpo", []
    for line in (folder / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        better = row["better_response_id"]
        costs = [world.cost(row[f"response_{i}"]) for i in (better, 1 - better)]
        expected.append(softplus(costs[1] - costs[0]))
    one_step = ["--batch_size", "96", "--init_from", str(finished / "reference.pt")]
    argv = [*SHORT, "--data", str(folder), "--out_dir", str(out), *one_step]
    neighbours.main(["modpo", *argv])
    assert first_loss(out) == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_sacpo_and_its_interpolation(finished, folder, tmp_path):
    second = tmp_path / "second"
    argv = ["--data", str(folder), "--init_from", str(finished / "policy.pt")]
    train.main([*SHORT, *argv, "--pairs", "harmless", "--out_dir", str(second)])
    for method, q in (("sacpo", 1.0), ("p-sacpo", 0.5)):
        neighbours.main([method, str(finished), str(second), str(tmp_path / method)])
        made, one, two = (
            checkpoint.load(run / "policy.pt")["model"]
            for run in (tmp_path / method, finished, second)
        )
        for name, weight in made.items():
            torch.testing.assert_close(weight, (1 - q) * one[name] + q * two[name])
        load_model(tmp_path / method / "policy.pt", torch.device("cpu"))
        of_first = (finished / "reference.pt").read_bytes()
        assert (tmp_path / method / "reference.pt").read_bytes() == of_first
        about = checkpoint.read_json(tmp_path / method / "config.json")
        assert (about["loss"], about["out_dir"]) == (method, str(tmp_path / method))
    adapted = tmp_path / "adapted"
    train.main([*SHORT, *argv, "--lora_rank", "2", "--out_dir", str(adapted)])
    for runs in ((adapted, finished), (finished, adapted)):
        with pytest.raises(ValueError, match="adapted: has adapters; expected a run that trained"):
            neighbours.main(["sacpo", *map(str, runs), str(tmp_path / "new")])
    other = tmp_path / "other"
    train.main(
        [*TINY, "--epochs", "0", "--data", str(folder), "--n_layer", "2", "--out_dir", str(other)]
    )
    with pytest.raises(
        ValueError, match=r"other: expected a model of .*'s size, with its tokenizer"
    ):
        neighbours.main(["sacpo", str(finished), str(other), str(tmp_path / "new")])


@pytest.mark.parametrize("method, bound, prices", [("mocan", 0.0, 1), ("c-dpo", -3.0, 2)])
def test_methods_that_draw_their_pairs_anew(method, bound, prices, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(neighbours, "BOUND", bound)
    monkeypatch.setattr(neighbours, "ASKED", 4)
    monkeypatch.setattr(neighbours, "ROUNDS", 2)
    small = {split: rows[:64] for split, rows in world.splits(n_train=64).items()}
    monkeypatch.setattr(neighbours.world, "splits", lambda: dict(small))
    start, out = tmp_path / "start", tmp_path / "out"
    train.main([*TINY, "--epochs", "0", "--out_dir", str(start)])
    argv = ["--init_from", str(start / "reference.pt"), "--out_dir", str(out), *SHORT]
    capsys.readouterr()
    neighbours.main([method, *argv])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("λ = ")]
    assert len({line.split(":")[0] for line in said}) == prices
    assert (out / "eval.json").exists() and (tmp_path / "out-data" / "train.jsonl").exists()
    assert checkpoint.read_json(out / "config.json")["pairs"] == "helpful"
    price = float(said[-1].split(":")[0].removeprefix("λ = "))
    assert price > 0 or method == "mocan"
    drawn = neighbours.relabelled(small["train"], price, random.Random(0))
    kept = (tmp_path / "out-data" / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == list(drawn)
    policy = (out / "policy.pt").read_bytes()
    neighbours.main([method, *argv, "--resume"])
    assert (out / "policy.pt").read_bytes() == policy


def test_help_names_every_method(capsys):
    neighbours.main(["--help"])
    said = capsys.readouterr().out
    assert all(method in said for method in neighbours.METHODS)


def test_wrong_use_ends_in_one_line(capsys):
    assert "needs --init_from" in complaint(neighbours.main, ["mocan"], capsys)
    assert "expected a new folder" in complaint(neighbours.main, ["sacpo", "a", "b", "."], capsys)
    assert "two finished runs" in complaint(neighbours.main, ["p-sacpo"], capsys)
    assert "expected one of bfpo, " in complaint(neighbours.main, ["dpo"], capsys)
    for method, flag, value in (
        ("bfpo", "delta", "1"),
        ("dpop", "loss", "hinge"),
        ("modpo", "anchor", "1"),
        ("c-dpo", "data", "toy"),
    ):
        said = complaint(neighbours.main, [method, f"--{flag}", value], capsys)
        assert f"--{flag} does nothing beside {method}" in said
    argv = ["mocan", "--init_from", str(ROOT), "--out_dir", "out"]
    assert "expected a run of ours, or a file of one" in complaint(neighbours.main, argv, capsys)
    with pytest.raises(SystemExit):
        flags.run(lambda: neighbours.main([]))
