"""OpenAI's JSON: whole answers, chunks of a stream, log-probabilities, errors."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from experiments.serve.ask import Asked
from experiments.serve.desk import Told
from experiments.serve.fields import Refused
from experiments.serve.follow import Piece


def error(refused: Refused) -> dict[str, Any]:
    """The body of an error."""
    about = {"message": str(refused), "type": refused.type, "param": refused.param, "code": refused.code}
    return {"error": about}


def head(asked: Asked, name: str, *, streamed: bool) -> dict[str, Any]:
    """What a whole answer and every chunk of a stream begin with."""
    kind = ("chat.completion.chunk" if streamed else "chat.completion") if asked.chat else "text_completion"
    made = {"id": f"{'chatcmpl' if asked.chat else 'cmpl'}-{secrets.token_hex(12)}", "object": kind}
    return {**made, "created": int(time.time()), "model": name}


def usage(asked: Asked, completion: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of the completions, without the ones that ended them."""
    prompt = sum(map(len, asked.prompts))
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def whole(asked: Asked, name: str, pieces: Iterable[Piece], tokenizer: Any) -> dict[str, Any]:
    """The answer to a request that is not streamed."""
    texts, told, ends = {}, {}, {}
    for piece in pieces:
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        told.setdefault(piece.index, []).extend(piece.tokens)
        ends[piece.index] = piece.finish
    choices = []
    for i in sorted(texts):
        said = {"message": {"role": "assistant", "content": texts[i], "refusal": None}} if asked.chat else {"text": texts[i]}
        choices.append({"index": i, **said, "logprobs": logprobs(asked, told[i], tokenizer), "finish_reason": ends[i]})
    return {**head(asked, name, streamed=False), "choices": choices, "usage": usage(asked, sum(map(len, told.values())))}


def chunks(asked: Asked, name: str, pieces: Iterable[Piece], tokenizer: Any) -> Iterable[dict[str, Any]]:
    """The chunks of a stream: in a chat the role of each choice, then text as it comes, at the end the usage if asked for."""
    same, count, places = head(asked, name, streamed=True), 0, {}
    more = {"usage": None} if asked.usage else {}
    for i in range(asked.n if asked.chat else 0):
        delta = {"role": "assistant", "content": ""}
        yield {**same, "choices": [{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}], **more}
    for piece in pieces:
        count += len(piece.tokens)
        place = places.get(piece.index, 0)
        places[piece.index] = place + sum(len(tokenizer.piece(told.token)) for told in piece.tokens)
        found = logprobs(asked, piece.tokens, tokenizer, place) if piece.tokens else None
        # how it ended is told behind the last text: clients leave there
        said = [(piece.text, found, None)] if piece.text or found else []
        for text, found, finish in [*said, *([("", None, piece.finish)] if piece.finish else [])]:
            what = {"delta": {"content": text} if text else {}} if asked.chat else {"text": text}
            choice = {"index": piece.index, **what, "logprobs": found, "finish_reason": finish}
            yield {**same, "choices": [choice], **more}
    if asked.usage:
        yield {**same, "choices": [], "usage": usage(asked, count)}


def logprobs(asked: Asked, told: Iterable[Told], tokenizer: Any, place: int = 0) -> dict[str, Any] | None:
    """Log-probabilities under the model, before temperature, top-k and top-p; None unless asked for."""
    if asked.tops is None:
        return None
    rows = [(tokenizer.piece(t.token), t.logp, [(tokenizer.piece(i), p) for i, p in t.tops[: asked.tops]]) for t in told]
    if asked.chat:
        one = lambda piece, p: {"token": piece, "logprob": p, "bytes": None}  # noqa: E731
        content = [{**one(piece, p), "top_logprobs": [one(*x) for x in tops]} for piece, p, tops in rows]
        return {"content": content, "refusal": None}
    offsets = [place]
    for piece, _, _ in rows:
        offsets.append(offsets[-1] + len(piece))
    return {
        "tokens": [piece for piece, _, _ in rows], "token_logprobs": [p for _, p, _ in rows],
        "top_logprobs": [dict(tops) for _, _, tops in rows], "text_offset": offsets[:-1],
    }  # fmt: skip
