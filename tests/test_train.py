"""Training: one step's mathematics, then whole runs of a tiny model."""

import json
import math

from lib import checkpoint
from lib.device import autocast
from lib.policy import load_model, log_probs
from lib.settings import TrainConfig
from lib.stage import Stage
from lib.watch import Watch

import pytest
import torch
from conftest import SHORT, TINY
from torch.utils._python_dispatch import TorchDispatchMode

import data
import train
from data import TokenPairs
from model import ModelConfig, Transformer
from safedpo import Pair

CPU = torch.device("cpu")
PLAIN = autocast(CPU, "float32")


def make(seed=0):
    torch.manual_seed(seed)
    return Transformer(ModelConfig(60, n_layer=2, n_head=2, n_kv_head=1, d_model=16, d_ff=24))


def token_pairs(n=8, seed=0, kinds=((0, 0), (0, 1))):
    g = torch.Generator().manual_seed(seed)
    ids = lambda: torch.randint(
        0, 60, (int(torch.randint(2, 9, (1,), generator=g)),), generator=g
    ).tolist()
    return TokenPairs(Pair(ids(), ids(), ids(), *kinds[i % len(kinds)]) for i in range(n))


def reference(model, pairs):
    return log_probs(model, [(p.x, [p.y_w, p.y_l]) for p in pairs], CPU, "float32")


def step(
    model, optimizer, pairs, ref, micro=8, beta=0.1, delta=5.0, number=0, loss=None, precision=PLAIN
):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = data.step_batches(pairs, number, len(pairs), micro, 0, ref)
    loss = loss or train.preference_loss(beta, delta)
    return train.train_step(model, optimizer, scaler, batches, loss, 1.0, precision)


def optimizer_of(model, lr=1e-3):
    optimizer = train.make_optimizer(model, 0.0, 0.99)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return optimizer


@pytest.mark.parametrize("delta", [0.0, 5.0])
def test_first_loss_is_ln_2_and_softplus_of_delta(delta):
    for kinds, expected in ((((0, 0),), math.log(2)), (((0, 1),), math.log1p(math.exp(delta)))):
        model, pairs = make(), token_pairs(kinds=kinds)
        loss, _, _ = step(
            model, optimizer_of(model), pairs, reference(model, pairs), micro=3, delta=delta
        )
        assert loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("loss", [None, train.sft_loss], ids=["safedpo", "sft"])
def test_micro_batches_are_one_batch(loss):
    results = []
    for micro in (1, 3, 8):
        model, pairs = make(), token_pairs()
        value, norm, _ = step(
            model, optimizer_of(model), pairs, reference(model, pairs) - 1, micro, loss=loss
        )
        results.append((value, norm, torch.cat([p.detach().flatten() for p in model.parameters()])))
    for value, norm, weights in results[:2]:
        assert value == pytest.approx(results[2][0], abs=1e-6) and norm == pytest.approx(
            results[2][1], rel=1e-5
        )
        torch.testing.assert_close(weights, results[2][2], rtol=0, atol=1e-6)


class Casts(TorchDispatchMode):
    """How often float32 weights of this shape became bfloat16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.n = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.n += result.dtype == torch.bfloat16
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_cast_once_a_step_and_each_step_anew(checkpointing):
    model, pairs = make(), token_pairs()
    model.checkpointing = checkpointing
    optimizer, losses, ref = optimizer_of(model, 0.01), [], reference(model, pairs)
    weight = model.blocks[0].mlp.down.weight
    precision = autocast(CPU, "bfloat16")
    for _ in range(2):
        with Casts(weight.shape) as casts:
            loss = step(model, optimizer, pairs, ref, 2, precision=precision)[0]
        losses.append(loss)
        assert casts.n == len(model.blocks)
    assert losses[1] < losses[0] - 0.1, "with the weights of the first step nothing would change"


def test_sft_loss_is_the_mean_over_answer_tokens():
    model, pairs = make(), token_pairs()
    total = reference(model, pairs).sum().item()
    value, _, figures = step(model, optimizer_of(model), pairs, None, loss=train.sft_loss)
    assert figures.shape == (0, 8)  # nothing to log of each pair
    assert value == pytest.approx(-total / sum(len(p.y_w) + len(p.y_l) for p in pairs), rel=1e-5)


def test_the_loss_reads_the_reference_given():
    model, pairs = make(), token_pairs()
    ref = reference(model, pairs)
    losses = [
        step(make(), optimizer_of(make()), pairs, r)[0]
        for r in (ref, ref + torch.tensor([3.0, -3.0]))
    ]
    assert losses[1] > losses[0] + 0.1


def test_rewards_do_not_contain_delta():
    figures = []
    for delta in (0.0, 7.0):
        model, pairs = make(), token_pairs()
        figures.append(
            step(model, optimizer_of(model), pairs, reference(model, pairs) - 2, delta=delta)[2]
        )
    assert torch.equal(*figures)


@pytest.mark.parametrize("kinds", [((0, 0),), ((0, 1),), ((1, 0),)], ids=str)
def test_overfitting_a_few_pairs_raises_their_margin(kinds):
    model, pairs = make(), token_pairs(4, kinds=kinds)
    ref, optimizer = reference(model, pairs), optimizer_of(model, 3e-3)
    losses = [step(model, optimizer, pairs, ref, delta=2.0, number=n)[0] for n in range(80)]
    after = reference(model, pairs)
    assert losses[-1] < 0.3 * losses[0]
    assert ((after - ref)[:, 0] > (after - ref)[:, 1] + 1).all()


def test_a_larger_delta_pulls_harder():
    norms = []
    for delta in (0.0, 2.0, 10.0):
        model, pairs = make(), token_pairs(kinds=((0, 1),))
        norms.append(
            step(model, optimizer_of(model), pairs, reference(model, pairs), delta=delta)[1]
        )
    assert norms == sorted(norms) and norms[2] / norms[0] == pytest.approx(
        2, rel=1e-3
    )  # σ(Δ) from ½ to 1


def test_a_loss_that_is_no_number_stops_before_the_step():
    model, pairs = make(), token_pairs()
    before = [p.clone() for p in model.parameters()]
    ref = torch.zeros(8, 2)
    ref[5] = torch.nan
    with pytest.raises(FloatingPointError, match=r"the loss is nan on pairs \[5\]"):
        step(model, optimizer_of(model), pairs, ref, micro=1)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_gradients_that_are_no_numbers_stop_before_the_step():
    model, pairs = make(), token_pairs()
    before = [p.clone() for p in model.parameters()]
    infinite = lambda logps, batch: (
        (logps.sum() - logps.sum().detach()).abs().sqrt(),
        None,
    )  # the slope of √ at 0
    with pytest.raises(FloatingPointError, match="the gradient's norm is"):
        step(model, optimizer_of(model), pairs, None, loss=infinite)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_learning_rate_rises_then_falls_to_zero():
    rates = [train.learning_rate(s, 100, 2.0, 0.1) for s in range(101)]
    assert (
        rates[0] == pytest.approx(0.2)
        and rates[9] == rates[10] == 2.0
        and rates[100] == pytest.approx(0)
    )
    assert rates[55] == pytest.approx(1.0) and rates[10:] == sorted(rates[10:], reverse=True)
    assert train.learning_rate(0, 1, 2.0, 0.0) == 2.0 and train.learning_rate(0, 1, 2.0, 1.0) == 2.0


def test_optimizer_decays_matrices_only():
    model = make()
    decay = {
        id(p): group["weight_decay"]
        for group in train.make_optimizer(model, 0.3, 0.95).param_groups
        for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        n: 0.3 * (p.dim() > 1) for n, p in model.named_parameters()
    }


def test_gradients_are_clipped_to_the_norm_given():
    model, pairs, seen = make(), token_pairs(), []
    optimizer = optimizer_of(model)
    optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(
            sum(p.grad.square().sum() for g in o.param_groups for p in g["params"]).sqrt().item()
        )
    )
    _, norm, _ = step(model, optimizer, pairs, reference(model, pairs), beta=1.0)
    assert norm > 1 and seen == [pytest.approx(1.0, rel=1e-4)]


def test_a_step_waits_for_the_device_twice(monkeypatch):
    """Before the optimizer's step, and after it; the metrics need no more. What waits on a GPU is
    counted on the CPU: copies to the host, and operations whose result's size depends on values."""
    waits = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "equal", "is_nonzero"}
    seen = []

    class Waits(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.__name__.split(".")[0]
            indices = args[1] if name == "index" else []
            by_mask = any(i is not None and i.dtype == torch.bool for i in indices)
            if name in waits or by_mask:
                seen.append(name)
            return function(*args, **(kwargs or {}))

    for name in ("tolist", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, name=name):
            seen.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    model, pairs = make(), token_pairs()
    optimizer, ref = optimizer_of(model), reference(model, pairs)
    batches = data.step_batches(pairs, 0, len(pairs), 2, 0, ref)
    scaler, loss = torch.amp.GradScaler("cpu", enabled=False), train.preference_loss(0.1, 5.0)
    seen.clear()
    with Waits():
        _, _, columns = train.train_step(model, optimizer, scaler, batches, loss, 1.0, PLAIN)
    assert len(batches) > 1 and seen == ["tolist", "cpu", "_local_scalar_dense"]
    # the last is of a tensor that is on the CPU already, as are the metrics' columns
    assert columns.device == CPU


def test_gradients_are_clipped_after_the_scaler_is_taken_out():
    model, pairs, seen = make(), token_pairs(), []
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.register_step_pre_hook(
        lambda o, *_: seen.append(
            sum(p.grad.square().sum() for g in o.param_groups for p in g["params"]).sqrt().item()
        )
    )
    batches = data.step_batches(pairs, 0, len(pairs), 8, 0, reference(model, pairs))
    _, norm, _ = train.train_step(
        model, optimizer, scaler, batches, train.preference_loss(1.0, 5.0), 0.5, PLAIN
    )
    plain = make()
    assert norm == pytest.approx(
        step(plain, optimizer_of(plain), pairs, reference(plain, pairs), beta=1.0)[1], rel=1e-4
    )
    assert norm > 1 and seen == [pytest.approx(0.5, rel=1e-3)]


def stage(folder, model, optimizer, steps=9):
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    watch = Watch(TrainConfig(out_dir=str(folder)), {}, tokenizer=None)
    return Stage("sft", folder, model, optimizer, scaler, steps, save_every=1, watch=watch)


def test_weights_that_are_no_numbers_leave_the_last_state(tmp_path):
    model = make()
    optimizer = optimizer_of(model)
    step(model, optimizer, token_pairs(), None, loss=train.sft_loss)
    with stage(tmp_path, model, optimizer) as sft:
        for _ in range(6):
            sft.finish_step({"loss": 1.0}, tokens=7)
            assert "tokens/s=" in sft.bar.postfix
    message = "sft step 7: embedding.weight holds weights that are no numbers; step 6 was saved, in"
    with pytest.raises(FloatingPointError, match=message), stage(tmp_path, model, optimizer) as sft:
        assert sft.first_step == 6
        with torch.no_grad():
            model.embedding.weight[3, 3] = torch.nan
        sft.finish_step({"loss": 1.0}, tokens=7)
    assert torch.load(tmp_path / "state.pt")["step"] == 6


# --------------------------------------------------------------------------------------------------
# Whole runs


def test_fit_trains_as_the_flags_say(folder, tmp_path, monkeypatch):
    calls, decays, take = [], [], train.train_step

    def spy(model, optimizer, scaler, batches, loss_function, grad_clip, precision):
        decays.append([group["weight_decay"] for group in optimizer.param_groups])
        with precision:
            kind = (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        calls.append((grad_clip, kind, optimizer.param_groups[0]["lr"]))
        return take(model, optimizer, scaler, batches, loss_function, grad_clip, precision)

    monkeypatch.setattr(train, "train_step", spy)
    flags = (
        "--weight_decay 0.3 --grad_clip 0.7 --warmup 1 --lr 0.002 --sft_lr 0.003 --dtype bfloat16"
    )
    train.main([*TINY, *flags.split(), "--data", str(folder), "--out_dir", str(tmp_path)])
    assert decays == [[0.3, 0.0]] * len(calls) and {call[:2] for call in calls} == {
        (0.7, torch.bfloat16)
    }
    steps = [line["step"] for line in lines(tmp_path)]
    sft = steps.index(1, 1)
    rising = [0.003 * (i + 1) / sft for i in range(sft)] + [
        0.002 * (i + 1) / (len(steps) - sft) for i in range(len(steps) - sft)
    ]
    assert [lr for *_, lr in calls] == pytest.approx(rising), "warm-up over the whole of each stage"


def test_without_epochs_sft_is_all(folder, tmp_path, capsys):
    out = tmp_path / "run"  # alone there: a neighbour's reference would be taken instead of SFT
    train.main([*TINY, "--epochs", "0", "--data", str(folder), "--out_dir", str(out)])
    assert {line["stage"] for line in lines(out)} == {"sft"}
    reference, policy = (torch.load(out / f"{name}.pt") for name in ("reference", "policy"))
    assert all(torch.equal(reference["model"][k], policy["model"][k]) for k in policy["model"])
    assert not (out / "ref_logps.pt").exists()
    said = capsys.readouterr()
    assert "no preference training (--epochs 0)" in said.out
    assert "warning: few steps" not in said.out


def test_flags_reach_the_stages_they_name(rows, folder, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(train, "fit", lambda *arguments: calls.append(arguments))
    flags = (
        "--sft_lr 0.5 --lr 0.25 --batch_size 7 --sft_batch_size 3 --epochs 4 --sft_epochs 2 "
        "--beta 3 --delta 4 --label_noise 1"
    )
    train.main([*TINY, *flags.split(), "--data", str(folder), "--out_dir", str(tmp_path)])
    sft, safedpo = calls

    def steps_of(call):
        config = call[5]
        return config.epochs, config.batch_size, config.lr

    assert (sft[0], len(sft[2]), sft[3], steps_of(sft)) == ("sft", 96, None, (2, 3, 0.5)), (
        "SFT sees both answers of every row"
    )
    assert (safedpo[0], steps_of(safedpo)) == ("safedpo", (4, 7, 0.25))
    flipped = [
        (not r["is_response_0_safe"], not r["is_response_1_safe"], r["better_response_id"])
        for r in rows["train"][:96]
    ]
    expected = [
        (0, 1 - (s[0] and s[1])) for *s, better in flipped if any(s)
    ]  # T leaves a safe winner
    assert [(p.h_w, p.h_l) for p in safedpo[2]] == expected
    figures = (
        torch.tensor([-4.0, -6.0]),
        torch.tensor([-1.0]),
        torch.tensor([-2.5]),
        torch.tensor([0]),
        torch.tensor([1]),
    )
    batch = data.Batch(None, figures[3], figures[4], figures[1], figures[2], [0], 1, 2)
    assert safedpo[4](0.5)(figures[0], batch)[0].item() == pytest.approx(
        math.log1p(math.exp(4 - 3 * (-3.0 + 3.5)))
    )


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out, name="policy.pt"):
    return torch.cat([p.detach().flatten() for p in load_model(out / name, CPU)[0].parameters()])


def test_a_run_leaves_what_it_promises(finished):
    config = json.loads((finished / "config.json").read_text())
    assert config["delta"] == 5 and config["dtype"] == "float32" and config["device"] == "cpu"
    result = json.loads((finished / "eval.json").read_text())
    assert {"policy", "reference"} <= result.keys() and result["policy"]["n"] == 8
    assert result["reference"]["kl"]["value"] == 0
    metrics = [m for m in lines(finished) if m["stage"] == "safedpo"]
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert [m["learning_rate"] for m in metrics] == [
        train.learning_rate(s, len(metrics), 4e-4, 0.3) for s in range(len(metrics))
    ]
    names = {
        "loss",
        "grad_norm",
        "learning_rate",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "safe-safe/rewards/margins",
        "safe-unsafe/logps/chosen",
    }
    assert names <= metrics[0].keys()
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    unsafe = metrics[0]["safe-unsafe/pairs"] / 16
    assert metrics[0]["loss"] == pytest.approx(
        unsafe * math.log1p(math.exp(5)) + (1 - unsafe) * math.log(2), abs=1e-4
    )
    assert not torch.equal(weights(finished), weights(finished, "reference.pt"))


def test_same_seed_same_run_to_the_bit(finished, folder, tmp_path):
    for seed in ("0", "1"):
        train.main(
            [
                *TINY,
                "--data",
                str(folder),
                "--delta",
                "5",
                "--seed",
                seed,
                "--out_dir",
                str(tmp_path / seed),
            ]
        )
    assert torch.equal(weights(tmp_path / "0"), weights(finished))
    assert (tmp_path / "0" / "metrics.jsonl").read_text() == (
        finished / "metrics.jsonl"
    ).read_text()
    assert not torch.equal(weights(tmp_path / "1"), weights(finished))


@pytest.mark.parametrize("stage, stop", [("sft", 4), ("safedpo", 1), ("safedpo", 3)])
def test_a_stopped_run_resumes_to_the_bit(finished, folder, tmp_path, monkeypatch, stage, stop):
    flags = [
        *TINY,
        "--data",
        str(folder),
        "--delta",
        "5",
        "--out_dir",
        str(tmp_path / "run"),
        "--save_every",
        "2",
    ]
    keep_going, count = train.train_step, 0

    def stops(model, optimizer, scaler, batches, loss_function, *rest):
        nonlocal count
        count += (loss_function is train.sft_loss) == (stage == "sft")
        if count > stop:
            raise KeyboardInterrupt
        return keep_going(model, optimizer, scaler, batches, loss_function, *rest)

    monkeypatch.setattr(train, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(train, "train_step", keep_going)
    train.main([*flags, "--resume"])
    assert torch.equal(weights(tmp_path / "run"), weights(finished))
    assert lines(tmp_path / "run") == lines(finished)


def test_the_state_is_saved_by_time_too(folder, tmp_path, monkeypatch):
    flags = [*TINY, "--data", str(folder), "--save_every", "1000"]
    saved, save = [], checkpoint.save
    note = lambda path, *rest, **about: saved.append(path.name) or save(path, *rest, **about)
    monkeypatch.setattr(checkpoint, "save", note)
    for seconds in (900, -1):
        monkeypatch.setattr("lib.stage.SAVE_SECONDS", seconds)
        train.main([*flags, "--out_dir", str(tmp_path / str(seconds))])
    assert saved.count("state.pt") == len(lines(tmp_path / "-1"))


def test_weights_that_are_no_numbers_are_not_saved(folder, tmp_path):
    with pytest.raises(FloatingPointError):
        train.main(
            [
                *TINY,
                "--data",
                str(folder),
                "--sft_lr",
                "1e30",
                "--weight_decay",
                "1e30",
                "--sft_batch_size",
                "500",
                "--out_dir",
                str(tmp_path),
            ]
        )
    assert not list(tmp_path.glob("*.pt"))


def test_resume_of_a_finished_run_trains_nothing(finished, capsys):
    before = (finished / "policy.pt").stat().st_mtime_ns
    train.main(["--resume", "--out_dir", str(finished)])
    assert (finished / "policy.pt").stat().st_mtime_ns == before
    assert "harmless" in capsys.readouterr().out


def test_a_reference_with_the_same_settings_is_reused(finished, folder, capsys):
    out = finished.parent / "delta0"
    train.main([*TINY, "--data", str(folder), "--delta", "0", "--out_dir", str(out)])
    assert (
        f"reference: {finished / 'reference.pt'}, trained earlier with the same settings"
        in capsys.readouterr().out
    )
    assert {m["stage"] for m in lines(out)} == {"safedpo"}
    assert torch.equal(weights(out, "reference.pt"), weights(finished, "reference.pt"))
    other = finished.parent / "other-sft"
    train.main([*TINY, "--data", str(folder), "--sft_lr", "0.001", "--out_dir", str(other)])
    assert {m["stage"] for m in lines(other)} == {"sft", "safedpo"}


def test_init_from_a_checkpoint_skips_sft(finished, folder, tmp_path):
    for source in (finished, finished / "policy.pt"):
        out = tmp_path / source.name
        train.main(
            [*SHORT, "--data", str(folder), "--init_from", str(source), "--out_dir", str(out)]
        )
        assert torch.equal(weights(out, "reference.pt"), weights(finished))
        assert json.loads((out / "config.json").read_text())["d_model"] == 16, (
            "the checkpoint's own size, not the default"
        )
        assert {m["stage"] for m in lines(out)} == {"safedpo"}


def test_every_pair_choice_and_label_noise_run(finished, folder, tmp_path):
    for flags in (
        ["--pairs", "helpful"],
        ["--pairs", "harmless"],
        ["--pairs", "safebetter"],
        ["--pairs", "noswap"],
        ["--label_noise", "0.3"],
    ):
        out = tmp_path / "-".join(flags)
        train.main(
            [
                *SHORT,
                "--data",
                str(folder),
                "--init_from",
                str(finished / "reference.pt"),
                "--out_dir",
                str(out),
                *flags,
            ]
        )
        delta = json.loads((out / "config.json").read_text())["delta"]
        assert delta == (5 if flags[1] in ("noswap", "0.3") else 0), (
            "a baseline has no margin unless asked for"
        )
        kinds = {name.split("/")[0] for m in lines(out) for name in m if name.endswith("/pairs")}
        assert ("unsafe-safe" in kinds) == (flags[1] in ("helpful", "noswap"))
        assert ("unsafe-unsafe" in kinds) == (flags[1] in ("helpful", "harmless"))
