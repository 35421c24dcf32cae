"""The picture of several runs, and the pictures and tables that figures.py puts into the pages."""

import sys

from lib import pages
from lib.report import draw_curves, plot

import pytest

from real import figures as of_real_model
from village import figures

PICTURES = figures.PICTURES | of_real_model.PICTURES


def figure(value):
    return {"value": value, "ci95": [value - 0.01, value + 0.01]}


def model(harmless_ratio, helpfulness):
    return {"harmless_ratio": figure(harmless_ratio), "helpfulness": figure(helpfulness)}


def test_plot_writes_a_picture(tmp_path):
    results = {"reference": model(0.6, 2.0), "policy": model(0.98, 1.5), "optimum": None}
    plot({"run": results}, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_plot_leaves_out_runs_that_nobody_judged(tmp_path, capsys):
    results = {"reference": model(0.6, 2.0), "policy": model(0.98, 1.5), "optimum": None}
    unjudged = {"harmless_ratio": None, "helpfulness": None}
    half = {**results, "policy": {**results["policy"], "helpfulness": None}}
    other = {"reference": unjudged, "policy": unjudged, "optimum": None}
    plot({"judged": results, "other": other, "half": half}, tmp_path / "runs.png")
    said = capsys.readouterr().err
    assert "leaves out other:" in said and "leaves out half:" in said and "judged" not in said
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no run has helpfulness and harmless ratio"):
        plot({"other": other}, tmp_path / "none.png")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_show_every_series(name, tmp_path):
    picture = PICTURES[name]()
    picture.savefig(tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").stat().st_size > 10_000
    assert (pages.PICTURES_FOLDER / f"{name}.svg").exists()
    for panel in picture.axes:
        lines = [line for line in panel.get_lines() if len(line.get_xdata())]
        assert lines and panel.get_xlabel() + panel.get_title()
        assert all(len(line.get_xdata()) == len(line.get_ydata()) for line in lines)


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_is_on_a_page(name):
    picture = pages.PICTURES_FOLDER / f"{name}.svg"
    links = [(page, picture.relative_to(page.parent).as_posix()) for page in pages.pages()]
    assert any(link in page.read_text(encoding="utf-8") for page, link in links)


def test_every_page_gets_its_tables(tmp_path, monkeypatch):
    texts = [tmp_path / "README.md", tmp_path / "docs" / "results.md"]
    texts[1].parent.mkdir()
    for page in texts:
        page.write_text("before\n<!-- table: noise -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PICTURES_FOLDER", tmp_path / "docs" / "pictures")
    monkeypatch.setattr(figures, "PICTURES", {})
    figures.main([])
    expected = f"before\n<!-- table: noise -->\n{figures.table('noise')}\n<!-- end -->\nafter\n"
    assert [page.read_text(encoding="utf-8") for page in texts] == [expected] * 2


def test_a_run_draws_its_own_curves(finished, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((finished / "metrics.jsonl").read_bytes())
    draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "curves.png").exists(), "train.py draws them"


@pytest.mark.parametrize(
    "what", ["no log", "an empty log", "a cut log", "no matplotlib", "a folder"]
)
def test_what_goes_wrong_with_the_curves_is_one_line(what, finished, tmp_path, monkeypatch, capsys):
    log = (finished / "metrics.jsonl").read_bytes()
    if what != "no log":
        log = {"an empty log": b"", "a cut log": log[:-20]}.get(what, log)
        (tmp_path / "metrics.jsonl").write_bytes(log)
    if what == "no matplotlib":  # it is installed, and cannot be imported
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    if what == "a folder":
        (tmp_path / "curves.png").mkdir()
    draw_curves(tmp_path)
    said = capsys.readouterr().err
    assert said.count("curves.png was not drawn: ") == said.count("\n") == (what != "an empty log")
