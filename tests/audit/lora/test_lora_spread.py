"""Images drawn by one process and by two are the same, and a failing process is told."""

import dataclasses
import sys

import pytest
from small_audit import example_lora
from unmemorize.audit.common.measure import SilentBar, silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.lora import draw
from unmemorize.audit.lora.ask import Shot
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.draw import DrawingError, batches, draw_all, unfinished


@pytest.fixture
def config(root) -> LoraAuditConfig:
    return LoraAuditConfig(
        lora=example_lora(root), images=root, generation_steps=2, batch_size=2, device="cpu"
    )


@pytest.fixture
def planned(config):
    shots = [
        Shot(prompt=prompt, asked="caption", source=None, seed=seed, mode=mode, stage="captions",
             path=f"images/{seed}-{mode}.png")
        for mode in ("on", "off", "attack") for seed, prompt in enumerate(["green apple", "a", ""])
    ]  # fmt: skip
    return batches(shots, config.batch_size)


class Counting(SilentBar):
    total = 0

    def update(self, n: int) -> None:
        Counting.total += n


def test_two_processes_draw_what_one_draws(config, planned, package_env, monkeypatch, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    draw_all(planned, Subject.of(config), config, one, silent)
    for name, value in package_env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    both = dataclasses.replace(config, processes=2)
    draw_all(planned, Subject.of(both), both, two, lambda *_: Counting())
    paths = [shot.path for batch in planned for shot in batch]
    assert len(paths) == len(set(paths)) == Counting.total == 9
    assert len({(one / path).read_bytes() for path in paths}) == 9
    for path in paths:
        assert (one / path).read_bytes() == (two / path).read_bytes(), path
    assert not list((two / "journal").glob("drawing.*"))


def test_batches_hold_one_mode_and_do_not_depend_on_what_is_finished(planned, tmp_path):
    assert [(len(b), {s.mode for s in b}) for b in planned] == [
        (2, {"on"}), (1, {"on"}), (2, {"off"}), (1, {"off"}), (2, {"attack"}), (1, {"attack"}),
    ]  # fmt: skip
    for shot in (*planned[0], planned[2][1]):
        (tmp_path / shot.path).parent.mkdir(exist_ok=True)
        (tmp_path / shot.path).touch()
    assert unfinished(planned, tmp_path) == planned[1:]


def test_a_process_that_fails_is_told_with_what_it_said(config, planned, monkeypatch, tmp_path):
    said = "import sys; print('no space for the model', file=sys.stderr); sys.exit(7)"
    monkeypatch.setattr(draw, "_command", lambda *_: [sys.executable, "-c", said])
    both = dataclasses.replace(config, processes=2)
    with pytest.raises(DrawingError, match=r"9 images are missing: no space for the model\n.*kept"):
        draw_all(planned, Subject.of(both), both, tmp_path, silent)
