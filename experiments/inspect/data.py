"""What each experiment trains on, by its own data functions: the rows that the loop gets, before any model is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments import classify, common, flamingo, imagegpt, mlm, pretrain, reading, reward, sft, t5, text2text
from experiments.inspect.start import extended, preferences, start_of
from jaxllm.data import chat, denoise, images, labelled, masking, pack, unpaired
from jaxllm.data import pairs as pair_rows
from jaxllm.data.text import first_row
from jaxllm.worlds import images as image_world
from jaxllm.worlds import instr


class Data(NamedTuple):
    """columns: as the loop gets them, prompts too; report: counts of how rows became columns, {} where there are none.

    messages: side -> conversations that its rows were made of, for the roles; answers: a reference answer by row of prompts.
    """

    columns: Any
    tokenizer: Any
    where: str
    report: dict[str, Any]
    messages: dict[str, Sequence[Any]] = {}
    answers: Sequence[str] = ()
    length: int = 0  # tokens beyond length + 1 were cut


def language(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    train, _ = pretrain.corpus(config, run)
    tokenizer = pretrain.tokenizer_of(config, train)
    columns, report = pretrain.rows(config, run, tokenizer, train, "train")
    return Data(columns, tokenizer, config.data.path or "the embedded text", report)


def chats(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    own = lambda: instr.demonstrations(config.data.rows, seed=config.seed)  # noqa: E731
    conversations, where = common.rows_of(config, run, chat.normalise, own)
    train, _ = common.hold_out(conversations, config.data.held_out, config.seed)
    tokenizer = start_of(config, "sft", run).tokenizer
    columns, report = sft.encode(config, run, tokenizer, train, where, "train")
    return Data(columns, tokenizer, where, report, {"": train}, length=config.data.length)


def _told(pairs: list[dict], side: str) -> list[Any]:
    return [pair["prompt"] + pair[side] for pair in pairs]


def pairs(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    start = start_of(config, "dpo", run)
    rows, where = preferences(config, run, start, run_dir, shown)
    columns, report = pair_rows.encode_pairs(start.tokenizer, rows, config.data.length)
    pack.check_report(report, where)
    common.print_report(run, where, report)
    messages = {side: _told(rows, side) for side in pair_rows.SIDES}
    return Data(common.trimmed(columns), start.tokenizer, where, report, messages, length=config.data.length)


def rewards(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    if not config.data.path or not reward.is_ranked(first_row(config.data.path)):
        return pairs(config, run, run_dir, shown)
    where, tokenizer = config.data.path, start_of(config, "reward", run).tokenizer
    rows = reading.checked(config, run, where, reward.normalise_ranked)
    train = rows if config.data.eval_path else common.hold_out(rows, 0.1, config.seed)[0]
    columns, report = reward.columns_of(tokenizer, train, config.data.length)
    pack.check_report(report, where)
    common.print_report(run, where, report)
    told = [row["prompt"] + answer for row in train for answer in row["ranked"]]
    return Data(reward.trimmed(columns), tokenizer, where, report, dict.fromkeys(_RANKED, told), length=config.data.length)


_RANKED = ("ranked", "chosen", "rejected")


def labels(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    start, path = start_of(config, "kto", run), config.data.path
    if path:
        rows, where = sum(reading.checked(config, run, path, unpaired.normalise_rows), []), path
    else:
        found, where = preferences(config, run, start, run_dir, shown)
        rows = [r for pair in found for r in unpaired.from_pair(pair)]
    columns, report = unpaired.encode_unpaired(start.tokenizer, rows, config.data.length)
    pack.check_report(report, where)
    common.print_report(run, where, report)
    messages = {"completion": [r["prompt"] + r["completion"] for r in rows]}
    return Data(common.trimmed(columns), start.tokenizer, where, report, messages, length=config.data.length)


def masked(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    mlm.check(config)
    train, _ = pretrain.corpus(config, run)
    tokenizer = masking.extended(pretrain.tokenizer_of(config, train))
    columns, report = mlm.OBJECTIVES[config.objective].rows(tokenizer, train, config.data.length, config.seed)
    pack.check_report(report, config.data.path or "the embedded text")
    given = dict(mask_id=tokenizer.specials["mask"], vocab=masking.ordinary_ids(tokenizer), rate=config.mask_rate)
    if config.masking == "dynamic":
        run.note("masking is drawn anew at every step: this is one draw")
    columns = masking.with_static_masks(columns, config.seed, **given)
    return Data(columns, tokenizer, config.data.path or "the embedded text", report)


def text_to_text(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    tasks = text2text.tasks_of(config, run) if config.objective == "text2text" else None
    texts, rows_with = t5.text_rows(config, run) if tasks is None else t5.task_rows(config, run, tasks)
    plain = start_of(config, "t5", run).tokenizer if config.init else pretrain.tokenizer_of(config, texts)
    tokenizer = denoise.with_sentinels(plain)
    columns, _ = rows_with(tokenizer)
    return Data(columns, tokenizer, config.data.path or "the built-in text", {})


def classes(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    (rows, places), _, where = classify.labelled_rows(config, run)
    texts = [str(value) for row in rows for value in row.values()]
    tokenizer = extended(config, run) if config.init else masking.extended(pretrain.tokenizer_of(config, texts))
    shape, found = labelled.encode(tokenizer, rows, places, config.data.length)
    run.note(f"{shape} rows of {where}: {len(rows):,}, {found.truncated} cut, {found.dropped} left out; labels {found.names[:8]}")
    report = {"truncated": found.truncated, "dropped": found.dropped, "examples": len(rows)}
    return Data(found.columns, tokenizer, where, report, answers=found.names)


def pixels(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    found = imagegpt.prepare(config, run)
    colours = len(found.palette)
    tokenizer = images.word_tokenizer([str(i) for i in range(colours)])
    return Data(images.records(found.train, colours), tokenizer, config.data.path or "drawn images", {})


def pictured(config: Any, run: Any, run_dir: str, shown: int) -> Data:
    pictures = image_world.draw(config.data.images, config.seed, size=config.model.vision.size)
    own = lambda: flamingo.words_of(flamingo.sentences(config))  # noqa: E731
    tokenizer = start_of(config, "flamingo", run).tokenizer if config.init else own()
    columns = flamingo.rows_of(config, tokenizer, pictures, flamingo.asked(pictures, config.seed))
    run.note("each image stands before its row's first token; text sees it by cross-attention alone")
    return Data(columns, tokenizer, "drawn images", {})
