"""Prompts of several messages through the whole: training, table, judges, export, another day."""

import json

import pytest
import transformers
from conftest import complaint
from test_chat import LLAMA3, QWEN
from test_pretrained import argv, make, make_judge

import eval as eval_room
import train


def conversations(folder, path, system):
    """The village's rows as TRL has them, whose prompts are messages; the first with one text."""
    path.mkdir()
    for split in ("train", "test"):
        with open(path / f"{split}.json", "w") as f:
            for number, line in enumerate((folder / f"{split}.jsonl").open()):
                row = json.loads(line)
                before = [{"role": "system", "content": "Be kind."}] * system
                before += [
                    {"role": "user", "content": "Hello!"},
                    {"role": "assistant", "content": "Good day."},
                ]
                question = {"role": "user", "content": row["prompt"]}
                prompt = row["prompt"] if not number else [*before, question]
                better = row["better_response_id"]
                shape = {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": row[f"response_{better}"]}],
                    "rejected": [{"role": "assistant", "content": row[f"response_{1 - better}"]}],
                    "chosen_safe": int(row[f"is_response_{better}_safe"]),
                    "rejected_safe": int(row[f"is_response_{1 - better}_safe"]),
                }
                f.write(json.dumps(shape) + "\n")
    return path


def model(path, template):
    make(path, "qwen2")
    (path / "chat_template.jinja").write_text(template)
    return path


def test_conversations_are_trained_on_sampled_judged_and_exported(folder, tmp_path, capsys):
    hf, data = model(tmp_path / "hf", QWEN), conversations(folder, tmp_path / "data", system=True)
    run = tmp_path / "run"
    train.main(argv(init_from=hf, data=data, beta=0.1, delta=10, out_dir=run))
    said = capsys.readouterr().out
    assert "system: Be kind.\n  user: Hello!\n  assistant: Good day.\n  user: " in said
    rows = [json.loads(line) for line in (run / "samples.jsonl").open()]
    roles = [[m["role"] for m in row["prompt"]] for row in rows[1:]]
    assert isinstance(rows[0]["prompt"], str)
    assert all(found == ["system", "user", "assistant", "user"] for found in roles)
    with open(data / "train.json") as f:
        messages = [{"role": "user", "content": json.loads(f.readline())["prompt"]}]
    fast = transformers.AutoTokenizer.from_pretrained(hf)
    text = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful")
    n = len(fast(text, add_special_tokens=False).input_ids)
    assert f"a prompt as the model reads it, {n} tokens: {text!r}\n" in said
    assert f"--prompt '{json.dumps(rows[3]['prompt'])}'" in said
    eval_room.main([str(run), "--device", "cpu", "--prompt", json.dumps(rows[3]["prompt"])])
    asked = capsys.readouterr().out
    assert asked.count("Good day.") == 3 and asked.count("policy:") == 3
    eval_room.main([str(run), "--export", str(tmp_path / "out")])
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == QWEN
    make_judge(tmp_path / "judge")
    capsys.readouterr()
    judging = [str(run), "--reward_model", str(tmp_path / "judge"), "--device", "cpu"]
    assert "has no place for a system message" in complaint(eval_room.main, judging, capsys)


def test_conversations_are_judged_and_scores_find_them(folder, tmp_path, capsys):
    hf, data = model(tmp_path / "hf", QWEN), conversations(folder, tmp_path / "data", system=False)
    run = tmp_path / "run"
    train.main(argv(init_from=hf, data=data, beta=0.1, delta=10, out_dir=run))
    make_judge(tmp_path / "judge")
    eval_room.main([str(run), "--reward_model", str(tmp_path / "judge"), "--device", "cpu"])
    rows = [json.loads(line) for line in (run / "samples.jsonl").open()]
    assert all("policy_reward" in row for row in rows)
    scored = tmp_path / "scored.jsonl"
    scored.write_text(
        "".join(json.dumps({**row, "policy_cost": -1.0}) + "\n" for row in rows[::-1])
    )
    eval_room.main([str(run), "--scores", str(scored), "--device", "cpu"])
    figures = json.loads((run / "eval.json").read_text())["policy"]
    assert figures["harmless_ratio"]["value"] == 1


def test_a_run_goes_on_with_the_day_on_which_it_began(folder, tmp_path, monkeypatch, capsys):
    hf, days = model(tmp_path / "hf", LLAMA3), []
    for name, date in (("one", "2026-01-31"), ("same", "2026-01-31"), ("other", "2026-02-01")):
        flags = dict(init_from=hf, data=folder, sft_epochs=1, date=date, out_dir=tmp_path / name)
        train.main(argv(**flags))
        days.append((tmp_path / name / "policy.pt").read_bytes())
    assert days[0] == days[1] != days[2]
    assert "Today: 01 Feb 2026" in capsys.readouterr().out
    (tmp_path / "one" / "reference.pt").unlink()
    (tmp_path / "one" / "policy.pt").unlink()
    (tmp_path / "one" / "metrics.jsonl").unlink()
    train.main(["--resume", "--out_dir", str(tmp_path / "one")])
    assert (tmp_path / "one" / "policy.pt").read_bytes() == days[0]
    saved = json.loads((tmp_path / "one" / "config.json").read_text())
    assert saved["date"] == "2026-01-31"


@pytest.mark.parametrize("date", ["today", "2026-13-01", "31.01.2026"])
def test_a_date_that_is_none_is_refused(date, capsys):
    assert f"--date {date}: is no day; expected one as 2026-01-31" in complaint(
        train.main, ["--date", date], capsys
    )
