"""Text to token ids and back: prompts in their template, answers with their EOS.

Prompt and answer are encoded apart, so that the template's last token is a border and both answers follow the same prompt ids.
Special tokens come from the template and the tokenizer alone: "<eos>" in a prompt or an answer is text.
"""

import re

from tokenizers import Tokenizer as BPE
from tokenizers import decoders, models, pre_tokenizers, trainers

PROMPT = "{prompt}"
TEMPLATES = {  # what --prompt_template knows by name; a token that the tokenizer itself puts first, as Llama's do, is no part of it
    "plain": "{prompt}\n",
    "beaver": "BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:",
    "chatml": "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>user<|end_header_id|>\n\n{prompt}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
}


class Tokenizer:
    """serialized: a tokenizer.json. template: text that holds {prompt} once. eos: the id that ends an answer. first: the ids
    that stand before a prompt. files: {name: bytes} of the Hugging Face folder it came from, for --export.

    ValueError where the template does not fit the tokenizer.
    """

    def __init__(self, serialized, template, eos, first=(), files=None):
        self.serialized, self.template, self.eos, self.first, self.files = (
            serialized,
            template,
            eos,
            list(first),
            files or {},
        )
        self.bpe = BPE.from_str(serialized)
        self.bpe.no_padding()
        self.bpe.no_truncation()
        self.bpe.encode_special_tokens = True  # as text
        # what follows a special token is not the first word, which Llama's and Mistral's spell with a space of its own
        self.inner = BPE.from_str(
            self.bpe.to_str().replace('"prepend_scheme":"first"', '"prepend_scheme":"never"')
        )
        self.inner.encode_special_tokens = True
        self.vocab_size = max(self.bpe.get_vocab().values()) + 1
        if template.count(PROMPT) != 1:
            raise ValueError(
                f"prompt template {template!r}: expected {PROMPT} in it once, or a name: {', '.join(TEMPLATES)}"
            )
        self.special = {
            t.content: i for i, t in self.bpe.get_added_tokens_decoder().items() if t.special
        }
        cut = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)"
        before, after = (re.split(f"({cut})", part) for part in template.split(PROMPT))
        self.around = (
            before.pop(),
            after.pop(0),
        )  # what is encoded with the prompt in one piece, by:
        self.piece = self.inner if before else self.bpe
        self.before = [*self._part(self.bpe, before[:1]), *self._part(self.inner, before[1:])]
        self.after, self.end = (
            self._part(self.inner, after[:-1]),
            "".join(after[-1:]),
        )  # the end is text, or nothing
        self._check()

    def _part(self, bpe, parts):
        return [
            i
            for part in parts
            for i in (
                [self.special[part]] if part in self.special else self._encode(bpe, [part])[0]
            )
        ]

    def _encode(self, bpe, texts):
        texts = list(texts)
        try:
            return [e.ids for e in bpe.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception as e:  # the library raises nothing more specific
            raise ValueError(
                f"the tokenizer cannot encode one of {len(texts)} texts ({e}); expected one that takes any text"
            )

    def _check(self):
        """The template as it is encoded here, in parts, against the whole of it at once."""
        self.bpe.encode_special_tokens = False
        whole = self.first + self._encode(self.bpe, [self.template.replace(PROMPT, "x")])[0]
        self.bpe.encode_special_tokens = True
        if self.first and whole[: 2 * len(self.first)] == 2 * self.first:
            raise ValueError(
                f"prompt template {self.template!r} begins with what this tokenizer puts before each text; leave it out"
            )
        if self.eos in self._encode(self.bpe, [self.bpe.id_to_token(self.eos)])[0]:
            raise ValueError(
                f"the EOS {self.bpe.id_to_token(self.eos)!r} can stand in a text; expected it as a special token in tokenizer.json"
            )
        if self.prompts(["x"]) != [whole]:
            raise ValueError(
                f"prompt template {self.template!r}: its parts are other tokens than the whole; expected fewer special tokens in it"
            )

    @classmethod
    def train(cls, records, vocab_size, template):
        """Byte-level BPE, trained on the prompts and answers of records: any text goes in and comes out again."""
        bpe = BPE(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<eos>"],
            initial_alphabet=alphabet,
            show_progress=False,
        )
        texts = (
            t
            for r in records
            for t in (template.replace(PROMPT, r.prompt), r.response_0, r.response_1)
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(bpe.to_str(), template, bpe.token_to_id("<eos>"))

    def state(self):
        """What a checkpoint keeps, as plain values: Tokenizer(**state) is this one again."""
        return {
            name: getattr(self, name)
            for name in ("serialized", "template", "eos", "first", "files")
        }

    def prompts(self, texts):
        left, right = self.around
        end = self._encode(self.inner, [self.end])[0]
        return [
            [*self.first, *self.before, *ids, *self.after, *end]
            for ids in self._encode(self.piece, (left + t + right for t in texts))
        ]

    def dialogues(self, prompts, answers):
        """Prompt and answer as one text, without EOS."""
        (left, right), answers = self.around, list(answers)
        behind, ends = (
            ([""] * len(answers), [self.end + a for a in answers])
            if self.after
            else (answers, [""] * len(answers))
        )
        texts = self._encode(self.piece, (left + x + right + y for x, y in zip(prompts, behind)))
        return [
            [*self.first, *self.before, *ids, *self.after, *end]
            for ids, end in zip(texts, self._encode(self.inner, ends))
        ]

    def answers(self, texts):
        return [ids + [self.eos] for ids in self._encode(self.bpe, texts)]

    def decode(self, ids):
        return self.bpe.decode([i for i in ids if i != self.eos])
