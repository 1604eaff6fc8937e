import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unmemorize.shared.files import storage
from unmemorize.shared.files.storage import (
    CACHE,
    Journal,
    StorageError,
    cache_folder,
    locked,
    make_folder,
    replace_atomically,
    write_text,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@settings(max_examples=40, deadline=None)
@given(values=st.dictionaries(st.text(), JSON, min_size=1, max_size=6), cut=st.integers(0, 10**6))
def test_a_journal_torn_anywhere_keeps_all_lines_before(values, cut, tmp_path_factory):
    path = tmp_path_factory.mktemp("journal") / "j.jsonl"
    journal = Journal(path)
    for key, value in values.items():
        journal.put(key, value)
    content = path.read_bytes()
    cut %= len(content) + 1
    path.write_bytes(content[:cut])

    kept = content[:cut].count(b"\n")
    torn = Journal(path)
    assert {key: torn.get(key) for key in list(values)[:kept]} == dict(list(values.items())[:kept])
    assert len(torn) == kept
    # What comes next starts on its own line.
    torn.put("next", 1)
    assert Journal(path).get("next") == 1
    assert len(Journal(path)) == len({*list(values)[:kept], "next"})


def test_a_journal_changed_by_something_else_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"key": "a", "value": 1}\nnot json\n{"key": "b", "value": 2}\n')
    with pytest.raises(StorageError, match=r"Line 2 .* is not a journal entry.*Delete the file"):
        Journal(path)


def test_values_come_back_as_json_whether_fresh_or_read(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.put("a", {"t": (1, 0.1 + 0.2), 3: "\u2028\ud800"})
    assert journal.get("a") == Journal(tmp_path / "j.jsonl").get("a")
    assert journal.get("a")["t"] == [1, 0.1 + 0.2]
    assert "b" not in journal
    assert journal.get("b", 5) == 5


def test_full_disk_keeps_what_was_there_and_leaves_nothing_half(tmp_path, monkeypatch):
    path = tmp_path / "j.jsonl"
    journal = Journal(path)
    journal.put("a", 1)
    before, write = path.read_bytes(), os.write

    def half(descriptor, content):
        write(descriptor, content[: len(content) // 2])
        full_disk()

    monkeypatch.setattr(storage.os, "write", half)
    with pytest.raises(StorageError, match=r"No space left to write .*run the same command again"):
        journal.put_all({"b": 2, "c": 3})
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert "b" not in journal
    journal.put("b", 2)
    assert len(Journal(path)) == 2


FULL_DEVICE = Path("/dev/full")


@pytest.mark.skipif(not FULL_DEVICE.exists(), reason="Linux has a disk that is always full")
def test_a_really_full_disk():
    with pytest.raises(StorageError, match="No space left"), storage.writing(FULL_DEVICE):
        FULL_DEVICE.write_bytes(b"x")


def overwrite(path, then):
    with replace_atomically(path) as part:
        part.write_text("new")
        then()


def test_replace_atomically_keeps_the_old_file_when_the_block_fails(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with replace_atomically(path) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError):
        overwrite(path, lambda: 1 / 0)
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file.txt"]
    with pytest.raises(StorageError, match="No space left"):
        overwrite(path, full_disk)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.EACCES, "permissions"), (errno.EROFS, "yours"), (errno.ENOTDIR, "A file stands")],
)
def test_why_a_file_cannot_be_written(code, message, tmp_path):
    with pytest.raises(StorageError, match=message), storage.writing(tmp_path / "x"):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), storage.writing(tmp_path / "x"):
        (tmp_path / "missing").read_text()


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(StorageError, match="cannot be written"):
            make_folder(path)
    make_folder(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


HOLD = """
import sys, time
from pathlib import Path
from unmemorize.shared.files.storage import locked
with locked(Path(sys.argv[1]), owner="the folder"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_a_lock_ends_with_its_process_however_it_ends(tmp_path, package_env):
    path = tmp_path / ".lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], env=package_env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match="Another process is writing the folder"):
            with locked(path, owner="the folder"):
                pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    finally:
        holder.kill()
        holder.stdout.close()
    with locked(path, owner="the folder"):
        pass


WRITER = """
import sys
from pathlib import Path
from unmemorize.shared.files.storage import Journal
journal = Journal(Path(sys.argv[1]))
for i in range(len(journal), 10**6):
    journal.put(str(i), "x" * (i % 5000))
"""


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_killed_writers_lose_at_most_the_line_they_were_writing(tmp_path, package_env):
    path, before = tmp_path / "j.jsonl", 0
    for _ in range(2):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], env=package_env)
        while not path.exists() or path.stat().st_size < before + 20_000:
            time.sleep(0.01)
            assert writer.poll() is None
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        lines = path.read_bytes().count(b"\n")
        journal = Journal(path)
        assert len(journal) == lines
        assert all(str(i) in journal for i in range(lines))
        before = path.stat().st_size
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len(records) == len({record["key"] for record in records})


def test_the_cache_is_the_platforms_unless_named(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    places = {"linux": tmp_path / "xdg", "win32": tmp_path / "local"}
    for platform, place in places.items():
        monkeypatch.setattr(storage.sys, "platform", platform)
        assert cache_folder() == place / "unmemorize"
    monkeypatch.setattr(storage.sys, "platform", "darwin")
    assert cache_folder().parts[-3:] == ("Library", "Caches", "unmemorize")


@pytest.mark.parametrize("name", ["猫" * 83 + ".png", "x" * 250 + ".json"])
def test_files_whose_names_are_as_long_as_names_may_be_are_written(name, tmp_path):
    write_text(tmp_path / name, "all")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("spoil", [(b"1.5", b"1.6"), (b'"a"', b'"b"'), (b'"crc"', b'"crd"')])
def test_an_entry_of_a_journal_that_was_changed_is_refused(spoil, tmp_path):
    path = tmp_path / "j.jsonl"
    Journal(path).put("a", {"score": 1.5})
    path.write_bytes(path.read_bytes().replace(*spoil))
    with pytest.raises(StorageError, match=r"Line 1 .* was changed by something else"):
        Journal(path)


def test_entries_of_earlier_versions_are_read(tmp_path):
    (tmp_path / "j.jsonl").write_text('{"key": "a", "value": [1.5]}\n')
    assert Journal(tmp_path / "j.jsonl").get("a") == [1.5]
