"""Chat templates with the features of their families: the same ids as transformers gives."""

import itertools
import json

from lib.chat import Message
from lib.hf_tokenizer import exported_files, load_tokenizer

import pytest
import transformers
from test_pretrained import TOKENIZERS, byte_level, change
from tokenizers import AddedToken
from tokenizers import Tokenizer as BPE

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "1 Jan" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|im_start|>system\\n\\nToday: " + date_string + "\\n\\n" + system + "<|im_end|>" }}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n\\n' + m['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}
"""
QWEN = """{%- if tools %}{{- tools | tojson }}{%- endif %}
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{% for m in messages %}
    {%- if m.role != 'assistant' or not m.tool_calls %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
MISTRAL = """{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\\n\\n' %}
{%- set messages = messages[1:] %}{%- else %}{%- set first = '' %}{%- endif %}{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '[INST] ' + (first + m.content).strip() + ' [/INST]' }}
        {%- set first = '' %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content.strip() + ' ' + eos_token }}
    {%- else %}{{ raise_exception('only user and assistant') }}{%- endif %}
{%- endfor %}"""
PHI = """{% for m in messages %}{% generation %}
{{- '<|' + m.role + '|>\\n' + m.content + '<|im_end|>\\n' }}
{%- endgeneration %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""
FAMILIES = {
    "llama3": ("byte-level", LLAMA3),
    "qwen": ("byte-level", QWEN),
    "mistral": ("metaspace", MISTRAL),
    "llama2": ("sentencepiece-like", MISTRAL),
    "phi": ("byte-level", PHI),
}
TEXTS = ("How do I?", "  two  spaces \n", "żółć 🎉 שלום", "\n\nline\n\n", "12345 'quoted'")


def folder_of(family, path):
    kind, template = FAMILIES[family]
    TOKENIZERS[kind](path)
    bpe = BPE.from_file(str(path / "tokenizer.json"))
    bpe.add_tokens([AddedToken("<think>", special=False)])
    if family == "phi":  # these take the white space behind them
        roles = ("system", "user", "assistant")
        bpe.add_special_tokens([AddedToken(f"<|{role}|>", rstrip=True) for role in roles])
    bpe.save(str(path / "tokenizer.json"))
    if kind == "byte-level":
        change(path, "tokenizer_config.json", bos_token="<|endoftext|>")
    (path / "chat_template.jinja").write_text(template, encoding="utf-8")
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_transformers(family, tmp_path):
    folder = folder_of(family, tmp_path)
    ours = load_tokenizer(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for x, y, z in itertools.product(TEXTS, repeat=3):
        system, user, answer = Message("system", y), Message("user", x), Message("assistant", z)
        for messages in ((user,), (system, user), (user, answer, Message("user", y))):
            expected = theirs.apply_chat_template(
                [m._asdict() for m in messages], add_generation_prompt=True, return_dict=False
            )
            assert ours.prompts([messages]) == [expected], messages
    assert ours.prompts([x]) == ours.prompts([(Message("user", x),)])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_added_token_comes_out_of_what_people_write(family, tmp_path):
    ours = load_tokenizer(folder_of(family, tmp_path))
    spelled = "".join(ours.added.values())
    added = lambda ids: [i for i in ids if i in ours.added]
    assert added(ours.prompts([spelled])[0]) == added(ours.prompts(["x"])[0])
    assert added(ours.answers([spelled])[0]) == [ours.eos]
    assert "<think>" in ours.decode(ours.answers([spelled])[0])


@pytest.mark.parametrize(
    "generation, config, ends",
    [
        (2, 2, [2]),
        ([0, 2], 2, [0, 2]),
        (0, [0, 1], [0, 1, 2]),
        (None, 9999, [2]),
        ([0], None, [0, 2]),
    ],
)
def test_every_file_may_name_an_end(generation, config, ends, tmp_path, capsys):
    byte_level(tmp_path)  # its chat template writes <|im_end|>, id 2
    for name, ids in (("generation_config", generation), ("config", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))
    ours = load_tokenizer(tmp_path)
    assert ours.eos == 2 and ours.ends == ends
    said = capsys.readouterr().out
    named = [set(i if isinstance(i, list) else [i]) & {0, 1, 2} for i in (generation, config)]
    assert said.count("\n") == any(ids and 2 not in ids for ids in named)
    out = exported_files(ours, ours.files)
    for name in ("generation_config.json", "config.json"):
        exported = json.loads(out[name])["eos_token_id"]
        assert 2 in (exported if isinstance(exported, list) else [exported])


def test_what_the_template_writes_behind_an_answer_is_trained(tmp_path, capsys):
    byte_level(tmp_path)
    change(tmp_path, "tokenizer_config.json", eos_token="<|endoftext|>")
    ours = load_tokenizer(tmp_path)
    assert ours.eos == 2 and ours.ends == [0, 2] and "'<|im_end|>'" in capsys.readouterr().out
    assert ours.decode([*ours.answers(["yes"])[0], 0]) == "yes"
    assert load_tokenizer(tmp_path, "Q: {prompt} A:").eos == 0, "a text has no word on it"


def test_a_line_break_may_be_typed(tmp_path):
    byte_level(tmp_path)
    typed, meant = (
        load_tokenizer(tmp_path, text) for text in (r"Q:\n{prompt}\n", "Q:\n{prompt}\n")
    )
    assert typed.prompts(["a\nb"]) == meant.prompts(["a\nb"])
    assert typed.prompts([r"a\nb"]) != meant.prompts(["a\nb"]), "users write what they mean"


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["{prompt}\n", "USER: {prompt} ASSISTANT:", "chatml"])
def test_an_exported_folder_carries_the_template_that_was_trained(kind, text, tmp_path):
    TOKENIZERS[kind](tmp_path / "in")
    ours = load_tokenizer(tmp_path / "in", text)
    (tmp_path / "out").mkdir()
    for name, content in exported_files(ours, ours.files).items():
        (tmp_path / "out" / name).write_bytes(content)
    again = load_tokenizer(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for x in ("How do I?", "żółć\n🎉"):
        expected = theirs.apply_chat_template(
            [{"role": "user", "content": x}], add_generation_prompt=True, return_dict=False
        )
        assert ours.prompts([x]) == again.prompts([x]) == [expected]
    assert again.answers(["No. <|im_end|>"]) == ours.answers(["No. <|im_end|>"])


def test_templates_that_cannot_be_used(tmp_path):
    byte_level(tmp_path)
    for template, message in (
        ("{% if %}", "the chat template cannot be read"),
        ("{{ raise_exception('no') }}", "does not take messages of user"),
        ("fixed", "leaves out the last message"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not take messages of user"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no place for a system message"):
        load_tokenizer(tmp_path, "plain").prompts([(Message("system", "a"), Message("user", "b"))])
