"""Talk to any stage's checkpoint.

    python -m experiments.chat --run=runs/quickstart --stage=ppo

/reset forgets the conversation, /temp 0.7 sets the temperature, /quit leaves.
"""

from __future__ import annotations

import sys

import jax

from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.generate.stream import make_streamer


def reply(loaded, stream, messages, key, max_new_tokens, write):
    """Stream one answer to `write`; the whole text. A base model continues the last message as plain text.

    Others see as many of the last turns as the longest conversation that they were trained on.
    """
    messages = messages[-(2 * loaded.meta.get("turns", 1) - 1) :]
    encode, tokenizer = loaded.tokenizer.encode, loaded.tokenizer
    prompt = encode(messages[-1]["content"]) if is_base(loaded) else chat.prompt_ids(tokenizer, messages)
    room = loaded.model.config.max_length - len(prompt)
    if room < 1:
        raise UserError(f"the conversation has {len(prompt)} tokens, the context {loaded.model.config.max_length}: /reset it")
    ids: list[int] = []
    shown = ""
    for token in stream(
        loaded.params["policy"], prompt, key, max_new_tokens=min(max_new_tokens, room), stop=chat.stop_ids(loaded.tokenizer)
    ):
        ids.append(token)
        text = loaded.tokenizer.decode(ids)
        if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
            write(text[len(shown) :])
            shown = text
    return loaded.tokenizer.decode(ids)


def is_base(loaded):
    """Whether the checkpoint has never seen a chat template."""
    return loaded.meta["experiment"] in ("pretrain", "moe", "lstm") and "chat_template.jinja" not in loaded.tokenizer.files


def converse(loaded, lines, write, *, temperature, max_new_tokens, seed):
    """Read user lines, write answers, until the lines end or /quit."""
    stream, messages = make_streamer(loaded.model, temperature=temperature), []
    for turn, line in enumerate(lines):
        line = line.strip()
        if line == "/quit":
            break
        if line == "/reset":
            messages = []
        elif line.startswith("/temp"):
            stream = _new_temperature(loaded, line, write) or stream
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = reply(loaded, stream, messages, jax.random.fold_in(jax.random.key(seed), turn), max_new_tokens, write)
            except UserError as error:
                answer = ""
                write(f"error: {error}")
            messages.append({"role": "assistant", "content": answer})
            write("\n")
        write("> ")


def _new_temperature(loaded, line, write):
    try:
        value = float(line.split()[1])
    except (IndexError, ValueError):
        return write("use /temp 0.7\n")
    return make_streamer(loaded.model, temperature=max(value, 0.0))


def main(run="latest", stage="", temperature=0.7, max_new_tokens=64, seed=0):
    loaded = launch.load(run, stage or None)
    if "policy" not in loaded.params:
        raise UserError(
            f"{loaded.workdir} is a {loaded.meta['experiment']} model: it scores text and cannot talk. Use --stage=sft"
        )
    if (family := loaded.meta["model"]["family"]) not in ("decoder", "lstm"):
        raise UserError(f"{loaded.workdir}: the family {family!r} does not continue text: chat with a decoder or an lstm")
    kind = "base model: continues text, not instruction tuned" if is_base(loaded) else loaded.meta["experiment"]
    print(f"{loaded.workdir} step {loaded.step} ({kind}). /reset, /temp 0.7, /quit")

    def write(text):
        sys.stdout.write(text)
        sys.stdout.flush()

    write("> ")
    converse(loaded, sys.stdin, write, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    write("\n")


if __name__ == "__main__":
    launch.tool(main, "chat", {"run": "latest", "stage": "", "temperature": 0.7, "max_new_tokens": 64, "seed": 0})
