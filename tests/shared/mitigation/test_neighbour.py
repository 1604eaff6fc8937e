"""Keeping away from training images: when it acts, how far it goes, whom it leaves alone."""

import math
from dataclasses import replace

import pytest
import torch
from runs import seeded, start_of, step_of, wide_toy
from unmemorize.shared.mitigation.neighbour import KeepAway, NearestNeighbour, cosine

LATENTS = seeded(5, 4, 8, 8, seed=77)
CPU = torch.device("cpu")


def near(step, image: int, noise: float = 0.5) -> torch.Tensor:
    """Return training latents of which one resembles the prediction for an image."""
    x0 = step.to_x0(step.guided())[image]
    disturbed = x0 + noise * x0.std() * seeded(4, 8, 8, seed=5)
    return torch.cat([LATENTS, disturbed[None]])


def guide(step, latents=LATENTS, **settings):
    method = NearestNeighbour(latents=latents, **settings)
    return KeepAway(method, wide_toy(), CPU).guide(step)


def test_cosine_is_the_slow_one():
    x0, latents = seeded(2, 4, 8, 8), LATENTS + 3
    found = cosine(x0, latents)
    for row in range(2):
        for image in range(5):
            a, b = (
                torch.cat([channel.flatten() - channel.mean() for channel in latent])
                for latent in (x0[row], latents[image])
            )
            expected = (a @ b) / math.sqrt((a @ a) * (b @ b))
            assert found[row, image].item() == pytest.approx(expected.item(), abs=1e-12)


def test_cosine_sees_no_brightness_and_survives_flat_images():
    x0 = seeded(2, 4, 8, 8)
    torch.testing.assert_close(cosine(7 * x0 + 3, x0).diagonal(), torch.ones(2).double())
    assert not cosine(torch.ones(1, 4, 8, 8), torch.ones(1, 4, 8, 8)).any()


def test_far_images_are_left_to_the_host():
    assert guide(step_of()) is None


def test_only_images_that_are_too_near_change():
    step = step_of()
    found = guide(step, near(step, 1))
    assert torch.equal(found[[0, 2]], step.guided()[[0, 2]])
    assert not torch.equal(found[1], step.guided()[1])


def similarity(step, prediction, latents):
    return cosine(step.to_x0(prediction), latents).amax(1)


def test_the_similarity_falls():
    step = step_of()
    latents = near(step, 1)
    before = similarity(step, step.guided(), latents)[1]
    milder, moved, both = (
        similarity(step, guide(step, latents, **settings), latents)[1]
        for settings in ({"repulsion": 0.0}, {"despecification": 0.0}, {})
    )
    assert before > 0.85
    assert moved < before - 0.1
    assert both < milder < before


def test_guidance_is_reduced_as_in_equation_13():
    step = step_of()
    latents = near(step, 1)
    s = similarity(step, step.guided(), latents)[1].item()
    for c1, reduced in ((2.0, 2 * s), (50.0, 6.5)):
        found = guide(step, latents, despecification=c1, repulsion=0.0)
        torch.testing.assert_close(found[1], step.guided(7.5 - reduced)[1])


def test_guidance_leaves_the_neighbours_caption_as_in_equation_15():
    step, denoiser = step_of(), wide_toy()
    latents, asked = near(step, 1), []
    s = similarity(step, step.guided(), latents)[1].item()
    theirs = seeded(3, 4, 8, 8, seed=50)

    def predict(cond):
        asked.append(cond.embeddings)
        return theirs

    step = replace(step, predict=predict)
    captions = (*("far",) * 5, "near")
    for c2, less in ((1.0, s), (50.0, 6.5 - 2 * s)):
        method = NearestNeighbour(
            latents=latents, captions=captions, despecification=2.0, deduplication=c2, repulsion=0.0
        )
        found = KeepAway(method, denoiser, CPU).guide(step)
        # Eqs. 13 to 16 at once; guidance never falls below 1.
        expected = step.guided(7.5 - 2 * s)[1] - less * (theirs - step.uncond)[1]
        torch.testing.assert_close(found[1], expected)
        assert torch.equal(found[[0, 2]], step.guided()[[0, 2]])
        torch.testing.assert_close(asked[-1][[1]], denoiser.encode(["near"]).embeddings)
    unknown = replace(method, captions=("far",) * 5 + ("",))
    found = KeepAway(unknown, denoiser, CPU).guide(step)
    torch.testing.assert_close(found[1], step.guided(7.5 - 2 * s)[1])
    with pytest.raises(ValueError, match=r"`captions` must hold one per image, 6, or none, got 2"):
        NearestNeighbour(latents=latents, captions=("one", "two"))


def test_without_guidance_there_is_nothing_to_reduce():
    step = step_of(cond_scale=1.0)
    found = guide(step, near(step, 1), repulsion=0.0)
    torch.testing.assert_close(found, step.guided())


def test_the_step_away_follows_the_gradient_and_has_its_length():
    step = step_of()
    latents = near(step, 1)
    found = guide(step, latents, despecification=0.0, repulsion=0.3)
    x0 = step.to_x0(step.guided())[[1]]
    moved = step.to_x0(found)[[1]] - x0
    assert moved.norm().item() == pytest.approx(0.3 * x0.norm().item())
    h, slopes = 1e-6 * x0.norm(), []
    for place in range(0, 256, 16):
        bump = torch.zeros(256, dtype=torch.float64)
        bump[place] = h
        up, down = (cosine(x0 + s * bump.view(1, 4, 8, 8), latents).amax() for s in (1, -1))
        slopes.append(((up - down) / (2 * h)).item())
    slopes = torch.tensor(slopes, dtype=torch.float64)
    found_slopes = -moved.flatten()[::16]
    torch.testing.assert_close(
        found_slopes / found_slopes.norm(), slopes / slopes.norm(), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(
    "settings",
    [{"despecification": 0.0, "repulsion": 0.0}, {"bound_start": 1.1, "bound_end": 1.1}],
)
def test_no_strength_changes_nothing(settings):
    step = step_of()
    assert guide(step, near(step, 1), **settings) is None


def test_the_bound_rises_as_a_parabola():
    method = NearestNeighbour(latents=LATENTS, bound_start=0.2, bound_end=0.6)
    assert [method.bound(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 0.3, 0.6])
    s = None
    for percent, acts in ((0.0, True), (0.9, False)):
        step = step_of(percent=percent)
        latents = near(step, 1)
        s = similarity(step, step.guided(), latents)[1].item()
        found = guide(step, latents, bound_start=s - 0.1, bound_end=s + 0.05)
        assert (found is not None) == acts


def test_an_image_does_not_depend_on_those_beside_it():
    step = step_of()
    latents = torch.cat([near(step, 1), near(step, 2, noise=0.3)])
    together = guide(step, latents)
    for image in range(3):
        part = slice(image, image + 1)
        x = step.x[part]
        alone = step_of(
            images=1, x=x, cond=step.cond[part], uncond=step.uncond[part],
            to_x0=lambda noise, x=x: x - 2 * noise, from_x0=lambda x0, x=x: (x - x0) / 2,
        )  # fmt: skip
        found = guide(alone, latents)
        found = alone.guided() if found is None else found
        torch.testing.assert_close(together[part], found)


def test_another_similarity_can_be_given():
    step = step_of()

    def brightness(x0, latents):
        return -(x0.mean((1, 2, 3))[:, None] - latents.mean((1, 2, 3))[None]).abs()

    latents = near(step, 1, noise=0.01)[-1:]
    found = guide(
        step, latents, similarity=brightness, bound_start=-0.1, bound_end=-0.1,
        despecification=0.0,
    )  # fmt: skip
    before, after = (brightness(step.to_x0(e), latents)[1] for e in (step.guided(), found))
    assert after < before - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_predictions_keep_their_dtype(dtype):
    plain = step_of(dtype=dtype)

    def wide(x0):
        return (plain.x.float() - x0) / 2

    step = step_of(
        dtype=dtype, from_x0=wide, to_x0=lambda noise: plain.x.float() - 2 * noise.float()
    )
    found = guide(step, near(step, 1).double())
    assert found.dtype == dtype
    assert not torch.equal(found[1], step.guided()[1])
    assert found.isfinite().all()


def product(x0, latents):
    return x0.flatten(1) @ latents.flatten(1).T / 1e4


@pytest.mark.parametrize("similarity", [cosine, product])
def test_it_works_where_gradients_are_off(similarity):
    step = step_of()
    latents = near(step, 1)
    expected = guide(step, latents, similarity=similarity)
    with torch.inference_mode():
        found = guide(step_of(), latents.clone(), similarity=similarity)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_latents_of_another_size_are_refused():
    start = start_of(wide_toy())
    assert NearestNeighbour(latents=LATENTS).start(start).latents.shape == LATENTS.shape
    method = NearestNeighbour(latents=seeded(2, 4, 16, 16))
    with pytest.raises(ValueError, match=r"\(4, 16, 16\), the run's \(4, 8, 8\)"):
        method.start(start)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latents": torch.zeros(0, 4, 8, 8)}, "`latents` must hold at least one image"),
        ({"latents": torch.zeros(4)}, "`latents` must hold at least one image"),
        ({"latents": torch.full((1, 4, 8, 8), torch.nan)}, "`latents` must be finite"),
        ({"bound_end": float("inf")}, "`bound_end` must be finite, got inf."),
        ({"despecification": -1.0}, "`despecification` must be at least 0, got -1.0."),
        ({"repulsion": float("nan")}, "`repulsion` must be at least 0, got nan."),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NearestNeighbour(**{"latents": LATENTS} | settings)
