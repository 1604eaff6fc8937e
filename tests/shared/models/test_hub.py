"""Repositories of the hub, asked over HTTP as the hub's own client does it, on this machine."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny

COMMIT = "a" * 40
REFUSALS = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound")}
LOAD = """
import sys
from unmemorize.shared.models.load import load_denoiser
for name in sys.argv[1:]:
    try:
        print(type(load_denoiser(name, device="cpu").pipeline).__name__)
    except Exception as error:
        print(type(error).__name__, error)
"""


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as its client asks for a download; a folder holds the repositories."""

    root: Path

    def log_message(self, *_):
        pass

    def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        api, _, path = self.path.partition("?")[0].rpartition("/owner/")
        name, _, rest = path.partition("/")
        folder = self.root / name
        if name in REFUSALS:
            code, reason = REFUSALS[name]
            return self.answer(code, b"{}", X_Error_Code=reason, X_Error_Message=reason)
        if not name or not folder.is_dir():
            return self.answer(404)
        if not api:
            body = (folder / rest.split("/", 2)[2]).read_bytes()
            tag = hashlib.sha256(body).hexdigest()
            return self.answer(200, body, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)
        files = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
        tree = [{"type": "file", "path": file, "size": (folder / file).stat().st_size,
                 "oid": hashlib.sha1(file.encode()).hexdigest()} for file in files]  # fmt: skip
        about = {"id": f"owner/{name}", "sha": COMMIT, "private": False, "downloads": 0, "tags": [],
                 "siblings": [{"rfilename": file} for file in files]}  # fmt: skip
        content = tree if rest.startswith("tree/") else about
        return self.answer(200, json.dumps(content).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path) -> Iterator[tuple[Path, dict[str, str]]]:
    """Folder of the repositories, and the environment in which a process asks this hub."""
    handler = type("Here", (Hub,), {"root": tmp_path / "hub"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler.root, {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "cache"), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip
    server.shutdown()
    server.server_close()


def test_repositories_are_taken_in_the_variant_they_have_and_refusals_say_what_to_do(
    hub, run_python
):
    root, env = hub
    tiny.stable_diffusion().save_pretrained(root / "half", variant="fp16")
    tiny.stable_diffusion().save_pretrained(root / "brain", variant="bf16")
    tiny.stable_diffusion().save_pretrained(root / "pickles", safe_serialization=False)
    names = ("half", "brain", "gated", "absent", "pickles")
    done = run_python("-c", LOAD, *(f"owner/{name}" for name in names), env=env)
    half, brain, gated, absent, pickles = done.stdout.splitlines()
    assert half == brain == "StableDiffusionPipeline"
    assert gated.startswith("ModelError owner/gated is gated")
    assert "https://huggingface.co/owner/gated, then log in by typing: hf auth login" in gated
    assert "no such repository to this machine" in absent
    assert "`safetensors` weights" in pickles
