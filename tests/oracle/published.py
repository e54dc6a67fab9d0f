"""What the parity tests of published families share: a tiny random transformers model, saved, and ours loaded from it."""

import copy
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.convert import export, hf, layout, safetensors
from jaxllm.core import ops
from jaxllm.core.tree import flatten
from jaxllm.generate.decode import generate
from jaxllm.losses import lm
from tests.models.tiny import fast_jit, record
from tests.oracle import parity

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

VOCAB, LENGTH = 50, 12


class Pair(NamedTuple):
    """The reference (torch), our model with its parameters, and the directory that both stand in."""

    reference: Any
    model: Any
    params: Any
    directory: Any


def noise(reference, seed=0):
    """Every weight and buffer that is saved random: no bias 0, no scale 1."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in [*reference.named_parameters(), *reference.named_buffers()]:
            if name in dict(reference.named_parameters()) or name.endswith("e_score_correction_bias"):
                one = 1.0 if p.ndim == 1 and name.endswith("weight") else 0.0
                p.copy_(one + 0.3 * torch.randn_like(p))
    reference.set_attn_implementation("eager")
    return reference.eval()


def pair(make, directory, seed=0):
    """The Pair of make() -> a transformers model."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    reference = noise(make(), seed)
    reference.save_pretrained(directory)
    return Pair(reference, *hf.load(directory), directory)


def tokens(shape, seed=0):
    return np.random.default_rng(seed).integers(1, VOCAB, shape)


def torch_logits(reference, ids, mask=None):
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return reference(torch.tensor(ids), attention_mask=mask).logits.numpy()


def our_logits(model):
    """A compiled (params, tokens, segments) -> logits."""
    return fast_jit(lambda p, x, s: ops.logits(model.head(p), model.apply(p, x, segments=s).hidden))


def close(ours, theirs, tolerance, what):
    """Maximal difference relative to the reference's scale."""
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} and {theirs.shape}"
    error = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6)
    assert error < tolerance, f"{what}: differs by {error:.1e} of its scale"


def by_layer(pair, ids):
    """Where hidden states begin to differ, in words: for the message of a failing comparison."""
    import torch

    with torch.no_grad():
        theirs = pair.reference(torch.tensor(ids), output_hidden_states=True).hidden_states
    ours = pair.model.apply(pair.params, jnp.asarray(ids), taps=("layer_inputs",)).aux["layer_inputs"]
    scale = [float(np.abs(np.asarray(o) - t.numpy()).max()) for o, t in zip(ours, theirs, strict=False)]
    return "inputs of the layers differ by " + ", ".join(f"{s:.1e}" for s in scale)


def check_logits(pair):
    """Whole rows, right padding, and two documents packed in one row."""
    ours, ids = our_logits(pair.model), tokens((2, LENGTH))
    whole = np.asarray(ours(pair.params, jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32)))
    assert whole.shape == (2, LENGTH, VOCAB)
    theirs = torch_logits(pair.reference, ids)
    parity.record(type(pair.reference).__name__, "logits", parity.error(whole, theirs))
    assert parity.error(whole, theirs) < 1e-4, by_layer(pair, ids)
    mask = np.ones(ids.shape, np.int32)
    mask[1, 7:] = 0
    padded = np.asarray(ours(pair.params, jnp.asarray(ids), jnp.asarray(mask)))
    theirs = torch_logits(pair.reference, ids, mask)
    close(padded[0], theirs[0], 1e-4, "a row beside a padded one")
    close(padded[1, :7], theirs[1, :7], 1e-4, "a padded row")
    segments = jnp.asarray([[1] * 5 + [2] * 7, [1] * LENGTH])
    packed = np.asarray(ours(pair.params, jnp.asarray(ids), segments))
    close(packed[0, :5], torch_logits(pair.reference, ids[:1, :5])[0], 1e-4, "the first document of a row")
    close(packed[0, 5:], torch_logits(pair.reference, ids[:1, 5:])[0], 1e-4, "the second document of a row")


def published(pair, ours):
    """A tree like our parameters as published tensors, {name: array}."""
    leaves = layout.families()[type(pair.reference).__name__].leaves(pair.model.config)
    names = layout.expected(leaves, pair.model)
    return dict(zip(names, export.tensors(pair.model, flatten(ours), leaves, np.dtype(np.float32)), strict=True))


def check_gradients(pair, directory):
    """Of the mean next-token loss, with respect to every published weight, by name."""
    import torch

    ids = tokens((2, LENGTH + 1), seed=1)
    batch = {k: jnp.asarray(v) for k, v in record([[row] for row in ids], LENGTH).items()}
    loss_fn = lm.loss(pair.model)
    loss, grads = fast_jit(jax.value_and_grad(lambda p: loss_fn({"policy": p}, batch, None)[0].value()))(pair.params)
    reference = copy.deepcopy(pair.reference)
    logits = reference(torch.tensor(ids[:, :-1])).logits
    theirs = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), torch.tensor(ids[:, 1:]).reshape(-1))
    theirs.backward()
    close(np.asarray(loss), theirs.detach().numpy(), 1e-4, "loss")
    with torch.no_grad():  # saved under their published names, whatever they are called in memory
        for p in reference.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    reference.save_pretrained(directory)
    want = {name: safetensors.view(t) for name, t in safetensors.scan(directory).items()}
    have = published(pair, grads)
    want = {name: g for name, g in want.items() if not name.endswith("e_score_correction_bias")}
    assert len(want) >= 5
    for name, gradient in want.items():
        close(have[name], gradient, 1e-3, name)
        parity.record(type(pair.reference).__name__, "gradients", parity.error(have[name], gradient))


def check_generation(pair):
    """32 greedy tokens of prompts of unequal length: ours padded in one batch, theirs one by one, each with its cache."""
    import torch

    prompts, lengths = tokens((2, 5), seed=2), np.array([5, 3])
    sample = fast_jit(lambda p, x, n: generate(pair.model, p, x, n, jax.random.key(0), max_new_tokens=32, temperature=0.0))
    got = sample(pair.params, jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths))
    for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        with torch.no_grad():
            given = torch.tensor(prompt[None, :n])
            out = pair.reference.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False, pad_token_id=0
            )
        want = out[0].numpy()
        assert len(want) == n + 32 and len(set(want[n:])) > 2, "a constant continuation shows nothing"
        assert np.array_equal(np.asarray(got.tokens[row, : n + 32]), want), f"row {row}"


def check_export(pair, directory):
    """Our export loads in transformers with the same logits, and what is loaded from it is the same to the bit."""
    import transformers

    hf.save(directory, pair.model, pair.params, architecture=type(pair.reference).__name__)
    back = type(pair.reference).from_pretrained(directory).eval()
    assert type(transformers.AutoModelForCausalLM.from_pretrained(directory)) is type(pair.reference)
    back.set_attn_implementation("eager")
    ids = tokens((2, LENGTH))
    assert np.array_equal(torch_logits(back, ids), torch_logits(pair.reference, ids))
    again, read = hf.load(directory)
    assert again.config == pair.model.config
    first, second = flatten(pair.params), flatten(read)
    assert first.keys() == second.keys()
    assert all(np.asarray(first[k]).tobytes() == np.asarray(second[k]).tobytes() for k in first)
