"""A headless Chromium, told what to do through a pipe: what a page looks like to people."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome")
        if (found := shutil.which(name))
    ),
    None,
)
_SECONDS = 60.0
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-dev-shm-usage", "--disable-background-networking", "--disable-extensions"),
    "--remote-debugging-pipe",
)


class Browser:
    """One tab. Messages are JSON, each ended by a zero byte (Chrome DevTools Protocol)."""

    def __init__(self, writing: int, reading: int):
        self._writing, self._reading = writing, reading
        self._number, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session: str | None = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]
            self.events.append(found)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            more = os.read(self._reading, 2**16)
            assert more, "the browser has ended"
            self._rest += more
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Opens a page as a window of a size shows it; returns when all is loaded."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not self.told("Page.loadEventFired"):
            self.events.append(self._read())

    def told(self, method: str) -> list[dict[str, Any]]:
        """The events of a kind since the page was opened."""
        return [one["params"] for one in self.events if one.get("method") == method]

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")


@contextlib.contextmanager
def browsing(folder: Path) -> Iterator[Browser]:
    """A browser whose profile is in a folder; ended when it is left."""
    assert CHROMIUM is not None
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # Beyond 3 and 4, which the browser looks for.
    high = [fcntl.fcntl(one, fcntl.F_DUPFD, 20) for one in (theirs_in, theirs_out)]
    place = f"3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-"
    with open(folder / "browser.log", "wb") as log:
        process = subprocess.Popen(
            [
                "bash",
                "-c",
                f'exec "$0" "$@" {place}',
                CHROMIUM,
                *_FLAGS,
                f"--user-data-dir={folder}",
            ],
            pass_fds=high,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    for one in (theirs_in, theirs_out, *high):
        os.close(one)
    try:
        browser = Browser(ours_out, ours_in)
        yield browser
        with contextlib.suppress(AssertionError, OSError):
            browser.call("Browser.close")
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(ours_out)
        os.close(ours_in)
