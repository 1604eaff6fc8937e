"""The audit of a LoRA on a video model: clips that come back are named, usual motions are not."""

import json
from pathlib import Path
from zlib import crc32

import jsonschema
import pytest
import tiny
import tiny_families
import torch
from needs import need_package, need_sscd
from PIL import Image
from small_audit import example_lora, write_drawings
from test_clip_copies import clip, pan
from unmemorize.audit import lora as room
from unmemorize.audit.lora import draw as drawing
from unmemorize.audit.lora.attack import as_images, sample_attack
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.audit.lora.verify import verify_report
from unmemorize.shared.files.images import read_frames, save_clip
from unmemorize.shared.models.families.videos import LTX
from unmemorize.shared.models.load import load_denoiser

need_package("faiss")
need_package("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SCHEMA = json.loads((Path(room.__file__).parent / "audit.schema.json").read_text("utf-8"))
FRAMES, STILL, PANNING = tiny_families.FRAMES, 3, 4
TRAINING = [clip(seed, seed) for seed in range(16)]
TRAINING[STILL] = TRAINING[STILL][4:5]
TRAINING[PANNING] = pan(PANNING, 2.0)
BACK, MOVED = (0, 1), 2
"""Which clips come back, and of which the motion alone; the still is shown in a clip."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a tiny Wan and a LoRA of it."""
    from diffusers import WanPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    root, pipeline = tmp_path_factory.mktemp("wan"), tiny_families.wan()
    pipeline.save_pretrained(root / "model")
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"],
                                                init_lora_weights=False))  # fmt: skip
    layers = get_peft_model_state_dict(pipeline.transformer)
    WanPipeline.save_lora_weights(root / "lora", transformer_lora_layers=layers)
    return root / "model", next((root / "lora").iterdir())


@pytest.fixture
def folder(tmp_path):
    """Return a training folder of animated WebP, GIF and PNG, and a still."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for place, frames in enumerate(TRAINING):
        images = as_images(frames)
        name = folder / f"{place:02d}.{'webp' if place % 2 else 'png'}"
        if place % 2:
            images[0].save(
                name, save_all=True, append_images=images[1:], duration=50, lossless=True
            )
        else:
            save_clip(images, name)
        name.with_suffix(".txt").write_text(f"clip number {place}", encoding="utf-8")
    (folder / "17.mp4").write_bytes(b"\0")
    return folder


def generated(shot):
    """Return what a LoRA of known truth draws."""
    place, seed = shot.source, crc32(f"{shot.prompt} {shot.seed} {shot.mode}".encode()) % 1000
    if shot.mode == "on" and shot.asked == "caption":
        if place in BACK:
            return TRAINING[place]
        if place == MOVED:
            return clip(400 + shot.seed, MOVED)
        if place == STILL:
            return clip(STILL, STILL)
        if place == PANNING:
            return pan(600 + shot.seed, 2.0)
    return clip(1000 + seed, 2000 + seed)


def test_frames_are_read_back_as_they_were_written(tmp_path):
    frames = as_images(TRAINING[0])
    save_clip([frames[0], frames[0], *frames[1:]], tmp_path / "clip.png")
    read = read_frames(tmp_path / "clip.png", 20)
    assert [f.tobytes() for f in read] == [f.tobytes() for f in [frames[0], *frames]]
    assert len(read_frames(tmp_path / "clip.png", 4)) == 4
    frames[0].save(tmp_path / "still.gif")
    assert len(read_frames(tmp_path / "still.gif", 4)) == 1


def test_a_video_model_draws_clips_with_the_lora_and_without(model):
    denoiser = load_denoiser(str(model[0]), lora=model[1], device="cpu", frames=FRAMES,
                             resolution=tiny.RESOLUTION)  # fmt: skip
    on = denoiser.generate_clips(["a red cat"], [0], 1, 5.0)
    with denoiser.lora_disabled():
        off = denoiser.generate_clips(["a red cat"], [0], 1, 5.0)
    attacked = sample_attack(denoiser, ["a red cat"], [0], 1)
    assert [len(clips[0]) for clips in (on, off, attacked)] == [FRAMES] * 3
    assert on[0][4].tobytes() != off[0][4].tobytes()
    assert isinstance(attacked[0][0], Image.Image)


def test_frames_go_to_latents_and_back_by_themselves(model):
    denoiser = load_denoiser(str(model[0]), device="cpu", frames=FRAMES, resolution=tiny.RESOLUTION)
    made = denoiser.decode(denoiser.encode_images(as_images(TRAINING[0])))
    assert made.shape == (len(TRAINING[0]), 3, 1, tiny.RESOLUTION, tiny.RESOLUTION)
    pipeline = tiny_families.ltx()
    pipeline.vae.latents_mean.uniform_(-1, 1)
    pipeline.vae.latents_std.uniform_(0.5, 2)
    family = LTX(pipeline, tiny.RESOLUTION, FRAMES)
    latents = torch.randn(2, 8, 1, 4, 4)
    torch.testing.assert_close(family.to_autoencoder(family.from_autoencoder(latents)), latents)


def test_clips_that_come_back_are_named_and_usual_motions_are_not(
    model, folder, tmp_path, monkeypatch
):
    need_sscd()

    def draw_batch(batch, subject, config, into):
        for shot in batch:
            save_clip(as_images(generated(shot)), into / shot.path)

    def round_trips(training, work):
        trips = drawing._round_trips(training, work)
        for image, trip in zip(training.images, trips, strict=True):
            save_clip(read_frames(training.path_of(image), 16), trip)
        return trips

    monkeypatch.setattr(drawing, "draw_batch", draw_batch)
    monkeypatch.setattr(drawing, "draw_round_trips", round_trips)
    config = LoraAuditConfig(
        lora=model[1], model=str(model[0]), images=folder, output=tmp_path / "out", quick=True,
        images_per_prompt=1, attack_images=0, device="cpu", frames=FRAMES,
        resolution=tiny.RESOLUTION,
    )  # fmt: skip
    audit = run_lora_audit(config)
    assert audit.video
    assert audit.positive_control.works, audit.positive_control.detail
    said = {verdict.image: verdict.verdict for verdict in audit.verdicts}
    expected = dict.fromkeys(range(16), "none") | dict.fromkeys((*BACK, STILL), "verbatim")
    assert said == expected | {MOVED: "template"}
    assert any("17.mp4" in warning and "ffmpeg" in warning for warning in audit.training.warnings)
    page = (config.output / "report.html").read_text("utf-8")
    assert "its motion comes back" in page
    document = json.loads((config.output / "audit.json").read_text("utf-8"))
    assert document["video"]
    jsonschema.validate(document, SCHEMA)
    assert "--frames 9" in document["settings"]["command"]
    assert all(check.fits for check in verify_report(config.output, lora=model[1], images=folder))


def test_an_image_model_takes_no_frames(root, tmp_path):
    need_sscd()
    config = LoraAuditConfig(lora=example_lora(root), images=write_drawings(root, tmp_path / "5_a"),
                             output=tmp_path / "out", frames=9, device="cpu")  # fmt: skip
    with pytest.raises(ValueError, match="frames"):
        run_lora_audit(config)
    assert not list(tmp_path.rglob("*-on.png"))
