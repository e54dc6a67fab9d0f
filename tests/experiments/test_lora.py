"""Adapters through the life cycle: trained, resumed, loaded without their base, talked to, and a base themselves."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import chat, common, convert, reward, sft
from jaxllm import launch
from jaxllm.convert import safetensors
from jaxllm.core.tree import flatten
from jaxllm.core.types import UserError
from jaxllm.data import chat as chats
from jaxllm.generate.stream import make_streamer
from jaxllm.train import gates

LORA = {"lora.rank": 2, "lora.alpha": 4.0, "lora.match": "attention/(q|v)/kernel", "optim.lr": 1e-2}


@pytest.fixture(scope="module")
def settings(base, files):
    return {"steps": 2, "batch_size": 8, "data.path": files["chat"], "data.length": 32, "log_every": 1, "optim.warmup": 0,
            "init": str(base / "pretrain"), **LORA}  # fmt: skip


@pytest.fixture(scope="module")
def trained(base, settings, tmp_path_factory):
    """An SFT run with adapters whose base is gone."""
    root = tmp_path_factory.mktemp("lora")
    shutil.copytree(base / "pretrain", root / "pretrain")
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    launch.start(sft.main, "sft", {**settings, **mesh, "init": str(root / "pretrain")}, root / "sft")
    shutil.rmtree(root / "pretrain")
    return root / "sft"


def test_the_gates_are_in_the_log(trained):
    log = (trained / "log.txt").read_text()
    assert "moved: 4 of 4 trained leaves; no frozen leaf" in log


def test_it_loads_without_its_base(base, trained):
    start = flatten(launch.load(base, "pretrain").params["policy"])
    low, plain = launch.load(trained, merged=False), launch.load(trained)
    have = flatten(low.params["policy"])
    adapters = {p for p in have if p.startswith("lora/")}
    assert adapters == {f"lora/layers/attention/{n}/kernel/{x}" for n in "qv" for x in "ab"}
    assert all(np.array_equal(start[p], have[p]) for p in start) and all(have[p].any() for p in adapters)
    moved = {p for p, x in flatten(plain.params["policy"]).items() if not np.array_equal(x, start[p])}
    assert moved == {"layers/attention/q/kernel", "layers/attention/v/kernel"}
    assert plain.meta["lora"] == {"policy": {"rank": 2, "alpha": 4.0, "match": LORA["lora.match"], "scaling": "standard"}}
    tokens = jnp.asarray([[1, 5, 9, 30]])
    ours, merged = (jax.jit(x.model.apply)(x.params["policy"], tokens).hidden for x in (low, plain))
    assert float(jnp.abs(ours - merged).max()) < 1e-5 * float(jnp.abs(merged).max())
    assert "lora" not in plain.model.specs


def test_chat_reads_it(trained):
    loaded, shown = launch.load(trained), []
    key = jax.random.key(0)
    text = chat.reply(loaded, make_streamer(loaded.model, temperature=1.0), [{"role": "user", "content": "say cat"}], key, 4,
                      shown.append)  # fmt: skip
    assert isinstance(text, str) and chats.stop_ids(loaded.tokenizer)


def test_a_next_stage_starts_from_it(trained, settings, tmp_path):
    """With adapters again: fresh ones, beside the merged weights."""
    result = launch.start(sft.main, "sft", {**settings, "init": str(trained)}, tmp_path / "next")
    assert np.isfinite(result["metrics"]["eval/loss"])
    before, after = flatten(launch.load(trained).params["policy"]), flatten(launch.load(tmp_path / "next", merged=False).params)
    assert all(np.array_equal(x, after[f"policy/{p}"]) for p, x in before.items())


def test_adapters_go_to_peft_and_back(base, trained, tmp_path):
    """The base and the adapters, exported apart and joined again, are the merged run; so is the run exported whole."""
    convert.main(source=str(trained), target=str(tmp_path / "adapter"), adapter=True)
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    card = (tmp_path / "adapter" / "README.md").read_text()
    size = sum(safetensors.view(tensor).size for tensor in safetensors.scan(tmp_path / "adapter").values())
    assert "library_name: peft" in card and f": {size:,} numbers, for a `LlamaForCausalLM`" in card
    assert f"--source={trained.parent / 'pretrain'} --target=BASE" in card and "base_model" not in card
    convert.main(source=str(base), stage="pretrain", target=str(tmp_path / "base"))
    convert.main(source=str(tmp_path / "adapter"), base=str(tmp_path / "base"), target=str(tmp_path / "run"), kind="sft")
    convert.main(source=str(trained), target=str(tmp_path / "whole"))
    convert.main(source=str(tmp_path / "whole"), target=str(tmp_path / "again"), kind="sft")
    want, *others = (flatten(launch.load(x).params["policy"]) for x in (trained, tmp_path / "run", tmp_path / "again"))
    real = launch.load(trained).tokenizer.vocab_size  # rows that pad the vocabulary are not published
    cut = lambda p, x: x[:real] if p == "embed/tokens" else x  # noqa: E731
    for have in others:
        assert have.keys() == want.keys()
        assert all(np.allclose(cut(p, have[p]), cut(p, want[p]), atol=1e-6) for p in want)
    with pytest.raises(UserError, match="names no base: give --base"):
        convert.main(source=str(tmp_path / "adapter"), target=str(tmp_path / "x"))
    with pytest.raises(UserError, match="was trained without adapters"):
        convert.main(source=str(base), stage="sft", target=str(tmp_path / "x"), adapter=True)


def test_a_resumed_run_is_the_whole_run(trained, settings, base, tmp_path, monkeypatch):
    """Stopped after the first of two steps, the adapters and their optimizer go on where they were."""
    whole = launch.start(sft.main, "sft", settings, tmp_path / "whole")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        run = common.loop.fit

        def first(step_fn, state, *args, steps, **kwargs):
            run(step_fn, state, *args, steps=1, **{**kwargs, "evaluate": None})
            stop()

        m.setattr(common.loop, "fit", first)
        with pytest.raises(KeyboardInterrupt):
            launch.start(sft.main, "sft", settings, tmp_path / "run")
    again = launch.start(sft.main, "sft", settings, tmp_path / "run")
    assert again["metrics"]["eval/loss"] == whole["metrics"]["eval/loss"]
    a, b = (flatten(launch.load(tmp_path / n, merged=False).params) for n in ("whole", "run"))
    assert all(np.array_equal(a[p], b[p]) for p in a)


def test_mistakes_are_said(settings, tmp_path):
    with pytest.raises(UserError, match=r"lora.match='q_proj' matches no kernel: there are .*layers/attention/q/kernel"):
        launch.start(sft.main, "sft", {**settings, "lora.match": "q_proj"}, tmp_path / "a")
    with pytest.raises(UserError, match="config.lora.scaling='none': choose one of standard, rslora"):
        launch.start(sft.main, "sft", {**settings, "lora.scaling": "none"}, tmp_path / "b")


def test_gates_stop_a_run_and_can_be_turned_off(settings, tmp_path, monkeypatch):
    def fails(seen):
        raise UserError("gate `moved` failed")

    monkeypatch.setattr(gates, "moved", lambda: fails)
    with pytest.raises(UserError, match="gate `moved` failed"):
        launch.start(sft.main, "sft", settings, tmp_path / "a")
    result = launch.start(sft.main, "sft", {**settings, "gates": False}, tmp_path / "b")
    assert np.isfinite(result["metrics"]["eval/loss"])


def test_a_reward_model_learns_by_adapters_and_its_head(base, files, tmp_path):
    given = {**LORA, "steps": 2, "batch_size": 8, "data.path": files["pairs"], "data.length": 32, "init": str(base)}
    result = launch.start(reward.main, "reward", {**given, "optim.warmup": 0}, tmp_path / "reward")
    assert np.isfinite(result["metrics"]["eval/loss"]) and "eval/length_only_accuracy" in result["metrics"]
    start = flatten(launch.load(base, "sft").params["policy"])
    have = flatten(launch.load(tmp_path / "reward", merged=False).params["reward"])
    assert all(np.array_equal(x, have[p]) for p, x in start.items())
    assert have["scalar/kernel"].any() and have["lora/layers/attention/q/kernel/b"].any()
