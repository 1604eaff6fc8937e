"""The formulas of noise levels, against plain arithmetic."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from unmemorize.shared.score.noise_levels import (
    input_scale,
    nearest_timestep,
    output_from_x0,
    sigma_of,
    x0_from_output,
)


@given(st.floats(1e-4, 0.9999))
def test_noise_and_signal_have_unit_variance_together(abar):
    """x / input_scale is sqrt(abar) x0 + sqrt(1 - abar) noise, as DDPM writes it."""
    sigma = sigma_of(abar)
    assert 1 / input_scale(sigma) == pytest.approx(math.sqrt(abar))
    assert sigma / input_scale(sigma) == pytest.approx(math.sqrt(1 - abar))
    levels = torch.tensor([abar], dtype=torch.float64)
    # A power and a square root may differ in the last bit.
    assert float(sigma_of(levels)) == pytest.approx(sigma, rel=1e-15)
    assert float(input_scale(sigma_of(levels))) == pytest.approx(input_scale(sigma), rel=1e-15)


def test_the_nearest_level_is_nearest_in_the_logarithm():
    levels = torch.tensor([0.1, 1.0, 10.0])
    # 4 is nearer to 1 than to 10, but not as a factor.
    assert [nearest_timestep(levels, sigma) for sigma in (0.0, 0.09, 0.9, 4.0, 99.0)] == [
        0, 0, 1, 2, 2,
    ]  # fmt: skip


@pytest.mark.parametrize("parametrization", ["epsilon", "v_prediction", "flow"])
def test_outputs_and_clean_latents_are_each_other(parametrization):
    x, output = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    x0 = x0_from_output(parametrization, x, 0.7, output)
    torch.testing.assert_close(output_from_x0(parametrization, x, 0.7, x0), output)
    assert not torch.equal(x0, x)
