"""Conversations as text: chat templates, in the Jinja form that Hugging Face folders carry.

A prompt is a text, which a user says, or a tuple of Messages that ends with a user's. A template
says what stands around and between them. It is rendered once for each sequence of roles, with a
mark in the place of each message, so that what people wrote is never read as part of the template.
"""

import datetime
import json
import re
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

PROMPT = "{prompt}"
TEMPLATES = {  # for --prompt_template, by name; a BOS is left to the tokenizer, which puts it first
    "plain": "{prompt}\n",
    "beaver": "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
LONGEST = 10**6  # characters that a template may write by itself
MARKS = (  # by which a text that is in a template already is known, beside its special tokens
    "<|im_start|>",
    "<|start_header_id|>",
    "<|user|>",
    "<start_of_turn>",
    "[INST]",
    "### Instruction:",
    "BEGINNING OF CONVERSATION:",
    "\n\nHuman:",
    "\n\nAssistant:",
)
SPACE = "\u2003\u2002\u2003"  # beside a mark: where it is gone, the template strips the message
MARK = re.compile(f"({SPACE})?\ue000(\\d+)\ue001({SPACE})?")


def mark(i):
    return f"{SPACE}\ue000{i}\ue001{SPACE}"


class Message(NamedTuple):
    role: str  # system, user or assistant
    content: str


def messages_of(prompt):
    return (Message("user", prompt),) if isinstance(prompt, str) else prompt


def as_json(prompt):
    """A prompt as rows of data have it: a text, or a list of {"role", "content"}."""
    return prompt if isinstance(prompt, str) else [message._asdict() for message in prompt]


def jinja_of_text(text, eos):
    """The chat template of a text with {prompt} in it once. eos: the text that ends an answer."""
    text = TEMPLATES.get(text, text).replace("\\n", "\n")  # as it is typed in a shell
    if text.count(PROMPT) != 1:
        raise ValueError(
            f"prompt template {text!r}: expected {PROMPT} in it once, "
            f"or a name: {', '.join(TEMPLATES)}"
        )
    before, after, eos = (json.dumps(x, ensure_ascii=False) for x in (*text.split(PROMPT), eos))
    return (
        "{%- if messages[0].role == 'system' %}"
        "{{ raise_exception('a text as --prompt_template has no place for a system message') }}"
        "{%- endif %}"
        "{%- for message in messages %}"
        f"{{%- if message.role == 'user' %}}{{{{ {before} + message.content + {after} }}}}"
        f"{{%- else %}}{{{{ message.content + {eos} }}}}{{%- endif %}}"
        "{%- endfor %}"
    )


class Template:
    """A chat template. ValueError where it is no template, or does not take a conversation.

    variables: {name: text} that it may use, such as bos_token. date: the day that it calls today,
    as datetime.date.isoformat() gives it.
    """

    def __init__(self, source, variables, date):
        self.variables = variables
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = to_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = datetime.date.fromisoformat(date).strftime
        try:
            self.compiled = environment.from_string(source)
        except Exception as e:  # the library raises nearly anything
            raise ValueError(f"the chat template cannot be read ({one_line(e)})")

    def render(self, messages, generate):
        """The text of a conversation. generate: with what stands before an assistant's answer."""
        try:
            text = self.compiled.render(
                messages=[m._asdict() for m in messages],
                tools=None,
                documents=None,
                add_generation_prompt=generate,
                **self.variables,
            )
        except Exception as e:  # a template may do anything
            roles = ", ".join(m.role for m in messages)
            raise ValueError(f"the chat template does not take messages of {roles} ({one_line(e)})")
        if len(text) > LONGEST + 10 * sum(len(m.content) for m in messages):
            raise ValueError(f"the chat template writes {len(text)} characters; expected fewer")
        return text

    def render_marks(self, roles, generate):
        """The text of a conversation with a mark for each message, with SPACE on both sides."""
        return self.render([Message(role, mark(i)) for i, role in enumerate(roles)], generate)

    def around_answer(self):
        """(white space that the template writes before an answer, the text that it writes behind,
        whether it takes the answer's own white space away on the left, on the right).

        ("", "", (False, False)) where it takes no answer.
        """
        try:
            asked = self.render_marks(("user",), generate=True)
            whole = self.render_marks(("user", "assistant"), generate=False)
            (answer,) = (found for found in MARK.finditer(whole) if found[2] == "1")
        except ValueError:
            return "", "", (False, False)
        before, behind = whole[: answer.start()], whole[answer.end() :]
        space = before.removeprefix(asked)
        return space if space.isspace() else "", behind, stripped_sides(answer)


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, which some templates put around answers: no more."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def stripped_sides(mark):
    """Whether the template strips the message of a found MARK on its left, on its right."""
    return not mark[1], not mark[3]


def strip(text, sides):
    left, right = sides
    text = text.lstrip() if left else text
    return text.rstrip() if right else text


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def to_json(value, **options):
    return json.dumps(value, **{"ensure_ascii": False, **options})


def refuse(message):
    raise jinja2.TemplateError(message)
