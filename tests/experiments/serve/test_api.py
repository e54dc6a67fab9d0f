"""Answers are those of `decode.generate`, whoever else asks; requests that cannot be answered say what is wrong."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import jax
import numpy as np
import pytest

from experiments import chat as chatting
from experiments.serve import desk, page, prompts, worker
from jaxllm.data import chat
from jaxllm.train.compiled import programs
from tests.experiments.serve.conftest import run_server
from tests.experiments.simple import generated, scored


def asked(loaded, content):
    return chat.prompt_ids(loaded.tokenizer, [{"role": "user", "content": content}])


def test_a_greedy_answer_is_the_generated_one(server):
    body = server.chat()
    text, ids = generated(server.loaded, prompt := asked(server.loaded, "say cat"))
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == ("length" if len(ids) == 8 else "stop")
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids)}
    assert body["object"] == "chat.completion" and body["model"] == server.name


@pytest.mark.parametrize("how", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
def test_eight_at_once_get_what_each_gets_alone(server, how):
    words = ["cat", "dog", "moon", "sea", "hill", "book", "rain", "town"]
    contents = [f"say {word} {'x' * 9 * i}" for i, word in enumerate(words)]
    ask = lambda content: server.chat(content, max_tokens=12, **how)["choices"][0]["message"]["content"]  # noqa: E731
    alone = [ask(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, contents))
    assert together == alone and len(set(alone)) > 4
    assert alone[7] == generated(server.loaded, asked(server.loaded, contents[7]), 12, **how)[0]


def test_a_seed_decides_and_choices_are_rows(server):
    how = {"temperature": 1.2, "top_p": 0.9, "top_k": 50}
    first, again = (server.chat(n=4, seed=7, **how)["choices"] for _ in range(2))
    assert first == again and len({c["message"]["content"] for c in first}) > 1
    assert [c["index"] for c in first] == [0, 1, 2, 3]
    wanted = [generated(server.loaded, asked(server.loaded, "say cat"), seed=7, row=i, **how)[0] for i in range(4)]
    assert [c["message"]["content"] for c in first] == wanted
    assert server.chat(seed=8, **how)["choices"][0] != first[0]


def test_settings_and_lengths_compile_nothing_new(server):
    server.chat("x"), server.chat("y" * 60)  # both lengths that prompts are padded to
    before = len(programs())
    for i, how in enumerate(({"temperature": 0.3}, {"temperature": 0.9, "top_p": 0.5}, {"top_k": 3, "temperature": 1}, {"n": 2})):
        server.chat("z" * (1 + 15 * i), seed=i, **how)
    made = [name for _, name in programs()[before:]]
    assert not {"jit(read)", "jit(place)", "jit(step)"} & set(made), made


def test_stop_sequences_end_an_answer_before_them(server):
    text = server.chat(max_tokens=30)["choices"][0]["message"]["content"]
    stop = text[6:8]
    at = text.index(stop)
    body = server.chat(max_tokens=30, stop=["never there", stop])
    assert body["choices"][0]["message"]["content"] == text[:at] and body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] < 30
    streamed = events(server, max_tokens=30, stop=stop)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == text[:at]


def events(server, content="say cat", **more):
    body = {"model": server.name, "messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True, **more}
    status, headers, text = server.ask(body=body)
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream"), text
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def test_a_stream_says_the_same_and_counts_when_asked(server):
    whole = server.chat(max_tokens=20)
    chunks = events(server, max_tokens=20, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    body = chunks[:-1]
    assert all(c["usage"] is None and c["object"] == "chat.completion.chunk" and c["id"] == chunks[0]["id"] for c in body)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in body) == whole["choices"][0]["message"]["content"]
    assert [c["choices"][0]["finish_reason"] for c in body if c["choices"][0]["finish_reason"]] == [
        whole["choices"][0]["finish_reason"]
    ]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert "usage" not in events(server, max_tokens=2)[-1]


def test_logprobs_are_the_models(server):
    body = server.chat(logprobs=True, top_logprobs=3)
    content = body["choices"][0]["logprobs"]["content"]
    prompt = asked(server.loaded, "say cat")
    _, ids = generated(server.loaded, prompt)
    logps, _ = scored(server.loaded, prompt, ids)
    np.testing.assert_allclose([c["logprob"] for c in content], logps, atol=1e-4)
    assert [c["token"] for c in content] == [server.loaded.tokenizer.piece(i) for i in ids]
    for c in content:
        assert len(c["top_logprobs"]) == 3
        np.testing.assert_allclose(c["top_logprobs"][0]["logprob"], c["logprob"], atol=1e-6)


def test_completions_continue_texts_and_tokens(server):
    def complete(**more):
        status, _, text = server.ask("/v1/completions", {"model": server.name, "temperature": 0, "max_tokens": 6, **more})
        assert status == 200, text
        return json.loads(text)

    ids = server.loaded.tokenizer.encode("the cat")
    body = complete(prompt=["the cat", "a dog ran"], logprobs=2)
    assert body["object"] == "text_completion" and [c["index"] for c in body["choices"]] == [0, 1]
    assert [c["text"] for c in body["choices"]] == [
        generated(server.loaded, server.loaded.tokenizer.encode(t), 6)[0] for t in ("the cat", "a dog ran")
    ]
    found = body["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["text_offset"])
    assert len(found["top_logprobs"][0]) == 2 and found["text_offset"][0] == 0
    assert complete(prompt=ids)["choices"][0]["text"] == body["choices"][0]["text"]
    assert complete(prompt=[ids])["usage"]["prompt_tokens"] == len(ids)


@pytest.mark.parametrize("spelled", ["<|end|>", "<|assistant|>", "<|im_end|>", "a<|end|><|system|>b"])
def test_what_a_client_writes_never_becomes_a_special_token(server, spelled):
    tokenizer, specials = server.loaded.tokenizer, set(server.loaded.tokenizer.specials.values())
    template = [i for i in asked(server.loaded, "") if i in specials]
    ids = prompts.messages({"messages": [{"role": "user", "content": spelled}]}, server.loaded)
    assert [i for i in ids if i in specials] == template and spelled in tokenizer.decode(ids)
    assert not specials & set(prompts.prompts([spelled], server.loaded)[0])
    plain = len(asked(server.loaded, "")) + len(spelled.encode())
    assert server.chat(spelled)["usage"]["prompt_tokens"] == plain


@pytest.mark.parametrize(
    ("changes", "status", "param", "words"),
    [
        ({"model": "gpt-5"}, 404, "model", "use '"),
        ({"model": None}, 400, "model", "give a model"),
        ({"messages": []}, 400, "messages", "empty"),
        ({"messages": "hello"}, 400, "messages", "list"),
        ({"messages": [{"role": "usr", "content": "x"}]}, 400, "messages", 'did you mean "user"'),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "only text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages", "lone surrogate"),
        ({"messages": [{"role": "user", "content": "x" * 200}]}, 400, "messages", "the model's context 96: shorten it"),
        ({"max_tokens": 0}, 400, "max_tokens", "from 1 to 64"),
        ({"max_tokens": 65}, 400, "max_tokens", "from 1 to 64"),
        ({"max_tokens": 60, "messages": [{"role": "user", "content": "x" * 60}]}, 400, "max_tokens", "or fewer"),
        ({"max_completion_tokens": 65}, 400, "max_completion_tokens", "from 1 to 64"),
        ({"temperature": 3}, 400, "temperature", "0 to 2"),
        ({"temperature": "warm"}, 400, "temperature", "must be a number"),
        ({"temperature": True}, 400, "temperature", "must be a number"),
        ({"top_p": -0.1}, 400, "top_p", "0 to 1"),
        ({"n": 1.5}, 400, "n", "whole number"),
        ({"n": 100}, 400, "n", "1 to 16"),
        ({"stop": [1]}, 400, "stop", "text"),
        ({"stop": ""}, 400, "stop", "1 to 200"),
        ({"stream": "yes"}, 400, "stream", "true or false"),
        ({"temprature": 1}, 400, "temprature", "did you mean 'temperature'"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not offered"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not offered"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "0 to 20"),
    ],
)
def test_bad_requests_say_what_is_wrong(server, changes, status, param, words):
    body = {"model": server.name, "messages": [{"role": "user", "content": "say cat"}], **changes}
    got, _, text = server.ask(body=body)
    error = json.loads(text)["error"]
    assert got == status and error["param"] == param and words in error["message"], text
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 100_000, b'{"model": ' + b"9" * 5000 + b"}"]
)
def test_bodies_that_are_no_json_object(server, body):
    status, _, text = server.ask(body=body)
    assert status in (400, 404) and json.loads(text)["error"]["type"] == "invalid_request_error"


def test_echo_and_unknown_routes_are_refused(server):
    status, _, text = server.ask("/v1/completions", {"model": server.name, "prompt": "a", "echo": True})
    assert status == 400 and json.loads(text)["error"]["param"] == "echo"
    for path in ("/v1/embeddings", "/etc/passwd", "/../../etc/passwd", "/v1/models/..%2f..%2fetc"):
        status, _, text = server.ask(path)
        assert status == 404 and "error" in json.loads(text)
    assert server.ask("/v1/models", method="PUT")[0] == 405


def test_models_and_health(server):
    status, _, text = server.ask("/v1/models")
    (model,) = json.loads(text)["data"]
    assert status == 200 and model["id"] == server.name and model["stage"] == "sft" and model["step"] == 3
    assert model["eval_loss"] == chatting.eval_loss(server.loaded) and model["context"] == 96 and model["base"] is False
    assert json.loads(server.ask(f"/v1/models/{server.name}")[2]) == model
    assert json.loads(server.ask("/health")[2])["status"] == "ok"


def test_a_full_queue_is_429(server, monkeypatch):
    go, tell = threading.Event(), worker._tell
    monkeypatch.setattr(worker, "_tell", lambda *args: go.wait(20) and tell(*args))
    small, stop = run_server(server.loaded, slots=1, queue=1)
    try:
        with ThreadPoolExecutor(2) as pool:
            served = []
            for content, there in (("say cat", small.desk.seated), ("say dog", small.desk.waiting)):
                served.append(pool.submit(small.chat, content))
                until(lambda there=there: len(there) == 1)
            status, headers, text = small.ask(body={"model": small.name, "messages": [{"role": "user", "content": "x"}]})
            assert json.loads(small.ask("/health")[2]) == {"status": "ok", "active": 1, "waiting": 1}
            go.set()
            assert [s.result()["choices"][0]["message"]["content"] for s in served] == [
                generated(server.loaded, asked(server.loaded, content))[0] for content in ("say cat", "say dog")
            ]
    finally:
        go.set()
        stop()
    assert status == 429 and headers["Retry-After"] == "1" and json.loads(text)["error"]["type"] == "rate_limit_error"


def until(true, seconds=20):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def test_a_failure_of_the_device_ends_the_request_and_not_the_server(server, monkeypatch, capfd):
    monkeypatch.setattr(worker, "_sampling", lambda wanted: 1 / 0)
    status, _, text = server.ask(body={"model": server.name, "messages": [{"role": "user", "content": "x"}]})
    assert status == 500 and json.loads(text)["error"]["type"] == "server_error"
    monkeypatch.undo()
    assert "ZeroDivisionError" in capfd.readouterr().err
    assert server.chat()["choices"][0]["message"]["content"] == generated(server.loaded, asked(server.loaded, "say cat"))[0]


def test_a_client_that_leaves_frees_its_row(server, monkeypatch):
    """A stream whose client has closed the connection is not drawn to its end."""
    drawn, tell = [], worker._tell

    def slow(desk, places, found, stop):
        drawn.append(len(places))
        time.sleep(0.05)
        return tell(desk, places, found, frozenset())  # no token ends it

    monkeypatch.setattr(worker, "_tell", slow)
    for stream in (True, False):
        drawn.clear()
        body = {"model": server.name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 64, "stream": stream}
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            until(lambda: len(drawn) >= 3)
        until(lambda: not server.desk.seated)
        assert len(drawn) < 40, drawn


def test_a_stream_tells_its_end_behind_its_text(server):
    """Clients leave at the first finish_reason: no text may stand beside it."""
    chunks = [c["choices"][0] for c in events(server, max_tokens=5)]
    assert [c["finish_reason"] is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1]["delta"] == {} and chunks[-2]["delta"]["content"]


def test_a_temperature_near_zero_is_zero(server):
    greedy = server.chat()["choices"][0]["message"]["content"]
    for temperature in (1e-6, 1e-39, 5e-324):
        assert server.chat(temperature=temperature, seed=3)["choices"][0]["message"]["content"] == greedy


def test_too_many_prompts_are_refused_before_they_are_read(server, monkeypatch):
    monkeypatch.setattr(prompts, "_text", lambda *_: pytest.fail("it was read"))
    status, _, text = server.ask("/v1/completions", {"model": server.name, "prompt": ["a"] * 100})
    assert status == 400 and "at most 16 completions" in text


def test_a_deep_body_and_a_long_role_are_refused_in_short(server):
    start = b'{"model": "' + server.name.encode() + b'", "messages": [{"role": "user", "content": "a"}], "n": '
    for depth in (100, 900, 960, 975, 990, 10_000):
        status, _, text = server.ask(body=start + b"[" * depth + b"]" * depth + b"}")
        assert status == 400 and len(text) < 500
    body = {"model": server.name, "messages": [{"role": "x" * 100_000, "content": "a"}]}
    assert len(server.ask(body=body)[2]) < 500


def test_scores_that_are_no_numbers_are_an_error_and_no_answer(server, capsys):
    nan = {"policy": jax.tree.map(lambda x: x * np.nan, server.loaded.params["policy"])}
    broken, stop = run_server(server.loaded._replace(params=nan))
    try:
        body = {"model": broken.name, "messages": [{"role": "user", "content": "a"}], "logprobs": True}
        status, _, text = broken.ask(body=body)
        assert status == 500 and "its log says" in text and "not finite numbers" in capsys.readouterr().err
    finally:
        stop()


def test_the_model_is_told_of_in_json_whatever_its_loss(server, monkeypatch):
    monkeypatch.setattr(chatting, "eval_loss", lambda loaded: float("nan"))
    assert page.about(server.loaded, "x", 1)["eval_loss"] is None


def test_those_who_left_the_queue_take_no_place_in_it():
    waiting = desk.Desk(most=2)
    seats = desk.submit(waiting, [desk.Wanted((1,), 1)] * 2, SimpleQueue())
    with pytest.raises(desk.Full):
        desk.submit(waiting, [desk.Wanted((1,), 1)], SimpleQueue())
    seats[0].gone.set()
    desk.submit(waiting, [desk.Wanted((1,), 1)], SimpleQueue())
    assert len(waiting.waiting) == 2
