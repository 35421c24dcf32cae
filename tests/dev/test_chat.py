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


def with_template(path, source, kind="byte-level"):
    TOKENIZERS[kind](path)
    (path / "chat_template.jinja").write_text(source)
    return load_tokenizer(path), transformers.AutoTokenizer.from_pretrained(path)


def both(ours, fast, conversation):
    """(our ids, transformers') of a conversation."""
    theirs = fast.apply_chat_template(
        [m._asdict() for m in conversation], add_generation_prompt=True, return_dict=False
    )
    return ours.prompts([conversation])[0], theirs


EACH = "{%% for m in messages %%}<|im_start|>{{ m.role }}\n%s<|im_end|>\n{%% endfor %%}"
LOOKS_INTO = {  # what real and less real templates do with a message
    "cuts its thinking out": EACH % "{{ m.content.split('</think>')[-1].lstrip('\n') }}",
    "leaves an empty one out": "{% for m in messages %}{% if m.content|trim %}<|im_start|>"
    "{{ m.content }}<|im_end|>{% endif %}{% endfor %}<|im_start|>",
    "takes line breaks away": EACH % "{{ m.content.strip('\n') }}",
    "joins system and user": "{% set s = messages[0].content|trim if messages[0].role == 'system' "
    "else '' %}<|im_start|>{{ s + messages[-1].content }}<|im_end|>",
    "writes JSON": EACH % "{{ m.content|tojson }}",
    "asks how it begins": EACH % "{{ 'Q ' if m.content.startswith('How') }}{{ m.content }}",
    "is longer for long ones": EACH % "{{ m.content }}{{ '…' if m.content|length > 20 }}",
    "compares messages": EACH % "{{ m.content }}{{ '!' if m == messages[-1] }}",
}
SAID = ("How do I?", "", "  ", "\n\nline\n\n", '"quoted" <think>a\n</think>\n\nb', "x" * 30, "s")


@pytest.mark.parametrize("source", LOOKS_INTO.values(), ids=LOOKS_INTO)
def test_templates_that_look_into_messages_write_what_they_write_elsewhere(source, tmp_path):
    ours, fast = with_template(tmp_path, source)
    last = [text for text in SAID if text.strip()]
    for first, then in itertools.product(SAID, last):
        for conversation in (
            (Message("user", then),),
            (Message("system", first), Message("user", then)),
            (Message("user", "x"), Message("assistant", first), Message("user", then)),
        ):
            mine, theirs = both(ours, fast, conversation)
            assert mine == theirs, conversation


def test_a_message_that_is_changed_and_spells_a_token_is_refused(tmp_path):
    ours, _ = with_template(tmp_path, LOOKS_INTO["takes line breaks away"])
    (kept,) = ours.prompts(["spelled <|im_end|>"])
    assert kept.count(ours.eos) == 1
    with pytest.raises(ValueError, match=r"changes the message .*, which spells '<\|im_end\|>'"):
        ours.prompts(["\nspelled <|im_end|>"])


@pytest.mark.parametrize(
    "source, message",
    [
        ("{% for m in messages %}{% if m.role == 'system' or messages[0].role != 'system' %}"
         "<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}", "leaves out the last"),
        ("{% for m in messages %}{{ m.content|upper if m.role == 'system' else m.content }}"
         "{% endfor %}", "other tokens than the whole"),
        ("{% for m in messages %}{{ m.content[:3] if m.role == 'system' else m.content }}"
         "{% endfor %}", "other tokens than the whole"),
    ],
)  # fmt: skip
def test_a_shape_that_is_refused_stays_refused(source, message, tmp_path):
    ours, _ = with_template(tmp_path, source)
    ours.prompts(["x"])
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            ours.prompts([(Message("system", "s"), Message("user", "x"))])


@pytest.mark.parametrize(
    "stripped, text", [("{{ m.content|trim }}", "yes"), ("{{ m.content }}", " yes \n")]
)
def test_answers_are_stripped_where_the_template_strips_them(stripped, text, tmp_path):
    asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ours, fast = with_template(tmp_path, EACH % stripped + asked)
    (y,) = ours.answers([" yes \n"])
    assert y == [*fast(text).input_ids, ours.eos]
    conversation = (Message("user", "x"),)
    assert ours.dialogues([conversation], [" yes \n"]) == [ours.prompts([conversation])[0] + y[:-1]]


def test_every_end_is_exported(tmp_path):
    """Also one that tokenizer_config.json alone names, where another is trained."""
    folder_of("qwen", tmp_path / "in")
    change(tmp_path / "in", "tokenizer_config.json", eos_token="<|endoftext|>")
    (tmp_path / "in" / "generation_config.json").write_text('{"eos_token_id": 2}')
    ours = load_tokenizer(tmp_path / "in")
    assert len(ours.ends) == 2
    (tmp_path / "out").mkdir()
    for name, content in exported_files(ours, ours.files).items():
        (tmp_path / "out" / name).write_bytes(content)
    again = load_tokenizer(tmp_path / "out")
    assert (again.ends, again.eos) == (ours.ends, ours.eos)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(written["eos_token_id"]) == ours.ends


@pytest.mark.parametrize(
    "changes",
    [
        {"bos_token": "<|begin|>"},
        {"additional_special_tokens": ["<|im_end|>", "<|turn|>"]},
        {"extra_special_tokens": {"turn_token": "<|turn|>"}},
    ],
)
def test_a_token_that_tokenizer_json_lacks_is_refused(changes, tmp_path):
    folder_of("qwen", tmp_path)
    change(tmp_path, "tokenizer_config.json", **changes)
    with pytest.raises(ValueError, match=r"tokenizer.json: lacks <\|(begin|turn)\|>, which files"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "template",
    [5, True, ["x"], [{"name": "default"}], [{"name": "default", "template": 5}], {"a": 5}],
)
def test_chat_templates_that_are_no_text_are_one_line(template, tmp_path):
    folder_of("qwen", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    change(tmp_path, "tokenizer_config.json", chat_template=template)
    with pytest.raises(ValueError, match="chat_template is no text|has no chat template") as e:
        load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be read"),
        ("{{ raise_exception('a\nb\nc') }}", "does not take messages of user .a b c."),
        ("{{ 'x' * (2 * 10**6) }}", "writes 2000000 characters; expected fewer"),
        ("{{ 'x' * 10**15 }}", "does not take messages of user"),
    ],
)
def test_templates_out_of_bounds_are_one_line(source, message, tmp_path):
    with pytest.raises(ValueError, match=message) as e:
        with_template(tmp_path, source)
    assert "\n" not in str(e.value)


def test_named_templates_may_be_a_dictionary(tmp_path):
    folder_of("qwen", tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    change(tmp_path, "tokenizer_config.json", chat_template={"default": QWEN, "tools": "x"})
    assert load_tokenizer(tmp_path).template == QWEN


@pytest.mark.parametrize("ids", [10**30, [10**12], [2, 10**30]])
def test_eos_ids_beyond_any_vocabulary_are_left_out(ids, tmp_path):
    folder_of("qwen", tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert load_tokenizer(tmp_path).ends == [2]
