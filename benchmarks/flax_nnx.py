"""The same train step with Flax NNX: split into graph and state once, merged inside jax.jit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import shape as given
from benchmarks.flax_linen import ends, layer, loss_of, optimizer
from benchmarks.shape import Shape


class Block(nnx.Module):
    """A pre-norm layer."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class GPT2(nnx.Module):
    """tokens [b, l] -> logits [b, l, v]; the head is the embedding."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs):
        self.wte = nnx.Embed(shape.vocab, shape.width, rngs=rngs)
        self.wpe = nnx.Embed(shape.length, shape.width, rngs=rngs)
        self.blocks = nnx.List([Block(shape.width, shape.heads, rngs) for _ in range(shape.layers)])
        self.norm = nnx.LayerNorm(shape.width, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.wte.attend(self.norm(x))


def make_model(shape: Shape) -> GPT2:
    """The given weights."""
    model, w = GPT2(shape, nnx.Rngs(0)), given.weights(shape)
    tree = ends(w) | {"blocks": {i: layer(w, i, shape.heads) for i in range(shape.layers)}}
    state = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.array, tree))
    nnx.update(model, state)
    return model


def decayed(params: nnx.State) -> nnx.State:
    """Weight decay is on the matrices; biases of attention have two dimensions in Flax."""
    return nnx.map_state(lambda path, _: path[-1] not in ("bias", "scale"), params)


def train_step(shape: Shape) -> tuple[dict, Callable[[int], None]]:
    graph, params, rest = nnx.split(make_model(shape), nnx.Param, ...)
    tx = optimizer(decayed)
    opt_state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, rest, tokens, targets):
        loss, grads = jax.value_and_grad(lambda p: loss_of(nnx.merge(graph, p, rest)(tokens), targets))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    done = 0

    def advance() -> jax.Array:
        nonlocal params, opt_state, done
        params, opt_state, loss = step(params, opt_state, rest, *given.batch(shape, done))
        done += 1
        return loss

    def run(steps: int) -> None:
        for _ in range(steps):
            advance()
        jax.block_until_ready(params)

    losses = [float(advance()) for _ in range(given.CHECKED_STEPS)]
    return {"parameters": sum(x.size for x in jax.tree.leaves(params)), "losses": losses}, run
