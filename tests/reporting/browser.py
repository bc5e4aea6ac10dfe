"""A headless Chromium, driven by its own protocol over a pipe: pages, keys, screenshots, and what it complains of."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-quic", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--no-sandbox"),
)
READ, WRITE = 3, 4  # the descriptors on which Chromium reads commands and writes answers
LOGS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def installed() -> str | None:
    """The browser: that of `EMLOC_BROWSER`, or the first on the path."""
    return os.environ.get("EMLOC_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab. `complaints` are what its console shows, `requests` the addresses that it asked for."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._number, self._rest, self._session = 0, b"", ""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def open(self, path: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Load a file in a window of a width, in light or dark colours."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        for url in ("about:blank", path.as_uri()):  # nothing of a page before, such as where it was scrolled to
            self.call("Page.navigate", url=url)
            while self.run("document.readyState") != "complete":
                pass

    def run(self, expression: str) -> Any:
        """The value of JavaScript. An exception in it is raised here."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", found["exceptionDetails"]))
        return found["result"].get("value")

    def press(self, key: str, code: int, text: str = "") -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)

    def screenshot(self, *, whole: bool = True) -> bytes:
        """A PNG of the page, also of what is below the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer, noting events on the way."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])
            if answer.get("method") in LOGS:
                self.complaints.append(json.dumps(answer["params"]))
            elif answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            block = os.read(self._answers, 1 << 16)
            if not block:
                raise RuntimeError("the browser ended")
            self._rest += block
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))


@contextlib.contextmanager
def browser(program: str) -> Iterator[Page]:
    """A browser with one tab and an empty profile; it ends with the block."""
    to_read, commands = os.pipe()
    answers, to_write = os.pipe()

    def pass_on() -> None:
        # By way of high numbers, for either of the two may be the other's place.
        high = [os.dup2(to_read, 100), os.dup2(to_write, 101)]
        os.dup2(high[0], READ)
        os.dup2(high[1], WRITE)

    with tempfile.TemporaryDirectory(prefix="emloc-browser-") as profile:
        process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}"],
            preexec_fn=pass_on,
            pass_fds=(READ, WRITE),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_read)
        os.close(to_write)
        try:
            yield Page(commands, answers)
        finally:
            os.close(commands)
            os.close(answers)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
