"""Text to token ids and back: prompts in their chat template, answers with the id that ends them.

Prompt and answer are encoded apart, so that the template's last token is a border and both answers
follow the same prompt ids. Added tokens, special or not, come from the template alone: "<eos>" in a
prompt or an answer is text.
"""

import datetime
import json
from contextlib import suppress
from typing import NamedTuple

from lib.chat import (
    MARK,
    MARKS,
    Message,
    Template,
    jinja_of_text,
    mark,
    messages_of,
    strip,
    stripped_sides,
)

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

EOS = "<eos>"  # of a tokenizer that is trained here
FIRST, INNER, BARE = range(3)  # a text's place: at the beginning, behind an added token, or a text


class Slot(NamedTuple):
    """The place of a message in a segment of text."""

    message: int
    strip: tuple  # whether the template takes white space away on its left, on its right


class Segment(NamedTuple):
    """What stands between two added tokens and is encoded in one piece."""

    place: int
    parts: tuple  # texts of the template, and Slots


class Tokenizer:
    r"""A tokenizer.json and a chat template. ValueError where they do not fit each other.

    serialized: the text of tokenizer.json. template: a chat template (lib/chat.py), with the
    variables that it may use and the date that it calls today. eos: the id that ends an answer in
    training. ends: the ids that end one in sampling. first: the ids that stand before a prompt
    whose template does not write them. files: {name: bytes} of the Hugging Face folder that it came
    from, for --export.

    A rendered conversation is cut at its added tokens. For chatml and a user's message this gives

        id       <|im_start|>
        Segment  user\n, the message     encoded in one piece
        ids      <|im_end|>  \n  <|im_start|>  assistant\n
    """

    def __init__(
        self, serialized, template, eos, ends=(), first=(), variables=None, date=None, files=None
    ):
        self.serialized, self.template, self.eos = serialized, template, eos
        self.ends, self.first = sorted({eos, *ends}), list(first)
        self.variables = variables or {}
        self.date = date or datetime.date.today().isoformat()
        self.files = files or {}
        self.chat = Template(template, self.variables, self.date)
        self.space, _, self.strips_answers = self.chat.around_answer()
        self.bpe = load_bpe(serialized)  # reads added tokens in a text
        added = self.bpe.get_added_tokens_decoder()
        self.added = {i: token.content for i, token in added.items()}
        self.marks = {*MARKS, *(t.content for t in added.values() if t.special and t.content)}
        self.text_bpes = text_bpes(self.bpe)  # and these do not
        for i in self.ends:
            if i in self._encode(INNER, [self.bpe.id_to_token(i)])[0]:
                raise ValueError(
                    f"the EOS {self.bpe.id_to_token(i)!r} can stand in a text; "
                    "expected it as an added token in tokenizer.json"
                )
        self._layouts = {}  # roles → (the whole text as slots gives it, layout)
        layout = self._layout(("user",))
        for roles in (("system", "user"), ("user", "assistant", "user")):
            with suppress(ValueError):  # a template need not take these
                layout = layout + self._layout(roles)
        in_template = (i for i in layout if isinstance(i, int))
        in_texts = self.bpe.get_vocab(with_added_tokens=False).values()
        self.vocab_size = max(*in_texts, *self.ends, *in_template) + 1  # others never come

    @classmethod
    def train(cls, records, vocab_size, template):
        """A byte-level BPE, trained on prompts and answers of records. It can encode any text."""
        template = jinja_of_text(template, EOS)
        chat = Template(template, {}, "2026-01-01")  # such a template has no use for a date
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )

        def texts():
            for record in records:
                yield chat.render(messages_of(record.prompt), generate=True)
                yield record.response_0
                yield record.response_1

        bpe.train_from_iterator(texts(), trainer)
        return cls(bpe.to_str(), template, bpe.token_to_id(EOS))

    def state(self):
        """What a checkpoint keeps, as plain values: Tokenizer(**state) is this one again."""
        names = ("serialized", "template", "eos", "ends", "first", "variables", "date", "files")
        return {name: getattr(self, name) for name in names}

    # ----------------------------------------------------------------------------------------------
    # Text → ids

    def prompts(self, prompts):
        """The ids of each prompt (lib/chat.py) in the template, with what stands before an answer.

        ValueError if the template does not take its messages.
        """
        return self._fill(map(messages_of, prompts))

    def answers(self, texts):
        """The ids of each answer, with its EOS, as the template puts it behind a prompt.

        No space comes before its first word unless the template writes one, or an added token
        stands before it and the tokenizer puts a space there.
        """
        (*_, last) = self._layout(("user", "answer"))
        alone = len(last.parts) == 3 and not last.parts[0]
        place = last.place if alone else BARE
        texts = (self.space + strip(y, self.strips_answers) for y in texts)
        return [ids + [self.eos] for ids in self._encode(place, texts)]

    def dialogues(self, prompts, answers):
        """The ids of each prompt in its template with its answer, as one text, without EOS."""
        answers = (Message("answer", strip(y, self.strips_answers)) for y in answers)
        return self._fill((*messages_of(x), y) for x, y in zip(prompts, answers))

    def spells_special(self, pair):
        """Whether a pair's texts spell a special token, or a mark of a chat template."""
        texts = [m.content for m in messages_of(pair.x)] + [pair.y_w, pair.y_l]
        return any(mark in text for text in texts for mark in self.marks)

    def decode(self, ids):
        """The text of an answer's ids, without its end."""
        return self.bpe.decode([i for i in ids if i not in self.ends]).removeprefix(self.space)

    def _layout(self, roles):
        """The ids of added tokens and of fixed text, and Segments, of a conversation.

        Its last role may be "answer", which follows what stands before an assistant's answer.
        """
        if roles not in self._layouts:
            marked = self._render([Message(role, mark(i)) for i, role in enumerate(roles)])
            layout = self.first + list(self._cut(marked))
            last = len(roles) - 1 - (roles[-1] == "answer")
            segments = [x for x in layout if isinstance(x, Segment)]
            if not any(slot.message == last for x in segments for slot in x.parts[1::2]):
                raise ValueError(f"the chat template leaves out the last message of {roles}")
            messages = [Message(role, f"x{i}") for i, role in enumerate(roles)]
            if (
                self._joined(layout, messages)
                != self.first + self._parse(self._render(messages)).ids
            ):
                raise ValueError(
                    "the chat template's parts are other tokens than the whole; expected one that "
                    "writes messages as they are, between added tokens"
                )
            self._layouts[roles] = tuple(slots(marked)), layout
        return self._layouts[roles][1]

    def _render(self, messages):
        """The text of a conversation, with what stands before an answer, or with one ("answer")."""
        if messages[-1].role != "answer":
            return self.chat.render(messages, generate=True)
        return self.chat.render(messages[:-1], generate=True) + self.space + messages[-1].content

    def _cut(self, marked):
        """The layout of a text with marks."""
        start, place = 0, FIRST
        for i, (first, last) in self._added_in(marked) + [(None, (len(marked), None))]:
            parts = marked[start:first]
            if MARK.search(parts):
                yield Segment(place, tuple(slots(parts)))
            elif parts:
                yield from self._encode(place, [parts])[0]
            if i is not None:
                yield i
            start, place = last, INNER

    def _added_in(self, text):
        """[(id, (start, end))] of the added tokens in a text."""
        encoded = self._parse(text)
        return [(i, span) for i, span in zip(encoded.ids, encoded.offsets) if i in self.added]

    def _fill(self, conversations):
        """The ids of each conversation, a sequence of messages."""
        layouts, texts = [], ([], [], [])
        for messages in conversations:
            layout = self._layout_of(messages)
            layouts.append(layout)
            for segment in layout:
                if isinstance(segment, Segment):
                    texts[segment.place].append(filled(segment.parts, messages))
        ids = [iter(self._encode(place, texts[place])) for place in (FIRST, INNER, BARE)]
        return [
            [i for x in layout for i in (next(ids[x.place]) if isinstance(x, Segment) else (x,))]
            for layout in layouts
        ]

    def _layout_of(self, messages):
        """The layout of a conversation's roles; or all its ids, where the template does with these
        messages what it does not do with others: it cuts a part out, or leaves an empty one out.

        ValueError if one of them then spells an added token, which could not be told from the
        template's.
        """
        roles = tuple(m.role for m in messages)
        layout = self._layout(roles)
        parts, _ = self._layouts[roles]
        text = self._render(messages)
        if text == filled(parts, messages):
            return layout
        for message in messages:
            if spelled := [t for t in self.added.values() if t and t in message.content]:
                raise ValueError(
                    f"the chat template changes the message {message.content[:60]!r}, which spells "
                    f"{spelled[0]!r}; expected one or the other"
                )
        return self.first + self._parse(text).ids

    def _joined(self, layout, messages):
        """The ids of one conversation in a layout."""
        ids = []
        for x in layout:
            is_text = isinstance(x, Segment)
            ids += self._encode(x.place, [filled(x.parts, messages)])[0] if is_text else [x]
        return ids

    def _encode(self, place, texts):
        """The ids of each text in that place, without any added token."""
        return [e.ids for e in call(self.text_bpes[place].encode_batch_fast, texts)]

    def _parse(self, text):
        """The library's encoding of a text, with added tokens."""
        (encoded,) = call(self.bpe.encode_batch, [text])
        return encoded


def call(encode_batch, texts):
    texts = list(texts)
    try:
        return encode_batch(texts, add_special_tokens=False)
    except Exception as e:  # the library raises nothing more specific
        raise ValueError(
            f"the tokenizer cannot encode one of {len(texts)} texts ({e}); "
            "expected one that takes any text"
        )


def slots(text):
    """A text with marks as texts, which may be empty, and Slots in turn."""
    end = 0
    for found in MARK.finditer(text):
        yield text[end : found.start()]
        yield Slot(int(found[2]), stripped_sides(found))
        end = found.end()
    yield text[end:]


def filled(parts, messages):
    """The text of parts, as slots gives them, with a conversation in the slots."""
    return "".join(
        strip(messages[part.message].content, part.strip) if isinstance(part, Slot) else part
        for part in parts
    )


# --------------------------------------------------------------------------------------------------
# The library's tokenizers


def load_bpe(serialized, text_only=False):
    """The library's tokenizer. text_only: it takes added tokens in a text as text."""
    bpe = BPE.from_str(serialized)
    bpe.no_padding()
    bpe.no_truncation()
    bpe.encode_special_tokens = text_only
    return bpe


def text_bpes(bpe):
    """Tokenizers of text alone, for each place.

    Llama's and Mistral's tokenizers put a space before the first word of a text; some of them also
    behind each added token.
    """
    whole = json.loads(bpe.to_str())
    for token in whole["added_tokens"]:
        token["special"] = True  # the library can take these alone as text
    first = json.dumps(whole)
    inner = first.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    whole["normalizer"] = without_first_space(whole["normalizer"])
    whole["pre_tokenizer"] = without_first_space(whole["pre_tokenizer"])
    return [
        load_bpe(serialized, text_only=True) for serialized in (first, inner, json.dumps(whole))
    ]


def without_first_space(part):
    """A normalizer or pre-tokenizer, or a sequence of them, that puts no space before a text."""
    if not part or part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        (name,) = part.keys() - {"type"}
        return part | {name: list(filter(None, map(without_first_space, part[name])))}
    changes = {"prepend_scheme": "never", "add_prefix_space": False}
    return part | {name: value for name, value in changes.items() if name in part}
