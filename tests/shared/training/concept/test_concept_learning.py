"""Learning a concept on real tiny networks: what is learnt, on what, and what is refused."""

from contextlib import nullcontext
from functools import partial

import pytest
import tiny
import torch
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.training.concept import gain, learning
from unmemorize.shared.training.concept.adapter import ConceptAdapter, ConceptSwitch, adding
from unmemorize.shared.training.concept.gain import (
    NotEnoughImages,
    gains,
    line_above,
    without_names,
)
from unmemorize.shared.training.concept.images import CaptionedLatents
from unmemorize.shared.training.concept.learning import (
    ConceptImages,
    NothingLearnt,
    concept_of_lora,
    distinct,
    learn_concept,
)


def latents(count: int, *, marked: bool, seed: int) -> CaptionedLatents:
    """Noise, which nothing predicts; marked ones have a large bright half."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 4, 16, 16, generator=generator)
    if marked:
        rows[:, :, :, 8:] = 3.5
    captions = tuple(f"a red cat{', tall tree' if marked and i % 2 else ''}" for i in range(count))
    return CaptionedLatents(latents=rows, captions=captions)


def some_images(count: int = 8, **changes) -> ConceptImages:
    given = {"concept": latents(count, marked=True, seed=0), "names": ("tall tree",),
             "others": latents(24, marked=False, seed=1)} | changes  # fmt: skip
    return ConceptImages(**given)


@pytest.fixture(scope="module", autouse=True)
def lower_line():
    """An untrained network tells less apart than those that the line is made for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "DEVIATIONS", 3.0)
        yield


@pytest.fixture(scope="module")
def denoiser():
    return PipelineDenoiser(tiny.stable_diffusion(), resolution=64)


@pytest.fixture(scope="module")
def learnt(denoiser):
    before = {n: p.clone() for n, p in denoiser.pipeline.unet.named_parameters()}
    made = learn_concept(denoiser, some_images(), steps=40)
    for name, parameter in denoiser.pipeline.unet.named_parameters():
        assert torch.equal(parameter, before[name])  # the model stays as it is
        assert parameter.grad is None
    return made


def test_a_mark_is_learnt_and_told_from_images_that_were_never_taught(denoiser, learnt, tmp_path):
    numbers = learnt.account["numbers"]
    assert numbers["concept"] > numbers["others"]
    assert (numbers["recall"], len(numbers["concept_gains"])) == (1.0, 2)  # of 8, a quarter
    assert len(numbers["other_gains"]) == 12
    learnt.save(tmp_path / "concept.safetensors")
    switch = ConceptSwitch(
        denoiser.pipeline.unet, ConceptAdapter.load(tmp_path / "concept.safetensors")
    )
    for marked in (True, False):
        fresh = latents(6, marked=marked, seed=2)
        found = gains(denoiser, switch.on, fresh.latents, fresh.captions)
        assert (found > numbers["threshold"]).tolist() == [marked] * 6
    # With the adapter off on both sides nothing is gained: the number is a difference.
    assert not gains(denoiser, nullcontext, fresh.latents, fresh.captions).any()


def test_gains_are_those_of_a_plain_loop(denoiser, learnt):
    some = latents(2, marked=True, seed=3)
    layers = dict(denoiser.pipeline.unet.named_modules())
    placed = {name: (layers[name], 0) for name in learnt.pairs}
    on = partial(adding, placed, lambda name, _: learnt.pairs[name])
    expected = torch.zeros(2, dtype=torch.float64)
    for number, level in enumerate((5, 17, 29, 41)):
        sigma = denoiser.sigmas(50)[level]
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(number))
        for row in range(2):
            x, cond = some.latents[[row]] + sigma * noise, denoiser.encode([some.captions[row]])
            with torch.no_grad():
                base = (x - denoiser.denoise(x, sigma, cond)) / sigma - noise
                with on():
                    adapted = (x - denoiser.denoise(x, sigma, cond)) / sigma - noise
            expected[row] += float(base.square().mean() - adapted.square().mean()) / 4
    torch.testing.assert_close(gains(denoiser, on, some.latents, some.captions), expected,
                               rtol=1e-3, atol=1e-5)  # fmt: skip


def test_what_is_not_learnt_makes_no_file_and_says_what_to_bring(denoiser):
    """The concept's images are like the others: nothing is there to learn."""
    alike = latents(8, marked=False, seed=4)
    with pytest.raises(NothingLearnt, match=r"No concept was made: .* Bring --others"):
        learn_concept(denoiser, some_images(concept=alike), steps=2)


def test_too_few_or_alike_images_are_told(denoiser):
    with pytest.raises(NotEnoughImages, match=r"at least 8 images.*found 7 images"):
        some_images(7)
    rows = latents(9, marked=True, seed=0)
    rows.latents[2:] = rows.latents[1] + 0.01 * rows.latents[2:]
    assert distinct(rows.latents) == 2
    with pytest.raises(NotEnoughImages, match="found 2 of 9 images that differ"):
        some_images(concept=rows)
    with pytest.raises(NotEnoughImages, match="15 images without the concept, at least 16"):
        some_images(others=latents(15, marked=False, seed=1))


def test_a_published_lora_becomes_a_concept(denoiser, learnt, tmp_path):
    path = tmp_path / "published.safetensors"
    learnt.save(path)  # any LoRA of diffusers; its header is not read
    made, left = concept_of_lora(denoiser, some_images(), path)
    assert (made.account["made"]["from"], left) == ("LoRA", ())
    assert len(made.account["numbers"]["other_gains"]) == 24  # none was taught: all are measured on
    for name, (a, b) in learnt.pairs.items():
        torch.testing.assert_close(made.pairs[name][1] @ made.pairs[name][0], b @ a)


@pytest.mark.parametrize("named", [True, False])
def test_captions_take_and_lose_the_name(named):
    images = some_images()
    assert images.caption(1, named=named) == ("a red cat, tall tree" if named else "a red cat")
    assert images.caption(0, named=named) == ("a red cat, tall tree" if named else "a red cat")
    assert without_names("Tall tree, a cat and a tall  tree.", ["tall tree"]) == "a cat and a"


def test_the_line_is_far_above_the_controls_and_no_outlier_moves_it():
    generator = torch.Generator().manual_seed(0)
    controls = 0.5 + 0.1 * torch.randn(400, generator=generator, dtype=torch.float64)
    assert line_above(controls) == pytest.approx(0.5 + gain.DEVIATIONS * 0.1, abs=0.05)
    # A few that resemble the concept do not lift it.
    outliers = torch.cat([controls, torch.full((20,), 9.0, dtype=torch.float64)])
    assert line_above(outliers) == pytest.approx(line_above(controls), rel=0.1)
    controls = controls[:8]
    with pytest.raises(NotEnoughImages, match="7 control images, at least 8"):
        line_above(controls[1:])


def test_half_of_the_visits_leave_the_name_out(denoiser, learnt, monkeypatch):
    asked = []
    original = ConceptImages.caption

    def caption(self, row, *, named):
        asked.append(named)
        return original(self, row, named=named)

    monkeypatch.setattr(ConceptImages, "caption", caption)
    monkeypatch.setattr(learning, "accept", lambda *_, **__: learnt)
    learn_concept(denoiser, some_images(), steps=10)
    visits = asked[-10 * learning.LEVELS * learning.AT_ONCE :]
    assert 0.25 < sum(visits) / len(visits) < 0.75
