"""Magnitudes against plain references, and their independence of batch and resolution."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unmemorize.shared.score.metrics import difference_map, per_element, text_noise, text_noise_norm


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), sigma=st.floats(0.01, 100))
def test_text_noise_recovers_what_networks_predict(seed, sigma):
    noise, other = seeded(2, 3, 4, 5, 5, seed=seed)
    x = seeded(3, 4, 5, 5, seed=seed + 1)
    # Epsilon: x0 = x - sigma * noise; flow: x0 = x - sigma * velocity. Same algebra.
    d = text_noise(x - sigma * other, x - sigma * noise, sigma)
    torch.testing.assert_close(d, noise - other, rtol=1e-9, atol=1e-9 * (1 + 1 / sigma))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**16), sigma=st.floats(0.05, 20))
def test_text_noise_of_v_prediction_is_a_difference_of_noises(seed, sigma):
    v_uncond, v_cond = seeded(2, 3, 4, 5, 5, seed=seed)
    x = seeded(3, 4, 5, 5, seed=seed + 1)
    alpha = 1 / math.sqrt(1 + sigma**2)
    spread = sigma * alpha
    latent = alpha * x  # variance preserving
    x0_uncond, x0_cond = (alpha * latent - spread * v for v in (v_uncond, v_cond))
    noise_uncond, noise_cond = (alpha * v + spread * latent for v in (v_uncond, v_cond))
    d = text_noise(x0_uncond, x0_cond, sigma)
    torch.testing.assert_close(d, noise_cond - noise_uncond, rtol=1e-9, atol=1e-9)


def test_norm_matches_a_loop():
    cond, uncond = seeded(2, 5, 4, 3, 3)
    norms = text_noise_norm(cond, uncond)
    for row in range(5):
        total = sum(
            (a - b) ** 2 for a, b in zip(cond[row].ravel(), uncond[row].ravel(), strict=True)
        )
        assert norms[row].item() == pytest.approx(math.sqrt(total))
    torch.testing.assert_close(text_noise_norm(cond[2:3], uncond[2:3])[0], norms[2])


def test_norm_is_zero_for_equal_predictions_only():
    cond = seeded(2, 4, 3, 3)
    assert torch.equal(text_noise_norm(cond, cond.clone()), torch.zeros(2, dtype=torch.float64))
    cond[1, 0, 0, 0] += 1
    assert text_noise_norm(cond, seeded(2, 4, 3, 3))[1] == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_the_difference(dtype):
    cond = torch.full((1, 4, 64, 64), 100.0, dtype=dtype)  # its squares overflow float16
    norm = text_noise_norm(cond, -cond)
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(200 * math.sqrt(4 * 64 * 64))


def test_per_element_does_not_grow_with_resolution():
    small, large = (torch.full((1, 4, side, side), 0.3) for side in (8, 64))
    norms = [text_noise_norm(x, torch.zeros_like(x)) for x in (small, large)]
    assert norms[1] > 7 * norms[0]  # the unit is needed
    for norm, x in zip(norms, (small, large), strict=True):
        assert per_element(norm, x.shape[1:]).item() == pytest.approx(0.3, rel=1e-6)


def test_difference_map_sums_channels_at_each_place():
    d = torch.zeros(1, 4, 5, 6, dtype=torch.float64)
    d[0, 1, 2, 3], d[0, 3, 2, 3] = 3.0, -4.0
    found = difference_map(d)
    assert found.shape == (1, 5, 6)
    assert found[0, 2, 3].item() == pytest.approx(math.log(26))
    assert found.sum().item() == pytest.approx(math.log(26))
