"""The study of preference losses runs at a tiny size; the bandit's optima; one program that holds all losses gives each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.studies import dpo_variants
from experiments.studies.lab.labels import halves, swapped
from experiments.studies.lab.variants import VARIANTS, kto, margins, picked
from jaxllm import launch
from jaxllm.losses import preference

TINY = {
    "steps": 2, "batch_size": 8, "seeds": 2, "pretrain_steps": 4, "many": 48, "few": 24, "votes": 16, "test_strings": 32,
    "length": 6, "shortest": 4, "at_once": 6, "width": 16, "layers": 1, "bandit_steps": 2000,
}  # fmt: skip


def test_runs_and_its_gates_hold_at_any_size(quick_compile, tmp_path):
    result = launch.start(dpo_variants.main, "studies.dpo_variants", TINY, tmp_path)
    gates = [claim for claim in result["claims"] if claim["kind"] == "gate"]
    assert len(gates) == 4 and all(claim["holds"] for claim in gates)
    assert all(claim["low"] <= claim["value"] <= claim["high"] for claim in result["claims"] if claim["kind"] == "finding")
    assert "No ranking is claimed" in result["findings"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"few.svg", "many.svg", "bandit.svg"}
    assert set(dpo_variants.VARIANTS) == {name.split("/")[0] for name in result["metrics"]}


@pytest.mark.parametrize("tau", [0.25, 1.0])
def test_bandit_optima(tau):
    last = {n: float(margins(VARIANTS[n], beta=tau, steps=4000, rate=0.2)[-1]) for n in ("ipo", "cdpo")}
    assert last["ipo"] == pytest.approx(1 / (2 * tau), abs=1e-3)
    assert last["cdpo"] == pytest.approx(np.log(9) / tau, abs=0.05)
    noisy = {n: float(margins(VARIANTS[n], beta=tau, chance=0.8, steps=4000, rate=0.2)[-1]) for n in ("dpo", "ipo")}
    assert noisy["dpo"] == pytest.approx(np.log(4) / tau, abs=0.01)  # a bounded optimum once the preference is not certain
    assert noisy["ipo"] == pytest.approx((2 * 0.8 - 1) / (2 * tau), abs=1e-3)


def test_dpo_diverges_on_a_certain_preference():
    walk = np.asarray(margins(VARIANTS["dpo"], beta=1.0, steps=10_000))
    assert (np.diff(walk) > 0).all()
    assert walk[9999] - walk[999] == pytest.approx(np.log(10), abs=0.05)


def logps(n=6):
    x = -5 * jax.random.uniform(jax.random.key(0), (4, n))
    return preference.PairLogps(*x, *jax.random.randint(jax.random.key(1), (2, n), 1, 9).astype(jnp.float32))


def test_picked_is_each_loss_by_its_number():
    x = logps()
    for i, fn in enumerate(VARIANTS.values()):
        np.testing.assert_array_equal(picked(x, beta=0.7, which=jnp.int32(i)), fn(x, beta=0.7))


def test_kto_does_not_use_which_side_was_compared_with_which():
    x = logps()
    index = jnp.array([3, 1, 5, 0, 2, 4])
    other = x.replace(rejected=x.rejected[index], ref_rejected=x.ref_rejected[index], rejected_length=x.rejected_length[index])
    assert kto(x, beta=0.5).mean() == pytest.approx(float(kto(other, beta=0.5).mean()), abs=1e-6)
    assert abs(float(VARIANTS["dpo"](x, beta=0.5).mean() - VARIANTS["dpo"](other, beta=0.5).mean())) > 1e-3


def test_swapped_pairs_and_halves():
    pairs = {
        "chosen": {"tokens": jnp.array([[1, 2], [3, 4]])}, "rejected": {"tokens": jnp.array([[5, 6], [7, 8]])},
        "ref_chosen_logps": jnp.array([1.0, 2.0]), "ref_rejected_logps": jnp.array([3.0, 4.0]), "more": jnp.zeros(2),
    }  # fmt: skip
    changed = swapped(pairs, jnp.array([False, True]))
    assert changed["chosen"]["tokens"].tolist() == [[1, 2], [7, 8]] and changed["rejected"]["tokens"].tolist() == [[5, 6], [3, 4]]
    assert changed["ref_chosen_logps"].tolist() == [1.0, 4.0] and changed["ref_rejected_logps"].tolist() == [3.0, 2.0]
    assert [x.tolist() for x in halves(jnp.arange(4))] == [[0, 1], [2, 3]]
