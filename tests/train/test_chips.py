"""The table of chips by the names that JAX gives devices."""

from types import SimpleNamespace

import pytest

from jaxllm.train import chips


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v5p", "v5p"), ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)  # fmt: skip
def test_devices_are_known(kind, name):
    assert chips.of(kind) is chips.CHIPS[name]


def test_others_are_not():
    assert chips.of("cpu") is None and chips.of("TPU v3") is None


def test_the_table_is_of_one_order():
    for chip in chips.CHIPS.values():
        assert 1e14 < chip.peak < 1e16 and 2**33 < chip.memory < 2**38 and chip.memory < chip.bandwidth < chip.peak
        assert chip.network < chip.wire < chip.bandwidth


def test_a_core_is_a_part_of_a_chip():
    core = SimpleNamespace(platform="tpu", num_cores=1)
    assert chips.share(core, chips.CHIPS["v4"]) == 0.5 and chips.share(core, chips.CHIPS["v5e"]) == 1.0
    assert chips.share(SimpleNamespace(platform="gpu"), chips.CHIPS["H200"]) == 1.0
