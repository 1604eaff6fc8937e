"""The filter on networks of every family: what it compares, and which gradients it lets through."""

from contextlib import contextmanager

import pytest
import tiny
import torch
from peft import LoraConfig
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.score.denoiser import concatenate
from unmemorize.shared.training.filter.sample_log import Sample, read_records
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import FilterSettings, ProtectionSettings
from unmemorize.trainer_patch.diffusers.adapter import StepAdapter
from unmemorize.trainer_patch.diffusers.data import EmptyPrompt, load_text_side

FAMILIES = {
    "SD 1": tiny.stable_diffusion,
    "SD 2": lambda: tiny.stable_diffusion("v_prediction"),
    "SDXL": tiny.stable_diffusion_xl,
    "SD 3": tiny.stable_diffusion_3,
    "Flux": tiny.flux,
}
PROMPTS = ("", "a red cat", "a house with tall tree")
TIMESTEP = 600.0


@pytest.fixture(params=FAMILIES)
def denoiser(request):
    """A pipeline whose network carries a LoRA that does something."""
    found = PipelineDenoiser(FAMILIES[request.param](), resolution=tiny.RESOLUTION)
    add_lora(found.family.network)
    return found


def add_lora(network, dropout=0.0):
    network.requires_grad_(False)
    torch.manual_seed(0)
    network.add_adapter(
        LoraConfig(r=4, lora_dropout=dropout, target_modules=["to_k", "to_q", "to_v"])
    )
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    network.train()


def call(denoiser, prompts=PROMPTS):
    """Return the network's prediction for some prompts, as a training calls it."""
    # One after another: together, the encoder's sums could round differently.
    cond = concatenate([denoiser.encode([prompt]) for prompt in prompts])
    shape = (len(prompts), *denoiser.latent_shape)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return denoiser.family.predict(latents, torch.tensor(TIMESTEP), cond)


@contextmanager
def gated(denoiser, folder, limit=float("inf"), samples=(), recall=None):
    """Yield the protection of a block in which the network is gated."""
    asked = ProtectionSettings(filter=FilterSettings(limit=limit, recall=recall))
    protection = Protection(asked, output=folder / "lora")
    network = denoiser.family.network
    with StepAdapter(network, protection, EmptyPrompt.of(denoiser), lambda: samples).attached():
        yield protection


def records(protection, folder):
    protection.flush()
    return read_records([folder / "lora.memorized.jsonl"])


def gradients(denoiser, loss):
    network = denoiser.family.network
    network.zero_grad()
    loss.backward()
    return {
        name: each.grad.clone() for name, each in network.named_parameters() if each.requires_grad
    }


def test_empty_caption_has_no_magnitude(tmp_path, denoiser):
    # Exactly none, under dropout: the second pass has the same input, weights and masks.
    denoiser.family.network.delete_adapters("default")
    add_lora(denoiser.family.network, dropout=0.5)
    with gated(denoiser, tmp_path) as protection:
        call(denoiser)
    first, *others = records(protection, tmp_path)
    assert first.score == 0
    assert all(other.score > 0 for other in others)
    assert all(each.timestep == pytest.approx(TIMESTEP) for each in (first, *others))


def test_scores_are_those_of_the_noise(tmp_path, denoiser):
    with gated(denoiser, tmp_path) as protection:
        call(denoiser)
    with torch.no_grad():
        cond, empty = call(denoiser), denoiser.encode([""])
        rows = concatenate([empty] * len(PROMPTS))
        latents = torch.randn(
            (len(PROMPTS), *denoiser.latent_shape), generator=torch.Generator().manual_seed(1)
        )
        uncond = denoiser.family.predict(latents, torch.tensor(TIMESTEP), rows)
    expected = (cond - uncond).flatten(1).square().mean(1).sqrt()
    if denoiser.parametrization == "v_prediction":  # v = sqrt(abar) noise - ..., at one image
        abar = denoiser.pipeline.scheduler.alphas_cumprod[int(TIMESTEP)]
        expected = expected * abar.sqrt()
    found = torch.tensor([each.score for each in records(protection, tmp_path)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_left_out_is_as_if_it_had_not_been_there(tmp_path, denoiser):
    target = torch.randn((len(PROMPTS), *denoiser.latent_shape))
    with gated(denoiser, tmp_path) as protection:
        everything = gradients(denoiser, (call(denoiser) - target).square().mean())
    scores = [each.score for each in records(protection, tmp_path)]
    limit = sorted(scores)[-1]
    kept = [row for row, score in enumerate(scores) if score < limit]
    with gated(denoiser, tmp_path, limit):
        prediction = call(denoiser)
        found = gradients(denoiser, (prediction - target).square().mean())
    rest = call(denoiser)
    torch.testing.assert_close(prediction, rest, rtol=0, atol=0)
    expected = gradients(denoiser, (rest - target)[kept].square().mean())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
    assert any(not torch.allclose(everything[name], found[name], rtol=0.01) for name in found)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_samples_that_are_due_are_run_again(tmp_path, denoiser, dropout):
    network = denoiser.family.network
    network.delete_adapters("default")
    add_lora(network, dropout)
    rows, forward = [], network.forward

    def counting(*args, **kwargs):
        rows.append(next(len(each) for each in (*args, *kwargs.values()) if each is not None))
        return forward(*args, **kwargs)

    known = ("a cat", "a red cat", "a house with tall tree")
    with gated(denoiser, tmp_path, recall=9) as protection:
        call(denoiser, known)
        network.forward = counting
        call(denoiser, known)
        call(denoiser, ("a red cat", "a green cat", "a house with tall tree"))
        del network.forward
    # Under dropout a part of the batch would draw other masks.
    assert rows == [3, 3 if dropout else 1, 3]
    found = records(protection, tmp_path)
    assert [each.measured for each in found[3:6]] == [False] * 3
    assert [each.measured for each in found[6:]] == [bool(dropout), True, bool(dropout)]
    if not dropout:
        full = found[7].score
        with gated(denoiser, tmp_path / "full") as protection:
            call(denoiser, ("a red cat", "a green cat", "a house with tall tree"))
        expected = records(protection, tmp_path / "full")[1].score
        assert full == pytest.approx(expected, rel=1e-4)


def test_nothing_of_the_step_is_held_while_it_predicts_without_text(tmp_path, denoiser):
    network, order = denoiser.family.network, []
    inner = next(module for name, module in network.named_modules() if name.endswith("to_q"))
    inner.register_forward_hook(lambda *_: order.append(torch.is_grad_enabled()))
    with gated(denoiser, tmp_path):
        call(denoiser)
    assert order == [False, True]


def test_sampling_is_not_looked_at(tmp_path, denoiser):
    calls = []
    with gated(denoiser, tmp_path) as protection:
        denoiser.family.network.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            call(denoiser)
    assert protection.filter.seen == 0
    assert len(calls) == 1


def test_nothing_stays_on_the_network(tmp_path, denoiser):
    network = denoiser.family.network
    with pytest.raises(KeyError), gated(denoiser, tmp_path):
        raise KeyError
    assert not network._forward_hooks
    assert not network._forward_pre_hooks


def test_unknown_samples_are_told_apart_by_their_text(tmp_path, denoiser):
    with gated(denoiser, tmp_path) as protection:
        call(denoiser)
        call(denoiser)
    names = [each.sample.file for each in records(protection, tmp_path)]
    assert len(set(names)) == len(PROMPTS)
    assert names[:3] == names[3:]


def test_wrong_number_of_samples_is_refused(tmp_path, denoiser):
    with (
        gated(denoiser, tmp_path, samples=[Sample(file="one")]),
        pytest.raises(UnsupportedTraining, match="3 samples, the batch holds 1"),
    ):
        call(denoiser)


def test_text_of_another_length_is_refused(tmp_path, denoiser):
    empty = EmptyPrompt.of(denoiser)
    longer = {"encoder_hidden_states": empty.embeddings.repeat(2, 2, 1)}
    with pytest.raises(UnsupportedTraining, match="prompts of one length"):
        empty.in_place_of_prompt(longer)


def test_text_side_from_a_folder_says_the_same(tmp_path, denoiser):
    denoiser.family.network.delete_adapters("default")
    denoiser.pipeline.save_pretrained(tmp_path)
    # Its network stands elsewhere: the encoders must not follow it.
    network = denoiser.family.network.to("meta")
    found = load_text_side(str(tmp_path), network)
    expected, actual = (each.encode(PROMPTS) for each in (denoiser, found))
    assert torch.equal(expected.embeddings, actual.embeddings)
    assert expected.pooled is None or torch.equal(expected.pooled, actual.pooled)
    assert found.parametrization == denoiser.parametrization


def test_t5_reads_as_many_tokens_as_in_training(tmp_path):
    pipeline = tiny.stable_diffusion_3()
    pipeline.save_pretrained(tmp_path)
    found = load_text_side(str(tmp_path), pipeline.transformer, max_sequence_length=20)
    expected = pipeline.encode_prompt("a red cat", None, None, max_sequence_length=20)[0]
    cond = found.encode(["a red cat"])
    assert torch.equal(cond.embeddings, expected[:1])
    assert len(cond.tokens[0]) == cond.embeddings.shape[1]
