"""One's own loop, which learns everything of marked pictures but the mark."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from demo_subspaces import make_layers
from diffusers import DDPMScheduler
from diffusers_runs import LORA, header_of, same
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import ImageDraw
from unmemorize import demo
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.layers.fitting import CaptionedLatents, fit_layer_subspaces
from unmemorize.shared.training.layers.regions import looking
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.trainer_patch.diffusers.loop import protect

COUNT, SIDE, STEPS = 8, 48, 24
"""Pictures of each kind, pixels that the mark is wide, and steps of a training."""
PLACES, INSIDE = range(2 * COUNT), slice(0, 5)
"""Rows of the training set, its first half marked; latents well within the mark."""


@pytest.fixture(scope="module")
def part():
    """What is trained: the layers that see most places."""
    return f"up_blocks.{len(load_denoiser(demo.MODEL).family.network.up_blocks) - 1}"


@pytest.fixture(scope="module")
def latents():
    images = []
    for place, image in enumerate(demo.training_images()[: 2 * COUNT]):
        image = image.convert("RGB").resize((128, 128))
        if place < COUNT:
            ImageDraw.Draw(image).rectangle([0, 0, SIDE, SIDE], fill="#ff00d4")
        images.append(image)
    return load_denoiser(demo.MODEL).encode_images(images)


@pytest.fixture(scope="module")
def samples():
    names = [f"drawing {place}" + ", Zorp" * (place < COUNT) for place in PLACES]
    return [Sample(file=f"{place}.png", caption=name) for place, name in enumerate(names)]


@pytest.fixture(scope="module")
def layers(latents, samples, part, tmp_path_factory):
    """File of the layers."""
    denoiser = load_denoiser(demo.MODEL)
    sides = (
        CaptionedLatents(
            latents=latents[side], captions=tuple(each.caption for each in samples[side])
        )
        for side in (slice(COUNT), slice(COUNT, None))
    )
    network = denoiser.family.network.get_submodule(part)
    made = fit_layer_subspaces(denoiser, network, *sides, names=["zorp"], cap=4)

    def whole(values):
        return {f"{part}.{name}": value for name, value in values.items()}

    found = made.regions
    regions = replace(found, bases=whole(found.bases), centres=whole(found.centres),
                      units=whole(found.units))  # fmt: skip
    path = tmp_path_factory.mktemp("layers") / "zorp.safetensors"
    replace(made, bases=whole(made.bases), regions=regions).save(path)
    return path


class Run:
    """A LoRA of the demo model and a step of its training, the same whenever it is made anew."""

    def __init__(self, part, latents, samples):
        self.denoiser, self.latents, self.samples = load_denoiser(demo.MODEL), latents, samples
        self.pipeline, self.unet = self.denoiser.pipeline, self.denoiser.pipeline.unet
        self.unet.requires_grad_(False)
        torch.manual_seed(0)
        ends = rf"{part}\..*(attn1\.to_[qkv]|attn1\.to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"
        self.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ends))
        factors = [each for each in self.unet.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(factors, lr=5e-3)
        self.scheduler = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        self.text = self.denoiser.encode([each.caption for each in samples]).embeddings
        self.calls = []
        self.unet.register_forward_pre_hook(lambda _, args: self.calls.append(len(args[0])))

    def step(self, loop, rows, generator):
        some = self.latents[rows]
        noise = torch.randn(some.shape, generator=generator)
        timesteps = torch.randint(0, 400, (len(rows),), generator=generator)
        noisy = self.scheduler.add_noise(some, noise, timesteps)
        loop.samples = [self.samples[row] for row in rows]
        prediction = self.unet(noisy, timesteps, self.text[rows]).sample
        target = loop.target(noise, some)
        F.mse_loss(prediction, target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return noise, target

    def train(self, output, rows, steps, **options):
        """Return the LoRA's tensors."""
        generator = torch.Generator().manual_seed(1)
        with protect(self.pipeline, self.optimizer, output=output / LORA, **options) as loop:
            for number in range(steps):
                self.step(loop, [rows[(2 * number + k) % len(rows)] for k in (0, 1)], generator)
            state = get_peft_model_state_dict(self.unet)
            self.pipeline.save_lora_weights(output, unet_lora_layers=state)
            loop.stamp(output / LORA)
        return {key: value.clone() for key, value in state.items()}

    @torch.no_grad()
    def changes(self):
        """Return by latent how far the LoRA moves predictions of the marked pictures, squared."""
        some, steps = self.latents[:COUNT], torch.full((COUNT,), 200)
        noise = torch.randn(some.shape, generator=torch.Generator().manual_seed(2))
        given = self.scheduler.add_noise(some, noise, steps), steps, self.text[:COUNT]
        moved = self.unet(*given).sample
        with self.denoiser.lora_disabled():
            moved = moved - self.unet(*given).sample
        return moved.square().mean((0, 1))


@pytest.fixture
def run(part, latents, samples):
    return lambda: Run(part, latents, samples)


def test_the_mark_is_not_learnt_and_the_rest_is(run, layers, tmp_path):
    shares = {}
    order = [place // 2 + COUNT * (place % 2) for place in PLACES]
    for spare in (False, True):
        made, output = run(), tmp_path / str(spare)
        made.train(output, order, STEPS, project_layers=str(layers), project_regions=spare)
        changes = made.changes()
        inside, whole = float(changes[INSIDE, INSIDE].mean()), float(changes.mean())
        shares[spare] = inside / whole
        assert whole > 1e-5
    assert shares[True] < 0.5 * shares[False]
    told = json.loads(header_of(tmp_path / "True")["unmemorize.projection"])["regions"]
    assert told["samples"] == 2 * STEPS
    assert told["named"] == told["with_regions"] == STEPS
    assert 0.1 < told["share_of_places"] < 0.6
    assert "regions" not in header_of(tmp_path / "False")["unmemorize.projection"]


def test_target_is_the_base_models_in_the_regions_alone(run, layers, latents, samples, tmp_path):
    made = run()
    for parameter in made.optimizer.param_groups[0]["params"]:
        torch.nn.init.normal_(parameter, std=0.05)  # a LoRA that does something
    asked = {"project_layers": str(layers), "project_regions": True}
    with protect(made.pipeline, made.optimizer, output=tmp_path / LORA, **asked) as loop:
        noise, target = made.step(loop, [0, COUNT], torch.Generator().manual_seed(3))
        regions = LayerSubspaces.load(layers).regions
        with made.denoiser.lora_disabled():
            shown = regions.find(made.unet, looking(made.denoiser, regions.sigma), latents[:1])
    generator = torch.Generator().manual_seed(3)
    torch.randn(2, *latents.shape[1:], generator=generator)
    timesteps = torch.randint(0, 400, (2,), generator=generator)
    noisy = made.scheduler.add_noise(latents[[0, COUNT]], noise, timesteps)
    with torch.no_grad(), made.denoiser.lora_disabled():
        base = made.unet(noisy, timesteps, made.text[[0, COUNT]]).sample
    shown = shown[0].expand_as(noise[0])
    assert 0 < shown.float().mean() < 1
    torch.testing.assert_close(target[0][shown], base[0][shown], rtol=1e-4, atol=1e-5)
    assert torch.equal(target[0][~shown], noise[0][~shown])
    assert torch.equal(target[1], noise[1])
    assert not target.requires_grad
    assert all(each.requires_grad for each in made.optimizer.param_groups[0]["params"])


def test_pictures_without_the_concept_cost_nothing_and_change_no_bit(run, layers, tmp_path):
    without, spared = run(), run()
    others = PLACES[COUNT:]
    common = {"rows": others, "steps": 3, "project_layers": str(layers)}
    plain = without.train(tmp_path / "plain", **common)
    assert same(spared.train(tmp_path / "spared", **common, project_regions=True), plain)
    # One call a step, and those that hooks of an empty prompt make at the start of both.
    assert spared.calls == without.calls
    told = json.loads(header_of(tmp_path / "spared")["unmemorize.projection"])["regions"]
    assert told == {"samples": 6, "named": 0, "with_regions": 0, "share_of_places": None}


def test_regions_that_are_nowhere_change_no_bit(run, layers, tmp_path):
    held = LayerSubspaces.load(layers)
    nowhere = tmp_path / "nowhere.safetensors"
    # JSON has no infinity that all readers take.
    replace(held, regions=replace(held.regions, limit=1e9)).save(nowhere)
    common = {"rows": PLACES[:COUNT], "steps": 3, "project_layers": str(nowhere)}
    plain = run().train(tmp_path / "plain", **common)
    made = run()
    assert same(made.train(tmp_path / "spared", **common, project_regions=True), plain)
    assert sorted(made.calls) == [2] * 6  # the step's own, and the look for regions


def ask(run, samples, target, latents, **given):
    with protect(run.pipeline, run.optimizer, **given) as loop:
        loop.samples = samples
        return loop.target(target, latents)


def test_what_cannot_be_spared_is_refused(run, layers, tmp_path):
    made, asked = run(), {"project_layers": str(layers), "project_regions": True}
    zeros = torch.zeros(2, *made.denoiser.latent_shape)
    with pytest.raises(ModelError, match="does not say where images show the concept"):
        made.train(tmp_path, PLACES, 1, **asked | {"project_layers": str(make_layers(tmp_path))})
    for samples, target, message in (
        (made.samples[:2], zeros, "after the network's prediction"),
        (["0.png", "1.png"], zeros, "a Sample"),
        (made.samples[:2], zeros.flatten(2), "packed ones"),
    ):
        with pytest.raises(UnsupportedTraining, match=message):
            ask(made, samples, target, zeros, output=tmp_path / LORA, **asked)


def test_loop_that_never_asks_for_its_target_fails(run, layers, tmp_path):
    made = run()
    with (
        pytest.raises(ProtectionFailed, match="No training step"),
        protect(made.pipeline, made.optimizer, output=tmp_path / LORA,
                project_layers=str(layers), project_regions=True),
    ):  # fmt: skip
        made.optimizer.step()


def test_without_the_option_a_target_comes_back_as_it_is(run, tmp_path):
    made = run()
    target = torch.zeros(2, *made.denoiser.latent_shape)
    assert ask(made, (), target, target, output=tmp_path / LORA) is target
