"""The experiments with a real model: how their data are made, and what their table says."""

import json

from lib.records import load, survey

import pytest
from conftest import row

from real import figures, ordinary, prepare


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def xstest(i, benign):
    return row(prompt=f"{i}?", prompt_type="homonyms" if benign else "contrast_homonyms")


@pytest.fixture
def made(tmp_path):
    write(tmp_path / "x" / "train.jsonl", [xstest(i, i % 2) for i in range(60)])
    write(tmp_path / "x" / "test.jsonl", [xstest(i, i % 2) for i in range(60, 70)])
    for split, n in (("train", 12), ("test", 4)):
        answers = [
            {"prompt": f"{split} {i}?", "response": f"so {safe}", "is_safe": safe}
            for i in range(n)
            for safe in (True, False)
        ]
        write(tmp_path / "p" / f"{split}.jsonl", answers)
    prepare.main([str(tmp_path / name) for name in ("x", "p", "out")])
    return tmp_path / "out"


def test_nothing_of_a_test_split_is_trained_on_or_chosen_by(made):
    splits = {name: load(str(made / name)) for name in ("all", "choose", "pku")}
    prompts = {
        (name, split): {r.prompt for r in records}
        for name, some in splits.items()
        for split, records in some.items()
    }
    assert prompts["all", "test"] == {f"{i}?" for i in range(60, 70)}
    assert prompts["pku", "test"] == {f"test {i}?" for i in range(4)}
    trained = {f"{i}?" for i in range(60)} | {f"train {i}?" for i in range(12)}
    assert prompts["all", "train"] == trained
    chosen_on = prompts["choose", "test"]
    assert prompts["choose", "train"] | chosen_on == trained
    assert not prompts["choose", "train"] & chosen_on
    assert 5 < len(chosen_on) < 30 and all(" " not in prompt for prompt in chosen_on)
    assert {r.prompt: r.benign for r in splits["all"]["test"]} == {
        f"{i}?": bool(i % 2) for i in range(60, 70)
    }
    assert survey(splits["all"])[1][0].startswith("72 train, 10 test")


def test_bad_rows_are_named(tmp_path):
    write(tmp_path / "x" / "train.jsonl", [row()])
    with pytest.raises(ValueError, match=r"train.jsonl:1: prompt_type is missing"):
        prepare.main([str(tmp_path / name) for name in ("x", "x", "out")])
    with pytest.raises(ValueError, match=r"expected python -m real\.prepare XSTEST PKU OUT"):
        prepare.main([])


def test_everyday_requests_are_forty_and_benign():
    rows = [json.loads(line) for line in ordinary.EVERYDAY.read_text().splitlines()]
    assert len({r["prompt"] for r in rows}) == len(rows) == 40 and all(r["benign"] for r in rows)


def judged(refusal, over_refusal, safe_safe, safe_unsafe):
    model = lambda refusal, over_refusal: {
        "refusal": {"value": refusal},
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
    two = {
        f"runs/real/seed{seed}/safedpo-delta5": judged(seed / 2, 1 / 6, 0.9, seed / 2)
        for seed in (1, 2)
    }
    for name in ("xstest", "pku", "everyday"):
        (tmp_path / f"{name}.json").write_text(json.dumps(two))
    falls = {folder: {"fall": {"value": 0.02 * i}} for i, folder in enumerate(two, 1)}
    (tmp_path / "ordinary.json").write_text(json.dumps(falls))
    head, reference, policy = figures.rows()
    assert len(head) == len(reference) == len(policy)
    # 4 and 2 of 8 harmful prompts; 2 of 12 benign ones; Wilson's intervals by hand
    assert reference == [
        "reference (SFT)", "2", "25 (7–59)", "50 (25–75)", "–", "–", "50 (25–75)", "–",
    ]  # fmt: skip
    assert policy == [
        "SafeDPO, Δ = 5", "2", "75 (41–93)", "17 (5–45)", "75 (53–89)", "90 (77–96)", "17 (5–45)",
        "-0.030",
    ]  # fmt: skip
