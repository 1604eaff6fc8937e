"""No socket is opened by the audit of a local model: seen from outside of the process.

An audit hook of Python cannot see the sockets of a library written in another language, such as
onnxruntime, which reports to its maker unless it is told not to. The kernel sees all of them.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from needs import need_sscd, skip_unless_ci
from small_audit import example_lora, write_drawings

NETWORK = re.compile(r"\b(?:socket\(|connect\(|sendto\().*?AF_INET6?\b.*")
"""A call about the internet; sockets within the machine (AF_UNIX, AF_NETLINK) are none."""


@pytest.fixture(scope="module")
def sockets(package_env, tmp_path_factory):
    """Function that runs Python and returns the calls about the internet of all its processes."""
    import subprocess

    if sys.platform != "linux" or not (strace := shutil.which("strace")):
        skip_unless_ci("needs strace: apt-get install strace")
    # Where the kernel allows it, without a network at all: an attempt is seen, and fails.
    alone = ["unshare", "-rn"] if shutil.which("unshare") else []
    if alone and subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []

    def run(*arguments: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log = tmp_path_factory.mktemp("strace") / "log"
        traced = [*alone, strace, "-f", "--seccomp-bpf", "-e", "trace=network", "-o", str(log)]
        env = {k: v for k, v in package_env.items() if not k.endswith("TELEMETRY")}
        done = subprocess.run([*traced, sys.executable, *arguments], capture_output=True, text=True,
                              env=env | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        return done, NETWORK.findall(log.read_text("utf-8", "replace"))

    return run


def test_the_check_can_fail(sockets):
    code = "import socket; socket.socket().connect_ex(('127.0.0.1', 9))"
    done, seen = sockets("-c", code)
    assert done.returncode == 0, done.stderr
    assert len(seen) >= 2


def test_copy_detection_opens_no_socket(sockets):
    need_sscd()
    code = (
        "from PIL import Image\nfrom unmemorize.audit.common.sscd import Sscd\n"
        "print(Sscd().embed([Image.new('RGB', (64, 64))]).shape)"
    )
    done, seen = sockets("-c", code)
    assert done.returncode == 0, done.stderr
    assert seen == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs strace")
def test_the_audit_of_a_local_model_and_lora_opens_no_socket(sockets, root: Path, tmp_path):
    need_sscd()
    folder = write_drawings(root, tmp_path / "images")
    done, seen = sockets(
        "-m", "unmemorize", "audit", "demo", "--lora", str(example_lora(root)), "--images",
        str(folder), "--output", str(tmp_path / "out"), "--quick", "--generation-steps", "1",
        "--images-per-prompt", "1", "--captions", "2", "--device", "cpu", "--reserve", "0.5",
    )  # fmt: skip
    assert done.returncode in (0, 3), done.stderr
    assert (tmp_path / "out" / "audit.json").is_file()
    assert seen == []
