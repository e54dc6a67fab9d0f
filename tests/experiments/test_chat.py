"""Talking to a checkpoint: the streamed answer is the generated one, and commands do what they say."""

import jax
import pytest

from experiments import chat as chatting
from jaxllm import launch
from jaxllm.core.types import UserError
from jaxllm.data import chat
from jaxllm.data.text import read_rows
from jaxllm.generate.stream import make_streamer
from jaxllm.report.console import printable
from tests.experiments.simple import generated


@pytest.fixture(scope="module")
def loaded(base):
    return launch.load(base / "sft")


def talk(loaded, lines, **changes):
    written = []
    settings = {"temperature": 0.0, "max_new_tokens": 8, "seed": 0, **changes}
    chatting.converse(loaded, lines, written.append, **settings)
    return "".join(written)


def answer_to(loaded, text):
    return generated(loaded, chat.prompt_ids(loaded.tokenizer, [{"role": "user", "content": text}]))[0]


def test_the_streamed_answer_is_the_greedy_completion(loaded):
    written = []
    stream = make_streamer(loaded.model, temperature=0.0)
    messages = [{"role": "user", "content": "say cat"}]
    answer = chatting.reply(loaded, stream, messages, jax.random.key(0), 8, written.append)
    assert answer == answer_to(loaded, "say cat")
    assert answer.startswith("".join(written))


def test_a_base_model_continues_plain_text(base):
    loaded = launch.load(base / "pretrain")
    wanted = generated(loaded, loaded.tokenizer.encode("the cat sat"))[0]
    stream = make_streamer(loaded.model, temperature=0.0)
    messages = [{"role": "user", "content": "the cat sat"}]
    assert chatting.reply(loaded, stream, messages, jax.random.key(0), 8, lambda _: None) == wanted


def test_reset_forgets_and_quit_leaves(loaded):
    once = talk(loaded, ["say cat"])
    again = talk(loaded, ["say dog", "/reset", "say cat", "/quit", "say moon"])
    assert again.count("\n") == 2 and again.split("> ")[2] == once.split("> ")[0]


def test_turns_beyond_those_of_training_are_forgotten(loaded):
    assert loaded.meta["turns"] == 1
    once = talk(loaded, ["say cat"])
    assert talk(loaded, ["say dog", "say cat"]).split("> ")[1] == once.split("> ")[0]


def test_temperature_must_be_a_number(loaded):
    for wrong in ("/temp warm", "/temp", "/temp nan", "/temp -1", "/temp inf"):
        assert "use /temp 0.7" in talk(loaded, [wrong])
    assert "use /temp" not in talk(loaded, ["/temp 0.5"])


def test_save_keeps_the_conversation_and_overwrites_nothing(loaded, tmp_path):
    file = tmp_path / "talk.jsonl"
    assert "nothing has been said" in talk(loaded, [f"/save {file}"]) and not file.exists()
    said = talk(loaded, ["say cat", "/save", f"/save {file}", f"/save {file}", f"/save {tmp_path / 'no' / 'where'}"])
    for words in ("use /save talk.jsonl", "2 messages in", "is there already", "cannot be written"):
        assert words in said
    (row,) = read_rows(file)
    assert chat.normalise(row, "talk")[0] == {"role": "user", "content": "say cat"} and len(row["messages"]) == 2


def test_the_first_line_says_which_checkpoint_and_what_it_is(base, loaded, monkeypatch, capsys):
    about = chatting.about(launch.load(base / "pretrain"))
    assert about.startswith(f"{base / 'pretrain'} step 3, eval loss ")
    assert about.endswith("(base model: continues text; not instruction tuned)")
    assert 4 < float(about.split("eval loss ")[1].split()[0]) < 7
    assert chatting.about(loaded).endswith("(sft)")
    monkeypatch.setattr("sys.stdin", iter(["/help", "/quit"]))
    chatting.main(run=str(base), stage="pretrain")
    out = capsys.readouterr().out
    assert out.startswith(f"{about}. /reset, /temp 0.7, /save talk.jsonl, /quit\n") and "unknown command /help" in out


def test_a_message_that_cannot_be_answered_is_not_kept(loaded):
    once = talk(loaded, ["say cat"])
    assert talk(loaded, ["x" * 200, "say cat"]).split("> ")[1] == once.split("> ")[0]


def test_a_conversation_longer_than_the_context_says_so(loaded):
    assert "error: the conversation has" in talk(loaded, ["x" * 200])


def test_a_reward_model_cannot_talk(base, files, tmp_path):
    from experiments import reward

    overrides = {"steps": 1, "batch_size": 8, "init": str(base), "data.path": files["pairs"], "data.length": 32}
    launch.start(reward.main, "reward", overrides, tmp_path / "reward")
    with pytest.raises(UserError, match="cannot talk"):
        chatting.main(run=str(tmp_path / "reward"))


def test_a_model_does_not_steer_the_terminal():
    assert printable("a\x1b]52;c;ZXZpbA==\x07\r\x9b2J\u202eb\tü\n") == "a\\x1b]52;c;ZXZpbA==\\x07\\r\\x9b2J\\u202eb\tü\n"
    assert printable("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469"
