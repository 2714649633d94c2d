"""A headless Chromium for tests, driven over its own pipe (`--remote-debugging-pipe`): no driver, no library, no port.

Owns the browser process and its profile folder. Every wait has a bound.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BOUND_S = 60.0


def chromium() -> str:
    """The browser's path: what CHROMIUM names, or Debian's. It is not optional: a test that cannot look has not passed."""
    found = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert found, "there is no Chromium: install the package chromium, or name one in CHROMIUM"
    return found


class Refused(AssertionError):
    """The browser or the page could not do it; while another document is loaded, that passes."""


class Browser:
    """One process with one page; a context manager that ends both. ``complaints``: what the page or its policy complained of;
    ``asked``: every address that it asked for."""

    def __init__(self, folder: Path) -> None:
        reads, writes = os.pipe(), os.pipe()
        flags = [
            "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run", "--disable-gpu",
            "--hide-scrollbars", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update",
            "--disable-extensions",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]  # fmt: skip

        def hand_over() -> None:
            # The browser reads commands at descriptor 3 and answers at 4.
            os.dup2(reads[0], 3)
            os.dup2(writes[1], 4)

        self._process = subprocess.Popen(
            [chromium(), *flags, "about:blank"], preexec_fn=hand_over, pass_fds=(3, 4), stdin=subprocess.DEVNULL,  # noqa: PLW1509
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        os.close(reads[0])
        os.close(writes[1])
        self._to, self._from = reads[1], writes[0]
        self._heard = bytearray()
        self._serial = 0
        self._session = ""
        self.complaints: list[str] = []
        self.asked: list[str] = []

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._to)  # it ends with its pipe
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, 9)
            self._process.wait(10)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its result. Events that arrive meanwhile are noted."""
        self._serial += 1
        message = {"id": self._serial, "method": method, "params": params} | ({"sessionId": self._session} if self._session else {})
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        deadline = time.monotonic() + BOUND_S
        while True:
            answer = self._next(deadline, method)
            if answer.get("id") == self._serial:
                if "error" in answer:
                    raise Refused(f"{method}: {answer['error']}")
                return dict(answer["result"])
            self._note(answer)

    def _next(self, deadline: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._heard:
            assert select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))[0], f"no answer to {what}"
            part = os.read(self._from, 1 << 20)
            assert part, f"the browser ended with {self._process.poll()} before it answered {what}"
            self._heard += part
        message, _, rest = self._heard.partition(b"\0")
        self._heard = bytearray(rest)
        return dict(json.loads(message))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.complaints.append(str(details.get("exception", {}).get("description") or details["text"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.asked.append(params["request"]["url"])

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """What an expression of the page is, as JSON."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise Refused(answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, script: str, bound_s: float = BOUND_S) -> Any:
        """Wait until an expression is true; returns it."""
        deadline = time.monotonic() + bound_s
        while True:
            try:
                if value := self.value(script):
                    return value
                why = str(self.value("document.body.innerText"))
            except Refused as error:
                why = str(error)
            assert time.monotonic() < deadline, f"not within {bound_s} s: {script}\n{why}\n{self.complaints}"
            time.sleep(0.1)

    def look(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window and the colours that its user likes."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def shoot(self, file: Path) -> int:
        """A picture of the whole page; returns its size in bytes."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"])
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        return len(data)

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text="\r" if key == "Enter" else ""
            )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)
