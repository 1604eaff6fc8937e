"""Which GPU is asked: the one that computes, and not the current one."""

import pytest
import tiny
import torch
from toy import ToyDenoiser
from unmemorize.shared.models.checks import available_memory
from unmemorize.shared.models.load import default_dtype
from unmemorize.shared.models.memory import peaks_of_use
from unmemorize.shared.score.trajectory import automatic_rows
from unmemorize.shared.training.replay import RandomState, aside

SECOND = torch.device("cuda:1")


def test_random_state_is_that_of_the_training_s_gpu(cuda):
    state = RandomState.now(SECOND)
    with aside(state):
        pass
    assert not state.is_past()
    assert set(cuda.of("get_rng_state")) == set(cuda.of("set_rng_state")) == {SECOND}
    assert len(cuda.of("set_rng_state")) == 2  # that of the step, then what came after it


def test_apple_s_only_gpu_has_no_number(monkeypatch):
    state = torch.arange(4, dtype=torch.uint8)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    assert torch.equal(RandomState.now("mps").accelerator, state)


def test_free_memory_is_that_of_the_network_s_gpu(cuda):
    toy = ToyDenoiser()
    toy.device = SECOND
    assert automatic_rows(toy) > 1
    assert available_memory("cuda:1") == 2**33
    assert cuda.of("mem_get_info") == [SECOND, SECOND]


def test_peaks_are_those_of_the_network_s_gpu(cuda):
    toy = ToyDenoiser()
    toy.decode = lambda latents: latents
    peaks = peaks_of_use(lambda: toy, "cuda:1")
    assert set(peaks.values()) == {3 * 2**30}
    assert set(cuda.of("reset_peak_memory_stats")) == set(cuda.of("max_memory_allocated"))
    assert set(cuda.of("max_memory_allocated")) == {SECOND}
    assert len(cuda.of("reset_peak_memory_stats")) == len(peaks)
    on_the_cpu = peaks_of_use(lambda: toy, "cpu")
    assert on_the_cpu.keys() == peaks.keys()
    assert all(peak > 2**20 for peak in on_the_cpu.values())


@pytest.mark.parametrize(
    ("family", "expected"),
    [("sd1", torch.float16), ("sdxl", torch.float16), ("sd3", torch.bfloat16),
     ("flux", torch.bfloat16)],
)  # fmt: skip
def test_each_family_has_a_half_precision_that_does_not_overflow(family, expected, tmp_path):
    tiny.PIPELINES[family]().save_config(tmp_path)
    assert default_dtype(tmp_path, "cuda:0") == expected
    assert default_dtype(tmp_path, "cpu") == torch.float32
