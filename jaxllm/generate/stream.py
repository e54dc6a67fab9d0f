"""Token by token generation for people who wait: the host sees each token as it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core import ops
from jaxllm.core.types import Key, Model, Params
from jaxllm.generate.sampling import choose

BUCKET = 64  # prompts and caches are padded to multiples of this, so that a conversation compiles few programs


def make_streamer(model: Model, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Callable[..., Iterator[int]]:
    """stream(params, prompt ids, key, *, max_new_tokens, stop) -> an iterator of token ids, the stop token left out.

    Same draws as `decode.generate` on a batch of one: the key is folded with the row 0 and then with the position.
    """

    @partial(jax.jit, static_argnames="length")
    def prefill(params: Params, tokens: jax.Array, n: jax.Array, key: Key, length: int):
        real = (jnp.arange(tokens.shape[1]) < n)[None, :].astype(jnp.int32)
        out = model.apply(params, tokens, segments=real, cache=model.init_cache(1, length))
        hidden = jax.lax.dynamic_index_in_dim(out.hidden[0], n - 1, keepdims=False)
        return _draw(params, hidden, key, n), out.cache

    @partial(jax.jit, donate_argnums=2)
    def step(params: Params, token: jax.Array, cache: Any, key: Key, n: jax.Array):
        out = model.apply(params, token[None, None], cache=cache)
        return _draw(params, out.hidden[0, 0], key, n), out.cache

    def _draw(params: Params, hidden: jax.Array, key: Key, n: jax.Array) -> jax.Array:
        keys = jax.random.fold_in(jax.random.fold_in(key, 0), n)[None]
        logits = ops.logits(model.head(params), hidden)[None]
        return choose(keys, logits, temperature=temperature, top_k=top_k, top_p=top_p)[0][0]

    def stream(params: Params, prompt: Any, key: Key, *, max_new_tokens: int, stop: tuple[int, ...] = ()) -> Iterator[int]:
        n = len(prompt)
        padded = -(-n // BUCKET) * BUCKET
        tokens = np.zeros((1, padded), np.int32)
        tokens[0, :n] = prompt
        token, cache = prefill(params, tokens, jnp.int32(n), key, length=padded + -(-max_new_tokens // BUCKET) * BUCKET)
        for i in range(max_new_tokens):
            if (drawn := int(token)) in stop:
                return
            yield drawn
            if i + 1 < max_new_tokens:
                token, cache = step(params, token, cache, key, jnp.int32(n + i + 1))

    return stream
