"""The training of the demo: it runs, continues after a stop, and writes what readers expect."""

import dataclasses
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from needs import skip_unless_ci
from safetensors.torch import load_file
from unmemorize import demo
from unmemorize.demo import data, denoiser, networks, optimization, text_encoder, train

TINY = train.TrainConfig(
    autoencoder_steps=3,
    text_encoder_steps=3,
    steps=6,
    per_batch=(1, 1, 1),
    checkpoint_every=2,
    learning_rate=1e-3,
)


def denoiser_after(work, *, stop_at: int | None = None, monkeypatch=None, config=TINY) -> dict:
    """Train a U-Net on noise, interrupted before step `stop_at` if given."""
    torch.manual_seed(0)
    _, encoder, unet = networks.build_networks(64)
    groups = ("verbatim", "template", "learnt")
    renderings = [data.Rendering(i, "fluent", i) for i in range(3)]
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = torch.randint(0, 64, (4, 77), generator=torch.Generator().manual_seed(2))
    if stop_at is not None:
        calls = iter(range(100))

        def interrupted(*args, **kwargs):
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            return rate(*args, **kwargs)

        rate = optimization.rate
        monkeypatch.setattr(denoiser, "rate", interrupted)
    work.mkdir(exist_ok=True)
    average = denoiser.train_denoiser(
        unet, denoiser.noise_loss, latents, denoiser.FrozenText(encoder, tokens), groups,
        renderings, config, work / "unet.safetensors",
    )  # fmt: skip
    return average.state_dict()


def test_a_stopped_training_continues_bit_for_bit(tmp_path, monkeypatch):
    whole = denoiser_after(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        denoiser_after(tmp_path / "parts", stop_at=5, monkeypatch=patch)
    continued = denoiser_after(tmp_path / "parts")
    assert all(torch.equal(whole[key], continued[key]) for key in whole)
    torch.manual_seed(0)
    untrained = networks.build_networks(64)[2].state_dict()
    assert not torch.equal(whole["conv_out.weight"], untrained["conv_out.weight"])


def views_and_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 12 captions in 3 lengths, each with views of one brightness of its own."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 62, (12, 3, 77), generator=generator)
    tokens[..., 0], tokens[..., 4:] = 62, 63
    shades = torch.arange(0, 240, 20, dtype=torch.uint8)
    return shades[:, None, None, None, None].expand(12, 2, 3, 32, 32), tokens


def encoder_after(work, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    encoder = networks.build_networks(64)[1]
    text_encoder.train_text_encoder(encoder, *views_and_tokens(), steps, 0, work)
    return encoder


def test_the_text_encoder_learns_which_drawing_a_caption_names(tmp_path, capsys):
    encoder_after(tmp_path, 101)
    right = [float(share) for share in re.findall(r"right=([\d.]+)", capsys.readouterr().err)]
    assert right[-1] > 0.8 > right[0]


def test_a_stopped_text_encoder_continues_where_it_was(tmp_path, capsys):
    encoder_after(tmp_path, 2)  # keeps a checkpoint of the end
    kept = load_file(tmp_path / "text_encoder.safetensors")
    again = encoder_after(tmp_path, 2).state_dict()
    assert all(torch.equal(again[k], kept[f"model/text_encoder.{k}"]) for k in again)


def test_the_network_reads_what_is_exported_and_leaves_it_as_it_is():
    torch.manual_seed(0)
    encoder, tokens = networks.build_networks(64)[1], views_and_tokens()[1][:4, 2]
    text = denoiser.FrozenText(encoder, tokens)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(p, p.half().float()) for p in encoder.parameters())
    states, ends = text.read(torch.tensor([2, -1]), {1: tokens[0]})
    with torch.no_grad():
        alone = encoder(tokens[[2, 0]])
    torch.testing.assert_close(states, alone.last_hidden_state)
    torch.testing.assert_close(ends, alone.pooler_output)
    torch.testing.assert_close(text.read(torch.tensor([-1]), {})[0][0], text.states[3])


def test_rescaling_the_latents_leaves_the_decoded_image():
    torch.manual_seed(0)
    autoencoder = networks.build_networks(64)[0].double()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before = autoencoder.encode(images).latent_dist
        decoded = autoencoder.decode(before.mode()).sample
        networks.normalise_latents(autoencoder, std=3.0)
        after = autoencoder.encode(images).latent_dist
        factor = 1 / (3.0 * networks.SCALING_FACTOR)
        torch.testing.assert_close(after.mode(), before.mode() * factor)
        torch.testing.assert_close(after.std, before.std * factor)
        torch.testing.assert_close(autoencoder.decode(after.mode()).sample, decoded)
    assert decoded.std() > 0.01


def test_learning_rate_rises_stays_and_ends_at_zero():
    rates = [optimization.rate(step, 1000, 0.25) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[100:749] == [1.0] * 649
    assert rates[-1] == pytest.approx(1 / 250)


def test_random_captions_are_one_to_eight_tokens_between_start_and_end():
    start, end = 62, 63
    like = torch.tensor([start, 5, 6, end, end, end, end, end, end, end, end, end])
    lengths = set()
    for seed in range(200):
        caption = denoiser.random_caption(np.random.default_rng(seed), like)
        assert caption.shape == like.shape
        assert caption[0] == start
        words = int((caption[1:] != end).sum())
        lengths.add(words)
        assert (caption[1 : 1 + words] < start).all()
        assert (caption[1 + words :] == end).all()
    assert lengths == set(range(1, 9))
    assert like.tolist()[1:4] == [5, 6, end]  # the caption itself stays


def test_only_learnt_samples_lose_their_caption_to_noise(tmp_path, monkeypatch):
    seen = []

    def spied(rng, like):
        seen.append(int(like[1]))
        return random_caption(rng, like)

    random_caption = denoiser.random_caption
    monkeypatch.setattr(denoiser, "random_caption", spied)
    denoiser_after(tmp_path, config=dataclasses.replace(TINY, caption_noise=1.0))
    third = torch.randint(0, 64, (4, 77), generator=torch.Generator().manual_seed(2))[2:, 1]
    assert len(seen) == TINY.steps
    assert set(seen) <= set(third.tolist())  # the learnt caption, or the empty one


def test_work_of_another_training_is_not_mixed_in(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"steps": 1}))
    with pytest.raises(ValueError, match="other settings"):
        train.train(tmp_path / "model", tmp_path / "images", tmp_path, TINY)


def test_short_mode_never_overwrites_the_demo(capsys):
    with pytest.raises(SystemExit):
        train.main(["--short"])
    assert "name another folder" in capsys.readouterr().err


@pytest.mark.slow
def test_short_training_makes_a_model_that_loads(tmp_path, run_python):
    if shutil.which("npm") is None:  # CI does without, too
        pytest.skip("npm, which brings the demo's art, is not installed")
    try:
        data.fetch(tmp_path / "work" / "art")
    except subprocess.CalledProcessError as error:
        skip_unless_ci(f"the demo's art cannot be fetched here: {error.stderr!r:.200}")
    model = tmp_path / "model"
    run_python(
        "-W", "ignore", "-m", "unmemorize.demo.train", "--short", "--anew", "--output", str(model),
        "--images", str(tmp_path / "images"), "--work", str(tmp_path / "work"),
    )  # fmt: skip
    from unmemorize.shared.models.load import load_denoiser

    assert load_denoiser(model).generate(["red apple"], [0], steps=2)[0].size == (128, 128)
    # The committed captions come from this very code, and the weights fit it.
    captions = "captions.json"
    assert (model / captions).read_text("utf-8") == (demo.MODEL / captions).read_text("utf-8")
    unet = "unet/diffusion_pytorch_model.safetensors"
    shapes = {k: v.shape for k, v in load_file(demo.MODEL / unet).items()}
    assert shapes == {k: v.shape for k, v in load_file(model / unet).items()}
