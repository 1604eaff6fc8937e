"""A small audit on the demo model, run once for all tests that look at it or continue it."""

import pytest
from tiny_audit import LONG, MARKUP
from unmemorize import demo
from unmemorize.audit.common import subject
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.run import run_audit
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.config import DetectionConfig


@pytest.fixture(scope="session")
def captions() -> dict[str, list[str]]:
    groups = {}
    for caption in demo.captions():
        groups.setdefault(caption.group, []).append(caption.text)
    return groups


@pytest.fixture(scope="session")
def files(tmp_path_factory, captions):
    """Prompts (with a duplicate, an empty, a strange and an endless one) and controls."""
    folder = tmp_path_factory.mktemp("inputs")
    first = captions["verbatim"][:3]
    prompts = [*first, first[0], "", *captions["learnt"][:3], MARKUP, LONG]
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    controls = captions["held_out"][:12]
    (folder / "controls.txt").write_text("\n".join(controls), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def config(files, tmp_path_factory) -> AuditConfig:
    return AuditConfig(
        model=str(demo.MODEL),
        prompts=(files / "prompts.txt",),
        controls=str(files / "controls.txt"),
        output=tmp_path_factory.mktemp("audit") / "out",
        detection=DetectionConfig(seeds=(0, 1)),
        false_positive_rate=0.08,
        flagged_pictured=2,
        sample=1,
        generation_steps=2,
        device="cpu",
    )


@pytest.fixture(scope="session")
def known() -> list:
    """Takes what the first page of `result` shows."""
    return []


@pytest.fixture(scope="session")
def result(config, known):
    return run_audit(config, on_page=known.append)


@pytest.fixture(scope="session")
def denoiser(config):
    """The demo model, loaded once for all tests that only count loads."""
    return subject.Subject(config.model, device="cpu").denoiser


@pytest.fixture
def work(monkeypatch, denoiser) -> dict[str, int]:
    """Counts models loaded, rows denoised and images generated."""
    counts = {"loads": 0, "rows": 0, "images": 0}
    denoise, generate = PipelineDenoiser.denoise, PipelineDenoiser.generate

    def counted_load(*args, **kwargs):
        counts["loads"] += 1
        return denoiser

    def counted_denoise(self, x, sigma, cond):
        counts["rows"] += len(x)
        return denoise(self, x, sigma, cond)

    def counted_generate(self, prompts, seeds, **kwargs):
        counts["images"] += len(seeds)
        return generate(self, prompts, seeds, **kwargs)

    monkeypatch.setattr(subject, "load_denoiser", counted_load)
    monkeypatch.setattr(PipelineDenoiser, "denoise", counted_denoise)
    monkeypatch.setattr(PipelineDenoiser, "generate", counted_generate)
    return counts
