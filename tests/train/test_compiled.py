"""The counter of compilations: one is planned, a second one ends the run and says what has changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import exits
from jaxllm.core import sharding
from jaxllm.train.compiled import Recompiled, counted, programs


def make(**jit):
    return jax.jit(lambda state, batch: {"w": state["w"] + batch["x"].sum()}, **jit)


def state(value=1.0):
    return {"w": jnp.float32(value)}


def test_equal_calls_compile_once_and_give_what_the_function_gives():
    step = counted(make(donate_argnums=0), "the train step")
    s = state()
    before = None
    for i in range(3):
        s = step(s, {"x": jnp.full(3, i, jnp.float32)})
        before = before or len(programs())
    assert float(s["w"]) == 1 + 3 + 6


@pytest.mark.parametrize(
    "first,second,said",
    [
        ({"x": np.ones(3, np.float32)}, {"x": np.ones(4, np.float32)}, r"batch/x was float32\[3\].* now float32\[4\]"),
        ({"x": np.ones(3, np.float32)}, {"x": np.ones(3, np.int32)}, r"batch/x was float32\[3\].* now int32\[3\]"),
    ],
)
def test_a_second_compilation_is_an_error_that_names_the_leaf(first, second, said):
    step = counted(make(donate_argnums=0), "the train step")
    s = step(state(), jax.tree.map(jnp.asarray, first))
    with pytest.raises(Recompiled, match=r"the train step was compiled again at call 2 \(jit\(.*\)\): " + said):
        step(s, jax.tree.map(jnp.asarray, second))


def test_weak_types_and_shardings_are_told_apart():
    mesh = sharding.make_mesh({"data": 2})
    x = sharding.put_batch({"x": np.ones(4, np.float32)}, mesh)
    step = counted(make(), "the step")
    step({"w": sharding.replicate(jnp.float32(1), mesh)}, x)
    with pytest.raises(Recompiled, match=r"state/w was float32\[\] over .*, now float32\[\] weakly typed over"):
        step({"w": sharding.replicate(jnp.asarray(1.0), mesh)}, x)
    step = counted(make(), "the step")
    step({"w": sharding.replicate(jnp.float32(1), mesh)}, x)
    with pytest.raises(Recompiled, match=r"batch/x was float32\[4\] over .*'data'.*, now float32\[4\] over P.*\(\) on"):
        step({"w": sharding.replicate(jnp.float32(1), mesh)}, sharding.replicate({"x": np.ones(4, np.float32)}, mesh))


def test_a_changed_closure_is_said_to_be_one():
    fn = make()
    step = counted(fn, "the step")
    step(state(), {"x": jnp.ones(3)})
    fn.clear_cache()
    with pytest.raises(Recompiled, match="its arguments are alike"):
        step(state(), {"x": jnp.ones(3)})


def test_planned_compilations_pass_and_what_is_not_jitted_is_left_alone():
    step = counted(make(), "the step", planned=2)
    step(state(), {"x": jnp.ones(3)})
    step(state(), {"x": jnp.ones(4)})
    with pytest.raises(Recompiled):
        step(state(), {"x": jnp.ones(5)})

    def plain(x):
        return jnp.ones(x)

    assert counted(plain, "plain") is plain


def test_programs_of_others_do_not_count():
    step = counted(make(), "the step")
    step(state(), {"x": jnp.ones(3)})
    before = len(programs())
    jax.jit(lambda x: x * 17 + 3)(jnp.ones(3))
    assert len(programs()) > before
    step(state(), {"x": jnp.ones(3)})


def test_it_is_a_bug_by_its_exit_code(tmp_path, capsys):
    def work():
        raise Recompiled("the train step was compiled again")

    assert exits.guard(work, tmp_path, "python -m x") == 70
    assert "the train step was compiled again" in capsys.readouterr().err
