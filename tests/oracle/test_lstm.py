"""Parity with torch.nn.LSTM through copied weights: states, projections, two directions, gradients."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models import recurrent
from jaxllm.models.recurrent import BiLSTMConfig, LSTMConfig
from tests.models.tiny import fast_jit, weights
from tests.oracle.parity import agree

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.oracle

B, L = 3, 7
CONFIGS = {
    "plain": LSTMConfig(50, 32, d_model=16, d_hidden=16, n_layers=1),
    "deep": LSTMConfig(50, 32, d_model=16, d_hidden=16, n_layers=3),
    "projected": LSTMConfig(50, 32, d_model=10, d_hidden=24, n_layers=2),
}


def to_torch(layers, reference, side=""):
    """Our stacked layers as torch's parameters; of its two biases one takes ours, the other is 0."""
    with torch.no_grad():
        for n in range(len(layers["bias"])):
            end = f"l{n}{side}"
            for ours, theirs in (("input", "weight_ih"), ("recurrent", "weight_hh")):
                kernel = np.asarray(layers[ours]["kernel"][n])
                getattr(reference, f"{theirs}_{end}").copy_(torch.tensor(kernel.reshape(kernel.shape[0], -1).T))
            getattr(reference, f"bias_ih_{end}").copy_(torch.tensor(np.asarray(layers["bias"][n]).reshape(-1)))
            getattr(reference, f"bias_hh_{end}").zero_()
            if "projection" in layers:
                getattr(reference, f"weight_hr_{end}").copy_(torch.tensor(np.asarray(layers["projection"]["kernel"][n]).T))
    return reference


def torch_lstm(c, n_layers=None, **more):
    projected = {"proj_size": c.d_model} if c.d_hidden != c.d_model else {}
    return torch.nn.LSTM(c.d_model, c.d_hidden, n_layers or c.n_layers, batch_first=True, **projected, **more)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_states_and_gradients_equal_torch(name):
    c = CONFIGS[name]
    model = recurrent.make(c)
    params = weights(model.specs, seed=3)
    reference = to_torch(params["layers"], torch_lstm(c))
    rng = np.random.default_rng(0)
    x, direction = (rng.normal(size=(B, L, c.d_model)).astype(np.float32) for _ in range(2))

    def ours(params, x):
        out = model.apply(params, None, embeds=x, cache=model.init_cache(B, L))
        return jnp.sum(out.hidden * direction), out

    (_, out), (grads, d_x) = fast_jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, x)
    given = torch.tensor(x, requires_grad=True)
    theirs, (h, cell) = reference(given)
    agree("torch.nn.LSTM", "logits", out.hidden, theirs.detach(), 1e-5)
    np.testing.assert_allclose(np.stack(out.cache.h), h.detach(), atol=2e-6)
    np.testing.assert_allclose(np.stack(out.cache.c), cell.detach(), atol=2e-6)
    (theirs * torch.tensor(direction)).sum().backward()
    np.testing.assert_allclose(d_x, given.grad, rtol=1e-4, atol=1e-5)
    layers = grads["layers"]
    for n in range(c.n_layers):
        flat = lambda a, n=n: np.asarray(a[n]).reshape(a.shape[1], -1).T  # noqa: E731
        pairs = [
            (flat(layers["input"]["kernel"]), f"weight_ih_l{n}"), (flat(layers["recurrent"]["kernel"]), f"weight_hh_l{n}"),
            (np.asarray(layers["bias"][n]).reshape(-1), f"bias_ih_l{n}"),
        ]  # fmt: skip
        if "projection" in layers:
            pairs.append((np.asarray(layers["projection"]["kernel"][n]).T, f"weight_hr_l{n}"))
        for mine, other in pairs:
            agree("torch.nn.LSTM", "gradients", mine, getattr(reference, other).grad, 1e-3)


def test_ragged_rows_equal_torch_packed_sequences():
    c = CONFIGS["deep"]
    model = recurrent.make(c)
    params = weights(model.specs, seed=5)
    reference = to_torch(params["layers"], torch_lstm(c))
    lengths = np.array([7, 3, 5])
    segments = (np.arange(L)[None, :] < lengths[:, None]).astype(np.int32)
    x = np.random.default_rng(1).normal(size=(B, L, c.d_model)).astype(np.float32)
    out = fast_jit(lambda p, x: model.apply(p, None, embeds=x, segments=segments, cache=model.init_cache(B, L)))(params, x)
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.tensor(x), torch.tensor(lengths), True, enforce_sorted=False)
    theirs, (h, _) = reference(packed)
    theirs, _ = torch.nn.utils.rnn.pad_packed_sequence(theirs, batch_first=True)
    real = segments != 0
    np.testing.assert_allclose(np.asarray(out.hidden)[real], theirs.detach().numpy()[real], atol=2e-6)
    np.testing.assert_allclose(np.stack(out.cache.h), h.detach(), atol=2e-6)


@pytest.mark.parametrize("d_hidden", [8, 20])
def test_two_directions_equal_torch_bidirectional(d_hidden):
    c = BiLSTMConfig(50, 32, width=8, d_hidden=d_hidden, n_layers=1, clip=0.0)
    model = recurrent.make_elmo(c)
    params = weights(model.specs, seed=7)
    one = replace(recurrent.one_direction(c), n_layers=1)
    reference = to_torch(params["forward"]["layers"], torch_lstm(one, bidirectional=True))
    to_torch(params["backward"]["layers"], reference, side="_reverse")
    x = np.random.default_rng(2).normal(size=(B, L, 8)).astype(np.float32)
    taps = ("forward", "backward")
    aux = fast_jit(lambda p, x: model.apply(p, None, embeds=x, taps=taps).aux)(params, x)
    theirs, _ = reference(torch.tensor(x))
    np.testing.assert_allclose(np.concatenate([aux[n] for n in taps], axis=-1), theirs.detach(), atol=2e-6)
