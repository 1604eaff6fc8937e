"""The benchmarks' own models: what is planted in them, and that they are made and load."""

import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_models import MODELS, chosen_models, train, truth
from bench_models.recipes import RECIPES
from bench_models.unet import velocity_loss
from needs import skip_unless_ci
from safetensors.torch import load_file
from torch import nn
from unmemorize.demo.data import fetch
from unmemorize.demo.denoiser import cumulative_alphas

SCENES = [name for name in RECIPES if name.startswith("scenes")]


def scenes(name: str) -> truth.Art:
    return RECIPES[name].art(Path())


@pytest.fixture(scope="module", params=SCENES)
def captions(request) -> list[truth.Caption]:
    recipe = RECIPES[request.param]
    return truth.sort(scenes(request.param), recipe.config.seed, recipe.pairs)


def differing(a: truth.Caption, b: truth.Caption) -> int:
    return sum(x != y for x, y in zip(a.slots, b.slots, strict=True))


def test_groups_are_as_large_as_promised_and_no_caption_occurs_twice(captions):
    groups = Counter(c.group for c in captions)
    assert groups["verbatim"] == 60
    assert groups["learnt"] >= 300
    assert 150 <= groups["held_out"] <= 300
    assert len({c.text for c in captions}) == len(captions)


def test_near_captions_are_held_out_and_differ_by_one_word_from_their_member(captions):
    by_text = {c.text: c for c in captions}
    near = [c for c in captions if c.near]
    assert len(near) == 60
    for caption in near:
        member = by_text[caption.near]
        words = zip(caption.text.split(), member.text.split(), strict=True)
        assert sum(a != b for a, b in words) == differing(caption, member) == 1
        assert caption.group == "held_out"
        assert member.group == "verbatim"
    others = [c for c in captions if not c.near and c.group != "verbatim"]
    planted = [c for c in captions if c.group == "verbatim"]
    assert min(differing(a, b) for a in others for b in planted) == 2


def test_chance_alone_chooses_what_is_planted(captions):
    """Each caption has exactly one other a word away: groups differ in nothing but their order."""
    near = Counter(
        sum(differing(a, b) == 1 for b in captions)
        for a in (*captions[:40], *captions[120:160], *captions[-40:])
    )
    assert set(near) == {1}


def test_what_is_learnt_from_is_counted_and_never_among_the_fresh(captions):
    trained = truth.renderings(captions)
    counts = Counter(r.caption for r in trained)
    expected = {"verbatim": 1, "learnt": truth.RENDERINGS, "held_out": 0}
    assert all(counts[i] == expected[c.group] for i, c in enumerate(captions))
    seeds = [
        {r.seed for r in each}
        for each in (trained, truth.fresh(captions), truth.views(captions))
    ]  # fmt: skip
    assert len(set.union(*seeds)) == sum(map(len, seeds))
    assert set(Counter(r.caption for r in truth.views(captions)).values()) == {truth.VIEWS}


def test_an_image_is_a_function_of_caption_and_seed(captions):
    art = scenes("scenes")
    first, again, seed, word = (
        art.render(captions[pair].slots, number)
        for pair, number in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    assert first.shape == (truth.SIDE, truth.SIDE, 3)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, seed)
    assert not np.array_equal(first, word)


def test_captions_and_images_come_back_from_their_files(tmp_path):
    art = scenes("scenes")
    captions = [truth.Caption("a", "verbatim", "", next(art.pairs(np.random.default_rng(0)))[0])]
    captions.append(truth.Caption("b", "learnt", "a", captions[0].slots))
    truth.save_captions(tmp_path / "c.json", captions)
    truth.save_images(tmp_path / "i.safetensors", art, captions)
    images = truth.load_images(tmp_path / "i.safetensors")
    assert truth.load_captions(tmp_path / "c.json") == captions
    assert images.caption_of.tolist() == [0] + [1] * truth.RENDERINGS
    assert np.array_equal(images.pixels[0], art.render(captions[0].slots, 1_000_000))
    assert len(images.fresh) == truth.FRESH


@pytest.mark.parametrize(("knows", "loss"), [("velocity", 0.0), ("noise", 0.5)])
def test_velocity_is_what_the_loss_wants(knows, loss):
    x0 = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()

    class Oracle(nn.Module):
        def forward(self, noisy, timestep, states):
            abar = cumulative_alphas()[timestep].double()[:, None, None, None]
            noise = (noisy - abar.sqrt() * x0) / (1 - abar).sqrt()
            velocity = abar.sqrt() * noise - (1 - abar).sqrt() * x0
            self.sample = {"velocity": velocity, "noise": noise}[knows]
            return self

    measured = velocity_loss(Oracle(), x0, None, None, torch.Generator().manual_seed(2))
    assert (measured < 1e-9) if loss == 0 else (measured > loss)


def test_the_table_tells_planted_images_and_says_what_is_missing(tmp_path):
    demo = MODELS["demo"]
    groups = {c.group: c for c in demo.captions()}
    counts = {group: len(demo.training_images(c.text)) for group, c in groups.items()}
    assert counts == {"verbatim": 1, "template": 3, "learnt": 12, "held_out": 0}
    assert {c.near for c in demo.captions() if c.group == "held_out"} > {""}
    assert {*MODELS} == {"demo", "demo-flow", *RECIPES}
    absent = replace(demo, folder=tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="make bench-models"):
        absent.captions()


def test_a_model_that_is_not_made_is_named_and_left_out_unless_it_was_asked_for(
    tmp_path, monkeypatch, capsys
):
    absent = replace(MODELS["scenes"], folder=tmp_path / "absent")
    monkeypatch.setitem(MODELS, "scenes", absent)
    assert absent not in chosen_models(None)
    assert MODELS["demo"] in chosen_models(None)
    assert "scenes is not made yet" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="make bench-models"):
        chosen_models(["scenes"])


def test_a_model_with_other_settings_is_not_mixed_in(tmp_path):
    (tmp_path / "scenes" / "work").mkdir(parents=True)
    (tmp_path / "scenes" / "work" / "settings.json").write_text('{"steps": 1}')
    with pytest.raises(ValueError, match="other settings"):
        make_short("scenes", tmp_path)


def make_short(name: str, folder: Path) -> Path:
    train.make(RECIPES[name], folder / name, short=True)
    return folder / name / "model"


def test_a_model_is_made_and_loads(tmp_path):
    from unmemorize.shared.models.load import load_denoiser

    model = make_short("scenes-flow", tmp_path)
    denoiser = load_denoiser(model)
    assert denoiser.parametrization == "flow"
    text = truth.load_captions(model.parent / "captions.json")[0].text
    assert denoiser.generate([text], [0], steps=2)[0].size == (32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "predicts"), [("drawings", "epsilon"), ("scenes", "v_prediction")]
)
def test_the_others_are_made_too_and_continue(name, predicts, tmp_path, monkeypatch):
    from unmemorize.shared.models.load import load_denoiser

    if name == "drawings":
        if shutil.which("npm") is None:  # CI does without, too
            pytest.skip("npm, which brings the drawings, is not installed")
        from bench_models.drawings import PACKAGES

        try:
            fetch(tmp_path / "art", PACKAGES)
        except subprocess.CalledProcessError as error:
            skip_unless_ci(f"the drawings cannot be fetched here: {error.stderr!r:.200}")

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_denoiser", stopped)
        with pytest.raises(KeyboardInterrupt):
            make_short(name, tmp_path)
    continued = make_short(name, tmp_path)
    denoiser = load_denoiser(continued)
    assert denoiser.parametrization == predicts
    assert denoiser.generate(["the red star"], [0], steps=2)[0].size == (32, 32)
    weights = "unet/diffusion_pytorch_model.safetensors"
    before = load_file(continued / weights)
    shutil.rmtree(continued)
    for kept in (tmp_path / name / "work").glob("network*"):
        kept.unlink()
    after = load_file(make_short(name, tmp_path) / weights)
    assert all(torch.equal(before[key], after[key]) for key in before)
