"""The mask lens shows what training gets: the same columns, each token with its role, mask, segment and weight."""

import io
import re
import shutil

import jax
import numpy as np
import pytest

from experiments import common, dpo, flamingo, grpo, kto, reward, sft
from experiments.inspect import __main__ as lens
from experiments.inspect import data, page, roles, rows, start, tables, text, tokens
from jaxllm import launch, settings
from jaxllm.core.types import UserError
from jaxllm.data import chat, images
from jaxllm.data import tokenizer as tokenizers
from jaxllm.losses import lm
from jaxllm.report import run as runs
from tests.experiments.conftest import write_rows
from tests.experiments.simple import scored
from tests.experiments.test_grpo import SMALL, problems  # noqa: F401
from tests.models.tiny import fast_jit
from tests.report.test_html import Page

EVIL = '</span><script>alert("x")</script>\x1b[31m'


def config_of(experiment, **changes):
    config = settings.load_config(settings.config_path(experiment))
    with config.unlocked():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


class Seen(Exception):
    pass


@pytest.fixture
def trained_columns(monkeypatch, tmp_path):
    """What the loop gets from an experiment's own main."""

    def of(main, experiment, config):
        kept = {}

        def fit(*args, columns, tokenizer, **kwargs):
            kept.update(columns=columns, tokenizer=tokenizer)
            raise Seen

        monkeypatch.setattr(common, "fit", fit)
        with pytest.raises(Seen):
            launch.start(main, experiment, dict(settings_of(config)), tmp_path / experiment)
        return kept

    return of


def settings_of(config):
    return {name: value for name, (_, value) in settings.settings_of(config).items() if value is not None}


@pytest.mark.parametrize(
    ("main", "experiment", "file"),
    [(sft.main, "sft", "chat"), (dpo.main, "dpo", "pairs"), (kto.main, "kto", "pairs"), (reward.main, "reward", "pairs")],
)
def test_shows_the_columns_that_are_trained(main, experiment, file, base, files, trained_columns):
    config = config_of(experiment, init=str(base), data__path=files[file], data__length=32, batch_size=8)
    real = trained_columns(main, experiment, config)
    ours = tables.data_of(config, experiment, start.notes(), "", 2)
    assert tokenizers.fingerprint(ours.tokenizer) == tokenizers.fingerprint(real["tokenizer"])
    shared = {k: real["columns"][k] for k in ours.columns}  # the reference's log-probabilities are no tokens
    assert set(real["columns"]) - set(shared) <= {"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_mismatched_logps"}
    same = jax.tree.map(np.array_equal, shared, ours.columns)
    assert jax.tree.leaves(same) and all(jax.tree.leaves(same))


def test_shows_the_prompts_of_grpo(base, problems, trained_columns):  # noqa: F811
    config = config_of("grpo", init=str(base), data__path=problems, **{k.replace(".", "__"): v for k, v in SMALL.items()})
    real = trained_columns(grpo.main, "grpo", config)["columns"]
    ours = tables.data_of(config, "grpo", start.notes(), "", 2)
    assert all(np.array_equal(real[name], ours.columns[name]) for name in ("tokens", "lengths", "row"))
    view = rows.view_of(ours, config, "grpo", [], 3)
    assert view.positions == 0 and all(row.answer.isdigit() for row in view.rows) and "no token" in text.on_loss(view)


@pytest.fixture
def view(base, tmp_path):
    """Two conversations in packed rows, one with hostile text."""
    told = [
        [("system", "be brief"), ("user", "hi"), ("assistant", "yo")],
        [("user", EVIL), ("assistant", "no\x1b[2J")],
    ]
    lines = [{"messages": [{"role": role, "content": said} for role, said in turns]} for turns in told] * 8
    path = write_rows(tmp_path / "c.jsonl", lines)
    config = config_of("sft", init=str(base), data__path=path, data__length=80, batch_size=2)
    return rows.view_of(tables.data_of(config, "sft", start.notes(), "", 2), config, "sft", ["note"], 2)


def test_each_token_has_its_role_mask_segment_and_position(view):
    parts = [part for row in view.rows for part in row.parts]
    by_segment = {ids: [t for t in p.tokens if t.segment == s] for p in parts
                  for s, ids in zip(dict.fromkeys(t.segment for t in p.tokens), roles.segments_of(p), strict=True)}  # fmt: skip
    brief = next(ts for ts in by_segment.values() if any(t.role == "system" for t in ts))
    assert [t.position for t in brief] == list(range(len(brief)))
    assert list(dict.fromkeys(t.role for t in brief)) == ["system", "user", "assistant"]
    tokenizer = tokenizers.byte_tokenizer()
    trained = [t.id for t in brief if t.weight]
    assert trained == [*tokenizer.encode("yo"), tokenizer.specials["end"]]
    assert all(t.role == "assistant" for t in brief if t.weight)
    assert all(len(p.tokens) + p.padding == 80 + len({t.segment for t in p.tokens}) for p in parts)
    assert view.trained == 7 * len("yo.") + 8 * len("no\x1b[2J.")  # one of 16 rows is held out; the end token counts


def test_text_is_readable_without_colours_and_never_too_wide(view, monkeypatch):
    wide = view._replace(notes=["漢字" * 60, "word " * 60], rows=[row._replace(answer="答え" * 50) for row in view.rows])
    wide.rows[0].parts[0].tokens.append(tokens.Token(7, "字" * 90, "user", 9, 0))
    for width in (40, 80):
        lines = text.show(wide, io.StringIO(), width)
        assert all(text.columns(line) <= width for line in lines), max(lines, key=len)
    joined = "\n".join(lines)
    assert "\x1b" not in joined and "▸yo" in joined and "<0x1B>" in joined and "system" in joined
    assert re.search(r"trained on \d+ of \d+ tokens: ▸", joined)


def test_control_characters_are_written_out():
    assert text.visible("a\x1b[2J\r\n\u202eb") == "a\\x1b[2J\\r⏎\\u202eb"
    assert text.visible("ä\tb\n", unicode=False) == "\\xe4\\tb\\n"
    assert text.visible("שלום") == "שלום"  # letters of any direction are letters


class Ascii(io.StringIO):
    encoding = "ascii"


def test_nothing_is_lost_where_a_stream_has_only_ascii(view):
    strange = view._replace(example="ä\n", notes=["ключ"], rows=[row._replace(answer="é") for row in view.rows])
    lines = text.show(strange, Ascii(), 80)
    joined = "\n".join(lines)
    assert joined.isascii() and "[[yo" in joined and "[[\\xe4\\n]]" in joined and "\\xe9" in joined and "\\u043a" in joined


def test_of_long_rows_both_ends_are_shown_and_the_rest_is_counted(view):
    many = [tokens.Token(i, f"<{i}>", "text", 1, i, 1.0) for i in range(32_000)]
    long = view._replace(rows=[tokens.Shown("row 1", [tokens.Part("", many)])] * 30)
    source = page.page([long])
    assert len(source) < 8e6 and "28,000 tokens are not shown" in source and "20 more rows are not shown" in source
    assert "&lt;0&gt;" in source and "&lt;31999&gt;" in source and "32,000 tokens, 32,000 trained" in source
    lines = text.show(long._replace(rows=long.rows[:1]), io.StringIO(), 80)
    assert len(lines) < 400 and any("(30,000 tokens are not shown)" in line for line in lines) and "<31999>◂" in lines[-1]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_colours_only_on_a_terminal_that_wants_them(view, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;4;32m" in "\n".join(text.show(view, Terminal(), 80))
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in "\n".join(text.show(view, Terminal(), 80))


def test_the_page_is_one_file_with_all_that_is_known_of_a_token(view):
    source = page.page([view])
    parsed = Page(source)
    assert not parsed.unclosed and not {"script", "link", "img"} & set(parsed.tags)
    assert not any(name in ("src", "href") or name.startswith("on") for name, _ in parsed.attributes)
    titles = [value for name, value in parsed.attributes if name == "title"]
    ids = {t.id for row in view.rows for part in row.parts for t in part.tokens}
    known = re.compile(r"id (\d+) · \w+ · segment \d+ · position \d+ · weight [\d.]+")
    assert ids <= {int(m[1]) for m in map(known.match, titles) if m}
    assert "\x1b" not in source and "<svg" in source


def test_the_loss_can_be_computed_from_what_is_shown(base, files):
    loaded, config = launch.load(base, "sft"), config_of("sft", init=str(base), data__path=files["chat"], data__length=32)
    seen = tables.data_of(config, "sft", start.notes(), "", 2)
    found = rows.view_of(seen, config, "sft", [], 3)
    pairs = []
    for part in (part for row in found.rows for part in row.parts):
        for segment in dict.fromkeys(t.segment for t in part.tokens):
            whole = [t for t in part.tokens if t.segment == segment]
            assert not whole[0].weight  # nothing says what the first one should be
            logps, _ = scored(loaded, [whole[0].id], [t.id for t in whole[1:]])
            pairs += [(t.weight, float(p)) for t, p in zip(whole[1:], logps, strict=True)]
    shown = -sum(w * p for w, p in pairs) / sum(w for w, _ in pairs)
    batch = common.take(seen.columns, rows.first_rows(seen.columns, config, 3))
    total, _ = fast_jit(lm.loss(loaded.model))(loaded.params, batch, jax.random.key(0))
    assert len(pairs) > 20 and shown == pytest.approx(float(total.value()), rel=1e-4)


def test_a_pair_shows_both_sides_and_labelled_rows_say_which(base, files):
    config = config_of("dpo", init=str(base), data__path=files["pairs"], data__length=32, batch_size=8)
    found = rows.view_of(tables.data_of(config, "dpo", start.notes(), "", 2), config, "dpo", [], 2)
    assert [part.name for part in found.rows[0].parts] == ["chosen", "rejected"]
    assert {t.role for part in found.rows[0].parts for t in part.tokens} == {"user", "assistant"}
    config = config_of("kto", init=str(base), data__path=files["pairs"], data__length=32, batch_size=8)
    titles = [row.title for row in rows.view_of(tables.data_of(config, "kto", start.notes(), "", 9), config, "kto", [], 9).rows]
    assert {title.rpartition(": ")[2] for title in titles} == {"good", "bad"}


def test_masked_tokens_are_shown_as_the_model_reads_them(files):
    config = config_of("mlm", data__path=files["text"], data__length=64, tokenizer="byte", batch_size=4)
    found = rows.view_of(tables.data_of(config, "mlm", start.notes(), "", 2), config, "mlm", [], 4)
    chosen = [t for row in found.rows for part in row.parts for t in part.tokens if t.weight]
    assert any("mask" in t.text.lower() for t in chosen) and all("target" in t.note for t in chosen)
    assert found.trained / found.positions == pytest.approx(0.15, abs=0.03)


def test_text_to_text_shows_what_is_read_and_what_is_answered(files):
    config = config_of("t5", data__path=files["text"], data__length=32, tokenizer="byte", batch_size=4)
    found = rows.view_of(tables.data_of(config, "t5", start.notes(), "", 2), config, "t5", [], 2)
    read, said = found.rows[0].parts
    assert (read.name, said.name) == ("input", "target") and not any(t.weight for t in read.tokens)
    assert sum(t.weight for t in said.tokens) == len(said.tokens) - 1


def test_an_image_stands_where_text_first_sees_it(base, monkeypatch, trained_columns):
    small = {"data__images": 20, "data__test": 20, "data__length": 80, "batch_size": 4}
    config = config_of("flamingo", init=str(base / "pretrain"), **small)
    monkeypatch.setattr(flamingo, "learn_to_see", lambda config, run, model, vision: vision)
    real = trained_columns(flamingo.main, "flamingo", config)["columns"]
    ours = tables.data_of(config, "flamingo", start.notes(), "", 2)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, real, ours.columns)))
    found = rows.view_of(ours, config, "flamingo", [], 3)
    for row in found.rows:
        (part,) = row.parts
        first = part.tokens[0]
        assert first.id == tokens.IMAGE and first.role == "image" and not first.weight and "12 x 12" in first.text
        assert [t.position for t in part.tokens[1:]] == list(range(len(part.tokens) - 1)) and ", 1 image" in part.size
        assert part.pictures[0].startswith(b"\x89PNG")
    parsed = Page(page.page([found]))
    sources = [value for name, value in parsed.attributes if name == "src"]
    assert len(sources) == 3 and all(value.startswith("data:image/png;base64,") for value in sources)


def test_an_image_of_a_later_segment_stands_before_its_own_token():
    part = tokens.Part("", [tokens.Token(i, "x", "text", 1 + i // 3, i % 3) for i in range(6)])
    source = {"segments": np.array([2, 0]), "starts": np.array([3, 0]), "pixels": np.zeros((2, 4, 4), int)}
    found = tokens.with_images(part, source, np.array([1, 1, 2, 2]), [])
    assert [t.id for t in found.tokens] == [0, 1, 2, 3, tokens.IMAGE, 4, 5]


def test_words_without_spaces_of_their_own_are_kept_apart():
    words = images.word_tokenizer(["what", "is", "it"])
    assert tokens.pieces(words, [0, 1, 2]) == ["what", " is", " it"]
    assert tokens.pieces(tokenizers.byte_tokenizer(), [104, 105]) == ["h", "i"]


def test_roles_of_many_rows_need_one_pass_over_the_conversations(base, files, monkeypatch):
    config = config_of("dpo", init=str(base), data__path=files["pairs"], data__length=32, batch_size=8)
    seen = tables.data_of(config, "dpo", start.notes(), "", 8)
    calls, encode = [], chat.encode_chat
    monkeypatch.setattr(chat, "encode_chat", lambda *a, **k: (calls.append(1), encode(*a, **k))[1])
    found = rows.view_of(seen, config, "dpo", [], 8)
    assert all(t.role != "text" for row in found.rows for part in row.parts for t in part.tokens)
    n = len(seen.messages["chosen"])
    assert len(calls) <= 2 * n + 2 * 2 * 8  # each side's conversations once, and the messages of what is shown


def test_rows_come_in_the_order_of_training():
    columns = {"tokens": np.arange(40).reshape(20, 2)}
    config = config_of("sft", batch_size=4, seed=3)
    ours = rows.first_rows(columns, config, 6)
    loader = rows.make_loader(columns, 4, 3)
    real = np.concatenate([loader.batch(0)["tokens"], loader.batch(1)["tokens"]])[:6, 0] // 2
    assert ours.tolist() == real.tolist()


def test_a_rollout_has_rewards_and_the_advantages_of_its_group(base, problems, tmp_path):  # noqa: F811
    path = tmp_path / "mine.py"
    path.write_text("def vowels(row):\n    return sum(c in 'aeiou ' for c in row['completion']) + len(row['completion']) % 3\n")
    given = {k.replace(".", "__"): v for k, v in SMALL.items()}
    config = config_of("grpo", init=str(base), data__path=problems, rewards=f"{path}:vowels", **given)
    found = lens.view(config, "grpo", "", 8, str(tmp_path))
    assert len(found.rows) == 2 and all(len(row.parts) == 4 for row in found.rows)
    for row in found.rows:
        facts = [re.match(r"reward (\S+), advantage (\S+)", part.facts) for part in row.parts]
        rewards, advantages = (np.array([float(m[i]) for m in facts]) for i in (1, 2))
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        assert np.allclose(advantages, expected, atol=2e-2)
        sampled = [t for part in row.parts for t in part.tokens if t.weight]
        assert all(t.role == "assistant" and t.note.startswith("advantage ") for t in sampled)
        assert {t.role for t in row.parts[0].tokens} == {"user", "assistant"}
    assert "advantage" in page.page([found])


def test_a_run_is_looked_at_with_its_own_config(base, capsys, tmp_path):
    lens.run([f"--run={base / 'sft'}", "--rows=1", f"--out={tmp_path / 'x.html'}"])
    out = capsys.readouterr().out
    assert "sft on " in out and "row " in out and (tmp_path / "x.html").read_text().startswith("<!doctype html>")


def test_the_newest_run_is_looked_at_with_its_own_stages(base, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "latest").symlink_to(base / "sft")
    monkeypatch.chdir(tmp_path)
    ((_, experiment, where),) = lens.of_run("latest")
    assert experiment == "sft" and where == "runs/latest"
    ((_, _, where),) = lens.of_run("runs/latest@3")
    seen = []
    monkeypatch.setattr(lens, "inside", lambda config, experiment, run: seen.append(run))
    monkeypatch.setattr(tables, "data_of", lambda config, experiment, log, run, rows: seen.append(run))
    monkeypatch.setattr(lens, "view_of", lambda *args: None)
    lens.view(config_of("sft"), "sft", where, 1, "")
    assert where == "runs/latest@3" and seen == ["runs/latest", "runs/latest"]


def test_of_a_run_of_stages_each_is_shown(base, tmp_path, capsys):
    whole = runs.open_run(tmp_path / "whole", "quickstart", {"seed": 0})
    for stage in ("pretrain", "sft"):
        shutil.copytree(base / stage, whole.workdir / stage, ignore=shutil.ignore_patterns("checkpoints"))
    lens.run([f"--run={whole.workdir}", "--rows=1", f"--out={tmp_path / 'x.html'}"])
    out, source = capsys.readouterr().out, (tmp_path / "x.html").read_text()
    assert "pretrain on " in out and "sft on " in out and source.count("<h1>") == 2 and source.count("<!doctype") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run=nowhere"], "--run=nowhere: no run directory"),
        (["--config=configs/sft.py", "--run=x"], "give --config or --run"),
        (["--config=configs/sft.py", "--rows=0"], "--rows=0"),
        (["--config=configs/quickstart.py"], "no data to show: it trains one stage after another: --config=configs/sft.py"),
        (["--config=configs/best_of_n.py"], "it trains nothing: --config=configs/rejection_sampling.py"),
        (["--config=configs/studies/length_bias.py"], "a study trains runs of its own"),
        (["--config=configs/sft.py", "--experiment=sfx"], "choose one of pretrain"),
        (["--config=configs/sft.py", "--out=nowhere/x.html"], "no directory nowhere"),
        (["--config=configs/sft.py", "--out=README.md"], "is no page of experiments.inspect"),
        (["--config=configs/sft.py", "--config.data.path=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        lens.run(argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_data_of_which_nothing_is_trained_are_refused_by_name(base, tmp_path, capsys):
    path = write_rows(tmp_path / "questions.jsonl", [{"messages": [{"role": "user", "content": f"hi {i}"}]} for i in range(9)])
    with pytest.raises(SystemExit) as stop:
        lens.run(["--config=configs/sft.py", f"--config.init={base}", f"--config.data.path={path}", "--config.batch_size=2"])
    assert stop.value.code == 2 and "questions.jsonl" in capsys.readouterr().err
    nothing = {"tokens": np.ones((2, 4), np.int32), "targets": np.ones((2, 4), np.int32)}
    nothing |= {"segments": np.ones((2, 4), np.int32), "mask": np.zeros((2, 4), bool)}
    with pytest.raises(UserError, match=r"file\.jsonl: none of its 8 tokens is trained"):
        rows.view_of(data.Data(nothing, tokenizers.byte_tokenizer(), "file.jsonl", {}), config_of("sft"), "sft", [], 1)


def test_roles_of_a_conversation_that_was_cut():
    tokenizer = tokenizers.byte_tokenizer()
    told = [{"role": "user", "content": "a long question"}, {"role": "assistant", "content": "and an answer"}]
    whole = chat.encode_chat(tokenizer, told).tokens.tolist()
    part = tokens.given(tokenizer, whole[:30], "")
    (seen,) = roles.with_roles([part], tokenizer, [[told[0]], told], 29, False)
    assert [t.role for t in seen.tokens] == ["user"] * 17 + ["assistant"] * 13


def test_a_rollout_of_ppo_has_an_advantage_for_every_token(base, files, tmp_path):
    pairs = {"steps": 1, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32}
    launch.start(reward.main, "reward", pairs, tmp_path / "reward")
    given = {"data__path": files["prompts"], "batch_size": 8, "max_new_tokens": 8, "max_prompt": 32}
    config = config_of("ppo", init=str(base), reward_model=str(tmp_path / "reward"), **given)
    found = lens.view(config, "ppo", "", 3, str(tmp_path))
    assert len(found.rows) == 3 and all(len(row.parts) == 1 for row in found.rows)
    sampled = [t for row in found.rows for t in row.parts[0].tokens if t.weight]
    advantages = np.array([float(re.match(r"advantage (\S+),", t.note)[1]) for t in sampled])
    assert len(set(advantages)) > len(found.rows)  # GAE: one a token, not one a completion
    assert abs(advantages.mean()) < 0.05 and advantages.std() == pytest.approx(1, abs=0.1)  # whitened over these rows
    with pytest.raises(UserError, match="--config.reward_model"):
        lens.view(config_of("ppo", init=str(base), **given), "ppo", "", 3, str(tmp_path))
