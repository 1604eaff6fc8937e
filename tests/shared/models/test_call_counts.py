"""Calls of the network and the pipeline in a detection: by the batch, not by the prompt."""

import math
from contextlib import contextmanager
from functools import wraps

import pytest
import tiny
import tiny_families
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect
from unmemorize.shared.score.trajectory import automatic_rows

MODELS = {**tiny.PIPELINES, **tiny_families.IMAGES}
CONFIG = DetectionConfig(seeds=(0, 1))
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@contextmanager
def counted(denoiser, monkeypatch):
    """Yield counts of rows and calls of the network, and of the calls of the pipeline."""
    counts = {"rows": 0, "network": 0, "pipeline": 0}
    network, pipeline = denoiser.family.network, type(denoiser.pipeline)
    call = pipeline.__call__

    def count(module, args, kwargs, output):
        counts["network"] += 1
        counts["rows"] += len(output[0])

    @wraps(call)
    def called(self, *args, **kwargs):
        counts["pipeline"] += 1
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "__call__", called)
        hook = network.register_forward_hook(count, with_kwargs=True)
        try:
            yield counts
        finally:
            hook.remove()


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux", "flux2", "z_image", "lumina2"])
def test_network_and_pipeline_are_called_by_the_batch(family, monkeypatch):
    denoiser = PipelineDenoiser(MODELS[family](), resolution=tiny.RESOLUTION)
    texts = [f"a {one} {other}" for one in tiny.WORDS[:4] for other in tiny.WORDS[4:9]]
    detect(denoiser, texts[:1], CONFIG)  # the shape's own calls are held now
    with counted(denoiser, monkeypatch) as few:
        detect(denoiser, texts[:5], CONFIG)
    with counted(denoiser, monkeypatch) as many:
        detect(denoiser, texts, CONFIG)
    batch = automatic_rows(denoiser)
    for prompts, counts in ((5, few), (len(texts), many)):
        rows = prompts * len(CONFIG.seeds)
        assert counts["rows"] == rows + len(CONFIG.seeds)  # the unconditional ones are shared
        assert counts["network"] == 1 + math.ceil(rows / batch)
    # Texts are encoded through it a batch at a time.
    assert many["pipeline"] - few["pipeline"] <= many["network"] - few["network"]
