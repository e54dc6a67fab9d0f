"""Published directories that mean harm: refused in one line, nothing written, nothing read from elsewhere, nothing run."""

import json
import os
import shutil
import time

import numpy as np
import pytest

from experiments import convert
from jaxllm.adapt import lora
from jaxllm.convert import hf, peft
from jaxllm.core.types import UserError
from jaxllm.data import images
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import decoder
from tests.convert.shapes import LLAMA
from tests.convert.test_safetensors import craft, index, tensors
from tests.models.tiny import weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A whole directory that is taken in when nothing is wrong with it."""
    import dataclasses

    where = tmp_path_factory.mktemp("published") / "model"
    model = decoder.make(dataclasses.replace(LLAMA, vocab_size=262))
    hf.save(where, model, weights(model.specs))
    tokenizers.save(tokenizers.byte_tokenizer(), where)
    return where


def pickled(where):
    (where / "model.safetensors").rename(where / "pytorch_model.bin")


def climbing(name):
    def harm(where):
        (where / "model.safetensors").rename(where.parent / "outside.safetensors")
        index(where, {"model.norm.weight": name})

    return harm


def linked(name):
    def harm(where):
        (where / name).unlink(missing_ok=True)
        (where / name).symlink_to("/etc/hostname")

    return harm


def overlapping(where):
    craft(where / "model.safetensors", tensors((0, 8), (4, 12)), b"\0" * 12)


def objects(where):
    craft(where / "model.safetensors", {"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, b"\0" * 8)


def long_header(where):
    with (where / "model.safetensors").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)


def long_config(where):
    (where / "config.json").write_text('{"architectures": ["' + "x" * 100_000_001 + '"]}')


def code_of_its_own(where):
    config = json.loads((where / "config.json").read_text())
    config |= {"architectures": ["EvilForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.EvilForCausalLM"}}
    (where / "config.json").write_text(json.dumps(config))
    (where / "evil.py").write_text(f"open({str(where.parent / 'ran')!r}, 'w')")


def deep(where):
    (where / "config.json").write_text("[" * 200_000)


def huge(where):
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps({**config, "hidden_size": 2**40, "num_hidden_layers": 2**30}))


def setting(name, value):
    def harm(where):
        config = json.loads((where / "config.json").read_text())
        (where / "config.json").write_text(json.dumps({**config, name: value}))

    return harm


def added(tokens):
    def harm(where):
        (where / "byte.json").unlink()
        model = {"type": "BPE", "vocab": {"a": 0, "<eos>": 1}, "merges": []}
        (where / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": tokens, "model": model}))

    return harm


def written(name, content):
    return lambda where: (where / name).write_bytes(content)


HARM = {
    "pickled weights": (pickled, "pytorch_model.bin may run code"),
    "an index that climbs": (climbing("../outside.safetensors"), "no name of a shard"),
    "an index with an absolute path": (climbing("/etc/passwd"), "no name of a shard"),
    "weights that are a link": (linked("model.safetensors"), "leads out of the directory"),
    "a config that is a link": (linked("config.json"), "leads out of the directory"),
    "a tokenizer that is a link": (linked("byte.json"), "leads out of the directory"),
    "a stray link": (linked("notes.txt"), "leads out of the directory"),
    "overlapping tensors": (overlapping, "overlaps"),
    "objects": (objects, "dtype 'OBJECT'"),
    "a header of 100 MB": (long_header, "over 100 MB"),
    "a config of 100 MB": (long_config, "over 100 MB"),
    "code of its own": (code_of_its_own, "EvilForCausalLM"),
    "a config without end": (deep, "not JSON"),
    "sizes that no machine has": (huge, "."),
    "heads of less than nothing": (setting("num_key_value_heads", -1), "n_kv_heads=-1 does not divide"),
    "heads in words": (setting("num_key_value_heads", "x"), "config.json: describes no LlamaForCausalLM"),
    "rope that is a number": (setting("rope_parameters", -1), "config.json: describes no LlamaForCausalLM"),
    "an activation that is a list": (setting("hidden_act", []), "config.json: describes no LlamaForCausalLM"),
    "added tokens that are a number": (added(3), "tokenizer.json: the tokenizers library cannot use it"),
    "added tokens without a text": (added([{}]), "tokenizer.json: the tokenizers library cannot use it"),
    "added tokens without an id": (added([{"content": "<eos>"}]), "tokenizer.json: the tokenizers library cannot use it"),
    "a template that is no text": (written("chat_template.jinja", b"ab\xff"), "chat_template.jinja: not UTF-8 at byte 2"),
    "a template that is no text, in JSON": (written("tokenizer_config.json", b'{"chat_template": "\\ud800"}'), "lone surrogate"),
    "a pipe": (lambda where: os.mkfifo(where / "notes.txt"), "notes.txt: is no plain file"),
}


@pytest.mark.parametrize("case", HARM)
def test_a_hostile_directory_is_refused(case, published, tmp_path):
    shutil.copytree(published, tmp_path / "in")
    harm, words = HARM[case]
    harm(tmp_path / "in")
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=words) as error:
        convert.main(source=str(tmp_path / "in"), target=str(tmp_path / "run"))
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # no run, no part of one, nothing that ran
    assert len(str(error.value)) < 1500


def test_the_same_directory_unharmed_is_taken_in_and_its_template_shown(published, tmp_path, capsys):
    shutil.copytree(published, tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").write_text("\x1b[2J{{ messages }}\nsecond line")
    convert.main(source=str(tmp_path / "in"), target=str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "chat template (sha256 " in out and "  | \\x1b[2J{{ messages }}\n  | second line\n" in out and "\x1b" not in out


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """(a model, a directory with adapters of it)."""
    model = lora.with_lora(decoder.make(LLAMA), rank=2, alpha=4, match=".*/q/kernel")
    where = tmp_path_factory.mktemp("adapters") / "adapter"
    peft.save(where, decoder.make(LLAMA), weights(model.specs)["lora"], alpha=4)
    return decoder.make(LLAMA), where


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha_pattern": {"(([a-z0-9_.])+)+!": 1}}, "give names of modules"),
        ({"alpha_pattern": {".*" * 8 + "!": 1}}, "at most three"),
        ({"alpha_pattern": {"\\": 1}}, "is no pattern"), ({"alpha_pattern": {"q_proj": "x"}}, "'x' is no alpha"),
        ({"alpha_pattern": [1]}, "is no alpha"), ({"lora_alpha": 0}, "'0' is no alpha"), ({"lora_alpha": []}, "is no alpha"),
        ({"lora_alpha": float("nan")}, "is no alpha"), ({"peft_type": []}, "is not supported"),
    ],
)  # fmt: skip
def test_a_hostile_adapter_is_refused_at_once(changes, words, adapter, tmp_path):
    model, where = adapter
    shutil.copytree(where, tmp_path / "in")
    config = json.loads((where / peft.CONFIG).read_text())
    (tmp_path / "in" / peft.CONFIG).write_text(json.dumps({**config, **changes}))
    begun = time.process_time()
    with pytest.raises(UserError, match=words):
        peft.load(tmp_path / "in", model)
    assert time.process_time() - begun < 10
    good = {**config, "alpha_pattern": {"^model.layers\\.\\d+\\.self_attn.q_proj$": 8}}
    (tmp_path / "in" / peft.CONFIG).write_text(json.dumps(good))
    assert peft.load(tmp_path / "in", model).settings["alpha"] == 8


def test_arrays_of_objects_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    for name in ("a.npy", "a.npz"):
        value = np.array([Evil()], dtype=object)
        np.save(tmp_path / name, value, allow_pickle=True) if name == "a.npy" else np.savez(tmp_path / name, images=value)
        (tmp_path / "ran").unlink(missing_ok=True)
        with pytest.raises(UserError, match="pickled objects are refused"):
            images.read(tmp_path / name)
        assert not (tmp_path / "ran").exists()
