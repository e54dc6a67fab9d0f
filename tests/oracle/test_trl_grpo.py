"""Group losses against TRL's own `GRPOTrainer._compute_loss`: value, gradient of every weight, and metrics.

The trainer is not built: its method runs on a stand-in with the attributes that it reads and TRL's own log-probabilities.
"""

import copy
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.losses import policy
from tests.models.tiny import fast_jit

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")
from tests.oracle.parity import error  # noqa: E402
from tests.oracle.test_torch import V, gradients_as_modules, make_llama  # noqa: E402

pytestmark = pytest.mark.oracle
B, P, C = 6, 4, 7  # rows, prompt tokens, completion tokens at most
GROUP, TEMPERATURE = 3, 0.8
LOW, HIGH, BETA = 0.2, 0.28, 0.05
PLAIN = dict(kl=policy.k3, kl_coef=BETA)
CLIPPED = partial(policy.clipped, low=LOW, high=HIGH)

# name: (TRL's settings, our token loss, our normalisation, the KL's options)
CASES = {
    "grpo": (dict(loss_type="grpo"), CLIPPED, policy.sequence_mean, {}),
    "grpo with kl": (dict(loss_type="grpo", beta=BETA), CLIPPED, policy.sequence_mean, PLAIN),
    "dr_grpo": (dict(loss_type="dr_grpo"), CLIPPED, policy.constant(C), {}),
    "dapo": (dict(loss_type="dapo"), CLIPPED, policy.token_mean, {}),
    "dapo with kl": (dict(loss_type="dapo", beta=BETA), CLIPPED, policy.token_mean, PLAIN),
    "bnpo": (dict(loss_type="bnpo"), CLIPPED, policy.token_mean, {}),
    "cispo": (dict(loss_type="cispo", epsilon_high=1.4), partial(policy.cispo, cap=1.4), policy.token_mean, {}),
    "gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.08),
        partial(policy.gspo, low=0.05, high=0.08), policy.sequence_mean, {},
    ),
    "dual clip": (
        dict(loss_type="grpo", delta=1.5, epsilon_high=LOW), partial(policy.dual_clip, clip=LOW, dual=1.5),
        policy.sequence_mean, {},
    ),
    "importance": (dict(loss_type="dapo", use_vllm=True), CLIPPED, policy.token_mean, {}),
    "tools": (dict(loss_type="dapo", tools=True), CLIPPED, policy.token_mean, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    from trl.trainer.utils import add_fused_lm_head

    reference, model, convert = make_llama(False)
    add_fused_lm_head(reference, temperature=TEMPERATURE, outputs=("log_probs", "entropy"))
    return reference, model, convert


def samples(seed=0):
    """Columns over completions [B, C], as TRL has them: ids, masks, advantages, old, reference and sampler log-probs."""
    rng = np.random.default_rng(seed)
    # id 0 is padding, and its embedding has no gradient there
    lengths = np.array([7, 5, 1, 6, 0, 7])[:, None]  # a truncated row that is masked is a row of length 0
    tool = np.ones((B, C), bool)
    tool[0, 2:4] = tool[3, 1] = False
    scores = jnp.asarray(rng.normal(size=B).astype(np.float32))
    return {
        "ids": rng.integers(1, V, (B, P + C)).astype(np.int32), "mask": np.arange(C)[None] < lengths, "tool": tool,
        "advantages": np.array(policy.grpo(scores, GROUP)), "ref": rng.normal(-4, 0.5, (B, C)).astype(np.float32),
        "shift": rng.normal(0, 0.3, (B, C)).astype(np.float32), "importance": rng.uniform(0.3, 2, (B, C)).astype(np.float32),
    }  # fmt: skip


def stand_in(model, settings):
    from accelerate import Accelerator
    from trl import GRPOTrainer

    s = dict(beta=0.0, importance_sampling_level="token", epsilon_low=LOW, epsilon_high=HIGH, delta=None, use_vllm=False)
    s.update(settings)
    args = SimpleNamespace(delta=s["delta"], use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=s["beta"], args=args,
        importance_sampling_level=s["importance_sampling_level"], loss_type=s["loss_type"], epsilon_low=s["epsilon_low"],
        epsilon_high=s["epsilon_high"], use_vllm=s["use_vllm"], vllm_importance_sampling_correction=s["use_vllm"],
        model=model, current_gradient_accumulation_steps=1, max_completion_length=C, accelerator=Accelerator(cpu=True),
        _entropy_bonus_enabled=False, _metrics=defaultdict(lambda: defaultdict(list)),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies = GRPOTrainer._get_per_token_logps_and_entropies.__get__(trainer)
    return trainer


def theirs(reference, settings, data):
    """(loss, a copy of the model that holds gradients in place of its weights, metrics, the old log-probs that were used)."""
    from trl import GRPOTrainer

    model = copy.deepcopy(reference).train()
    model.forward = reference.forward.__func__.__get__(model)  # the fused head, bound to the copy
    trainer = stand_in(model, settings)
    t = {k: torch.tensor(v) for k, v in data.items()}
    mask = t["mask"].long()
    ids, attention = t["ids"].long(), torch.cat([torch.ones(B, P).long(), mask], 1)
    with torch.no_grad():
        now, _ = trainer._get_per_token_logps_and_entropies(model, ids, attention, C)[:2]
    old = torch.where(t["mask"], now - t["shift"], 0.0)
    inputs = {
        "prompt_ids": ids[:, :P], "prompt_mask": torch.ones(B, P).long(), "completion_ids": ids[:, P:],
        "completion_mask": mask, "advantages": t["advantages"], "old_per_token_logps": old, "ref_per_token_logps": t["ref"],
        "importance_sampling_ratio": t["importance"],
    }  # fmt: skip
    used = mask
    if settings.get("tools"):
        inputs["tool_mask"] = t["tool"].long()
        used = mask * inputs["tool_mask"]
    inputs["num_items_in_batch"] = used.sum()
    loss = GRPOTrainer._compute_loss(trainer, model, inputs)
    loss.backward()
    metrics = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    return loss.item(), gradients_as_modules(model), metrics, old.numpy()


def ours(model, params, settings, token_loss, normalise, options, data, old):
    """(loss, gradients, metrics) on the same samples as a sequence record."""

    def aligned(x):
        return jnp.pad(jnp.asarray(x), ((0, 0), (P - 1, 0)))  # the first completion token is the target of the last of the prompt

    mask = jnp.asarray(data["mask"])
    real = jnp.pad(mask, ((0, 0), (P - 1, 0)), constant_values=True)
    if settings.get("tools"):
        mask = policy.sampled_only(mask, jnp.asarray(~data["tool"]))
    batch = {
        "tokens": jnp.asarray(data["ids"][:, :-1]), "targets": jnp.asarray(data["ids"][:, 1:]),
        "segments": real.astype(jnp.int32), "mask": aligned(mask), "logps_old": aligned(old), "ref_logps": aligned(data["ref"]),
        "advantages": jnp.asarray(data["advantages"]), "weights": aligned(normalise(mask)),
    }  # fmt: skip
    if settings.get("use_vllm"):
        batch["importance"] = aligned(data["importance"])
    loss_fn = policy.group_loss(model, token_loss, temperature=TEMPERATURE, **options)

    def value(params):
        mean, metrics = loss_fn({"policy": params}, batch, None)
        return mean.value(), {k: m.value() for k, m in metrics.items()}

    (loss, metrics), grads = fast_jit(jax.value_and_grad(value, has_aux=True))(params)
    return loss, grads, metrics


@pytest.mark.parametrize("name", CASES)
def test_the_loss_and_every_gradient_are_trls(models, name):
    settings, token_loss, normalise, options = CASES[name]
    reference, model, convert = models
    data = samples()
    value, gradients, metrics, old = theirs(reference, settings, data)
    loss, grads, mine = ours(model, convert(reference), settings, token_loss, normalise, options, data, old)
    np.testing.assert_allclose(loss, value, atol=1e-5)
    expected = convert(gradients)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        want = expected
        for key in path:
            want = want[key.key]
        rows = [slice(0, V) if n == 128 else slice(None) for n in want.shape]  # rows of the padded vocabulary have no gradient
        assert error(leaf[tuple(rows)], want[tuple(rows)]) < 1e-5, f"the gradient of {path}"
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads)) > 1e-2, "nothing was compared"
    # TRL averages a sequence's clip over rows, gives cispo another name, and does not count what the second clip stops
    per_token = name not in ("gspo", "cispo", "dual clip")
    for key in ("entropy", *(["kl"] if options else []), *(["clip_ratio/region_mean"] if per_token else [])):
        np.testing.assert_allclose(mine[key], metrics[key], rtol=1e-5, atol=1e-5, err_msg=key)


def test_the_samples_reach_the_clips(models):
    """Otherwise the cases above would not tell the losses apart."""
    reference, model, convert = models
    data = samples()
    values = {name: theirs(reference, CASES[name][0], data)[0] for name in CASES}
    assert len({round(v, 6) for v in values.values()}) >= len(values) - 1, values  # bnpo and dapo agree on one batch
    _, _, metrics, _ = theirs(reference, CASES["grpo"][0], data)
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0
