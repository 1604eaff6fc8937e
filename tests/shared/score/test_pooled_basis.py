"""The pooled basis: its cross-fit over folds and seeds, its error, and the file it is kept in."""

import numpy as np
import pytest
import torch
from toy import ToyDenoiser, prompts
from unmemorize.shared.score.calibration import Calibration, CalibrationError, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import (
    ControlBasis,
    directions_for,
    folds,
    inner_products,
)
from unmemorize.shared.score.detection import control_differences, detect
from unmemorize.shared.score.pooled_basis import (
    POOLED_SEEDS,
    pooled,
    pooled_cross_fitted,
)
from unmemorize.shared.score.rates import threshold_of

CONFIG = DetectionConfig(seeds=(0, 1, 2), schedule_steps=6)


def rows(seed: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def slow_residual(fitted: np.ndarray, row: np.ndarray, count: int) -> float:
    """The residual of a row outside the leading singular vectors of others, by definition."""
    mean = fitted.mean(0)
    vectors = np.linalg.svd(fitted - mean, full_matrices=False)[2][:count]
    rest = row - mean
    return np.linalg.norm(rest - rest @ vectors.T @ vectors)


def products_of(differences: torch.Tensor) -> torch.Tensor:
    seeds, number = differences.shape[:2]
    return inner_products(differences.flatten(0, 1)).view(seeds, number, seeds, number)


def others_of(differences: torch.Tensor, control: int, seed: int) -> torch.Tensor:
    """The D of all other folds at all other seeds, as rows."""
    (own,) = (held for held in folds(differences.shape[1]) if control in held)
    others = [k for k in range(differences.shape[1]) if k not in own]
    seeds = torch.arange(len(differences)) != seed
    return differences[seeds][:, others].flatten(0, 1)


def test_the_cross_fit_by_inner_products_is_the_slow_one_row_by_row():
    differences = 5 + rows(0, 3, 24, 40) * torch.linspace(3, 0.1, 40)
    scores = pooled_cross_fitted(products_of(differences), 4)
    for control in range(24):
        for seed in range(3):
            fitted = others_of(differences, control, seed).numpy()
            slow = slow_residual(fitted, differences[seed, control].numpy(), 4)
            assert scores[control, seed].item() == pytest.approx(slow, rel=1e-9)


def test_a_control_is_scored_by_no_basis_that_it_made():
    """Its own D, at whatever seed, moves the bases of others alone."""
    differences = rows(1, 3, 24, 40)
    before = pooled_cross_fitted(products_of(differences), 3)
    moved = differences.clone()
    moved[[1, 2], 7] += 100 * rows(2, 40)  # the same control at other seeds
    after = pooled_cross_fitted(products_of(moved), 3)
    assert after[7, 0].item() == pytest.approx(before[7, 0].item(), rel=1e-9)
    assert after[12, 0].item() != pytest.approx(before[12, 0].item(), rel=1e-5)  # that basis moved
    moved = differences.clone()
    moved[0] *= 3
    moved[0, 7] = differences[0, 7]  # the same noise, other controls
    after = pooled_cross_fitted(products_of(moved), 3)
    assert after[7, 0].item() == pytest.approx(before[7, 0].item(), rel=1e-9)


def test_the_basis_is_one_of_all_seeds_together():
    differences = rows(3, 3, 36, 50).float() * torch.linspace(3, 0.1, 50)
    basis, scores = pooled(differences)
    assert basis.mean.shape == (1, 50)
    assert scores.shape == (36, 3)
    image = rows(4, 1, 50).float()
    slow = slow_residual(
        differences.flatten(0, 1).double().numpy(), image[0].double().numpy(), directions_for(36)
    )
    assert basis.residual(image, [0]).item() == pytest.approx(slow, rel=1e-5)


def test_a_basis_of_one_noise_needs_no_index_and_gives_the_same():
    one, two = rows(5, 1, 30, 20).float(), rows(6, 5, 4, 5).float()
    basis = ControlBasis.fit(one, 3, [0])
    twice = ControlBasis.fit(one.repeat(2, 1, 1), 3, [0, 0])
    torch.testing.assert_close(basis.residual(two, [0] * 5), twice.residual(two, [1] * 5))
    # On a device that holds no values nothing can have waited for one.
    assert basis.to(torch.device("meta")).residual(two.to("meta"), [0] * 5).is_meta


def test_controls_that_stand_out_span_no_direction():
    directions, image = rows(7, 4, 60), 5 * rows(8, 60)
    differences = rows(9, 2, 120, 4) @ directions + 0.1 * rows(10, 2, 120, 60)
    differences[:, 17] += image
    basis, scores = pooled(differences)
    hidden = ControlBasis.fit(differences.flatten(0, 1)[None], directions_for(120), [0])
    found, naive = (each.residual(image[None], [0]) for each in (basis, hidden))
    assert found > 10 * naive
    assert scores[17].min() > 10 * scores[torch.arange(120) != 17].max()


@pytest.mark.parametrize("controls", [60, 150])
def test_calibrated_false_positives_of_new_noises_stay_at_their_rate(controls):
    """Prompts are words in few directions, nearly the same at each noise, and some of their own.

    Some noises make all scores larger. Images are new prompts at new noises.
    """
    generator = torch.Generator().manual_seed(11)
    rates = {"shipped": [], "naive": []}
    for _ in range(20):
        words = 3 * torch.randn(12, 150, generator=generator)

        def draw(seeds: int, count: int, words: torch.Tensor = words) -> torch.Tensor:
            mixing = torch.randn(count, 12, generator=generator)
            own = torch.randn(count, 150, generator=generator)
            turned = words + 0.3 * torch.randn(seeds, 12, 150, generator=generator)
            at_noise = own + 0.3 * torch.randn(seeds, count, 150, generator=generator)
            level = torch.exp(0.05 * torch.randn(seeds, 1, 1, generator=generator))
            return level * (mixing @ turned + at_noise)

        fitted = draw(3, controls)
        images = torch.cat([draw(1, 20)[0] for _ in range(20)])
        basis, scores = pooled(fitted)
        found = basis.residual(images, [0] * len(images)).double()
        own = basis.residual(fitted.flatten(0, 1), [0] * 3 * controls).double()
        for name, of_controls in (("shipped", scores.amax(1)), ("naive", own)):
            above = found > threshold_of(of_controls, 0.05)
            rates[name].append(above.double().mean().item())
    assert 0 < np.mean(rates["shipped"]) < 0.06
    assert np.mean(rates["naive"]) > 0.1


def calibrated(toy: ToyDenoiser, config: DetectionConfig = CONFIG) -> Calibration:
    texts, kept = prompts(120), {}
    detection = detect(toy, texts, config, on_difference=kept.__setitem__)
    made = Calibration.from_controls(
        detection, model="abc", settings=settings_of(toy, config), name="test"
    )
    first = torch.stack([kept[index] for index in range(120)], dim=1)
    steps = [2, 5, 2, 5][: len(config.seeds)]
    told = control_differences(toy, texts, config, steps)
    return made.with_observed(first).with_residual(told, settings_of(toy, config, steps))


def test_differences_come_from_the_passes_of_the_magnitudes():
    toy, texts, kept = ToyDenoiser(), prompts(30), {}
    plain = detect(toy, texts, CONFIG)
    rows_of_plain = sum(toy.rows)
    toy.rows.clear()
    known = {3: plain.traces[3]}
    detection = detect(toy, texts, CONFIG, known=known, on_difference=kept.__setitem__)
    assert sum(toy.rows) == rows_of_plain
    assert torch.equal(detection.traces, plain.traces)
    assert sorted(kept) == [i for i in range(30) if i != 3]
    slow = control_differences(toy, texts, CONFIG, [0] * len(CONFIG.seeds))
    for index, difference in kept.items():
        torch.testing.assert_close(difference, slow[:, index], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(difference.norm(dim=1).double(), plain.traces[index, :, 0])


def test_an_image_has_one_draw_a_control_and_the_highest_of_its_seeds():
    made = calibrated(ToyDenoiser())
    observed = made.require_observed()
    assert made.judge is made.residual
    assert [each.observed for each in (made.residual, observed)] == [None, None]
    assert observed.residual is None
    assert observed.settings["score"] == "observed residual"
    assert observed.settings["sigmas"] == made.settings["sigmas"]
    assert observed.seed_scores.shape == (120, 1)
    first = control_differences(ToyDenoiser(), prompts(120), CONFIG, [0] * len(CONFIG.seeds))
    _, scores = pooled(first)
    torch.testing.assert_close(observed.seed_scores[:, 0], scores.amax(1), rtol=1e-4, atol=1e-6)


def test_more_seeds_than_are_pooled_change_nothing():
    differences = rows(12, POOLED_SEEDS + 2, 24, 30).float()
    basis, scores = pooled(differences)
    fewer, same = pooled(differences[:POOLED_SEEDS])
    assert torch.equal(scores, same)
    assert torch.equal(basis.mean, fewer.mean)


def test_one_seed_judges_no_images_and_says_what_does():
    toy = ToyDenoiser()
    made = calibrated(toy, DetectionConfig(seeds=(0,), schedule_steps=6))
    assert made.observed is None
    assert made.residual is not None
    with pytest.raises(CalibrationError, match=r"one seed.*two seeds or more and one step"):
        made.require_observed()


def test_both_bases_are_kept_in_one_file_and_checked(tmp_path):
    made = calibrated(ToyDenoiser())
    made.save(path := tmp_path / "c.json")
    assert {each.name for each in tmp_path.iterdir()} == {"c.json", "c.safetensors"}
    loaded = Calibration.load(path)
    assert loaded == made
    for one, other in ((loaded.observed, made.observed), (loaded.residual, made.residual)):
        assert torch.equal(one.basis.directions, other.basis.directions)
        assert torch.equal(one.basis.mean, other.basis.mean)
    assert not torch.equal(loaded.observed.basis.mean[0], loaded.residual.basis.mean[0])
    calibrated(ToyDenoiser(seed=1)).save(tmp_path / "other.json")
    (tmp_path / "other.safetensors").replace(tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError, match="not the basis"):
        Calibration.load(path)
