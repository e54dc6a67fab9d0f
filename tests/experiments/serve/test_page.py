"""The chat page in headless Chromium: it streams, stops, shows text as text, and fits a phone."""

import time
from dataclasses import replace

import pytest

from experiments.serve import worker
from tests.experiments.serve.browser import open_browser
from tests.experiments.serve.conftest import run_server

pytestmark = pytest.mark.slow
IDLE = "!document.querySelector('#send').disabled"
ANSWERS = "[...document.querySelectorAll('.assistant')].map((e) => e.textContent)"
ATTACK = '<img src=x onerror="document.title=1"><script>document.title=2</script>'


@pytest.fixture(scope="module")
def phone():
    with open_browser(390, 800) as browser:
        yield browser


def say(browser, text, temperature="0"):
    browser.run(f"document.querySelector('#temperature').value = '{temperature}'")
    browser.type("#text", text)
    browser.click("#send")


def test_it_streams_what_the_api_says(phone, server, tmp_path):
    phone.open(f"http://127.0.0.1:{server.port}/")
    phone.wait(IDLE)
    assert phone.run("document.querySelector('#name').textContent") == server.name
    about = phone.run("document.querySelector('#about').textContent")
    assert about.startswith(f"{server.loaded.workdir} step 3") and "(stage sft)" in about and "it sees one turn" in about
    for text in ("say cat", "say dog <b>bold</b>"):
        say(phone, text)
        phone.wait(IDLE)
    wanted = [server.chat(text, max_tokens=64)["choices"][0]["message"]["content"] for text in ("say cat", "say dog <b>bold</b>")]
    assert phone.run(ANSWERS) == wanted and wanted[0] != wanted[1]
    # what the model no longer sees is grey
    past = phone.run("[...document.querySelectorAll('.message')].map((e) => e.classList.contains('past'))")
    assert past == [True, True, False, False]
    assert phone.run("document.documentElement.scrollWidth <= window.innerWidth") and phone.run("window.innerWidth") == 390
    new, send = ([phone.run(f"document.querySelector('{n}').getBoundingClientRect().{side}") for side in ("top", "bottom")]
                 for n in ("#reset", "#send"))  # fmt: skip
    assert new == send and send[1] <= 800  # one line of buttons, on the screen
    phone.screenshot(tmp_path / "phone.png")
    assert phone.complaints() == []
    phone.click("#reset")
    assert phone.run("document.querySelectorAll('.message').length") == 0


def test_stop_keeps_what_was_said_and_frees_the_row(phone, server, monkeypatch):
    tell = worker._tell

    def slow(desk, places, found, stop):
        time.sleep(0.1)
        return tell(desk, places, found, frozenset())

    monkeypatch.setattr(worker, "_tell", slow)
    phone.open(f"http://127.0.0.1:{server.port}/")
    phone.wait(IDLE)
    say(phone, "say moon")
    phone.wait(f"{ANSWERS}[0].length > 1")
    assert phone.run("document.querySelector('#send').disabled")
    phone.click("#stop")
    phone.wait(IDLE)
    assert 1 < len(phone.run(ANSWERS)[0]) < 60 and phone.run("document.querySelectorAll('.error').length") == 0
    deadline = time.monotonic() + 5
    while server.desk.seated and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not server.desk.seated


def test_what_a_model_says_is_text_and_a_token_is_kept_from_the_address(phone, server, tmp_path):
    tokenizer = replace(server.loaded.tokenizer, decode=lambda ids: ATTACK * len(ids))
    token = "a-token-of-the-tests"
    locked, stop = run_server(server.loaded._replace(tokenizer=tokenizer), token=token, max_tokens=3)
    try:
        phone.open(f"http://127.0.0.1:{locked.port}/")
        phone.wait("document.querySelectorAll('.error').length == 1")
        assert "give the server's token" in phone.run("document.querySelector('.error').textContent")
        phone.open("about:blank")
        phone.open(f"http://127.0.0.1:{locked.port}/#token={token}")
        phone.wait(IDLE)
        assert phone.run("location.href") == f"http://127.0.0.1:{locked.port}/"
        phone.call("/refresh", method="POST")
        phone.wait(IDLE)  # this tab remembers it
        say(phone, ATTACK)
        phone.wait(IDLE)
        assert phone.run(ANSWERS) == [ATTACK * 3] and phone.run("document.querySelector('.user').textContent") == ATTACK
        assert phone.run("document.images.length") == 0 and phone.run("document.title") == "jaxllm chat"
        # even markup that got into the page would not run
        phone.run(f"(document.querySelector('#about').innerHTML = {ATTACK!r}, 1)")
        time.sleep(0.2)
        assert phone.run("document.title") == "jaxllm chat"
        phone.screenshot(tmp_path / "attack.png")
    finally:
        stop()


def test_what_is_not_answered_does_not_stand_in_the_way(phone, server):
    """A text beyond the context, and a server that is gone: the error is said, the words are kept, the talk goes on."""
    phone.open(f"http://127.0.0.1:{server.port}/")
    phone.wait(IDLE)
    say(phone, "x" * 200)
    phone.wait(IDLE)
    assert "shorten it" in phone.run("document.querySelector('.error').textContent")
    assert phone.run("document.querySelector('#text').value") == "x" * 200 and phone.run(ANSWERS) == []
    phone.run("(document.querySelector('#text').value = '', 1)")
    phone.run("(window.fetch = () => Promise.reject(new TypeError('Failed to fetch')), 1)")
    say(phone, "say cat")
    phone.wait(IDLE)
    assert "is it running" in phone.run("[...document.querySelectorAll('.error')].at(-1).textContent")
    assert phone.run("messages.length") == 0 and phone.run("document.activeElement.id") == "text"
    # what was not answered is not counted among the turns that the model sees
    phone.open(f"http://127.0.0.1:{server.port}/")
    phone.wait(IDLE)
    for text in ("say cat", "x" * 200, "say dog"):
        phone.run("(document.querySelector('#text').value = '', 1)")
        say(phone, text)
        phone.wait(IDLE)
    turns = "[...document.querySelectorAll('.message:not(.error, .unanswered)')]"
    past = phone.run(f"{turns}.map((e) => e.classList.contains('past'))")
    assert past == [True, True, False, False] and phone.run("document.querySelectorAll('.unanswered').length") == 1


def test_writing_from_right_to_left(phone, server):
    phone.open(f"http://127.0.0.1:{server.port}/")
    phone.wait(IDLE)
    say(phone, "\u05e9\u05dc\u05d5\u05dd")
    phone.wait(IDLE)
    assert phone.run("getComputedStyle([...document.querySelectorAll('.user')].at(-1)).direction") == "rtl"
