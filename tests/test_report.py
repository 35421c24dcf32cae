"""What figures look like: tables, sentences, pictures."""

from lib.report import COLUMNS, cell, paper_scale, table


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
