"""Headless Chromium, driven by its DevTools protocol (chromedevtools.github.io/devtools-protocol).

with browsing(tmp_path) as page:
    page.open("http://127.0.0.1:8000/")
    page.press("Tab")
    page.wait_for("document.title == 'x'")
"""

import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import time
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEYS = {  # name: (code, text)
    "Enter": (13, "\r"),
    "Tab": (9, None),
    "Escape": (27, None),
    "ArrowLeft": (37, None),
    "ArrowRight": (39, None),
}


class Page:
    """One page of a browser. `errors` has its uncaught exceptions and the errors of its console."""

    def __init__(self, connection):
        self.connection, self.numbers, self.errors = connection, itertools.count(1), []
        for domain in ("Page", "Runtime", "Log"):
            self.command(f"{domain}.enable")

    def command(self, method, **params):
        number = next(self.numbers)
        self.connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.connection.recv(timeout=60))
            entry = message.get("params", {}).get("entry", {})
            if message.get("method") == "Runtime.exceptionThrown" or entry.get("level") in ("warning", "error"):
                self.errors.append(message["params"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, expression):
        """Return the value of a JavaScript expression."""
        result = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, expression, seconds=30):
        """Wait until an expression is true; return its value."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < end, f"{expression}: {self.evaluate('document.body.innerText')}"
            time.sleep(0.02)
        return value

    def open(self, url):
        self.command("Page.navigate", url=url)
        self.wait_for(f"location.href.startsWith('{url}') && document.readyState == 'complete'")

    def type(self, text):
        self.command("Input.insertText", text=text)

    def press(self, key, shift=False):
        code, text = KEYS[key]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 * shift}
        event |= {"text": text} if text else {}
        for kind in ("keyDown", "keyUp"):
            self.command("Input.dispatchKeyEvent", type=kind, **event)

    def look(self, width, height, scheme):
        """Set the size of the window in CSS pixels, and whether the system prefers light or dark."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def browsing(directory):
    """Start Chromium with a profile in a directory; yield its page."""
    from websockets.sync.client import connect

    profile = directory / "profile"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    with subprocess.Popen(
        [*command, f"--user-data-dir={profile}", "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            end, port_file = time.monotonic() + 60, profile / "DevToolsActivePort"
            while not (port_file.exists() and port_file.read_text().count("\n")):
                assert time.monotonic() < end and process.poll() is None, "Chromium did not start"
                time.sleep(0.05)
            port = port_file.read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list") as answer:
                [target] = [target for target in json.load(answer) if target["type"] == "page"]
            with connect(target["webSocketDebuggerUrl"], max_size=None) as connection:
                yield Page(connection)
        finally:
            process.terminate()
