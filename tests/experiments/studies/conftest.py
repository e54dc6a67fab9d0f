"""Studies are few, large programs: at test size compiling is nearly all of their time. They are asked for by `pytest -m slow`."""

from functools import partial
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def quick_compile(monkeypatch):
    """Programs that a study compiles are not optimised."""
    monkeypatch.setattr(jax, "jit", partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0}))
