"""torch.compile, which CUDA runs use by default, on the CPU: the same steps, up to rounding."""

import json

import pytest
import torch
from conftest import SHORT, TINY

import train


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_a_compiled_run_is_the_eager_run(finished, folder, tmp_path, lora):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    flags, eager = [*TINY, "--data", str(folder), "--delta", "5"], finished
    if lora:
        eager = tmp_path / "eager"
        start = ["--init_from", str(finished / "reference.pt"), "--lora_rank", "3"]
        flags = [*SHORT, *flags[len(TINY) :], *start, "--lr", "0.01"]
        train.main([*flags, "--out_dir", str(eager)])
    train.main([*flags, "--compile", "--out_dir", str(tmp_path / "run")])
    compiled, eager = (
        [json.loads(line) for line in (run / "metrics.jsonl").open()]
        for run in (tmp_path / "run", eager)
    )
    assert len(compiled) == len(eager) > 4
    for a, b in zip(compiled, eager):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )
    # with and without gradients, and one pair alone: not a graph a batch
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
