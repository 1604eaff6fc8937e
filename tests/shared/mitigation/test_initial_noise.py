"""Better starting noise against slow loops, in the units of the paper."""

from dataclasses import replace

import pytest
import torch
from runs import calibration_of, magnitudes, only, seeded, start_of, step_of, wide_toy
from toy import ToyDenoiser
from unmemorize.shared.mitigation.initial_noise import InitialNoise
from unmemorize.shared.score.trajectory import PredictionError


@pytest.fixture(scope="module")
def start():
    return start_of(wide_toy())


def unit_of(start) -> float:
    return (1 + start.sigma.item() ** 2) ** 0.5


def text_noise(start, row: int, z: torch.Tensor, frozen: bool = False) -> torch.Tensor:
    """D of one image at noise of unit variance; `frozen` takes e_0 from the start."""
    x = (z * unit_of(start))[None]
    x0_cond = start.denoiser.denoise(x, start.sigma, start.cond[[row]])
    x0_uncond = start.x0_uncond[[row]]
    if not frozen:
        x0_uncond = start.denoiser.denoise(x, start.sigma, start.denoiser.unconditional())
    return (x0_uncond - x0_cond)[0] / start.sigma


def naive(start, target: float, iterations: int, lr: float, frozen: bool = False):
    """Optimise one image at a time with a graph through both predictions."""
    found = []
    for row in range(len(start.x)):
        leaf = (start.x[row] / unit_of(start)).requires_grad_()
        norm, best = leaf.detach().norm(), None
        optimizer = torch.optim.AdamW([leaf], lr=lr)
        for iteration in range(iterations + 1):
            loss = text_noise(start, row, leaf, frozen).norm()
            if best is None or loss.item() < best[0]:
                best = loss.item(), leaf.detach().clone()
            if loss.item() <= target or iteration == iterations:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                leaf *= norm / leaf.norm()
        found.append(best[1] * unit_of(start))
    return torch.stack(found)


def test_per_sample_is_the_naive_loop(start):
    target = 0.95 * magnitudes(start)[1].item()
    method = InitialNoise(target=target, iterations=3, learning_rate=0.05)
    found = method.start(start)
    torch.testing.assert_close(found.x, naive(start, target, 3, 0.05), rtol=0, atol=1e-5)
    assert (found.x - start.x).abs().max() > 0.5
    frozen = naive(start, target, 3, 0.05, frozen=True)
    assert (found.x - frozen).abs().max() > 1e-2  # e_0 moves with x, and that matters


def test_per_sample_reports_what_is_measured_and_keeps_the_norm(start):
    found = InitialNoise(target=0.0, iterations=4, learning_rate=0.05).start(start)
    torch.testing.assert_close(found.before, magnitudes(start))
    torch.testing.assert_close(found.after, magnitudes(start, x=found.x))
    assert (found.after < found.before).all()
    assert found.iterations.tolist() == [4, 4, 4]
    norms = (x.flatten(1).norm(dim=1) for x in (found.x, start.x))
    torch.testing.assert_close(*norms)
    assert found.guide(step_of(0)) is None


def test_images_at_the_target_stay_bit_for_bit(start):
    before = magnitudes(start)
    target = before.sort().values[1].item()
    found = InitialNoise(target=target, iterations=2).start(start)
    assert torch.equal(found.x[before <= target], start.x[before <= target])
    assert not torch.equal(found.x[before > target], start.x[before > target])


def test_batch_mode_is_the_papers_rule(start):
    settings = {"gamma": 0.7, "radius": 20.0}
    unit, radius = unit_of(start), 20 * (256 / 16384) ** 0.5
    found = InitialNoise(mode="batch", **settings).start(start)
    with torch.no_grad():
        for row in range(3):
            z = start.x[row] / unit
            norm = z.norm()
            for _ in range(2):
                d = text_noise(start, row, z)
                z = z - 0.7 * (text_noise(start, row, z + radius * d / d.norm()) - d)
                z = z * norm / z.norm()
            torch.testing.assert_close(found.x[row], z * unit)
    assert (found.x - start.x).abs().max() > 1e-3


def test_batch_mode_computes_the_first_empty_prediction_once(start):
    start.denoiser.rows.clear()
    InitialNoise(mode="batch", iterations=2).start(start)
    assert sum(start.denoiser.rows) == 3 * (2 * 4 - 1)


def test_the_radius_grows_with_the_latent(start):
    class Wide(ToyDenoiser):
        """D is a constant, so that the rule looks ahead by exactly the radius."""

        def denoise(self, x, sigma, cond):
            looked.append(x.clone())
            return x + cond.embeddings.mean((1, 2)).view(-1, 1, 1, 1)

    for side, expected in ((8, 50 / 8), (64, 50.0)):
        looked = []
        run = replace(
            start, denoiser=Wide(torch.float64, positions=6), sigma=torch.tensor(0.0) + 3,
            x=seeded(3, 4, side, side), x0_uncond=seeded(3, 4, side, side),
        )  # fmt: skip
        found = InitialNoise(mode="batch", iterations=1, batch_size=3).start(run)
        ahead = (looked[-1] - run.x).flatten(1).norm(dim=1) / 10**0.5
        torch.testing.assert_close(ahead, torch.full((3,), expected, dtype=torch.float64))
        assert found.x.shape == run.x.shape


def test_batch_mode_leaves_guidance_out_at_first(start):
    run = InitialNoise(mode="batch", iterations=0).start(start)
    steps = [step_of(index, index / 50, seed=index) for index in range(7)]
    for step in steps[:5]:
        assert torch.equal(run.guide(step), step.uncond)
    assert [run.guide(step) for step in steps[5:]] == [None, None]


@pytest.mark.parametrize("mode", ["per_sample", "batch"])
def test_nothing_to_do_changes_nothing_bit_for_bit(start, mode):
    method = InitialNoise(mode=mode, iterations=0, target=0.0, steps_without_guidance=0)
    run = method.start(start)
    assert torch.equal(run.x, start.x)
    assert run.cond is None
    assert run.guide(step_of(0)) is None


@pytest.mark.parametrize("mode", ["per_sample", "batch"])
def test_an_image_does_not_depend_on_those_beside_it(start, mode):
    method = InitialNoise(mode=mode, target=0.0, iterations=2)
    together, in_parts = method.start(start).x, replace(method, batch_size=2).start(start).x
    for row in range(3):
        alone = method.start(only(start, row)).x
        for other in (together, in_parts):
            torch.testing.assert_close(other[[row]], alone, rtol=0, atol=1e-5)


def test_noise_of_flows_has_unit_variance_already(start):
    class Flow(ToyDenoiser):
        parametrization = "flow"

    flow = replace(start, denoiser=Flow(torch.float64, positions=6))
    method = InitialNoise(target=0.0, iterations=1, learning_rate=0.01)
    moved = (method.start(flow).x - start.x).abs().median().item()
    scaled = (method.start(start).x - start.x).abs().median().item()
    assert scaled / moved == pytest.approx(unit_of(start), rel=0.3)


@pytest.mark.parametrize("mode", ["per_sample", "batch"])
def test_it_works_where_gradients_are_off(start, mode):
    method = InitialNoise(mode=mode, target=0.0, iterations=1)
    expected = method.start(start).x
    with torch.inference_mode():
        found = method.start(start_of(start.denoiser)).x
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad


def test_a_prompt_that_says_nothing_does_no_harm(start):
    empty = start_of(start.denoiser, [""])
    found = InitialNoise(mode="batch").start(empty).x
    torch.testing.assert_close(found, empty.x)


def test_target_comes_from_the_calibration(start):
    with pytest.raises(ValueError, match="`unmemorize calibrate`"):
        InitialNoise().start(start)
    calm = replace(start, calibration=calibration_of(torch.full((3, 2), 1e9)))
    assert torch.equal(InitialNoise().start(calm).x, start.x)
    assert InitialNoise(mode="batch").start(start) is not None  # needs none


def test_nan_of_the_network_is_an_error(start):
    class Broken(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            return super().denoise(x, sigma, cond) * torch.nan

    broken = replace(start, denoiser=Broken(torch.float64, positions=6))
    for mode in ("per_sample", "batch"):
        with pytest.raises(PredictionError):
            InitialNoise(mode=mode, target=0.0).start(broken)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "all"}, "`mode` must be one of per_sample, batch, got 'all'."),
        ({"iterations": -1}, "`iterations` must be at least 0, got -1."),
        ({"learning_rate": -0.1}, "`learning_rate` must be above 0, got -0.1."),
        ({"gamma": -0.1}, "`gamma` must be at least 0, got -0.1."),
        ({"radius": 0.0}, "`radius` must be above 0, got 0.0."),
        ({"steps_without_guidance": -1}, "`steps_without_guidance` must be at least 0, got -1."),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InitialNoise(**settings)
