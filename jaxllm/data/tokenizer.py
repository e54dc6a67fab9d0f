"""Tokenizers as records of functions: bytes, sentencepiece, and what the `tokenizers` library reads.

Ordinary text never becomes a special token, whatever it spells: specials are put in by `chat`, by id.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.types import UserError

SPACE = "\u2581"  # sentencepiece's spelling of a space inside its pieces
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>", "end": "<|end|>"}
MARKER = re.compile(r"<[|\uff5c][^<>]+[|\uff5c]>")  # an added token that is written so is a marker, flagged or not
KINDS = {"bpe": 4_000_000, "unigram": 1_000_000}  # characters of text that the trainer gets: seconds, not minutes

# How the vocabularies in the wild spell our specials, the likeliest first.
SPELLINGS = {
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>", "<|finetune_right_pad_id|>"),
    "eos": ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "<|startoftext|>", "[BOS]"),
    "system": ("<|system|>",),
    "user": ("<|user|>",),
    "assistant": ("<|assistant|>",),
    "end": ("<|end|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|eot|>"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


@dataclass(frozen=True)
class Tokenizer:
    """encode: text -> ids, never a special one; decode: ids -> text, specials dropped; piece: one readable id.

    specials: "pad", "eos" and perhaps "bos", "system", "user", "assistant", "end" -> id.
    files: name -> bytes, what `save` writes and `fingerprint` covers.
    """

    vocab_size: int
    specials: dict[str, int]
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    piece: Callable[[int], str]
    files: dict[str, bytes]


def byte_tokenizer() -> Tokenizer:
    """UTF-8 bytes as ids 0..255, six specials after them; bytes that are not UTF-8 decode to U+FFFD."""
    specials = {name: 256 + i for i, name in enumerate(("pad", "eos", *ROLES))}
    return _bytes(json.dumps({"kind": "byte", "specials": specials}).encode(), "byte tokenizer")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, *, kind: str = "bpe", seed: int = 0) -> Tokenizer:
    """A sentencepiece vocabulary of `vocab_size` ids trained on `texts`; the same input gives the same bytes.

    Lossless: text is taken as it is (no normalisation, white space kept), and what has no piece, the newline too,
    falls back to bytes. Digits stand alone. A space is put before the text and taken off again in decoding, so that a
    word is the same piece at the start of an answer as in the middle of a prompt: without it a small model cannot copy.
    Of more than 4 million characters (unigram: 1 million) a sample of whole documents is used, drawn with `seed`.
    BPE: arXiv 1508.07909; unigram: arXiv 1804.10959; sentencepiece: arXiv 1808.06226.
    UserError: unknown kind, no text, or a size that this text cannot fill.
    """
    import sentencepiece

    if kind not in KINDS:
        raise UserError(f"tokenizer kind {kind!r}: choose one of {', '.join(KINDS)}")
    lines = list(_training_lines(_sample(texts, KINDS[kind], seed)))
    if not lines:
        raise UserError("no text to train a tokenizer on: give documents that are not empty")
    out = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size, model_type=kind,
            byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True,
            control_symbols=list(ROLES.values()), pad_id=0, unk_id=1, eos_id=2, bos_id=-1, pad_piece="<pad>",
            max_sentence_length=2**16, num_threads=2, minloglevel=5,
        )  # fmt: skip
    except RuntimeError as error:
        raise UserError(_size_message(str(error), vocab_size, kind)) from None
    return _sentencepiece(out.getvalue(), "trained tokenizer")


def from_tokenizer_json(path: str | Path) -> Tokenizer:
    """A `tokenizer.json`; its specials: the added tokens of common names, or as `tokenizer_config.json` says.

    UserError: the file does not parse, or no end-of-text token is known.
    """
    files = {"tokenizer.json": _read(path := Path(path))}
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        files[config.name] = _read(config)
    return _tokenizers_json(files, path)


def from_gpt2_files(encoder_json: str | Path, vocab_bpe: str | Path) -> Tokenizer:
    """GPT-2's byte-level BPE from its two files; `<|endoftext|>` is both eos and pad.

    UserError: a file is missing or is not what GPT-2's format says.
    """
    files = {"encoder.json": _read(Path(encoder_json)), "vocab.bpe": _read(Path(vocab_bpe))}
    return _gpt2(files, Path(encoder_json), Path(vocab_bpe))


def load(path: str | Path) -> Tokenizer:
    """What `save` wrote, "byte", or a tokenizer's file or directory with its chat template; dispatches on the file names.

    UserError names the path and the files that were looked for.
    """
    from jaxllm.data.template import attach

    if str(path) == "byte":
        return byte_tokenizer()
    path = Path(os.path.expanduser(path))
    if not os.path.exists(path):
        raise UserError(f"{path}: no such tokenizer; give byte, or a file or directory with {LOOKED_FOR}")
    for names, read in READERS:
        folder = path if path.is_dir() else path.parent
        if (path.is_dir() or path.name in names) and all((folder / name).is_file() for name in names):
            return attach(read(*(folder / name for name in names)), folder)
    models = sorted(path.glob("*.model")) if path.is_dir() else [path] if path.suffix == ".model" else []
    if len(models) == 1:
        return attach(_sentencepiece(_read(models[0]), models[0]), models[0].parent)
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else [path.name])
    raise UserError(f"{path}: not a tokenizer; looked for {LOOKED_FOR}; found {found or 'nothing'}")


def save(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Writes the tokenizer's files; `load` of the directory gives the same fingerprint."""
    Path(directory).mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files.items():
        (Path(directory) / name).write_bytes(content)


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 over the names and bytes of the tokenizer's files, hex."""
    return hashlib.sha256(b"".join(k.encode() + v for k, v in sorted(tokenizer.files.items()))).hexdigest()


def check_ids(ids: Any, vocab_size: int, where: str) -> None:
    """UserError naming row, position and id when an id is not in [0, vocab_size); ids: array or rows of ids."""
    nested = getattr(ids, "ndim", 1) > 1 or (len(ids) > 0 and np.ndim(ids[0]) > 0)
    for i, row in enumerate(ids if nested else [ids]):
        row = np.asarray(row)
        if row.size and not np.issubdtype(row.dtype, np.integer):
            raise UserError(f"{where} row {i}: token ids must be integers, these are {row.dtype}")
        bad = np.flatnonzero((row < 0) | (row >= vocab_size))
        if bad.size:
            what = f"id {row[bad[0]]} at position {bad[0]} is outside the vocabulary of {vocab_size} ids"
            raise UserError(f"{where} row {i}: {what} (0 to {vocab_size - 1}): encode with the model's own tokenizer")


# ---- bytes


def _bytes(content: bytes, where: str | Path) -> Tokenizer:
    try:
        record = json.loads(content)
        kind, specials = record["kind"], {str(k): int(v) for k, v in record["specials"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        kind, specials = None, {}
    if kind != "byte" or {*specials.values()} != {*range(256, 256 + len(specials))} or not {"pad", "eos"} <= specials.keys():
        raise UserError(f"{where}: not the file of a byte tokenizer; give byte instead of a path")
    names = {v: f"<|{k}|>" for k, v in specials.items()}

    def piece(i: int) -> str:
        return names.get(int(i)) or (chr(i) if 32 <= i < 127 else f"<0x{int(i):02X}>")

    def decode(ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")

    def encode(text: str) -> list[int]:
        return list(_encodable(text).encode())

    return Tokenizer(256 + len(specials), specials, encode, decode, piece, {"byte.json": content})


# ---- sentencepiece


def _sample(texts: Iterable[str], left: int, seed: int) -> list[str]:
    """Whole documents in the given order, at most `left` characters in all (one may be cut)."""
    texts = list(texts)
    if sum(map(len, texts)) <= left:
        return texts
    order = list(range(len(texts)))
    random.Random(seed).shuffle(order)
    kept = {}
    for i in order:
        kept[i] = texts[i][:left]
        left -= len(kept[i])
        if not left:
            break
    return [kept[i] for i in sorted(kept)]


def _training_lines(texts: Iterable[str]) -> Iterable[str]:
    """Lines of at most 2,000 characters without those that the trainer reserves: it skips lines that hold them."""
    for text in texts:
        for line in re.split("[\n\t\r\0\u2581\u2585]", _encodable(text)):
            # the BPE trainer aborts the process on a word of more than 2^16 characters
            yield from (line[i : i + 2000] for i in range(0, len(line), 2000))


def _size_message(error: str, vocab_size: int, kind: str) -> str:
    most = re.search(r"too high.*?<= (\d+)", error)
    least = re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", error)
    fix = error.splitlines()[-1].strip()
    fix = f"at most {most[1]} fit" if most else f"at least {least[2]} are needed" if least else fix
    return f"vocab_size {vocab_size} does not suit this text ({kind}): {fix}; change it, or give more text"


def _sentencepiece(model: bytes, where: str | Path) -> Tokenizer:
    """U+2581 in the text, which sentencepiece would take for a space, is encoded as its three bytes."""
    import sentencepiece

    try:
        sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise UserError(f"{where}: not a sentencepiece model ({str(error).splitlines()[0]})") from None
    size = sp.get_piece_size()
    control = {sp.id_to_piece(i): i for i in range(size) if sp.is_control(i)}
    given = {"pad": sp.pad_id(), "eos": sp.eos_id(), "bos": sp.bos_id()}
    specials = _specials(control, {n: sp.id_to_piece(i) for n, i in given.items() if i >= 0}, where)
    dropped = set(control.values()) | {sp.unk_id()}
    mark = [sp.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
    mark = mark if all(map(sp.is_byte, mark)) else []
    newline = sp.piece_to_id("<0x0A>")

    def inside(text: str) -> list[int]:
        """The ids of text that does not begin the whole: without the space that a model may put first."""
        ids = sp.encode("\n" + text)
        return ids[ids.index(newline) + 1 :] if newline in ids else sp.encode(text)

    def encode(text: str) -> list[int]:
        first, *rest = _encodable(text).split(SPACE) if mark else [_encodable(text)]
        return sp.encode(first) + [i for part in rest for i in mark + inside(part)]

    def decode(ids: Sequence[int]) -> str:
        return sp.decode([int(i) for i in ids if int(i) not in dropped])

    def piece(i: int) -> str:
        return sp.id_to_piece(int(i)).replace(SPACE, " ")

    return Tokenizer(size, specials, encode, decode, piece, {"tokenizer.model": model})


# ---- the `tokenizers` library


def is_special(token: dict, ours: Iterable[int]) -> bool:
    """Whether an added token of a tokenizer.json is out of reach of text: flagged, one of `ours`, or written as a marker."""
    return bool(token.get("special")) or token["id"] in ours or MARKER.fullmatch(token["content"]) is not None


def _tokenizers_json(files: dict[str, bytes], path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Fast

    record = _json(files["tokenizer.json"], path)
    listed = lambda: [{**t, "content": str(t["content"]), "id": int(t["id"])} for t in record.get("added_tokens") or []]  # noqa: E731
    added = {t["content"]: t for t in _library(listed, path)}
    config = _json(files.get("tokenizer_config.json", b"{}"), path.with_name("tokenizer_config.json"))
    given = {name: config.get(f"{name}_token") for name in ("pad", "eos", "bos")}
    named = {name: token.get("content") if isinstance(token, dict) else token for name, token in given.items()}
    specials = _specials({text: t["id"] for text, t in added.items()}, named, path)
    for token in added.values():  # a special that is not flagged would be found in ordinary text
        token["special"] = is_special(token, specials.values())
    record |= {"added_tokens": list(added.values()), "truncation": None, "padding": None}
    fast = _library(lambda: Fast.from_str(json.dumps(record)), path)
    unknown = (record.get("model") or {}).get("unk_token")
    forbidden = {t["id"] for t in added.values() if t["special"] and t["content"] != unknown}
    return _fast(fast, specials, forbidden, files)


def _gpt2(files: dict[str, bytes], encoder_json: Path, vocab_bpe: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = _json(files["encoder.json"], encoder_json)
    try:
        lines = files["vocab.bpe"].decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{vocab_bpe}: not UTF-8: not GPT-2's merges") from None
    merges = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.startswith("#version"):
            merges.append(tuple(line.rstrip("\r").split(" ")))
            if len(merges[-1]) != 2:
                raise UserError(f"{vocab_bpe}:{number}: a merge is two pieces and a space, found {line[:60]!r}")
    fast = _library(lambda: Fast(models.BPE(vocab=vocabulary, merges=merges)), encoder_json)
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = _specials(vocabulary, {}, encoder_json)
    return _fast(fast, specials, set(specials.values()), files)


def _fast(fast: Any, specials: dict[str, int], forbidden: set[int], files: dict[str, bytes]) -> Tokenizer:
    """`forbidden`: the ids that ordinary text may not become and that decode drops."""
    fast.encode_special_tokens = True  # that is: split the specials like any text
    # a unigram model, say, may hold a special's spelling as a piece of its own: the characters stand for it
    spelled = {i: [j for c in fast.id_to_token(i) for j in _character(fast, c) if j not in forbidden] for i in forbidden}

    def encode(text: str) -> list[int]:
        ids = fast.encode(_encodable(text), add_special_tokens=False).ids
        return ids if forbidden.isdisjoint(ids) else [j for i in ids for j in spelled.get(i, (i,))]

    def decode(ids: Sequence[int]) -> str:
        return fast.decode([int(i) for i in ids if int(i) not in forbidden], skip_special_tokens=False)

    def piece(i: int) -> str:
        token, text = fast.id_to_token(int(i)), fast.decode([int(i)], skip_special_tokens=False)
        return token if token and (not text or "\ufffd" in text) else text

    return Tokenizer(max(fast.get_vocab(with_added_tokens=True).values()) + 1, specials, encode, decode, piece, files)


def _character(fast: Any, character: str) -> list[int]:
    """The ids of one character: its piece, else its bytes' pieces, where the vocabulary has them."""
    pieces = [character] if fast.token_to_id(character) is not None else [f"<0x{b:02X}>" for b in character.encode()]
    return [i for i in map(fast.token_to_id, pieces) if i is not None]


# ---- shared


def _specials(ids: dict[str, int], named: dict[str, str | None], where: str | Path) -> dict[str, int]:
    """Our names -> ids by a vocabulary's spellings; `named` goes before the table; eos falls back to sep, pad to eos."""
    found = {}
    for name, spellings in SPELLINGS.items():
        hits = [ids[s] for s in (named.get(name), *spellings) if isinstance(s, str) and s in ids]
        if hits:
            found[name] = hits[0]
    if "eos" not in found and "sep" in found:  # BERT's vocabularies end a text so
        found["eos"] = found["sep"]
    if "eos" not in found:
        raise UserError(f"{where}: no end-of-text token among its specials; looked for {', '.join(SPELLINGS['eos'])}")
    found.setdefault("pad", found["eos"])
    return found


def _encodable(text: str) -> str:
    """The text itself; UserError when it has a lone surrogate, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = f"a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError(f'text has {lone}: clean it, as with text.encode("utf-8", "replace").decode()') from None
    return text


def _read(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: tokenizer file cannot be read ({error.strerror})") from None
    if not content:
        raise UserError(f"{path}: tokenizer file is empty")
    return content


def _json(content: bytes, path: Path) -> dict:
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: a JSON object was expected, found {type(record).__name__}")
    return record


def _library(make: Callable[[], Any], path: Path) -> Any:
    """The library raises bare Exception on files it cannot use, and its panics are BaseExceptions."""
    try:
        return make()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        reason = str(error).split("\n")[0][:200]
        raise UserError(f"{path}: the tokenizers library cannot use it ({reason})") from None


READERS: tuple[tuple[tuple[str, ...], Callable[..., Tokenizer]], ...] = (
    (("byte.json",), lambda path: _bytes(_read(path), path)),
    (("tokenizer.json",), from_tokenizer_json),
    (("encoder.json", "vocab.bpe"), from_gpt2_files),
    (("vocab.json", "merges.txt"), from_gpt2_files),
    (("tokenizer.model",), lambda path: _sentencepiece(_read(path), path)),
)
LOOKED_FOR = "tokenizer.json, tokenizer.model or one *.model, encoder.json and vocab.bpe, vocab.json and merges.txt, byte.json"
