"""The plan on simulated devices: what it reads from HLO, how it lays out, and that it is the step that trains."""

import json
import shlex

import jax
import pytest

from experiments import common
from experiments.plan import __main__ as command
from experiments.plan import compile as compiler
from experiments.plan import cost, hlo, machine, suggest, wire
from experiments.plan.plan import STAGES, divided, laid_out, made
from experiments.plan.work import flops_of
from jaxllm import settings
from jaxllm.core.types import UserError
from jaxllm.train.chips import Chip

STARTED = ("sft", "reward", "dpo", "kto", "ppo", "grpo")
SMALL = {"model.d_model": 32, "model.n_heads": 2, "model.d_ff": 64, "vocab_size": 256, "batch_size": 8, "data.length": 16}

HLO = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner_cond (p: (u32[], bf16[4,8])) -> pred[] {
  %limit = u32[] constant(8)
  %p = (u32[], bf16[4,8]) parameter(0)
  %i = u32[] get-tuple-element(%p), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%inner_body (p.1: (u32[], bf16[4,8])) -> (u32[], bf16[4,8]) {
  %two = u32[] constant(2)
  %p.1 = (u32[], bf16[4,8]) parameter(0)
  %i.1 = u32[] get-tuple-element(%p.1), index=0
  %x = bf16[4,8] get-tuple-element(%p.1), index=1
  %send = (bf16[4,8], bf16[4,8], u32[], u32[]) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %got = bf16[4,8] collective-permute-done(%send)
  %next = u32[] add(%i.1, %two)
  ROOT %out = (u32[], bf16[4,8]) tuple(%next, %got)
}

%part.1 (q: f32[2,8]) -> f32[16,8] {
  %q = f32[2,8] parameter(0)
  ROOT %g.1 = f32[16,8] all-gather(%q), channel_id=7, replica_groups=mesh['a'=8,'b'=2] {'a'}, dimensions={0}
}

%part.2 (r: f32[2,8]) -> f32[16,8] {
  %r = f32[2,8] parameter(0)
  ROOT %g.2 = f32[16,8] all-gather(%r), channel_id=7, replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}
}

%outer_cond (s: (s32[], f32[2,8])) -> pred[] {
  %s = (s32[], f32[2,8]) parameter(0)
  %j = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(99)
  ROOT %lt = pred[] compare(%j, %end), direction=LT
}

%outer_body (s.1: (s32[], f32[2,8])) -> (s32[], f32[2,8]) {
  %s.1 = (s32[], f32[2,8]) parameter(0)
  %start = f32[16,8] fusion(%s.1), kind=kCustom, calls=%part.1, metadata={op_name="jit(step)/jvp()/while/body/dot_general"}
  %loop = (u32[], bf16[4,8]) while(%s.1), condition=%inner_cond, body=%inner_body
  %done = f32[16,8] fusion(%start), kind=kCustom, calls=%part.2
  %shard = f32[1,8] reduce-scatter(%done), channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}, to_apply=%add
  ROOT %again = (s32[], f32[2,8]) tuple(%s.1, %s.1)
}

%all-reduce-scatter.1 (t: f32[16,8]) -> f32[2,8] {
  %t = f32[16,8] parameter(0)
  %zero = s32[] constant(0)
  %all = f32[16,8] all-reduce(%t), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %mine = f32[2,8] dynamic-slice(%all, %zero, %zero), dynamic_slice_sizes={2,8}
}

ENTRY %main (w: f32[2,8]) -> f32[64] {
  %w = f32[2,8] parameter(0)
  %layers = (s32[], f32[2,8]) while(%w), condition=%outer_cond, body=%outer_body, backend_config={"known_trip_count":{"n":"6"}}
  %ag = (f32[8], f32[64]) all-gather-start(%w), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7},{8,9,10,11,12,13,14,15}}
  %agd = f32[64] all-gather-done(%ag), metadata={op_name="jit(step)/transpose(jvp())/mul"}
  %own = f32[2,8] fusion(%agd), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %ar = f32[64] all-reduce(%agd), channel_id=5, replica_groups=[1,16]<=[16], to_apply=%add
}
"""


def test_collectives_of_nested_loops():
    found = sorted((c.kind, c.group, c.size, c.dtype, c.times) for c in wire.collectives(HLO))
    assert found == [
        ("all-gather", 8, 256.0, "f32", 1.0),
        ("all-gather", 8, 512.0, "f32", 6.0),  # two parts of one, in fusions, once a layer
        ("all-reduce", 16, 256.0, "f32", 1.0),
        ("collective-permute", 2, 64.0, "bf16", 24.0),  # 6 layers, 4 times: to 8 by steps of 2
        ("reduce-scatter", 8, 256.0, "f32", 6.0),
        ("reduce-scatter", 8, 512.0, "f32", 1.0),  # an all-reduce and a slice in one
    ]
    received = {c.kind: c.received for c in wire.collectives(HLO) if c.times != 1 or c.kind == "all-reduce"}
    assert received == {
        "all-reduce": 2 * 256 * 15 / 16, "all-gather": 6 * 512 * 7 / 8, "collective-permute": 24 * 64,
        "reduce-scatter": 6 * 256 * 7 / 8,
    }  # fmt: skip


def test_largest_buffers_and_their_origin():
    rows = hlo.largest(HLO)
    assert [row[1] for row in rows] == ["f32[16,8]", "f32[64]"]
    assert hlo.words(rows[0][2]) == "forward, in the loop over layers or chunks: dot_general"
    assert hlo.words(rows[1][2]) == "backward: mul"


def config_of(experiment, **changes):
    config = settings.load_config(settings.config_path(experiment))
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def eight():
    return machine.find("", 8)


@pytest.mark.parametrize("experiment", sorted(STAGES))
def test_every_stage_is_laid_out_and_traced(experiment, eight):
    config = config_of(experiment, **({"lora.rank": 4} if experiment in ("sft", "ppo") else {}))
    own, changes, stage, sizes, _ = laid_out(config, experiment, "tiny" if experiment in STARTED else "", eight)
    assert sizes["fsdp"] == 8 and changes["mesh.fsdp"] == 8
    with compiler.open_mesh(own, sizes, eight) as mesh:
        state, _ = compiler.state_of(stage, mesh)
        traced = compiler.train_step(stage, own.accumulate, mesh)
        assert cost.minimum(stage, mesh, own.accumulate) > 0
    assert jax.tree.structure(traced.out_info[0]) == jax.tree.structure(state)
    assert "loss" in traced.out_info[1]
    executed, work = cost.executed_flops(traced.jaxpr.jaxpr), sum(map(flops_of, stage.work))
    # products of a mixture's experts are ragged ones, which the trace does not count; the tiny models count full attention
    assert 0.7 * work < executed < 1.6 * work


def test_the_state_lies_as_in_training(eight):
    own, _, stage, sizes, _ = laid_out(config_of("pretrain", **SMALL), "pretrain", "", eight)
    with compiler.open_mesh(own, sizes, eight) as mesh:
        state, _ = compiler.state_of(stage, mesh)
        params = common.born_sharded(stage.model.specs, 0, mesh)
        real, _ = common.new_state({"policy": params}, stage.tx, mesh)
    for planned, there in zip(jax.tree.leaves(state), jax.tree.leaves(real), strict=True):
        assert planned.shape == there.shape and planned.dtype == there.dtype
        assert planned.sharding.is_equivalent_to(there.sharding, there.ndim)


def test_a_plan_from_the_command_line(tmp_path, capsys, monkeypatch):
    out = tmp_path / "plan.json"
    for name in machine.QUIET:
        monkeypatch.setenv(name, "")
    over = [f"--config.{name}={value}" for name, value in SMALL.items()]
    command.run(["--config=configs/pretrain.py", *over, "--config.batch_size=12", "--simulate=8", f"--out={out}"])
    printed, plan = capsys.readouterr().out, json.loads(out.read_text())
    assert plan["fits"] and plan["asked_fits"] and plan["mesh"]["fsdp"] == 8 and plan["compile_seconds"] > 0
    weights = 1 + sum(plan["received"].values())
    assert weights > 1 and plan["memory"]["parameters"] * 2 < plan["memory"]["optimizer"] + 8
    assert "batch_size 12 does not divide over 8: planned with 16" in printed
    words = shlex.split(plan["command"])
    assert words[:4] == ["python", "-m", "experiments.pretrain", "--config=configs/pretrain.py"]
    assert "--config.batch_size=16" in words and "--config.mesh.fsdp=8" in words and "--config.model.d_model=32" in words
    # what it prints is a command that the experiment takes
    parsed = settings.parse(words[3:], "pretrain", {})
    assert parsed.config.batch_size == 16 and parsed.config.mesh.fsdp == 8


def test_a_rollout_is_part_of_the_plan(eight):
    config = config_of("grpo", **{"batch_size": 8, "group": 2, "max_prompt": 8, "max_new_tokens": 8, "lora.rank": 2})
    plan = made(config, "grpo", "tiny", eight)
    assert plan.program.fits and plan.rollout.fits
    # adapters leave the start in place: nothing lies beside the step, and the rollout has merged weights of its own
    assert plan.shares["beside the step"] == 0
    assert plan.peak > plan.rollout.arguments + plan.shares["parameters"] + plan.shares["optimizer"]
    whole = laid_out(config_of("grpo"), "grpo", "tiny", eight)[2]
    assert list(whole.held) == ["reference"]


def small_chip(eight, memory):
    return machine.Machine("a small chip", eight.devices, Chip("small", 1e12, memory, 1e11, 4, 1e9, 1e9), 1.0, 4e9)


def test_what_does_not_fit_gets_the_first_change_that_does(eight):
    config = config_of("pretrain", **{**SMALL, "batch_size": 64, "data.length": 64, "model.remat": "full"})
    plan, said = made(config, "pretrain", "", small_chip(eight, 1e12)), []
    assert plan.fits(small_chip(eight, 1e12)) and 0 < plan.prediction.mfu < 1
    chip = small_chip(eight, 0.9 * plan.peak / 0.95)
    assert not plan.fits(chip)
    better = suggest.first_that_fits(plan, config, "pretrain", "", chip, said.append)
    assert better.fits(chip) and better.changes["accumulate"] in (2, 8) and "fits" in said[-1]
    assert suggest.first_that_fits(plan, config, "pretrain", "", small_chip(eight, 1000), said.append) is None


def test_depth_does_not_change_the_program(eight):
    sizes = []
    for layers in (4, 16):
        config = config_of("pretrain", **SMALL, **{"model.n_layers": layers, "model.unroll": False})
        own, _, stage, mesh_sizes, _ = laid_out(config, "pretrain", "", eight)
        with compiler.open_mesh(own, mesh_sizes, eight) as mesh:
            sizes.append(len(compiler.train_step(stage, 1, mesh).lower().as_text()))
    assert sizes[1] < 1.3 * sizes[0]


def test_batches_divide():
    assert divided(32, 32, 16) == 32 and divided(48, 48, 32) == 64 and divided(8, 8, 64) == 64
    # 16 prompts, 8 completions of each in 2 minibatches: 64 rows an update
    assert divided(16, 64, 8) == 16 and divided(20, 5, 8) == 32


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        ({}, 8, {"fsdp": 8, "data": 1}), ({"tensor": 2}, 8, {"tensor": 2, "fsdp": 4, "data": 1}), ({"fsdp": 4}, 8, "fsdp=4"),
        ({"tensor": 3}, 8, "product of 3"), ({"fsdp": 2, "data": 2}, 8, "product of 4"), ({"tensor": 16}, 8, "tensor=8"),
    ],
)  # fmt: skip
def test_meshes(mesh, devices, expected, eight):
    config = config_of("pretrain", **{f"mesh.{axis}": n for axis, n in mesh.items()}, **SMALL)
    specs = STAGES["pretrain"](config, "").specs
    if isinstance(expected, dict):
        assert compiler.mesh_sizes(config, specs, devices) == expected
    elif mesh == {"fsdp": 4}:
        assert compiler.mesh_sizes(config, specs, devices) == {"fsdp": 4, "data": 2}
    else:
        with pytest.raises(UserError, match=expected):
            compiler.mesh_sizes(config, specs, devices)


def test_what_fsdp_cannot_divide_goes_to_data(eight):
    config = config_of("pretrain", **{**SMALL, "model.d_model": 36, "model.head_dim": 16})
    assert compiler.mesh_sizes(config, STAGES["pretrain"](config, "").specs, 8) == {"fsdp": 4, "data": 2}


@pytest.mark.parametrize(
    ("topology", "near"),
    [("v5e:3x3", "v5e:2x4"), ("v5p:5x5x3", "v5p:4x4x4"), ("v9:2x2", "v5e:4x4"), ("h100", "v4, v5e")],
)
def test_the_nearest_topology(topology, near):
    assert near in machine.nearest(topology)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name the hardware"),
        (["--simulate=8", "--topology=v5e:4x4"], "not both"),
        (["--simulate=4000"], "8 CPU devices"),
        (["--simulate=8", "--config=configs/lstm.py"], "no plan for it, choose one of pretrain"),
        (["--simulate=8", "--config=configs/dpo.py"], "--model=llama3.2-1b"),
        (["--simulate=8", "--config=configs/dpo.py", "--model=llama"], "unknown model preset"),
        (["--simulate=8", "--config.stepz=3"], "steps"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys, monkeypatch):
    for name in machine.QUIET:
        monkeypatch.setenv(name, "")
    with pytest.raises(SystemExit) as stop:
        command.run(arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


@pytest.mark.slow
def test_a_topology_that_is_not_there(tmp_path):
    pytest.importorskip("libtpu")
    machine.prepare({"topology": "v5e:2x2", "simulate": 0})
    chips = machine.find("v5e:2x2", 0)
    plan = made(config_of("pretrain", **SMALL), "pretrain", "", chips)
    assert plan.fits(chips) and plan.prediction.step > 0 and plan.least / 2 < sum(plan.received.values()) < 2 * plan.least
    with pytest.raises(UserError, match="no such topology; the nearest is v5e:2x4"):
        machine.find("v5e:3x3", 0)
