"""Many runs at once: equal to the runs one by one, compiled once, in a known order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.train import sweep


def step(state, data, hyper, key):
    """Noisy gradient descent of w on |x w - y|^2."""
    residual = data["x"] @ state["w"] - data["y"]
    grad = data["x"].T @ residual + 0.1 * jax.random.normal(key, state["w"].shape)
    return {"w": state["w"] - hyper["lr"] * (grad + hyper["decay"] * state["w"])}, {"loss": jnp.mean(residual**2)}


def observe(state, data, hyper, key):
    return {"norm": jnp.linalg.norm(state["w"]), "noise": jax.random.normal(key)}


def setting(seeds=3, lr=(0.01, 0.03), decay=(0.0, 0.5)):
    index, hyper = sweep.grid(seeds, lr=lr, decay=decay)
    keys = jax.random.split(jax.random.key(0), seeds)
    data = {"x": jax.random.normal(keys[0], (seeds, 8, 4)), "y": jax.random.normal(keys[1], (seeds, 8))}
    state = {"w": jax.random.normal(keys[2], (seeds, 4))}
    run_keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(7), index)
    return index, hyper, sweep.take(data, index), sweep.take(state, index), run_keys


def test_grid_has_seeds_innermost_and_the_first_setting_outermost():
    index, hyper = sweep.grid(3, a=(1, 2), b=(0.5, 0.25))
    assert index.tolist() == [0, 1, 2] * 4
    assert hyper["a"].tolist() == [1] * 6 + [2] * 6 and hyper["b"].tolist() == ([0.5] * 3 + [0.25] * 3) * 2
    folded = sweep.by_setting(np.stack([hyper["a"], hyper["b"], index], axis=1), 3)
    assert folded.shape == (4, 3, 3)
    assert folded[:, 0, :2].tolist() == [[1, 0.5], [1, 0.25], [2, 0.5], [2, 0.25]] and (folded[:, :, 2] == [0, 1, 2]).all()
    alone, none = sweep.grid(2)
    assert alone.tolist() == [0, 1] and none == {}


def test_take_gives_each_run_what_its_seed_has():
    index, _, data, state, _ = setting()
    assert data["x"].shape == (12, 8, 4) and state["w"].shape == (12, 4)
    assert (data["x"][7] == data["x"][1]).all() and not (data["x"][7] == data["x"][2]).all() and index[7] == 1


def test_runs_together_equal_runs_one_by_one_and_a_plain_loop():
    _, hyper, data, state, keys = setting()
    final, curves = sweep.fit(step, state, data, hyper, keys, steps=6, every=2, observe=observe)
    for run in (0, 4, 11):
        one = slice(run, run + 1)
        pick = lambda tree, one=one: jax.tree.map(lambda x: x[one], tree)  # noqa: E731
        alone, alone_curves = sweep.fit(
            step, pick(state), pick(data), pick(hyper), keys[one], steps=6, every=2, observe=observe
        )  # fmt: skip
        np.testing.assert_allclose(alone["w"][0], final["w"][run], rtol=2e-5, atol=1e-6)
        for name in curves:
            np.testing.assert_allclose(alone_curves[name][0], curves[name][run], rtol=2e-5, atol=1e-6)
        w, mine = {"w": state["w"][run]}, jax.tree.map(lambda x, run=run: x[run], (data, hyper))
        losses, norms = [], [float(jnp.linalg.norm(w["w"]))]
        for i in range(6):
            w, metrics = step(w, *mine, jax.random.fold_in(keys[run], i))
            losses.append(float(metrics["loss"]))
            norms += [float(jnp.linalg.norm(w["w"]))] if i % 2 else []
        np.testing.assert_allclose(final["w"][run], w["w"], rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(curves["norm"][run], norms, rtol=2e-5)
        np.testing.assert_allclose(curves["loss"][run, 1:], np.reshape(losses, (3, 2)).mean(axis=1), rtol=2e-5)


def test_curves_begin_before_the_first_step():
    _, hyper, data, state, keys = setting()
    seen = []
    kept = np.asarray(state["w"]).copy()
    _, curves = sweep.fit(step, state, data, hyper, keys, steps=6, every=3, observe=observe, note=seen.append)
    assert (curves["step"] == [0, 3, 6]).all() and curves["step"].shape == (12, 3) and seen == [3, 6]
    assert np.isnan(curves["loss"][:, 0]).all() and np.isfinite(curves["loss"][:, 1:]).all()
    np.testing.assert_allclose(curves["norm"][:, 0], np.linalg.norm(kept, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(state["w"], kept)  # the caller's arrays live on
    # looks have keys of their own, one for each point and seed; runs of one seed share them
    assert len(np.unique(curves["noise"])) == 9 and (curves["noise"][:3] == curves["noise"][3:6]).all()


def test_how_often_one_looks_changes_nothing():
    _, hyper, data, state, keys = setting()
    finals = [sweep.fit(step, state, data, hyper, keys, steps=6, every=every)[0]["w"] for every in (0, 1, 3)]
    np.testing.assert_allclose(finals[0], finals[1], rtol=1e-5)
    np.testing.assert_allclose(finals[0], finals[2], rtol=1e-5)
    _, curves = sweep.fit(step, state, data, hyper, keys, steps=6)
    assert set(curves) == {"loss", "step"} and (curves["step"] == [0, 6]).all()
    with pytest.raises(ValueError, match="steps=6 is not a multiple of every=4"):
        sweep.fit(step, state, data, hyper, keys, steps=6, every=4)


def test_settings_and_seeds_differ():
    _, hyper, data, state, keys = setting()
    final, _ = sweep.fit(step, state, data, hyper, keys, steps=4)
    w = np.asarray(final["w"])
    gaps = np.abs(w[:, None] - w[None]).max(axis=-1) + np.eye(len(w))
    assert gaps.min() > 1e-4


def test_one_compilation_serves_all_settings_and_all_steps():
    def traces(steps, **settings):
        count = 0

        def counted(state, data, hyper, key):
            nonlocal count
            count += 1
            return step(state, data, hyper, key)

        _, hyper, data, state, keys = setting(**settings)
        sweep.fit(counted, state, data, hyper, keys, steps=steps, every=1)
        return count

    once = traces(1, lr=(0.01,), decay=(0.0,))
    assert traces(5) == once == traces(3, lr=(0.01, 0.02, 0.03, 0.04))
