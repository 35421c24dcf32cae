"""The benchmark: what it counts, and that it runs."""

import shlex
import subprocess
import sys
from dataclasses import replace
from itertools import chain
from statistics import mean

from lib import initial

import pytest
import torch
from conftest import ROOT, complaint

import bench
import data
from model import Transformer, pack_rows
from safedpo import Pair

SMALL = shlex.split(
    "--n_layer 1 --n_head 2 --n_kv_head 1 --d_model 16 --d_ff 24 --vocab_size 300 "
    "--steps 3 --prompt_tokens 5 --answer_tokens 6"
)


def config(*flags):
    return bench.settle(bench.Config(**bench.parse(bench.Config, [*SMALL, *flags])))


def test_operations_by_hand():
    pairs = [Pair([2] * 4, [3, 3, 1], [4, 1], 0, 0)]  # 9 tokens, 5 of them answers
    # q k v, out, SwiGLU: each token is multiplied by all
    weights = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 24
    # keys seen by the prompt's queries and each answer's
    seen = 4 * 4 / 2 + 3 * (4 + 1.5) + 2 * (4 + 1)
    expected = 2 * (9 * weights + 5 * 300 * 16) + 2 * 2 * 16 * seen  # scores, and sums of values
    assert bench.operations(bench.sizes_of(config()), pairs) == expected


def test_operations_against_torchs_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    c = config()
    net, pairs = Transformer(bench.sizes_of(c)), bench.make_pairs(c)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for p in pairs:
            net(pack_rows([(p.x, [p.y_w, p.y_l])]))
    keys_seen = sum(
        len(p.x) ** 2 / 2 + sum(len(y) * (len(p.x) + len(y) / 2) for y in p[1:3]) for p in pairs
    )
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if "attention" not in str(op))
    assert bench.operations(net.config, pairs) - 4 * 16 * keys_seen == products


def test_pairs_have_the_lengths_asked_for():
    pairs = bench.make_pairs(
        config("--steps", "400", "--prompt_tokens", "25", "--answer_tokens", "80")
    )
    assert mean(len(p.x) for p in pairs) == pytest.approx(25, rel=0.05)
    assert mean(len(p.y_w) for p in pairs) == pytest.approx(81, rel=0.05)
    assert pairs[0].y_w[-1] == 1


def test_it_prints_figures(capsys):
    bench.main([*SMALL, "--checkpointing"])
    *_, line = capsys.readouterr().out.splitlines()
    name, pairs, tokens, share, memory = line.split()
    assert name == "ours"
    assert float(pairs) > 0
    assert float(tokens) > 5 * float(pairs)
    assert share.endswith("%") and float(memory) > 0.1


def test_figures_by_hand(monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda device: 1.5)
    pairs = [Pair([2] * 4, [3, 3, 1], [4, 1], 0, 0)] * 12
    c = config("--steps", "4", "--batch_size", "3")
    # 4 steps, of which two are timed: 2 s each on average
    figures = bench.report(c, pairs, 4.0, [50.0, 50.0, 1.0, 3.0])
    assert figures == {"pairs/s": 12 / (4 + 4 * 2), "tokens/s": 12 * 9 / 12, "GB": 1.5, "s": 12.0}


@pytest.mark.parametrize("dtype, rank", [("float32", 0), ("bfloat16", 0), ("float32", 2)])
def test_the_step_that_is_timed_is_the_whole_step(monkeypatch, dtype, rank):
    calls = []  # the pairs of each

    def train_step(model, optimizer, scaler, batches, loss, clip, precision):
        with precision:
            assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == getattr(torch, dtype)
        calls.append([i for batch in batches for i in batch.pairs])

    monkeypatch.setattr(bench.train, "train_step", train_step)
    monkeypatch.setattr(bench, "clock", lambda device: 2.0 * len(calls))  # 2 s a step
    rates = {getattr(torch, dtype): 1e6}
    monkeypatch.setattr(bench, "matmul_rate", lambda device, kind: rates[kind])
    c = config("--dtype", dtype, "--lora_rank", str(rank))
    pairs = bench.make_pairs(c)
    figures = bench.ours(c, pairs)
    assert [len(pairs) for pairs in calls] == [8] * 3
    assert sorted(chain(*calls)) == list(range(24))
    assert figures["s"] == 6.0 and figures["pairs/s"] == 4.0
    # the reference, forward, to the inputs; and where W learns, to the weights
    work = (3 if rank else 4) * bench.operations(bench.sizes_of(c), pairs)
    assert figures["MFU"] == pytest.approx(work / 6.0 / 1e6)


def test_the_rate_is_that_of_a_product(monkeypatch):
    times = iter([0.0, 0.05, 0.15])
    monkeypatch.setattr(bench, "clock", lambda device: next(times))
    assert bench.matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(
        2 * 1024**3 / 0.15
    )


def test_memory_is_that_of_the_process():
    program = (
        "import bench, torch; held = torch.ones(2**28); "  # 1.07 GB
        "print(bench.peak_memory(torch.device('cpu')))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert 1.1 < float(done.stdout) < 1.9


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--table --vs trl", "--vs does nothing beside --table"),
        ("--memory --rounds 2", "--rounds does nothing beside --memory"),
        ("--sampling --steps 4", "--steps does nothing beside --sampling"),
        ("--init_from x --n_layer 3", "--n_layer does nothing beside --init_from"),
        ("--init_from x --data x --prompt_tokens 9", "--prompt_tokens does nothing beside --data"),
        ("--data x", "--data does nothing without --init_from"),
        ("--devices 2", "--devices does nothing without --memory"),
        ("--eval_prompts 2", "--eval_prompts does nothing without --sampling"),
        ("--sampling --compile", "--compile does nothing beside --sampling"),
        ("--vs transformers", "--vs transformers needs --sampling"),
        ("--memory --init_from gone", "--init_from gone: no such file or folder"),
    ],
)
def test_what_it_cannot_do_is_said(flags, message, capsys):
    assert message in complaint(bench.main, shlex.split(flags), capsys)


def test_sampling_is_timed(capsys):
    bench.main([*SMALL[:12], "--sampling", "--eval_prompts", "3", "--max_new_tokens", "5"])
    *_, line = capsys.readouterr().out.splitlines()
    name, pairs, tokens, share, _ = line.split()
    assert (name, pairs, share) == ("ours", "–", "–") and float(tokens) > 0


def test_each_answer_has_as_many_tokens_as_were_asked_for(monkeypatch):
    times = iter([10.0, 14.0])
    monkeypatch.setattr(bench, "clock", lambda device: next(times))
    figures = bench.our_samples(config("--max_new_tokens", "6"), [[2, 3], [4], [5, 6, 7]])
    assert figures["tokens/s"] == 3 * 6 / 4.0


def test_your_pairs_are_the_first_of_the_epoch(finished, folder):
    c = bench.Config(init_from=str(finished), data=str(folder), steps=3, batch_size=2)
    tokenizer = initial.tokenizer_of(c.init_from)
    every = data.held_out_pairs(data.load(c.data)["train"], tokenizer, c.max_length)
    order = data.epoch_order(len(every), c.seed, 0).tolist()
    assert bench.make_pairs(c) == [every[i] for i in order[:6]]
    assert len(bench.make_prompts(replace(c, eval_prompts=2))) == 2
    with pytest.raises(ValueError, match=r"has \d+ pairs; expected 201 or more"):
        bench.make_pairs(replace(c, batch_size=100))


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(ValueError, match=r"expected python bench\.py"):
        bench.main(SMALL)


def test_memory_is_told_for_sizes_and_for_a_checkpoint(finished, capsys):
    sizes = ["--memory", "--n_layer", "2", "--d_model", "48", "--vocab_size", "300"]
    bench.main([*sizes, "--dtype", "float32"])
    whole = capsys.readouterr().out
    assert "\nmemory, GB: " in whole and "gathered" not in whole
    bench.main([*sizes, "--dtype", "float32", "--devices", "2"])
    assert "memory, GB a process: " in capsys.readouterr().out
    bench.main(["--memory", "--init_from", str(finished), "--lora_rank", "4"])
    assert "\nmemory, GB: " in capsys.readouterr().out
