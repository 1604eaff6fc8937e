"""What the embedding optimisation keeps for the way back: one conditional pass, or much less."""

import pytest
import tiny
import torch
from unmemorize.shared.mitigation.embedding import EmbeddingOptimisation
from unmemorize.shared.mitigation.method import Start
from unmemorize.shared.models.adapter import PipelineDenoiser

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")


def kept_for_backward(work) -> int:
    """Return the bytes of all distinct tensors that autograd keeps while `work` runs."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storages.values())


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_one_conditional_pass_is_kept_and_less_when_it_is_computed_again(name):
    pipeline = tiny.PIPELINES[name]()
    pipeline.unet.requires_grad_(False)
    denoiser, network = PipelineDenoiser(pipeline), pipeline.unet
    sigma, images = denoiser.sigmas(50)[0], 4
    x, cond = denoiser.initial_noise(range(images), sigma), denoiser.encode(["cat"])[[0] * images]
    empty = denoiser.unconditional()[[0] * images]
    with torch.no_grad():
        x0_uncond = denoiser.denoise(x, sigma, empty)

    start = Start(
        denoiser=denoiser, cond=cond, x=x, sigma=sigma, x0_uncond=x0_uncond, network=network,
        generator=torch.Generator(),
    )  # fmt: skip

    def optimise(checkpointing=False):
        EmbeddingOptimisation(
            target=0.0, iterations=1, batch_size=images, checkpointing=checkpointing
        ).start(start)

    def plain_pass(uncond: bool):
        leaf = cond.embeddings.clone().requires_grad_()
        parts = [empty.embeddings, leaf] if uncond else [leaf]
        pooled = None if cond.pooled is None else torch.cat([cond.pooled] * len(parts))
        rows = type(cond)(embeddings=torch.cat(parts), pooled=pooled)
        denoiser.denoise(torch.cat([x] * len(parts)), sigma, rows).norm().backward()

    one, both = kept_for_backward(lambda: plain_pass(False)), kept_for_backward(
        lambda: plain_pass(True)
    )  # fmt: skip
    assert both > 1.8 * one
    assert kept_for_backward(optimise) < 1.05 * one
    assert kept_for_backward(lambda: optimise(checkpointing=True)) < 0.5 * one
