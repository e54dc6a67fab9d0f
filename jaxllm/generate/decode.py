"""Generation: prefill and decoding in one compiled loop that stops when every row has stopped."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core import ops
from jaxllm.core.types import Key, Model, Params
from jaxllm.generate.sampling import draw, warp


@struct.dataclass
class Samples:
    """Prompts and their completions in one right-padded buffer.

    tokens int [b, p + n]; prompt_lengths, lengths int [b] (prompt, and prompt with completion); mask bool [b, p + n]: True on
    sampled tokens, the stop token included; logps and model_logps [b, p + n] at sampled tokens (0 elsewhere): under the
    sampling distribution (temperature, top-k and top-p renormalised) and under the model itself; stopped bool [b].
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    mask: jax.Array
    logps: jax.Array
    model_logps: jax.Array
    stopped: jax.Array


def generate(
    model: Model, params: Params, prompts: jax.Array, prompt_lengths: jax.Array, key: Key, *, max_new_tokens: int,
    stop: tuple[int, ...] = (), temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, row_offset: int = 0,
) -> Samples:  # fmt: skip
    """Complete right-padded prompts int [b, p] of prompt_lengths [b] by up to max_new_tokens; jit it with the rest bound.

    Row i draws from fold_in(key, row_offset + i) folded with the position, so a row's sample does not depend on the batch
    that it stands in. temperature 0 is greedy. The loop ends early when every row has drawn a token of `stop`.
    """
    b, p = prompts.shape
    rows = jnp.arange(b)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(rows + row_offset)
    warping = dict(temperature=temperature, top_k=top_k, top_p=top_p)
    real = jnp.arange(p)[None, :] < prompt_lengths[:, None]
    out = model.apply(params, prompts, segments=real.astype(jnp.int32), cache=model.init_cache(b, p + max_new_tokens))
    hidden = jnp.take_along_axis(out.hidden, (prompt_lengths - 1)[:, None, None], axis=1)[:, 0]
    empty = jnp.zeros((b, p + max_new_tokens))
    start = Samples(
        tokens=jnp.pad(jnp.where(real, prompts, 0), ((0, 0), (0, max_new_tokens))).astype(jnp.int32),
        prompt_lengths=prompt_lengths, lengths=prompt_lengths, mask=empty.astype(bool), logps=empty,
        model_logps=empty, stopped=jnp.zeros(b, bool),
    )  # fmt: skip
    head = model.head(params)

    def draw_next(s: Samples, hidden: jax.Array) -> tuple[Samples, jax.Array]:
        logits = ops.logits(head, hidden)
        warped = warp(logits, **warping)
        if temperature == 0:  # nothing to draw, and drawing takes a fifth of the time
            token = jnp.argmax(warped, axis=-1).astype(jnp.int32)
        else:
            token = draw(jax.vmap(jax.random.fold_in)(keys, s.lengths), warped)
        going = ~s.stopped
        at = (rows, jnp.where(going, s.lengths, p + max_new_tokens))  # a stopped row writes past the end: dropped
        logp, model_logp = (jnp.take_along_axis(jax.nn.log_softmax(x), token[:, None], axis=1)[:, 0] for x in (warped, logits))
        hit = jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros(b, bool)
        s = s.replace(
            tokens=s.tokens.at[at].set(token, mode="drop"), mask=s.mask.at[at].set(True, mode="drop"),
            logps=s.logps.at[at].set(logp, mode="drop"), model_logps=s.model_logps.at[at].set(model_logp, mode="drop"),
            lengths=s.lengths + going, stopped=s.stopped | hit,
        )  # fmt: skip
        return s, token

    def body(carry):
        i, s, cache, token = carry
        # every row's cache advances, stopped rows too: their slots are never read again
        out = model.apply(params, token[:, None], cache=cache)
        s, token = draw_next(s, out.hidden[:, 0])
        return i + 1, s, out.cache, token

    s, token = draw_next(start, hidden)
    carry = (jnp.int32(1), s, out.cache, token)
    carry = jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & ~jnp.all(c[1].stopped), body, carry)
    return carry[1]


def to_record(s: Samples) -> dict[str, jax.Array]:
    """Samples as a sequence record: targets follow tokens by one, and mask, logps and model_logps are aligned with targets."""

    def ahead(x: jax.Array) -> jax.Array:
        return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

    index = jnp.arange(s.tokens.shape[1])[None, :]
    # the last token is only ever a target: reading it would predict beyond the sequence
    segments = (index < (s.lengths - 1)[:, None]).astype(jnp.int32)
    return {
        "tokens": jnp.where(segments != 0, s.tokens, 0), "targets": jnp.where(segments != 0, ahead(s.tokens), 0),
        "segments": segments, "mask": ahead(s.mask), "logps": ahead(s.logps), "model_logps": ahead(s.model_logps),
    }  # fmt: skip
