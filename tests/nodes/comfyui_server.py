"""ComfyUI's own server, started as a user starts it, and a client that follows its websocket.

``python comfyui_server.py TREE BASE PORT`` is the server.
"""

import asyncio
import json
import os
import runpy
import socket
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

START_SECONDS = 300
PREVIEW = struct.pack(">II", 1, 1)
"""What a binary message starts with: an image of a preview, as JPEG."""


class Server:
    """A running server; `base` holds its folders, custom nodes among them."""

    def __init__(self, tree: Path, base: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", base / "server.txt"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__, tree, base, str(port)],
                stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        end = time.monotonic() + START_SECONDS
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                self.close()
                raise RuntimeError(f"The server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return bool(self.get("/system_stats"))
        except OSError:
            return False

    def get(self, path: str) -> bytes:
        """Return what lies at a path of the server."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, content: Any) -> bytes:
        """Send JSON."""
        body, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def run(
        self,
        *graphs: dict,
        on_event: Callable[[str, Any], None] = lambda kind, data: None,
        previews: str = "none",
    ) -> list[dict]:
        """Post graphs at once and follow them to their ends.

        Args:
            graphs: As ``POST /prompt`` takes them.
            on_event: Called with the kind and the data of each message; images of previews come
                as "preview" with the bytes of a JPEG.
            previews: The user's setting: "none", "latent2rgb" or "taesd".

        Returns:
            Per graph its entry of ``/history``: outputs, and the messages of its status.
        """
        # In a thread: Playwright keeps a loop running in this one, once a test has used a browser.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(asyncio.run, self._run(graphs, on_event, previews)).result()

    async def _run(self, graphs: tuple, on_event: Callable, previews: str) -> list[dict]:
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{self.url}/ws?clientId=test", max_msg_size=0) as line,
        ):
            common = {
                "client_id": "test",
                "extra_data": {"extra_pnginfo": {}, "preview_method": previews},
            }
            answers = [self.post("/prompt", common | {"prompt": graph}) for graph in graphs]
            prompts = [json.loads(answer)["prompt_id"] for answer in answers]
            waiting = set(prompts)
            while waiting:
                message = await line.receive(timeout=START_SECONDS)
                if message.type == aiohttp.WSMsgType.BINARY:
                    if message.data.startswith(PREVIEW):
                        await asyncio.to_thread(on_event, "preview", message.data[len(PREVIEW) :])
                    continue
                event = json.loads(message.data)
                kind, data = event["type"], event["data"]
                await asyncio.to_thread(on_event, kind, data)
                # The history is written after the message of success, and before this one.
                if (kind == "executing" and data["node"] is None) or kind in (
                    "execution_error", "execution_interrupted"
                ):  # fmt: skip
                    waiting.discard(data["prompt_id"])
        return [await asyncio.to_thread(self._history, prompt) for prompt in prompts]

    def _history(self, prompt: str) -> dict:
        end = time.monotonic() + 30
        while not (entry := json.loads(self.get(f"/history/{prompt}"))):
            assert time.monotonic() < end, "the prompt has no history"
            time.sleep(0.1)
        return entry[prompt]

    def close(self) -> None:
        """End the server."""
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def messages(entry: dict) -> list[str]:
    """Return the kinds of messages of a run, in order."""
    return [kind for kind, _ in entry["status"]["messages"]]


def main(tree: str, base: str, port: str) -> Any:
    """Be the server."""
    from cpu_torch import tolerate_cpu_torch

    tolerate_cpu_torch()
    sys.path[0] = tree
    os.chdir(tree)
    sys.argv = [
        "main.py", "--cpu", "--listen", "127.0.0.1", "--port", port, "--base-directory", base,
        "--disable-auto-launch", "--disable-api-nodes",
    ]  # fmt: skip
    return runpy.run_path("main.py", run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
