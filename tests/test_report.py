"""What figures look like: tables, sentences, pictures."""

import json

from lib.report import (
    COLUMNS,
    cell,
    first_look,
    paper_scale,
    table,
    warn_after,
    warn_before,
    what_happened,
)
from lib.settings import TrainConfig


def figure(value):
    return {"value": value, "ci95": [value - 0.1, value + 0.1]}


def result(pairs, delta, helpfulness, reference=1.0):
    def model(h):
        preferences = {
            f"{k}/{m}": 0.5
            for k in ("safe-safe",)
            for m in ("logps/accuracies", "rewards/accuracies", "rewards/margins")
        }
        judged = {name: figure(0.9) for name, _, _ in COLUMNS.values()}
        return {
            **judged,
            "helpfulness": figure(h),
            "n": 10,
            "n_benign": 5,
            "n_harmful": 5,
            "preferences": {**preferences, "safe-safe/pairs": 3},
        }

    return {
        "policy": model(helpfulness),
        "reference": model(reference),
        "run": {"pairs": pairs, "beta": 0.1, "delta": delta},
        "optimum": None,
    }


def test_papers_scale_puts_sft_at_0_and_dpo_helpful_at_10():
    results = {"a": result("safedpo", 5, 2.0), "b": result("helpful", 0, 3.0)}
    scale = paper_scale(results)
    assert scale(1.0) == 0 and scale(3.0) == 10 and scale(2.0) == 5
    assert paper_scale({"a": results["a"], "c": result("helpful", 5, 3.0)}) is None
    for name in ("loss", "anchor"):  # DPO-HELPFUL's pairs, but another loss
        other = result("helpful", 0, 3.0)
        other["run"][name] = "another"
        assert paper_scale({"c": other}) is None
    text = table(results)
    assert "paper's scale" in text and "5.00" in text and text.count("\nreference ") == 1, (
        "one reference, shown once"
    )
    assert "reference of c" in table({**results, "c": result("safedpo", 5, 2.0, reference=1.5)})


def test_cells():
    assert (
        cell({"value": 0.987, "ci95": [0.977, 0.997]}, 100, 1) == "98.7 ±1.0"
        and cell(None, 1, 1) == "–"
    )


def judged(pairs, harmless, over_refusal, refusal):
    """A result whose figures are (reference's, policy's)."""
    whole = result(pairs, 5, 2.0)
    for name, *values in zip(("reference", "policy"), harmless, over_refusal, refusal):
        figures = zip(("harmless_ratio", "over_refusal", "refusal"), values)
        whole[name] |= {name: figure(value) for name, value in figures}
    return whole


def test_what_cannot_be_good_is_said_before(capsys):
    config = TrainConfig(delta=5.0, lr=1e-4)
    warn_before(config, 50, 30, False, False)
    said = "preference training: β = 2, Δ = 5, --lr 0.0001, steps: 50 of 64 pairs"
    assert capsys.readouterr().out.splitlines() == [said]
    warn_before(TrainConfig(delta=5.0, lr=1e-4, loss="hinge", anchor=0.3), 50, 30, False, False)
    assert "Δ = 5, --loss hinge, --anchor 0.3, --lr" in capsys.readouterr().out
    warn_before(config, 49, 29, True, False)
    _, large, few, prompts = capsys.readouterr().out.splitlines()
    assert large.startswith("warning: --lr 0.0001 fits a small model") and "--lr 1e-6" in large
    assert few.startswith("warning: few steps to learn from (49)") and "--batch_size" in few
    assert prompts.startswith("warning: few held-out prompts to judge by (29)")
    warn_before(config, 50, 30, True, True)  # adapters want more
    assert "warning" not in capsys.readouterr().out


def test_what_went_wrong_is_said_after(capsys):
    def warned(**changes):
        whole = result("safedpo", 5, 2.0)
        for name in ("reference", "policy"):
            mean_reward = {"value": 2.0, "ci95": [1.9, 2.1]}  # of 400: a deviation of 1.02
            whole[name] |= {"n": 400, "length": figure(20.0), "degenerate": figure(0.05)}
            whole[name] |= {"kl": figure(3.0), "helpfulness": mean_reward}
        whole["policy"] |= changes
        warn_after(whole)
        return capsys.readouterr().out

    assert not warned() and not warned(kl=None, helpfulness=None) and not warned(kl=figure(19.0))
    assert "warning: KL to the reference is 21 nats an answer; a smaller --lr" in warned(
        kl=figure(21.0)
    )
    assert not warned(degenerate=figure(0.14))
    assert "16 % of the answers are degenerate, 5 % were" in warned(degenerate=figure(0.16))
    assert not warned(helpfulness=figure(1.0))
    assert "helpfulness fell by 1.10" in warned(helpfulness=figure(0.9))


def test_three_sentences_say_what_happened():
    said = " ".join(what_happened(judged("safedpo", (0.6, 0.99), (0.17, 0.07), (0.2, 0.1))).split())
    assert said == (
        "Of 10 answers to test prompts, 99.0 % of the policy's are harmless and 60.0 % of the "
        "reference's. The policy turns away 7.0 % of the benign requests, the reference 17.0 %: "
        "this is over-refusal. The policy turns away 10.0 % of the harmful requests, the reference "
        "20.0 %: a refusal wins against unsafe answers, but safe answers that help more win "
        "against it."
    )


def test_a_reason_is_given_only_where_it_fits():
    rose = what_happened(judged("safedpo", (0.6, 0.99), (0.17, 0.07), (0.2, 0.3)))
    assert rose.endswith("20.0 %.") and "wins" not in rose
    rose = what_happened(judged("harmless", (0.6, 0.9), (0.17, 0.35), (0.2, 0.5)))
    assert "a refusal counts as safer" in rose.replace("\n", " ")
    assert what_happened(judged("safebetter", (0.6, 0.9), (0.1, 0.1), (0.2, 0.1))).endswith(
        "20.0 %."
    )


def test_without_a_judge_the_order_of_held_out_pairs_is_shown(tmp_path):
    whole = result("safedpo", 5, 2.0)
    for name in ("reference", "policy"):
        whole[name] |= dict.fromkeys(("harmless_ratio", "helpfulness", "over_refusal", "refusal"))
    said = what_happened(whole)
    assert "these data have no judge" in said and "held-out pairs" in said
    assert "held-out pairs" in table({"a run": whole})


def test_sentences_need_their_figures():
    whole = judged("safedpo", (0.6, 0.99), (0.17, 0.07), (0.2, 0.1))
    assert "harmful requests" in what_happened(whole)
    whole["policy"]["refusal"] = None  # no test prompt is harmful
    said = what_happened(whole)
    assert "over-refusal" in said and "harmful requests" not in said
    same = judged("harmless", (0.6, 0.99), (0.17, 0.07), (0.2, 0.2))
    assert what_happened(same).endswith("20.0 %."), "no reason where nothing changed"


def test_the_first_look_is_short_and_verbose_shows_the_rest(tmp_path):
    rows = [
        {"prompt": f"question {i}", "reference": "yes", "policy": "no", "reference_cost": 2.0}
        for i in range(5)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "samples.jsonl").write_text(lines, encoding="utf-8")
    whole = judged("safedpo", (0.6, 0.99), (0.17, 0.07), (0.2, 0.1))
    short = first_look(tmp_path, TrainConfig(), whole)
    assert short.splitlines()[1].split() == [
        "harmless", "%", "helpfulness", "over-refusal", "%", "degenerate", "%"
    ]  # fmt: skip
    assert short.count("policy:    no\n") == short.count("reference: yes  [unsafe]\n") == 3
    assert short.count("question 3") == 1 and "--prompt 'question 3'" in short  # not one just shown
    assert "python train.py --pairs helpful" in short
    assert "held-out pairs" not in short
    long = first_look(tmp_path, TrainConfig(verbose=True), whole)
    assert "held-out pairs" in long and "tokens" in long
    for figure in ("harmless_ratio", "helpfulness", "over_refusal", "refusal"):
        whole["reference"][figure] = whole["policy"][figure] = None
    long = first_look(tmp_path, TrainConfig(verbose=True), whole)
    assert long.count("held-out pairs") == long.count("One answer to each of") == 1
    assert "--pairs helpful" not in first_look(tmp_path, TrainConfig(data="a"), whole)
