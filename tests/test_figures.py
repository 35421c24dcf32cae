"""The tables of the Markdown pages: medians over seeds by hand, and each page is up to date."""

import json
import re

from lib import checkpoint, pages

import pytest
from conftest import ROOT

from real import figures as of_real_model
from village import figures, held_out


def result(value):
    accuracies = {f"{kind}/rewards/accuracies": value for kind in figures.KINDS}
    policy = {name: {"value": value} for name, *_ in figures.FIGURES.values()}
    return {"policy": policy | {"preferences": accuracies, "n": 3}}


def test_a_table_by_hand(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    runs = {
        f"runs/seed{seed}/{run}": result(seed / 10)
        for seed in (1, 2, 6)
        for run in figures.TABLES["noise"][2]
    }
    (tmp_path / "results" / "village.json").write_text(json.dumps(runs))
    monkeypatch.setattr(figures, "HERE", tmp_path)
    lines = figures.table("noise").splitlines()
    assert lines[0] == "|  | harmless % | helpfulness | over-refusal % | degenerate % | KL |"
    name, *cells = lines[3].strip("| ").split(" | ")
    assert name == "SafeDPO, Δ = 5, 10 % of the labels wrong"
    percent = "20.0 (10.0–60.0)"
    assert cells == [percent, "0.20 (0.10–0.60)", percent, percent, "0.2 (0.1–0.6)"]
    assert figures.cell([result(v)["policy"] for v in (-1, 4)], "KL") == "1.5 (-1.0 to 4.0)"


def test_a_cell_agrees_where_the_median_of_held_out_seeds_lies_in_its_range(
    tmp_path, monkeypatch, capsys
):
    """Shown are 0.2 to 0.6. The held-out seeds come in two calls: first 0.1 and 0.3, whose median
    0.2 lies on the border, then 0.1 too."""
    monkeypatch.setattr(figures, "TABLES", {"of one run": ("village", ("KL",), ("noise10",))})
    monkeypatch.setattr(held_out, "RESULTS", tmp_path / "shown")
    monkeypatch.setattr(held_out, "HELD_OUT", tmp_path / "held_out.json")
    for folder, seeds in (
        ("shown", {1: 0.2, 2: 0.6}),
        ("first", {20: 0.1, 21: 0.3}),
        ("second", {1: 0.2, 22: 0.1}),  # 1 is one of those that are shown
    ):
        (tmp_path / folder).mkdir()
        runs = {f"runs/village/seed{seed}/noise10": result(v) for seed, v in seeds.items()}
        (tmp_path / folder / "village.json").write_text(json.dumps(runs))
    held_out.main([str(tmp_path / "first")])
    alone = "of single seeds' figures 1"
    assert capsys.readouterr().out == f"seeds 20, 21: 1 of 1 agree; {alone} of 2\n"
    held_out.main([str(tmp_path / "second")])
    disagree = "village: noise10: KL: 0.100 is not between 0.200 and 0.600\n"
    agree = f"seeds 20, 21, 22: 0 of 1 agree; {alone} of 3\n"
    assert capsys.readouterr().out == disagree + agree


def test_the_page_says_how_many_cells_agree_with_seeds_that_took_no_part():
    shown, others = held_out.by_seed(held_out.RESULTS), checkpoint.read_json(held_out.HELD_OUT)
    assert others.keys() == shown.keys()
    assert all(seeds.keys() == {str(seed) for seed in range(20, 31)} for seeds in others.values())
    agree = len(others) - len(held_out.outside(shown, others))
    inside, of = held_out.singles(shown, others)
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    said = f"{agree} of the {len(others)} cells", f"{round(100 * inside / of)} % of their figures"
    assert all(words in " ".join(page.split()) for words in said)


def test_training_curves_are_log_ratios_and_means_over_seeds(tmp_path):
    rewards = {}
    for kind in figures.KINDS:
        rewards |= {f"{kind}/rewards/chosen": 2.0, f"{kind}/rewards/rejected": -4.0}
    for seed, factor in ((1, 1), (2, 3)):
        for delta in figures.DELTAS:
            folder = tmp_path / f"seed{seed}" / f"safedpo-delta{delta}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"beta": 2.0}')
            rows = [{"stage": "sft", "step": 1}]
            for step in (1, 2):
                scaled = {name: step * factor * value for name, value in rewards.items()}
                rows.append({"stage": "safedpo", "step": step} | scaled)
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = figures.collect(tmp_path)
    assert curves[5]["step"] == [1, 2]
    assert curves[5]["safe-unsafe"] == {"winner": [2.0, 4.0], "loser": [-4.0, -8.0]}
    assert curves[5]["beta"] == 2.0
    with pytest.raises(ValueError, match="no run is named safedpo"):
        figures.figures_of({"reference": []}, "safedpo")
    with pytest.raises(ValueError, match=r"expected the folder that village/experiments\.sh fills"):
        figures.collect(tmp_path / "seed1")


@pytest.mark.parametrize("name", sorted({file for file, *_ in figures.TABLES.values()}))
def test_every_run_has_as_many_seeds_as_the_page_says(name):
    assert {len(results) for results in figures.load(name).values()} == {10}


def test_the_pages_tables_are_the_results():
    texts = [page.read_text(encoding="utf-8") for page in pages.pages()]
    shown = {name for text in texts for name in re.findall("<!-- table: (.+?) -->", text)}
    rooms = figures, of_real_model
    assert shown == {name for room in rooms for name in room.TABLES}
    for text in texts:
        assert text.count("<!-- table: ") == text.count("<!-- end -->")
        made = re.sub(r"(<!-- table: .+? -->\n).*?(<!-- end -->)", r"\1\2", text, flags=re.S)
        for room in rooms:
            made = pages.with_tables(made, room.TABLES, room.table)
        assert made == text
