"""Checks of the model itself on the first rows of the data: padding, the cache, precision, adapters."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import teach
from experiments.doctor.capture import Seen
from experiments.doctor.numbers import PAD, apart, nudged, padded, tolerance, unpacked
from experiments.doctor.verdict import Verdict, absent, at_most
from jaxllm import launch
from jaxllm.adapt import lora
from jaxllm.core import ops
from jaxllm.models import families

ROWS, DRIFT = 4, 0.1  # rows looked at, nats a token that bfloat16 may be off in the mean


def model_of(seen: Seen) -> tuple[Any, Any]:
    """(the model without adapters, its parameters a little off their start, so that nothing is zero by initialisation)."""
    model, whole = teach.at("model", seen.fit["model"]), seen.params[seen.root]
    return model, nudged({name: whole[name] for name in model.specs}, 0.05)


def rows_of(seen: Seen) -> dict[str, Any]:
    """The first rows of the data as the model reads them: tokens, segments and what else it takes."""
    columns = seen.fit["columns"]
    while "tokens" not in columns:
        columns = next(x for x in columns.values() if isinstance(x, dict))
    take = lambda x: jnp.asarray(x)[:ROWS]  # noqa: E731
    kept = {n: jax.tree.map(take, x) for n, x in columns.items() if n in ("tokens", "segments", "types", "inputs", "targets")}
    if "segments" not in kept:
        kept["segments"] = (jnp.arange(kept["tokens"].shape[1])[None, :] < take(columns["lengths"])[:, None]).astype(jnp.int32)
    wide = kept["tokens"].shape[-1]
    return {n: x if isinstance(x, dict) else x.reshape(-1, wide)[:ROWS] for n, x in kept.items()}


def hidden(model: Any, params: Any, record: Any) -> jax.Array:
    more = {"types": record["types"]} if "types" in record else {}
    return jax.jit(lambda p, r: ops.forward(model, p, r, **more).hidden)(params, record).astype(jnp.float32)


def left_padding(seen: Seen) -> Verdict:
    name, record = "left padding", rows_of(seen)
    model, params = model_of(seen)
    if model.encode is not None or "types" in record:
        return absent(name, "the rows have inputs of their own beside them")
    if getattr(getattr(model.config, "moe", None), "capacity_factor", None):
        return absent(name, "an expert's capacity depends on the whole batch")
    if record["tokens"].shape[1] + PAD > model.config.max_length:
        record = jax.tree.map(lambda x: x[:, :-PAD], record)
    used = record["segments"] != 0
    one, late = hidden(model, params, record), hidden(model, params, padded(record, left=True))[:, PAD:]
    said = f"hidden states of {len(used)} rows, and with {PAD} empty slots before each"
    do = "positions or masks count padding: take positions from segments"
    return at_most(name, apart(one[used], late[used]), tolerance(model.config), said, do)


def right_padding(seen: Seen) -> Verdict:
    """Of losses that draw random numbers, the hidden states stand for the loss."""
    model, params = model_of(seen)
    record = rows_of(seen)
    used = record["segments"] != 0
    one, wide = hidden(model, params, record), hidden(model, params, padded(record))[:, : used.shape[1]]
    said = f"the loss draws random numbers: hidden states of {len(used)} rows, and with {PAD} empty slots behind each"
    return at_most("padding", apart(one[used], wide[used]), tolerance(model.config), said, "positions or masks count padding")


def packed(seen: Seen, rows: Any) -> Verdict:
    """The same for packed rows: a row's examples follow one another as their segments do, so used places are in one order."""
    model, params = model_of(seen)
    record = {n: x for n, x in rows.items() if n in ("tokens", "segments")}
    alone = jax.tree.map(jnp.asarray, unpacked(record, most=10**6))
    one, other = (hidden(model, params, r)[r["segments"] != 0] for r in (record, alone))
    said = f"hidden states of {len(record['tokens'])} rows, and of their {len(alone['tokens'])} examples one a row"
    do = "examples see each other: pass segments to attention, and let positions restart where they change"
    return at_most("packed = separate", apart(one, other), tolerance(model.config), said, do)


def cache(seen: Seen) -> Verdict:
    name, record = "cache = full", rows_of(seen)
    model, params = model_of(seen)
    context = {} if model.encode is None else {"context": jax.jit(model.encode)(params, record["inputs"])}
    tokens = record["tokens"]
    try:
        empty = model.init_cache(len(tokens), tokens.shape[1])
    except (ValueError, NotImplementedError) as error:
        return absent(name, str(error)[:100])
    if empty is None:
        return absent(name, "the model has no cache")
    first = jnp.cumsum(record["segments"] != record["segments"][:, :1], axis=1) == 0
    most = int(first.sum(axis=1).min())
    if most < 4:
        return absent(name, "the examples are shorter than 4 tokens")
    most, begin = min(most, 32), min(most, 32) // 2
    full = jax.jit(lambda p, t: model.apply(p, t, **context).hidden)(params, tokens[:, :most])
    step = jax.jit(lambda p, t, c: model.apply(p, t, cache=c, **context))
    out = step(params, tokens[:, :begin], empty)
    found = [out.hidden]
    for i in range(begin, most):
        out = step(params, tokens[:, i : i + 1], out.cache)
        found.append(out.hidden)
    said = f"hidden states of {most} tokens at once, and {begin} at once and the others one by one"
    do = "positions or masks of the cached pass are off: compare the first token behind the prompt"
    return at_most(name, apart(full, jnp.concatenate(found, axis=1)), tolerance(model.config), said, do)


def bfloat16(seen: Seen) -> Verdict:
    name, record = "bfloat16 drift", rows_of(seen)
    model, params = model_of(seen)
    if not hasattr(model.config, "dtype"):
        return absent(name, "the model has one precision")
    sides = [families.make(dataclasses.replace(model.config, dtype=dtype)) for dtype in ("float32", "bfloat16")]
    if "targets" not in record or seen.root != "policy":
        off = apart(*(hidden(m, params, record) for m in sides))
        return at_most(name, off, DRIFT, "hidden states, relative", "train in float32, or keep norms and softmax in float32")
    wide, narrow = (jax.jit(lambda p, r, m=m: ops.model_logps(m, p, r).logp)(params, record) for m in sides)
    off = np.abs(np.asarray(wide - narrow))[np.asarray(record["segments"]) != 0]
    said = f"log-probabilities of {off.size} tokens, at most {off.max():.2g} apart"
    return at_most(name, off.mean(), DRIFT, said, "train in float32, or keep norms, softmax and the head in float32")


def merged(seen: Seen) -> Verdict:
    name, settings = "merged = unmerged", seen.config.get("lora", {"rank": 0})
    if not settings["rank"]:
        return absent(name, "no adapters: config.lora.rank is 0")
    given, record = launch.lora_settings(settings.to_dict()), rows_of(seen)
    base, params = seen.fit["model"], nudged(seen.params[seen.root], 0.5)
    model = base if "lora" in base.specs else lora.with_lora(base, **given)  # an adapted one reads plain parameters too
    params = {n: x for n, x in params.items() if n in model.specs}
    plain = lora.merge(params, alpha=given["alpha"], scaling=given["scaling"])
    off = apart(hidden(model, params, record), hidden(base, plain, record))
    said = "hidden states with adapters beside the weights and merged into them"
    return at_most(name, off, tolerance(base.config), said, "merge in float32, with the scaling of the training")


CHECKS = {
    "left padding": left_padding, "cache = full": cache, "bfloat16 drift": bfloat16, "merged = unmerged": merged,
}  # fmt: skip
