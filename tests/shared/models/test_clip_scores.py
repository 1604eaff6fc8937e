"""Scores of clips through real video pipelines: detection, calibration, observer."""

import json

import pytest
import tiny
import tiny_families
import torch
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.calibrate import calibrate
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

PROMPTS = ["a red cat", "a tall tree on the mat", "a green house"]
CONFIG = DetectionConfig(seeds=(0, 1), steps=2)
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module", params=["wan", "ltx"])
def denoiser(request):
    pipeline = tiny_families.VIDEOS[request.param]()
    return PipelineDenoiser(pipeline, resolution=tiny.RESOLUTION, frames=tiny_families.FRAMES)


@pytest.fixture(scope="module")
def wan():
    return PipelineDenoiser(
        tiny_families.wan(), resolution=tiny.RESOLUTION, frames=tiny_families.FRAMES
    )


def test_the_parts_of_a_score_add_up_to_it(denoiser):
    found = detect(denoiser, PROMPTS, CONFIG)
    frames, content, motion = found.clips
    assert frames.shape == (3, 2, 2, denoiser.latent_shape[1])
    total = found.traces.square()
    torch.testing.assert_close(content.square() + motion.square(), total, rtol=1e-5, atol=0)
    torch.testing.assert_close(frames.square().sum(-1), total, rtol=1e-5, atol=0)
    assert (motion > 1e-3 * content).all()  # a network's answer is no still


def test_batches_and_what_was_known_move_no_part(wan):
    whole = detect(wan, PROMPTS, CONFIG)
    heard = {}
    known = {1: whole.traces[1]}
    single = DetectionConfig(seeds=(0, 1), steps=2, batch_size=1)
    found = detect(wan, PROMPTS, single, known=known, on_clip=heard.__setitem__)
    assert set(heard) == {0, 2}
    assert found.clips.motion[1].isnan().all()
    for index, packed in heard.items():
        expected = torch.stack([part[index] for part in whole.clips[1:]], -1)
        torch.testing.assert_close(packed[..., -2:], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.clips.motion[index], packed[..., -1])


def test_images_have_no_parts():
    image = PipelineDenoiser(tiny.PIPELINES["sd1"]())
    assert detect(image, PROMPTS[:1], CONFIG).clips is None
    assert calibrate(image, PROMPTS, CONFIG, false_positive_rate=0.3).motion is None


def test_motion_is_judged_by_the_motion_of_the_controls(wan, tmp_path):
    config = DetectionConfig(seeds=(0, 1))
    controls = [f"{text} {word}" for text in PROMPTS for word in ("and the sea", "on the mat", "")]
    made = calibrate(wan, controls, config, false_positive_rate=0.2)
    scores = detect(wan, controls, config).clips.motion.mean(dim=(1, 2))
    assert made.motion.threshold == pytest.approx(scores.sort().values[7].item(), rel=1e-5)
    assert made.content.threshold != made.motion.threshold
    assert made.motion.settings["score"] == "motion"
    assert not made.motion.flags(scores * 0.999 - 1e-9)[scores.argsort()[:-2]].any()
    assert made.motion.flags(scores + scores.max()).all()
    for part in (made.residual, made.observed):  # the beside holds no beside of its own
        assert part.motion is None
    made.save(path := tmp_path / "made.json")
    assert Calibration.load(path) == made
    values = json.loads(path.read_text())
    del values["digest"]
    for part in (values, values["residual"], values["observed"]):  # as version 5 wrote them
        del part["content"], part["motion"]
        part["schema_version"] = 5
    path.write_text(json.dumps(values))
    older = Calibration.load(path)
    assert (older.content, older.motion) == (None, None)
    assert older.judge == made.judge


@torch.no_grad()
def test_an_observer_reads_the_parts_that_detection_measures(denoiser):
    given = denoiser.family._arguments() | {
        "prompt": PROMPTS[:1], "negative_prompt": [""], "guidance_scale": 3.0,
        "num_inference_steps": 2, "output_type": "latent",
        "generator": [torch.Generator("cpu").manual_seed(0)],
    }  # fmt: skip
    with observe(denoiser.pipeline) as record:
        denoiser.pipeline(**given)
    (run,) = record.runs
    frames, content, motion = run.clips
    torch.testing.assert_close(content.square() + motion.square(), run.l2.square(), rtol=1e-4,
                               atol=0)  # fmt: skip
    sigma = torch.tensor(
        denoiser.schedule.sigma(denoiser.family.training_timestep(run.timesteps[0]))
    )
    x = denoiser.initial_noise((0,), sigma)
    texts = denoiser.unconditional(), denoiser.encode(PROMPTS[:1])
    uncond, cond = (denoiser.denoise(x, sigma, text) for text in texts)
    d = ((uncond - cond) / sigma).double()
    rest = d - d.mean(2, keepdim=True)
    torch.testing.assert_close(motion[0, 0], rest.norm(), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(frames[0, 0], d[0].movedim(1, 0).flatten(1).norm(dim=1), rtol=1e-2,
                               atol=1e-4)  # fmt: skip


def test_frames_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="1 more than a multiple of 4, got 10: take 9 or 13"):
        PipelineDenoiser(tiny_families.wan(), resolution=tiny.RESOLUTION, frames=10)
    with pytest.raises(ValueError, match="makes images: leave it out"):
        PipelineDenoiser(tiny.PIPELINES["sd1"](), frames=9)
