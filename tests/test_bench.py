"""The benchmark: what it counts, and that it runs."""
import pytest
import torch

import bench
from model import ModelConfig, Transformer, pack_rows
from safedpo import Pair

SMALL = "--n_layer 1 --n_head 2 --n_kv_head 1 --d_model 16 --d_ff 24 --vocab_size 300 --steps 3 --prompt_tokens 5 --answer_tokens 6".split()


def config(*flags):
    return bench.settle(bench.Config(**bench.parse(bench.Config, [*SMALL, *flags])))


def test_operations_by_hand():
    pairs = [Pair([2] * 4, [3, 3, 1], [4, 1], 0, 0)]  # 9 tokens, 5 of them answers
    weights = 16 * (16 + 8 + 8) + 16 * 16 + 3 * 16 * 24  # q k v, out, SwiGLU: each token is multiplied by all
    seen = 4 * 4 / 2 + 3 * (4 + 1.5) + 2 * (4 + 1)  # keys seen by the prompt's queries and each answer's
    expected = 2 * (9 * weights + 5 * 300 * 16) + 2 * 2 * 16 * seen  # scores, and sums of values
    assert bench.operations(config(), pairs) == expected


def test_operations_against_torchs_own_count():
    from torch.utils.flop_counter import FlopCounterMode

    c = config()
    net, pairs = Transformer(ModelConfig(**{name: getattr(c, name) for name in bench.train.SIZE_FLAGS})), bench.make_pairs(c)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for p in pairs:
            net(pack_rows([(p.x, [p.y_w, p.y_l])]))
    attention = 4 * 16 * sum(len(p.x) ** 2 / 2 + sum(len(y) * (len(p.x) + len(y) / 2) for y in p[1:3]) for p in pairs)
    products = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert bench.operations(c, pairs) - attention == products


def test_pairs_have_the_lengths_asked_for():
    pairs = bench.make_pairs(config("--steps", "400", "--prompt_tokens", "25", "--answer_tokens", "80"))
    mean = lambda lengths: sum(lengths) / len(lengths)
    assert mean([len(p.x) for p in pairs]) == pytest.approx(25, rel=0.05)
    assert mean([len(p.y_w) for p in pairs]) == pytest.approx(81, rel=0.05) and pairs[0].y_w[-1] == 1


def test_it_prints_figures(capsys):
    bench.main([*SMALL, "--checkpointing"])
    *_, line = capsys.readouterr().out.splitlines()
    name, pairs, tokens, share, _, memory = line.split()
    assert name == "ours" and float(pairs) > 0 and float(tokens) > 5 * float(pairs) and float(memory) > 0.1
