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


def device(platform, kind, memory=None):
    return SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: memory and {"bytes_limit": memory})


TPU, CPU = device("tpu", "TPU v5 lite", 15.75 * 2**30), device("cpu", "cpu")


def test_a_notebook_says_what_it_runs_on():
    here = {"on_colab": True, "drive": True}
    assert chips.device_check([TPU], "0.10.2", **here) == [
        "✓ TPU v5 lite x1 (15.75 GiB) · jax 0.10.2 · libtpu ok · bf16 peak 197 TFLOP/s"
    ]
    assert chips.device_check([CPU] * 8, "0.10.2", on_colab=False, drive=False) == ["✓ CPU x8 · jax 0.10.2"]
    assert chips.device_check([CPU], "0.10.2", **here, simulated=True) == ["✓ CPU x1 · jax 0.10.2"]
    assert chips.device_check([device("gpu", "NVIDIA H100 80GB HBM3")], "0.10.2", **here) == [
        "✓ NVIDIA H100 80GB HBM3 x1 · jax 0.10.2 · bf16 peak 989 TFLOP/s"
    ]


def test_a_notebook_says_what_to_change_on_colab():
    no_tpu, disk = chips.device_check([CPU], "0.10.2", on_colab=True, drive=False)
    assert no_tpu.startswith("✗ No TPU: this notebook is on CPU. Runtime > Change runtime type > v5e-1 TPU, then run again.")
    assert (
        disk == "! Colab's disk is temporary: set WORKDIR='/content/drive/MyDrive/jaxllm' to keep checkpoints (Drive not mounted)"
    )
    (fixed,) = chips.device_check([TPU], "0.10.2", on_colab=True, drive=True)  # another runtime, and Drive mounted
    assert fixed.startswith("✓ TPU v5 lite x1")


def test_the_device_check_of_this_process(capsys):
    chips.print_device_check()
    assert capsys.readouterr().out.startswith("✓ CPU x8 · jax ")
