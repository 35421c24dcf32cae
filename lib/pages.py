"""Tables and pictures of the Markdown pages, made from raw figures by each room's figures.py.

A page marks the place of a table by a line <!-- table: NAME --> before it and <!-- end --> behind.
"""

import re
from pathlib import Path

from lib import checkpoint
from lib.report import pyplot

ROOT = Path(__file__).parent.parent
PICTURES_FOLDER = ROOT / "docs" / "pictures"

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY, DARK_GREY = "#777777", "#555555"


def pages():
    """The Markdown pages of the project."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def markdown(rows):
    """Rows of text as a Markdown table. The first row is its head."""
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def with_tables(text, names, table):
    """A page's text in which each table of these names is made anew by table(name)."""

    def made_anew(match):
        return f"{match[1]}{table(match[2])}\n{match[3]}" if match[2] in names else match[0]

    return re.sub(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", made_anew, text, flags=re.S)


def canvas(rows, columns, size):
    """(figure, its panels (rows, columns)). size: inches.

    The background is white, so that the picture looks the same on a page in dark mode.
    """
    options = {"figsize": size, "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot().subplots(rows, columns, **options)
    for panel in axes.flat:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def renew(pictures, names, table):
    """Draw pictures {name: function} into docs/pictures, and put tables into the pages."""
    settings = {
        "svg.hashsalt": "safedpo",  # the same figures give the same file
        "svg.fonttype": "path",
        "font.size": 10,
        "savefig.facecolor": "white",
    }
    pyplot().rcParams.update(settings)
    PICTURES_FOLDER.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures.items():
        draw().savefig(PICTURES_FOLDER / f"{name}.svg", metadata={"Date": None})
        print(f"docs/pictures/{name}.svg: {draw.__doc__}")
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = with_tables(before, names, table)
        if after != before:
            with checkpoint.replacing(page) as f:
                f.write(after)
            print(f"{page.relative_to(ROOT)}: its tables are new")
