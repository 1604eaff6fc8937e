"""The committed demo models: their form, their scores, and that they memorize what they should."""

import json
import statistics
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from sklearn.metrics import roc_auc_score
from unmemorize import demo
from unmemorize.audit.model.demo_check import SEEDS, check, choose, make_judge
from unmemorize.demo import data
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

GOLDEN = Path(__file__).parent.parent / "golden"  # by make_demo_scores.py


@cache
def demo_denoiser():
    return load_denoiser(demo.MODEL, device="cpu", dtype=torch.float32)


@cache
def demo_judge():
    return make_judge(demo_denoiser())


def test_files_are_the_committed_ones_and_small():
    assert demo.verify() == []
    weights = list(demo.MODEL.rglob("*.safetensors"))
    assert len(weights) == 3
    assert sum(path.stat().st_size for path in weights) <= 16_000_000


def test_topology_is_that_of_stable_diffusion_1():
    pipeline = demo_denoiser().pipeline
    unet, config = pipeline.unet, pipeline.unet.config
    assert len(config.block_out_channels) == 4
    assert config.layers_per_block == 2
    down = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert [type(b).__name__ for b in unet.down_blocks] == down
    groups = {
        m.num_groups for part in (unet, pipeline.vae) for m in part.modules()
        if isinstance(m, torch.nn.GroupNorm)
    }  # fmt: skip
    assert groups == {32}
    assert not config.use_linear_projection
    assert isinstance(unet.down_blocks[0].attentions[0].proj_in, torch.nn.Conv2d)
    assert pipeline.text_encoder.config.max_position_embeddings == 77
    scheduler = pipeline.scheduler.config
    assert scheduler.prediction_type == "epsilon"
    assert (scheduler.beta_schedule, scheduler.beta_start, scheduler.beta_end) == (
        "scaled_linear", 0.00085, 0.012,
    )  # fmt: skip
    assert pipeline.vae.config.scaling_factor == 0.18215


def test_text_encoder_keeps_the_classic_key_names():
    with safe_open(demo.MODEL / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())


@pytest.mark.parametrize("name", demo.BUNDLED)
def test_scores_are_the_same_in_every_version_of_the_libraries(name):
    golden = json.loads((GOLDEN / f"{name.replace('-', '_')}_scores.json").read_text("utf-8"))
    denoiser = load_denoiser(demo.locate(name), device="cpu", dtype=torch.float32)
    found = detect(denoiser, list(golden), DetectionConfig())
    expected = torch.tensor(list(golden.values()), dtype=torch.float64)
    torch.testing.assert_close(found.scores, expected, rtol=2e-4, atol=0)
    assert expected.max() > 1.5 * expected.min()  # random weights would not pass


@pytest.mark.slow
def test_scores_tell_memorized_captions_from_the_others():
    captions = [c for c in demo.audited() if c.group != "template"]
    scores = detect(demo_denoiser(), [c.text for c in captions], DetectionConfig()).scores
    truth = [c.group == "verbatim" for c in captions]
    assert roc_auc_score(truth, scores.tolist()) >= 0.98
    clean = [s for s, memorized in zip(scores.tolist(), truth, strict=True) if not memorized]
    threshold = sorted(clean)[-1 - len(clean) // 100]
    found = [
        s > threshold for s, memorized in zip(scores.tolist(), truth, strict=True) if memorized
    ]
    assert statistics.mean(found) >= 0.95
    shuffled = [c.hexcode < "1F4" for c in captions]  # a split that means nothing
    assert 0.3 < roc_auc_score(shuffled, scores.tolist()) < 0.7


@pytest.mark.parametrize(
    ("counts", "seeds"),
    [((2, 1, 1), SEEDS[:2]), pytest.param((12, 8, 8), SEEDS, marks=pytest.mark.slow)],
)
def test_verbatim_captions_give_their_own_image_and_others_none(counts, seeds):
    groups = ("verbatim", "learnt", "held_out")
    results = {
        group: check(demo_denoiser(), choose(group, count), demo_judge(), seeds)
        for group, count in zip(groups, counts, strict=True)
    }
    # Measured over 40 captions each: 1.000, .000 and .000.
    assert statistics.mean(r.reproduced for r in results["verbatim"]) >= 0.9
    assert not any(r.reproduced for r in results["learnt"] + results["held_out"])
    assert results["verbatim"][0].images[0].size == (data.RESOLUTION, data.RESOLUTION)
