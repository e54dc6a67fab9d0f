"""What serving, chat and evaluation are compared with: one completion by `decode.generate`, the log-likelihood of one row."""

from functools import cache, partial

import jax
import numpy as np

from jaxllm.core import ops
from jaxllm.data import chat
from jaxllm.generate import decode
from jaxllm.models import families
from tests.models.tiny import fast_jit


@cache
def _generate(config, limit, stop, how):
    run = partial(decode.generate, families.make(config), max_new_tokens=limit, stop=stop, **{"temperature": 0.0, **dict(how)})
    return fast_jit(lambda params, prompt, n, key, row: run(params, prompt, n, key, row_offset=row))


def generated(loaded, prompt, limit=8, *, seed=0, row=0, **how):
    """(text, token ids) of row `row` of a batch of one prompt, greedy unless `how` says otherwise."""
    n = len(prompt)
    padded = np.zeros((1, loaded.model.config.max_length), np.int32)
    padded[0, :n] = prompt
    run = _generate(loaded.model.config, limit, chat.stop_ids(loaded.tokenizer), tuple(sorted(how.items())))
    s = run(loaded.params["policy"], padded, np.array([n], np.int32), jax.random.key(seed), row)
    ids = np.asarray(s.tokens)[0, n : int(s.lengths[0]) - int(s.stopped[0])].tolist()
    return loaded.tokenizer.decode(ids), ids


@cache
def _scored(config):
    model = families.make(config)

    def run(params, record):
        hidden = ops.forward(model, params, record).hidden
        best = ops.logits(model.head(params), hidden).argmax(-1)
        return ops.model_logps(model, params, record).logp[0], best[0]

    return fast_jit(run)


def scored(loaded, context, continuation):
    """The log-probabilities of token ids behind others, and whether each is the most likely one."""
    ids = np.array([*context, *continuation])
    n = len(ids) - 1
    record = {name: np.zeros((1, loaded.model.config.max_length + 1), np.int32) for name in ("tokens", "targets", "segments")}
    record["tokens"][0, :n], record["targets"][0, :n], record["segments"][0, :n] = ids[:-1], ids[1:], 1
    logps, best = (np.asarray(x) for x in _scored(loaded.model.config)(loaded.params["policy"], record))
    said = slice(len(context) - 1, n)
    return logps[said], best[said] == ids[1:][said]
