"""The picture of several runs, and the README's: drawn from results/, and what they show is there."""

import pytest

from lib.report import plot
from village import figures


def figure(value):
    return {"value": value, "ci95": [value - 0.01, value + 0.01]}


def test_plot_writes_a_picture(tmp_path):
    model = lambda x, y: {"harmless_ratio": figure(x), "helpfulness": figure(y)}
    plot(
        {"run": {"reference": model(0.6, 2.0), "policy": model(0.98, 1.5), "optimum": None}},
        tmp_path / "runs.png",
    )
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", figures.PICTURES)
def test_pictures_show_every_series(name, tmp_path):
    figure = figures.PICTURES[name]()
    figure.savefig(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 10_000 and (
        figures.PICTURES_FOLDER / f"{name}.svg"
    ).exists()
    for panel in figure.axes:
        lines = [line for line in panel.get_lines() if len(line.get_xdata())]
        assert (
            lines
            and panel.get_xlabel() + panel.get_title()
            and all(len(line.get_xdata()) == len(line.get_ydata()) for line in lines)
        )
    assert f"docs/pictures/{name}.svg" in (figures.ROOT / "README.md").read_text(encoding="utf-8")
