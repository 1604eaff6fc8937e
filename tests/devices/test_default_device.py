"""Scripts may set a default device: what is meant for the CPU still lies there."""

import pytest
import tiny
import torch
from small_text import seeded, subspace_of
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect
from unmemorize.shared.training.projection.projection import Projection

GPU = "cuda:1"


@pytest.fixture
def default(foreign):
    foreign()
    torch.set_default_device(GPU)
    yield
    torch.set_default_device(None)


def test_detection(default):
    config, prompts = DetectionConfig(seeds=(0,)), ["a red cat", "a dog"]
    with torch.device("cpu"):
        pipeline = tiny.stable_diffusion()
        expected = detect(PipelineDenoiser(pipeline, resolution=32), prompts, config).scores
    denoiser = PipelineDenoiser(pipeline.to(GPU), resolution=32)
    assert torch.equal(detect(denoiser, prompts, config).scores.cpu(), expected)


def test_projection(default):
    with torch.device("cpu"):
        factor, subspace = seeded(4, 24, dtype=torch.float32), subspace_of()
    projection = Projection({"attn2_to_k": factor.to(GPU)}, [subspace])
    projection.project_weights()
    assert projection.verify() < 1e-6
