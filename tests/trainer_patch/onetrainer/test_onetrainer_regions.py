"""The concept's regions in a step of OneTrainer, on a small trainer in its order.

tests/trainer_patch/onetrainer trains for real.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from unmemorize.shared.patching import HookMissing
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.layers.regions import ConceptRegions, still_noise
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import ProjectionSettings, ProtectionSettings
from unmemorize.trainer_patch.onetrainer.adapter import StepAdapter
from unmemorize.trainer_patch.onetrainer.data import BatchSamples, TextSide

CHANNELS, SIDE, SCALE = 4, 4, 0.5
SIGMAS = torch.linspace(0.01, 20, 1000)
LAYER = "transformer.attn1.to_q"


class Network(nn.Module):
    """Sees places, and adds what it reads of the text."""

    def __init__(self):
        super().__init__()
        self.transformer, self.transformer.attn1 = nn.Module(), nn.Module()
        self.transformer.attn1.to_q = nn.Linear(CHANNELS, CHANNELS)
        self.calls = []

    def forward(self, latents, timesteps, tokens, guidance=None):
        self.calls.append((latents.detach(), timesteps, tokens, guidance))
        places = nn.functional.dropout(self.get_submodule(LAYER)(latents.flatten(2).mT), 0.1)
        return places.mT.unflatten(2, (SIDE, SIDE)) + tokens.mean(1)[:, None, None, None]


class Setup:
    """A trainer's step: noise and timesteps come from the step's number."""

    flows, guidance = False, None

    def __init__(self):
        torch.manual_seed(0)
        self.unet, self.lora = Network(), nn.Parameter(torch.ones(CHANNELS, 1, 1))
        self.hooked = True

    @contextmanager
    def prior_model(self, model, config):
        self.hooked = False
        try:
            yield
        finally:
            self.hooked = True

    def _get_timestep_discrete(self, deterministic, generator, rows):
        if deterministic:
            return torch.tensor([499])
        return torch.randint(0, 1000, (rows,), generator=generator)

    def _add_noise_discrete(self, latents, noise, timesteps):
        kept = (1 / (1 + SIGMAS[timesteps] ** 2))[:, None, None, None]
        return kept.sqrt() * latents + (1 - kept).sqrt() * noise

    def predict(self, model, batch, config, train_progress, *, deterministic=False):
        generator = torch.Generator().manual_seed(0 if deterministic else train_progress)
        latents = SCALE * batch["latent_image"]
        timesteps = self._get_timestep_discrete(deterministic, generator, len(latents))
        noise = torch.randn(latents.shape, generator=generator)
        noisy = self._add_noise_discrete(latents, noise, timesteps)
        predicted = self.unet(noisy, timesteps, batch["tokens"], guidance=self.guidance)
        if self.hooked:
            predicted = predicted + self.lora * nn.functional.dropout(noisy, 0.5)
        return {"predicted": predicted, "target": noise, "timestep": timesteps}


class Flow(Setup):
    """The same with a network like Flux'."""

    flows, guidance = True, torch.ones(1)

    def _add_noise_discrete(self, latents, noise, timesteps):
        sigmas = ((timesteps + 1) / 1000)[:, None, None, None]
        return (1 - sigmas) * latents + sigmas * noise


class Text(TextSide):
    """A text side whose empty prompt is zeros."""

    def encode(self, prompts):
        return {"tokens": torch.zeros(len(prompts), 3)}


class Samples(BatchSamples):
    """A data set whose first pictures name the concept."""

    def __init__(self, named):
        self._named = named

    def of(self, batch):
        return [Sample(file=path, caption="zorp" if row < self._named else "a house")
                for row, path in enumerate(batch["image_path"])]  # fmt: skip


def batch_of(rows=4, prior=0):
    generator = torch.Generator().manual_seed(5)
    return {
        "tokens": torch.randn(rows, 3, generator=generator),
        "latent_image": torch.randn(rows, CHANNELS, SIDE, SIDE, generator=generator),
        "image_path": [f"{row}.png" for row in range(rows)],
        "concept_type": ["PRIOR_PREDICTION"] * prior + ["STANDARD"] * (rows - prior),
    }


@pytest.fixture
def step(tmp_path):
    """Function that returns what a step's prediction gives, and the account of its regions."""

    def made(setup, batch, limit=-1.0, named=2, **kwargs):
        basis = torch.linalg.qr(torch.eye(CHANNELS).double()[:, :2]).Q
        regions = ConceptRegions(
            bases={LAYER: basis}, centres={LAYER: torch.zeros(2).double()}, units={LAYER: 1.0},
            limit=limit, sigma=0.5,
        )  # fmt: skip
        path = tmp_path / "layers.safetensors"
        held = LayerSubspaces(bases={LAYER: basis}, regions=regions, provenance={"names": ["zorp"]})
        held.save(path)
        asked = ProtectionSettings(projection=ProjectionSettings(layers=path, regions=True))
        protection = Protection(asked, output=tmp_path / "lora.safetensors")
        protection.fit(lambda prompts: None, [])
        kept = 1 / (1 + SIGMAS**2)
        config = SimpleNamespace(
            model_type=SimpleNamespace(
                is_stable_diffusion=lambda: not setup.flows, is_stable_diffusion_xl=lambda: False
            )
        )
        model = SimpleNamespace(
            noise_scheduler=SimpleNamespace(alphas_cumprod=kept),
            **{"transformer" if setup.flows else "unet": setup.unet},
        )
        trainer = SimpleNamespace(
            train_device=torch.device("cpu"), model_setup=setup, model=model, config=config
        )
        adapter = StepAdapter(trainer, protection, Samples(named), Text(trainer))
        torch.manual_seed(3)
        output = adapter.protected(setup.predict)(model, batch, None, 8, **kwargs)
        return output, protection.base_targets.account()

    return made


def plain(setup, batch):
    torch.manual_seed(3)
    return setup.predict(None, batch, None, 8)


def test_the_target_of_named_samples_is_predicted_without_the_lora(step):
    batch, setup = batch_of(), Setup()
    output, told = step(setup, batch)
    after = torch.rand(3)
    expected = plain(Setup(), batch)
    assert torch.equal(after, torch.rand(3))  # the random state is the plain step's
    assert torch.equal(output["predicted"], expected["predicted"])
    assert torch.equal(output["target"][2:], expected["target"][2:])
    with setup.prior_model(None, None):
        base = plain(setup, batch)["predicted"]
    assert torch.equal(output["target"][:2], base[:2])
    assert not torch.equal(output["target"][:2], expected["target"][:2])
    assert not output["target"].requires_grad
    assert told == {"samples": 4, "named": 2, "with_regions": 2, "share_of_places": 1}


def test_pictures_are_looked_at_with_still_noise_and_without_text(step):
    setup, batch = Setup(), batch_of()
    step(setup, batch)
    _, (latents, timesteps, tokens, _), _ = setup.unet.calls
    clean = SCALE * batch["latent_image"][:2]
    nearest = int((SIGMAS - 0.5).abs().argmin())
    assert timesteps.tolist() == [nearest] * 2
    sigma = SIGMAS[nearest]
    expected = (clean + sigma * still_noise(clean)) / (1 + sigma**2).sqrt()
    torch.testing.assert_close(latents, expected)
    assert not tokens.any()


def test_flows_are_looked_at_with_the_guidance_that_the_regions_were_measured_with(step):
    setup, batch = Flow(), batch_of()
    output, _ = step(setup, batch)
    _, (latents, timesteps, _, guidance), _ = setup.unet.calls
    clean = SCALE * batch["latent_image"][:2]
    assert timesteps.tolist() == [499] * 2
    torch.testing.assert_close(latents, (clean + still_noise(clean)) / 2)
    assert guidance.tolist() == [3.5]
    assert [call[3].tolist() for call in (setup.unet.calls[0], setup.unet.calls[2])] == [[1.0]] * 2
    with setup.prior_model(None, None):
        assert torch.equal(output["target"][:2], plain(setup, batch)["predicted"][:2])


@pytest.mark.parametrize(("limit", "named", "calls"), [(1e9, 4, 2), (-1.0, 0, 1)])
def test_no_bit_changes_where_nothing_shows_the_concept(step, limit, named, calls):
    setup, batch = Setup(), batch_of()
    output, told = step(setup, batch, limit, named)
    expected = plain(Setup(), batch)
    assert all(torch.equal(output[name], expected[name]) for name in expected)
    assert len(setup.unet.calls) == calls
    assert told["with_regions"] == 0


def test_prior_prediction_and_validation_are_left_alone(step):
    setup, batch = Setup(), batch_of(prior=1)
    output, told = step(setup, batch)
    assert told == {"samples": 3, "named": 1, "with_regions": 1, "share_of_places": 1}
    assert torch.equal(output["target"][[0, 2, 3]], plain(Setup(), batch)["target"][[0, 2, 3]])
    assert step(Setup(), batch_of(prior=4))[1]["samples"] == 0
    setup = Setup()
    with torch.no_grad():
        _, told = step(setup, batch, deterministic=True)
    assert len(setup.unet.calls) == 1
    assert told["samples"] == 0


def test_a_step_that_is_made_otherwise_is_refused(step):
    class Unseeded(Setup):
        def _get_timestep_discrete(self, deterministic, generator, rows):
            self.drawn = getattr(self, "drawn", 0) + 1
            return torch.full((rows,), self.drawn)

    class Otherwise(Setup):
        def predict(self, model, batch, *args, **kwargs):
            latents = batch["latent_image"]
            return {"predicted": latents, "target": latents, "timestep": torch.zeros(4)}

    for setup, message in ((Unseeded(), "drew other timesteps"), (Otherwise(), "does not add its")):
        with pytest.raises(HookMissing, match=message):
            step(setup, batch_of())
        assert setup.hooked
        assert not {"predict", "_get_timestep_discrete", "_add_noise_discrete"} & vars(setup).keys()
