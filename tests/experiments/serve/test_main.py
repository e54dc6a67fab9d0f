"""The command: it prints where it is, refuses what cannot work before a model is loaded, and ends when it is told to."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

from tests.conftest import ROOT


def command(*flags):
    environ = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.serve", *flags], cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(base, number):
    process = command(f"--run={base}", "--stage=sft", "--port=0", "--token=auto", "--slots=2")
    try:
        first, second = process.stdout.readline(), process.stdout.readline()
        assert f"{base / 'sft'} step 3 (sft) as model" in first
        url, token = re.match(r"(http://127\.0\.0\.1:\d+)/#token=([\w-]{32})  \(loopback only\)", second).groups()
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            name = json.load(answer)["data"][0]["id"]
        body = {"model": name, "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 80}
        headers = {**request.headers, "Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.readline().startswith(b"data: ")
            process.send_signal(number)
        out, err = process.communicate(timeout=12)
        assert process.returncode == 0 and "stopped" in out and "Traceback" not in err, (out, err)
    finally:
        process.kill()


def test_what_cannot_work_is_said_in_a_line(base, server):
    for flags, words in (
        ([f"--run={base}", f"--port={server.port}"], f"port {server.port} of 127.0.0.1 is in use: use --port="),
        ([f"--run={base}", "--host=0.0.0.0"], "add --token=auto"),
        (["--run=nowhere", "--port=0"], "nowhere: no such run directory"),
        ([f"--run={base}", "--prot=1"], "Did you mean --port=1"),
    ):
        process = command(*flags)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and words in err and "Traceback" not in err and err.count("\n") == 1, (out, err)
