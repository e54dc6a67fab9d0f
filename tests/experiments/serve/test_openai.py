"""The `openai` client: what its users call works, streaming and not, and errors arrive as its exceptions."""

import pytest

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": "say cat"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_models(client, server):
    assert [m.id for m in client.models.list()] == [server.name]
    assert client.models.retrieve(server.name).owned_by == "jaxllm"


def test_chat(client, server):
    answer = client.chat.completions.create(model=server.name, messages=ASK, temperature=0, max_completion_tokens=8)
    assert answer.choices[0].message.content == server.chat()["choices"][0]["message"]["content"]
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_chat_streamed(client, server):
    options = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    stream = client.chat.completions.create(
        model=server.name, messages=ASK, stream=True, stream_options={"include_usage": True}, **options
    )
    *chunks, last = list(stream)
    whole = client.chat.completions.create(model=server.name, messages=ASK, **options)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage and not last.choices
    told = [token for c in chunks if c.choices[0].logprobs for token in c.choices[0].logprobs.content]
    assert told == whole.choices[0].logprobs.content and len(told) == whole.usage.completion_tokens


def test_completions(client, server):
    options = {"model": server.name, "prompt": "the cat", "temperature": 1.1, "seed": 3, "max_tokens": 8, "n": 3}
    whole = client.completions.create(**options)
    texts = dict.fromkeys(range(3), "")
    for chunk in client.completions.create(**options, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {c.index: c.text for c in whole.choices} and len(set(texts.values())) > 1


def test_extensions_and_several_clients(client, server):
    greedy = client.chat.completions.create(model=server.name, messages=ASK, temperature=0, max_tokens=8)
    first = client.chat.completions.create(
        model=server.name, messages=ASK, temperature=2, max_tokens=8, extra_body={"top_k": 1}, user="u1"
    )
    assert first.choices[0].message.content == greedy.choices[0].message.content


def test_errors_are_the_clients_exceptions(client, server):
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-5", messages=ASK)
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model=server.name, messages=[{"role": "user", "content": "x" * 300}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(model=server.name, prompt="x", top_p=2)
