"""The picture of several runs."""
from report import plot


def figure(value):
    return {"value": value, "ci95": [value - 0.01, value + 0.01]}


def test_plot_writes_a_picture(tmp_path):
    model = lambda x, y: {"harmless_ratio": figure(x), "helpfulness": figure(y)}
    plot({"run": {"reference": model(0.6, 2.0), "policy": model(0.98, 1.5), "optimum": None}}, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
