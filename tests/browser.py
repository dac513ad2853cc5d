"""A real browser for tests: headless Chromium, told what to do through a pipe (the DevTools protocol), no driver."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60  # seconds


class Page:
    """One page in a browser that runs as long as the `opened` block."""

    def __init__(self, send: int, receive: int):
        self.send, self.receive, self.rest, self.count, self.session = send, receive, b"", 0, None

    def tell(self, method: str, **params: Any) -> Any:
        """What the browser answers to a command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.send, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.count:
                assert "error" not in found, found
                return found["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.receive], [], [], PATIENCE)
            assert ready, "the browser says nothing"
            self.rest += os.read(self.receive, 1 << 16)
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript."""
        found = self.tell("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, code: str) -> Any:
        """The value of an expression as soon as it is one that counts as true."""
        end = time.monotonic() + PATIENCE
        while not (found := self.run(code)):
            assert time.monotonic() < end, f"never true: {code}"
            time.sleep(0.1)
        return found

    def put(self, selector: str, text: str) -> None:
        """Writes into a box, as typing does; scripts that watch the box are told."""
        self.run(
            f"""(() => {{ const box = document.querySelector({json.dumps(selector)});
            Object.getOwnPropertyDescriptor(Object.getPrototypeOf(box), 'value').set.call(box, {json.dumps(text)});
            box.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"""
        )

    def choose(self, selector: str, file: Path) -> None:
        """Chooses a file to be uploaded."""
        root = self.tell("DOM.getDocument")["root"]["nodeId"]
        node = self.tell("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.tell("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def picture(self) -> bytes:
        """A PNG of what is seen."""
        return base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])


@contextlib.contextmanager
def opened(address: str, folder: Path) -> Iterator[Page]:
    """A page at an address; `folder` takes what the browser keeps."""
    ours, theirs = os.pipe(), os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1000", f"--user-data-dir={folder}"]
    command = [str(PROGRAM), *options, "--remote-debugging-pipe", "about:blank"]
    shell = ["bash", "-c", f'exec "$@" 3<&{ours[0]} 4>&{theirs[1]}', "bash", *command]
    with subprocess.Popen(
        shell, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as browser:
        try:
            page = Page(ours[1], theirs[0])
            target = page.tell("Target.createTarget", url=address)["targetId"]
            page.session = page.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            page.wait("document.body !== null && document.readyState === 'complete' && location.href !== 'about:blank'")
            yield page
        finally:
            browser.terminate()
            for end in (*ours, *theirs):
                os.close(end)
