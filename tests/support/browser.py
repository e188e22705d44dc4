"""Debian's chromium, driven through its DevTools pipe with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import re
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
)
# What sticks out of the screen, but for what scrolls by itself.
OUTSIDE = """
(() => {
  const free = (e) => e.closest(".scroll") === null;
  return [...document.querySelectorAll("body *")].filter((e) => free(e) && (
    e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5
  )).map((e) => e.outerHTML.slice(0, 120));
})()
"""
PATIENCE = 60.0  # seconds for one answer, on a busy machine


class Browser:
    """One page in one chromium, which speaks JSON over two pipes (file descriptors 3 and 4)."""

    def __init__(self, executable: str, profile: Path) -> None:
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Only a shell puts pipes at numbers of our choice without running Python in the child.
        script = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", executable, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a DevTools method and waits for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer}"
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, page: Path | str, size: tuple[int, int], scheme: str) -> None:
        """Opens a file or an address and waits for it.

        Args:
            page: of what.
            size: of the screen, in CSS pixels.
            scheme: of colours, light or dark.
        """
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        url = page if isinstance(page, str) else page.resolve().as_uri()
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Until a JavaScript expression is true."""
        until = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < until, f"never true: {expression}"
            time.sleep(0.05)

    def choose(self, selector: str, *files: Path) -> None:
        """Puts files into a file input, as its dialogue does."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(f.resolve()) for f in files])

    def drop(self, at: tuple[int, int], *files: Path) -> None:
        """Drags files from outside over the page, and lets go."""
        data = {"items": [], "files": [str(f.resolve()) for f in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, x=at[0], y=at[1], data=data)

    def press(self, key: str) -> None:
        """Presses a key that writes nothing, such as ArrowRight, and lets go."""
        code = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=code,
            )

    def complaints(self) -> list[str]:
        """What the console, the page's scripts and the browser's own checks objected to."""
        return [f"{e['method']}: {e['params']}" for e in self.events if _is_complaint(e)]

    def requested(self) -> list[str]:
        """The addresses that were asked for, without data URIs."""
        sent = [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in sent if not url.startswith("data:")]

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """Writes a PNG of the screen, or of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._write)  # chromium ends when its pipe does
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept."""
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, until - time.monotonic()))
            assert ready, f"chromium was silent for {PATIENCE:.0f} s"
            received = os.read(self._read, 1 << 20)
            assert received, f"chromium ended, exit code {self._process.poll()}"
            self._buffer += received
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


def require_chromium() -> str:
    """The executable; skips the test where there is none (a failure where REGRAFT_NO_SKIP=1)."""
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    return executable


def luminance(colour: str) -> float:
    """Relative luminance of a CSS colour `rgb(r, g, b)`, as WCAG defines it."""
    red, green, blue = (int(v) / 255 for v in re.findall(r"\d+", colour)[:3])
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (red, green, blue)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _is_complaint(event: dict[str, Any]) -> bool:
    method, told = event["method"], event.get("params", {})
    if method == "Runtime.consoleAPICalled":
        return told["type"] in ("error", "warning", "assert")
    if method == "Log.entryAdded":
        return told["entry"]["level"] in ("error", "warning")
    return method in ("Runtime.exceptionThrown", "Audits.issueAdded", "Inspector.targetCrashed")
