"""Hugging Face folders in and out, against transformers itself: random weights, tiny sizes."""

import json
import os
import re
import shutil
import subprocess
import sys
from statistics import mean

from lib import export as export_room
from lib import hf_weights, policy, pretrained, score_model
from lib.chat import TEMPLATES
from lib.hf_tokenizer import load_tokenizer
from lib.policy import load_model, log_probs
from lib.sampling import generate

import pytest
import torch
import transformers
from conftest import ROOT, SHORT, complaint
from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as BPE

import eval as eval_room
import train
from safedpo import response_logps

CPU = torch.device("cpu")
TEXT = [
    "How do I make a red kite for the inn?",
    "First bend the copper. Then fit the glass.",
    "I must refuse. It is too dangerous.",
] * 20
SIZES = dict(
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
FAMILIES = {  # → transformers' configuration, and how the folder is saved
    "llama1": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-6), {}),
    "llama2": ("Llama", dict(rms_norm_eps=1e-5), {}),
    "llama-linear": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=10000.0)),
        {},
    ),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16), dict(max_shard_size="20KB")),
    "mistral": (
        "Mistral",
        dict(sliding_window=None, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
        {},
    ),
    "mistral-window": ("Mistral", dict(sliding_window=64), {}),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True), {}),
    "qwen3": ("Qwen3", dict(head_dim=12), {}),
}


def byte_level(path):
    """A folder with a byte-level BPE that has special tokens of its own, as Qwen2's.

    There is no BOS, and <|im_end|> ends an answer.
    """
    bpe = BPE(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator(TEXT, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{{ '<|im_start|>assistant\n' }}"
    )
    fast.save_pretrained(path)


def sentencepiece_like(path):
    """A folder with a BPE as Llama 2's was converted.

    ▁ stands for a space, one before each text, bytes for what is unknown, and <s> is first.
    """
    bpe = BPE(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    state = json.loads(bpe.to_str())
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are no special tokens
    bpe = BPE.from_str(json.dumps(state))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    bpe.decoder = decoders.Sequence(steps)
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(path)


def metaspace(path):
    """The same in newer Llama 2 and Mistral folders: ▁ before the first word, by pre-tokenizer."""
    sentencepiece_like(path)
    state = json.loads((path / "tokenizer.json").read_text())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    state |= {"normalizer": None, "pre_tokenizer": metaspace}
    (path / "tokenizer.json").write_text(json.dumps(state))


TOKENIZERS = {
    "byte-level": byte_level,
    "sentencepiece-like": sentencepiece_like,
    "metaspace": metaspace,
}


@torch.no_grad()
def make(path, family="llama2", dtype=torch.float32, tokenizer="byte-level", **changes):
    """A folder that transformers wrote, and its model in float32. Biases and norms are random."""
    name, settings, saving = FAMILIES[family]
    TOKENIZERS[tokenizer](path)
    torch.manual_seed(0)
    ids = dict(vocab_size=420, pad_token_id=0, bos_token_id=None, eos_token_id=2)
    config = getattr(transformers, name + "Config")(**{**SIZES, **ids, **settings, **changes})
    peer = getattr(transformers, name + "ForCausalLM")(config).eval()
    for p in peer.parameters():
        if p.dim() == 1:
            p.add_(0.3 * torch.randn_like(p))
    peer.to(dtype).save_pretrained(path, **saving)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def export(net, tokenizer, folder):
    with pretrained.new_folder(folder) as part:
        pretrained.export(net, tokenizer, part)


def change(path, file="config.json", **changes):
    values = {**json.loads((path / file).read_text()), **changes}
    (path / file).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def argv(**flags):
    """train.py's arguments for a short run with these flags."""
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [*SHORT, *given]


@torch.no_grad()
def logits(net, ids):
    positions = torch.arange(len(ids))
    return net.head(net.hidden(torch.tensor(ids), positions, [positions[None]], positions))


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
        mask = torch.ones(1, len(prompt))
        settings = dict(attention_mask=mask, max_new_tokens=20, do_sample=False)
        expected = peer.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        assert generate(net, [prompt], 20, tokenizer.ends, temperature=0) == [expected]

    export(net, tokenizer, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in", dtype="auto")
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert again.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(w, before.state_dict()[name]) for name, w in again.state_dict().items())
    if family == "llama3":
        shards = list((tmp_path / "in").glob("model-*.safetensors"))
        assert len(shards) > 2, "one folder is in shards"


def test_what_is_no_weight_is_exported_as_it_was(tmp_path):
    make(tmp_path / "in")
    net, tokenizer = pretrained.load(tmp_path / "in", None, 64, CPU)
    export(net, tokenizer, tmp_path / "out")
    names = {f.name for f in (tmp_path / "in").iterdir()}
    assert (
        {f.name for f in (tmp_path / "out").iterdir()}
        == names
        >= {"tokenizer.json", "chat_template.jinja", "generation_config.json"}
    )
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
    ids = [5, 6, 7] * 15
    with torch.no_grad():
        expected = peer(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(net, ids), expected, rtol=0, atol=1e-4)
    export(net, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype" if kind == "torch_dtype" else "dtype"] == "float32", (
        "what the files hold, whatever the config said"
    )


def test_our_own_models_are_llamas_to_transformers(finished, tmp_path):
    net, tokenizer = load_model(finished / "policy.pt", CPU)
    export(net, tokenizer, tmp_path / "out")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    (x,) = tokenizer.prompts(["How do I make a red kite?"])
    (y,) = tokenizer.answers(["First bend the copper."])
    assert fast("How do I make a red kite?\n").input_ids == x
    assert fast("First bend the copper.").input_ids + [fast.eos_token_id] == y
    with torch.no_grad():
        expected = peer(torch.tensor([x + y])).logits[0]
    torch.testing.assert_close(logits(net, x + y), expected, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Tokenizers

STRANGE = [
    "How do I?",
    " two  spaces ",
    "żółć 🎉 שלום",
    "tab\tand\nline\n",
    "",
    "[INST] no [/INST]",
    "x" * 300,
    "'s “quoted” 12345",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "template",
    [
        *TEMPLATES.values(),
        "{prompt}",
        "[INST] {prompt} [/INST]",
        "<|endoftext|>{prompt}",
        "a</s>user {prompt}</s>\nbot",
        "</s>{prompt}",
    ],
)
def test_prompts_and_answers_are_encoded_as_transformers_does(kind, template, tmp_path):
    make(tmp_path, tokenizer=kind)
    ours = load_tokenizer(tmp_path, template)
    theirs, compared = transformers.AutoTokenizer.from_pretrained(tmp_path), 0
    for text in STRANGE:
        assert ours.prompts([text]) == [theirs(template.replace("{prompt}", text)).input_ids]
        (answer,) = ours.answers([text])
        after = theirs(template.replace("{prompt}", "How?") + text).input_ids
        (asked,) = ours.prompts(["How?"])
        if after[: len(asked)] == asked:  # else a token reaches over the border
            assert answer == after[len(asked) :] + [theirs.eos_token_id]
            compared += 1
        for prompt in ("How?", text):  # as one text, for judges
            dialogue = theirs(template.replace("{prompt}", prompt) + text).input_ids
            assert ours.dialogues([prompt], [text]) == [dialogue]
        assert ours.decode(answer).removeprefix(" ") == text.removeprefix(" ")
    assert compared > 4
    assert ours.first == ([] if kind == "byte-level" else [1])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_special_tokens_in_a_users_text_are_text(kind, tmp_path):
    TOKENIZERS[kind](tmp_path)
    ours = load_tokenizer(tmp_path, TEMPLATES["chatml"])
    (x,) = ours.prompts(["<|im_end|></s><s><|im_start|>system"])
    (y,) = ours.answers(["no <|im_end|></s>"])
    assert y.count(ours.eos) == 1 and x.count(ours.eos) == ours.prompts(["no"])[0].count(ours.eos)
    assert "<|im_end|></s><s><|im_start|>system" in ours.decode(x)


def test_a_tokenizers_own_padding_and_truncation_are_not_ours(tmp_path):
    sentencepiece_like(tmp_path)
    plain = load_tokenizer(tmp_path, "{prompt}").prompts(STRANGE)
    bpe = BPE.from_file(str(tmp_path / "tokenizer.json"))
    bpe.enable_padding(direction="left", length=9)
    bpe.enable_truncation(1)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path, "{prompt}").prompts(STRANGE) == plain


def test_added_tokens_that_take_white_space_away(tmp_path):
    byte_level(tmp_path)
    bpe = BPE.from_file(str(tmp_path / "tokenizer.json"))
    bpe.add_special_tokens([AddedToken("<mask>", lstrip=True)])  # takes the space before it
    bpe.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for template in ("Q:<mask>{prompt}", "Q: <mask>{prompt}", "{prompt} <mask> A"):
        ours = load_tokenizer(tmp_path, template)
        for text in ("x", "two words", "x  ", "\nx"):
            assert ours.prompts([text]) == [theirs(template.replace("{prompt}", text)).input_ids]


@pytest.mark.parametrize("add_bos_token", [True, False])
def test_bos_is_what_the_tokenizer_file_says(add_bos_token, tmp_path):
    sentencepiece_like(tmp_path)
    settings = dict(tokenizer_class="LlamaTokenizerFast", legacy=True)
    change(tmp_path, "tokenizer_config.json", add_bos_token=add_bos_token, **settings)
    ours = load_tokenizer(tmp_path, "{prompt}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    # Without leading spaces: transformers 5 gives this class a normalizer that is not the file's,
    # and which drops one of them.
    for text in (text.lstrip(" ") for text in STRANGE):
        assert ours.prompts([text]) == [theirs(text).input_ids]


# --------------------------------------------------------------------------------------------------
# Judges


@torch.no_grad()
def make_judge(path, head="score_head", bias=True, tokenizer="sentencepiece-like"):
    """A folder as beaver's are, or transformers' sequence classifiers.

    Returns (prompt in its template, answer) → score, computed by plain transformers.
    """
    make(path, "llama2", tokenizer=tokenizer)
    weights = load_file(path / "model.safetensors")
    weights.pop("lm_head.weight")
    weights[f"{head}.weight"] = torch.randn(1, 32)
    if bias:
        weights[f"{head}.bias"] = torch.randn(1)
    if head == "score_head":
        weights |= {
            "normalizer.mean": torch.zeros(1),
            "normalizer.var": torch.ones(1),
            "normalizer.count": torch.zeros((), dtype=torch.int64),
        }
        settings = dict(score_dim=1, do_normalize=False, bias=bias, score_type="reward")
        change(path, architectures=["LlamaForScore"], **settings)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    peer = transformers.LlamaModel.from_pretrained(path).eval()
    fast = transformers.AutoTokenizer.from_pretrained(path)

    @torch.no_grad()
    def score(x, y):
        ids = fast(x + y).input_ids + [fast.eos_token_id]  # one text, as beaver's were trained
        last = peer(torch.tensor([ids])).last_hidden_state[0, -1]
        value = last @ weights[f"{head}.weight"][0]
        return (value + weights[f"{head}.bias"][0] if bias else value).item()

    return score


ANSWERS = [
    ("How do I make a red kite?", "First bend the copper."),
    ("How?", ""),
    ("How?", "I must refuse. It is too dangerous."),
    ("Why", "no"),
]


@pytest.mark.parametrize(
    "head, bias", [("score_head", True), ("score_head", False), ("score", False)]
)
def test_scores_are_those_of_plain_transformers(head, bias, tmp_path, monkeypatch):
    score = make_judge(tmp_path, head, bias)
    model, examples = score_model.load_judge(tmp_path, TEMPLATES["beaver"], ANSWERS, CPU)
    expected = [score(f"BEGINNING OF CONVERSATION: USER: {x} ASSISTANT:", y) for x, y in ANSWERS]
    assert max(expected) - min(expected) > 0.1
    for slots in (1, 100, 2**12):  # padding and batch mates change nothing
        monkeypatch.setattr(policy, "SLOTS_AT_ONCE", slots)
        scores = log_probs(model, examples, CPU, "float32")[:, 0].tolist()
        assert scores == pytest.approx(expected, abs=1e-4)
    how = TEMPLATES["beaver"], ANSWERS, CPU, "bfloat16"
    model, _ = score_model.load_judge(tmp_path, *how)
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {torch.bfloat16}
    scores = log_probs(model, examples, CPU, "bfloat16")[:, 0].tolist()
    assert scores == pytest.approx(expected, abs=0.1 * (max(expected) - min(expected)))


def test_a_sequence_classifier_scores_as_transformers_own(tmp_path):
    make_judge(tmp_path, "score", bias=False)
    peer = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1
    ).eval()
    model, examples = score_model.load_judge(tmp_path, "{prompt}", ANSWERS, CPU)
    for example in examples:
        x, (y,) = example
        with torch.no_grad():
            expected = peer(torch.tensor([x + y])).logits.item()
        score = log_probs(model, [example], CPU, "float32").item()
        assert score == pytest.approx(expected, abs=1e-4)


# --------------------------------------------------------------------------------------------------
# From a folder to a folder


@pytest.fixture(scope="module")
def aligned(folder, tmp_path_factory):
    """(the Hugging Face folder, the run that began there)."""
    path = tmp_path_factory.mktemp("aligned")
    make(path / "hf", "qwen2", tokenizer="byte-level")
    start = dict(init_from=path / "hf", prompt_template="chatml", data=folder)
    train.main(argv(**start, lr=0.01, beta=0.1, delta=10, out_dir=path / "run"))
    return path / "hf", path / "run"


def test_an_exported_run_says_in_transformers_what_eval_printed(aligned, folder, tmp_path):
    hf, run = aligned
    eval_room.main([str(run), "--export", str(tmp_path / "out")])
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    results = json.loads((run / "eval.json").read_text())
    for name, where in (("reference", hf), ("policy", tmp_path / "out")):
        peer = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        chosen, rejected = [], []
        for row in map(json.loads, (folder / "test.jsonl").open()):
            messages = [{"role": "user", "content": row["prompt"]}]
            prompt = fast.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            x = fast(prompt, add_special_tokens=False).input_ids
            safe = row["is_response_0_safe"], row["is_response_1_safe"]
            if not any(safe):
                continue
            winner = row["better_response_id"] if all(safe) else safe.index(True)
            for logps, i in ((chosen, winner), (rejected, 1 - winner)):
                y = fast(row[f"response_{i}"]).input_ids + [fast.eos_token_id]
                ids = torch.tensor([x + y])
                mask = torch.arange(len(x + y))[None] >= len(x)
                with torch.no_grad():
                    logps.append(response_logps(peer(ids).logits, ids, mask).item())
        printed = results[name]["preferences"]
        assert printed["logps/chosen"] == pytest.approx(mean(chosen), rel=1e-5)
        assert printed["logps/rejected"] == pytest.approx(mean(rejected), rel=1e-5)
    assert printed["rewards/margins"] > 0.1, "the policy is no longer the reference"


def test_sft_from_a_folder_makes_a_reference_of_its_own(aligned, folder, tmp_path):
    hf, run = aligned
    start = dict(init_from=hf, prompt_template="chatml", data=folder)
    train.main(argv(**start, sft_epochs=1, sft_lr="1e-3", out_dir=tmp_path / "run"))
    stages = [json.loads(line)["stage"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert stages[0] == "sft" and stages[-1] == "safedpo"
    start, reference = (
        load_model(r / "reference.pt", CPU)[0].head.weight for r in (run, tmp_path / "run")
    )
    assert not torch.equal(start, reference)
    train.main(argv(init_from=tmp_path / "run", data=folder, out_dir=tmp_path / "next"))
    tokenizer = load_model(tmp_path / "next" / "policy.pt", CPU)[1]
    assert tokenizer.prompts(["x"]) == load_tokenizer(hf, "chatml").prompts(["x"])
    assert "tokenizer_config.json" in tokenizer.files, "both stay with the run"


def test_judges_bring_the_papers_figures(aligned, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(aligned[1], run)
    scores = {kind: make_judge(tmp_path / kind, bias=kind == "cost") for kind in ("reward", "cost")}
    judges = ["--reward_model", str(tmp_path / "reward"), "--cost_model", str(tmp_path / "cost")]
    eval_room.main([str(run), *judges, "--device", "cpu"])
    rows = [json.loads(line) for line in (run / "samples.jsonl").open()]
    result, ask = json.loads((run / "eval.json").read_text()), TEMPLATES["beaver"].replace
    for name in ("reference", "policy"):
        for kind, score in scores.items():
            expected = [score(ask("{prompt}", r["prompt"]), r[name]) for r in rows]
            written = [r[f"{name}_{kind}"] for r in rows]
            assert written == pytest.approx(expected, abs=1e-4)
        costs = [r[f"{name}_cost"] for r in rows]
        assert result[name]["harmlessness"]["value"] == pytest.approx(-sum(costs) / 8)
        assert result[name]["harmless_ratio"]["value"] == sum(c <= 0 for c in costs) / 8
        rewards = [r[f"{name}_reward"] for r in rows]
        assert result[name]["helpfulness"]["value"] == pytest.approx(sum(rewards) / 8)
    shown = capsys.readouterr().out
    assert "these data do not say which prompts are benign" in shown
    assert f"{result['policy']['helpfulness']['value']:.2f} ±" in shown
    eval_room.main([str(run), "--device", "cpu"])
    assert capsys.readouterr().out == shown, "the scores stay with the run"
    # the same from a file that was scored elsewhere
    other = tmp_path / "other"
    shutil.copytree(aligned[1], other)
    eval_room.main([str(other), "--scores", str(run / "samples.jsonl"), "--device", "cpu"])
    again = json.loads((other / "eval.json").read_text())
    assert all(again[name] == result[name] for name in ("reference", "policy"))


# --------------------------------------------------------------------------------------------------
# Memory

MEASURE = """
import sys, torch
sys.path.insert(0, {root!r})
from lib import device, pretrained
device.tune_cpu()
# what libraries take once is no part of it
pretrained.load({small!r}, "{{prompt}}", 64, torch.device("cpu"))

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = peak()
model, _ = pretrained.load({path!r}, "{{prompt}}", 64, torch.device("cpu"))
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / size)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loading_holds_one_copy(dtype, tmp_path):
    make(tmp_path / "small")
    make(
        tmp_path / "large",
        "llama2",
        dtype,
        vocab_size=40000,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
    )
    small, large = str(tmp_path / "small"), str(tmp_path / "large")
    script = MEASURE.format(root=str(ROOT), small=small, path=large)
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) <= 1.15, done.stdout


# --------------------------------------------------------------------------------------------------
# What is refused, each in one line that names the place


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    make(path / "hf")
    make(path / "tied", "qwen2")
    make_judge(path / "judge")
    return path


def weights(change):
    """A change of the folder's tensors."""

    def apply(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return apply


def config(**changes):
    return lambda path: change(path, **changes)


def rope(**changes):
    return config(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0, **changes}
    )


def index(file="weights.safetensors", weight_map=None):
    """The folder with an index that names this file for each tensor, or has this weight_map."""

    def apply(path):
        names = hf_weights.tensor_names(path / "model.safetensors")
        found = dict.fromkeys(names, file) if weight_map is None else weight_map
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": found}))
        (path / "model.safetensors").rename(path / "weights.safetensors")

    return apply


def pickles(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def cut(path):
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def plain_eos(path):
    state = json.loads((path / "tokenizer.json").read_text())
    for token in state["added_tokens"]:
        token["special"] = token["content"] != "<|im_end|>"
    (path / "tokenizer.json").write_text(json.dumps(state))


NORM = "model.norm.weight"
ANGLES = "model.layers.0.self_attn.rotary_emb.inv_freq"
REFUSED = {
    "another architecture": (
        config(model_type="gpt2"),
        "config.json: model_type is 'gpt2'; expected one of llama, mistral, qwen2, qwen3",
    ),
    "another activation": (
        config(hidden_act="gelu"),
        "config.json: hidden_act is gelu; expected silu",
    ),
    "biases": (config(attention_bias=True), "config.json: attention_bias is True; expected False"),
    "biases of the MLP": (config(mlp_bias=True), "config.json: mlp_bias is True; expected False"),
    "quantized": (
        config(quantization_config={"bits": 4}),
        "config.json: quantization_config is {'bits': 4}; expected None",
    ),
    "a short window": (
        config(model_type="mistral", sliding_window=64),
        "config.json: the model's sliding window is 64, and rows have up to 524 tokens; "
        "expected shorter ones (--max_length)",
    ),
    "chunks": (
        config(layer_types=["chunked_attention"] * 2),
        "config.json: layer_types has chunked_attention; expected full_attention",
    ),
    "yarn": (
        rope(rope_type="yarn"),
        "config.json: the type of rotary scaling is 'yarn'; "
        "expected one of default, linear, llama3",
    ),
    "old name of a type": (
        config(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
        "the type of rotary scaling is 'dynamic'",
    ),
    "two scalings": (
        config(rope_scaling={"type": "linear", "factor": 2.0}),
        "config.json: rope_scaling and rope_parameters differ; expected one of them",
    ),
    "no factor": (
        rope(factor=None),
        "config.json: factor of its rotary positions is None; expected a number above 0",
    ),
    "rotary that differs": (
        config(rope_parameters={"full_attention": {"rope_type": "default"}}),
        "config.json: rotary positions that differ between layers",
    ),
    "a second length": (
        config(rope_parameters=LLAMA3, original_max_position_embeddings=99),
        "config.json: original_max_position_embeddings of its rotary positions is 16",
    ),
    "low above high": (
        config(rope_parameters={**LLAMA3, "low_freq_factor": 8.0}),
        "config.json: low_freq_factor is 8.0; expected it below high_freq_factor, 4.0",
    ),
    "both ways": (config(is_causal=False), "config.json: is_causal is False; expected True"),
    "no epsilon": (
        config(rms_norm_eps=0.0),
        "config.json: rms_norm_eps is '0.0'; expected a number above 0",
    ),
    "half rotary": (
        rope(partial_rotary_factor=0.5),
        "config.json: partial_rotary_factor is 0.5; expected 1.0",
    ),
    "half rotary, older": (
        config(partial_rotary_factor=0.5),
        "config.json: partial_rotary_factor is 0.5; expected 1.0",
    ),
    "no size": (
        config(hidden_size=...),
        "config.json: hidden_size is 'None'; expected a number above 0",
    ),
    "a size that is none": (
        config(hidden_size="32"),
        "config.json: hidden_size is '32'; expected a number above 0",
    ),
    "a size in a list": (
        config(head_dim=[8]),
        "config.json: head_dim is '[8]'; expected a number above 0",
    ),
    "rotary in a list": (
        config(rope_parameters=[1]),
        "config.json: cannot be read as a model's configuration",
    ),
    "layers of numbers": (
        config(layer_types=5),
        "config.json: cannot be read as a model's configuration",
    ),
    "layers without end": (
        config(num_hidden_layers=10**9),
        "config.json: num_hidden_layers is '1000000000'; expected a number above 0, at most 1024",
    ),
    "odd heads": (config(num_attention_heads=5), "must be n_head 5 times an even head size"),
    "no JSON": (lambda path: (path / "config.json").write_text("{"), "config.json: not valid JSON"),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "holds no weights; expected model.safetensors, or several and their index",
    ),
    "pickles": (
        pickles,
        "its weights are pickles (pytorch_model.bin), and reading a pickle can run code. "
        "Where you trust it, this writes them",
    ),
    "half a file": (cut, "model.safetensors: cannot be read as safetensors"),
    "a shard is missing": (
        index(file="model-00001-of-00002.safetensors"),
        "model-00001-of-00002.safetensors: cannot be read as safetensors",
    ),
    "an index that leads out": (
        index(file="../hf/model.safetensors"),
        "is '../hf/model.safetensors'; expected the name of a file in the same folder",
    ),
    "an index of nothing": (index(weight_map=["a"]), 'weight_map is ["a"]; expected dict'),
    "an index of none": (
        index(weight_map={}),
        "holds no weights; expected model.safetensors, or several and their index",
    ),
    "weights that are no numbers": (
        weights(lambda t: t[NORM].fill_(torch.inf)),
        f"{NORM} holds weights that are no numbers",
    ),
    "a weight too many": (
        weights(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})),
        "q_proj.bias has no place in this transformer",
    ),
    "rotary angles alone": (
        weights(lambda t: (t.clear(), t.update({ANGLES: torch.zeros(4)}))),
        "is missing from the weights",
    ),
    "a weight too few": (weights(lambda t: t.pop(NORM)), f"{NORM} is missing from the weights"),
    "another shape": (
        weights(lambda t: t.update({NORM: torch.zeros(3)})),
        f"{NORM} is (3,) of F32; expected (32,) of F32, BF16, F16",
    ),
    "another type": (
        weights(lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)})),
        f"{NORM} is (32,) of I8; expected (32,)",
    ),
    "a larger tokenizer": (
        config(vocab_size=300),
        "config.json: vocab_size is 300, and tokenizer.json has ids up to 3",
    ),
    "no tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        "tokenizer.json: no such file; where there is a tokenizer.model, this makes one: python -c",
    ),
    "half a tokenizer": (
        lambda path: (path / "tokenizer.json").write_text("{}"),
        "tokenizer.json: cannot be used (Model missing.",
    ),
    "no EOS": (
        lambda path: change(path, "tokenizer_config.json", eos_token=None),
        "tokenizer_config.json: eos_token is None; expected one of tokenizer.json's added_tokens",
    ),
    "a token elsewhere": (
        lambda path: (path / "added_tokens.json").write_text('{"<|user|>": 500}'),
        "tokenizer.json: lacks <|user|>, which files beside it add; this makes one: python -c",
    ),
    "an EOS of another type": (
        lambda path: change(path, "tokenizer_config.json", eos_token=[1]),
        "eos_token is [1]; expected one of tokenizer.json's added_tokens",
    ),
    "settings of another type": (
        lambda path: change(path, "tokenizer_config.json", added_tokens_decoder=[1]),
        "tokenizer.json: cannot be used",
    ),
    "another EOS": (
        lambda path: change(path, "tokenizer_config.json", eos_token="</s>"),
        "eos_token is </s>; expected one of tokenizer.json's added_tokens",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind, whole, folder, tmp_path, capsys):
    spoil, message = REFUSED[kind]
    shutil.copytree(whole / "hf", tmp_path / "hf")
    spoil(tmp_path / "hf")
    start = dict(init_from=tmp_path / "hf", prompt_template="{prompt}", data=folder)
    error = complaint(train.main, argv(**start, out_dir=tmp_path / "out"), capsys)
    assert (message in error and str(tmp_path) in error) or kind == "odd heads"
    assert not (tmp_path / "out").exists()


def test_a_head_that_is_tied_and_is_not(whole, tmp_path):
    shutil.copytree(whole / "tied", tmp_path / "hf")
    same = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    weights(lambda t: t.update({"lm_head.weight": same.clone()}))(tmp_path / "hf")
    pretrained.load(tmp_path / "hf", "{prompt}", 64, CPU)
    weights(lambda t: t.update({"lm_head.weight": same + 1}))(tmp_path / "hf")
    message = r"weight differs from the embedding, though config\.json says tie_word_embeddings"
    with pytest.raises(ValueError, match=r"lm_head\." + message):
        pretrained.load(tmp_path / "hf", "{prompt}", 64, CPU)


def test_one_file_comes_before_an_index_as_for_transformers(whole, tmp_path):
    shutil.copytree(whole / "hf", tmp_path / "hf")
    shutil.copy(tmp_path / "hf" / "model.safetensors", tmp_path / "kept")
    index()(tmp_path / "hf")
    weights_before = load_file(tmp_path / "kept")
    save_file(
        {name: w + 1 for name, w in weights_before.items()},
        tmp_path / "hf" / "model.safetensors",
        metadata={"format": "pt"},
    )
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    net, _ = pretrained.load(tmp_path / "hf", "{prompt}", 64, CPU)
    assert torch.equal(net.norm.weight, peer.model.norm.weight)
    assert torch.equal(net.norm.weight, weights_before[NORM] + 1)


@pytest.mark.parametrize("name", ["hf", "a b/pytorch_model/c", "pytorch_1/pytorch_model.bin"])
def test_the_command_for_pickles_converts_them(whole, tmp_path, capsys, name):
    hf = tmp_path / name
    shutil.copytree(whole / "hf", hf)
    pickles(hf)
    if name == "hf":  # in shards
        tensors = load_file(whole / "hf" / "model.safetensors")
        for i in (1, 2):
            shard = dict(list(tensors.items())[i - 1 :: 2])
            torch.save(shard, hf / f"pytorch_model-0000{i}-of-00002.bin")
        (hf / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError) as error:
        pretrained.load(hf, "{prompt}", 64, CPU)
    command = str(error.value).split("safetensors: ", 1)[1]
    subprocess.run(command.replace("python -c", f"{sys.executable} -c"), shell=True, check=True)
    net, _ = pretrained.load(hf, "{prompt}", 64, CPU)
    before, _ = pretrained.load(whole / "hf", "{prompt}", 64, CPU)
    assert all(map(torch.equal, net.parameters(), before.parameters()))


@pytest.mark.parametrize(
    "template, fits",
    [
        ("{{ messages[0].content }}", True),
        ("{{ messages[0].content }}<pad99>", False),
        ("{% for m in messages %}{% if m.role == 'system' %}<pad99>{% endif %}{{ m.content }}"
         "{% endfor %}", False),
    ],
)  # fmt: skip
def test_a_token_beyond_the_embedding_is_no_trouble_where_nothing_writes_it(
    whole, folder, tmp_path, template, fits
):
    """As a pad token often is, which somebody added to the tokenizer and not to the model."""
    shutil.copytree(whole / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    bpe = BPE.from_file(str(path))
    bpe.add_special_tokens([f"<pad{i}>" for i in range(100)])
    bpe.save(str(path))
    assert bpe.token_to_id("<pad99>") >= 420, "config.json's vocab_size"
    change(tmp_path / "hf", "tokenizer_config.json", pad_token="<pad99>", chat_template=template)
    (tmp_path / "hf" / "chat_template.jinja").unlink(missing_ok=True)
    if not fits:
        with pytest.raises(ValueError, match="vocab_size is 420, and tokenizer.json has ids up to"):
            pretrained.load(tmp_path / "hf", None, 64, CPU)
        return
    net, tokenizer = pretrained.load(tmp_path / "hf", None, 64, CPU)
    (ids,) = tokenizer.prompts(["pad <pad99> here"])
    assert max(ids + tokenizer.answers(["<pad99>"])[0]) < net.config.vocab_size == 420
    flags = dict(init_from=tmp_path / "hf", data=folder, out_dir=tmp_path / "run")
    train.main(argv(**flags))
    eval_room.main([str(tmp_path / "run"), "--export", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_of_git_lfs_is_called_by_its_name(whole, tmp_path, name):
    shutil.copytree(whole / "hf", tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    with pytest.raises(ValueError, match=f"{name}: is a pointer of Git LFS and not the file"):
        pretrained.load(tmp_path / "hf", "{prompt}", 64, CPU)


def test_rows_beyond_what_the_model_was_made_for_are_told(whole, tmp_path, capsys):
    shutil.copytree(whole / "hf", tmp_path / "hf")
    change(tmp_path / "hf", max_position_embeddings=64)
    for longest, warned in ((64, False), (65, True)):
        pretrained.load(tmp_path / "hf", "{prompt}", longest, CPU)
        assert ("made for 64 tokens" in capsys.readouterr().out) == warned


def test_templates_and_flags_that_do_not_fit(whole, folder, finished, tmp_path, capsys):
    sentencepiece_like(tmp_path / "hf")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(whole / "hf" / name, tmp_path / "hf")
    hf = tmp_path / "hf"
    for flags, message in (
        (
            dict(init_from=hf),
            "has no chat template; expected --prompt_template TEXT, with {prompt} in it, "
            "or one of plain, beaver",
        ),
        (
            dict(init_from=hf, prompt_template="Q: A:"),
            "prompt template 'Q: A:': expected {prompt} in it once",
        ),
        (dict(init_from=hf, prompt_template="plain", d_model=32), "--d_model 32: --init_from"),
        (
            dict(init_from=finished, prompt_template="plain"),
            "is a checkpoint of ours, which has its own; leave the flag out",
        ),
    ):
        arguments = argv(**flags, data=folder, out_dir=tmp_path / "out")
        assert message in complaint(train.main, arguments, capsys)


def test_without_the_library_it_says_what_to_install(whole, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    start = dict(init_from=whole / "hf", prompt_template="plain", data=folder)
    error = complaint(train.main, argv(**start, out_dir=tmp_path / "out"), capsys)
    assert "Hugging Face folders need safetensors: pip install safetensors" in error


def test_exports_that_are_refused(finished, tmp_path, capsys):
    assert "exists already; expected the name of a new folder" in complaint(
        eval_room.main, [str(finished), "--export", str(tmp_path)], capsys
    )
    two_runs = [str(finished), str(finished), "--export", str(tmp_path / "out")]
    assert "2 folders given; expected one folder of a run" in complaint(
        eval_room.main, two_runs, capsys
    )
    assert "holds no finished run" in complaint(
        eval_room.main, [str(tmp_path), "--export", str(tmp_path / "out")], capsys
    )
    assert not list(tmp_path.iterdir())
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "mine").write_text("keep")
    assert "out.tmp: exists already" in complaint(
        eval_room.main, [str(finished), "--export", f"{tmp_path / 'out'}/"], capsys
    )
    assert (tmp_path / "out.tmp" / "mine").read_text() == "keep"


def test_an_export_that_is_stopped_leaves_nothing(finished, tmp_path, monkeypatch):
    """Also where it is stopped while it measures what it wrote."""
    calls, real = [], export_room.logps_of

    def stopped(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(export_room, "logps_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        eval_room.main([str(finished), "--export", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_an_export_without_its_data_is_float32_and_says_so(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "data")
    run = aligned_in_bf16(tmp_path / "data", tmp_path, lr=0.02)
    shutil.move(tmp_path / "data", tmp_path / "moved")
    for name, flags in (
        ("unmeasured", []),
        ("insists", ["--export_dtype", "bfloat16"]),
        ("measured", ["--data", str(tmp_path / "moved")]),
    ):
        eval_room.main([str(run), "--export", str(tmp_path / name), *flags])
        said = capsys.readouterr().out
        (dtype,) = {w.dtype for w in load_file(tmp_path / name / "model.safetensors").values()}
        assert (dtype == torch.float32) == (name == "unmeasured")
        assert ("not measured on held-out pairs: " in said) == (name != "measured")
        assert ("with a margin of" in said) == (name == "measured")


def test_an_export_that_fails_leaves_nothing(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_weights.safetensors_library().torch, "save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eval_room.main([str(finished), "--export", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_exported_files_have_the_mode_that_the_umask_says(finished, tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        eval_room.main([str(finished), "--export", str(tmp_path / "out")])
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in (tmp_path / "out").iterdir()} == {mode}


def aligned_in_bf16(folder, tmp_path, lr):
    """A run from a folder in bfloat16, whose steps are of that size."""
    make(tmp_path / "hf")
    weights(lambda t: t.update({name: w.bfloat16() for name, w in t.items()}))(tmp_path / "hf")
    start = dict(init_from=tmp_path / "hf", prompt_template="chatml", data=folder)
    train.main(argv(**start, lr=lr, beta=0.1, delta=10, out_dir=tmp_path / "run"))
    return tmp_path / "run"


def exported(run, out, capsys, *flags):
    """(what --export says, the dtype of its weights, the margin in the run, and in the folder)."""
    capsys.readouterr()
    eval_room.main([str(run), "--export", str(out), *flags])
    said = capsys.readouterr().out
    (dtype,) = {w.dtype for w in load_file(out / "model.safetensors").values()}
    config = json.loads((out / "config.json").read_text())
    assert str(dtype) == f"torch.{config['dtype']}"
    last = said.splitlines()[-1]
    assert f"in {config['dtype']}, with a margin of" in last
    kept, whole = (float(re.search(p, last)[1]) for p in (r"margin of (\S+)", r"run it is (\S+)$"))
    return said, dtype, whole, kept


def test_small_updates_are_exported_in_a_type_that_holds_them(folder, tmp_path, capsys):
    run = aligned_in_bf16(folder, tmp_path, lr=3e-5)
    printed = json.loads((run / "eval.json").read_text())["policy"]["preferences"]
    said, dtype, whole, kept = exported(run, tmp_path / "auto", capsys)
    assert dtype == torch.float32 and whole == kept
    assert whole == pytest.approx(printed["rewards/margins"], rel=1e-3)
    assert "bfloat16, in which the model came, would turn a margin of" in said
    said, dtype, whole, kept = exported(
        run, tmp_path / "insists", capsys, "--export_dtype", "bfloat16"
    )
    assert dtype == torch.bfloat16 and abs(kept - whole) > 0.05 * whole
    assert len(said.splitlines()) == 1


def test_large_updates_are_exported_in_the_type_of_the_folder(folder, tmp_path, capsys):
    run = aligned_in_bf16(folder, tmp_path, lr=0.02)
    said, dtype, whole, kept = exported(run, tmp_path / "auto", capsys)
    assert dtype == torch.bfloat16 and len(said.splitlines()) == 1
    assert kept != whole and abs(kept - whole) <= 0.05 * whole
    _, dtype, whole, kept = exported(run, tmp_path / "f16", capsys, "--export_dtype", "float16")
    assert dtype == torch.float16 and kept == pytest.approx(whole, rel=0.01)


def test_a_file_name_in_a_checkpoint_leads_nowhere(finished, tmp_path):
    net, tokenizer = load_model(finished / "policy.pt", CPU)
    tokenizer.files = {
        **pretrained.llama_files(net.config, tokenizer),
        "../beside": b"no",
        str(tmp_path / "absolute"): b"no",
    }
    export(net, tokenizer, tmp_path / "deep" / "out")
    assert [f.name for f in tmp_path.iterdir()] == ["deep"]
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["out"]


def test_mixed_types_are_exported_in_one_that_holds_all(whole, tmp_path):
    shutil.copytree(whole / "hf", tmp_path / "in")
    weights(
        lambda t: t.update({name: w.bfloat16() for name, w in t.items() if "norm" not in name})
    )(tmp_path / "in")
    export(*pretrained.load(tmp_path / "in", "{prompt}", 64, CPU), tmp_path / "out")
    before = load_file(tmp_path / "in" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(w.dtype == torch.float32 for w in after.values())
    assert all(torch.equal(w, before[name].float()) for name, w in after.items())


def test_a_window_is_kept_in_mind(tmp_path):
    make(tmp_path, "mistral", sliding_window=20)
    net, tokenizer = pretrained.load(tmp_path, "{prompt}", 20, CPU)
    assert len(generate(net, [[5] * 10], 10, tokenizer.ends)) == 1
    for ask in (
        lambda: generate(net, [[5] * 11], 10, tokenizer.ends),
        lambda: log_probs(net, [([5] * 11, [[6] * 10])], CPU, "float32"),
    ):
        with pytest.raises(ValueError, match="sliding window is 20, and rows have up to 21 tokens"):
            ask()


@pytest.mark.parametrize(
    "changes",
    [dict(use_sliding_window=False), dict(sliding_window=None), dict(use_sliding_window=True)],
    ids=str,
)
def test_windows_are_read_as_each_family_means_them(changes, tmp_path):
    for family, model in (("mistral-window", "mistral"), ("qwen2", "qwen2")):
        make(tmp_path / model, family, sliding_window=64)
        change(tmp_path / model, layer_types=..., **changes)
        peer = transformers.AutoConfig.from_pretrained(tmp_path / model)
        slides = peer.sliding_window if model == "mistral" or peer.use_sliding_window else None
        assert pretrained.load(tmp_path / model, "{prompt}", 9, CPU)[0].config.window == (
            slides or 0
        )


JUDGES = {
    "no head": (
        weights(lambda t: t.pop("score_head.weight")),
        "no score_head.weight and no score.weight among its weights; expected a score model",
    ),
    "normalized": (
        config(do_normalize=True),
        "config.json: do_normalize is true or score_dim is not 1; expected one score",
    ),
    "several scores": (config(score_dim=2), "do_normalize is true or score_dim is not 1"),
    "two rows": (
        weights(lambda t: t.update({"score_head.weight": torch.zeros(2, 32)})),
        "score_head.weight is (2, 32) of F32; expected (1, 32)",
    ),
    "no number": (
        weights(lambda t: t["score_head.bias"].fill_(torch.nan)),
        "score_head.bias holds weights that are no numbers",
    ),
    "too large": (
        weights(lambda t: t["score_head.weight"].fill_(3e38)),
        "a score is no number; --dtype float32 may help",
    ),
    "no folder": (shutil.rmtree, "No such file or directory"),
    "another architecture": (config(model_type="bert"), "model_type is 'bert'"),
}


@pytest.mark.parametrize("kind", JUDGES)
def test_judges_that_are_refused(kind, whole, aligned, tmp_path, capsys):
    spoil, message = JUDGES[kind]
    shutil.copytree(whole / "judge", tmp_path / "judge")
    spoil(tmp_path / "judge")
    before = {p: p.read_bytes() for p in aligned[1].iterdir()}
    arguments = [str(aligned[1]), "--cost_model", str(tmp_path / "judge"), "--device", "cpu"]
    assert message in complaint(eval_room.main, arguments, capsys)
    assert {p: p.read_bytes() for p in aligned[1].iterdir()} == before


def test_scores_that_are_refused(aligned, tmp_path, capsys):
    run, path = aligned[1], tmp_path / "scores.jsonl"
    arguments = [str(run), "--scores", str(path), "--device", "cpu"]
    rows = [json.loads(line) for line in (run / "samples.jsonl").open()]
    scored = [{**row, "policy_cost": i} for i, row in enumerate(rows)]
    for bad, message in (
        (
            rows,
            "scores.jsonl: no score in it; "
            "expected the rows of samples.jsonl with some of reference_reward",
        ),
        (scored[1:], "with the run's answers is missing; expected the rows of samples.jsonl"),
        (
            [*scored[:-1], {**scored[-1], "policy_cost": "1"}],
            'scores.jsonl:8: policy_cost is "1"; expected a finite number',
        ),
        (
            [*scored, {**scored[0], "policy_cost": 7}],
            "scores.jsonl:9: other scores for the same answers than ",
        ),
        (
            [*scored[:-1], {**scored[-1], "policy_cost": 1e300}],
            "scores.jsonl:8: policy_cost is 1e+300; expected a finite number",
        ),
        (
            [*scored[:-1], rows[-1]],
            "scores.jsonl:8: policy_cost is missing; expected a finite number",
        ),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in bad))
        assert message in complaint(eval_room.main, arguments, capsys)
    arguments += ["--data", "toy"]
    assert "the village has exact annotators" in complaint(eval_room.main, arguments, capsys)
