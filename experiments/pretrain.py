"""Pretrain a decoder on next tokens.

python -m experiments.pretrain                                    # CPU size, embedded text, about a minute
python -m experiments.pretrain --config=configs/pretrain.py:gpt2 --config.data.path=corpus.jsonl

At CPU size the loss begins at ln 1024 = 6.9; with seed 0 it ends at 2.61 on held-out documents. The model continues text.
"""

from __future__ import annotations

from experiments import common, memory, reading
from jaxllm import launch
from jaxllm.data import chat, pack, text
from jaxllm.data import tokenizer as tokenizers
from jaxllm.models import decoder
from jaxllm.worlds import instr


def corpus(config, run):
    """(training documents, held-out documents): the config's path, or embedded text and the instr world's documents."""
    c = config.data
    own = lambda: embedded(c.characters, c.world_share, config.seed)  # noqa: E731
    documents = documents_of(config, run, c.path, c.column) if c.path else own()
    train, held_out = text.split_by_hash(documents, held_out=c.held_out)
    run.note(f"text: {len(train):,} documents to train on, {len(held_out):,} held out, {sum(map(len, train)):,} characters")
    return train, held_out


def documents_of(config, run, path, column="text"):
    """The documents of a file; rows that are bad end the run or are left out, as config.data.on_error says."""
    documents, bad = text.checked_text(path, column=column, on_error=config.data.on_error)
    reading.left_out(run, path, bad, len(documents) + len(bad))
    return documents


def embedded(characters: int, world_share: float, seed: int) -> list[str]:
    """Standard-library prose and code up to `characters`, and web-like documents of the instr world for `world_share` of all."""
    prose, code = text.embedded_prose(), text.embedded_code()
    own = _until(prose, characters // 2) + _until(code, characters // 2)
    wanted = sum(map(len, own)) * world_share / (1 - world_share)
    probe = instr.documents(2000, seed=seed)
    return own + instr.documents(int(wanted / (sum(map(len, probe)) / 2000)), seed=seed)


def _until(documents: list[str], characters: int) -> list[str]:
    total, kept = 0, []
    for document in documents:
        if total >= characters:
            break
        kept.append(document)
        total += len(document)
    return kept


def tokenizer_of(config, documents):
    """Trained on the documents (bpe, unigram), bytes, or read from a path."""
    if config.tokenizer in ("bpe", "unigram"):
        return tokenizers.train_sentencepiece(documents, config.vocab_size, kind=config.tokenizer, seed=config.seed)
    return tokenizers.byte_tokenizer() if config.tokenizer == "byte" else tokenizers.load(config.tokenizer)


def rows(config, run, tokenizer, documents, what):
    """Packed rows of whole documents; long ones are split, and no token is lost."""
    examples = [e for d in documents for e in pack.split_long(chat.encode_document(tokenizer, d), config.data.length)]
    columns, report = pack.pack(examples, config.data.length)
    pack.check_report(report, config.data.path or what, tokenizer)
    common.print_report(run, what, report)
    return columns, report


def main(config, run):
    # what cannot work is said before the text is read
    shape = common.model_config(config, decoder.DecoderConfig, config.vocab_size)
    decoder.validate(shape)
    common.check_batch(config, config.batch_size)
    common.check_length(decoder.make(shape), config.data.length, "config.data.length")
    memory.check(config, memory.Step(decoder.make(shape)))
    train, held_out = corpus(config, run)
    tokenizer = tokenizer_of(config, train)
    model = decoder.make(common.model_config(config, decoder.DecoderConfig, tokenizer.vocab_size))
    run.note(f"model: {decoder.published_count(model.config):,} parameters, vocabulary of {tokenizer.vocab_size:,}")
    columns, report = rows(config, run, tokenizer, train, "train")
    eval_columns, _ = rows(config, run, tokenizer, held_out or train[:1], "held out")
    with common.open_mesh(config) as mesh:
        params = common.born_sharded(model.specs, config.seed, mesh)
        final = common.fit_lm(
            config, run, mesh=mesh, model=model, params=params, tokenizer=tokenizer, rows=columns, eval_rows=eval_columns
        )
    run.finish({**final, "data/fill": report["fill"]}, [], then=f"sft --config.init={run.workdir}")


if __name__ == "__main__":
    launch.run(main, "pretrain")
