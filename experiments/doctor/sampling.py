"""The check of the sampler: what it says of its tokens is what the trainer says."""

from __future__ import annotations

import jax
import numpy as np

from experiments import completions
from experiments.doctor.capture import Sampled, Seen
from experiments.doctor.models import rows_of
from experiments.doctor.verdict import Verdict, absent, at_most
from experiments.grpo import nucleus
from jaxllm.core import ops
from jaxllm.train import gates

NEW = 12  # tokens drawn where the experiment draws none


def drawn(seen: Seen) -> Sampled | None:
    """What the experiment has drawn itself, at a temperature, or else a few tokens behind the data's own beginnings."""
    mine = [s for s in seen.samplers if s.first and s.options.get("temperature", 1.0) > 0 and not s.options.get("int8")]
    if mine:
        return mine[0]
    model, params = seen.fit["model"], seen.params[seen.root]
    if model.encode is not None or type(model.config).__name__ not in ("DecoderConfig", "LSTMConfig") or seen.root != "policy":
        return None
    tokens = np.asarray(rows_of(seen)["tokens"])[:, :8]
    options = {"max_new_tokens": NEW, "temperature": 0.8}
    sample = completions.sampler(model, seen.fit["tokenizer"], **options)
    prompts = {"tokens": tokens, "lengths": np.full(len(tokens), tokens.shape[1], np.int32)}
    plain = {n: params[n] for n in model.specs}
    record = sample(plain, prompts, jax.random.key(0), 0)[1]
    return Sampled(model, seen.fit["tokenizer"], options, {"params": plain, "record": record})


def sampler(seen: Seen) -> Verdict:
    name, one = "sampler = trainer", drawn(seen)
    if one is None:
        return absent(name, "nothing is sampled from this model")
    heat, transform = one.options.get("temperature", 1.0), nucleus(one.options.get("top_p", 1.0))
    params, record = one.first["params"], jax.device_get(one.first["record"])
    logps = jax.jit(lambda p, r: ops.model_logps(one.model, p, r, None, heat, transform).logp)(params, record)
    off = np.abs(record["logps"] - np.asarray(logps))[record["mask"]]
    said = f"log-probabilities of {off.size} sampled tokens at temperature {heat:g}, at most {off.max(initial=0):.2g} apart"
    do = "another temperature or top-p in the loss, other weights, or positions that are off in the cache"
    limit = gates.TOLERANCE[getattr(one.model.config, "dtype", "float32")]
    found = at_most(name, off.mean() if off.size else np.nan, limit, said, do)
    return found._replace(ok=found.ok and bool(off.max(initial=0) <= 20 * limit))  # as the gate of a run: one token may be it


CHECKS = {"sampler = trainer": sampler}
