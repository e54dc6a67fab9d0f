"""A world of token strings in which the true reward is known: a sparse Markov source, a gold reward, simulated annotators.

Everything is a pure function of arrays, so whole studies stay in one compiled program and run for many seeds at once.
Token ids: 0 .. vocab-1 are words, `vocab` begins a string, `vocab + 1` ends it. In the prompted variant the words after the
beginning name the words that are good for this string.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxllm.core.types import Batch, Key

MOST_GOOD = 5  # distinct good words that pay
FREE_REPEATS = 3  # of one word, before each more costs
FREE_SLIPS = 3  # ungrammatical pairs of neighbours, before each more costs


@struct.dataclass
class World:
    """One world. transition [v, v]: the source's next-word probabilities; likely bool [v, v]: the grammatical pairs;
    good bool [v]: the words that are good when no prompt names others; stop: the source's chance to end after a word, from
    the word with number `shortest` on.
    """

    transition: jax.Array
    likely: jax.Array
    good: jax.Array
    length: int = struct.field(pytree_node=False)  # words of a string at most
    prompt: int = struct.field(pytree_node=False)  # words that a prompt names
    stop: float = struct.field(pytree_node=False)  # 0: every string has `length` words and no end token
    shortest: int = struct.field(pytree_node=False, default=1)  # words of the source's shortest strings

    @property
    def vocab(self) -> int:
        """The number of words."""
        return self.good.shape[-1]

    @property
    def begin(self) -> int:
        return self.vocab

    @property
    def end(self) -> int:
        return self.vocab + 1


def make(
    key: Key, *, vocab: int = 24, length: int = 12, successors: int = 4, good: int = 8, slip: float = 0.08, prompt: int = 0,
    stop: float = 0.0, shortest: int = 1,
) -> World:  # fmt: skip
    """A random world: each word has `successors` likely followers, which share 1 - slip; any word follows with the rest."""
    keys = jax.random.split(key, 3)
    order = jax.vmap(lambda k: jax.random.permutation(k, vocab))(jax.random.split(keys[0], vocab))
    likely = order < successors
    weight = jnp.where(likely, jax.random.uniform(keys[1], (vocab, vocab), minval=0.5, maxval=1.5), 0.0)
    transition = (1 - slip) * weight / weight.sum(axis=1, keepdims=True) + slip / vocab
    return World(transition, likely, jax.random.permutation(keys[2], vocab) < good, length, prompt, stop, shortest)


def prompts(world: World, key: Key, n: int) -> jax.Array:
    """n beginnings int [n, 1 + prompt]: the begin token, and the distinct words that are good for this string."""
    begin = jnp.full((n, 1), world.begin, jnp.int32)
    if not world.prompt:
        return begin
    named = jax.vmap(lambda k: jax.random.permutation(k, world.vocab)[: world.prompt])(jax.random.split(key, n))
    return jnp.concatenate([begin, named.astype(jnp.int32)], axis=1)


def strings(world: World, key: Key, n: int) -> tuple[jax.Array, jax.Array]:
    """n strings of the source: (words int [n, length], how many of them count int [n])."""
    first, rest, ends = jax.random.split(key, 3)
    start = jax.random.randint(first, (n,), 0, world.vocab)

    def draw(word: jax.Array, k: Key) -> tuple[jax.Array, jax.Array]:
        return jax.random.categorical(k, jnp.log(world.transition[word])), word

    _, words = jax.lax.scan(draw, start, jax.random.split(rest, world.length))
    if not world.stop:
        return words.T, jnp.full((n,), world.length)
    over = jax.random.bernoulli(ends, world.stop, (n, world.length)) & (jnp.arange(world.length)[None, :] >= world.shortest - 1)
    return words.T, jnp.where(over.any(axis=1), over.argmax(axis=1) + 1, world.length)


def to_record(world: World, begun: jax.Array, words: jax.Array, lengths: jax.Array) -> Batch:
    """A sequence record [n, prompt + length (+ 1)] of beginnings and strings; an end token closes them if the world has one."""
    n, room = words.shape
    index = jnp.arange(room)[None, :]
    words = jnp.where(index < lengths[:, None], words, 0).astype(jnp.int32)
    if world.stop:
        words = jnp.pad(words, ((0, 0), (0, 1)))
        words = jnp.where(jnp.arange(room + 1)[None, :] == lengths[:, None], world.end, words)
        lengths = lengths + 1
    whole = jnp.concatenate([begun, words], axis=1)
    position = jnp.arange(whole.shape[1] - 1)[None, :]
    used = position < (world.prompt + lengths)[:, None]
    mask = used & (position >= world.prompt)
    tokens, targets = jnp.where(used, whole[:, :-1], 0), jnp.where(used, whole[:, 1:], 0)
    return {"tokens": tokens, "targets": targets, "segments": used.astype(jnp.int32), "mask": mask}


def content(world: World, record: Batch) -> tuple[jax.Array, jax.Array]:
    """(words int [n, l], which of them are a string's words bool [n, l]) of records with prompts of the world's length."""
    words = record["targets"][:, world.prompt :]
    # a policy that does not end its string has one token more than words count
    inside = jnp.arange(words.shape[1])[None, :] < world.length
    return words, record["mask"][:, world.prompt :] & (words < world.vocab) & inside


def lengths(world: World, record: Batch) -> jax.Array:
    """How many words each string has: float [n]."""
    return content(world, record)[1].sum(axis=1).astype(jnp.float32)


def good_words(world: World, record: Batch) -> jax.Array:
    """Which words are good for each string: bool [n, v]."""
    if not world.prompt:
        return jnp.broadcast_to(world.good[None, :], (record["tokens"].shape[0], world.vocab))
    return jax.nn.one_hot(record["tokens"][:, 1 : 1 + world.prompt], world.vocab).sum(axis=1) > 0


def slips(world: World, record: Batch) -> jax.Array:
    """Ungrammatical pairs of neighbours in each string: float [n]."""
    words, real = content(world, record)
    before, after = jnp.clip(words[:, :-1], 0, world.vocab - 1), jnp.clip(words[:, 1:], 0, world.vocab - 1)
    return jnp.sum(real[:, 1:] & real[:, :-1] & ~world.likely[before, after], axis=1).astype(jnp.float32)


def gold(world: World, record: Batch) -> jax.Array:
    """The true reward of each string, float [n]: +1 for each distinct good word (5 at most), -0.5 for each repeat of a word
    beyond its third use, -0.4 for each ungrammatical pair of neighbours beyond the third.

    It is concave, and the source never earns its penalties: a proxy trained on the source's strings cannot know them.
    """
    words, real = content(world, record)
    counts = jnp.sum(jax.nn.one_hot(words, world.vocab) * real[..., None], axis=1)
    used = jnp.minimum(jnp.sum((counts > 0) & good_words(world, record), axis=1), MOST_GOOD)
    repeats = jnp.maximum(counts - FREE_REPEATS, 0).sum(axis=1)
    return used - 0.5 * repeats - 0.4 * jnp.maximum(slips(world, record) - FREE_SLIPS, 0)


# ---- simulated annotators: what one of them sees of a string's worth, and how one chooses


def length_biased(worth: jax.Array, words: jax.Array, weight: float) -> jax.Array:
    """The worth to an annotator who is taken in by length: worth + weight * standardised number of words, [n]."""
    return worth + weight * (words - words.mean()) / (words.std() + 1e-6)


def sycophantic(worth: jax.Array, agrees: jax.Array, weight: float) -> jax.Array:
    """The worth to an annotator who likes to be agreed with: worth + weight where the answer agrees (bool [n])."""
    return worth + weight * agrees


def prefer(key: Key, a: jax.Array, b: jax.Array, *, sharpness: float = 2.0, flip: float = 0.0) -> jax.Array:
    """Whether the noisy annotator prefers a: Bradley-Terry on sharpness * (a - b), then flipped at rate `flip`: bool [n]."""
    choice, mistake = jax.random.split(key)
    first = jax.random.bernoulli(choice, jax.nn.sigmoid(sharpness * (a - b)))
    return first ^ jax.random.bernoulli(mistake, flip, first.shape)
