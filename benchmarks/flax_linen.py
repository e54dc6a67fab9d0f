"""The same train step with Flax Linen: its own attention, norms and embeddings, layers in a Python loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import traverse_util
from flax.training.train_state import TrainState

from benchmarks import shape as given
from benchmarks.shape import Shape


class Block(nn.Module):
    """A pre-norm layer."""

    heads: int

    @nn.compact
    def __call__(self, x, mask):
        h = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(h, mask=mask)
        h = nn.LayerNorm(epsilon=1e-5, name="norm2")(x)
        h = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(h))
        return x + nn.Dense(x.shape[-1], name="down")(h)


class GPT2(nn.Module):
    """tokens [b, l] -> logits [b, l, v]; the head is the embedding."""

    layers: int
    heads: int
    width: int
    vocab: int
    length: int

    @nn.compact
    def __call__(self, tokens):
        wte = nn.Embed(self.vocab, self.width, name="wte")
        wpe = nn.Embed(self.length, self.width, name="wpe")
        x = wte(tokens) + wpe(jnp.arange(tokens.shape[1]))
        mask = nn.make_causal_mask(tokens)
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x, mask)
        return wte.attend(nn.LayerNorm(epsilon=1e-5, name="norm")(x))


def layer(w: dict, i: int, heads: int) -> dict:
    """The given weights of layer i under Flax's names."""
    d = w["wte"].shape[1]
    kernels = np.split(w["qkv_kernel"][i].reshape(d, 3 * heads, d // heads), 3, axis=1)
    biases = np.split(w["qkv_bias"][i].reshape(3 * heads, d // heads), 3, axis=0)
    names = ("query", "key", "value")
    attention = {n: {"kernel": k, "bias": b} for n, k, b in zip(names, kernels, biases, strict=True)}
    attention["out"] = {"kernel": w["out_kernel"][i].reshape(heads, d // heads, d), "bias": w["out_bias"][i]}
    dense = {n: {"kernel": w[f"{n}_kernel"][i], "bias": w[f"{n}_bias"][i]} for n in ("up", "down")}
    norms = {n: {"scale": w[f"{n}_scale"][i], "bias": w[f"{n}_bias"][i]} for n in ("norm1", "norm2")}
    return {"attention": attention, **dense, **norms}


def ends(w: dict) -> dict:
    """The given weights outside the layers."""
    embeds = {n: {"embedding": w[n]} for n in ("wte", "wpe")}
    return {**embeds, "norm": {"scale": w["norm_scale"], "bias": w["norm_bias"]}}


def make_params(shape: Shape) -> dict:
    w = given.weights(shape)
    tree = {f"block_{i}": layer(w, i, shape.heads) for i in range(shape.layers)} | ends(w)
    return jax.tree.map(jnp.array, tree)  # copied: the steps donate them


def decayed(params: dict) -> dict:
    """Weight decay is on the matrices; biases of attention have two dimensions in Flax."""
    return traverse_util.path_aware_map(lambda path, _: path[-1] not in ("bias", "scale"), params)


def optimizer(mask: Callable) -> optax.GradientTransformation:
    """AdamW with clipping."""
    adamw = optax.adamw(given.LEARNING_RATE, b1=given.B1, b2=given.B2, eps=given.EPS, weight_decay=given.WEIGHT_DECAY, mask=mask)
    return optax.chain(optax.clip_by_global_norm(given.CLIP_NORM), adamw)


def loss_of(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def train_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    """A TrainState, its gradients applied in one jitted step."""
    model = GPT2(shape.layers, shape.heads, shape.width, shape.vocab, shape.length)
    state = TrainState.create(apply_fn=model.apply, params=make_params(shape), tx=optimizer(decayed))

    @partial(jax.jit, donate_argnums=0)
    def step(state, tokens, targets):
        loss, grads = jax.value_and_grad(lambda p: loss_of(state.apply_fn({"params": p}, tokens), targets))(state.params)
        return state.apply_gradients(grads=grads), loss

    done = 0

    def advance() -> jax.Array:
        nonlocal state, done
        state, loss = step(state, *given.batch(shape, done))
        done += 1
        return loss

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()
        jax.block_until_ready(state)

    losses = [float(advance()) for _ in range(given.CHECKED_STEPS)]
    return {"parameters": sum(x.size for x in jax.tree.leaves(state.params)), "losses": losses}, run
