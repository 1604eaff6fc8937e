"""Folders of jobs: what a kill left, and a finished one that cannot be written."""

import os

import pytest
from unmemorize.audit.common import job
from unmemorize.audit.common.job import open_job
from unmemorize.shared.files.storage import StorageError

IDENTITY = {"work": "test"}


def test_what_a_killed_process_left_half_written_goes_when_the_job_goes_on(tmp_path):
    with open_job(tmp_path / "out", IDENTITY, overwrite=False):
        (tmp_path / "out" / "images").mkdir()
        stale = [
            tmp_path / "out" / ".page.html.77.part",
            tmp_path / "out" / "images/.1.png.77.part",
        ]
        for path in stale:
            path.write_bytes(b"half")
    with open_job(tmp_path / "out", IDENTITY, overwrite=False):
        assert not any(path.exists() for path in stale)


def test_a_finished_job_on_a_medium_that_is_read_only_is_told_as_such(tmp_path, monkeypatch):
    with open_job(tmp_path / "out", IDENTITY, overwrite=False):
        (tmp_path / "out" / "report.html").write_text("done")

    def make_folder(path):
        raise StorageError(f"{path} cannot be written ({os.strerror(30)}). Choose another folder.")

    monkeypatch.setattr(job, "make_folder", make_folder)  # root may write anywhere
    with (
        pytest.raises(StorageError, match=r"holds this very work already: .*report\.html"),
        open_job(tmp_path / "out", IDENTITY, overwrite=False),
    ):
        pass
    with (
        pytest.raises(StorageError, match=r"Choose another folder\.$"),
        open_job(tmp_path / "out", {"work": "other"}, overwrite=False),
    ):
        pass


def test_a_folder_that_is_deleted_while_a_job_runs_is_told_with_what_to_do(tmp_path):
    with open_job(tmp_path / "out", IDENTITY, overwrite=False) as opened:
        journal = opened.journal("phase")
        journal.put("a", 1)
        journal.path.unlink()
        (tmp_path / "out" / "journal" / "job.json").unlink()
        (tmp_path / "out" / "journal").rmdir()
        with pytest.raises(StorageError, match="deleted or moved while this ran"):
            journal.put("b", 2)
