"""Eight simulated CPU devices, a persistent compilation cache and strict rank promotion for every test."""

import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache" / "jaxllm" / "xla-tests"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).resolve().parents[1]


def shared_data(relpath: str) -> Path:
    """A file of the real test data; skips the test where the data is absent."""
    path = Path(os.environ.get("JAXLLM_SHARED", ROOT.parent / "shared")) / "data" / relpath
    if not path.exists():
        pytest.skip(f"real data not here: {relpath}")
    return path
