"""Adapters against PEFT's: five steps of training, folders in and out, whole runs with them."""

import json
import shutil

from lib import hf_adapter, initial, policy
from lib.device import autocast
from lib.policy import load_model
from lib.settings import TrainConfig

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_pretrained import argv, change, make

import data
import eval as eval_room
import train
from safedpo import Pair, response_logps, safedpo_loss

CPU = torch.device("cpu")
BETA, DELTA, LR = 0.5, 2.0, 3e-3
START = dict(sft_epochs=0, max_length=64, max_new_tokens=16, seed=3)


def start(folder, **flags):
    return initial.initial_model(TrainConfig(init_from=str(folder), **START | flags), CPU)


def export_adapter(net, folder):
    folder.mkdir()
    hf_adapter.export(net, folder)
    return folder


def some_pairs(n=24):
    g = torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(3, 420, (length,), generator=g).tolist()

    return data.TokenPairs(Pair(ids(2, 9), ids(1, 12), ids(1, 12), 0, i % 2) for i in range(n))


def peers_logps(net, pairs):
    """(n, 2): one answer at a time."""
    logps = []
    for p in pairs:
        for y in (p.y_w, p.y_l):
            ids = torch.tensor([p.x + y])
            logps.append(
                response_logps(net(ids).logits, ids, torch.arange(ids.shape[1])[None] >= len(p.x))
            )
    return torch.cat(logps).view(-1, 2)


def stir(net, std=0.05):
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)


@pytest.mark.parametrize(
    "family, rank, dtype, changes",
    [
        ("llama1", 4, torch.float32, {}),
        ("llama2", 16, torch.bfloat16, {"tie_word_embeddings": True}),
        ("qwen2", 4, torch.bfloat16, {}),
        ("qwen3", 16, torch.float32, {}),
    ],
    ids=["llama1-4", "llama2-16-bf16-tied-grouped", "qwen2-4-bf16-biases", "qwen3-16-norms"],
)
def test_five_steps_are_pefts(family, rank, dtype, changes, tmp_path):
    base = make(tmp_path / "hf", family, dtype, **changes)
    ours, _ = start(tmp_path / "hf", lora_rank=rank, lora_alpha=8.0)
    assert ours.blocks[0].mlp.down.weight.dtype == dtype
    theirs = peft.PeftModel.from_pretrained(
        base, export_adapter(ours, tmp_path / "adapter"), is_trainable=True
    )
    pairs = some_pairs()
    ref = peers_logps(theirs, pairs).detach()
    optimizer = train.make_optimizer(ours, 0.05, 0.99)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weights = [p for p in theirs.parameters() if p.requires_grad]
    peers = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.99), weight_decay=0.05)
    for group in optimizer.param_groups:
        group["lr"] = LR
    for step in range(5):
        batches = data.step_batches(pairs, step, 8, 3, 0, ref)
        loss = train.preference_loss(BETA, DELTA)
        loss, norm, _ = train.train_step(
            ours, optimizer, scaler, batches, loss, 1.0, autocast(CPU, "float32")
        )
        numbers = [i for batch in batches for i in batch.pairs]
        chosen = [pairs[i] for i in numbers]
        flags = torch.tensor([p[3:] for p in chosen]).T
        losses = safedpo_loss(*peers_logps(theirs, chosen).T, *ref[numbers].T, *flags, BETA, DELTA)
        losses.mean().backward()
        assert loss == pytest.approx(losses.mean().item(), rel=1e-4)
        expected = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
        assert norm == pytest.approx(expected, rel=1e-4)
        peers.step()
        peers.zero_grad()
    adapters = hf_adapter.adapters_by_peft_name(ours)
    theirs = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    assert theirs.keys() == adapters.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(adapters[name], weight, rtol=1e-4, atol=1e-4, msg=name)
    assert max(w.abs().max() for n, w in adapters.items() if "lora_B" in n) > 3 * LR


# --------------------------------------------------------------------------------------------------
# Folders


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """(a Hugging Face folder in bf16, a finished run with adapters on it)."""
    path = tmp_path_factory.mktemp("lora")
    make(path / "hf", "qwen2", torch.bfloat16)
    flags = dict(init_from=path / "hf", prompt_template="chatml", data=folder, out_dir=path / "run")
    train.main(argv(**flags, lora_rank=4, lr=0.02, beta=0.1, delta=10))
    return path / "hf", path / "run"


def some_rows():
    return [(p.x, [p.y_w, p.y_l]) for p in some_pairs(6)]


def test_exports_say_in_peft_and_transformers_what_the_run_says(run, tmp_path):
    hf, folder = run
    policy_model, _ = load_model(folder / "policy.pt", CPU)
    expected = policy.log_probs(policy_model, some_rows(), CPU, "float32")
    reference, _ = load_model(folder / "reference.pt", CPU)
    before = policy.log_probs(reference, some_rows(), CPU, "float32")
    assert (expected - before).abs().max() > 0.1, "it has learned"

    eval_room.main([str(folder), "--export_adapter", str(tmp_path / "adapter")])
    base = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(before, peers_logps(base, some_pairs(6)), rtol=1e-5, atol=1e-4)
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        said = peers_logps(adapted, some_pairs(6))
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(hf) and config["lora_alpha"] == 8

    flags = ["--export_dtype", "float32"]
    eval_room.main([str(folder), "--export", str(tmp_path / "merged"), *flags])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        said = peers_logps(merged, some_pairs(6))
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-4)
    theirs = adapted.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        torch.testing.assert_close(weight, theirs[name], rtol=2e-7, atol=1e-8, msg=name)


def test_an_adapter_of_others_is_the_start_and_the_reference(run, folder, tmp_path, capsys):
    """One on q and v alone, as most are: the function is the same, and all layers learn."""
    hf, _ = run
    base = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    settings = dict(r=8, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj"])
    peer = peft.get_peft_model(base, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    stir(peer, 0.1)
    peer.save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", "adapter_config.json", base_model_name_or_path=str(hf))
    ours, _ = start(tmp_path / "theirs", prompt_template="chatml")
    said = policy.log_probs(ours, some_rows(), CPU, "float32")
    with torch.no_grad():
        expected = peers_logps(peer, some_pairs(6))
        plain = peers_logps(peer.unload(), some_pairs(6))
    torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1
    assert "10 of our linear layers have no adapter there; new" in capsys.readouterr().out

    flags = dict(init_from=tmp_path / "theirs", prompt_template="chatml", data=folder)
    train.main(argv(**flags, out_dir=tmp_path / "run", lr=0.01, beta=0.1, delta=10))
    reference, _ = load_model(tmp_path / "run" / "reference.pt", CPU)
    assert torch.equal(policy.log_probs(reference, some_rows(), CPU, "float32"), said)
    train.main(argv(init_from=tmp_path / "run", data=folder, out_dir=tmp_path / "next"))
    last, _ = load_model(tmp_path / "run" / "policy.pt", CPU)
    reference, _ = load_model(tmp_path / "next" / "reference.pt", CPU)
    assert reference.adapters == last.adapters and reference.adapters["rank"] == 8
    for a, b in zip(reference.parameters(), last.parameters()):
        assert torch.equal(a, b)


REFUSED = {
    "dora": (dict(use_dora=True), "use_dora is true; expected false, as plain LoRA has it"),
    "biases": (dict(bias="all"), 'bias is "all"; expected "none"'),
    "ranks": (dict(rank_pattern={"q_proj": 4}), 'rank_pattern is {"q_proj": 4}; expected'),
    "another-kind": (dict(peft_type="LOHA"), 'peft_type is "LOHA"; expected "LORA"'),
    "heads": (dict(modules_to_save=["lm_head"]), 'modules_to_save is ["lm_head"]; expected'),
    "nothing": (dict(r=0), "r is 0; expected at least 1"),
    "no-base": (dict(base_model_name_or_path=...), "base_model_name_or_path is null; expected str"),
    "pissa": (dict(init_lora_weights="pissa"), 'init_lora_weights is "pissa"; expected true'),
    "another-rank": (dict(r=3), "lora_A.weight is (4, 40) of F32; expected (3, 40) of"),
    "base-gone": (dict(base_model_name_or_path="/gone"), "its base_model_name_or_path is /gone"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused_by_name(kind, run, tmp_path):
    changes, expected = REFUSED[kind]
    net, _ = start(run[0], prompt_template="chatml", lora_rank=4)
    change(export_adapter(net, tmp_path / "adapter"), "adapter_config.json", **changes)
    with pytest.raises(ValueError) as e:
        start(tmp_path / "adapter", prompt_template="chatml")
    assert expected in str(e.value), e.value


def test_adapters_where_we_have_none_are_refused(run, tmp_path):
    base = transformers.AutoModelForCausalLM.from_pretrained(run[0])
    settings = dict(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, peft.LoraConfig(**settings)).save_pretrained(tmp_path / "theirs")
    change(tmp_path / "theirs", "adapter_config.json", base_model_name_or_path=str(run[0]))
    with pytest.raises(ValueError, match="embed_tokens.* has no place; expected"):
        start(tmp_path / "theirs", prompt_template="chatml")


def test_flags_that_contradict_an_adapter(run, tmp_path):
    net, _ = start(run[0], prompt_template="chatml", lora_rank=4)
    for own in (export_adapter(net, tmp_path / "adapter"), run[1]):
        template = dict(prompt_template="chatml" if own.name == "adapter" else None)
        for flags in (dict(lora_rank=8), dict(lora_rank=4, lora_alpha=1.0)):
            with pytest.raises(ValueError, match="has adapters of rank 4 with α = 8, which are"):
                start(own, **flags, **template)
        assert start(own, lora_rank=4, **template)[0].adapters["rank"] == 4


def test_a_changed_base_is_refused(run, folder, tmp_path):
    hf, _ = run
    shutil.copytree(hf, tmp_path / "hf")
    flags = dict(init_from=tmp_path / "hf", prompt_template="chatml", data=folder)
    train.main(argv(**flags, lora_rank=4, out_dir=tmp_path / "run"))
    make(tmp_path / "other", "qwen2", torch.bfloat16, initializer_range=0.31)
    shutil.copy(tmp_path / "other" / "model.safetensors", tmp_path / "hf")
    (tmp_path / "run" / "eval.json").unlink()
    for command in ([], ["--prompt", "x?"], ["--export", str(tmp_path / "out")]):
        with pytest.raises(ValueError, match="and that has changed .* expected the same weights"):
            eval_room.main([str(tmp_path / "run"), *command])
    shutil.rmtree(tmp_path / "hf")
    with pytest.raises(ValueError, match="holds adapters of .*hf, which cannot be read"):
        load_model(tmp_path / "run" / "policy.pt", CPU)


def test_half_an_adapter_is_refused(run, tmp_path):
    net, _ = start(run[0], prompt_template="chatml", lora_rank=4)
    path = export_adapter(net, tmp_path / "adapter") / "adapter_model.safetensors"
    weights = load_file(path)
    del weights["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"v_proj.lora_A.weight is there and .* is missing"):
        start(tmp_path / "adapter", prompt_template="chatml")


def test_adapters_on_adapters_are_refused(run, tmp_path):
    net, _ = start(run[0], prompt_template="chatml", lora_rank=4)
    changes = dict(base_model_name_or_path=str(run[1]))
    change(export_adapter(net, tmp_path / "adapter"), "adapter_config.json", **changes)
    with pytest.raises(ValueError, match="has adapters itself; expected a whole model"):
        start(tmp_path / "adapter")


def test_a_type_for_a_base_that_is_none_is_refused(run):
    for flags in (dict(init_from=run[1]), dict(init_from=run[0], prompt_template="chatml")):
        with pytest.raises(ValueError, match="--base_dtype .* the flag needs --lora_rank and"):
            start(flags.pop("init_from"), base_dtype="bfloat16" if flags else "float32", **flags)
