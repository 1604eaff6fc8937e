"""The embedding optimisation against a naive loop, and what it must not touch."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from runs import calibration_of, magnitudes, only, start_of, wide_toy
from toy import ToyDenoiser
from unmemorize.shared.mitigation.embedding import EmbeddingOptimisation
from unmemorize.shared.mitigation.optimisation import descend, find_target
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.denoiser import concatenate
from unmemorize.shared.score.trajectory import PredictionError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module")
def start():
    return start_of(wide_toy())


def naive(start, target: float, iterations: int, learning_rate: float = 0.05) -> torch.Tensor:
    """Back-propagate through both rows, one image at a time, as the authors' code does."""
    found = []
    for row in range(len(start.x)):
        cond, x = start.cond[[row]], start.x[[row, row]]
        empty, fixed = start.denoiser.unconditional(), cond.embeddings.clone()
        leaf = fixed.clone().requires_grad_()
        optimizer, best = torch.optim.AdamW([leaf], lr=learning_rate), None
        for iteration in range(iterations + 1):
            both = concatenate([empty, replace(cond, embeddings=leaf)])
            x0_uncond, x0_cond = start.denoiser.denoise(x, start.sigma, both)
            loss = ((x0_uncond - x0_cond) / start.sigma).norm()
            if best is None or loss.item() < best[0]:
                best = loss.item(), leaf.detach().clone()
            if loss.item() <= target or iteration == iterations:
                break
            (gradient,) = torch.autograd.grad(loss, leaf)
            gradient[:, 0] = 0
            leaf.grad = gradient
            optimizer.step()
            with torch.no_grad():
                leaf[:, 0] = fixed[:, 0]  # AdamW decays it
        found.append(best[1])
    return torch.cat(found)


def test_it_is_the_naive_loop_with_one_row_left_out(start):
    target = 0.8 * magnitudes(start)[1].item()  # some stop early, some do not
    method = EmbeddingOptimisation(target=target, iterations=3)
    start.denoiser.rows.clear()
    found = method.start(start)
    rows = list(start.denoiser.rows)
    # Adam divides by the root of its squares: differences in the last digit grow.
    torch.testing.assert_close(found.cond.embeddings, naive(start, target, 3), rtol=0, atol=1e-6)
    assert (found.cond.embeddings - start.cond.embeddings).abs().max() > 0.1
    assert len(rows) == 4
    assert sum(rows) <= 3 + found.iterations.sum()  # no unconditional row among them


def test_what_is_reported_is_what_is_measured(start):
    found = EmbeddingOptimisation(target=0.0, iterations=4).start(start)
    torch.testing.assert_close(found.before, magnitudes(start))
    torch.testing.assert_close(found.after, magnitudes(start, found.cond))
    assert (found.after < 0.9 * found.before).all()
    assert found.iterations.tolist() == [4, 4, 4]


def test_the_first_token_stays_and_no_other_does(start):
    found = EmbeddingOptimisation(target=0.0, iterations=2).start(start).cond
    assert torch.equal(found.embeddings[:, 0], start.cond.embeddings[:, 0])
    assert ((found.embeddings - start.cond.embeddings)[:, 1:].abs().amax(2) > 0.01).all()
    assert (found.tokens, found.words) == (start.cond.tokens, start.cond.words)


def test_each_row_stops_at_its_own_target(start):
    before = magnitudes(start)
    target = before.sort().values[1].item()  # two are there already
    start.denoiser.rows.clear()
    found = EmbeddingOptimisation(target=target, iterations=4).start(start)
    done = before <= target
    assert done.tolist().count(True) == 2
    assert torch.equal(found.cond.embeddings[done], start.cond.embeddings[done])
    assert (found.iterations[~done] > 0).all()
    assert not found.iterations[done].any()
    assert start.denoiser.rows[0] == 3
    assert set(start.denoiser.rows[1:]) == {1}  # rows that are done cost nothing
    assert (found.after <= target).all()


@pytest.mark.parametrize("settings", [{"iterations": 0}, {"target": 1e9}])
def test_nothing_to_do_changes_nothing_bit_for_bit(start, settings):
    found = EmbeddingOptimisation(**{"target": 0.0} | settings).start(start)
    assert torch.equal(found.cond.embeddings, start.cond.embeddings)
    assert torch.equal(found.after, found.before)


def test_a_step_that_makes_it_worse_is_not_kept(start):
    found = EmbeddingOptimisation(target=0.0, iterations=2, learning_rate=1e4).start(start)
    worse = found.after == found.before
    assert worse.any()
    assert torch.equal(found.cond.embeddings[worse], start.cond.embeddings[worse])
    assert (found.after <= found.before).all()


def test_an_image_does_not_depend_on_those_beside_it(start):
    method = EmbeddingOptimisation(target=0.0, iterations=3)
    together = method.start(start)
    in_parts = EmbeddingOptimisation(target=0.0, iterations=3, batch_size=2).start(start)
    for row in range(3):
        alone = method.start(only(start, row))
        for other in (together, in_parts):
            torch.testing.assert_close(
                other.cond.embeddings[[row]], alone.cond.embeddings, rtol=0, atol=1e-6
            )
            torch.testing.assert_close(other.after[[row]], alone.after)


def test_target_is_a_quantile_of_the_controls_unless_given(start):
    scores = torch.arange(10.0).view(5, 2)
    calibrated = replace(start, calibration=calibration_of(scores))
    assert find_target(calibrated, None, 0.5) == 4.5
    assert find_target(calibrated, None, 1.0) == 9
    assert find_target(calibrated, 3.0, 0.5) == 3
    with pytest.raises(ValueError, match=r"`unmemorize calibrate`, or give `target`"):
        EmbeddingOptimisation().start(start)
    averaged = replace(start, calibration=calibration_of(scores, steps=5))
    with pytest.raises(ValueError, match="averages 5 steps"):
        EmbeddingOptimisation().start(averaged)


def test_calibrated_target_is_used(start):
    high = replace(start, calibration=calibration_of(torch.full((3, 1), 1e9)))
    low = replace(start, calibration=calibration_of(torch.zeros(3, 1)))
    settings = {"iterations": 1}
    assert not EmbeddingOptimisation(**settings).start(high).iterations.any()
    assert EmbeddingOptimisation(**settings).start(low).iterations.all()


def test_it_works_where_gradients_are_off(start):
    expected = EmbeddingOptimisation(target=0.0, iterations=1).start(start)
    with torch.inference_mode():
        inside = start_of(start.denoiser)
        found = EmbeddingOptimisation(target=0.0, iterations=1).start(inside)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(found.cond.embeddings, expected.cond.embeddings)
    assert not found.cond.embeddings.requires_grad
    assert not found.cond.embeddings.is_inference()


def test_half_precision_has_wide_leaves():
    read = []

    class Reading(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            read.append(cond.embeddings.detach())
            return super().denoise(x, sigma, cond)

    start = start_of(Reading(torch.bfloat16, positions=6), ["red lighthouse"])
    found = EmbeddingOptimisation(target=0.0, iterations=20, learning_rate=0.001).start(start)
    assert {embeddings.dtype for embeddings in read} == {torch.bfloat16}
    assert found.cond.embeddings.dtype == torch.bfloat16
    assert (found.after < found.before).all()
    # Each step is far below the spacing of such numbers in bfloat16; only their sum is not.
    moved = (read[-1] != start.cond.embeddings)[:, 1:].double().mean()
    assert moved > 0.6


def bare(dtype: torch.dtype) -> ToyDenoiser:
    """Return a network that only says what it computes in."""
    toy = ToyDenoiser()
    toy.dtype = dtype
    return toy


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_small_gradients_survive_float16(dtype):
    def magnitude(active, x):
        return (x.half() * 4).float().sum(1) * 2.0**-28  # 2^-26 in half: below its smallest

    found = descend(
        [torch.ones(8)], magnitude, target=0.0, learning_rate=0.1, iterations=1,
        denoiser=bare(dtype),
    )  # fmt: skip
    decayed = 1 - 0.1 * 0.01
    moved = ((found.rows - decayed).abs() > 0.01).all()
    assert moved == (dtype == torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_prediction_that_is_not_finite_is_an_error(dtype):
    def magnitude(active, x):
        return x.sum(1) / 0

    says = "The text noise after 0 optimizer steps is not finite"
    with pytest.raises(PredictionError, match=says) as error:
        descend(
            [torch.ones(2)], magnitude, target=0.0, learning_rate=1.0, iterations=1,
            denoiser=bare(dtype),
        )  # fmt: skip
    assert ("bfloat16" in str(error.value)) == (dtype == torch.float16)


def test_nan_of_the_network_is_an_error(start):
    class Broken(ToyDenoiser):
        def denoise(self, x, sigma, cond):
            return super().denoise(x, sigma, cond) * torch.nan

    broken = replace(start, denoiser=Broken(torch.float64, positions=6))
    with pytest.raises(PredictionError):
        EmbeddingOptimisation(target=0.0).start(broken)


def checkpointing_of(network) -> list:
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    return [{n: v for n, v in vars(m).items() if n in names} for m in network.modules()]


class Spying(ToyDenoiser):
    """Tells at each pass whether its network recomputes activations and has weights in a graph."""

    factor = 1.0

    def denoise(self, x, sigma, cond):
        trained = any(weight.requires_grad for weight in self.unet.parameters())
        self.calls.append((self.unet.is_gradient_checkpointing, trained))
        return self.factor * super().denoise(x, sigma, cond)


@pytest.mark.parametrize("mine", [True, False], ids=["already on", "off"])
def test_checkpointing_changes_no_result_and_is_put_back(start, mine):
    spy = Spying(torch.float64, positions=6)
    spy.calls = []
    if mine:
        spy.unet.enable_gradient_checkpointing()
    before = checkpointing_of(spy.unet)
    run = replace(start, denoiser=spy, network=spy.unet)
    method = EmbeddingOptimisation(target=0.0, iterations=2, checkpointing=True)
    found = method.start(run)
    assert set(spy.calls) == {(True, False)}
    assert checkpointing_of(spy.unet) == before
    spy.factor = torch.nan
    with pytest.raises(PredictionError):
        method.start(run)
    assert checkpointing_of(spy.unet) == before
    plain = EmbeddingOptimisation(target=0.0, iterations=2).start(start)
    torch.testing.assert_close(found.cond.embeddings, plain.cond.embeddings, rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1.0, torch.nan], ids=["as usual", "after an error"])
def test_weights_stay_out_of_the_graph_and_are_put_back(start, factor):
    spy = Spying(torch.float64, positions=6)
    spy.calls, spy.factor = [], factor
    spy.unet.requires_grad_(True)
    spy.unet.conv_in.requires_grad_(False)
    before = [weight.requires_grad for weight in spy.unet.parameters()]
    error = nullcontext() if factor == 1 else pytest.raises(PredictionError)
    with error:
        run = replace(start, denoiser=spy, network=spy.unet)
        EmbeddingOptimisation(target=0.0, iterations=1).start(run)
    assert set(spy.calls) == {(False, False)}
    assert [weight.requires_grad for weight in spy.unet.parameters()] == before
    assert all(weight.grad is None for weight in spy.unet.parameters())


@pytest.mark.parametrize("network", [None, torch.nn.Linear(1, 1)])
def test_checkpointing_says_when_it_cannot(start, network):
    method = EmbeddingOptimisation(target=0.0, checkpointing=True)
    with pytest.raises(ValueError, match="`checkpointing` needs a network of diffusers"):
        method.start(replace(start, network=network))


def test_pooled_text_of_a_real_network_stays():
    pipeline = tiny.stable_diffusion_xl()
    start = start_of(PipelineDenoiser(pipeline), ["a red cat"], network=pipeline.unet)
    method = EmbeddingOptimisation(target=0.0, iterations=3, checkpointing=True)
    found = method.start(start)
    assert torch.equal(found.cond.pooled, start.cond.pooled)
    assert (found.after < found.before).all()
    assert not pipeline.unet.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "`learning_rate` must be above 0, got 0.0."),
        ({"iterations": -1}, "`iterations` must be at least 0, got -1."),
        ({"target": -1.0}, "`target` must be at least 0, got -1.0."),
        ({"target": float("nan")}, "`target` must be at least 0, got nan."),
        ({"target_quantile": 1.5}, r"`target_quantile` must lie in 0..1, got 1.5."),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0."),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingOptimisation(**settings)
