"""Attraction and repulsion: the formula, the damping, and a network that is left as it was."""

import math
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from runs import only, seeded, start_of, step_at, step_of
from unmemorize.shared.mitigation.attention import (
    AttractionRepulsion,
    TwoForces,
    cross_attention,
    damped,
    damping,
)
from unmemorize.shared.models.adapter import PipelineDenoiser

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
PROMPTS = ["a red cat on the mat", "tall tree", "sea and a green house"]


@pytest.fixture(scope="module")
def start():
    """A run of a real SD 1.x pipeline, in float64 so that differences mean something."""
    pipeline = tiny.stable_diffusion()
    pipeline.unet.to(torch.float64)
    pipeline.text_encoder.to(torch.float64)
    start = start_of(PipelineDenoiser(pipeline), PROMPTS, network=pipeline.unet)
    return replace(start, x=start.x.double())


def processors(network) -> list:
    return [(name, m.processor) for name, m in network.named_modules() if hasattr(m, "processor")]


def slow_damping(logits: torch.Tensor, alpha: float, tau: float) -> torch.Tensor:
    """Damp one head and token after the other."""
    damped_logits = logits.clone()
    for head in range(len(logits)):
        peaks = [max(logits[head, :, token].tolist()) for token in range(logits.shape[2])]
        others = peaks[1:]
        mean = math.fsum(others) / len(others)
        spread = (math.fsum((p - mean) ** 2 for p in others) / (len(others) - 1)) ** 0.5
        for token, peak in enumerate(peaks):
            if token > 0 and (peak - mean) / (spread + 1e-6) > tau:
                damped_logits[head, :, token] *= alpha
    return damped_logits


@pytest.mark.parametrize("tau", [-1.0, 0.1, 1.5])
def test_damping_is_the_slow_loop(tau):
    logits = 3 * seeded(8, 20, 11)
    logits[:, :, 0] += 20  # the first token is far above the others
    found = logits + damping(logits, 0.3, tau)
    torch.testing.assert_close(found, slow_damping(logits, 0.3, tau))
    touched = (found != logits).any(1)
    assert not touched[:, 0].any()
    assert touched.any()
    assert not touched[:, 1:].all()


def test_alpha_one_adds_nothing():
    assert not damping(seeded(2, 5, 7), 1.0, 0.1).any()


class Naive:
    """Attention written out, with the logits damped slowly."""

    def __init__(self, alpha: float, tau: float):
        self.alpha, self.tau = alpha, tau

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        query, key, value = (
            attn.head_to_batch_dim(part)
            for part in (
                attn.to_q(hidden_states), attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )  # fmt: skip
        logits = slow_damping(query @ key.transpose(1, 2) * attn.scale, self.alpha, self.tau)
        return attn.to_out[0](attn.batch_to_head_dim(logits.softmax(2) @ value))


def test_the_extra_pass_is_attention_with_damped_logits(start):
    step = step_at(start)
    modules = cross_attention(start.network, "all")
    with damped(modules, 0.3, 0.1):
        found = step.predict()
    before = [module.processor for module in modules]
    for module in modules:
        module.set_processor(Naive(0.3, 0.1))
    expected = step.predict()
    for module, processor in zip(modules, before, strict=True):
        module.set_processor(processor)
    torch.testing.assert_close(found, expected)
    assert (found - step.cond).norm() > 1e-4 * step.cond.norm()


def test_damping_by_one_is_the_plain_pass(start):
    step = step_at(start)
    with damped(cross_attention(start.network, "all"), 1.0, 0.1):
        torch.testing.assert_close(step.predict(), step.cond)


def test_early_blocks_are_the_down_and_middle_ones(start):
    names = {module: name for name, module in start.network.named_modules()}
    early, every = (cross_attention(start.network, blocks) for blocks in ("early", "all"))
    parts = [{names[m].split(".")[0] for m in modules} for modules in (early, every)]
    assert parts == [{"down_blocks", "mid_block"}, {"down_blocks", "mid_block", "up_blocks"}]
    assert all(names[module].endswith("attn2") for module in every)
    with damped(early, 0.3, 0.1):
        kinds = {name: type(kept).__name__ for name, kept in processors(start.network)}
    changed = {name for name, kind in kinds.items() if kind == "_Damped"}
    assert changed == {names[module] for module in early}


def test_processors_come_back(start):
    before = processors(start.network)
    run = AttractionRepulsion().start(start)
    assert processors(start.network) == before  # only the extra pass changes anything
    step = step_at(start)
    run.guide(step)
    assert processors(start.network) == before

    def interrupted():
        assert processors(start.network) != before
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.guide(step_at(start, predict=interrupted))
    assert processors(start.network) == before
    torch.testing.assert_close(step.predict(), step.cond, rtol=0, atol=0)


def test_processors_come_back_when_only_some_were_changed(start):
    before, modules = processors(start.network), cross_attention(start.network, "all")

    class Stubborn:
        processor = None

        def set_processor(self, processor):
            if processor is not None:
                raise RuntimeError("no")

    with pytest.raises(RuntimeError), damped([*modules, Stubborn()], 0.3, 0.1):
        pass
    assert processors(start.network) == before


def test_guidance_is_the_papers_formula(start):
    step = step_at(start, percent=0.25, cond_scale=5.0)
    method = AttractionRepulsion(repulsion=1.5)
    found = method.start(start).guide(step)
    with damped(cross_attention(start.network, "early"), 0.3, 0.1):
        plus = step.predict()
    r = 1.5 * math.cos(math.pi / 8)
    expected = (1 - 5 + r) * step.uncond + 5 * plus - r * step.cond
    torch.testing.assert_close(found, expected)
    steady = AttractionRepulsion(repulsion=1.5, fade=False).start(start).guide(step)
    torch.testing.assert_close(steady - found, (1.5 - r) * (step.uncond - step.cond))


def test_without_repulsion_at_the_end():
    plus = seeded(3, 4, 8, 8, seed=9)
    step = step_of(49, 1.0, predict=lambda: plus)
    found = TwoForces(AttractionRepulsion(), []).guide(step)
    torch.testing.assert_close(found, step.uncond + 7.5 * (plus - step.uncond))


def test_weights_sum_to_one():
    plus, shift = seeded(3, 4, 8, 8, seed=9), 10.0
    step = step_of(predict=lambda: plus)
    moved = step_of(
        predict=lambda: plus + shift, cond=step.cond + shift, uncond=step.uncond + shift
    )
    run = TwoForces(AttractionRepulsion(), [])
    torch.testing.assert_close(run.guide(moved), run.guide(step) + shift)


def test_no_force_changes_nothing_and_computes_nothing():
    step = step_of(predict=lambda: pytest.fail("one pass too many"))
    assert TwoForces(AttractionRepulsion(alpha=1.0, repulsion=0.0), []).guide(step) is None
    found = TwoForces(AttractionRepulsion(alpha=1.0), []).guide(step)
    torch.testing.assert_close(found, step.guided(5.5))


def test_an_image_does_not_depend_on_those_beside_it(start):
    run = AttractionRepulsion().start(start)
    together = run.guide(step_at(start))
    for row in range(3):
        alone = run.guide(step_at(only(start, row)))
        torch.testing.assert_close(together[[row]], alone)


@pytest.mark.parametrize("processor", [AttnProcessor, lambda: SlicedAttnProcessor(1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upcast", [False, True])
def test_other_attention_of_diffusers_gives_the_same(processor, dtype, upcast):
    unet = tiny.stable_diffusion().unet.to(dtype)
    modules = cross_attention(unet, "all")
    x, text = seeded(2, 4, 16, 16, dtype=dtype), seeded(2, 16, 32, dtype=dtype)
    found = []
    for change in (False, True):
        if change:
            unet.set_attn_processor(processor())
            for module in modules:
                module.upcast_attention = upcast
        with damped(modules, 0.3, 0.1):
            found.append(unet(x, 500, text).sample)
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}  # 8 bits, 9 layers
    torch.testing.assert_close(*found, **tolerance)


def test_masks_of_the_host_are_obeyed(start):
    x, timestep, cond = start.x, 500, start.cond.embeddings
    mask = torch.ones(3, cond.shape[1], dtype=torch.bool)
    mask[:, 6:] = False
    with damped(cross_attention(start.network, "all"), 1.0, 0.1), torch.no_grad():
        found = start.network(x, timestep, cond, encoder_attention_mask=mask).sample
    with torch.no_grad():
        expected = start.network(x, timestep, cond, encoder_attention_mask=mask).sample
        unmasked = start.network(x, timestep, cond).sample
    torch.testing.assert_close(found, expected)
    assert (unmasked - expected).norm() > 1e-4 * expected.norm()


def test_other_networks_are_refused(start):
    supported = "Stable Diffusion 1, 2 and XL"
    with pytest.raises(ValueError, match=f"{supported}; the host gave no network"):
        cross_attention(None, "all")
    with pytest.raises(ValueError, match=f"{supported}; this SD3Transformer2DModel has none"):
        cross_attention(tiny.stable_diffusion_3().transformer, "all")


def test_replaced_attention_is_refused():
    class IPAdapter(AttnProcessor):
        pass

    unet = tiny.stable_diffusion().unet
    unet.up_blocks[-1].attentions[0].transformer_blocks[0].attn2.set_processor(IPAdapter())
    with pytest.raises(ValueError, match=r"up_blocks\S+attn2 has IPAdapter"):
        cross_attention(unet, "all")
    assert cross_attention(unet, "early")


def test_sdxl_is_supported():
    assert len(cross_attention(tiny.stable_diffusion_xl().unet, "early")) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 1.1}, r"`alpha` must lie in 0..1, got 1.1."),
        ({"tau": float("nan")}, "`tau` must be a number, got nan."),
        ({"repulsion": -1.0}, "`repulsion` must be at least 0, got -1.0."),
        ({"blocks": "late"}, "`blocks` must be one of early, all, got 'late'."),
    ],
)
def test_nonsense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AttractionRepulsion(**settings)
