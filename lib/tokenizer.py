"""Text to token ids and back: prompts in their template, answers with their EOS.

Prompt and answer are encoded apart, so that the template's last token is a border and both answers
follow the same prompt ids. Special tokens come from the template and the tokenizer alone: "<eos>"
in a prompt or an answer is text.
"""

import re

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

PROMPT = "{prompt}"
TEMPLATES = {  # for --prompt_template, by name; a BOS is left to the tokenizer, which puts it first
    "plain": "{prompt}\n",
    "beaver": "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
}


class Tokenizer:
    r"""A tokenizer.json and a prompt template. ValueError where they do not fit each other.

    serialized: the text of tokenizer.json. template: text with {prompt} in it once. eos: the id
    that ends an answer. first: the ids that stand before a prompt. files: {name: bytes} of the
    Hugging Face folder that it came from, for --export.

    The template is split at {prompt} and at its special tokens. For chatml this gives

        before  ids of  <|im_start|>
        left            user\n          encoded in one piece with the prompt, as right is
        right           (nothing)
        after   ids of  <|im_end|>  \n  <|im_start|>
        end             assistant\n     in `dialogues` encoded in one piece with the answer
    """

    def __init__(self, serialized, template, eos, first=(), files=None):
        self.serialized = serialized
        self.template = template
        self.eos = eos
        self.first = list(first)
        self.files = files or {}
        self.bpe = load_bpe(serialized)
        # Llama's and Mistral's tokenizers put a space before the first word of a text. What follows
        # a special token is not the first word.
        changed = self.bpe.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        self.inner_bpe = load_bpe(changed)
        self.vocab_size = max(self.bpe.get_vocab().values()) + 1
        if template.count(PROMPT) != 1:
            raise ValueError(
                f"prompt template {template!r}: expected {PROMPT} in it once, "
                f"or a name: {', '.join(TEMPLATES)}"
            )
        self._split_template()
        self._check_template()

    def _split_template(self):
        added = self.bpe.get_added_tokens_decoder().items()
        special = {token.content: i for i, token in added if token.special}
        longest_first = sorted(special, key=len, reverse=True)
        any_special = "|".join(map(re.escape, longest_first)) or "(?!)"  # (?!) matches nothing
        before, after = (re.split(f"({any_special})", t) for t in self.template.split(PROMPT))

        def ids_of(bpe, parts):
            ids = []
            for part in parts:
                ids += [special[part]] if part in special else self._encode(bpe, [part])[0]
            return ids

        self.left = before.pop()
        self.right = after.pop(0)
        self.end = after.pop() if after else ""
        self.prompt_bpe = self.inner_bpe if before else self.bpe
        self.before = ids_of(self.bpe, before[:1]) + ids_of(self.inner_bpe, before[1:])
        self.after = ids_of(self.inner_bpe, after)

    def _check_template(self):
        """ValueError if the template, encoded in parts, gives other ids than encoded as a whole."""
        self.bpe.encode_special_tokens = False
        whole = self.first + self._encode(self.bpe, [self.template.replace(PROMPT, "x")])[0]
        self.bpe.encode_special_tokens = True
        if self.first and whole[: 2 * len(self.first)] == 2 * self.first:
            raise ValueError(
                f"prompt template {self.template!r} begins with what this tokenizer puts before "
                "each text; leave it out"
            )
        eos_text = self.bpe.id_to_token(self.eos)
        if self.eos in self._encode(self.bpe, [eos_text])[0]:
            raise ValueError(
                f"the EOS {eos_text!r} can stand in a text; "
                "expected it as a special token in tokenizer.json"
            )
        if self.prompts(["x"]) != [whole]:
            raise ValueError(
                f"prompt template {self.template!r}: its parts are other tokens than the whole; "
                "expected fewer special tokens in it"
            )

    def _encode(self, bpe, texts):
        texts = list(texts)
        try:
            return [e.ids for e in bpe.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as e:  # the library raises nothing more specific
            raise ValueError(
                f"the tokenizer cannot encode one of {len(texts)} texts ({e}); "
                "expected one that takes any text"
            )

    @classmethod
    def train(cls, records, vocab_size, template):
        """A byte-level BPE, trained on prompts and answers of records. It can encode any text."""
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<eos>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )

        def texts():
            for record in records:
                yield template.replace(PROMPT, record.prompt)
                yield record.response_0
                yield record.response_1

        bpe.train_from_iterator(texts(), trainer)
        return cls(bpe.to_str(), template, bpe.token_to_id("<eos>"))

    def state(self):
        """What a checkpoint keeps, as plain values: Tokenizer(**state) is this one again."""
        names = ("serialized", "template", "eos", "first", "files")
        return {name: getattr(self, name) for name in names}

    def prompts(self, texts):
        """The ids of each prompt in the template."""
        (end,) = self._encode(self.inner_bpe, [self.end])
        middles = self._encode(self.prompt_bpe, (self.left + x + self.right for x in texts))
        return [[*self.first, *self.before, *ids, *self.after, *end] for ids in middles]

    def answers(self, texts):
        """The ids of each answer, with its EOS."""
        return [ids + [self.eos] for ids in self._encode(self.bpe, texts)]

    def dialogues(self, prompts, answers):
        """The ids of each prompt in its template with its answer, as one text, without EOS."""
        middles = [self.left + x + self.right for x in prompts]
        if self.after:
            ends = [self.end + y for y in answers]
        else:  # no special token stands between prompt and answer
            middles = [middle + y for middle, y in zip(middles, answers)]
            ends = [""] * len(middles)
        middles = self._encode(self.prompt_bpe, middles)
        ends = self._encode(self.inner_bpe, ends)
        return [
            [*self.first, *self.before, *ids, *self.after, *end] for ids, end in zip(middles, ends)
        ]

    def decode(self, ids):
        """The text of an answer's ids, without its EOS."""
        return self.bpe.decode([i for i in ids if i != self.eos])


def load_bpe(serialized):
    """The library's tokenizer, which takes special tokens in a text as text."""
    bpe = BPE.from_str(serialized)
    bpe.no_padding()
    bpe.no_truncation()
    bpe.encode_special_tokens = True
    return bpe
