"""docs/exercises.md: each command runs, here on a small model and few pairs. Its Python examples
are checked with those of all pages, in tests/test_project.py."""

import re
import shlex

import pytest
from conftest import ROOT, TINY

import eval as eval_script
import train

TEXT = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
EXERCISES = re.split(r"^## ", TEXT, flags=re.M)[1:]


def commands(exercise):
    blocks = re.findall(r"```bash\n(.*?)```", exercise, re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_there_are_eight_each_with_something_to_run_and_an_answer():
    assert [exercise.split(".")[0] for exercise in EXERCISES] == list("12345678")
    for exercise in EXERCISES:
        question, _, answer = exercise.partition("<details><summary>Answer</summary>")
        assert "```" in question and "</details>" in answer
    assert sum(len(commands(exercise)) for exercise in EXERCISES) > 8


@pytest.mark.parametrize("exercise", [e for e in EXERCISES if commands(e)], ids=lambda e: e[0])
def test_its_commands_run(exercise, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in commands(exercise):
        program, *arguments = command[1:] if command[0] == "python" else command
        if program == "train.py":
            train.main([*arguments, *TINY, "--data", str(folder)])
        elif program == "eval.py":
            eval_script.main([*arguments, "--device", "cpu"])
        else:
            assert command == ["pip", "install", "matplotlib"]
    assert capsys.readouterr().out
