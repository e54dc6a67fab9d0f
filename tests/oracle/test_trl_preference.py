"""Parity of the preference losses with TRL: the same logits of tiny random models through its trainers and our builders.

TRL has no pure functions: trainers are made without their __init__ and given what their loss methods read. TRL 1.16 lacks
cdpo (its sigmoid smooths no labels), reference_free, unlikelihood, and BCO on unpaired rows. Its conventions differ where a
test says so.
"""

import os
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.types import Head, Model, Output
from jaxllm.losses import preference

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytestmark = pytest.mark.oracle
V, LENGTH, ROWS = 40, 14, 5
PROMPT = np.array([3, 2, 4, 3, 5])
MODEL = Model(
    None, None, lambda params, tokens, *, segments=None: Output(params["embed"][tokens]),
    lambda params: Head(params["kernel"], vocab_size=V), None,
)  # fmt: skip


def llama(seed):
    from trl.trainer.utils import add_fused_lm_head

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"))
    return model


@pytest.fixture(scope="module")
def models():
    """(policy, reference)."""
    return llama(0), llama(1)


def sequences(seed, completion=None):
    """Token ids, attention and completion masks [rows, length]: prompts of their own lengths, ragged completions."""
    rng = np.random.default_rng(seed)
    completion = rng.integers(2, LENGTH - PROMPT.max() + 1, ROWS) if completion is None else completion
    prompts = np.random.default_rng(0).integers(1, V, (ROWS, LENGTH))
    at = np.arange(LENGTH)
    ids = np.where(at < PROMPT[:, None], prompts, rng.integers(1, V, (ROWS, LENGTH)))
    attention = at < (PROMPT + completion)[:, None]
    return np.where(attention, ids, 0), attention, attention & (at >= PROMPT[:, None])


CHOSEN, REJECTED, MISMATCHED = sequences(1), sequences(2), sequences(3)


def tensors(*columns):
    return tuple(torch.tensor(c.astype(np.int64)) for c in columns)


def both():
    ids, attention, mask = tensors(*(np.concatenate(pair) for pair in zip(CHOSEN, REJECTED, strict=True)))
    return {"input_ids": ids, "attention_mask": attention, "completion_mask": mask}


def params(model, *parts):
    """A table of logits, one row a position; the tokens of our records point into it."""
    with torch.no_grad():
        logits = [model(*tensors(ids), attention_mask=tensors(mask)[0]).logits[:, :-1].numpy() for ids, mask, _ in parts]
    return {"embed": jnp.asarray(np.concatenate(logits).reshape(-1, V)), "kernel": jnp.eye(V)}


def record(part, number):
    ids, attention, mask = part
    places = np.arange(ROWS * (LENGTH - 1)).reshape(ROWS, LENGTH - 1) + number * ROWS * (LENGTH - 1)
    return {
        "tokens": places, "targets": np.where(attention, ids, 0)[:, 1:].astype(np.int32),
        "segments": attention[:, 1:].astype(np.int32), "mask": mask[:, 1:],
    }  # fmt: skip


@pytest.fixture(scope="module")
def columns(models):
    """(policy parameters, batch of pairs, its reference log-probabilities per token)."""
    policy, reference = (params(m, CHOSEN, REJECTED) for m in models)
    batch = {"chosen": record(CHOSEN, 0), "rejected": record(REJECTED, 1)}
    tokens = {f"ref_{s}_logps": preference.token_logps(MODEL, reference, batch[s]) for s in ("chosen", "rejected")}
    sums = jax.tree.map(lambda x: x.sum(axis=1), tokens)
    return {"policy": policy}, batch | sums, tokens


ACCELERATOR = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(kind, models, **settings):
    made = kind.__new__(kind)
    shared = dict(
        accelerator=ACCELERATOR, model=models[0], ref_model=models[1], aux_loss_enabled=False, precompute_ref_logps=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1, is_encoder_decoder=False,
        pad_token_id=0, padding_value=0, label_smoothing=0.0, calculate_KL=True,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
    )  # fmt: skip
    for name, value in (shared | settings).items():
        setattr(made, name, value)
    return made


def of_dpo(models, loss_type, beta=0.3, smoothing=0.0, weights=(1.0,), **settings):
    """TRL's DPO loss of the pairs."""
    usual = dict(ld_alpha=None, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, use_weighting=False)
    types = [loss_type] if isinstance(loss_type, str) else loss_type
    made = trainer(
        trl.DPOTrainer, models, loss_types=types, loss_weights=list(weights), beta=beta, label_smoothing=smoothing,
        **usual | settings,
    )  # fmt: skip
    return made._compute_loss(models[0], both(), False).item()


def ours(loss_fn, columns, batch=None):
    return float(loss_fn(columns[0], batch or columns[1], None)[0].value())


def agree(got, expected):
    assert np.isfinite(expected) and got == pytest.approx(expected, rel=1e-5, abs=1e-5)


PAIRS = {
    "sigmoid": preference.dpo, "sigmoid_norm": preference.dpo_norm, "hinge": preference.hinge, "ipo": preference.ipo,
    "nca_pair": preference.nca_pair, "bco_pair": preference.bco_pair, "sppo_hard": preference.sppo_hard, "aot": preference.aot,
    "aot_unpaired": preference.aot_unpaired, "apo_zero": preference.apo_zero, "apo_down": preference.apo_down,
    "discopop": partial(preference.discopop, tau=0.05),
}  # fmt: skip


def test_the_log_ratios_are_not_small(models, columns):
    margins = preference.log_ratio_margin(preference.pair_logps(MODEL, columns[0]["policy"], columns[1]))
    assert np.abs(margins).max() > 2 and np.abs(margins).min() < 40


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", list(PAIRS))
def test_losses_on_pairs(models, columns, name, beta):
    agree(ours(preference.loss(MODEL, PAIRS[name], beta=beta), columns), of_dpo(models, name, beta))


@pytest.mark.parametrize("name", ["robust", "exo_pair"])
def test_losses_with_label_smoothing(models, columns, name):
    fn = getattr(preference, name)
    agree(ours(preference.loss(MODEL, fn, beta=0.3, label_smoothing=0.2), columns), of_dpo(models, name, smoothing=0.2))


@pytest.mark.parametrize("fn,kind", [(preference.reverse_kl, "reverse_kl"), (preference.forward_kl, "forward_kl"),
                                     (preference.jensen_shannon, "js_divergence")])  # fmt: skip
def test_divergences(models, columns, fn, kind):
    expected = of_dpo(models, "sigmoid", f_divergence_type=kind)
    agree(ours(preference.loss(MODEL, fn, beta=0.3), columns), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_alpha_divergences(models, columns, alpha):
    """TRL's coefficient is 1 minus the paper's alpha."""
    expected = of_dpo(models, "sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha)
    agree(ours(preference.loss(MODEL, preference.alpha_divergence, beta=0.3, alpha=alpha), columns), expected)


def test_preferred_fine_tuning_is_the_token_mean_there(models, columns):
    """Ours is per token of each pair; TRL's is the mean over the batch's tokens, which is our NLL term's column."""
    weights = preference.token_mean(jnp.asarray(CHOSEN[2][:, 1:]))
    zero = lambda logps, *, beta: jnp.zeros_like(logps.chosen)  # noqa: E731
    loss_fn = preference.loss(MODEL, zero, beta=0.3, nll_weight=1.0)
    agree(ours(loss_fn, columns, columns[1] | {"nll_weights": weights}), of_dpo(models, "sft"))


def test_combinations(models, columns):
    fn = preference.combined((preference.dpo, 0.8), (preference.bco_pair, 0.2))
    expected = of_dpo(models, ["sigmoid", "bco_pair"], weights=(0.8, 0.2))
    agree(ours(preference.loss(MODEL, fn, beta=0.3), columns), expected)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(models, columns, alpha):
    loss_fn = preference.ld_dpo(MODEL, beta=0.3, alpha=alpha)
    agree(ours(loss_fn, columns, columns[1] | columns[2]), of_dpo(models, "sigmoid", ld_alpha=alpha))


@pytest.mark.parametrize("name,fn", [("sigmoid", preference.dpo), ("hinge", preference.hinge)])
def test_weighted(models, columns, name, fn):
    agree(ours(preference.wpo(MODEL, fn, beta=0.3), columns), of_dpo(models, name, use_weighting=True))


def concatenated():
    out = {}
    for side, (ids, attention, mask) in (("chosen", CHOSEN), ("rejected", REJECTED)):
        ids, attention, mask = tensors(ids, attention, mask)
        out |= {f"{side}_input_ids": ids, f"{side}_attention_mask": attention, f"{side}_labels": ids.masked_fill(mask == 0, -100)}
    return out


def test_orpo(models, columns):
    """Its NLL is the mean over the batch's tokens, prompt included."""
    from trl.experimental.orpo import ORPOTrainer

    made = trainer(ORPOTrainer, models, beta=0.3)
    expected = made.get_batch_loss_metrics(models[0], concatenated())[0].item()
    weights = preference.token_mean(jnp.asarray(CHOSEN[1][:, 1:]))
    loss_fn = preference.loss(MODEL, preference.orpo, beta=0.3, nll_weight=1.0)
    agree(ours(loss_fn, columns, columns[1] | {"nll_weights": weights}), expected)


@pytest.mark.parametrize("name,fn,alpha", [
    ("sigmoid", preference.cpo, 0.0), ("simpo", partial(preference.simpo, gamma=0.5), 0.0),
    ("simpo", partial(preference.alphapo, gamma=0.5, alpha=0.25), 0.25),
])  # fmt: skip
@pytest.mark.parametrize("nll", [0.0, 1.0])
def test_cpo_and_simpo(models, columns, name, fn, alpha, nll):
    from trl.experimental.cpo import CPOTrainer

    made = trainer(CPOTrainer, models, beta=0.7, loss_type=name, simpo_gamma=0.5, cpo_alpha=nll, alpha=alpha)
    expected = made.get_batch_loss_metrics(models[0], concatenated())[0].item()
    weights = preference.token_mean(jnp.asarray(CHOSEN[2][:, 1:]))
    loss_fn = preference.loss(MODEL, fn, beta=0.7, nll_weight=nll)
    agree(ours(loss_fn, columns, columns[1] | {"nll_weights": weights}), expected)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("kind,fn", [("kto", preference.kto), ("apo_zero_unpaired", preference.apo_zero_unpaired)])
def test_kto(models, kind, fn, swap):
    """With policy and reference exchanged the estimate of KL changes its sign, and one of the two is cut at 0."""
    policy, reference = models[::-1] if swap else models
    label = np.array([True, False, True, True, False])
    weights = dict(desirable_weight=1.5, undesirable_weight=0.5) if kind == "kto" else {}
    usual = dict(desirable_weight=1.0, undesirable_weight=1.0)
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = dict(zip(names, tensors(*CHOSEN), strict=True)) | {"label": torch.tensor(label)}
    inputs |= {f"KL_{n}": x for n, x in zip(names, tensors(*MISMATCHED), strict=True)}
    made = trainer(trl.KTOTrainer, (policy, reference), beta=0.3, loss_type=kind, **usual | weights)
    expected = made._compute_loss(policy, inputs, False).item()

    old = params(reference, CHOSEN, MISMATCHED)
    batch = {"completion": record(CHOSEN, 0), "mismatched": record(MISMATCHED, 1), "label": label}
    batch["ref_logps"] = preference.sequence_logps(MODEL, old, batch["completion"])
    batch["ref_mismatched_logps"] = preference.sequence_logps(MODEL, old, batch["mismatched"])
    mean, metrics = preference.row_loss(MODEL, fn, beta=0.3, **weights)(
        {"policy": params(policy, CHOSEN, MISMATCHED)}, batch, None
    )
    agree(float(mean.value()), expected)
    theirs = made._metrics["eval"]
    for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected"):
        assert float(metrics[name].value()) == pytest.approx(theirs[name][0], rel=1e-4, abs=1e-4), name
