"""The test vectors: this project passes them, and a wrong implementation fails those whose name
says what is wrong with it."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from conformance import make, ours, run
from safedpo import Pair, transform

OURS = {of: getattr(ours, of) for of in run.CONTENT["functions"]}
NAMES = {(vector["of"], vector["name"]) for vector in run.CONTENT["vectors"]}


def test_the_vectors_are_what_the_formulas_give():
    assert make.PATH.read_text(encoding="utf-8") == make.text()
    assert {of for of, _ in NAMES} == OURS.keys() and len(NAMES) == len(run.CONTENT["vectors"])


def test_the_vectors_are_plain_json():
    def refuse(name):
        raise ValueError(name)  # Infinity and NaN are no JSON

    json.loads(make.text(), parse_constant=refuse)


def test_this_project_passes():
    assert run.failures(OURS) == []


# --------------------------------------------------------------------------------------------------
# What goes wrong in implementations, one by one


def helpful(row):
    """The row as people ordered it."""
    y, better = (row["response_0"], row["response_1"]), row["better_response_id"]
    h = [int(not row[f"is_response_{i}_safe"]) for i in (0, 1)]
    return Pair(row["prompt"], y[better], y[1 - better], h[better], h[1 - better])


def as_vector(pair):
    return pair and {"winner": pair.y_w, "loser": pair.y_l, "h_w": pair.h_w, "h_l": pair.h_l}


def is_safe_read_as_h(row):
    pair = helpful(row)
    return as_vector(transform(pair._replace(h_w=1 - pair.h_w, h_l=1 - pair.h_l)))


def response_0_wins(row):
    return ours.transform(row | {"better_response_id": 0})


def safer_wins(row):
    return ours.transform(row | {"better_response_id": row["safer_response_id"]})


def both_unsafe_kept(row):
    return as_vector(transform(helpful(row)) or helpful(row))


def unsafe_winner_dropped(row):
    return None if helpful(row).h_w else ours.transform(row)


def labels_not_swapped(row):
    after, before = transform(helpful(row)), helpful(row)
    return as_vector(after and after._replace(h_w=before.h_w, h_l=before.h_l))


def margin_by_is_safe(h_w, h_l, **others):
    return ours.loss(h_w=[1 - h for h in h_w], h_l=[1 - h for h in h_l], **others)


def margin_unused(delta, **others):
    return ours.loss(delta=0.0, **others)


def delta_inside_beta(beta, delta, **others):
    return ours.loss(beta=beta, delta=beta * delta, **others)


def margin_where_both_are_unsafe(logp_w, logp_l, ref_w, ref_l, h_w, h_l, beta, delta):
    """and β only there."""
    w, l, ref_w, ref_l, h_w, h_l = map(torch.tensor, (logp_w, logp_l, ref_w, ref_l, h_w, h_l))
    h = (w - ref_w) - (l - ref_l)
    return (-F.logsigmoid(torch.where((h_w * h_l).bool(), beta * h - delta, h))).tolist()


def no_reference(ref_w, ref_l, **others):
    return ours.loss(ref_w=[0.0] * len(ref_w), ref_l=[0.0] * len(ref_l), **others)


def log_of_sigmoid(**given):
    """σ(−35965) is 0, and its logarithm −∞."""
    return (-torch.exp(-torch.tensor(ours.loss(**given))).log()).tolist()


def overflows(**given):
    """log(1 + exp z) − z: exp z is too large behind z = 709."""
    return [math.log(1 + math.exp(z)) - z for z in make.each_pair(given)]


def slope_overflows(**given):
    shares = [1 - math.exp(z) / (1 + math.exp(z)) for z in make.each_pair(given)]
    by_winner = [-given["beta"] * share for share in shares]
    return [by_winner, [-slope for slope in by_winner]]


def beta_missing_where_the_winner_is_unsafe(beta, h_w, **others):
    of_both = [ours.loss(beta=b, h_w=h_w, **others) for b in (beta, 1.0)]
    return [of_both[int(h)][i] for i, h in enumerate(h_w)]


def better_and_safer(row):
    return ours.transform(
        row | {"better_response_id": row["better_response_id"] & row["safer_response_id"]}
    )


def logits_of_the_first_row(logits, **given):
    return ours.logps(logits=[logits[0]] * len(logits), **given)


def token_0_fills_up(tokens, mask, **given):
    mask = [[m * (t != 0) for t, m in zip(*row)] for row in zip(tokens, mask)]
    return ours.logps(tokens=tokens, mask=mask, **given)


def every_eos_counts(tokens, mask, **given):
    mask = [[max(m, int(t == 3)) for t, m in zip(*row)] for row in zip(tokens, mask)]
    return ours.logps(tokens=tokens, mask=mask, **given)


def log_of_softmax(logits, tokens, mask):
    of_tokens = torch.tensor(logits).softmax(-1).log()[:, :-1]
    found = of_tokens.gather(-1, torch.tensor(tokens)[:, 1:, None])[..., 0]
    return found.where(torch.tensor(mask)[:, 1:].bool(), 0.0).sum(-1).tolist()


def clamped(logp_w, ref_w, logp_l, ref_l, **others):
    """Winners gain 50 nats at most, and losers lose 50 at most."""
    logp_w = [min(p, ref + 50) for p, ref in zip(logp_w, ref_w)]
    logp_l = [max(p, ref - 50) for p, ref in zip(logp_l, ref_l)]
    return ours.loss(logp_w=logp_w, ref_w=ref_w, logp_l=logp_l, ref_l=ref_l, **others)


def labels_of_the_first_winner(h_w, **others):
    return ours.loss(h_w=[h_w[0]] * len(h_w), **others)


def penalty_of_50(reward, unsafe, **others):
    reward = [r - 50 * h for r, h in zip(reward, unsafe)]
    return ours.optimum(reward=reward, unsafe=[0] * len(unsafe), **others)


def slope_without_beta(beta, **others):
    return [[d / beta for d in side] for side in ours.gradient(beta=beta, **others)]


def token_logps(logits, tokens):
    logp = torch.tensor(logits)[:, :-1].log_softmax(-1)
    return logp.gather(-1, torch.tensor(tokens)[:, 1:, None]).squeeze(-1)


def means(mask, **given):
    return [sum_ / sum(row) for sum_, row in zip(ours.logps(mask=mask, **given), mask)]


def without_eos(tokens, mask, **given):
    mask = [[m * (t != 3) for t, m in zip(*row)] for row in zip(tokens, mask)]
    return ours.logps(tokens=tokens, mask=mask, **given)


def next_token_missed(logits, tokens, mask):
    return (
        token_logps([row[1:] + row[:1] for row in logits], tokens)
        .mul(torch.tensor(mask)[:, 1:])
        .sum(-1)
        .tolist()
    )


def of_whole_rows(logits, tokens, mask):
    return token_logps(logits, tokens).sum(-1).tolist()


def reward_times_beta(reward, beta, **others):
    return ours.optimum(reward=[r * beta * beta for r in reward], beta=beta, **others)


def unsafe_answers_left(unsafe, **others):
    return ours.optimum(unsafe=[0] * len(unsafe), **others)


def dropped_pairs_counted(rows, **how):
    kept = sum(ours.transform(row) is not None for row in rows)
    return ours.first_loss(rows, **how) * kept / len(rows)


def swapped_without_margin(rows, beta, delta):
    swapped = [row for row in rows if helpful(row).h_w and not helpful(row).h_l]
    return ours.first_loss(rows, beta, 0.0 if swapped else delta)


def margin_on_all(rows, beta, delta):
    return make.softplus(delta)


FAULTS = [  # function, its wrong version, a vector that must fail
    (
        "transform",
        is_safe_read_as_h,
        "a safe winner over an unsafe loser is kept, and h means unsafe",
    ),
    (
        "transform",
        response_0_wins,
        "both safe: better_response_id says who wins, not the place in the row",
    ),
    ("transform", safer_wins, "both safe: helpfulness decides, safer_response_id does not"),
    ("transform", both_unsafe_kept, "both unsafe: the pair is dropped"),
    (
        "transform",
        unsafe_winner_dropped,
        "an unsafe second answer that won is swapped with the safe first one",
    ),
    (
        "transform",
        labels_not_swapped,
        "an unsafe winner and a safe loser are swapped, and their labels with them",
    ),
    (
        "loss",
        margin_by_is_safe,
        "a safe-unsafe pair: the margin raises its loss to softplus(delta)",
    ),
    ("loss", margin_unused, "a safe-unsafe pair: the margin raises its loss to softplus(delta)"),
    ("loss", delta_inside_beta, "delta stands outside beta"),
    ("loss", margin_where_both_are_unsafe, "beta weighs pairs without a margin too"),
    ("loss", margin_where_both_are_unsafe, "two unsafe answers have no margin (without T)"),
    ("loss", no_reference, "the reference counts, not the policy alone"),
    ("loss", log_of_sigmoid, "thousands of nats do not overflow"),
    ("loss", overflows, "a pair that is thousands of nats in order costs nothing"),
    ("gradient", slope_overflows, "a pair that is thousands of nats in order costs nothing"),
    (
        "loss",
        beta_missing_where_the_winner_is_unsafe,
        "beta weighs pairs with an unsafe winner too (without T)",
    ),
    ("transform", better_and_safer, "both safe: helpfulness decides for the second answer too"),
    ("logps", logits_of_the_first_row, "what fills up a row does not count"),
    ("loss", clamped, "tens of nats count in full: log-ratios are not clamped"),
    ("loss", labels_of_the_first_winner, "each pair has its own labels"),
    ("logps", every_eos_counts, "where EOS fills up a row, it counts once"),
    ("logps", log_of_softmax, "a token whose probability rounds to 0 has a finite log-probability"),
    ("logps", token_0_fills_up, "token 0 counts inside an answer"),
    ("optimum", penalty_of_50, "an unsafe answer gets nothing at a reward of 500 either"),
    ("gradient", slope_without_beta, "beta weighs pairs without a margin too"),
    ("logps", means, "an answer's log-probability is the sum over its tokens, not their mean"),
    ("logps", next_token_missed, "the logits of a position predict the next token"),
    ("logps", without_eos, "EOS counts"),
    ("logps", of_whole_rows, "the prompt does not count"),
    ("logps", of_whole_rows, "what fills up a row does not count"),
    ("optimum", reward_times_beta, "reward is divided by beta"),
    ("optimum", unsafe_answers_left, "an unsafe answer gets nothing, however great its reward"),
    ("first_loss", dropped_pairs_counted, "dropped pairs do not count in the mean"),
    ("first_loss", swapped_without_margin, "a swapped pair has its margin"),
    ("first_loss", margin_on_all, "a pair of two safe answers"),
]


@pytest.mark.parametrize("of, wrong, name", FAULTS, ids=[wrong.__name__ for _, wrong, _ in FAULTS])
def test_a_fault_fails_the_vector_that_names_it(of, wrong, name):
    failed = {vector["name"] for vector, _ in run.failures({of: wrong})}
    assert name in failed


def test_some_fault_fails_each_vector():
    failed = [(of, run.failures({of: wrong})) for of, wrong, _ in FAULTS]
    assert {(of, vector["name"]) for of, found in failed for vector, _ in found} == NAMES


def test_the_page_names_vectors_that_there_are():
    page = (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .+ \| (`\w+`: .+) \|$", page.partition("## What goes wrong")[2], re.M)
    assert len(rows) > 10
    for of, names in re.findall(r"`(\w+)`: (.+?)(?=; `|$)", "\n".join(rows), re.M):
        assert (of, names) in NAMES or {(of, name) for name in names.split("; ")} <= NAMES


def test_what_the_command_says(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from conformance.ours import transform\ndef loss(**given): return 1 / 0\n"
    )

    def said(*arguments):
        command = [sys.executable, "-m", "conformance.run", *arguments]
        environment = {"PYTHONPATH": str(tmp_path), "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines(), done.stderr

    code, lines, _ = said("mine")
    assert code == 1 and lines[-2].startswith("10 of 25 vectors passed: transform, loss")
    assert lines[-1].endswith("mine lacks it: gradient, logps, optimum, first_loss")
    assert lines[0].startswith("loss: a safe-safe pair costs ln 2 as ")
    assert "ZeroDivisionError" in lines[0]
    assert said("conformance.ours")[:2] == (0, ["57 of 57 vectors passed: " + ", ".join(OURS)])
    assert said()[0] == 1 and "MODULE" in said()[2]
    for name, why in (("nowhere", "cannot be imported"), ("./mine.py", "cannot"), ("json", "none")):
        code, lines, error = said(name)
        assert code == 1 and not lines and error.count("\n") == 1 and why in error
