"""Gradients through the text encoders of every family, at what they read."""

import pytest
import tiny
import torch
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.text_inputs import encoders_of, input_leaves
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.denoiser import InputsEncoder
from unmemorize.shared.score.detection import detect
from unmemorize.shared.words.explanation import explain
from unmemorize.shared.words.gradients import input_gradient

PROMPT = "a red cat on the mat"
CONFIG = DetectionConfig(seeds=(0, 1))
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


@pytest.fixture(scope="module", params=tiny.PIPELINES)
def denoiser(request):
    return PipelineDenoiser(tiny.PIPELINES[request.param]())


def hooked(encoder) -> bool:
    """Whether a hook of ours is left; transformers has some of its own."""
    hooks = [hook for module in encoder.modules() for hook in module._forward_hooks.values()]
    return any(hook.__qualname__.startswith("input_leaves") for hook in hooks)


def test_the_network_reads_the_same_embeddings(denoiser):
    assert isinstance(denoiser, InputsEncoder)
    plain, inputs = denoiser.encode([PROMPT]), denoiser.encode_inputs(PROMPT)
    assert torch.equal(inputs.cond.embeddings, plain.embeddings)
    assert (inputs.cond.pooled is None) == (plain.pooled is None)
    if plain.pooled is not None:
        assert torch.equal(inputs.cond.pooled, plain.pooled)
    assert len(inputs.leaves) == len(encoders_of(denoiser.pipeline))
    for leaf, tokens in zip(inputs.leaves, inputs.tokens, strict=True):
        assert leaf.shape[:2] == (1, len(tokens))
        assert {token.word for token in tokens} - {None} == set(range(6))


def test_every_word_has_a_gradient_and_nothing_stays_hooked(denoiser):
    found = explain(denoiser, PROMPT, CONFIG, method="input_gradient", occlude=0)
    assert len(found.significance) == 6
    assert min(found.significance) > 0
    assert not any(hooked(encoder) for encoder, _ in encoders_of(denoiser.pipeline))


def test_the_gradient_is_the_slope_of_the_score():
    """In float64: one token's embedding is moved and the prompt is scored again."""
    denoiser = PipelineDenoiser(tiny.stable_diffusion().to(torch.float64))
    config = DetectionConfig(seeds=(0, 1), batch_size=8)
    encoder = denoiser.pipeline.text_encoder
    table, h = encoder.get_input_embeddings(), 1e-3  # noise, and so the score, stand in float32
    place, token = 2, denoiser.encode([PROMPT]).tokens[0][2]
    assert (token.text, token.word) == ("red", 1)
    row = denoiser.pipeline.tokenizer(PROMPT).input_ids[place]
    slopes = []
    for width in range(table.weight.shape[1]):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                table.weight[row, width] += sign * h
            ends.append(detect(denoiser, [PROMPT], config).scores.item())
            with torch.no_grad():
                table.weight[row, width] -= sign * h
        slopes.append((ends[0] - ends[1]) / (2 * h))
    found = input_gradient(denoiser, PROMPT, config).values[place]
    assert found == pytest.approx(torch.tensor(slopes).norm().item(), rel=1e-3)
    assert found > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_words_alike(dtype):
    exact = PipelineDenoiser(tiny.stable_diffusion())
    half = PipelineDenoiser(tiny.stable_diffusion().to(dtype))
    settings = {"method": "input_gradient", "occlude": 0}
    wide, narrow = (explain(network, PROMPT, CONFIG, **settings) for network in (exact, half))
    strong = [i for i, value in enumerate(wide.significance) if value > 0]
    assert [narrow.significance[i] for i in strong] == pytest.approx(
        [wide.significance[i] for i in strong], rel=0.2
    )


def test_hooks_are_removed_when_encoding_fails():
    encoder = tiny.stable_diffusion().text_encoder

    def fails() -> None:
        with input_leaves(encoder):
            raise KeyError("stopped")

    with input_leaves(encoder):
        assert hooked(encoder)
    with pytest.raises(KeyError, match="stopped"):
        fails()
    assert not hooked(encoder)
