"""Bad input ends in one clear line and exit code 2, and nothing is overwritten."""

import json
import shutil
import subprocess
import sys
from dataclasses import fields

from lib.flags import parse
from lib.policy import load_model
from lib.runs import FILES
from lib.settings import EvalConfig, TrainConfig

import pytest
import torch
from conftest import ROOT, SHORT, TINY, complaint

import eval as eval_room
import train


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--pairs", "both"], "argument --pairs: invalid choice: 'both'"),
        (["--delta", "five"], "argument --delta: invalid float value: 'five'"),
        (["--delta", "-1"], "argument --delta: -1.0 is out of range; expected at least 0"),
        (["--delta", "nan"], "argument --delta: nan is out of range"),
        (["--delta", "inf"], "argument --delta: inf is out of range"),
        (["--beta", "0"], "argument --beta: 0.0 is out of range; expected above 0"),
        (
            ["--label_noise", "1.5"],
            "argument --label_noise: 1.5 is out of range; expected at most 1",
        ),
        (["--epochs", "-1"], "argument --epochs: -1 is out of range"),
        (["--batch_size", "2.5"], "argument --batch_size: invalid int value: '2.5'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice"),
        (["--detla", "5"], "unrecognized arguments: --detla 5"),
        (["--delt", "5"], "unrecognized arguments: --delt 5"),
        (["--device", "abacus"], "--device abacus cannot be used here"),
        (["--data", "no/such/place"], "no/such/place: no such file or folder"),
        (["--init_from", "no/such/model.pt"], "no/such/model.pt"),
        (["--n_head", "3"], "d_model 128 must be n_head 3 times an even head size"),
        (["--n_kv_head", "3"], "n_head 4 must be a multiple of n_kv_head 3"),
        (["--resume"], "holds no run to resume"),
        (
            ["--sft_epochs", "0"],
            "--sft_epochs 0 needs a model to start from; expected --init_from FOLDER",
        ),
        (
            ["--init_from", "."],
            "--init_from .: no policy.pt and no config.json; expected a run of ours or a Hugging "
            "Face model",
        ),
        (
            ["--delta", "1e39"],
            "argument --delta: 1e+39 is out of range; expected a finite number that float32 holds",
        ),
        (
            ["--beta", "1e-40"],
            "argument --beta: 1e-40 is out of range; expected a finite number that float32 holds",
        ),
        (["--beta", "-0.1"], "argument --beta: -0.1 is out of range; expected above 0"),
        (
            ["--label_noise", "-0.1"],
            "argument --label_noise: -0.1 is out of range; expected at least 0",
        ),
        (["--seed", "-1"], "argument --seed: -1 is out of range; expected at least 0"),
        (
            ["--seed", "1" + "0" * 20],
            "argument --seed: 100000000000000000000 is out of range; expected a smaller one",
        ),
        (["--n_layer", "0"], "argument --n_layer: 0 is out of range; expected above 0"),
        (
            ["--n_layer", "1000000"],
            "argument --n_layer: 1000000 is out of range; expected at most 1024",
        ),
        (["--d_model", "2000000"], "argument --d_model: 2000000 is out of range"),
        (["--d_model", "1000000", "--n_head", "2"], "out of memory"),
        (["--d_ff", "0"], "argument --d_ff: 0 is out of range"),
        (
            ["--vocab_size", "10"],
            "argument --vocab_size: 10 is out of range; expected at least 257",
        ),
        (["--max_length", "1"], "argument --max_length: 1 is out of range; expected at least 2"),
        (["--sft_epochs", "-1"], "argument --sft_epochs: -1 is out of range; expected at least 0"),
        (["--sft_lr", "0"], "argument --sft_lr: 0.0 is out of range; expected above 0"),
        (["--lr", "nan"], "argument --lr: nan is out of range; expected a finite number"),
        (["--lr=-1e-4"], "argument --lr: -0.0001 is out of range; expected above 0"),
        (["--batch_size", "0"], "argument --batch_size: 0 is out of range"),
        (["--micro_batch_size", "0"], "argument --micro_batch_size: 0 is out of range"),
        (["--warmup", "1.1"], "argument --warmup: 1.1 is out of range; expected at most 1"),
        (
            ["--weight_decay", "-1"],
            "argument --weight_decay: -1.0 is out of range; expected at least 0",
        ),
        (["--grad_clip", "0"], "argument --grad_clip: 0.0 is out of range; expected above 0"),
        (["--save_every", "0"], "argument --save_every: 0 is out of range"),
        (["--eval_prompts", "0"], "argument --eval_prompts: 0 is out of range"),
        (
            ["--temperature", "-1"],
            "argument --temperature: -1.0 is out of range; expected at least 0",
        ),
        (["--top_p", "0"], "argument --top_p: 0.0 is out of range; expected above 0"),
        (["--top_p", "1.01"], "argument --top_p: 1.01 is out of range; expected at most 1"),
        (["--max_new_tokens", "0"], "argument --max_new_tokens: 0 is out of range"),
        (["--prompt_template", "\udcff{prompt}"], "expected text in UTF-8"),
        (["--data", "\udcff"], "expected text in UTF-8"),
        (["--device", "hpu"], "--device hpu cannot be used here"),
        (["--prompt_template", "{prompt}{prompt}"], "expected {prompt} in it once"),
        (
            ["--prompt_template", "Q:"],
            "prompt template 'Q:': expected {prompt} in it once, or a name: plain, beaver, chatml, "
            "llama3",
        ),
    ],
)
def test_flags(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(train.main, argv, capsys)
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_bad_rows_through_the_command(capsys, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = json.dumps(rows["train"][0])
    unsafe = json.dumps(
        {**rows["train"][0], "is_response_0_safe": False, "is_response_1_safe": False}
    )
    unlabelled = json.dumps(
        {k: v for k, v in rows["train"][0].items() if k != "is_response_0_safe"}
    )
    for content, message in {
        "\n".join([good, "{broken"]): "data.jsonl:2: not valid JSON",
        "\n".join(
            [good, good, unlabelled]
        ): "data.jsonl:3: is_response_0_safe is missing; expected true or false",
        "": "data.jsonl, its train split by a hash of prompts: holds no row",
        good: "data.jsonl, its test split by a hash of prompts: holds no row",
        "\n".join(
            [
                unsafe.replace("How", f"{i} How")
                .replace("Please", f"{i} Please")
                .replace("What", f"{i} What")
                for i in range(50)
            ]
        ): "no pair is left to train on: train pairs (safedpo): 0 kept safe-safe, 0 kept "
        "safe-unsafe, 0 swapped, 45 dropped; expected rows with a safe answer",
    }.items():
        (tmp_path / "data.jsonl").write_text(content)
        assert message in complaint(train.main, [*TINY, "--data", "data.jsonl"], capsys)
        assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_folder_with_a_run_is_left_alone(finished, folder, capsys):
    before = {p: p.read_bytes() for p in finished.iterdir()}
    argv = [*TINY, "--data", str(folder), "--out_dir", str(finished)]
    assert f"{finished} already holds a run; --resume goes on with it" in complaint(
        train.main, argv, capsys
    )
    assert "--delta 7.0 contradicts the run in" in complaint(
        train.main, ["--resume", "--delta", "7", "--out_dir", str(finished)], capsys
    )
    assert {p: p.read_bytes() for p in finished.iterdir()} == before


def test_leftovers_of_a_run_are_not_taken_for_a_new_one(finished, folder, capsys, tmp_path):
    for name in FILES:
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_bytes(
            (finished / name).read_bytes() if (finished / name).exists() else b""
        )
        argv = [*TINY, "--data", str(folder), "--out_dir", str(tmp_path / name)]
        assert "already holds a run" in complaint(train.main, argv, capsys)


def test_files_that_are_no_checkpoint(finished, folder, capsys, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "cut.pt").write_bytes((finished / "policy.pt").read_bytes()[:20000])
    torch.save({"config": {"wings": 2}, "model": {}, "tokenizer": "{}"}, tmp_path / "strange.pt")
    sized = [*TINY, "--data", str(folder), "--init_from", str(tmp_path / "text.pt")]
    assert "--vocab_size 400: --init_from" in complaint(train.main, sized, capsys)
    for name, message in {
        "list.pt": "list.pt: damaged, or not a checkpoint of ours",
        "strange.pt": "holds no model of ours",
        "text.pt": "not a checkpoint of ours",
        "cut.pt": "cut.pt: damaged, or not a checkpoint of ours",
        "empty.pt": "not a checkpoint of ours",
        "pickled.pt": "not a checkpoint of ours",
        "other.pt": "holds no model",
        "": "policy.pt",
    }.items():
        argv = [
            *SHORT,
            "--data",
            str(folder),
            "--init_from",
            str(tmp_path / name),
            "--out_dir",
            str(tmp_path / "out"),
        ]
        assert message in complaint(train.main, argv, capsys)


def test_a_tilde_is_the_home_folder_in_every_flag_that_names_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    for settings in (TrainConfig, EvalConfig):
        for f in fields(settings):
            if f.metadata["path"]:
                given = parse(settings, ["run"] * (settings is EvalConfig) + [f"--{f.name}=~/x"])
                assert given[f.name] == "/home/ada/x"
    assert parse(TrainConfig, ["--prompt_template=~{prompt}"])["prompt_template"] == "~{prompt}"


@pytest.mark.parametrize("command", ["train.py --help", "eval.py {run}"])
def test_a_reader_that_has_read_enough_gets_no_traceback(finished, command):
    argv = [sys.executable, *command.format(run=finished).split()]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.close()
        said = done.stderr.read().decode()
    assert done.returncode in (0, 141)  # argparse hides it by itself, where nothing is buffered
    assert "Traceback" not in said and "Broken" not in said


def test_a_run_whose_reader_left_says_how_it_goes_on(folder, tmp_path):
    argv = [sys.executable, "-u", "train.py", *TINY, "--data", str(folder)]
    argv += ["--out_dir", str(tmp_path / "run")]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        done.stdout.readline()
        done.stdout.close()
        said = done.stderr.read().decode()
    assert "Traceback" not in said
    assert done.returncode == 141 or (tmp_path / "run" / "eval.json").exists()


def test_output_that_is_closed_is_no_error(finished):
    command = f"{sys.executable} eval.py {finished} --prompt x >&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode and not done.stderr


def test_prompts_without_answers_teach_nothing(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "x?", "benign": true}\n')
    error = complaint(
        train.main, ["--data", str(tmp_path), "--out_dir", str(tmp_path / "run")], capsys
    )
    assert "no train split, only test; expected a file with train in its name, of rows" in error


def test_eval_of_what_is_no_run(finished, capsys, tmp_path):
    assert "no finished run (config.json is missing)" in complaint(
        eval_room.main, [str(tmp_path)], capsys
    )
    assert "the following arguments are required: DIR" in complaint(eval_room.main, [], capsys)
    argv = [str(finished), "--split", "unseen", "--device", "cpu", "--max_new_tokens", "4"]
    assert "no unseen split, only train, test" in complaint(eval_room.main, argv, capsys)
    argv = [
        str(finished),
        "--plot",
        str(tmp_path / "p.png"),
        "--device",
        "cpu",
        "--eval_prompts",
        "8",
        "--max_new_tokens",
        "12",
    ]
    assert "--plot" in complaint(eval_room.main, argv, capsys)


def test_configs_that_nobody_here_wrote(finished, folder, capsys, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("reference.pt", "policy.pt"):
        (tmp_path / "run" / name).write_bytes((finished / name).read_bytes())
    for content, message in (
        ("[]", "holds []; expected a JSON object"),
        ("{}", "missing; expected"),
        ("{", "not valid JSON"),
    ):
        (tmp_path / "run" / "config.json").write_text(content)
        assert message in complaint(eval_room.main, [str(tmp_path / "run")], capsys)
        assert message in complaint(
            train.main, ["--resume", "--out_dir", str(tmp_path / "run")], capsys
        )
        train.main(
            [*TINY, "--data", str(folder), "--out_dir", str(tmp_path / content.encode().hex())]
        )  # it is in nobody's way
        capsys.readouterr()


@pytest.mark.parametrize(
    "name, value",
    [
        ("beta", None),
        ("beta", 0),
        ("beta", "x"),
        ("beta", float("nan")),
        ("delta", -1),
        ("seed", "0"),
        ("seed", []),
        ("seed", 1e9),
        ("max_length", None),
        ("max_length", True),
        ("data", 5),
        ("data", None),
        ("pairs", []),
        ("top_p", 7),
        ("temperature", "hot"),
        ("n_layer", 10**9),
        ("epochs", -2),
        ("pairs", "both"),
        ("lr", float("inf")),
        ("resume", "yes"),
        ("data_sha256", 5),
        ("reference", 5),
    ],
    ids=str,
)
def test_spoiled_configs_are_named(finished, capsys, tmp_path, name, value):
    shutil.copytree(finished, tmp_path / "run")
    config = json.loads((finished / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, name: value}))
    rooms = [(train.main, ["--resume", "--out_dir", str(tmp_path / "run")])]
    if name in (
        "beta",
        "delta",
        "seed",
        "max_length",
        "data",
        "top_p",
        "temperature",
    ) and value not in (0, -1):
        rooms.append((eval_room.main, [str(tmp_path / "run")]))
    for main, argv in rooms:
        number = {"nan": "NaN is no number", "inf": "Infinity is no number"}
        expected = number.get(str(value), f"{name} is ")
        assert "run/config.json: " in (error := complaint(main, argv, capsys)) and expected in error


def test_every_flag_that_contradicts_is_named(finished, capsys):
    argv = ["--resume", "--delta", "7", "--lr", "0.5", "--seed", "0", "--out_dir", str(finished)]
    assert "--delta 7.0, --lr 0.5 contradicts the run in" in complaint(train.main, argv, capsys)


def write(path, *splits):
    for name, rows in zip(("train", "test"), splits):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("pairs", ["helpful", "safedpo", "harmless"])
def test_a_test_split_of_unsafe_answers_alone_stops_nothing(rows, capsys, tmp_path, pairs):
    unsafe = {"is_response_0_safe": False, "is_response_1_safe": False}
    data = write(tmp_path, rows["train"], [{**row, **unsafe} for row in rows["test"][:9]])
    run = tmp_path / "run"
    train.main([*TINY, "--data", data, "--pairs", pairs, "--out_dir", str(run)])
    said = capsys.readouterr().out
    assert (
        "test pairs (safedpo): 0 kept safe-safe, 0 kept safe-unsafe, 0 swapped, 9 dropped" in said
    )
    result = json.loads((run / "eval.json").read_text())
    assert result["policy"]["preferences"] == {} and result["policy"]["n"] == 8
    eval_room.main([str(run), "--device", "cpu", "--verbose"])


def test_data_of_one_kind(rows, capsys, tmp_path):
    label = lambda *safe: [
        {**row, "is_response_0_safe": safe[0], "is_response_1_safe": safe[1]}
        for row in rows["train"]
    ]
    (tmp_path / "safe").mkdir()
    safe = write(tmp_path / "safe", label(True, True), label(True, True)[:9])
    for delta in ("0", "9"):
        train.main(
            [*TINY, "--data", safe, "--delta", delta, "--out_dir", str(tmp_path / "runs" / delta)]
        )
    assert (
        len({(tmp_path / "runs" / delta / "policy.pt").read_bytes() for delta in ("0", "9")}) == 1
    ), "Δ is idle"
    (tmp_path / "unsafe").mkdir()
    capsys.readouterr()
    unsafe = write(tmp_path / "unsafe", label(False, False), rows["test"][:9])
    assert (
        "no pair is left to train on: train pairs (safedpo): 0 kept safe-safe, 0 kept safe-unsafe, "
        "0 swapped, 96 dropped; expected rows with a safe answer"
        in complaint(
            train.main, [*TINY, "--data", unsafe, "--out_dir", str(tmp_path / "none")], capsys
        )
    )
    assert not (tmp_path / "none").exists()


def test_one_pair_and_one_prompt(rows, capsys, tmp_path):
    row = {**rows["train"][0], "is_response_0_safe": True}
    (tmp_path / "alone.jsonl").write_text(json.dumps(row))
    assert "split by a hash of prompts: holds no row" in complaint(
        train.main, [*TINY, "--data", str(tmp_path / "alone.jsonl")], capsys
    )
    train.main([*TINY, "--data", write(tmp_path, [row], [row]), "--out_dir", str(tmp_path / "one")])
    assert (
        json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])["epoch"] == 1
    )
    train.main(
        [
            *TINY,
            "--data",
            write(tmp_path, [row] * 5, [row] * 2),
            "--out_dir",
            str(tmp_path / "prompt"),
        ]
    )
    assert json.loads((tmp_path / "prompt" / "eval.json").read_text())["policy"]["n"] == 1


STRANGE = {
    "right to left": "כיצד \u202eבונים\u202c עפיפון؟",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈" * 9,
    "zero width": "a\u200bb\u200d\ufeff",
    "control": "a\x00\x07\x1b[31m\x7f\r\n\u2028",
    "combining": "e" + "\u0301" * 500,
    "long": "knot " * 10_000,
    "blank": " ",
    "empty": "",
    "EOS": "<eos> first <eos><|im_end|></s>",
    "template": "{prompt} {0} %s",
}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_strange_texts_train(finished, rows, tmp_path, text):
    row = {
        **rows["train"][0],
        "prompt": f"How? {text[:200]}",
        "response_0": text,
        "is_response_0_safe": True,
    }
    argv = [
        *SHORT,
        "--data",
        write(tmp_path, [row] * 3, [row]),
        "--init_from",
        str(finished),
        "--out_dir",
        str(tmp_path / "run"),
    ]
    train.main(argv)
    answered = json.loads((tmp_path / "run" / "samples.jsonl").read_text())
    assert answered["prompt"] == row["prompt"]
    _, tokenizer = load_model(finished / "policy.pt", torch.device("cpu"))
    (ids,) = tokenizer.answers([text])
    assert ids.index(tokenizer.eos) == len(ids) - 1, "an EOS in the text is text"
    assert tokenizer.decode(ids) == text


def test_resuming_on_other_data_is_refused(rows, capsys, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows["train"]))
    train.main([*TINY, "--data", str(file), "--out_dir", str(tmp_path / "run")])
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    file.write_text("".join(json.dumps(r) + "\n" for r in reversed(rows["train"])))
    assert "has changed since the run in" in complaint(
        train.main, ["--resume", "--out_dir", str(tmp_path / "run")], capsys
    )
    assert {p: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


def test_the_script_itself_exits_with_2():
    done = subprocess.run(
        [sys.executable, "train.py", "--pairs", "x"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("train.py: error: argument --pairs")
        and done.stdout == ""
    )


@pytest.mark.parametrize(
    "flags, idle, other",
    [
        (["--prompt", "x", "--export", "y"], "--export", "--prompt"),
        (["--export", "x", "--export_adapter", "y"], "--export_adapter", "--export"),
        (["--export_adapter", "x", "--verbose"], "--verbose", "--export_adapter"),
    ],
)
def test_a_flag_that_does_nothing_beside_another_is_refused(flags, idle, other, capsys):
    said = complaint(eval_room.main, ["run", *flags], capsys)
    assert f"{idle} does nothing beside {other}; leave one of them out" in said


def test_a_flag_that_needs_another_is_refused_alone(capsys):
    said = complaint(eval_room.main, ["run", "--export_dtype", "float16"], capsys)
    assert "--export_dtype does nothing without --export" in said
