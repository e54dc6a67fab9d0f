"""Recurrent language models: an LSTM, and ELMo's pair of LSTMs that read in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.sharding import axis_size, shard
from jaxllm.core.spec import Spec, SpecTree, count, stack
from jaxllm.core.types import Head, Key, Model, Output, UserError
from jaxllm.models.layers import dense, normal, ones, padded, zeros

GATES = 4  # input, forget, candidate, output: the order of torch.nn.LSTM


@dataclass(frozen=True)
class LSTMConfig:
    """An LSTM language model. Where d_hidden is not d_model, states are projected to d_model at every step (LSTMP)."""

    vocab_size: int
    max_length: int = 1024  # what data is packed to; the model itself has no limit
    d_model: int = 128  # embeddings, and what a layer gives to the next one and to itself
    d_hidden: int = 128  # cells
    n_layers: int = 1
    tied: bool = True  # the output head is the embedding transposed
    residual: bool = False  # layers after the first add their input to their output (ELMo)
    clip: float = 0.0  # cells and projected states are held within +-clip; 0: not at all
    dropout: float = 0.0  # on what enters a layer and the head, never on the recurrence (arXiv 1409.2329); needs an rng
    dtype: str = "float32"  # of activations; parameters and cells stay float32

    @property
    def padded_vocab(self) -> int:
        return padded(self.vocab_size)


@dataclass(frozen=True)
class BiLSTMConfig:
    """ELMo's bidirectional language model: two LSTMs, forward and backward, that share the embedding and the head."""

    vocab_size: int
    max_length: int = 1024
    width: int = 64  # of each direction
    d_hidden: int = 64
    n_layers: int = 2
    tied: bool = True
    residual: bool = True
    clip: float = 3.0
    dropout: float = 0.0
    dtype: str = "float32"

    @property
    def d_model(self) -> int:
        """The width of the features: both directions side by side."""
        return 2 * self.width

    @property
    def padded_vocab(self) -> int:
        return one_direction(self).padded_vocab


def one_direction(c: BiLSTMConfig) -> LSTMConfig:
    """The LSTM of either direction."""
    return LSTMConfig(
        c.vocab_size, c.max_length, c.width, c.d_hidden, c.n_layers, c.tied, c.residual, c.clip, c.dropout, c.dtype
    )  # fmt: skip


PRESETS: dict[str, LSTMConfig | BiLSTMConfig] = {
    "tiny": LSTMConfig(vocab_size=1024, max_length=128, d_model=160, d_hidden=160, n_layers=1),
    "tiny-elmo": BiLSTMConfig(vocab_size=1024, max_length=128, width=96, d_hidden=96, n_layers=2),
    # arXiv 1409.2329, section 4.1
    "zaremba-medium": LSTMConfig(10_000, 35, d_model=650, d_hidden=650, n_layers=2, tied=False, dropout=0.5),
    "zaremba-large": LSTMConfig(10_000, 35, d_model=1500, d_hidden=1500, n_layers=2, tied=False, dropout=0.65),
    # arXiv 1802.05365, section 3.4, over a table of word pieces where ELMo has a character CNN
    "elmo": BiLSTMConfig(32_000, 128, width=512, d_hidden=4096, n_layers=2, tied=False, dropout=0.1),
}


def validate(c: LSTMConfig | BiLSTMConfig) -> None:
    """Raises UserError on the first thing that cannot be built."""
    width = "width" if isinstance(c, BiLSTMConfig) else "d_model"
    for name in ("vocab_size", "max_length", width, "d_hidden", "n_layers"):
        if getattr(c, name) < 1:
            raise UserError(f"model.{name}={getattr(c, name)}: must be at least 1")
    if not 0 <= c.dropout < 1:
        raise UserError(f"model.dropout={c.dropout}: must be in [0, 1)")
    if c.clip < 0:
        raise UserError(f"model.clip={c.clip}: must be 0 (no clipping) or more")
    if c.dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"model.dtype={c.dtype!r}: choose one of float32, bfloat16, float16")


@struct.dataclass
class State:
    """What an LSTM keeps: per layer h [b, d] and c float32 [b, hidden]; length int [b], the tokens read."""

    h: tuple[jax.Array, ...]
    c: tuple[jax.Array, ...]
    length: jax.Array


# ---- parameters


def specs(c: LSTMConfig | BiLSTMConfig) -> SpecTree:
    """The tree of parameters of either model."""
    if isinstance(c, LSTMConfig):
        return {**_ends(c), "layers": _layers(c)}
    one = one_direction(c)
    # ELMo's features: softmax(weights) over the embedding and the layers, times scale
    mix = {"weights": Spec((c.n_layers + 1,), (None,), zeros), "scale": Spec((), (), ones)}
    return {**_ends(one), "forward": {"layers": _layers(one)}, "backward": {"layers": _layers(one)}, "mix": mix}


def _ends(c: LSTMConfig) -> SpecTree:
    d, v = c.d_model, c.padded_vocab
    tree: dict[str, Any] = {
        "embed": {"tokens": Spec((v, d), ("vocab", "embed"), jax.nn.initializers.normal(0.02 if c.tied else 1.0))},
        "head": {"bias": Spec((v,), ("vocab",), zeros)},
    }
    if not c.tied:
        tree["head"]["kernel"] = Spec((d, v), ("embed", "vocab"), normal(d))
    return tree


def _layers(c: LSTMConfig) -> SpecTree:
    d, k = c.d_model, c.d_hidden
    layer = {
        "input": {"kernel": Spec((d, GATES, k), ("embed", None, "mlp"), normal(d))},
        "recurrent": {"kernel": Spec((d, GATES, k), ("embed", None, "mlp"), normal(d))},
        "bias": Spec((GATES, k), (None, "mlp"), _remember),
    }
    if k != d:
        layer["projection"] = {"kernel": Spec((k, d), ("mlp", "embed"), normal(k))}
    return stack(layer, c.n_layers)


def _remember(key: Key, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """The forget gate's bias is 1, so that a cell keeps what it has until it learns not to (Jozefowicz et al., 2015)."""
    return jnp.zeros(shape, dtype).at[1].set(1)


def published_count(c: LSTMConfig | BiLSTMConfig) -> int:
    """The number of parameters without the rows that pad the vocabulary."""
    d = c.width if isinstance(c, BiLSTMConfig) else c.d_model
    return count(specs(c)) - (c.padded_vocab - c.vocab_size) * (d * (1 if c.tied else 2) + 1)


# ---- one layer


def _four(h: jax.Array, kernel: jax.Array) -> jax.Array:
    """h [b, d] times kernel [d, 4, k]. As one matrix product: its gradient is faster; where k is sharded that would move it."""
    if axis_size("mlp") > 1:
        return dense(h, "bd,dgk->bgk", kernel)
    return (h @ kernel.astype(h.dtype).reshape(kernel.shape[0], -1)).reshape(h.shape[0], *kernel.shape[1:])


def _steps(c: LSTMConfig, weights: Any, gates: jax.Array, nudge: jax.Array, state: tuple, turns: tuple):
    """The recurrence, time first: gates [l, b, 4, k] from the input, nudge [l, b, d] on new states -> (per step, state).

    turns: (advance, reset), bool [l, b]. Per step: what the two products of the state read, and the output [l, b, d].
    """

    def step(state, xs):
        gates, nudge, advance, reset = xs
        old_h, old_c = (jnp.where(reset[:, None], 0, x) for x in state)
        gates = gates + _four(old_h, weights["recurrent"]["kernel"])
        i, f, g, o = (gates[:, n].astype(jnp.float32) for n in range(GATES))
        new_c = jax.nn.sigmoid(f) * old_c + jax.nn.sigmoid(i) * jnp.tanh(g)
        new_c = jnp.clip(new_c, -c.clip, c.clip) if c.clip else new_c
        cells = new_h = (jax.nn.sigmoid(o) * jnp.tanh(new_c)).astype(old_h.dtype)
        if "projection" in weights:
            new_h = dense(cells, "bk,kd->bd", weights["projection"]["kernel"]) + nudge
            new_h = jnp.clip(new_h, -c.clip, c.clip) if c.clip else new_h
        keep = advance[:, None]
        state = jnp.where(keep, new_h, old_h), jnp.where(keep, new_c, old_c)
        return state, (old_h, cells, state[0])

    state, seen = jax.lax.scan(step, state, (gates, nudge, *turns))
    return seen, state


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recur(c: LSTMConfig, weights: Any, gates: jax.Array, state: tuple, turns: tuple):
    """`_steps` as (outputs [l, b, d], state), with the gradients of the weights as one product over all steps.

    A scan's own gradient adds a product of the weights' size at every step, which costs more than all else.
    """
    (_, _, out), state = _steps(c, weights, gates, _zeros_like_outputs(gates, state), state, turns)
    return out, state


def _zeros_like_outputs(gates: jax.Array, state: tuple) -> jax.Array:
    return jnp.zeros((gates.shape[0], *state[0].shape), gates.dtype)


def _recur_forward(c: LSTMConfig, weights: Any, gates: jax.Array, state: tuple, turns: tuple):
    nudge = _zeros_like_outputs(gates, state)
    run = lambda gates, nudge, state: _steps(c, weights, gates, nudge, state, turns)  # noqa: E731
    ((old_h, cells, out), state), back = jax.vjp(run, gates, nudge, state)
    return (out, state), (back, weights, old_h, cells)


def _recur_backward(c: LSTMConfig, kept: tuple, cotangents: tuple):
    back, weights, old_h, cells = kept
    d_out, d_state = cotangents
    # the gradients of what the products give, at every step: those of the weights follow from them
    d_gates, d_nudge, d_state = back(((jnp.zeros_like(old_h), jnp.zeros_like(cells), d_out), d_state))
    grads = {"recurrent": {"kernel": jnp.einsum("lbd,lbgk->dgk", old_h, d_gates)}}
    if "projection" in weights:
        grads["projection"] = {"kernel": jnp.einsum("lbk,lbd->kd", cells, d_nudge)}
    grads = jax.tree.map(lambda g, w: g.astype(w.dtype), grads, weights)
    return grads, d_gates, d_state, None


_recur.defvjp(_recur_forward, _recur_backward)


def _layer(c: LSTMConfig, params: Any, x: jax.Array, state: tuple, advance: jax.Array, reset: jax.Array):
    """x [b, l, d] -> ([b, l, d], (h, c)): i, f, g, o = W x + R h + bias; c = f c + i g; h = P (o tanh c) (Hochreiter 1997).

    The product with the input is made for all positions at once; only the one with the state has to wait its turn.
    """
    gates = dense(x, "bld,dgk->blgk", params["input"]["kernel"], params["bias"])
    gates = shard(gates, "batch", None, None, "mlp").swapaxes(0, 1)
    weights = {name: params[name] for name in ("recurrent", "projection") if name in params}
    out, state = _recur(c, weights, gates, state, (advance.T, reset.T))
    return shard(out.swapaxes(0, 1), "batch", None, None), state


def _run(c: LSTMConfig, layers: Any, x: jax.Array, states: State, advance: jax.Array, reset: jax.Array, rng: Key | None):
    """(output of the last layer, states, the layers' inputs and the last output): x [b, l, d]."""
    seen, hs, cs = [], [], []
    for n in range(c.n_layers):
        params = layers[n] if isinstance(layers, tuple) else jax.tree.map(lambda p, n=n: p[n], layers)
        seen.append(x)
        y, (h, cell) = _layer(c, params, _drop(c, x, rng, n), (states.h[n], states.c[n]), advance, reset)
        x = x + y if c.residual and n else y
        hs.append(h)
        cs.append(cell)
    length = states.length + jnp.sum(advance, axis=1, dtype=jnp.int32)
    return _drop(c, x, rng, c.n_layers), State(tuple(hs), tuple(cs), length), [*seen, x]


def _drop(c: LSTMConfig, x: jax.Array, rng: Key | None, place: int) -> jax.Array:
    if rng is None or not c.dropout:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(rng, place), 1 - c.dropout, x.shape)
    return jnp.where(keep, x / (1 - c.dropout), 0).astype(x.dtype)


def _boundaries(segments: jax.Array) -> jax.Array:
    """True where another segment begins than the position before had: [b, l] -> bool [b, l]."""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _empty(c: LSTMConfig, batch: int, dtype: Any) -> State:
    many = lambda width, dtype: tuple(jnp.zeros((batch, width), dtype) for _ in range(c.n_layers))  # noqa: E731
    return State(many(c.d_model, dtype), many(c.d_hidden, jnp.float32), jnp.zeros(batch, jnp.int32))


def _refuse(family: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{family} does not take `{name}`")


def _head(c: LSTMConfig, params: Any) -> Head:
    kernel = params["embed"]["tokens"].T if c.tied else params["head"]["kernel"]
    return Head(kernel, params["head"]["bias"], vocab_size=c.vocab_size)


# ---- the two models


def make(c: LSTMConfig) -> Model:
    """The LSTM language model of a config. Raises UserError when the config cannot be built."""
    validate(c)

    def apply(
        params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None, rng=None, taps=()
    ):
        """tokens int [b, l] -> Output(hidden [b, l, d]). embeds [b, l, d] replace the token embeddings.

        The state begins anew where the segment changes, and padding (segment 0) does not move it. With a cache it goes on from
        there, and segments only tell padding from tokens. rng switches dropout on. taps may name `layer_inputs`.
        """
        _refuse("an LSTM", positions=positions, context=context, types=types)
        x = (params["embed"]["tokens"][tokens] if embeds is None else embeds).astype(c.dtype)
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments.astype(jnp.int32)
        reset = _boundaries(segments) if cache is None else jnp.zeros(segments.shape, bool)
        states = _empty(c, x.shape[0], c.dtype) if cache is None else cache
        x = shard(x, "batch", None, None)
        hidden, states, seen = _run(c, params["layers"], x, states, segments != 0, reset, rng)
        aux = {"layer_inputs": jnp.stack(seen[:-1])} if "layer_inputs" in taps else {}
        return Output(hidden, None if cache is None else states, aux)

    def init_cache(batch, length, dtype=None):
        return _empty(c, batch, dtype or c.dtype)

    return Model(c, specs(c), apply, lambda params: _head(c, params), init_cache)


def make_elmo(c: BiLSTMConfig) -> Model:
    """ELMo's model (arXiv 1802.05365). Its head reads one direction, taps `forward` or `backward` of apply."""
    validate(c)
    one = one_direction(c)

    def apply(
        params, tokens, *, positions=None, segments=None, cache=None, embeds=None, context=None, types=None, rng=None, taps=()
    ):
        """tokens int [b, l] -> Output(hidden [b, l, 2 width]): scale * sum_j softmax(weights)_j [forward_j; backward_j].

        j counts the embedding and the layers. Position t of the forward LSTM has read the tokens up to t of its segment, of the
        backward one those from t on. taps: `forward`, `backward`: the last states [b, l, width], which the head reads;
        `layer_states`: what is mixed, [n + 1, b, l, 2 width].
        """
        _refuse("a bidirectional LSTM", positions=positions, cache=cache, context=context, types=types)
        x = (params["embed"]["tokens"][tokens] if embeds is None else embeds).astype(c.dtype)
        segments = jnp.ones(x.shape[:2], jnp.int32) if segments is None else segments.astype(jnp.int32)
        x = shard(x, "batch", None, None)
        sides, last = [], {}
        for number, name in enumerate(("forward", "backward")):
            turn = (lambda a: jnp.flip(a, axis=1)) if name == "backward" else (lambda a: a)
            key = None if rng is None else jax.random.fold_in(rng, number)
            s = turn(segments)
            states = _empty(one, x.shape[0], c.dtype)
            top, _, seen = _run(one, params[name]["layers"], turn(x), states, s != 0, _boundaries(s), key)
            sides.append(jnp.stack([turn(y) for y in seen]))
            last[name] = turn(top)
        both = jnp.concatenate(sides, axis=-1)
        weights = jax.nn.softmax(params["mix"]["weights"].astype(jnp.float32)) * params["mix"]["scale"]
        hidden = jnp.einsum("n,nbld->bld", weights, both.astype(jnp.float32)).astype(c.dtype)
        return Output(hidden, None, {n: v for n, v in {**last, "layer_states": both}.items() if n in taps})

    def init_cache(batch, length, dtype=None):
        raise ValueError("a bidirectional LSTM does not generate: it has no cache")

    return Model(c, specs(c), apply, lambda params: _head(one, params), init_cache)
