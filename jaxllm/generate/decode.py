"""Generation: prefill and decoding in one compiled loop that stops when every row has stopped."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from jaxllm.core import ops
from jaxllm.core.spec import unstack
from jaxllm.core.types import Key, Model, Params
from jaxllm.generate.sampling import choose


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
    stop: tuple[int, ...] = (), temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, group: int = 1,
    row_offset: int = 0, inputs: Any = None, cache_dtype: Any = None,
) -> Samples:  # fmt: skip
    """Complete right-padded prompts int [b, p] of prompt_lengths [b] by up to max_new_tokens; jit it with the rest bound.

    Samples have b * group rows: `group` completions of each prompt as neighbours, from one prefill. Row i draws from
    fold_in(key, row_offset + i) folded with the position, so a row's sample does not depend on the batch that it stands in.
    temperature 0 is greedy. The loop ends early when every row has drawn a token of `stop`. inputs [b, ...]: what the model
    reads first, if it does (T5: the source, with prompts of one start token; Flamingo: images); it is read once. cache_dtype:
    of the cache, where it is not that of activations.
    """
    context = {} if model.encode is None else {"context": model.encode(params, inputs)}
    params = unstack(params)
    cache, hidden = prefill(model, params, prompts, prompt_lengths, prompts.shape[1] + max_new_tokens, cache_dtype, **context)
    prompts, prompt_lengths, cache, hidden = repeat_rows((prompts, prompt_lengths, cache, hidden), group)
    b = prompts.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(b) + row_offset)
    head = model.head(params)

    def draw_next(i: jax.Array, drawn: Drawn, hidden: jax.Array) -> Drawn:
        """Draw token i of every row that goes on; a row that has stopped draws too, and nothing of it is kept."""
        step_keys = jax.vmap(jax.random.fold_in)(keys, prompt_lengths + i)
        token, logp, model_logp = choose(step_keys, ops.logits(head, hidden), temperature=temperature, top_k=top_k, top_p=top_p)
        hit = jnp.isin(token, jnp.asarray(stop, jnp.int32)) if stop else jnp.zeros(b, bool)
        return Drawn(
            drawn.tokens.at[i].set(token), drawn.logps.at[i].set(logp), drawn.model_logps.at[i].set(model_logp),
            drawn.count + ~drawn.stopped, drawn.stopped | hit,
        )  # fmt: skip

    def body(carry):
        i, drawn, cache = carry
        # every row's cache advances, stopped rows too: their slots are never read again
        out = model.apply(params, drawn.tokens[i - 1][:, None], cache=cache)
        return i + 1, draw_next(i, drawn, out.hidden[:, 0]), out.cache

    carry = (jnp.int32(1), draw_next(jnp.int32(0), nothing(max_new_tokens, b), hidden), cache)
    carry = jax.lax.while_loop(lambda c: (c[0] < max_new_tokens) & ~jnp.all(c[1].stopped), body, carry)
    return place(prompts, prompt_lengths, carry[1])


def prefill(
    model: Model, params: Params, prompts: jax.Array, lengths: jax.Array, slots: int, cache_dtype: Any = None, **context: Any
) -> tuple[Any, jax.Array]:
    """(a cache of `slots` positions that has read the prompts [b, p], hidden [b, d] at the last token of each)."""
    cache = model.init_cache(prompts.shape[0], slots, *(() if cache_dtype is None else (cache_dtype,)))
    real = jnp.arange(prompts.shape[1])[None, :] < lengths[:, None]
    out = model.apply(params, prompts, segments=real.astype(jnp.int32), cache=cache, **context)
    return out.cache, jnp.take_along_axis(out.hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


def repeat_rows(tree: Any, group: int) -> Any:
    """Every row of every leaf `group` times, as neighbours: whatever a family keeps in its cache has a row for each prompt."""
    return tree if group == 1 else jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), tree)


def over_data(sample: Callable[..., Any], mesh: Mesh, group: int = 1) -> Callable[..., Any]:
    """sample(params, prompts, lengths, key, row_offset) with the rows split over the mesh axis `data`, params replicated.

    Each part decodes on its own until its own rows have stopped: no collective at every token, and the same tokens as
    on one device. On a CPU of two cores this is how both are used: one simulated device a core, mesh data = 2.
    group above 1: sample is called with `group=` too, and makes so many rows of a prompt; row_offset counts rows. Where the
    prompts do not divide over the devices, their groups are.
    ValueError when another axis is above 1: XLA aborts on a loop that is mapped over some of the axes only (jax 0.10).
    """
    if mesh.size != mesh.shape["data"]:
        raise ValueError(f"over_data needs a mesh with `data` alone above 1, not {dict(mesh.shape)}")
    rows, whole = PartitionSpec("data"), PartitionSpec()

    def split(params: Params, prompts: jax.Array, lengths: jax.Array, key: Key, row_offset: jax.Array) -> Any:
        again = math.gcd(group, mesh.size // math.gcd(prompts.shape[0], mesh.size))
        each = group // again

        def part(params: Params, prompts: jax.Array, lengths: jax.Array, key: Key, row_offset: jax.Array) -> Any:
            offset = row_offset + jax.lax.axis_index("data") * prompts.shape[0] * each
            return sample(params, prompts, lengths, key, offset, **({} if group == 1 else {"group": each}))

        mapped = jax.shard_map(part, mesh=mesh, in_specs=(whole, rows, rows, whole, whole), out_specs=rows, check_vma=False)
        return mapped(params, *repeat_rows((prompts, lengths), again), key, row_offset)

    return split


@struct.dataclass
class Drawn:
    """What the loop has drawn: tokens, logps, model_logps [n, b] by step; count int [b] of them that are kept; stopped [b]."""

    tokens: jax.Array
    logps: jax.Array
    model_logps: jax.Array
    count: jax.Array
    stopped: jax.Array

    def put(self, at: jax.Array, rows: jax.Array, found: tuple[jax.Array, ...], hit: jax.Array) -> Drawn:
        """With step at[j] of row rows[j] (at most b - 1, or nothing happens) found, all [m]; hit: a stop token."""
        kept = self.tokens, self.logps, self.model_logps
        put = (x.at[at, rows].set(new, mode="drop") for x, new in zip(kept, found, strict=True))
        return Drawn(*put, self.count.at[rows].add(1, mode="drop"), self.stopped.at[rows].set(hit, mode="drop"))


def nothing(n: int, b: int) -> Drawn:
    """Room for n tokens of b rows."""
    empty = jnp.zeros((n, b))
    return Drawn(empty.astype(jnp.int32), empty, empty, jnp.zeros(b, jnp.int32), jnp.zeros(b, bool))


def place(prompts: jax.Array, prompt_lengths: jax.Array, drawn: Drawn) -> Samples:
    """Completions behind their prompts: position t of a row holds what was drawn at step t - prompt_length."""
    n, p = drawn.tokens.shape[0], prompts.shape[1]
    step = jnp.arange(p + n)[None, :] - prompt_lengths[:, None]
    mask = (step >= 0) & (step < drawn.count[:, None])

    def behind(x: jax.Array) -> jax.Array:
        return jnp.where(mask, jnp.take_along_axis(x.T, jnp.clip(step, 0, n - 1), axis=1), 0)

    tokens = jnp.where(step < 0, jnp.pad(prompts, ((0, 0), (0, n))), behind(drawn.tokens))
    return Samples(
        tokens=tokens.astype(jnp.int32), prompt_lengths=prompt_lengths, lengths=prompt_lengths + drawn.count, mask=mask,
        logps=behind(drawn.logps), model_logps=behind(drawn.model_logps), stopped=drawn.stopped,
    )  # fmt: skip


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
