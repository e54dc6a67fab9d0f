"""The least recomputation that fits, from the sizes of compiled steps."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from configs import pretrain
from experiments import auto_remat, common, memory
from jaxllm.core import spec
from jaxllm.core.types import UserError
from jaxllm.models import decoder
from jaxllm.models.encdec import EncDecConfig
from jaxllm.train import fit_memory

SIZES = {"none": 8.0, "dots": 4.0, "attention": 2.0, "full": 1.0}


def test_the_first_that_fits_and_no_more_compilations():
    asked = []

    def size(name):
        asked.append(name)
        return SIZES[name]

    assert fit_memory.least(list(SIZES), size, 4.0) == ("dots", {"none": 8.0, "dots": 4.0})
    assert asked == ["none", "dots"]
    assert fit_memory.least(list(SIZES), size, 100.0)[0] == "none"
    with pytest.raises(UserError, match=r"with remat=full, the device has 0.00 GiB: raise config.accumulate"):
        fit_memory.least(list(SIZES), size, 0.5)


def test_the_limit_of_a_device():
    gpu = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 7}, device_kind="NVIDIA H200", platform="gpu")
    assert fit_memory.limit_of(gpu) == 7
    tpu = SimpleNamespace(memory_stats=lambda: None, device_kind="TPU v5 lite", platform="tpu", num_cores=1)
    assert fit_memory.limit_of(tpu) == 16 * 2**30
    assert fit_memory.limit_of(jax.devices()[0]) is None  # a CPU


def settings():
    c = pretrain.get_config()
    c.batch_size, c.data.length, c.model.remat = 4, 64, "auto"
    c.model.update(d_model=16, n_layers=4, n_heads=2, n_kv_heads=2, head_dim=8, d_ff=48, unroll=False)
    return c


def test_auto_takes_the_first_policy_whose_step_fits(monkeypatch):
    config = settings()
    assert common.model_config(config, decoder.DecoderConfig, 50).remat == "none"  # no limit is known here
    auto_remat.chosen.clear()
    plain = replace(common.model_config(config, decoder.DecoderConfig, 128), remat="none")
    sizes = {name: auto_remat.step_bytes(config, replace(plain, remat=name)) for name in ("none", "dots")}
    assert sizes["dots"] < sizes["none"]
    auto_remat.chosen.clear()
    monkeypatch.setattr(fit_memory, "limit_of", lambda _: (sizes["none"] + sizes["dots"]) / 2)
    monkeypatch.setattr(auto_remat, "step_bytes", lambda _, c: sizes[c.remat])  # each compiled once above
    found = common.model_config(config, decoder.DecoderConfig, 50)
    assert (found.remat, found.vocab_size) == ("dots", 50)
    notes = []
    auto_remat.note(config, SimpleNamespace(note=notes.append))
    assert len(notes) == 1 and notes[0].startswith("remat: dots, the first that fits into 0.00 GiB (GiB a device: none 0.0")
    auto_remat.chosen.clear()


def test_auto_is_refused_where_it_is_not_wired():
    config = settings()
    with pytest.raises(UserError, match="model.remat='auto' is for decoders and encoders; here choose one of none, dots"):
        auto_remat.resolve(config, EncDecConfig(vocab_size=50))


def test_the_hosts_room_is_what_the_limits_leave():
    resource = pytest.importorskip("resource")
    room = fit_memory.host_room()
    if room is None:
        pytest.skip("this system says nothing of its memory")
    assert 0 < room < 2**45
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**27, old[1]))
    try:
        limited = fit_memory.host_room()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)
    assert limited <= min(room * 2, 2**27) and limited > 2**26


def test_the_memory_of_a_step_is_counted_by_device_and_by_micro_batch():
    config = settings()
    config.model.remat = "none"
    config.gates = True
    model = decoder.make(common.model_config(config, decoder.DecoderConfig, 128))
    whole = memory.needed(config, memory.Step(model))
    count = 4.0 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: spec.init(model.specs, jax.random.key(0)))))
    assert whole.parameters == whole.gradients == count and whole.optimizer == pytest.approx(2 * count, rel=0.01)
    config.accumulate = 4
    quarter = memory.needed(config, memory.Step(model))
    assert quarter[:3] == whole[:3] and quarter.activations == pytest.approx(whole.activations / 4, rel=0.2)
    config.accumulate, config.mesh.fsdp = 1, 4
    split = memory.needed(config, memory.Step(model))
    assert split.parameters < 0.5 * whole.parameters and split.activations < 0.3 * whole.activations
    frozen = memory.needed(config, memory.Step(model, trainable="^policy/embed"))
    assert frozen.gradients < split.gradients and frozen.parameters == split.parameters


def test_a_step_that_fits_needs_at_least_what_is_counted():
    """The count is a bound from below: what is refused does not fit."""
    config = settings()
    config.model.remat = "none"
    model = decoder.make(common.model_config(config, decoder.DecoderConfig, 128))
    assert sum(memory.needed(config, memory.Step(model))) <= auto_remat.step_bytes(config, model.config)
