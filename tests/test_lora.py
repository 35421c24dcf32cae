"""Low-rank adapters: against W + s · B A written out, on a base in bf16, and in whole runs."""

import copy
import json

from lib import lora, parallel
from lib.hf_weights import held_in, hold, hold_frozen
from lib.policy import load_model

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import SHORT, complaint

import eval as eval_script
import train
from model import ModelConfig, Transformer, pack_rows

ROWS = [([3, 4, 5], [[6, 7, 1], [8, 9, 10, 11, 1]]), ([2], [[2, 1], [2, 2, 2, 1]])]


def make(rank=4, alpha=6.0, **options):
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=4, n_kv_head=2, d_model=32, d_ff=40, norm_eps=1e-6)
    net = Transformer(ModelConfig(60, **{**sizes, **options}))
    for p in net.parameters():
        nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.uniform_(p, 0.5, 1.5)
    if rank:
        lora.add(net, rank, alpha, seed=0)
    return net


def stir(net):
    """Adapters as after some training: B is no longer zero."""
    torch.manual_seed(1)
    for layer in layers(net):
        nn.init.normal_(layer.lora_B, std=0.2)
    return net


def layers(net):
    return [m for m in net.modules() if isinstance(m, lora.LoRALinear)]


def test_two_parts_by_hand():
    """in 2, parts of 1 and 2 rows, rank 1, α 3: the parts have a, b of their own."""
    linear = nn.Linear(2, 3)
    layer = lora.LoRALinear(linear, (1, 2), 1, 3.0, torch.Generator())
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
        linear.bias.copy_(torch.tensor([0.0, 10, 20]))
        layer.lora_A.copy_(torch.tensor([[1.0, 2], [0, 1]]))
        layer.lora_B.copy_(torch.tensor([[1.0], [2], [3]]))
    x = torch.tensor([[1.0, 1]], requires_grad=True)
    y = layer(x)
    # W x + b = 1, 11, 22; A x = 3 and 1; s = 3
    assert y.tolist() == [[1 + 3 * 3 * 1, 11 + 3 * 1 * 2, 22 + 3 * 1 * 3]]
    y.sum().backward()
    # ∂/∂x = Σ W + 3 · (1 · A_1 + (2 + 3) · A_2) = (2, 2) + 3 · ((1, 2) + 5 · (0, 1))
    assert x.grad.tolist() == [[2 + 3, 2 + 6 + 15]]
    assert layer.lora_A.grad.tolist() == [[3, 3], [3 * 5, 3 * 5]]
    assert layer.lora_B.grad.tolist() == [[9], [3], [3]]


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_the_formula(bias):
    torch.manual_seed(0)
    linear = nn.Linear(6, 8, bias=bias).double()
    layer = lora.LoRALinear(linear, (5, 3), 2, 1.0, torch.Generator()).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora.LowRank.apply(x, layer.weight, layer.bias, A, B, 0.5, (5, 3)),
        (x, layer.lora_A, layer.lora_B),
    )
    A1, A2 = layer.lora_A.split(2)
    B1, B2 = layer.lora_B.split((5, 3))
    plain = F.linear(x, layer.weight, layer.bias)
    plain = plain + 0.5 * torch.cat((x @ A1.T @ B1.T, x @ A2.T @ B2.T), 1)
    torch.testing.assert_close(layer(x), plain)


def test_new_adapters_change_nothing_and_depend_on_the_seed_alone():
    base, net = make(rank=0), make()
    assert torch.equal(net(pack_rows(ROWS)), base(pack_rows(ROWS)))
    torch.randn(5)  # another state of the generator that all share
    first = [layer.lora_A.clone() for layer in layers(net)]
    for a, layer in zip(first, layers(make())):
        assert torch.equal(a, layer.lora_A)
        assert layer.lora_A.abs().max() <= layer.lora_A.shape[1] ** -0.5
    other = make(rank=0)
    lora.add(other, 4, 6.0, seed=1)
    assert not torch.equal(first[0], layers(other)[0].lora_A)


def test_only_adapters_learn():
    net = stir(make())
    net(pack_rows(ROWS)).sum().backward()
    for name, p in net.named_parameters():
        assert p.requires_grad == ("lora_" in name) == (p.grad is not None), name
        assert p.grad is None or p.grad.abs().max() > 0, name
    assert len(layers(net)) == 2 * 4


@pytest.mark.parametrize("options", [{}, {"qkv_bias": True, "qk_norm": True, "tied_head": True}])
def test_merged_weights_compute_the_same(options):
    net = stir(make(**options))
    expected = net(pack_rows(ROWS))
    layer = net.blocks[0].attention.qkv
    BA = torch.cat([B @ A for A, B in layer.parts()])
    W = layer.weight + 1.5 * BA
    lora.merge(net)
    assert torch.equal(layer.weight, W) and not layer.lora_B.any()
    torch.testing.assert_close(net(pack_rows(ROWS)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_bf16_is_read_as_it_is_and_adapters_stay_float32(dtype):
    """The base's values are rounded once; what is computed with them is as exact as elsewhere."""
    rounded, net = stir(make()), stir(make())
    for name, p in rounded.named_parameters():
        if p.dim() > 1 and "lora_" not in name:
            p.data = p.data.bfloat16().float()
    hold(net, torch.bfloat16)
    assert net.embedding.weight.dtype == torch.bfloat16
    assert {p.dtype for p in net.parameters() if p.requires_grad or p.dim() == 1} == {torch.float32}
    grads = []
    for model in (rounded, net):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logps = model(pack_rows(ROWS))
        logps.sum().backward()
        grads.append([logps.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*grads):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_base_held_in_the_products_type_changes_nothing_that_learns():
    """And a base that is narrower already, or a model that learns as a whole, is left alone."""
    wide, narrow, steps = stir(make(tied_head=True)), stir(make(tied_head=True)), []
    hold_frozen(narrow, torch.bfloat16)
    assert held_in(narrow) == "bfloat16" and held_in(wide) == "float32"
    assert narrow.embedding.weight.dtype == torch.float32
    for model in (wide, narrow):
        with torch.autocast("cpu", torch.bfloat16):
            logps = model(pack_rows(ROWS))
        logps.sum().backward()
        steps.append([logps.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*steps))
    hold_frozen(narrow, torch.float32)
    assert held_in(narrow) == "bfloat16"
    hold_frozen(whole := make(rank=0), torch.bfloat16)
    assert held_in(whole) == "float32"


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_saved_is_what_learns_and_comes_back(tied):
    net, other = stir(make(tied_head=tied)), make(tied_head=tied)
    optimizers = [train.make_optimizer(each, 0.0, 0.9) for each in (net, other)]
    net(pack_rows(ROWS)).sum().backward()
    optimizers[0].param_groups[0]["lr"] = 0.01
    optimizers[0].step()
    saved, moments = copy.deepcopy(parallel.training_state(net, optimizers[0]))
    learning = {name for name, p in net.named_parameters() if p.requires_grad}
    assert saved.keys() == parallel.model_state(net).keys() == learning
    parallel.load_training_state(other, optimizers[1], saved, moments)
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.equal(a, b)
    for each, optimizer in zip((net, other), optimizers):
        for p in each.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.param_groups[0]["lr"] = 0.01  # as the loop does in each step
        optimizer.step()
    for a, b in zip(net.parameters(), other.parameters()):
        assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def flags(finished, folder):
    base = ["--init_from", str(finished / "reference.pt"), "--data", str(folder), "--delta", "5"]
    return [*SHORT, *base, "--lora_rank", "4", "--lr", "0.01", "--save_every", "2"]


@pytest.fixture(scope="module")
def adapted(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("adapted") / "run"
    train.main([*flags, "--sft_epochs", "1", "--sft_lr", "0.01", "--out_dir", str(out)])
    return out


def weights(run, name="policy"):
    return torch.load(run / f"{name}.pt", weights_only=True)["model"]


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


def test_a_run_holds_adapters_and_the_name_of_their_base(adapted, finished):
    cpu = torch.device("cpu")
    base, _ = load_model(finished / "reference.pt", cpu)
    for name in ("reference", "policy"):
        net, _ = load_model(adapted / f"{name}.pt", cpu)
        assert all("lora_" in key for key in weights(adapted, name))
        assert net.adapters["base"] == str(finished / "reference.pt")
        own = dict(net.named_parameters())
        assert all(torch.equal(p, own[key]) for key, p in base.named_parameters())
    reference, policy = weights(adapted, "reference"), weights(adapted)
    moved = {key for key in policy if not torch.equal(policy[key], reference[key])}
    assert moved == set(policy), "SafeDPO begins where SFT ended, and all adapters learn"
    assert (adapted / "policy.pt").stat().st_size < (finished / "policy.pt").stat().st_size


def test_evaluation_and_prompt_know_adapters(adapted, capsys):
    figures = json.loads((adapted / "eval.json").read_text())
    assert figures["reference"]["kl"]["value"] == 0 < figures["policy"]["kl"]["value"]
    eval_script.main([str(adapted), "--prompt", "How do I make a red kite for the inn?"])
    said = capsys.readouterr().out
    assert "reference" in said and "policy" in said


@pytest.mark.parametrize("stage, stop", [("sft", 4), ("safedpo", 3)])
def test_a_stopped_run_resumes_to_the_bit(flags, adapted, tmp_path, monkeypatch, stage, stop):
    flags = [*flags, "--sft_epochs", "1", "--sft_lr", "0.01", "--out_dir", str(tmp_path / "run")]
    step, calls = train.train_step, []

    def stops(*arguments):
        calls.append((arguments[4] is train.sft_loss) == (stage == "sft"))
        if sum(calls) > stop:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(train, "train_step", step)
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert all("lora_" in name for name in state["model"]), "what is frozen is not saved"
    train.main([*flags, "--resume"])
    assert lines(tmp_path / "run") == lines(adapted)
    for name, weight in weights(tmp_path / "run").items():
        assert torch.equal(weight, weights(adapted)[name])


def test_a_changed_base_is_refused_before_anything_is_trained(
    flags, finished, tmp_path, monkeypatch, capsys
):
    """Also where only the saved state knows which base it was."""
    base = tmp_path / "base.pt"
    base.write_bytes((finished / "reference.pt").read_bytes())
    flags = [*flags, "--init_from", str(base), "--sft_epochs", "1"]
    flags += ["--out_dir", str(tmp_path / "run")]
    step, calls = train.train_step, []

    def stops(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    capsys.readouterr()  # the bar
    base.write_bytes((finished / "policy.pt").read_bytes())
    assert "its adapters have another base" in complaint(train.main, [*flags, "--resume"], capsys)
    assert len(calls) == 4


def test_checkpointing_changes_nothing(flags, tmp_path):
    train.main([*flags, "--out_dir", str(tmp_path / "kept")])
    train.main([*flags, "--checkpointing", "--out_dir", str(tmp_path / "again")])
    kept, again = lines(tmp_path / "kept"), lines(tmp_path / "again")
    assert kept == again


@pytest.mark.parametrize(
    "given, expected",
    [
        (["--lora_rank", "4"], "--lora_rank 4 needs a trained model to put adapters on; expected"),
        (["--lora_alpha", "4"], "--lora_alpha 4 needs --lora_rank"),
        (["--lora_rank", "-1"], "argument --lora_rank: -1 is out of range; expected at least 0"),
    ],
)
def test_flags_that_do_not_go_together(given, expected, capsys):
    assert expected in complaint(train.main, given, capsys)


def test_a_run_without_adapters_has_none_to_export(finished, tmp_path, capsys):
    argv = [str(finished), "--export_adapter", str(tmp_path / "out")]
    assert "the whole model was trained, and there are no adapters" in complaint(
        eval_script.main, argv, capsys
    )
    assert not (tmp_path / "out").exists()
