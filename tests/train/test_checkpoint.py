"""Checkpoints: exact, restorable without jaxllm and on another mesh, and never silently damaged."""

import errno
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxllm.core import sharding
from jaxllm.core.types import TrainState, UserError
from jaxllm.train import checkpoint, manifest


def make(step, scale=1.0):
    """A state with odd shapes, several dtypes and values that identify their step."""
    x = np.arange(24, dtype=np.float32).reshape(4, 6) * scale + step
    params = {"policy": {"w": jnp.asarray(x), "half": jnp.asarray(x[:, :2], jnp.bfloat16)}}
    return TrainState(
        jnp.int32(step), params, {"mu": jax.tree.map(jnp.zeros_like, params), "count": jnp.int32(step)}
    )


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert [x.dtype for x in jax.tree.leaves(a)] == [x.dtype for x in jax.tree.leaves(b)]


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints of steps 2 and 4, and its warnings."""
    with_steps(tmp_path, 2, 4)
    return tmp_path


def with_steps(workdir, *steps, keep=5):
    opened = checkpoint.open_checkpoints(workdir, keep=keep)
    for step in steps:
        opened.save(make(step), {"seed": 1, "step": step}, {"config": {"a": [1, 2]}})
    opened.close()


def reopen(workdir, like=None):
    warnings = []
    opened = checkpoint.open_checkpoints(workdir, warn=warnings.append)
    try:
        return opened.restore(make(0) if like is None else like), warnings
    finally:
        opened.close()


def test_what_is_saved_is_restored_exactly(run):
    (state, data, meta), warnings = reopen(run)
    equal(state, make(4))
    assert data == {"seed": 1, "step": 4} and meta == {"config": {"a": [1, 2]}, "step": 4} and not warnings
    assert {p.name for p in (run / "checkpoints" / "4").iterdir() if p.is_dir()} >= {
        "params",
        "opt_state",
        "data",
        "meta",
    }
    assert checkpoint.newest_meta(run, step=2)["step"] == 2


def test_an_empty_directory_restores_nothing(tmp_path):
    assert reopen(tmp_path)[0] is None
    with pytest.raises(UserError, match="no a?.*checkpoint.*there is none"):
        checkpoint.restore_params(tmp_path)


def test_keep_bounds_what_stays(tmp_path):
    with_steps(tmp_path, 1, 2, 3, 4, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()) == ["3", "4"]


def test_params_restore_alone_and_by_step(run):
    params, meta = checkpoint.restore_params(run)
    equal(params, make(4).params)
    assert meta["step"] == 4
    equal(checkpoint.restore_params(run, step=2)[0], make(2).params)
    with pytest.raises(UserError, match=r"no checkpoint 3.*it has steps \[2, 4\]"):
        checkpoint.restore_params(run, step=3)


def test_params_restore_with_plain_orbax_in_three_lines(run):
    import orbax.checkpoint as ocp

    params = ocp.StandardCheckpointer().restore(run / "checkpoints" / "4" / "params")
    equal(params, make(4).params)


def test_restore_on_another_mesh(tmp_path):
    def placed(state, **sizes):
        mesh = sharding.make_mesh(sizes)
        split, whole = NamedSharding(mesh, P("fsdp", "tensor")), NamedSharding(mesh, P())
        return jax.tree.map(lambda x: jax.device_put(x, split if x.ndim == 2 else whole), state)

    opened = checkpoint.open_checkpoints(tmp_path)
    opened.save(placed(make(3), fsdp=2, tensor=2), {}, {})
    opened.close()
    like = placed(make(0), fsdp=4)
    (state, _, _), _ = reopen(tmp_path, like)
    equal(state, make(3))
    assert state.params["policy"]["w"].sharding == like.params["policy"]["w"].sharding
    assert state.params["policy"]["w"].addressable_shards[0].data.shape == (1, 6)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like.params
    )
    params, _ = checkpoint.restore_params(tmp_path, like=abstract)
    assert params["policy"]["w"].sharding == like.params["policy"]["w"].sharding
    equal(checkpoint.restore_params(tmp_path)[0], make(3).params)  # and on one device, from the mesh's files


def test_buffers_may_be_donated_right_after_saving(tmp_path):
    state = TrainState(jnp.int32(1), {"w": jnp.ones((512, 512))}, {"m": jnp.zeros((512, 512))})
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = step(state)
    opened = checkpoint.open_checkpoints(tmp_path)
    opened.save(state, {}, {})
    for _ in range(5):
        state = step(state)
    opened.close()
    (restored, _, _), _ = reopen(tmp_path, state)
    assert int(restored.step) == 2 and float(state.params["w"][0, 0]) == 7
    assert (np.asarray(restored.params["w"]) == 2).all() and (np.asarray(restored.opt_state["m"]) == 1).all()


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(directory):
    file = largest_file(directory)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(directory):
    file = largest_file(directory)
    file.write_bytes(file.read_bytes()[:-1])


def delete(directory):
    largest_file(directory).unlink()


def drop_item(directory):
    shutil.rmtree(directory)


DAMAGE = [(flip, "crc32"), (truncate, "bytes, expected"), (delete, "is missing"), (drop_item, "is missing")]


@pytest.mark.parametrize("harm,says", DAMAGE, ids=[f.__name__ for f, _ in DAMAGE])
def test_a_damaged_checkpoint_is_moved_aside_and_the_older_one_used(run, harm, says):
    harm(run / "checkpoints" / "4" / "params")
    (state, data, _), warnings = reopen(run)
    equal(state, make(2))
    assert data["step"] == 2
    assert len(warnings) == 1 and says in warnings[0] and "4.corrupt" in warnings[0]
    assert (run / "checkpoints" / "4.corrupt").is_dir() and not (run / "checkpoints" / "4").exists()


@pytest.mark.parametrize("item", ["opt_state", "data", "meta"])
def test_every_item_is_checked(run, item):
    flip(run / "checkpoints" / "4" / item)
    (state, _, _), warnings = reopen(run)
    assert int(state.step) == 2 and len(warnings) == 1 and f"{item}/" in warnings[0]


def test_training_goes_on_after_damage_and_saves_that_step_again(run):
    flip(run / "checkpoints" / "4" / "params")
    warnings = []
    opened = checkpoint.open_checkpoints(run, keep=2, warn=warnings.append)
    assert int(opened.restore(make(0))[0].step) == 2
    opened.save(make(4, scale=2.0), {"step": 4}, {})
    opened.save(make(6), {"step": 6}, {})
    opened.close()
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "6"]
    equal(checkpoint.restore_params(run, step=4)[0], make(4, scale=2.0).params)


def test_when_all_are_damaged_nothing_is_trained_on(run):
    for step in ("2", "4"):
        flip(run / "checkpoints" / step / "params")
    with pytest.raises(UserError, match=r"all of \[2, 4\] are damaged.*--workdir") as error:
        reopen(run)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_manifest_is_used(run):
    """Committed by Orbax, killed before the manifest was written."""
    (run / "checkpoints" / "4" / checkpoint.MANIFEST).unlink()
    (state, _, _), warnings = reopen(run)
    assert int(state.step) == 4 and not warnings
    with_steps(run, 6)
    assert (run / "checkpoints" / "4" / checkpoint.MANIFEST).exists()


def test_another_architecture_is_refused_with_its_paths(run):
    like = jax.eval_shape(lambda: {"policy": {"w": jnp.zeros((4, 7)), "new": jnp.zeros(3)}})
    with pytest.raises(UserError) as error:
        checkpoint.restore_params(run, like=like)
    message = str(error.value)
    assert "policy/w: here (4, 7), there (4, 6)" in message and "policy/new: here (3,), there None" in message
    assert "policy/half" in message and "3 differ" in message and "\n" not in message


def test_a_step_that_its_run_deletes_while_another_looks_is_no_damage(run, monkeypatch):
    """A reader (chat, the next stage) beside a run that goes on: the step it checks may go because there is a newer one."""
    directory, damage = run / "checkpoints", manifest.damage

    def gone(step):
        if step.name == "4" and step.exists():
            with_steps(run, 6, keep=1)
        return damage(step)

    monkeypatch.setattr(manifest, "damage", gone)
    warnings = []
    assert manifest.newest_whole(directory, warnings.append) == 6 and not warnings
    assert not list(directory.glob("*.corrupt"))


def test_a_file_that_the_disk_cannot_read_is_damage(run, monkeypatch):
    def broken(file):
        raise OSError(errno.EIO, "Input/output error")

    assert manifest.damage(run / "checkpoints" / "4") is None
    monkeypatch.setattr(manifest, "crc", broken)
    assert manifest.damage(run / "checkpoints" / "4").endswith(" cannot be read (Input/output error)")


# ---- disks, flips and digests


def one_of(directory, rng):
    """A random file of a step and a random bit of it, by size: every bit is as likely."""
    files = sorted(p for p in directory.rglob("*") if p.is_file() and p.stat().st_size)
    sizes = np.array([p.stat().st_size for p in files])
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    return file, int(rng.integers(8 * file.stat().st_size))


def test_fifty_of_fifty_single_bits_are_found_and_the_file_is_named(run):
    """Also in MANIFEST.json itself. A directory that is as it was is whole again."""
    step, rng = run / "checkpoints" / "4", np.random.default_rng(0)
    found = []
    for _ in range(50):
        file, bit = one_of(step, rng)
        before = file.read_bytes()
        content = bytearray(before)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        found.append((str(file.relative_to(step)), manifest.damage(step)))
        file.write_bytes(before)
        assert manifest.damage(step) is None
    assert len(found) == 50 and all(said is not None for _, said in found)
    assert all(name in said for name, said in found if name != manifest.MANIFEST)
    assert len({name for name, _ in found}) > 5


def test_the_last_verified_step_always_stays(tmp_path):
    with_steps(tmp_path, 1, 2, 3, keep=1)
    directory = tmp_path / "checkpoints"
    assert manifest.steps_of(directory) == [3]
    (directory / "9").mkdir()  # committed, say, but without its checksums
    manifest.trim(directory, 1)
    assert manifest.steps_of(directory) == [3, 9]
    manifest.make_room(directory)
    assert manifest.steps_of(directory) == [3]
    manifest.make_room(directory)
    assert manifest.steps_of(directory) == [3]


def test_what_a_stopped_save_left_is_removed_and_said(tmp_path):
    left = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp" / "params"
    left.mkdir(parents=True)
    (tmp_path / "checkpoints" / "2.deleted").mkdir()
    restored, warnings = reopen(tmp_path)
    assert restored is None and not list((tmp_path / "checkpoints").iterdir())
    assert len(warnings) == 1 and "first checkpoint was not complete" in warnings[0] and "4.orbax-checkpoint-tmp" in warnings[0]


def test_digests_tell_every_part_of_a_checkpoint(run, tmp_path_factory):
    same, other, moments = (tmp_path_factory.mktemp(n) for n in ("same", "other", "moments"))
    with_steps(same, 4)
    assert checkpoint.digest(run) == checkpoint.digest(same) != checkpoint.digest(run, step=2)
    for workdir, state, data in (
        (other, make(4), {"seed": 2, "step": 4}),
        (moments, make(4).replace(opt_state={**make(4).opt_state, "count": jnp.int32(5)}), {"seed": 1, "step": 4}),
    ):
        opened = checkpoint.open_checkpoints(workdir)
        opened.save(state, data, {})
        opened.close()
        assert checkpoint.digest(workdir) != checkpoint.digest(run)


class Disk:
    """Stands for a disk with so many free bytes."""

    def __init__(self, free):
        self.free = free


@pytest.fixture
def disk(monkeypatch):
    here = Disk(10**12)
    monkeypatch.setattr(manifest, "room", lambda directory: here.free)
    return here


def test_a_run_that_cannot_hold_its_checkpoints_does_not_begin(tmp_path, disk):
    disk.free = 100
    with pytest.raises(OSError, match=r"checkpoints need about 502 B, 100 B are free under .*checkpoints") as error:
        reopen(tmp_path)
    assert error.value.errno == errno.ENOSPC


def test_on_a_full_disk_the_oldest_goes_and_the_save_is_made_again(run, disk):
    warnings = []
    opened = checkpoint.open_checkpoints(run, keep=5, warn=warnings.append)
    disk.free = 10
    opened.save(make(6), {"step": 6}, {})
    assert opened.again(True)  # it has failed, step 2 has gone, and it should be made again
    assert manifest.steps_of(run / "checkpoints") == [4] and "deleted 2" in warnings[0] and "10 B are free" in warnings[0]
    disk.free = 10**12
    opened.save(make(6), {"step": 6}, {})
    opened.close()
    assert manifest.steps_of(run / "checkpoints") == [4, 6] and len(warnings) == 1
    equal(checkpoint.restore_params(run)[0], make(6).params)


def test_a_disk_that_stays_full_lets_training_go_on_and_is_an_error_at_the_end(run, disk):
    warnings = []
    opened = checkpoint.open_checkpoints(run, warn=warnings.append)
    disk.free = 10
    for step in (6, 8):
        opened.save(make(step), {}, {})
        assert opened.again(True)
        opened.save(make(step), {}, {})
        assert not opened.again(True)  # given up until the next one
    assert "TRAINING GOES ON" in warnings[1] and manifest.steps_of(run / "checkpoints") == [4]
    opened.save(make(10), {}, {})
    assert opened.again(True)
    with pytest.raises(OSError, match="could not be written") as error:
        opened.close()
    assert error.value.errno == errno.ENOSPC
    equal(checkpoint.restore_params(run)[0], make(4).params)


def test_three_saves_in_a_row_end_it(run, disk):
    opened = checkpoint.open_checkpoints(run, warn=lambda text: None)
    disk.free = 10
    with pytest.raises(OSError, match="3 saves in a row have failed"):
        for step in range(6, 20):
            opened.save(make(step), {}, {})
            opened.again(True)


def test_an_error_that_is_not_about_room_is_not_swallowed(run, monkeypatch):
    opened = checkpoint.open_checkpoints(run)
    monkeypatch.setattr(manifest, "write", lambda root: 1 / 0)
    opened.save(make(6), {}, {})
    with pytest.raises(ZeroDivisionError):
        opened.again(True)
    opened.close()
