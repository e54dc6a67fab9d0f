"""One tiny model and a batch for every objective, for the tests of the train step."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from jaxllm.core.ops import model_logps
from jaxllm.losses import lm, policy, preference, reward
from jaxllm.models import decoder, heads
from jaxllm.models.decoder import DecoderConfig
from tests.models.tiny import documents, record, weights

ROWS, LENGTH = 8, 12
MODEL = decoder.make(
    DecoderConfig(
        vocab_size=50,
        max_length=16,
        d_model=16,
        n_layers=1,
        n_heads=4,
        n_kv_heads=2,
        d_ff=32,
        tied=False,
        unroll=True,
    )
)
SCALAR = heads.with_scalar_head(MODEL)


def scalars(params, batch):
    return heads.scalars(SCALAR, params, batch)


def ragged(seed=0, rows=ROWS):
    """A sequence record whose rows have very different numbers of trained tokens, none among them."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, LENGTH + 2, rows)
    lengths[:2] = 3, LENGTH + 1
    out = record([[d] for d in documents(lengths, seed)], LENGTH)
    out["mask"] &= rng.random((rows, LENGTH)) < 0.6
    out["mask"][3] = False
    return out


def columns(seed, *shape):
    return 0.5 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def lm_batch():
    return ragged()


def pair_batch():
    sides = {"chosen": ragged(1), "rejected": ragged(2)}
    return sides | {"ref_chosen_logps": -10 + columns(3, ROWS), "ref_rejected_logps": -10 + columns(4, ROWS)}


def ppo_batch():
    batch = ragged(5)
    names = ("values_old", "advantages", "returns")
    old = np.asarray(model_logps(MODEL, weights(MODEL.specs, 9), batch).logp)
    return batch | {"logps_old": old} | {n: columns(i, ROWS, LENGTH) for i, n in enumerate(names)}


def group_batch(normalise):
    batch = ppo_batch()
    return batch | {"ref_logps": batch["logps_old"] + columns(11, ROWS, LENGTH), "weights": np.asarray(normalise(batch["mask"]))}


def ptx_batch():
    batch, text = ppo_batch(), ragged(7)
    return batch | {"ptx": text | {"weights": np.asarray(policy.spread(text["mask"], batch["mask"].sum()))}}


# name: (loss, the trees of specs of its roots, its batch)
OBJECTIVES = {
    "lm": (lm.loss(MODEL, chunk=16), {"policy": MODEL.specs}, lm_batch),
    "reward": (reward.loss(scalars, center=0.01), {"reward": SCALAR.specs}, pair_batch),
    "dpo": (
        preference.loss(MODEL, preference.dpo, beta=0.1, nll_weight=0.2, chunk=32),
        {"policy": MODEL.specs},
        pair_batch,
    ),
    "ppo": (
        policy.loss(MODEL, scalars, clip=0.2, value_clip=0.2, value_coef=0.1, chunk=16),
        {"policy": MODEL.specs, "value": SCALAR.specs},
        ppo_batch,
    ),
    "ppo_ptx": (
        policy.with_ptx(policy.loss(MODEL, scalars, clip=0.2, value_clip=0.2, value_coef=0.1), MODEL, ptx_coef=0.5, chunk=16),
        {"policy": MODEL.specs, "value": SCALAR.specs},
        ptx_batch,
    ),
    "grpo": (
        policy.group_loss(MODEL, partial(policy.clipped, low=0.2, high=0.28), kl=policy.k3, kl_coef=0.1, chunk=16),
        {"policy": MODEL.specs},
        partial(group_batch, policy.sequence_mean),
    ),
    "gspo": (
        policy.group_loss(MODEL, partial(policy.gspo, low=0.1, high=0.2)),
        {"policy": MODEL.specs},
        partial(group_batch, policy.token_mean),
    ),
}  # fmt: skip


def setup(name):
    """(loss_fn, specs, params, batch)."""
    loss_fn, specs, batch = OBJECTIVES[name]
    return loss_fn, specs, weights(specs), {k: v for k, v in batch().items()}


def on_device(tree):
    return {k: on_device(v) if isinstance(v, dict) else jnp.asarray(v) for k, v in tree.items()}
