"""The README's tables: means over seeds by hand, and what stands in the README is what lies in results/."""

import json

import pytest
from conftest import ROOT

from village import figures


def result(value, n):
    policy = {name: {"value": value} for name, *_ in figures.FIGURES.values()}
    return {
        "policy": policy
        | {
            "preferences": {
                f"{kind}/rewards/accuracies": value for kind in ("safe-safe", "safe-unsafe")
            },
            "n": n,
        }
    }


def test_a_table_by_hand(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    runs = {
        f"runs/seed{seed}/{run}": result(seed / 10, 3)
        for seed in (1, 2, 3)
        for run in figures.TABLES["noise"][2]
    }
    (tmp_path / "results" / "village.json").write_text(json.dumps(runs))
    monkeypatch.setattr(figures, "HERE", tmp_path)
    lines = figures.table("noise").splitlines()
    assert lines[0] == "|  | harmless % | helpfulness | over-refusal % | degenerate % | KL |"
    assert (
        lines[3]
        == "| SafeDPO, Δ = 5, 10 % of the flags wrong | 20.0 ± 10.0 | 0.20 ± 0.10 | 20.0 ± 10.0 | 20.0 ± 10.0 | 0.2 ± 0.1 |"
    )


def test_training_curves_are_log_ratios_and_means_over_seeds(tmp_path):
    kinds = {
        f"{kind}/rewards/{answer}": x
        for kind in ("safe-safe", "safe-unsafe")
        for answer, x in (("chosen", 2.0), ("rejected", -4.0))
    }
    for seed, factor in ((1, 1), (2, 3)):
        for delta in figures.DELTAS:
            folder = tmp_path / f"seed{seed}" / f"safedpo-delta{delta}"
            folder.mkdir(parents=True)
            (folder / "config.json").write_text('{"beta": 2.0}')
            rows = [{"stage": "sft", "step": 1}] + [
                {"stage": "safedpo", "step": step}
                | {k: step * factor * x for k, x in kinds.items()}
                for step in (1, 2)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = figures.collect(tmp_path)
    assert curves[5]["step"] == [1, 2] and curves[5]["safe-unsafe"] == {
        "winner": [2.0, 4.0],
        "loser": [-4.0, -8.0],
    }
    assert curves[5]["beta"] == 2.0
    with pytest.raises(ValueError, match="no run is named safedpo"):
        figures.figures_of({"reference": []}, "safedpo")
    with pytest.raises(ValueError, match="expected the folder that experiments.sh fills"):
        figures.collect(tmp_path / "seed1")


def test_the_readmes_tables_are_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- table: ") == len(figures.TABLES) == readme.count("<!-- end -->")
    assert figures.with_tables(readme) == readme
    assert figures.with_tables(readme.replace(" ± 0.", " ± 9.")) == readme  # each is made anew
