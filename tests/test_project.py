"""The project's own promises: what imports what, and that the README is true."""

import ast
import doctest
import re
import shlex
from dataclasses import fields

import pytest
from conftest import ROOT

import bench
import eval as eval_room
import train
from village import figures, theory

MAY_IMPORT = {
    "safedpo": set(),
    "model": set(),
    "toy_world": set(),
    "tokenizer": set(),
    "parallel": set(),
    "report": set(),
    "estimate": set(),
    "flags": set(),
    "checkpoint": {"parallel"},
    "pretrained": {"model", "tokenizer", "checkpoint"},
    "records": {"safedpo", "toy_world", "checkpoint", "parallel"},
    "data": {"safedpo", "model", "parallel"},
    "eval": {
        "safedpo",
        "toy_world",
        "model",
        "tokenizer",
        "pretrained",
        "records",
        "data",
        "flags",
        "checkpoint",
        "parallel",
        "report",
        "estimate",
    },
    "train": {
        "safedpo",
        "toy_world",
        "model",
        "tokenizer",
        "pretrained",
        "records",
        "data",
        "flags",
        "checkpoint",
        "parallel",
        "report",
        "estimate",
        "eval",
    },
    "bench": {"safedpo", "model", "data", "flags", "eval", "train"},
    "theory": {"safedpo", "model", "flags", "checkpoint"},
    "figures": {"report", "flags", "checkpoint"},
}
OUTSIDE = {
    "safedpo": {"torch"},
    "estimate": {"torch"},
    "model": {"torch"},
    "toy_world": set(),
    "checkpoint": {"torch", "filelock"},
    "parallel": {"torch", "tqdm"},
    "flags": {"torch"},
    "tokenizer": {"tokenizers"},
    "pretrained": {"torch", "tokenizers", "safetensors"},
    "report": {"matplotlib"},
    "records": {"numpy"},
    "data": {"torch", "numpy"},
    "eval": {"torch"},
    "train": {"torch", "tqdm"},
    "theory": {"torch"},
    "figures": set(),
    "bench": {"torch", "numpy", "tokenizers", "transformers", "datasets", "trl"},
}
ROOMS = (train, eval_room, bench, theory, figures)  # those with a command line
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.strip()
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S)
    for line in block.replace("\\\n", "").splitlines()
]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_imports_flow_one_way():
    import sys

    rooms = {p.stem: p for p in ROOT.glob("*.py")}
    assert rooms.keys() == MAY_IMPORT.keys()
    for room, path in rooms.items():
        names = set(imported(path))
        assert names & rooms.keys() <= MAY_IMPORT[room], room
        assert names - rooms.keys() - sys.stdlib_module_names <= OUTSIDE[room], room


def test_readme_example_is_true():
    failures, tried = doctest.testfile(
        str(ROOT / "README.md"), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert tried > 5 and not failures


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.__name__)
def test_readme_commands_have_flags_that_exist(room, capsys):
    name = room.__name__ + ".py"
    found = 0
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if name in words:
            room.parse(
                room.Config, words[words.index(name) + 1 :]
            )  # exits on what it does not know
            found += 1
    assert found >= (3 if room in (train, eval_room, bench) else 1)


def test_experiments_have_flags_that_exist_and_every_run_of_the_tables():
    script = (ROOT / "experiments.sh").read_text(encoding="utf-8")
    names = {}
    for group, block in re.findall(r"each (\w+) <<END\n(.*?)\nEND", script, re.S):
        for name, *flags in map(shlex.split, block.splitlines()):
            train.parse(train.Config, flags)  # exits on what it does not know
            names.setdefault("xstest" if group == "xstest" else "village", set()).add(name)
    assert len(names["village"]) > 25
    for file, _, runs in figures.TABLES.values():
        assert (
            set(runs) - {"reference", "safe reference", "optimum"}
            <= names["xstest" if file == "xstest" else "village"]
        )


def test_every_flag_is_explained_and_in_the_readme():
    for room in ROOMS:
        for f in fields(room.Config):
            assert f.metadata["help"] and (f"--{f.name}" in README or f.name == "runs"), f.name


def test_help_reads_aloud(capsys):
    for room in ROOMS:
        with pytest.raises(SystemExit) as end:
            room.parse(room.Config, ["--help"])
        shown = capsys.readouterr().out
        assert end.value.code == 0 and max(map(len, shown.splitlines())) < 200
        for f in fields(room.Config):
            assert f.name in shown


def test_symbols_in_the_readme_exist():
    for name, file in re.findall(r"`(\w+)`[^|]*\| `(\w+\.py)`", README):
        assert re.search(rf"\b{name}\b", (ROOT / file).read_text(encoding="utf-8")), (name, file)
