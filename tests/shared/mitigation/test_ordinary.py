"""The search by residual against a slow one, and what it must leave alone."""

from dataclasses import replace

import pytest
import torch
from scored import calibrated, scored_start
from toy import ToyDenoiser
from unmemorize.shared.mitigation.ordinary import OrdinaryEmbedding
from unmemorize.shared.score.trajectory import PredictionError


class PooledToy(ToyDenoiser):
    """Reads a summary of the prompt beside its embeddings."""

    def encode(self, prompts):
        cond = super().encode(prompts)
        return replace(cond, pooled=3 * cond.embeddings.mean(1))

    def denoise(self, x, sigma, cond):
        read = cond.embeddings + cond.pooled[:, None]
        return super().denoise(x, sigma, replace(cond, embeddings=read))


PROMPTS = ("strawberry under umbrella", "red cat")


@pytest.fixture(scope="module")
def start():
    denoiser = ToyDenoiser(positions=6)
    return scored_start(denoiser, PROMPTS, calibrated(denoiser))


def parts(start, cond):
    """Return what each noise's D has outside of the controls' subspace and inside, one by one."""
    outside, inside = [], []
    for seed in range(len(start.noises.x)):
        x, sigma = start.noises.x[[seed]], start.noises.sigmas[seed]
        empty = start.denoiser.denoise(x, sigma, start.denoiser.unconditional())
        d = ((empty - start.denoiser.denoise(x, sigma, cond)) / sigma).flatten()
        centred = d - start.noises.basis.mean[seed]
        within = torch.zeros_like(d)
        for direction in start.noises.basis.directions[seed]:
            within = within + (centred @ direction) * direction
        outside.append(centred - within)
        inside.append(within)
    return torch.stack(outside), torch.stack(inside)


def slow(start, row: int, iterations: int, hold: float, learning_rate: float):
    cond = start.cond[[row]]
    median = start.noises.basis.median.exp().float()
    leaf = cond.embeddings[:, 1:].clone().requires_grad_()
    optimizer, best = torch.optim.AdamW([leaf], lr=learning_rate), None
    for iteration in range(iterations + 1):
        moved = replace(cond, embeddings=torch.cat([cond.embeddings[:, :1], leaf], 1))
        outside, inside = parts(start, moved)
        if iteration == 0:
            held = inside.detach()
        excess = (outside.norm(dim=1) / median - 1).clamp(min=0)
        if best is None or excess.sum() < best[0]:
            best = excess.sum().item(), moved.embeddings.detach()
        if iteration == iterations or excess.sum() == 0:
            break
        optimizer.zero_grad()
        (excess + hold * (inside - held).norm(dim=1) / median).mean().backward()
        optimizer.step()
    return best[1]


@pytest.mark.parametrize("batch_size", [None, 1])
def test_it_is_the_slow_search(start, batch_size):
    method = OrdinaryEmbedding(iterations=4, hold=0.3, learning_rate=0.02, batch_size=batch_size)
    found = method.start(start).cond.embeddings
    for row in range(len(PROMPTS)):
        expected = slow(start, row, 4, 0.3, 0.02)
        # Adam divides by the root of its squares: differences in the last digit grow.
        torch.testing.assert_close(found[[row]], expected, rtol=0, atol=1e-3)
    assert (found - start.cond.embeddings).abs().max() > 0.03


def test_the_score_falls_and_the_first_token_stays(start):
    found = OrdinaryEmbedding().start(start)
    before, after = start.score(start.cond), start.score(found.cond)
    assert before[0] > start.calibration.judge.threshold > after[0]
    assert torch.equal(found.cond.embeddings[:, 0], start.cond.embeddings[:, 0])
    assert all(change.startswith("the embedding in ") for change in found.changes)


def test_pooled_text_moves_along():
    denoiser = PooledToy(positions=6)
    start = scored_start(denoiser, PROMPTS[:1], calibrated(denoiser))
    found = OrdinaryEmbedding(iterations=4).start(start).cond
    assert ((found.pooled - start.cond.pooled).abs().amax(1) > 0.01).all()
    assert all(a < b for a, b in zip(start.score(found), start.score(start.cond), strict=True))


def test_what_ordinary_words_add_is_held(start):
    held, free = (
        OrdinaryEmbedding(hold=hold, iterations=10).start(start).cond for hold in (1.0, 0.0)
    )
    before = parts(start, start.cond[[0]])[1]
    moved = [(parts(start, cond[[0]])[1] - before).norm() for cond in (held, free)]
    assert moved[0] < 0.7 * moved[1]


def test_prompts_that_repeat_are_searched_once_and_no_steps_change_nothing(start):
    twice = replace(start, cond=start.cond[[0, 0]])
    start.denoiser.rows.clear()
    found = OrdinaryEmbedding(iterations=1).start(twice)
    assert sum(start.denoiser.rows) == 2 * len(start.noises.x)
    assert torch.equal(found.cond.embeddings[0], found.cond.embeddings[1])
    still = OrdinaryEmbedding(iterations=0).start(start)
    assert torch.equal(still.cond.embeddings, start.cond.embeddings)


def test_what_it_needs_and_refuses(start):
    with pytest.raises(ValueError, match="unmemorize calibrate"):
        OrdinaryEmbedding().start(replace(start, noises=None))
    for setting, value in (("hold", -1.0), ("iterations", -1), ("learning_rate", 0.0)):
        with pytest.raises(ValueError, match=f"`{setting}` must be"):
            OrdinaryEmbedding(**{setting: value})
    broken = replace(start, cond=start.cond[[0]])
    broken.cond.embeddings[:] = torch.nan
    with pytest.raises(PredictionError, match="after 0 optimizer steps"):
        OrdinaryEmbedding().start(broken)
