"""The README's pictures: drawn from results/, and what they show is there."""
import pytest

import figures


@pytest.mark.parametrize("name", figures.PICTURES)
def test_pictures_show_every_series(name, tmp_path):
    figure = figures.PICTURES[name]()
    figure.savefig(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 10_000 and (figures.HERE / "assets" / f"{name}.svg").exists()
    for panel in figure.axes:
        lines = [line for line in panel.get_lines() if len(line.get_xdata())]
        assert lines and panel.get_xlabel() + panel.get_title() and all(len(line.get_xdata()) == len(line.get_ydata()) for line in lines)
    assert f"assets/{name}.svg" in (figures.HERE / "README.md").read_text(encoding="utf-8")
