"""Chromium without a screen, driven over WebDriver with what Python has: enough to type, to click and to read."""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from typing import NamedTuple

import pytest

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # how WebDriver's JSON names an element


class Browser(NamedTuple):
    """A session of chromedriver."""

    url: str

    def call(self, path, body=None, method=None):
        data = None if body is None and method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self.call("/url", {"url": url})

    def run(self, script):
        return self.call("/execute/sync", {"script": f"return {script}", "args": []})

    def element(self, selector):
        return f"/element/{self.call('/element', {'using': 'css selector', 'value': selector})[ELEMENT]}"

    def type(self, selector, text):
        self.call(f"{self.element(selector)}/value", {"text": text})

    def click(self, selector):
        self.call(f"{self.element(selector)}/click", method="POST")

    def wait(self, script, seconds=20):
        """Until the script's value is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.05)
        return value

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("/screenshot")))

    def complaints(self):
        return [entry["message"] for entry in self.call("/se/log", {"type": "browser"})]


@contextlib.contextmanager
def open_browser(width, height):
    """A Browser with a screen of that size; skips the test where there is no Chromium."""
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium with chromedriver here")
    process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        lines = (process.stdout.readline() for _ in range(20))
        port = next(found[1] for line in lines if (found := re.search(r"successfully on port (\d+)", line)))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
        screen = {"deviceMetrics": {"width": width, "height": height, "pixelRatio": 2}}
        options = {"binary": program, "args": flags, "mobileEmulation": screen}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = Browser(f"http://127.0.0.1:{port}").call("/session", {"capabilities": wanted})
        browser = Browser(f"http://127.0.0.1:{port}/session/{session['sessionId']}")
        yield browser
        browser.call("", method="DELETE")
    finally:
        process.terminate()
        process.wait(10)
