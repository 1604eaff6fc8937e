"""What the filter wrote down, and the ranking made of it."""

import json
import math
import tracemalloc
from pathlib import Path

import torch
from unmemorize.shared.training.filter.filter import MemorizationFilter
from unmemorize.shared.training.filter.sample_log import (
    Record,
    Sample,
    SampleLog,
    rank_samples,
    read_records,
)
from unmemorize.shared.training.filter.thresholds import AbsoluteThreshold
from weighing import NEVER, weigh


def test_every_decision_is_in_the_file(tmp_path):
    paths = [tmp_path / "samples.0.jsonl", tmp_path / "samples.1.jsonl"]
    cond = torch.zeros(2, 4, 2, 2)
    cond[1] = 2.0
    for path in paths:
        log = SampleLog(path)
        made = MemorizationFilter(AbsoluteThreshold(1.0), action="downweight", log=log)
        for _ in range(60):
            weigh(made, cond, torch.zeros_like(cond), torch.tensor([10, 900]))
        assert path.read_text().count("\n") == 100  # written by themselves, 50 calls at a time
        log.flush()
    records = read_records(paths)
    assert len(records) == 240
    assert records[1] == Record(
        sample=Sample(file="1.png", caption="caption 1"),
        timestep=900.0, score=2.0, measured=True, flagged=True, kept=0.5,
    )  # fmt: skip
    assert (records[0].flagged, records[0].kept) == (False, 1.0)
    line = json.loads(paths[0].read_text().splitlines()[1])["value"]
    assert set(line) == {
        "file", "caption", "timestep", "score", "measured", "flagged", "kept",
    }  # fmt: skip


def test_steps_done_again_after_a_resume_are_counted_once(tmp_path):
    path = tmp_path / "samples.jsonl"
    cond = torch.ones(2, 4, 2, 2)
    made = MemorizationFilter(NEVER, log=SampleLog(path))
    weigh(made, cond, 0 * cond)
    saved = made.state_dict()
    weigh(made, cond, 0 * cond)
    made.log.flush()
    resumed = MemorizationFilter(NEVER, log=SampleLog(path))
    resumed.load_state_dict(saved)
    weigh(resumed, 3 * cond, 0 * cond)
    resumed.log.flush()
    assert [record.score for record in read_records([path])] == [1.0, 1.0, 3.0, 3.0]


def test_what_is_on_disk_is_not_in_memory_too(tmp_path):
    """Ten times as many records take no more memory while the training runs."""
    log, call = SampleLog(tmp_path / "samples.jsonl"), 0
    record = Record(
        sample=Sample(file="a.png", caption="a"), timestep=1.0, score=1.0, measured=True,
        flagged=False, kept=1.0,
    )  # fmt: skip

    def held(calls: int) -> int:
        nonlocal call
        for _ in range(calls):
            log.add(call, [record] * 4)
            call += 1
        log.flush()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        _, few, many = held(200), held(200), held(1000)
    finally:
        tracemalloc.stop()
    assert many - few < 50_000  # 4,000 records as they were kept before: 3 MB
    assert len(read_records([log._written.path])) == 4 * call
    SampleLog(log._written.path).add(call, [record])


def test_ranking_finds_what_stands_out_at_its_own_timestep(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(20)]
    for number, file in enumerate(files):
        file.write_bytes(b"planted" if number < 3 else bytes([number]))
    generator = torch.Generator().manual_seed(0)
    records = []
    for _ in range(30):
        for number, file in enumerate(files):
            timestep = 1000 * torch.rand((), generator=generator).item()
            noise = torch.rand((), generator=generator).item()
            level = math.exp(timestep / 250)  # a factor of 55, against less than 2
            score = level * (1.5 + noise if number < 3 else 1 + noise)
            sample = Sample(file=str(file), caption=f"caption {max(number, 1)}")
            records.append(Record(
                sample=sample, timestep=timestep, score=score, measured=number > 3, flagged=False,
                kept=1.0,
            ))  # fmt: skip
    ranked = rank_samples(records)
    planted = [str(file) for file in files[:3]]
    assert {each.sample.file for each in ranked[:3]} == set(planted)
    for each in ranked:
        others = set(planted) - {each.sample.file} if each.sample.file in planted else set()
        assert set(each.duplicates) == others
        assert each.visits == 30
        assert each.measured == (30 if files.index(Path(each.sample.file)) > 3 else 0)
        assert 0 <= each.standing <= 1
        # (1.5 + noise) / (1 + noise) in geometric mean, noise from 0 to 1.
        expected = 1.34 if each.sample.file in planted else 1.0
        assert abs(each.ratio - expected) < 0.15


def test_samples_with_one_caption_are_duplicates_and_empty_captions_are_not():
    def record(file: str, caption: str) -> Record:
        sample = Sample(file=file, caption=caption)
        return Record(sample=sample, timestep=1.0, score=1.0, measured=True, flagged=True, kept=0.0)

    ranked = rank_samples([record("a", "x"), record("b", "x"), record("c", ""), record("d", "")])
    assert {each.sample.file: each.duplicates for each in ranked} == {
        "a": ("b",), "b": ("a",), "c": (), "d": (),
    }  # fmt: skip
    assert len({each.standing for each in ranked}) == 1
