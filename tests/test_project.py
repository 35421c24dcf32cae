"""The project's own promises: what imports what, how large files are, that its pages are true."""

import ast
import doctest
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from lib import pages
from lib.flags import parse
from lib.settings import EvalConfig, TrainConfig

import pytest
from conftest import ROOT

import bench
import eval as eval_script
import model
import train
from village import endpoints, figures, neighbours, theory

ROOMS = ("lib", "village", "real", "conformance", "docs")
SCRIPTS = {"train", "eval", "bench"}
# Arrows point down this list; a file may import what stands below it.
MAY_IMPORT = {
    "docs": {"train", "data", "lib", "model", "safedpo", "village"},
    "village/neighbours.py": {"train", "data", "lib", "village"},
    "bench": {"train", "data", "lib", "model", "safedpo"},
    "train": {"eval", "data", "lib", "model", "safedpo"},
    "eval": {"data", "lib", "model", "safedpo", "village"},
    "data": {"lib", "model", "safedpo", "village.world"},
    "village": {"lib", "model", "safedpo", "village"},
    "real": {"lib", "model", "safedpo", "real"},
    "conformance": {"safedpo", "conformance"},
    "lib": {"lib", "model", "safedpo"},
    "model": set(),
    "safedpo": set(),
}
PACKAGES = {  # what a file may import that is neither ours nor Python's own
    "safedpo.py": {"torch"},
    "model.py": {"torch"},
    "village/world.py": set(),
    "lib/hf_weights.py": {"torch", "safetensors"},
    "lib/report.py": {"matplotlib"},
    "lib/checkpoint.py": {"torch", "filelock"},
    "lib/chat.py": {"jinja2"},
    "lib/rows.py": {"pyarrow"},
    "lib/hub.py": {"huggingface_hub"},
    "lib/watch.py": {"torch", "tqdm", "wandb"},
    "lib/peers.py": {"torch", "tokenizers", "transformers", "datasets", "trl", "peft"},
}
USUAL = {"torch", "numpy", "tokenizers", "tqdm"}
FILES = {
    str(path.relative_to(ROOT)): path
    for folder in (".", *ROOMS)
    for path in sorted((ROOT / folder).glob("*.py"))
}
PAGES = {path.name: path.read_text(encoding="utf-8") for path in pages.pages()}
README = PAGES["README.md"]
TEXT = "\n".join(PAGES.values())
COMMANDS = [
    line.strip()
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", TEXT, re.S)
    for line in block.replace("\\\n", "").splitlines()
]
FLAGS = {  # as a command calls it → its flags
    "train.py": TrainConfig,
    "eval.py": EvalConfig,
    "bench.py": bench.Config,
    "village.theory": theory.Config,
    "village.endpoints": endpoints.Config,
    "village.figures": figures.Config,
}


def imported(path):
    """The modules that a file imports: "torch", "lib.flags", …"""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module in ROOMS:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def first(name):
    return name.split(".")[0]


def test_imports_flow_one_way():
    ours = {name for name in MAY_IMPORT if "/" not in name}
    assert {first(name.removesuffix(".py").replace("/", ".")) for name in FILES} == ours
    for name, path in FILES.items():
        room = first(name.removesuffix(".py").replace("/", "."))
        for module in imported(path):
            if first(module) in ours:
                allowed = MAY_IMPORT.get(name, MAY_IMPORT[room])
                assert {module, first(module)} & allowed, f"{name} imports {module}"
            elif first(module) not in sys.stdlib_module_names:
                assert first(module) in PACKAGES.get(name, USUAL), f"{name} imports {module}"


def test_there_is_no_circle():
    """Each file imports only what can be imported before it."""
    modules = {name.removesuffix(".py").replace("/", "."): path for name, path in FILES.items()}
    needs = {name: {m for m in imported(path) if m in modules} for name, path in modules.items()}
    while needs:
        ready = {name for name, needed in needs.items() if not needed & needs.keys()}
        assert ready, f"a circle among {sorted(needs)}"
        needs = {name: needed for name, needed in needs.items() if name not in ready}


@pytest.mark.parametrize(
    "module", ["train", "bench", "docs.minimal", "village.theory", "village.endpoints"]
)
def test_how_threads_wait_is_said_before_torch_is_imported(module):
    program = (
        f"import sys, os, {module}; modules = list(sys.modules); "
        "print(modules.index('lib') < modules.index('torch'), os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {k: v for k, v in os.environ.items() if "SPIN" not in k and "WAIT" not in k}
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said.stdout.split() == ["True", "300"], said.stderr


def test_pages_and_scripts_are_read_in_one_sitting():
    for name in ("train.py", "eval.py"):
        assert FILES[name].read_text(encoding="utf-8").count("\n") <= 250, name
    assert len(README.split()) <= 1500


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_true(page):
    path = next(path for path in pages.pages() if path.name == page)
    flags = doctest.NORMALIZE_WHITESPACE
    failures, tried = doctest.testfile(str(path), module_relative=False, optionflags=flags)
    assert not failures and (tried > 5 or page != "README.md")


def test_pack_rows_example_is_true():
    failures, tried = doctest.testmod(model)
    assert tried >= 4 and not failures


@pytest.mark.parametrize("name", FLAGS)
def test_commands_have_flags_that_exist(name):
    found = 0
    for command in COMMANDS:
        words = shlex.split(command, comments=True)
        if name in words:
            arguments = words[words.index(name) + 1 :]
            parse(FLAGS[name], arguments)  # exits on what it does not know
            found += 1
    assert found >= (3 if name in ("train.py", "eval.py", "bench.py") else 1)


def test_experiments_have_flags_that_exist_and_every_run_of_the_tables():
    script = (ROOT / "village" / "experiments.sh").read_text(encoding="utf-8")
    names = {}
    for group, block in re.findall(r'each (\w+) "\$\w+" <<END\n(.*?)\nEND', script, re.S):
        for name, *flags in map(shlex.split, block.splitlines()):
            parse(TrainConfig, flags)  # exits on what it does not know
            names.setdefault(group, set()).add(name)
    assert len(names["village"]) > 25
    names["neighbours"] |= set(re.search("for name in (.*?);", script)[1].split())
    assert names["neighbours"] == set(neighbours.METHODS)
    assert 'judged+=" $out/village/$seed/safedpo-delta5"' in script  # beside them
    names["neighbours"].add("safedpo-delta5")
    for file, _, runs in figures.TABLES.values():
        runs = set(runs) - {"reference", "safe reference", "optimum"}
        assert runs <= names.get(file, names["village"])


@pytest.mark.parametrize("name", FLAGS)
def test_every_flag_is_explained_and_on_a_page(name, capsys):
    with pytest.raises(SystemExit) as end:
        parse(FLAGS[name], ["--help"], train.__doc__)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, shown.splitlines())) < 200
    for f in fields(FLAGS[name]):
        assert f.metadata["help"] and f.name in shown
        assert f"--{f.name}" in TEXT or f.name == "runs", f.name


@pytest.mark.parametrize("script", [train, eval_script, bench, theory, endpoints, figures])
def test_help_says_what_a_command_is_for(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert script.__doc__.strip().splitlines()[0] in capsys.readouterr().out


def test_symbols_and_stations_on_the_pages_exist():
    """`name` | `file.py` in tables, and file.py:function anywhere."""
    named = re.findall(r"`(\w+)`[^|\n]*\| `([\w/]+\.py)`", TEXT)
    named += [(name, file) for file, name in re.findall(r"`([\w/]+\.py):(\w+)`", TEXT)]
    assert len(named) > 15
    for name, file in named:
        assert re.search(rf"\b{name}\b", FILES[file].read_text(encoding="utf-8")), (name, file)


def test_links_and_pictures_on_the_pages_exist():
    for path in pages.pages():
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (path.parent / link).exists(), f"{path.name} → {link}"


def test_files_that_the_pages_name_exist():
    for name in set(re.findall(r"`((?:lib|village|docs|tests)/[\w./-]+)`", TEXT)):
        assert Path(ROOT / name).exists(), name
