"""The tokenizer of a Hugging Face folder: its files in, and out again with what was trained.

tokenizer.json says how text becomes ids; the files beside it say which chat template stands around
it, and which ids end an answer. These files often disagree.
"""

import json
import shlex
from pathlib import Path

from lib import checkpoint
from lib.chat import TEMPLATES, Message, Template, jinja_of_text
from lib.tokenizer import Tokenizer, load_bpe

SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
)
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json")
COPIED_FILES = (  # what --export writes as it was read, except for the dtype in config.json
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
MAKE_TOKENIZER = (
    "this makes one: python -c 'import sys, transformers as t; "
    "t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[1])' {}"
)


def load_tokenizer(folder, template=None, date=None):
    """The Tokenizer of the folder's tokenizer.json. ValueError names what is missing or unusable.

    template: a text with {prompt} in it; None takes the folder's own chat template. What
    tokenizer.json puts before each text, such as BOS, stands before such a text too. date: as
    Tokenizer has it. The ids that end a sampled answer are those of all files. The one that ends an
    answer in training is the one that the chat template writes behind one, else the tokenizer's.
    """
    files, decoded = read_files(folder)
    settings = decoded.get("special_tokens_map.json", {})
    config = decoded.get("tokenizer_config.json", {})
    settings |= {name: value for name, value in config.items() if value is not None}
    bpe, eos, first = checked_bpe(folder, files, decoded, settings)
    if template is None:
        source, first = find_chat_template(files, folder), []  # it writes its BOS itself
    else:
        source = jinja_of_text(without(first, template, bpe), eos)
    if source is None:
        raise ValueError(
            f"{folder}: has no chat template; expected --prompt_template TEXT, with {{prompt}} in "
            f"it, or one of {', '.join(TEMPLATES)}"
        )
    variables = {
        name: token_text(value)
        for name, value in settings.items()
        if name.endswith("_token") and isinstance(value, (str, dict))
    }
    ends = {"tokenizer_config.json": {bpe.token_to_id(eos)}}
    for name in ("generation_config.json", "config.json"):
        ends[name] = token_ids(decoded.get(name, {}).get("eos_token_id"), bpe)
    try:
        trained = end_of_answer(source, variables, bpe) or bpe.token_to_id(eos)
        every = set().union(*ends.values())
        serialized = files["tokenizer.json"].decode()
        tokenizer = Tokenizer(serialized, source, trained, every, first, variables, date, files)
    except ValueError as e:
        raise ValueError(f"{folder / 'tokenizer.json'}: {e}")
    if any(ids and trained not in ids for ids in ends.values()):
        said = (f"{names_of(ids, bpe)} in {name}" for name, ids in ends.items() if ids)
        print(
            f"{folder}: an answer ends in {', '.join(said)}. In training it ends in "
            f"{names_of([trained], bpe)}; each of them ends a sampled one"
        )
    return tokenizer


def read_files(folder):
    """({name: bytes} of the files that --export carries over, {name: decoded} of the settings)."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{path}: no such file; where there is a tokenizer.model, {make_tokenizer(folder)}"
        )
    checkpoint.refuse_pointer(path)
    files = {n: (folder / n).read_bytes() for n in COPIED_FILES if (folder / n).exists()}
    return files, {n: checkpoint.read_json(folder / n) for n in files if n in SETTINGS_FILES}


def checked_bpe(folder, files, decoded, settings):
    """(the library's tokenizer, its EOS as text, the ids that it puts before each text)."""
    path = folder / "tokenizer.json"
    try:
        bpe = load_bpe(files["tokenizer.json"].decode())
        encoded = bpe.encode("x", add_special_tokens=True)
        added = added_texts(bpe)
        eos = token_text(settings.get("eos_token"))
        decoder = settings.get("added_tokens_decoder") or {}
        others = {*decoded.get("added_tokens.json", {}), *map(token_text, decoder.values())}
        others |= {*tokens_in(settings), token_text(settings.get("bos_token") or eos)}
        others = {text for text in others if bpe.token_to_id(text) is None}
    except Exception as e:  # the library raises nothing more specific
        raise ValueError(
            f"{path}: cannot be used ({str(e).splitlines()[0]}); "
            "expected a file of the tokenizers library"
        )
    if eos not in added:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: eos_token is {eos}; "
            "expected one of tokenizer.json's added_tokens"
        )
    if others:
        raise ValueError(
            f"{path}: lacks {min(others)}, which files beside it add; {make_tokenizer(folder)}"
        )
    mask = encoded.special_tokens_mask  # 1 at special tokens, 0 at those of "x"
    return bpe, eos, encoded.ids[: mask.index(0)] if 0 in mask else []


def make_tokenizer(folder):
    return MAKE_TOKENIZER.format(shlex.quote(str(folder)))


def added_texts(bpe):
    return {token.content for token in bpe.get_added_tokens_decoder().values()}


def find_chat_template(files, folder=""):
    """The chat template among a folder's files, or None: in a file of its own, or in the others."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as e:
            place = Path(folder, "chat_template.jinja")
            raise ValueError(f"{place}: not UTF-8 ({e.reason}); expected text in UTF-8")
    found = (
        checkpoint.parse_json(files.get(name, b"{}"), Path(folder, name)) for name in TEMPLATE_FILES
    )
    template = next((f["chat_template"] for f in found if f.get("chat_template")), None)
    try:
        if isinstance(template, list):  # several, with names
            template = {t["name"]: t["template"] for t in template}
        template = template.get("default") if isinstance(template, dict) else template
    except (TypeError, KeyError):
        template = 0
    if not isinstance(template, (str, type(None))):
        raise ValueError(f"{folder}: its chat_template is no text; expected one, or named ones")
    return template


def without(first, template, bpe):
    """A text as template, without what the tokenizer puts before each text by itself."""
    return template.removeprefix("".join(map(bpe.id_to_token, first)))


def end_of_answer(source, variables, bpe):
    """The id of the added token that a chat template writes behind an answer, or None."""
    _, behind, _ = Template(source, variables, "2026-01-01").around_answer()
    ids = bpe.encode(behind.strip(), add_special_tokens=False).ids
    return ids[0] if ids and bpe.id_to_token(ids[0]) in added_texts(bpe) else None


def token_ids(value, bpe):
    """A file's eos_token_id, one id or several, as a set of those that the tokenizer has."""
    ids = value if isinstance(value, list) else [value]
    ids = (i for i in ids if type(i) is int and 0 <= i < 2**31)
    return {i for i in ids if bpe.id_to_token(i) is not None}


def tokens_in(settings):
    """The texts of the special tokens that files beside tokenizer.json list without a name."""
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = settings.get(name) or []
        yield from map(token_text, value.values() if isinstance(value, dict) else value)


def names_of(ids, bpe):
    return " or ".join(repr(bpe.id_to_token(i)) for i in sorted(ids))


def token_text(token):
    """A token's text. Files give a token as a string, or as an object with its content."""
    if isinstance(token, dict) and "content" in token:
        token = token["content"]
    return str(token)


# --------------------------------------------------------------------------------------------------
# Out again


def exported_files(tokenizer, files):
    """{name: bytes} of a folder's files beside the weights: `files`, with what was trained.

    That is the chat template, and the id that ends an answer, which is among the ends of each file.
    """
    files = {name: content for name, content in files.items() if name in COPIED_FILES}
    ends = [tokenizer.eos, *(i for i in tokenizer.ends if i != tokenizer.eos)]
    for name in ("config.json", "generation_config.json"):
        content = json.loads(files.get(name, b"{}"))
        needed = ends if name == "generation_config.json" else ends[:1]
        if not {*needed} <= token_ids(content.get("eos_token_id"), tokenizer.bpe):
            content["eos_token_id"] = ends if len(ends) > 1 else tokenizer.eos
            files[name] = json.dumps(content, indent=2).encode()
    changes = {"eos_token": tokenizer.bpe.id_to_token(tokenizer.eos)}
    if tokenizer.first or find_chat_template(files) != tokenizer.template:
        changes["chat_template"] = template_with_first(tokenizer)
        files.pop("chat_template.jinja", None)
        files.pop("chat_template.json", None)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        content = json.loads(files.get(name, b"{}"))
        mine = changes if name == "tokenizer_config.json" else {"eos_token": changes["eos_token"]}
        if name in files and any(token_text(content.get(n)) != v for n, v in mine.items()):
            files[name] = json.dumps(content | mine, indent=2, ensure_ascii=False).encode()
    return files


def template_with_first(tokenizer):
    """The chat template, with what stands before its prompts written into it.

    Behind a token, some tokenizers leave out the space that they put before the first word of a
    text: then the template writes it.
    """
    first, ids = "".join(map(tokenizer.bpe.id_to_token, tokenizer.first)), tokenizer.prompts(["x"])
    for written in (first, first + " "):
        text = written + tokenizer.chat.render([Message("user", "x")], generate=True)
        if [tokenizer.bpe.encode(text, add_special_tokens=False).ids] == ids:
            return "{{ " + json.dumps(written, ensure_ascii=False) + " }}" + tokenizer.template
    return tokenizer.template
