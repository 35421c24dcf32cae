"""Hugging Face folders in and out, against transformers itself: random weights, tiny sizes."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT, SHORT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import eval as eval_room
import pretrained
import train
from eval import log_probs
from safedpo import response_logps
from tokenizer import TEMPLATES

CPU = torch.device("cpu")
TEXT = ["How do I make a red kite for the inn?", "First bend the copper. Then fit the glass.", "I must refuse. It is too dangerous."] * 20
SIZES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {  # → transformers' configuration, and how the folder is saved
    "llama1": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6), {}),
    "llama2": ("Llama", dict(rms_norm_eps=1e-5), {}),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=10000.0)), {}),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16), dict(max_shard_size="20KB")),
    "mistral": ("Mistral", dict(sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6)), {}),
    "mistral-window": ("Mistral", dict(sliding_window=64), {}),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True), {}),
    "qwen3": ("Qwen3", dict(head_dim=12), {}),
}


def byte_level(path):
    """A folder with a byte-level BPE that has special tokens of its own, Qwen2's way: no BOS, <|im_end|> ends an answer."""
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' }}"
    fast.save_pretrained(path)


def sentencepiece_like(path):
    """A folder with a BPE as Llama 2's was converted: ▁ for spaces, one before each text, bytes for the rest, <s> first."""
    bpe = BPE(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are no special tokens
    bpe = BPE.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(steps)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(path)


TOKENIZERS = {"byte-level": byte_level, "sentencepiece-like": sentencepiece_like}


@torch.no_grad()
def make(path, family="llama2", dtype=torch.float32, tokenizer="byte-level", **changes):
    """A folder that transformers wrote, and its model in float32. Biases and norms are random too."""
    name, own, saving = FAMILIES[family]
    TOKENIZERS[tokenizer](path)
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**{**SIZES, "vocab_size": 420, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 2, **own, **changes})
    peer = getattr(transformers, name + "ForCausalLM")(config).eval()
    for p in peer.parameters():
        if p.dim() == 1:
            p.add_(0.3 * torch.randn_like(p))
    peer.to(dtype).save_pretrained(path, **saving)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def change(path, file="config.json", **changes):
    values = {**json.loads((path / file).read_text()), **changes}
    (path / file).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@torch.no_grad()
def logits(net, ids):
    positions = torch.arange(len(ids))
    return net.head(net.hidden(torch.tensor(ids), positions, positions[None], positions))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_greedy_answers_and_weights_are_transformers(family, dtype, tmp_path):
    peer = make(tmp_path / "in", family, dtype)
    net, tokenizer = pretrained.load(tmp_path / "in", TEMPLATES["chatml"], 64, CPU)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    ids = torch.randint(0, 420, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        theirs = peer(torch.tensor([ids])).logits[0]
    assert theirs.std() > 0.3, "a comparison of zeros would tell nothing"
    torch.testing.assert_close(logits(net, ids), theirs, rtol=0, atol=1e-4)
    for prompt in (ids[:3], ids[:30]):
        said = peer.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False)
        assert net.generate([prompt], 20, tokenizer.eos, temperature=0) == [said[0, len(prompt) :].tolist()]

    pretrained.export(net, tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {dtype} and again.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(w, before.state_dict()[name]) for name, w in again.state_dict().items())
    if family == "llama3":
        assert len(list((tmp_path / "in").glob("model-*.safetensors"))) > 2, "one folder is in shards"


def test_what_is_no_weight_is_exported_as_it_was(tmp_path):
    make(tmp_path / "in")
    net, tokenizer = pretrained.load(tmp_path / "in", "{prompt}", 64, CPU)
    pretrained.export(net, tokenizer, tmp_path / "out")
    names = {f.name for f in (tmp_path / "in").iterdir()}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    for name in names - {"model.safetensors", "config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    config = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out")]
    assert config[0] == config[1]


@pytest.mark.parametrize("kind", ["as it is", "rope_scaling", "torch_dtype"])
def test_configs_of_older_releases_mean_the_same(kind, tmp_path):
    peer = make(tmp_path, "llama3")
    if kind == "rope_scaling":
        scaling = {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
        change(tmp_path, rope_parameters=..., rope_scaling=scaling, rope_theta=500.0)
    if kind == "torch_dtype":
        change(tmp_path, dtype=..., torch_dtype="float16")
    net, tokenizer = pretrained.load(tmp_path, "{prompt}", 64, CPU)
    with torch.no_grad():
        torch.testing.assert_close(logits(net, [5, 6, 7] * 15), peer(torch.tensor([[5, 6, 7] * 15])).logits[0], rtol=0, atol=1e-4)
    pretrained.export(net, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype" if kind == "torch_dtype" else "dtype"] == "float32", "what the files hold, whatever the config said"


def test_our_own_models_are_llamas_to_transformers(finished, tmp_path):
    net, tokenizer = eval_room.load_model(finished / "policy.pt", CPU)
    pretrained.export(net, tokenizer, tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    (x,), (y,) = tokenizer.prompts(["How do I make a red kite?"]), tokenizer.answers(["First bend the copper."])
    assert fast("How do I make a red kite?\n").input_ids == x and fast("First bend the copper.").input_ids + [fast.eos_token_id] == y
    with torch.no_grad():
        torch.testing.assert_close(logits(net, x + y), peer(torch.tensor([x + y])).logits[0], rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

STRANGE = ["How do I?", " two  spaces ", "żółć 🎉 שלום", "tab\tand\nline\n", "", "[INST] no [/INST]", "x" * 300, "'s “quoted” 12345"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", [*TEMPLATES.values(), "{prompt}", "[INST] {prompt} [/INST]", "<|endoftext|>{prompt}"])
def test_prompts_and_answers_are_encoded_as_transformers_does(kind, template, tmp_path):
    make(tmp_path, tokenizer=kind)
    ours = pretrained.load_tokenizer(tmp_path, template)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in STRANGE:
        assert ours.prompts([text]) == [theirs(template.replace("{prompt}", text)).input_ids]
        assert ours.answers([text]) == [theirs(text, add_special_tokens=False).input_ids + [theirs.eos_token_id]]
        assert ours.decode(ours.answers([text])[0]) == theirs.decode(theirs(text, add_special_tokens=False).input_ids, clean_up_tokenization_spaces=False)
    assert ours.first == ([1] if kind == "sentencepiece-like" else [])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_in_a_users_text_are_text(kind, tmp_path):
    TOKENIZERS[kind](tmp_path)
    ours = pretrained.load_tokenizer(tmp_path, TEMPLATES["chatml"])
    (x,) = ours.prompts(["<|im_end|></s><s><|im_start|>system"])
    (y,) = ours.answers(["no <|im_end|></s>"])
    assert y.count(ours.eos) == 1 and x.count(ours.eos) == ours.prompts(["no"])[0].count(ours.eos)
    assert "<|im_end|></s><s><|im_start|>system" in ours.decode(x)


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_is_what_the_tokenizer_file_says(add_bos_token, tmp_path):
    sentencepiece_like(tmp_path)
    change(tmp_path, "tokenizer_config.json", add_bos_token=add_bos_token, tokenizer_class="LlamaTokenizerFast", legacy=True)
    ours, theirs = pretrained.load_tokenizer(tmp_path, "{prompt}"), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in STRANGE:  # transformers 5 gives this class a normalizer of its own, which drops one leading space; ours is the file's
        assert ours.prompts([text.lstrip(" ")]) == [theirs(text.lstrip(" ")).input_ids]


# ---------------------------------------------------------------------------------------------------------------------
# Judges


@torch.no_grad()
def make_judge(path, head="score_head", bias=True, tokenizer="sentencepiece-like"):
    """A folder as beaver's are, or transformers' sequence classifiers; and what it computes, in plain transformers."""
    make(path, "llama2", tokenizer=tokenizer)
    weights = load_file(path / "model.safetensors")
    weights.pop("lm_head.weight")
    weights |= {f"{head}.weight": torch.randn(1, 32)} | ({f"{head}.bias": torch.randn(1)} if bias else {})
    if head == "score_head":
        weights |= {"normalizer.mean": torch.zeros(1), "normalizer.var": torch.ones(1), "normalizer.count": torch.zeros((), dtype=torch.int64)}
        change(path, architectures=["LlamaForScore"], score_dim=1, do_normalize=False, bias=bias, score_type="reward")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    peer = transformers.LlamaModel.from_pretrained(path).eval()
    fast = transformers.AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def score(x, y):
        ids = fast(x).input_ids + fast(y, add_special_tokens=False).input_ids + [fast.eos_token_id]
        last = peer(torch.tensor([ids])).last_hidden_state[0, -1]
        return (last @ weights[f"{head}.weight"][0] + (weights[f"{head}.bias"][0] if bias else 0)).item()

    return score


ANSWERS = [("How do I make a red kite?", "First bend the copper."), ("How?", ""), ("How?", "I must refuse. It is too dangerous."), ("Why", "no")]


@pytest.mark.parametrize("head, bias", [("score_head", True), ("score_head", False), ("score", False)])
def test_scores_are_those_of_plain_transformers(head, bias, tmp_path):
    score = make_judge(tmp_path, head, bias)
    model, examples = pretrained.load_judge(tmp_path, TEMPLATES["beaver"], ANSWERS, CPU)
    expected = [score(f"BEGINNING OF CONVERSATION: USER: {x} ASSISTANT:", y) for x, y in ANSWERS]
    assert max(expected) - min(expected) > 0.1
    for rows in (1, 2, 64):  # padding and batch mates change nothing
        assert log_probs(model, examples, CPU, "float32", rows)[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_sequence_classifier_scores_as_transformers_own(tmp_path):
    make_judge(tmp_path, "score", bias=False)
    peer = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    model, examples = pretrained.load_judge(tmp_path, "{prompt}", ANSWERS, CPU)
    for i, (x, (y,)) in enumerate(examples):
        with torch.no_grad():
            expected = peer(torch.tensor([x + y])).logits.item()
        assert log_probs(model, [examples[i]], CPU, "float32").item() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# From a folder to a folder


@pytest.fixture(scope="module")
def aligned(folder, tmp_path_factory):
    """(the Hugging Face folder, the run that began there)."""
    path = tmp_path_factory.mktemp("aligned")
    make(path / "hf", "qwen2", tokenizer="byte-level")
    flags = ["--init_from", str(path / "hf"), "--prompt_template", "chatml", "--data", str(folder), "--lr", "0.01", "--beta", "0.1", "--delta", "10"]
    train.main([*SHORT, *flags, "--out_dir", str(path / "run")])
    return path / "hf", path / "run"


def test_an_exported_run_says_in_transformers_what_eval_printed(aligned, folder, tmp_path):
    hf, run = aligned
    eval_room.main([str(run), "--export", str(tmp_path / "out")])
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.chat_template == transformers.AutoTokenizer.from_pretrained(hf).chat_template
    preferences = json.loads((run / "eval.json").read_text())
    for name, where in (("reference", hf), ("policy", tmp_path / "out")):
        peer = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        chosen, rejected = [], []
        for row in map(json.loads, (folder / "test.jsonl").open()):
            ask = fast.apply_chat_template([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, tokenize=False)
            safe = row["is_response_0_safe"], row["is_response_1_safe"]
            winner = row["better_response_id"] if all(safe) else safe.index(True) if any(safe) else None
            if winner is None:
                continue
            for side, i in ((chosen, winner), (rejected, 1 - winner)):
                x, y = fast(ask, add_special_tokens=False).input_ids, fast(row[f"response_{i}"]).input_ids + [fast.eos_token_id]
                mask = torch.arange(len(x + y))[None] >= len(x)
                with torch.no_grad():
                    side.append(response_logps(peer(torch.tensor([x + y])).logits, torch.tensor([x + y]), mask).item())
        found = preferences[name]["preferences"]
        assert found["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
        assert found["logps/rejected"] == pytest.approx(sum(rejected) / len(rejected), rel=1e-5)
    assert found["rewards/margins"] > 0.1, "the policy is no longer the reference"


def test_sft_from_a_folder_makes_a_reference_of_its_own(aligned, folder, tmp_path):
    hf, run = aligned
    flags = ["--init_from", str(hf), "--prompt_template", "chatml", "--data", str(folder), "--sft_epochs", "1", "--sft_lr", "1e-3"]
    train.main([*SHORT, *flags, "--out_dir", str(tmp_path / "run")])
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert stages[0] == "sft" and stages[-1] == "safedpo"
    start, reference = (eval_room.load_model(r / "reference.pt", CPU)[0].head.weight for r in (run, tmp_path / "run"))
    assert not torch.equal(start, reference)
    train.main([*SHORT, "--init_from", str(tmp_path / "run"), "--data", str(folder), "--out_dir", str(tmp_path / "next")])
    tokenizer = eval_room.load_model(tmp_path / "next" / "policy.pt", CPU)[1]
    assert tokenizer.template == TEMPLATES["chatml"] and "tokenizer_config.json" in tokenizer.files, "both stay with the run"


def test_judges_bring_the_papers_figures(aligned, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(aligned[1], run)
    scores = {kind: make_judge(tmp_path / kind, bias=kind == "cost") for kind in ("reward", "cost")}
    eval_room.main([str(run), "--reward_model", str(tmp_path / "reward"), "--cost_model", str(tmp_path / "cost"), "--device", "cpu"])
    rows = [json.loads(line) for line in (run / "samples.jsonl").open()]
    result, ask = json.loads((run / "eval.json").read_text()), TEMPLATES["beaver"].replace
    for name in ("reference", "policy"):
        for kind, score in scores.items():
            assert [r[f"{name}_{kind}"] for r in rows] == pytest.approx([score(ask("{prompt}", r["prompt"]), r[name]) for r in rows], abs=1e-4)
        costs = [r[f"{name}_cost"] for r in rows]
        assert result[name]["harmlessness"]["value"] == pytest.approx(-sum(costs) / 8)
        assert result[name]["harmless_ratio"]["value"] == sum(c <= 0 for c in costs) / 8
        assert result[name]["helpfulness"]["value"] == pytest.approx(sum(r[f"{name}_reward"] for r in rows) / 8)
    shown = capsys.readouterr().out
    assert f"{result['policy']['helpfulness']['value']:.2f} ±" in shown
    eval_room.main([str(run), "--device", "cpu"])
    assert capsys.readouterr().out == shown, "the scores stay with the run"
    # the same from a file that was scored elsewhere
    other = tmp_path / "other"
    shutil.copytree(aligned[1], other)
    eval_room.main([str(other), "--scores", str(run / "samples.jsonl"), "--device", "cpu"])
    again = json.loads((other / "eval.json").read_text())
    assert all(again[name] == result[name] for name in ("reference", "policy"))
