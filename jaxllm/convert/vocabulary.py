"""The files that transformers reads a tokenizer from, beside those that are the tokenizer's own."""

from __future__ import annotations

import json
from typing import Any

ROLES = ("system", "user", "assistant")


def files(tokenizer: Any) -> dict[str, bytes]:
    """name -> bytes, the tokenizer's own files among them: a directory with these loads here and in transformers alike.

    One difference stays: transformers' LlamaTokenizer puts no space before a text that begins with one.
    """
    own = tokenizer.files
    found = dict(own)
    ours = all(name in tokenizer.specials for name in (*ROLES, "end"))
    config = {f"{n}_token": tokenizer.piece(i) for n, i in tokenizer.specials.items() if n in ("pad", "eos", "bos")}
    config |= {"model_max_length": 10**9, "clean_up_tokenization_spaces": False}
    if "byte.json" in own:
        found["tokenizer.json"] = _bytes(tokenizer)
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif "tokenizer.json" in own:
        config |= {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif "encoder.json" in own:
        found |= {"vocab.json": own["encoder.json"], "merges.txt": own["vocab.bpe"]}
        config |= {"tokenizer_class": "GPT2Tokenizer"}
    elif ours:  # a sentencepiece model made here; of others only their authors know the class
        more = [tokenizer.piece(tokenizer.specials[name]) for name in (*ROLES, "end")]
        config |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_eos_token": False}
        config |= {"unk_token": "<unk>", "bos_token": config.get("bos_token"), "additional_special_tokens": more}
    if "tokenizer_class" in config:
        found.setdefault("tokenizer_config.json", json.dumps(config, indent=2).encode())
    if ours:
        found.setdefault("chat_template.jinja", chat_template(tokenizer).encode())
    return found


def chat_template(tokenizer: Any) -> str:
    """The template of chats with control tokens, as Jinja: the tokens are those of `data.chat.encode_chat`."""
    turns = {role: tokenizer.piece(tokenizer.specials[role]) for role in ROLES}
    end = tokenizer.piece(tokenizer.specials["end"])
    # a sentencepiece model puts a space before every text; transformers only before the first
    content = "message['content']"
    if "tokenizer.model" in tokenizer.files:
        content = f"(' ' + {content} if {content} else '')"
    return (
        "{#- jaxllm -#}"  # data.template knows its own by this
        + ("{{ bos_token }}" if "bos" in tokenizer.specials else "")
        + f"{{%- set turns = {json.dumps(turns)} %}}"
        + "{%- for message in messages %}"
        + "{%- if message['role'] not in turns %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
        + f"{{{{- turns[message['role']] + {content} + {json.dumps(end)} }}}}"
        + "{%- endfor %}"
        + "{%- if add_generation_prompt %}{{- turns['assistant'] }}{% endif %}"
    )


def _bytes(tokenizer: Any) -> bytes:
    """The byte tokenizer as a byte-level BPE without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # byte-level BPE spells every byte as a printable character: those that print as themselves, the others from U+0100 on
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)}
    fast = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([tokenizer.piece(i) for i in sorted(tokenizer.specials.values())])
    return fast.to_str().encode()
