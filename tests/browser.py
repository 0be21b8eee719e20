"""A headless Chromium with the network off, over WebDriver: pages, keys, pointer, scripts."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
"""The key under which WebDriver hands out an element."""


class Browser:
    """One window. ``run`` executes a script's body and returns what it returns."""

    def __init__(self, address, session):
        self._session = f"{address}/session/{session}"

    def _ask(self, path, body=None, method="POST"):
        return ask(f"{self._session}/{path}", body, method)

    def open(self, url):
        self._ask("url", {"url": url})

    def run(self, script, *arguments):
        return self._ask("execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, condition, seconds=20):
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}"
            time.sleep(0.02)

    def find(self, selector):
        return self._ask("element", {"using": "css selector", "value": selector})[ELEMENT]

    def keys(self, selector, text):
        self._ask(f"element/{self.find(selector)}/value", {"text": text})

    def click(self, selector):
        self._ask(f"element/{self.find(selector)}/click", {})

    def hover(self, selector, x=0, y=0):
        """Move the pointer to an element's middle, or some pixels off it."""
        origin = {ELEMENT: self.find(selector)}
        move = {"type": "pointerMove", "duration": 0, "origin": origin, "x": x, "y": y}
        pointer = {"type": "pointer", "id": "mouse", "actions": [move]}
        self._ask("actions", {"actions": [pointer]})

    def scheme(self, name):
        """Let the system's colour scheme be ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self._ask(
            "goog/cdp/execute",
            {"cmd": "Emulation.setEmulatedMedia", "params": {"features": features}},
        )

    def messages(self):
        """Return what the console says since it was last asked."""
        return [entry["message"] for entry in self._ask("se/log", {"type": "browser"})]

    def picture(self, path):
        path.write_bytes(base64.b64decode(self._ask("screenshot", method="GET")))


def ask(url, body=None, method="POST"):
    data = None if method != "POST" else json.dumps(body or {}).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        with error:
            raise AssertionError(json.load(error)["value"]) from None


@contextlib.contextmanager
def browser(profile, size=(1280, 860)):
    """A window for the time of a block; its browser and driver end with it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = os.environ | {"HOME": str(profile)}
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=home,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address)
        session = ask(
            f"{address}/session", {"capabilities": {"alwaysMatch": options(profile, size)}}
        )
        try:
            yield Browser(address, session["sessionId"])
        finally:
            ask(f"{address}/session/{session['sessionId']}", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(10)


def options(profile, size):
    arguments = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--window-size={size[0]},{size[1]}",
        f"--user-data-dir={profile / 'chromium'}",
    ]
    return {
        "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
        "goog:loggingPrefs": {"browser": "ALL"},
    }


def wait_for(address, seconds=20):
    end = time.monotonic() + seconds
    while True:
        try:
            return ask(f"{address}/status", method="GET")
        except OSError:
            assert time.monotonic() < end, "chromedriver does not answer"
            time.sleep(0.05)
