"""Talk to any stage's checkpoint.

    python -m experiments.chat --run=runs/quickstart --stage=ppo

/reset forgets the conversation, /temp 0.7 sets the temperature, /save talk.jsonl keeps the conversation, /quit leaves.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax

from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.generate import text
from jaxllm.generate.stream import make_streamer
from jaxllm.report.console import printable
from jaxllm.report.files import read_jsonl

COMMANDS = "/reset, /temp 0.7, /save talk.jsonl, /quit"


def open_run(run, stage):
    """The run's checkpoint, when it is one that continues text."""
    loaded = launch.load(run, stage or None)
    if "policy" not in loaded.params:
        raise UserError(
            f"{loaded.workdir} is a {loaded.meta['experiment']} model: it scores text and cannot talk. Use --stage=sft"
        )
    if (family := loaded.meta["model"]["family"]) not in ("decoder", "lstm"):
        raise UserError(f"{loaded.workdir}: the family {family!r} does not continue text: chat with a decoder or an lstm")
    return loaded


def reply(loaded, stream, messages, key, max_new_tokens, write):
    """Stream one answer to `write`; the whole text. A base model continues the last message as plain text.

    Others see as many of the last turns as the longest conversation that they were trained on.
    """
    prompt = prompt_of(loaded, messages[-(2 * loaded.meta.get("turns", 1) - 1) :])
    if not len(prompt):
        raise UserError("there is no text to continue")
    room = loaded.model.config.max_length - len(prompt)
    if room < 1:
        raise UserError(f"the conversation has {len(prompt)} tokens, the context {loaded.model.config.max_length}: /reset it")
    decode, tail, told = loaded.tokenizer.decode, text.Tail(), ""
    for token in stream(
        loaded.params["policy"], prompt, key, max_new_tokens=min(max_new_tokens, room), stop=chat.stop_ids(loaded.tokenizer)
    ):
        tail, new = text.add(decode, tail, token)
        told += new
        write(new)
    return told + text.rest(decode, tail)


def prompt_of(loaded, messages):
    """The tokens that an answer to a conversation is drawn from; a base model continues the last message."""
    tokenizer = loaded.tokenizer
    return chat.text_ids(tokenizer, messages[-1]["content"]) if is_base(loaded) else chat.prompt_ids(tokenizer, messages)


def is_base(loaded):
    """Whether the checkpoint has never seen a chat template."""
    return loaded.meta["experiment"] in ("pretrain", "moe", "lstm") and "chat_template.jinja" not in loaded.tokenizer.files


def eval_loss(loaded):
    """The last evaluation loss that the run logged up to this checkpoint, None when it logged none."""
    rows = read_jsonl(loaded.workdir / "metrics.jsonl")
    found = [row["eval/loss"] for row in rows if row.get("step", 0) <= loaded.step and "eval/loss" in row]
    return found[-1] if found else None


def about(loaded):
    """One line: which checkpoint this is, its evaluation loss, and what kind of model."""
    loss = eval_loss(loaded)
    kind = "base model: continues text; not instruction tuned" if is_base(loaded) else loaded.meta["experiment"]
    measured = "" if loss is None else f", eval loss {loss:.3f}"
    return f"{loaded.workdir} step {loaded.step}{measured} ({kind})"


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
        elif line.startswith("/save"):
            write(_save(messages, line.removeprefix("/save").strip()))
        elif line.startswith("/"):
            write(f"unknown command {line.split()[0]}: use {COMMANDS}\n")
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                answer = reply(loaded, stream, messages, jax.random.fold_in(jax.random.key(seed), turn), max_new_tokens, write)
                messages.append({"role": "assistant", "content": answer})
            except UserError as error:
                messages.pop()  # it was not answered, and would stand in the way of what is asked next
                write(f"error: {error}")
            write("\n")
        write("> ")


def _new_temperature(loaded, line, write):
    try:
        value = float(line.split()[1])
    except (IndexError, ValueError):
        value = -1.0
    return make_streamer(loaded.model, temperature=value) if 0 <= value < 100 else write("use /temp 0.7\n")


def _save(messages, name):
    """The conversation as a row of SFT data in a new file; the line to say."""
    if not name or not messages:
        return "use /save talk.jsonl\n" if messages else "nothing has been said yet\n"
    try:
        with open(Path(os.path.expanduser(name)), "x", encoding="utf-8") as file:
            file.write(json.dumps({"messages": messages}) + "\n")
    except FileExistsError:
        return f"{name} is there already: choose another name\n"
    except OSError as error:
        return f"{name} cannot be written ({error.strerror}): choose another name\n"
    return f"{len(messages)} messages in {name}: python -m experiments.sft can train on it\n"


def main(run="latest", stage="", temperature=0.7, max_new_tokens=64, seed=0):
    loaded = open_run(run, stage)
    print(f"{about(loaded)}. {COMMANDS}")

    def write(text):
        sys.stdout.write(printable(text))  # a model does not steer the terminal
        sys.stdout.flush()

    getattr(sys.stdin, "reconfigure", dict)(errors="replace")  # what is not UTF-8 is no reason to end
    write("> ")
    converse(loaded, sys.stdin, write, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed)
    write("\n")


if __name__ == "__main__":
    launch.tool(main, "chat", {"run": "latest", "stage": "", "temperature": 0.7, "max_new_tokens": 64, "seed": 0})
