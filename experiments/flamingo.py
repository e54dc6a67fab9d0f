"""Teach a frozen decoder to answer questions about images: a frozen vision encoder, and a gated bridge between the two.

python -m experiments.flamingo                                    # CPU size, drawn images, two or three minutes

Three stages: a decoder learns the language of the questions without any image (a run of its own, or config.init); a vision
encoder learns to classify drawn images, its classifiers are thrown away; then only the resampler and the gated cross-attention
learn (arXiv 2204.14198). Expected: about nine answers in ten exactly right; with another example's image, or without one, no
better than always giving the most common answer.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import common
from jaxllm import launch
from jaxllm.core.types import Mean, UserError
from jaxllm.data import chat, images, pack
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.loader import make_loader
from jaxllm.generate.decode import generate
from jaxllm.models import decoder, families, flamingo
from jaxllm.models.decoder import DecoderConfig
from jaxllm.report.run import at_least, at_most
from jaxllm.train import loop
from jaxllm.train.guard import guarded
from jaxllm.train.step import init_state, make_train_step
from jaxllm.worlds import images as world

LANGUAGE = {  # the decoder that is trained when config.init names none
    "steps": 300, "batch_size": 32, "data.length": 32, "model.d_model": 64, "model.n_heads": 4, "model.d_ff": 128,
    "model.max_length": 64, "eval_every": 300,
}  # fmt: skip


def asked(pictures, seed):
    """One (kind, question, answer) a picture, the kinds in turn and in random order."""
    rng = np.random.default_rng(seed)
    kinds = rng.permutation(np.arange(len(pictures.pixels)) % 5)
    return [(k, *q) for i in range(len(kinds)) for j, (k, q) in enumerate(world.questions(pictures, i).items()) if j == kinds[i]]


def sentences(config):
    """The rows that the decoder learns its language from."""
    return [{"text": f"{q} {a}"} for _, q, a in asked(world.draw(6000, config.seed + 2), config.seed + 2)]


def words_of(rows):
    """The tokenizer of the words of rows."""
    return images.word_tokenizer(sorted({word for r in rows for word in r["text"].split()}))


def language(config, run):
    """The run of a decoder that has read questions with other pictures' answers: it knows how answers look, and none of them."""
    if config.init:
        return config.init
    rows = sentences(config)
    text, words = run.path("language.jsonl"), run.path("words", "tokenizer.json")
    text.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    tokenizers.save(words_of(rows), words.parent)
    return common.need("pretrain", "", config, run, **LANGUAGE, **{"data.path": str(text), "tokenizer": str(words.parent)})


def rows_of(config, tokenizer, pictures, questions):
    """Sequence records with the images as inputs; only the answer and its end are trained."""
    examples = []
    for _, question, answer in questions:
        whole = chat.encode_document(tokenizer, f"{question} {answer}")
        given = len(whole.tokens) - 1 - len(tokenizer.encode(answer))
        examples.append(chat.Example(whole.tokens, whole.mask & (np.arange(len(whole.tokens)) >= given)))
    columns, report = pack.pad(examples, config.data.length)
    if report["truncated"]:
        raise UserError(f"{report['truncated']} questions are longer than config.data.length={config.data.length}: raise it")
    return {**columns, "inputs": seen(pictures.pixels)}


def seen(pixels):
    """Model inputs of one image a row, before the first token."""
    n = len(pixels)
    return {
        "pixels": pixels[:, None].astype(np.int32), "starts": np.zeros((n, 1), np.int32), "segments": np.ones((n, 1), np.int32),
    }  # fmt: skip


# ---- the vision encoder


def see_loss(c, params, batch, rng):
    """Cross-entropy of linear classifiers of shape, colour, ground and place on the mean of the features."""
    features = flamingo.see(c, params, batch["pixels"]).astype(jnp.float32).mean(axis=1)
    logits = features @ params["classifiers"]
    total, at = jnp.float32(0), 0
    for name, size in SEEN.items():
        nll = optax.softmax_cross_entropy_with_integer_labels(logits[:, at : at + size], batch[name])
        total, at = total + nll.mean() / len(SEEN), at + size
    return Mean(total, jnp.float32(1)), {"loss": Mean(total, jnp.float32(1))}


SEEN = {"shape": len(world.SHAPES), "colour": len(world.COLOURS), "ground": len(world.COLOURS), "place": 4}


def learn_to_see(config, run, model, vision):
    """The weights of a vision encoder that tells what drawn images show; the same ones each time that the run is continued."""
    v, c = config.vision, model.config
    pictures = world.draw(max(8 * v.batch_size, config.data.images), config.seed + 1, size=c.vision.size)
    places = [world.place(pictures, i) for i in range(len(pictures.pixels))]
    columns = {n: getattr(pictures, n).astype(np.int32) for n in ("shape", "colour", "ground")}
    columns |= {"pixels": pictures.pixels.astype(np.int32), "place": np.unique(places, return_inverse=True)[1].astype(np.int32)}
    loader = make_loader(columns, v.batch_size, config.seed)
    tx = guarded(optax.adam(optax.cosine_decay_schedule(v.lr, max(1, v.steps))), sigma=config.spike_sigma)
    state, frozen = init_state({"vision": vision, "classifiers": jnp.zeros((c.d_vision, sum(SEEN.values())))}, tx)
    step = jax.jit(make_train_step(partial(see_loss, c), tx), donate_argnums=0)
    losses = []
    state = loop.fit(
        step, state, frozen, loader.batch, jax.random.key(config.seed), steps=v.steps, log_every=max(1, v.steps // 4),
        log=lambda i, values: losses.append(values["loss"]),
    )  # fmt: skip
    if losses:
        run.note(f"vision encoder: loss {losses[0]:.2f} to {losses[-1]:.2f} in {v.steps} steps")
    return state.params["vision"]


# ---- answers


def answers(model, params, tokenizer, questions, given, new=12, rows=50):
    """Greedy answers [n] to questions under model inputs."""
    ids = [tokenizer.encode(q) for _, q, _ in questions]
    width = max(map(len, ids))
    prompts = np.array([i + [0] * (width - len(i)) for i in ids], np.int32)
    lengths = np.array([len(i) for i in ids], np.int32)
    stop = chat.stop_ids(tokenizer)
    greedy = partial(generate, model, max_new_tokens=new, stop=stop, temperature=0.0)
    sample = jax.jit(lambda p, t, n, given: greedy(p, t, n, jax.random.key(0), inputs=given))
    texts = []
    for start in range(0, len(ids), rows):
        # the last batch is filled up with the first rows, so that one program serves all
        part = np.arange(start, start + rows) % len(ids)
        out = sample(params, prompts[part], lengths[part], jax.tree.map(lambda x: x[part], given))  # noqa: B023
        tokens, mask = np.asarray(out.tokens), np.asarray(out.mask)
        texts += [tokenizer.decode([t for t in row[m] if t not in stop]) for row, m in zip(tokens, mask, strict=True)]
    return texts[: len(ids)]


def measure(config, run, model, params, tokenizer, pictures, questions, trained):
    """Exact answers: with the image, with another example's, with none; and the most common answer of each kind of question."""
    given = seen(pictures.pixels)
    other = {**given, "pixels": np.roll(given["pixels"], 1, axis=0)}
    none = {**given, "segments": np.zeros_like(given["segments"])}
    common_answer = {k: Counter(a for kind, _, a in trained if kind == k).most_common(1)[0][0] for k in {q[0] for q in trained}}
    arms = {"image": given, "other": other, "none": none}
    texts = {name: answers(model, params, tokenizer, questions, x) for name, x in arms.items()}
    texts["majority"] = [common_answer.get(kind, "") for kind, _, _ in questions]
    hits = {name: np.array([t == a for t, (_, _, a) in zip(found, questions, strict=True)]) for name, found in texts.items()}
    kinds = np.array([kind for kind, _, _ in questions])
    if run.writes:  # those of a try that was stopped here
        run.path("samples.jsonl").unlink(missing_ok=True)
    for i in range(min(10, len(questions))):
        _, question, answer = questions[i]
        run.sample(config.steps, f"[picture {i + 1}] {question}", texts["image"][i], answer=answer, other=texts["other"][i])
    sheet = images.grid(world.palette()[pictures.pixels[:10]], 10, scale=5)
    run.path("figures", "pictures.png").write_bytes(images.png(sheet))
    by_kind = {f"exact_by_kind/{k}": float(hits["image"][kinds == k].mean()) for k in sorted(set(kinds))}
    return {f"exact/{name}": float(x.mean()) for name, x in hits.items()} | by_kind


def main(config, run):
    common.check_batch(config, config.data.images)
    start = language(config, run)
    size = config.model.vision.size
    pictures = world.draw(config.data.images, config.seed, size=size)
    held_out = world.draw(config.data.test, config.seed + 9, size=size)
    trained, tested = asked(pictures, config.seed), asked(held_out, config.seed + 9)
    with common.open_mesh(config) as mesh:
        base = launch.load(start, default="pretrain", mesh=mesh)
        if not isinstance(base.model.config, DecoderConfig):
            raise UserError(f"{start}: a decoder is needed to look at images, this is a {type(base.model.config).__name__}")
        patches = (size // config.model.vision.patch) ** 2
        settings = {**config.model.to_dict(), "decoder": base.model.config, "n_patches": patches}
        model = flamingo.make(families.build(flamingo.FlamingoConfig, settings))
        whole, frozen = flamingo.published_count(model.config), decoder.published_count(base.model.config)
        run.note(f"model: {whole:,} parameters, {frozen:,} of them the decoder's")
        params = {**common.born_sharded(model.specs, config.seed, mesh), **base.params["policy"]}
        params["vision"] = learn_to_see(config, run, model, params["vision"])
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=params, tokenizer=base.tokenizer, trainable=config.trainable,
            rows=rows_of(config, base.tokenizer, pictures, trained), eval_rows=rows_of(config, base.tokenizer, held_out, tested),
        )  # fmt: skip
    params = launch.load(run.workdir).params["policy"]
    found = measure(config, run, model, params, base.tokenizer, held_out, tested, trained)
    over = {name: found[f"exact/{name}"] - found["exact/majority"] for name in ("other", "none")}
    claims = [
        at_least("exact answers with the image", found["exact/image"], 0.7),
        at_most("exact answers with another example's image, over the most common answer", over["other"], 0.05),
        at_most("exact answers without an image, over the most common answer", over["none"], 0.05),
    ]
    run.finish({**final, **found}, claims)


if __name__ == "__main__":
    launch.run(main, "flamingo")
