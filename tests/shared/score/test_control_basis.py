"""The residual outside the controls: its geometry, its cross-fit, and where it is measured."""

import json
import math

import numpy as np
import pytest
import torch
from toy import ToyDenoiser, prompts
from unmemorize.shared.score.calibration import Calibration, CalibrationError, settings_of
from unmemorize.shared.score.calibration_file import basis_path
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.control_basis import (
    ControlBasis,
    cross_fitted,
    directions_for,
    fit_controls,
    inner_products,
    ordinary,
    require_direction,
)
from unmemorize.shared.score.detection import control_differences, detect
from unmemorize.shared.score.rates import NotEnoughControls, threshold_of

CONFIG = DetectionConfig(seeds=(0, 1), schedule_steps=6)
TOLD = (2, 5)


def rows(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def products_of(differences: torch.Tensor) -> torch.Tensor:
    return torch.stack([inner_products(one) for one in differences])


def test_the_residual_is_what_lies_outside_the_leading_singular_vectors():
    differences = rows(0, 2, 30, 50) * torch.linspace(3, 0.1, 50)
    basis = ControlBasis.fit(differences, 4, TOLD)
    wanted = rows(1, 5, 50)
    for seed in range(2):
        controls = differences[seed].double().numpy()
        mean = controls.mean(0)
        vectors = np.linalg.svd(controls - mean)[2][:4]
        rest = wanted.double().numpy() - mean
        rest = rest - rest @ vectors.T @ vectors
        got = basis.residual(wanted, [seed] * 5)
        np.testing.assert_allclose(got.numpy(), np.linalg.norm(rest, axis=1), rtol=1e-5)


def test_what_controls_can_add_counts_for_nothing_and_all_else_counts_in_full():
    directions = torch.linalg.qr(rows(0, 40, 4)).Q.T
    differences = (rows(1, 60, 3) @ directions[:3])[None]
    basis = ControlBasis.fit(differences, 3, TOLD)
    inside = rows(2, 1, 3) @ directions[:3] * 100
    assert basis.residual(inside, [0]).item() < 1e-3
    outside = inside + 7 * directions[3]
    assert basis.residual(outside, [0]).item() == pytest.approx(7, rel=1e-3)


def test_more_directions_than_controls_differ_in_take_nothing_away():
    differences = torch.zeros(1, 10, 20)
    differences[0, :, 0] = torch.arange(10.0)
    basis = ControlBasis.fit(differences, 5, TOLD)
    assert basis.directions.isfinite().all()
    assert basis.directions[0, 1:].abs().max() < 1e-5


def test_a_control_is_scored_by_the_others():
    """A lone direction is no control's excuse for itself, and the slow way gives the same."""
    differences = rows(0, 1, 40, 60)
    differences[0, 7, 3] += 50
    scores = cross_fitted(products_of(differences), 3)
    own = ControlBasis.fit(differences, 3, TOLD).residual(differences[0], [0] * 40)
    assert scores[7, 0] > 45 > 20 > own[7]
    others = [i for i in range(40) if i not in range(4, 8)]
    slow = ControlBasis.fit(differences[:, others], 3, TOLD).residual(differences[0, 7:8], [0])
    torch.testing.assert_close(scores[7].float(), slow)


@pytest.mark.parametrize("controls", [100, 400])
def test_calibrated_false_positives_stay_at_their_rate(controls):
    """Prompts like the controls: many words in few directions, and noise of their own."""
    generator = torch.Generator().manual_seed(3)
    words = torch.randn(20, 200, generator=generator) * 3

    def draw(count: int) -> torch.Tensor:
        mixing = torch.randn(count, 20, generator=generator)
        return mixing @ words + torch.randn(count, 200, generator=generator)

    rates, naive = [], []
    for _ in range(40):
        fitted, fresh = draw(controls)[None], draw(1000)
        count = directions_for(controls)
        basis = ControlBasis.fit(fitted, count, TOLD)
        scores = basis.residual(fresh, [0] * len(fresh)).double()
        threshold = threshold_of(cross_fitted(products_of(fitted), count)[:, 0], 0.05)
        rates.append((scores > threshold).double().mean().item())
        own = basis.residual(fitted[0], [0] * controls).double().quantile(0.95)
        naive.append((scores > own).double().mean().item())
    assert np.mean(rates) < 0.06
    assert np.mean(naive) > np.mean(rates)  # what a basis of the controls' own would do


def test_neighbours_in_the_list_of_controls_do_not_lower_the_threshold():
    """Controls in pairs that add nearly the same; the prompts to judge have no such neighbour."""
    generator = torch.Generator().manual_seed(5)

    def draw(count: int) -> torch.Tensor:
        # Few parts of large size: leading directions are those of single pairs.
        sizes = torch.randn(count, 1, generator=generator).exp()
        return sizes * torch.randn(count, 300, generator=generator)

    rates, scattered = [], []
    for _ in range(6):
        pairs = draw(60).repeat_interleave(2, 0)
        fitted, fresh = pairs + 0.1 * torch.randn(120, 300, generator=generator), draw(1000)
        for found, order in (
            (rates, range(120)),
            (scattered, [*range(0, 120, 2), *range(1, 120, 2)]),
        ):
            listed = fitted[list(order)][None]
            basis, own = fit_controls(listed, 30, TOLD)
            scores = basis.scores(basis.residual(fresh, [0] * len(fresh)), [0] * len(fresh))
            found.append((scores > own[:, 0].quantile(0.95)).double().mean().item())
    assert np.mean(rates) == pytest.approx(0.05, abs=0.02)
    assert np.mean(scattered) > 2 * np.mean(rates)  # where a pair stands in two folds


def test_scores_are_those_of_a_slow_reference_at_the_told_levels():
    """Passes of one row each, and the formula of the module's text in plain Python."""
    toy, texts, controls = ToyDenoiser(torch.float64), prompts(6), prompts(20)[6:]
    differences = control_differences(toy, controls, CONFIG, TOLD)
    basis, fitted = fit_controls(differences, 3, TOLD)
    products = products_of(differences)
    scores = detect(toy, texts, CONFIG, basis=basis)
    for k, (seed, step) in enumerate(zip(CONFIG.seeds, TOLD, strict=True)):
        sigma = toy.sigmas(6)[step]
        x = toy.initial_noise([seed], sigma)  # pure noise at a level where it never occurs
        logs = cross_fitted(products, 3, ordinary(cross_fitted(products, 3)))[:, k].log()
        median = logs.sort().values[6]  # of 14 the lower one
        deviation = (logs - median).abs().sort().values[6]
        for i, text in enumerate(texts):
            with torch.no_grad():
                cond, empty = (toy.denoise(x, sigma, toy.encode([t])) for t in (text, ""))
            residual = basis.residual((empty - cond) / sigma, [k]).double().log().item()
            slow = math.exp((residual - median) / deviation / 2)
            assert scores.traces[i, k, 0].item() == pytest.approx(slow, rel=1e-4)
        expected = ((logs - median) / deviation / 2).exp()
        torch.testing.assert_close(fitted[:, k], expected)
    assert torch.equal(scores.scores, scores.traces.mean((1, 2)))


def test_a_level_that_tells_nothing_takes_little_away():
    """Memorized prompts stand out at one of two levels; a mean of residuals loses most of them."""
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, raised: float) -> torch.Tensor:
        z = torch.randn(2, count, generator=generator, dtype=torch.float64)
        z[0] += raised
        return (torch.tensor([[0.05], [0.5]]) * z + torch.tensor([[0.0], [3.0]])).exp()

    controls, fresh, memorized = (draw(n, up) for n, up in ((400, 0), (4000, 0), (400, 5)))
    basis = ControlBasis.fit(rows(0, 2, 20, 30), 2, TOLD).in_units_of(controls.T)

    def scores(residuals: torch.Tensor) -> torch.Tensor:
        each = [basis.scores(own, [k] * len(own)) for k, own in enumerate(residuals)]
        return torch.stack(each).mean(0)

    assert scores(controls).median().item() == pytest.approx(1.2, abs=0.3)
    for measure, recall in ((scores, (0.85, 1)), (lambda r: r.mean(0), (0, 0.1))):
        threshold = threshold_of(measure(controls), 0.01)
        assert recall[0] <= (measure(memorized) > threshold).double().mean() <= recall[1]
        assert (measure(fresh) > threshold).double().mean() < 0.02


def test_controls_that_add_nothing_at_a_level_break_no_score():
    differences = rows(0, 2, 40, 30)
    for silent in (range(40), range(30)):
        differences[1, silent] = 0
        basis, fitted = fit_controls(differences, 3, TOLD)
        assert fitted.isfinite().all()
        residual = basis.residual(rows(1, 2, 30), [0, 1])
        assert basis.scores(residual, [0, 1]).isfinite().all()


def test_a_control_that_stands_out_at_one_level_alone_spans_no_direction():
    scores = torch.randn(120, 2, generator=torch.Generator().manual_seed(0)).double()
    scores = (scores * torch.tensor([0.3, 0.1])).exp()
    scores[17, 1] *= torch.tensor(12 * 0.1).exp()
    out = ordinary(scores).logical_not().nonzero().flatten().tolist()
    assert 17 in out
    assert len(out) < 4


def test_any_residual_is_a_finite_score():
    basis = ControlBasis.fit(rows(0, 1, 20, 30), 2, [0]).in_units_of(torch.full((20, 1), 2.0))
    assert basis.scores(torch.tensor([0.0, 2.0]), [0, 0]).tolist() == pytest.approx(
        [0, 1], rel=1e-5
    )
    greatest = basis.scores(torch.tensor([1e30]), [0])  # controls that are all alike
    assert torch.tensor(1e6) < greatest.float() < torch.inf


def test_batches_and_interruptions_do_not_change_the_differences():
    toy, controls = ToyDenoiser(), prompts(40)
    whole = control_differences(toy, controls, CONFIG, TOLD)
    seen = {}
    control_differences(toy, controls, CONFIG, TOLD, on_result=seen.__setitem__)
    known = {i: seen[i] for i in range(0, 40, 3)}
    again = control_differences(toy, controls, CONFIG, TOLD, known=known)
    assert torch.equal(again, whole)
    assert whole.shape[:2] == (2, 40)


def calibrated(toy: ToyDenoiser) -> Calibration:
    controls = prompts(120)
    differences = control_differences(toy, controls, CONFIG, TOLD)
    made = Calibration.from_controls(
        detect(toy, controls, CONFIG), model="abc", settings=settings_of(toy, CONFIG), name="test"
    )
    return made.with_residual(differences, settings_of(toy, CONFIG, TOLD))


def test_a_calibration_keeps_its_basis_in_a_file_beside_it(tmp_path):
    toy = ToyDenoiser()
    made = calibrated(toy)
    made.save(tmp_path / "c.json")
    loaded = Calibration.load(tmp_path / "c.json")
    assert loaded == made
    assert loaded.judge is loaded.residual
    assert loaded.judge.settings["score"] == "residual"
    assert loaded.judge.settings["told"] == list(loaded.judge.basis.steps) == list(TOLD)
    assert 0 < loaded.judge.family_cosine <= 1 + 1e-9
    assert loaded.family_cosine is None  # magnitudes have no directions
    assert torch.equal(loaded.judge.basis.directions, made.judge.basis.directions)
    assert loaded.judge.check("abc", settings_of(toy, CONFIG, TOLD)) == ""
    assert loaded.check("abc", settings_of(toy, CONFIG)) == ""
    with pytest.raises(ValueError, match="score"):
        loaded.judge.check("abc", settings_of(toy, CONFIG))


def test_a_basis_of_another_calibration_is_refused(tmp_path):
    made = calibrated(ToyDenoiser())
    made.save(tmp_path / "c.json")
    beside = basis_path(tmp_path / "c.json")
    kept = beside.read_bytes()
    beside.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CalibrationError, match="not the basis"):
        Calibration.load(tmp_path / "c.json")
    beside.unlink()
    with pytest.raises(CalibrationError, match="missing"):
        Calibration.load(tmp_path / "c.json")


def test_a_control_near_a_memorized_prompt_does_not_hide_it():
    """One control of 120 points the way of a memorized prompt, as a caption one word away does."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4, 60, generator=generator)
    controls = torch.randn(2, 120, 4, generator=generator) @ directions
    controls += 0.1 * torch.randn(2, 120, 60, generator=generator)
    image = 5 * torch.randn(60, generator=generator)
    controls[:, 17] += image
    hidden = ControlBasis.fit(controls, 10, TOLD).residual(image[None], [0])
    spanning = ordinary(cross_fitted(products_of(controls), 10))
    assert spanning.logical_not().nonzero().flatten().tolist() == [17]
    found = ControlBasis.fit(controls[:, spanning], 10, TOLD).residual(image[None], [0])
    assert found > 10 * hidden
    scores = cross_fitted(products_of(controls), 10, spanning)
    assert (
        scores[17].min() > 10 * scores[torch.arange(120) != 17].max()
    )  # it is scored all the same
    assert ordinary(torch.ones(30, 2)).all()


def test_files_from_before_there_were_residuals_are_read(tmp_path):
    toy = ToyDenoiser()
    made = Calibration.from_controls(
        detect(toy, prompts(120), CONFIG), model="abc", settings=settings_of(toy, CONFIG), name="t"
    )
    made.save(path := tmp_path / "c.json")
    values = json.loads(path.read_text("utf-8"))
    for name in ("digest", "residual", "observed", "basis", "second", "family_cosine"):
        del values[name]
    path.write_text(json.dumps(values | {"schema_version": 1}), "utf-8")
    loaded = Calibration.load(path)
    assert loaded == made
    assert loaded.judge is loaded


def test_latents_of_another_size_are_refused():
    basis = ControlBasis.fit(rows(0, 2, 20, 12), 2, TOLD)
    with pytest.raises(ValueError, match="12 elements, these have 256"):
        detect(ToyDenoiser(), ["a"], CONFIG, basis=basis)


def test_steps_and_seeds_that_a_basis_does_not_have_are_refused():
    toy = ToyDenoiser()
    basis = ControlBasis.fit(control_differences(toy, prompts(20), CONFIG, TOLD), 2, TOLD)
    for config in (DetectionConfig(seeds=(0, 1, 2)), DetectionConfig(seeds=(0,), steps=2)):
        with pytest.raises(ValueError, match="A basis of 2 seeds"):
            detect(toy, ["a"], config, basis=basis)


def test_fewer_controls_than_a_direction_takes_are_refused():
    require_direction(6)
    with pytest.raises(NotEnoughControls, match=r"at least 6 controls, found 5.*--score magnitude"):
        require_direction(5)
