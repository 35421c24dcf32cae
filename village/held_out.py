"""Do seeds that took no part in the tables of docs/results.md agree with them?

    SEEDS="20 21" village/experiments.sh             in a copy of the project
    python -m village.held_out COPY/village/results  adds the figures of that copy's seeds
    python -m village.held_out                       compares all that were added

A cell of a table agrees if the median of these seeds lies between the least and the greatest figure
of the table's seeds. Figures of single seeds are counted too. village/results/held_out.json keeps
{"file: run: heading": {seed: figure}}.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from lib import checkpoint
from lib.flags import run as run_main

from village import figures

RESULTS = figures.HERE / "results"
HELD_OUT = RESULTS / "held_out.json"


def by_seed(folder):
    """{"file: run: heading": {seed: figure}}, of those of the tables' files that the folder has.

    A cell that stands in two tables counts once; one that is "–" in the tables is left out.
    """
    found = defaultdict(dict)
    runs = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))  # file → seed → run
    for file in {file for file, *_ in figures.TABLES.values()}:
        path = folder / f"{file}.json"
        for place, result in (checkpoint.read_json(path) if path.exists() else {}).items():
            *_, seed, run = Path(place).parts
            runs[file][seed.removeprefix("seed")][run].append(result)
    for file, headings, names in figures.TABLES.values():
        for seed, its_runs in runs[file].items():
            for run in names:
                (of_seed,) = figures.figures_of(its_runs, run)
                for heading in headings:
                    figure = of_seed.get(figures.FIGURES[heading][0])
                    if figure:
                        found[f"{file}: {run}: {heading}"][seed] = round(figure["value"], 5)
    return found


def lies_in(figure, shown):
    """Whether a figure lies between the least and the greatest of {seed: figure}."""
    return min(shown.values()) <= figure <= max(shown.values())


def outside(shown, others):
    """{cell: (median of the others, least, greatest that is shown)} of the cells that disagree."""
    disagree = {}
    for cell, seeds in others.items():
        median = statistics.median(seeds.values())
        if not lies_in(median, shown[cell]):
            disagree[cell] = median, min(shown[cell].values()), max(shown[cell].values())
    return disagree


def singles(shown, others):
    """(how many figures of single seeds lie in the ranges that are shown, of how many)."""
    inside = [
        lies_in(figure, shown[cell]) for cell, seeds in others.items() for figure in seeds.values()
    ]
    return sum(inside), len(inside)


def main(argv=None):
    shown = by_seed(RESULTS)
    others = checkpoint.read_json(HELD_OUT) if HELD_OUT.exists() else {}
    for folder in sys.argv[1:] if argv is None else argv:
        for cell, seeds in by_seed(Path(folder)).items():  # a copy may still have the tables' seeds
            seeds = {seed: seeds[seed] for seed in seeds.keys() - shown[cell].keys()}
            others |= {cell: others.get(cell, {}) | seeds} if seeds else {}
        with checkpoint.replacing(HELD_OUT) as f:
            json.dump(others, f, indent=1, sort_keys=True)
    disagree = outside(shown, others)
    for cell, (median, least, greatest) in disagree.items():
        print(f"{cell}: {median:.3f} is not between {least:.3f} and {greatest:.3f}")
    seeds = sorted({int(seed) for found in others.values() for seed in found})
    agree = f"{len(others) - len(disagree)} of {len(others)} agree"
    inside, of = singles(shown, others)
    alone = f"of single seeds' figures {inside} of {of}"
    print(f"seeds {', '.join(map(str, seeds))}: {agree}; {alone}")


if __name__ == "__main__":
    run_main(main)
