"""The yardstick: a plain JAX train step of the same mathematics, in the manner of nanoGPT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from benchmarks import shape as given
from benchmarks.shape import Shape

LAYER = ("norm1", "qkv", "out", "norm2", "up", "down")


def make_params(shape: Shape) -> dict:
    """The given weights with one dict per layer."""
    w = {name: jnp.array(x) for name, x in given.weights(shape).items()}
    blocks = [{name: w[name][i] for name in w if name.startswith(LAYER)} for i in range(shape.layers)]
    return {"blocks": blocks, **{name: w[name] for name in ("wte", "wpe", "norm_scale", "norm_bias")}}


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def attention(p: dict, x: jax.Array, heads: int) -> jax.Array:
    b, t, d = x.shape
    q, k, v = jnp.split(x @ p["qkv_kernel"] + p["qkv_bias"], 3, axis=-1)
    q, k, v = (a.reshape(b, t, heads, d // heads).transpose(0, 2, 1, 3) for a in (q, k, v))
    scores = (q @ k.swapaxes(-1, -2)) * (d // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    y = jax.nn.softmax(scores, axis=-1) @ v
    return y.transpose(0, 2, 1, 3).reshape(b, t, d) @ p["out_kernel"] + p["out_bias"]


def log_softmax_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def logsumexp_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()


def loss_fn(params: dict, tokens: jax.Array, targets: jax.Array, heads: int, cross_entropy: Callable):
    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]
    for p in params["blocks"]:
        x = x + attention(p, layer_norm(x, p["norm1_scale"], p["norm1_bias"]), heads)
        h = layer_norm(x, p["norm2_scale"], p["norm2_bias"])
        h = jax.nn.gelu(h @ p["up_kernel"] + p["up_bias"])
        x = x + h @ p["down_kernel"] + p["down_bias"]
    x = layer_norm(x, params["norm_scale"], params["norm_bias"])
    return cross_entropy(x @ params["wte"].T, targets)


def train_step(shape: Shape, cross_entropy: Callable = log_softmax_loss) -> tuple[dict, Callable]:
    """AdamW with clipping and weight decay on the matrices."""
    params = make_params(shape)
    tx = optax.chain(
        optax.clip_by_global_norm(given.CLIP_NORM),
        optax.adamw(
            given.LEARNING_RATE, b1=given.B1, b2=given.B2, eps=given.EPS, weight_decay=given.WEIGHT_DECAY,
            mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
        ),
    )  # fmt: skip
    opt_state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens, targets, shape.heads, cross_entropy)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    done = 0

    def advance() -> jax.Array:
        nonlocal params, opt_state, done
        params, opt_state, loss = step(params, opt_state, *given.batch(shape, done))
        done += 1
        return loss

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()
        jax.block_until_ready(params)

    losses = [float(advance()) for _ in range(given.CHECKED_STEPS)]
    return {"parameters": sum(x.size for x in jax.tree.leaves(params)), "losses": losses}, run


def train_step_logsumexp(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """The same with logsumexp less the target's logit, which writes no log-probabilities: faster on CPU."""
    return train_step(shape, logsumexp_loss)
