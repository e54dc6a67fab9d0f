"""Each check of the doctor fails when what it looks at is broken: by a taught bug (test_teach.py), or by one of those below."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import common, teach
from experiments.doctor import answers, battery, capture, data, models, numbers, reference, sampling, steps, words
from experiments.doctor.subject import Subject
from jaxllm import settings
from jaxllm.core import spec
from jaxllm.core.types import Mean, UserError
from jaxllm.data import chat, pack
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import families, pooled
from jaxllm.models.decoder_config import DecoderConfig
from tests.experiments.test_teach import named

TALKS = [[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd" * n}] for n in (1, 2, 3, 1)]
MODEL = families.make(DecoderConfig(262, d_model=32, n_layers=2, n_heads=4, d_ff=64, max_length=96, positions="learned"))


def seen_of(tokenizer=None, experiment="sft", talks=TALKS, workdir=None, **columns):
    """What reaches `fit` of a stage with a few short conversations, one a row."""
    tokenizer = tokenizer or tokenizers.byte_tokenizer()
    record = pack.pad([chat.encode_chat(tokenizer, m) for m in talks], 64)[0]
    state = SimpleNamespace(params={"policy": jax.jit(lambda key: spec.init(MODEL.specs, key))(jax.random.key(0))})
    run = SimpleNamespace(workdir=workdir)
    fit = {"columns": record | columns, "tokenizer": tokenizer, "model": MODEL, "state": state, "frozen": {}, "run": run}
    return capture.Seen(None, experiment, fit, [], [])


def checked(name, seen):
    group = next(g for g in battery.EARLY if name in g.CHECKS)
    return group.CHECKS[name](seen)


def subject_of(metrics, gates, experiment="dpo", lr=1e-3):
    model = SimpleNamespace(config=SimpleNamespace(dtype="float32"))
    seen = capture.Seen(None, experiment, {"model": model, "schedule": lambda step: lr}, [], [])
    return Subject(seen, None, {}, None, metrics, gates)


def test_the_healthy_rows_pass(tmp_path):
    seen = seen_of(workdir=tmp_path)
    found = {name: check(seen) for group in (data, answers, words) for name, check in group.CHECKS.items()}
    assert {name for name, v in found.items() if v.ok is not True} == {"truncated"}, found  # no report of them


# ---- data and words


def too_large(tmp_path, monkeypatch):
    seen = seen_of()
    return checked("ids in range", seen_of(tokens=seen.fit["columns"]["tokens"] + 200))


def cut(tmp_path, monkeypatch):
    (tmp_path / "data_report.json").write_text('{"rows.jsonl": {"examples": 10, "truncated": 1}}')
    return checked("truncated", seen_of(workdir=tmp_path))


def padding_in_the_mask(tmp_path, monkeypatch):
    return checked("padding untrained", seen_of(mask=seen_of().fit["columns"]["mask"] | True))


def lower_case(tmp_path, monkeypatch):
    t = tokenizers.byte_tokenizer()
    return checked("round trip", seen_of(dataclasses.replace(t, encode=lambda text: t.encode(text.lower()))))


def specials_parsed(tmp_path, monkeypatch):
    t = tokenizers.byte_tokenizer()
    end = t.piece(t.specials["eos"])
    parsed = lambda text: [i for n, part in enumerate(text.split(end)) for i in [t.specials["eos"]] * (n > 0) + t.encode(part)]  # noqa: E731
    return checked("specials are text", seen_of(dataclasses.replace(t, encode=parsed)))


def earlier_turns_rewritten(tmp_path, monkeypatch):
    """As templates that drop the reasoning of all turns but the last."""
    seen, encode = seen_of(), chat.encode_chat

    def shortened(tokenizer, messages, **options):
        early = [m if m["role"] == "user" else m | {"content": m["content"][1:]} for m in messages[:-1]]
        return encode(tokenizer, early + messages[-1:], **options)

    monkeypatch.setattr(words.chat, "encode_chat", shortened)
    return checked("template grows", seen)


# ---- the model


def padding_counted(tmp_path, monkeypatch):
    seen = seen_of()
    assert models.left_padding(seen).ok
    return models.left_padding(seen._replace(fit=seen.fit | {"model": teach.left_pad_positions(MODEL)}))


def half_of_bfloat16(tmp_path, monkeypatch):
    """Weights so large that 8 bits of them do not do."""
    seen = seen_of()
    assert models.bfloat16(seen).ok
    params = jax.tree.map(lambda x: 30 * x, seen.fit["state"].params)
    return models.bfloat16(seen._replace(fit=seen.fit | {"state": SimpleNamespace(params=params)}))


# ---- a run


def examined(experiment, base, files, tmp_path, only, **changes):
    config = settings.load_config(settings.config_path(experiment))
    given = {"batch_size": 8, "data.length": 32, "init": str(base), "data.path": files["chat"]}
    with config.unlocked():
        config.update_from_flattened_dict(given | changes)
    found = []
    battery.run(config, experiment, tmp_path / "run", found.append, lambda text: None, [only])
    return next(v for v in found if v.name == only)


def scaled_twice(base, files, tmp_path, monkeypatch):
    merge = models.lora.merge
    monkeypatch.setattr(models.lora, "merge", lambda params, alpha, scaling: merge(params, alpha=2 * alpha, scaling=scaling))
    return examined("sft", base, files, tmp_path, "merged = unmerged", **{"lora.rank": 2})


def no_rate(base, files, tmp_path, monkeypatch):
    return examined("sft", base, files, tmp_path, "parameters move", **{"optim.lr": 0.0})


def counts_devices(base, files, tmp_path, monkeypatch):
    """A loss that takes a sum over devices for a mean."""
    loss = common.lm.loss

    def wrong(model, **options):
        right = loss(model, **options)

        def value(params, batch, rng):
            mean, metrics = right(params, batch, rng)
            size = max(1, jax.sharding.get_abstract_mesh().size)
            return Mean(mean.total * size, mean.count), metrics

        return value

    monkeypatch.setattr(common.lm, "loss", wrong)
    return examined("sft", base, files, tmp_path, "mesh 1 = mesh n", **{"mesh.data": 1})


def other_weights(base, files, tmp_path, monkeypatch):
    """An export that scales the embedding on the way, as where a model's sqrt(d) is folded in."""
    save = battery.convert.hf.save

    def wrong(target, model, params, *rest, **more):
        scaled = params | {"embed": jax.tree.map(lambda x: 2 * x, params["embed"])}
        return save(target, model, scaled, *rest, **more)

    monkeypatch.setattr(battery.convert.hf, "save", wrong)
    return examined("sft", base, files, tmp_path, "rehearsal")


ALONE = {
    "ids in range": too_large, "truncated": cut, "padding untrained": padding_in_the_mask, "round trip": lower_case,
    "specials are text": specials_parsed, "template grows": earlier_turns_rewritten, "left padding": padding_counted,
    "bfloat16 drift": half_of_bfloat16,
}  # fmt: skip
RUNS = {
    "merged = unmerged": scaled_twice, "parameters move": no_rate, "mesh 1 = mesh n": counts_devices, "rehearsal": other_weights,
}  # fmt: skip


def test_every_check_has_something_that_fails_it():
    assert {*ALONE, *RUNS} | {named(bug) for bug in teach.BUGS} == set(battery.check_names())


@pytest.mark.parametrize("name", ALONE)
def test_a_check_fails(name, tmp_path, monkeypatch):
    verdict = ALONE[name](tmp_path, monkeypatch)
    assert verdict.name == name and verdict.ok is False and verdict.do, verdict


@pytest.mark.parametrize("name", RUNS)
def test_a_check_of_a_run_fails(name, base, files, tmp_path, monkeypatch):
    verdict = RUNS[name](base, files, tmp_path, monkeypatch)
    assert verdict.ok is False and verdict.do and verdict.do != battery.BROKEN, verdict


# ---- what would pass by not looking


def test_a_start_that_is_no_number_or_that_a_gate_refuses_has_failed():
    nan, passed = float("nan"), "start: rewards/chosen = 0"
    assert reference.at_start(subject_of({"rewards/chosen": 0.0}, {"start 0": passed, "moved": "moved"})).ok is True
    assert reference.at_start(subject_of({"rewards/chosen": 0.0, "rewards/rejected": nan}, {"start 0": passed})).ok is False
    refused = reference.at_start(subject_of({"rewards/chosen": 0.0}, {"start 0": UserError("gate `start` failed at step 1: x")}))
    assert refused.ok is False and "gate `start`" in refused.said


def test_nothing_that_moves_is_no_reason_to_pass():
    zero, still = {"grad_norm": 0.0}, {"moved": None}
    assert steps.parameters_move(subject_of(zero, still)).ok is False  # rows that train nothing
    assert steps.parameters_move(subject_of({"grad_norm": float("nan")}, still, "grpo")).ok is False
    assert steps.parameters_move(subject_of(zero, still, "grpo", lr=0)).ok is False
    assert steps.parameters_move(subject_of(zero, still, "grpo")).ok is None  # rewards all alike


def test_answers_without_an_end_are_found():
    seen = seen_of()
    columns, end = seen.fit["columns"], seen.fit["tokenizer"].specials["end"]
    endless = {n: np.where(columns["targets"] == end, 0, columns[n]) for n in ("targets", "segments", "mask")}
    endless = {n: x.astype(columns[n].dtype) for n, x in endless.items()}
    assert checked("end trained", seen_of(**endless)).ok is False
    assert checked("end trained", seen_of(experiment="pretrain", **endless)).ok is None


def test_answers_are_found_without_role_tokens():
    t = tokenizers.byte_tokenizer()
    plain = dataclasses.replace(t, specials={name: t.specials[name] for name in ("pad", "eos")})
    talks = [[{"role": "user", "content": "say Assistant: x"}, {"role": "assistant", "content": "yz" * n}] for n in (1, 3)]
    seen = seen_of(plain, talks=talks)
    mask = seen.fit["columns"]["mask"]
    for name in ("answers whole", "prompt untrained"):
        assert checked(name, seen).ok is True
    shifted = np.pad(mask[:, :-1], ((0, 0), (1, 0)))
    assert checked("answers whole", seen_of(plain, talks=talks, mask=shifted)).ok is False
    everything = seen.fit["columns"]["segments"] != 0
    assert checked("prompt untrained", seen_of(plain, talks=talks, mask=everything)).ok is False


def test_one_token_of_many_is_seen_and_nothing_is_not():
    record = jax.tree.map(jnp.asarray, seen_of().fit["columns"])
    params = seen_of().fit["state"].params["policy"]
    logps = np.array(models.ops.model_logps(MODEL, params, record).logp)
    mask = np.asarray(record["segments"] != 0)

    def verdict(logps, mask):
        given = {"params": params, "record": record | {"logps": logps, "mask": mask}}
        one = capture.Sampled(MODEL, None, {"temperature": 1.0}, given)
        return sampling.sampler(seen_of()._replace(samplers=[one]))

    assert verdict(logps, mask).ok is True
    logps[0, 0] += 0.03  # 1e-3 in the mean of 40 tokens: less than what may be, and no rounding
    assert verdict(logps, mask).number < 1e-3 and verdict(logps, mask).ok is False
    assert verdict(logps, mask & False).ok is False
    assert np.isnan(numbers.apart({"x": jnp.zeros((0, 3))}, {"x": jnp.zeros((0, 3))}))


def test_an_encoder_may_change_what_it_reads():
    t = tokenizers.byte_tokenizer()
    small = dataclasses.replace(t, encode=lambda text: t.encode(text.lower()))
    assert checked("round trip", seen_of(small, "classify")).ok is None

    def broken(ids):
        raise ValueError("no such id")

    with pytest.raises(ValueError, match="no such id"):  # a verdict of `attempted`: not "does not apply"
        checked("round trip", seen_of(dataclasses.replace(t, decode=broken)))


def test_a_head_on_a_trunk_is_held_to_the_trunks_dtype():
    for dtype in numbers.TOLERANCE:
        trunk = families.make(dataclasses.replace(MODEL.config, dtype=dtype))
        head = pooled.with_head(trunk, "sequence", 3)
        assert numbers.tolerance(head.config) == numbers.tolerance(trunk.config) == numbers.TOLERANCE[dtype]
