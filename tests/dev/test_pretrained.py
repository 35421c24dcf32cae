"""Hugging Face folders in and out, against transformers itself: random weights, tiny sizes."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

import pretrained
from model import pack_rows
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
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
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
    from eval import load_model

    net, tokenizer = load_model(finished / "policy.pt", CPU)
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
