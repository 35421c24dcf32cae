"""The experiments with a real model: how their data are made, and what their table says."""

import json
import random
import re

from lib.policy import load_model
from lib.records import load, survey

import pytest
import torch
from conftest import row

from model import pack_rows
from real import figures, ordinary, prepare


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def xstest(i, benign):
    kind = "homonyms" if benign else "contrast_homonyms"
    return row(prompt=f"{i}?", prompt_type=kind, response_1=f"I cannot help with {i}.")


def own_answers(model, prompts, n, most=0):
    """What prepare.own_answers gives, without a model: it refuses where something is illegal."""
    return [
        {
            "prompt": prompt,
            "response": "I cannot help." if "illegal" in prompt else f"{prompt} {i}",
            "ended": True,
        }
        for prompt in prompts
        for i in range(n)
    ]


@pytest.fixture
def made(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "own_answers", own_answers)
    write(tmp_path / "x" / "train.jsonl", [xstest(i, i % 2) for i in range(60)])
    write(tmp_path / "x" / "test.jsonl", [xstest(i, i % 2) for i in range(60, 70)])
    for split, n in (("train", 12), ("test", 4)):
        answers = [
            {"prompt": f"{split} {i}?", "response": f"so {safe}", "is_safe": safe}
            for i in range(n)
            for safe in (True, False)
        ]
        write(tmp_path / "p" / f"{split}.jsonl", answers)
    prepare.main(["a model", *(str(tmp_path / name) for name in ("x", "p", "out"))])
    return tmp_path / "out"


def test_nothing_of_a_test_split_is_trained_on_or_chosen_by(made):
    names = "all/sft", "all/pairs", "choose/sft", "choose/pairs", "pku"
    splits = {name: load(str(made / name)) for name in names}
    prompts = {
        (name, split): {r.prompt for r in records}
        for name, some in splits.items()
        for split, records in some.items()
    }
    assert prompts["pku", "test"] == {f"test {i}?" for i in range(4)}
    requests = prompts_of("requests", True) | prompts_of("borderline", True)
    for kind in ("sft", "pairs"):
        trained = {f"{i}?" for i in range(60)} | {f"train {i}?" for i in range(12)} | requests
        if kind == "pairs":
            trained |= {p for p in prompts_of("borderline", False) if "illegal" not in p}
        held_out = prompts[f"all/{kind}", "test"]
        assert held_out == {f"{i}?" for i in range(60, 70)}
        assert prompts[f"all/{kind}", "train"] == trained
        chosen_on = prompts[f"choose/{kind}", "test"]
        assert prompts[f"choose/{kind}", "train"] | chosen_on == trained
        assert not prompts[f"choose/{kind}", "train"] & chosen_on
        assert 5 < len(chosen_on) < 30 and all(" " not in prompt for prompt in chosen_on)
        assert {r.prompt: r.benign for r in splits[f"all/{kind}"]["test"]} == {
            f"{i}?": bool(i % 2) for i in range(60, 70)
        }
        n = 60 + 12 + 367  # XSTest's, PKU's, benign ones of ours
        n += 123 + 6 if kind == "pairs" else 0  # those with a refusal: ours, PKU's
        assert survey(splits[f"all/{kind}"])[1][0].startswith(f"{n} train, 10 test")
    answers = [json.loads(line) for line in (made / "ordinary.jsonl").read_text().splitlines()]
    assert len(answers) == 200 and {r["prompt"] for r in answers} == prompts_of("everyday", True)
    assert not prompts_of("everyday", True) & requests


def test_own_rows_by_hand():
    answers = own_answers("a model", ["Why?", "How?"], 2)
    sft, pairs = prepare.own_rows(answers, ["No, I cannot."], random.Random(0))
    assert [(row["response_0"], row["response_1"]) for row in sft] == [
        ("Why? 0", "Why? 1"), ("How? 0", "How? 1"),
    ]  # fmt: skip
    assert [(row["response_0"], row["response_1"]) for row in pairs] == [
        ("Why? 0", "No, I cannot."), ("How? 0", "No, I cannot."),
    ]  # fmt: skip
    for pair in sft + pairs:
        assert pair["better_response_id"] == 0
        assert pair["is_response_0_safe"] and pair["is_response_1_safe"]


def test_half_of_the_unsafe_prompts_get_a_refusal():
    answers = [
        {"prompt": f"{i}?", "response": f"so {safe}", "is_safe": safe}
        for i in range(5)
        for safe in (True, False)
    ] + [{"prompt": "a safe one?", "response": "so", "is_safe": True}]
    unsafe = prepare.some_unsafe(answers)
    assert unsafe == {f"{i}?": "so False" for i in (0, 2, 4)}
    assert prepare.refused_rows(unsafe, ["I cannot."], random.Random(0)) == [
        prepare.pair(f"{i}?", [("I cannot.", True), ("so False", False)]) for i in (0, 2, 4)
    ]


def test_refusals_are_those_of_the_training_answers(made):
    for part in ("all", "choose"):
        train, own, refused = (
            [json.loads(line) for line in (made / part / "pairs" / name).open()]
            for name in ("train-xstest.jsonl", "train-own.jsonl", "train-pku-refused.jsonl")
        )
        known = {r["response_1"] for r in train}
        assert {r["response_1"] for r in own} <= known and len(own) == 367
        assert {r["response_0"] for r in refused} <= known and len(refused) == 6


def test_refusals_name_no_topic():
    said = "I cannot help with that.", "I cannot help with that, least of all with a bomb."
    pairs = [row(prompt=f"{i}?", response_0=said[i // 5]) for i in range(6)]
    assert prepare.refusals_in(pairs) == [said[0]]
    with pytest.raises(ValueError, match="refuses in words common to 5 prompts"):
        prepare.refusals_in(pairs[1:5])


def test_own_answers_that_refuse_are_left_out():
    answers = own_answers("a model", ["Why?", "Is it illegal?"], 2)
    assert [len(rows) for rows in prepare.own_rows(answers, ["No."], random.Random(0))] == [1, 1]


def test_the_tables_show_the_runs_of_the_script():
    script = (prepare.HERE / "experiments.sh").read_text(encoding="utf-8")
    (best,) = re.findall(r"^best=(.*)$", script, re.M)
    (deltas,) = re.findall(r'^1\) deltas="(.*)"', script, re.M)  # of the part with all methods
    names = {
        name.replace("$delta", delta).replace("$best", best)
        for name in re.findall(r"^ *(?:method |run \$group/)(\S+)", script, re.M)
        for delta in deltas.split()
    }
    assert best == str(figures.BEST) and names == figures.RUNS.keys() - {"reference"}


def test_sft_learns_each_answer_once():
    pairs = [prepare.pair("Why?", [("a", True), (other, other == "c")]) for other in "bcd"]
    pairs.append(prepare.pair("How?", [("a", False), ("b", True)]))
    pairs.append(prepare.pair("How?", [("c", True), ("b", True)]))
    said = [
        [(row["prompt"], row[f"response_{i}"], row[f"is_response_{i}_safe"]) for i in (0, 1)]
        for row in prepare.each_once(pairs)
    ]
    assert said == [
        [("Why?", "a", True), ("Why?", "b", False)],
        [("Why?", "c", True), ("Why?", "d", False)],
        [("How?", "a", False), ("How?", "b", True)],
        [("How?", "c", True), ("How?", "a", False)],
    ]
    assert [row["safer_response_id"] for row in prepare.each_once(pairs)] == [0, 0, 1, 0]


def test_bad_rows_are_named(tmp_path):
    write(tmp_path / "x" / "train.jsonl", [row()])
    with pytest.raises(ValueError, match=r"train.jsonl:1: prompt_type is missing"):
        prepare.main(["a model", *(str(tmp_path / name) for name in ("x", "x", "out"))])
    with pytest.raises(ValueError, match=r"expected python -m real\.prepare MODEL XSTEST PKU OUT"):
        prepare.main([])


def prompts_of(name, benign):
    lines = (prepare.HERE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [r["prompt"] for r in map(json.loads, lines) if r["benign"] == benign]
    assert len(set(prompts)) == len(prompts)
    return set(prompts)


def test_no_request_stands_twice_and_none_is_missing():
    counts = {
        name: [len(prompts_of(name, benign)) for benign in (True, False)]
        for name in ("everyday", "requests", "borderline")
    }
    assert counts == {"everyday": [40, 0], "requests": [120, 0], "borderline": [247, 124]}


def judged(refusal, over_refusal, safe_safe, safe_unsafe):
    model = lambda refusal, over_refusal: {
        "refusal": {"value": refusal},
        "degenerate": {"value": 0.5},
        "over_refusal": {"value": over_refusal},
        "n": 10,
        "n_benign": 6,
        "n_harmful": 4,
        "preferences": {
            "safe-safe/rewards/accuracies": safe_safe,
            "safe-safe/pairs": 20,
            "safe-unsafe/rewards/accuracies": safe_unsafe,
            "safe-unsafe/pairs": 10,
        },
    }
    return {"reference": model(0.25, 0.5), "policy": model(refusal, over_refusal)}


def test_seeds_are_pooled(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    best = figures.BEST
    for part, delta, seed in (("seed1", best, 1), ("seed2", best, 2), ("choose", 20, 0)):
        folder = f"runs/real/{part}/safedpo-delta{delta}"
        result = judged(seed / 2, 1 / 6, 0.9, seed / 2)
        (tmp_path / part).mkdir()
        for name in ("xstest", "pku", "everyday"):
            (tmp_path / part / f"{name}.json").write_text(json.dumps({folder: result}))
        means = {folder: {"reference": -1.0, "policy": -1 - 0.02 * seed}}
        (tmp_path / part / "ordinary.json").write_text(json.dumps(means))
    head, _, *lines = figures.table("real").splitlines()
    reference, policy = ([cell.strip() for cell in line.split("|")[2:-1]] for line in lines)
    assert len(head.split("|")) - 3 == len(reference) == len(policy)
    # of 4 harmful and 6 benign prompts, 10 and 20 pairs; Wilson's intervals by hand
    assert reference == [
        "2", "25 (5–70)", "50 (19–81)", "50 (19–81)", "–", "–", "–", "50 (24–76)", "-1.00",
    ]  # fmt: skip
    assert policy == [
        "2", "75 (30–95)", "17 (3–56)", "17 (3–56)",
        "75 (44–92)", "75 (44–92)", "90 (70–97)", "50 (24–76)", "-1.03",
    ]  # fmt: skip
    (choice,) = figures.table("real choice").splitlines()[2:]
    assert choice.startswith("| SafeDPO, Δ = 20 | 0 (0–49) | 17 (3–56) |")


def test_ordinary_answers_by_a_plain_loop(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ordinary, "pick_device", lambda name: torch.device("cpu"))
    rows = [
        {"prompt": prompt, "response": response, "ended": ended}
        for prompt, response, ended in (
            ("How do I make a red mask?", "First shape the clay.", True),
            ("How do I make a red mask?", "First cut the elder.", False),  # no EOS
            ("How do I make a whistle?", "Then clear the pith.", True),
        )
    ]
    write(tmp_path / "answers.jsonl", rows)
    ordinary.main([str(tmp_path / "answers.jsonl"), str(tmp_path / "out.json"), str(finished)])
    (said,) = json.loads((tmp_path / "out.json").read_text()).values()
    per_token = {}
    for name in ("reference", "policy"):
        model, tokenizer = load_model(finished / f"{name}.pt", torch.device("cpu"))
        per_token[name] = []
        for r in rows:
            x, y = tokenizer.prompts([r["prompt"]])[0], tokenizer.answers([r["response"]])[0]
            y = y if r["ended"] else y[:-1]
            with torch.no_grad():
                per_token[name].append(model(pack_rows([(x, [y])])).item() / len(y))
        assert said[name] == pytest.approx(sum(per_token[name]) / 3, abs=1e-5)
    falls = [before - after for before, after in zip(*per_token.values())]
    assert said["answers"] == 3
    assert said["fall"]["value"] == pytest.approx(
        ((falls[0] + falls[1]) / 2 + falls[2]) / 2, abs=1e-5
    )


def test_a_shared_reference_is_scored_once(tmp_path, monkeypatch):
    scored = []
    monkeypatch.setattr(ordinary, "per_token", lambda path, *_: scored.append(path.name) or [-1.0])
    for run, policy in (("a", b"one"), ("b", b"other")):
        (tmp_path / run).mkdir()
        (tmp_path / run / "reference.pt").write_bytes(b"shared")
        (tmp_path / run / "policy.pt").write_bytes(policy)
    write(tmp_path / "answers.jsonl", [{"prompt": "x?", "response": "y", "ended": True}])
    folders = [str(tmp_path / run) for run in "ab"]
    ordinary.main([str(tmp_path / "answers.jsonl"), str(tmp_path / "out.json"), *folders])
    assert scored == ["reference.pt", "policy.pt", "policy.pt"]
    assert list(json.loads((tmp_path / "out.json").read_text())) == folders
