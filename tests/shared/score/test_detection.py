"""Detection against a slow reference; independence of batches; forwards and memory it costs."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyDenoiser, prompts
from unmemorize.shared.score import trajectory
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import Denoiser
from unmemorize.shared.score.detection import (
    ENCODED_AT_ONCE,
    PredictionError,
    detect,
    mean_over_seeds,
)

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""Scores are about 1; the empty prompt's are rounding errors of predictions of norm 16."""


@pytest.fixture(scope="module")
def toy() -> ToyDenoiser:
    return ToyDenoiser()


@pytest.fixture(scope="module")
def demo():
    """The demo model through the diffusers adapter."""
    from unmemorize.demo import MODEL
    from unmemorize.shared.models.load import load_denoiser

    return load_denoiser(MODEL, device="cpu")


def reference(toy: Denoiser, prompt: str, seed: int, config: DetectionConfig) -> torch.Tensor:
    """One prompt, one seed, both rows at each step, in noise predictions as in the paper."""
    sigmas = toy.sigmas(config.schedule_steps)
    x = toy.initial_noise([seed], sigmas[0])
    norms = []
    with torch.no_grad():
        for sigma, sigma_next in pairwise(sigmas[: config.steps + 1]):
            noise_cond, noise_uncond = (
                (x - toy.denoise(x, sigma, toy.encode([text]))) / sigma for text in (prompt, "")
            )
            norms.append((noise_cond - noise_uncond).double().flatten(1).norm(dim=1))
            guided = noise_uncond + config.cond_scale * (noise_cond - noise_uncond)
            x = (x - sigma * guided) + sigma_next * guided
    return torch.cat(norms)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_matches_the_slow_reference(steps):
    toy = ToyDenoiser(torch.float64)
    config = DetectionConfig(seeds=(3, 0), steps=steps, schedule_steps=6, batch_size=5)
    texts = prompts(7)
    traces = detect(toy, texts, config).traces
    for i, text in enumerate(texts):
        for j, seed in enumerate(config.seeds):
            torch.testing.assert_close(traces[i, j], reference(toy, text, seed, config))
    assert traces.std(0).min() > 0  # prompts differ


def test_demo_model_matches_the_slow_reference(demo):
    config = DetectionConfig(seeds=(3, 0), steps=2, batch_size=5)
    texts = ["strawberry, fruit, berry", "", "<b>street</b> \u8857"]
    traces = detect(demo, texts, config).traces
    for i, text in enumerate(texts):
        for j, seed in enumerate(config.seeds):
            # The reference subtracts and divides by sigma in float32, in another order.
            expected = reference(demo, text, seed, config)
            torch.testing.assert_close(traces[i, j], expected, rtol=1e-4, atol=1e-4)
    assert traces[0].min() > 0.01


def test_demo_model_does_not_mind_batches_order_and_company(demo):
    texts = ["strawberry, fruit", "anchor, ship, tool", "cat", "a " * 90, "кот", "boat, sail"]
    sizes = [DetectionConfig(seeds=(0, 1), batch_size=size) for size in (1, 5, 16)]
    expected = detect(demo, texts, sizes[0]).traces
    torch.testing.assert_close(detect(demo, texts, sizes[1]).traces, expected, rtol=1e-5, atol=1e-5)
    order = [4, 0, 2]
    found = detect(demo, [texts[i] for i in order], sizes[2]).traces
    torch.testing.assert_close(found, expected[order], rtol=1e-5, atol=1e-5)
    assert expected.mean((1, 2)).std() > 1e-3


def test_guidance_moves_later_steps_only(toy):
    texts = ["red lighthouse", "old dog"]
    configs = [DetectionConfig(steps=3, schedule_steps=6, cond_scale=w) for w in (1.0, 7.5)]
    none, some = (detect(toy, texts, config).traces for config in configs)
    torch.testing.assert_close(none[..., 0], some[..., 0], rtol=1e-5, atol=0)
    assert ((none - some)[..., 1:].abs() > 1e-4 * none[..., 1:]).all()


def test_a_network_that_guides_itself_is_not_guided_again():
    config = DetectionConfig(seeds=(0,), steps=3, schedule_steps=6, cond_scale=7.5)
    unguided = DetectionConfig(seeds=(0,), steps=3, schedule_steps=6, cond_scale=1.0)
    plain, distilled = ToyDenoiser(), ToyDenoiser()
    distilled.guidance_distilled = True
    expected = detect(plain, ["red boat"], unguided).traces
    torch.testing.assert_close(detect(distilled, ["red boat"], config).traces, expected)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    steps=st.sampled_from([1, 2]),
)
def test_batch_size_order_and_company_change_nothing(toy, seed, sizes, steps):
    texts = prompts(9, seed)
    first, second = (
        DetectionConfig(batch_size=size, steps=steps, schedule_steps=5) for size in sizes
    )
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))[:6].tolist()
    expected = detect(toy, texts, first).traces
    found = detect(toy, [texts[i] for i in order], second).traces
    torch.testing.assert_close(found, expected[order], **CLOSE)


def test_empty_prompt_scores_zero_and_others_do_not(toy):
    scores = detect(toy, ["", "red boat", ""]).scores
    assert scores[0] <= 1e-5 * scores[1]
    assert scores[2] <= 1e-5 * scores[1]


def test_scores_and_units(toy):
    detection = detect(toy, prompts(5, seed=3), DetectionConfig(steps=2))
    torch.testing.assert_close(detection.scores, detection.traces.mean((1, 2)))
    torch.testing.assert_close(detection.scores_per_element, detection.scores / 16)  # 4 * 8 * 8
    assert detection.seeds_drawn.tolist() == [4] * 5


@pytest.mark.parametrize(("count", "batch_size"), [(1, None), (10, None), (7, 3), (33, 8), (5, 1)])
def test_one_step_costs_a_row_per_prompt_and_seed_and_one_per_seed(count, batch_size):
    toy = ToyDenoiser()
    detect(toy, prompts(count), DetectionConfig(batch_size=batch_size))
    assert sum(toy.rows) == count * 4 + 4
    assert max(toy.rows) <= (batch_size or trajectory.automatic_rows(toy))


def test_later_steps_cost_both_rows():
    toy = ToyDenoiser()
    detect(toy, prompts(5), DetectionConfig(steps=3, schedule_steps=5))
    assert sum(toy.rows) == 4 + 5 * 4 * (1 + 2 * 2)


def test_embeddings_held_do_not_grow_with_the_number_of_prompts():
    held = []
    for count in (40, 400):
        toy = ToyDenoiser()
        detect(toy, prompts(count), DetectionConfig(seeds=(0,), batch_size=8))
        assert sum(toy.encoded) == count + 1  # each once, and the empty prompt
        held.append(max(toy.encoded))
    assert held[0] == held[1] <= 2 * ENCODED_AT_ONCE


def test_automatic_rows_follow_the_latent(toy):
    assert trajectory.automatic_rows(toy) == 32
    large = ToyDenoiser()
    large.latent_shape = (4, 64, 64)
    assert trajectory.automatic_rows(large) == 2
    large.latent_shape = (16, 256, 256)
    assert trajectory.automatic_rows(large) == 1


@pytest.mark.parametrize("room", [5, 3, 1])
def test_running_out_of_gpu_memory_halves_the_batch(monkeypatch, toy, caplog, room):
    texts, config = prompts(9), DetectionConfig(batch_size=16)
    expected = detect(toy, texts, config).traces
    small, denoise = ToyDenoiser(), ToyDenoiser.denoise

    def limited(self, x, sigma, cond):
        if len(x) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return denoise(self, x, sigma, cond)

    monkeypatch.setattr(ToyDenoiser, "denoise", limited)
    torch.testing.assert_close(detect(small, texts, config).traces, expected, **CLOSE)
    fits = {5: 4, 3: 2, 1: 1}[room]
    assert max(small.rows) == fits
    assert f"batches of {fits}" in caplog.text
    assert len(small.rows) == 40 / fits  # it stays at what fits instead of falling to 1


def test_each_result_is_handed_over_once_in_order(toy):
    texts, seen, ticks = prompts(23), [], []
    detection = detect(
        toy, texts, on_result=lambda i, trace: seen.append((i, trace)), progress=ticks.append
    )
    assert [i for i, _ in seen] == list(range(23))
    assert sum(ticks) == 23
    assert torch.equal(torch.stack([trace for _, trace in seen]), detection.traces)


@pytest.mark.parametrize("stopped_after", [0, 1, 8, 13, 23])
def test_an_interrupted_run_continues_bit_for_bit(stopped_after):
    texts, config, journal = prompts(23, seed=5), DetectionConfig(batch_size=8), {}
    toy = ToyDenoiser()

    class Killed(Exception):
        pass

    def write(i, trace):
        if len(journal) == stopped_after:
            raise Killed
        journal[i] = trace

    if stopped_after < 23:
        with pytest.raises(Killed):
            detect(toy, texts, config, on_result=write)
    else:
        detect(toy, texts, config, on_result=write)
    again, rows = [], ToyDenoiser()
    detection = detect(rows, texts, config, known=journal, on_result=lambda i, _: again.append(i))
    assert again == list(range(stopped_after, 23))
    assert torch.equal(detection.traces, detect(ToyDenoiser(), texts, config).traces)
    finished = stopped_after // 2 * 2  # two prompts a batch
    assert sum(rows.rows) == 4 + 4 * ((23 - finished) if stopped_after < 23 else 0)


def test_no_prompts(toy):
    detection = detect(toy, [])
    assert detection.traces.shape == (0, 4, 1)
    assert detection.scores.shape == (0,)


class Broken(ToyDenoiser):
    """Answers with NaN to one prompt."""

    def __init__(self, bad: str):
        super().__init__()
        self.bad = super().encode([bad]).embeddings

    def denoise(self, x, sigma, cond):
        x0 = super().denoise(x, sigma, cond)
        x0[(cond.embeddings == self.bad).all(-1).all(-1)] = torch.nan
        return x0


def test_not_a_number_names_the_prompt():
    with pytest.raises(PredictionError, match="the prompt 'red boat' is not finite"):
        detect(Broken("red boat"), ["old dog", "a cat", "red boat", "a dog"])
    with pytest.raises(PredictionError, match="the empty prompt"):
        detect(Broken(""), ["old dog"])
    detect(Broken("red boat"), ["old dog", "a cat"])  # the others are scored


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": ()}, "`seeds`"),
        ({"seeds": (1, 1)}, "different integers.*1, 1"),
        ({"seeds": (-1,)}, "from 0"),
        ({"steps": 0}, "`steps` must be between 1 and `schedule_steps`"),
        ({"steps": 51}, "50.*got 51"),
        ({"cond_scale": float("nan")}, "finite"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_config_refuses_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        DetectionConfig(**settings)


def test_ratio_estimator_is_exact_where_seeds_scale_all_prompts_alike():
    strength, level = torch.rand(2, 6, dtype=torch.float64) + 1
    full = strength[:, None] * level[:4]
    partial = full.clone()
    partial[0, 1:] = partial[1, 2:] = torch.nan
    torch.testing.assert_close(mean_over_seeds(partial, level[:4]), full.mean(1))
    assert (mean_over_seeds(partial)[:2] - full.mean(1)[:2]).abs().min() > 1e-3  # it was needed
    assert torch.equal(mean_over_seeds(full, level[:4]), full.mean(1))
