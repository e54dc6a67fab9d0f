"""jaxllm's models for lm-eval (EleutherAI's language model evaluation harness): log-likelihoods and completions of tokens.

Batches have few shapes: lengths are padded to powers of two, and the last batch of a length with empty rows.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from experiments import chat as chatting
from experiments.serve.ask import Asked
from experiments.serve.desk import Desk, close
from experiments.serve.follow import follow
from experiments.serve.worker import work
from jaxllm.core import ops
from jaxllm.core.types import Model, Params, UserError
from jaxllm.data import chat
from jaxllm.generate.sampling import warp
from jaxllm.generate.slots import buckets

SETTINGS = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@register_model("jaxllm")
class JaxLM(TemplateLM):
    """A run's checkpoint as lm-eval's model. A conversation's template is not applied: text is continued as text."""

    def __init__(self, run: str | Any = "latest", stage: str = "", batch_size: int = 16, slots: int = 8, **_: Any):
        super().__init__()
        self.loaded = chatting.open_run(run, stage) if isinstance(run, str) else run
        self.batch_size, self.slots, self.length = int(batch_size), int(slots), self.loaded.model.config.max_length
        self.score = jax.jit(partial(score, self.loaded.model))

    @property
    def eot_token_id(self) -> int:
        return self.loaded.tokenizer.specials["eos"]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: how documents begin, where the tokenizer has a token for it."""
        return self.loaded.tokenizer.specials.get("bos", self.eot_token_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, a bos before it unless add_special_tokens is False; what it spells like a special is plain text."""
        if add_special_tokens is False:
            return [int(i) for i in self.loaded.tokenizer.encode(string)]
        return chat.text_ids(self.loaded.tokenizer, string).tolist()

    def _loglikelihood_tokens(self, requests: Iterable, disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        rows = [(list(context), list(continuation)) for _, context, continuation in requests]
        return [(float(logp), bool(greedy)) for logp, greedy in scores(self, rows)]

    def loglikelihood_rolling(self, requests: Iterable, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each in windows of the context's length that predict every token once."""
        rows, owner, requests = [], [], list(requests)
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.length, 1)
            rows += [tuple(map(list, make_disjoint_window(pair))) for pair in windows]
            owner += [i] * (len(rows) - len(owner))
        totals = np.zeros(len(requests))
        np.add.at(totals, owner, [logp for logp, _ in scores(self, rows)])
        return totals.tolist()

    def generate_until(self, requests: Iterable, disable_tqdm: bool = False) -> list[str]:
        """Completions up to a text of `until`, by the server's worker."""
        desk, ready = Desk(most=2**30), threading.Event()
        worker = threading.Thread(target=work, args=(desk, self.loaded, self.slots, ready), daemon=True)
        asked = [self._asked(*request.args) for request in requests]
        worker.start()
        try:
            with ThreadPoolExecutor(self.slots) as pool:
                return list(pool.map(lambda a: _text(desk, a, self.loaded.tokenizer, worker), asked))
        finally:
            close(desk)
            worker.join(10)

    def _asked(self, context: str, settings: dict[str, Any]) -> Asked:
        """A request with lm-eval's settings; the context loses its beginning where it is too long."""
        if unknown := [name for name, value in settings.items() if name not in SETTINGS and value is not None]:
            raise UserError(f"generation_kwargs.{unknown[0]} is not offered: use {', '.join(SETTINGS)}")
        stops = settings.get("until") or []
        limit = min(int(settings.get("max_gen_toks", 256)), self.length // 2)
        ids = self.tok_encode(context)[-(self.length - limit) :] or [self.prefix_token_id]
        # the harness samples only where do_sample says so, or a temperature stands alone
        temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
        return Asked(
            [tuple(ids)], False, 1, limit, temperature, int(settings.get("top_k") or 0), float(settings.get("top_p") or 1.0), 0,
            tuple([stops] if isinstance(stops, str) else stops), None, False, False,
        )  # fmt: skip


def _text(desk: Desk, asked: Asked, tokenizer: Any, worker: threading.Thread) -> str:
    with follow(desk, asked, tokenizer, worker.is_alive) as pieces:
        return "".join(piece.text for piece in pieces)


def score(model: Model, params: Params, record: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(sum of the log-probabilities of a record's masked targets, whether each is the most likely token), both [b]."""
    hidden, head = ops.forward(model, params, record).hidden, model.head(params)
    logp = ops.token_logp(head, hidden, record["targets"]).logp
    best = ops.token_logp(head, hidden, record["targets"], transform=partial(warp, temperature=0.0)).logp
    return jnp.sum(jnp.where(record["mask"], logp, 0), axis=1), jnp.all((best > -1) | ~record["mask"], axis=1)


def scores(lm: JaxLM, rows: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """(log-likelihood, is greedy) of each (context, continuation), in the order given; contexts lose their beginning where
    they are too long. UserError when a continuation alone is."""
    found: list[Any] = [None] * len(rows)
    sizes: dict[int, list[int]] = {}
    for i, (context, continuation) in enumerate(rows):
        if not continuation or len(continuation) > lm.length:
            raise UserError(f"continuation {i + 1} has {len(continuation)} tokens: the model scores 1 to {lm.length}")
        n = min(len(context) + len(continuation) - 1, lm.length)
        sizes.setdefault(next(size for size in buckets(lm.length) if size >= n), []).append(i)
    for size, members in sizes.items():
        for start in range(0, len(members), lm.batch_size):
            part = members[start : start + lm.batch_size]
            out = lm.score(lm.loaded.params["policy"], batch([rows[i] for i in part], lm.batch_size, size))
            for i, logp, greedy in zip(part, *(np.asarray(x).tolist() for x in out), strict=False):
                found[i] = logp, greedy
    return found


def batch(rows: list[tuple[list[int], list[int]]], b: int, length: int) -> dict[str, np.ndarray]:
    """A sequence record [b, length] of (context, continuation), the mask on continuations; rows that are missing are empty."""
    columns = {name: np.zeros((b, length), np.int32) for name in ("tokens", "targets", "segments")}
    mask = np.zeros((b, length), bool)
    for i, (context, continuation) in enumerate(rows):
        ids = (context + continuation)[-(length + 1) :]
        n = len(ids) - 1
        columns["tokens"][i, :n], columns["targets"][i, :n], columns["segments"][i, :n] = ids[:-1], ids[1:], 1
        mask[i, n - len(continuation) : n] = True
    return {**columns, "mask": mask}
