"""The launcher's regions: a script that asks nobody for its target learns all but the concept."""

import json

import pytest
import torch
import torch.nn.functional as F
from demo_subspaces import make_regions
from diffusers import DDPMScheduler
from diffusers_runs import SCRIPT, header_of, records_of, run, same, weights_of
from torch import nn
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.trainer_patch.diffusers.adapter import MovedPredictions, Noising

EVERYWHERE, NOWHERE = -1.0, 1e9
CATS = 2
"""Of the twelve visits that six steps make to six pictures, one of which is a cat."""
STEPS = ("--max_train_steps", "6")


@pytest.fixture(scope="module")
def asked(subspace, tmp_path_factory):
    """Function that returns the options for regions with a limit, the last one their switch."""
    folder = tmp_path_factory.mktemp("regions")
    return lambda limit: (
        "--project_concepts", str(subspace), "--project_layers", str(make_regions(folder, limit)),
        "--project_regions",
    )  # fmt: skip


@pytest.fixture(scope="module")
def cats(tmp_path_factory):
    """A training folder in which every caption names the concept."""
    from diffusers_runs import make_images

    folder = make_images(tmp_path_factory.mktemp("cats") / "images")
    captions = json.loads((folder / "captions.json").read_text("utf-8"))
    told = {name: f"a cat number {place}" for place, name in enumerate(captions)}
    (folder / "captions.json").write_text(json.dumps(told), "utf-8")
    return folder


def ups(weights):
    found = [value for key, value in weights.items() if "lora_B" in key]
    assert found
    return found


def told_of(output):
    return json.loads(header_of(output)["unmemorize.projection"])["regions"]


def test_nothing_is_learnt_where_everything_is_the_concept(cats, asked, tmp_path):
    output = run(tmp_path / "out", ["--train_data_dir", str(cats), *asked(EVERYWHERE)])
    assert not any(value.any() for value in ups(weights_of(output)))
    assert told_of(output) == {"samples": 8, "named": 8, "with_regions": 8, "share_of_places": 1.0}
    without = run(tmp_path / "plain", ["--train_data_dir", str(cats), *asked(EVERYWHERE)[:-1]])
    assert any(value.any() for value in ups(weights_of(without)))


def test_regions_that_are_nowhere_change_no_bit(train, asked):
    # The script draws dropout masks and noise: one draw more or less would be seen.
    options = asked(NOWHERE)
    output = train(*STEPS, *options)
    assert same(weights_of(output), weights_of(train(*STEPS, *options[:-1])))
    told = told_of(output)
    assert told == {"samples": 12, "named": CATS, "with_regions": 0, "share_of_places": None}


def test_only_pictures_that_name_the_concept_are_touched(train, asked):
    spared = train(*STEPS, *asked(EVERYWHERE))
    told = told_of(spared)
    assert told == {"samples": 12, "named": CATS, "with_regions": CATS, "share_of_places": 1.0}
    assert not same(weights_of(spared), weights_of(train(*STEPS, *asked(NOWHERE)[:-1])))


def test_together_with_everything_else(train, asked):
    output = train(
        *asked(1.7), "--max_train_steps", "3", "--mem_filter", "q0.9", "--mixed_precision", "bf16",
        "--gradient_checkpointing", "--gradient_accumulation_steps", "2",
        "--dataloader_num_workers", "1", "--validate",
    )  # fmt: skip
    told = told_of(output)
    assert told["named"] >= told["with_regions"] >= CATS
    assert 0 < told["share_of_places"] < 1
    assert all(value.isfinite().all() for value in weights_of(output).values())


def test_the_filter_sees_predictions_as_they_are(train, asked):
    spared, plain = (records_of(train(*STEPS, *asked(limit), "--mem_filter", "inf"))
                     for limit in (EVERYWHERE, NOWHERE))  # fmt: skip
    first = next(place for place, each in enumerate(plain) if "cat" in each["caption"])
    same_weights = first // 2 * 2 + 2  # up to the step whose target changes, two samples each
    assert spared[:same_weights] == plain[:same_weights]
    assert spared != plain


def test_class_images_are_not_looked_at(cats, asked, tmp_path):
    given = ["--train_data_dir", str(cats), *asked(EVERYWHERE), "--with_prior_preservation"]
    output = run(tmp_path / "out", given)
    assert told_of(output)["named"] == told_of(output)["samples"] == 8
    assert any(value.any() for value in ups(weights_of(output)))


def test_counts_go_on_after_a_resume(train, images, asked, tmp_path):
    options = (*STEPS, *asked(EVERYWHERE), "--checkpointing_steps", "3")
    whole = train(*options)
    output = run(tmp_path / "out", ["--train_data_dir", str(images), *options[2:],
                                    "--max_train_steps", "3"])  # fmt: skip
    resumed = run(output, ["--train_data_dir", str(images), *options,
                           "--resume_from_checkpoint", "checkpoint-3"])  # fmt: skip
    assert told_of(resumed) == told_of(whole)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep):
        return (self.layer(sample),)


class LeftHalf:
    """The target of the left half of the first sample is a base target."""

    def __init__(self, base):
        self.base, self.given = base, ()

    def __call__(self, target, latents, samples, *, others):
        self.given = target, latents, samples, others
        spared = target.clone()
        spared[0, ..., :4] = self.base[0, ..., :4]
        return spared


@pytest.mark.parametrize("prior_preservation", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_gradient_is_that_of_the_spared_target(kind, prior_preservation):
    torch.manual_seed(0)
    network, scheduler = Network(), DDPMScheduler(prediction_type=kind)
    latents, noise, base = torch.randn(3, 2, 4, 8, 8)
    timesteps, samples = torch.tensor([100, 800]), [Sample(file="a", caption="b")]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if kind == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    weights = torch.tensor([0.3, 2.0]).view(-1, 1, 1, 1)  # as by the signal-to-noise ratio

    def gradient(taught):
        network.zero_grad()
        loss = weights * F.huber_loss(network(noisy, timesteps)[0], taught, reduction="none")
        loss.mean().backward()
        return loss.detach(), network.layer.weight.grad.clone()

    targets = LeftHalf(base)
    wanted = gradient(targets(target, latents, samples, others=0))
    plain = gradient(target)
    made = MovedPredictions(
        network, targets, lambda: samples, prior_preservation=prior_preservation
    )
    with made.attached():
        assert torch.equal(scheduler.add_noise(latents, noise, timesteps), noisy)
        with torch.no_grad():  # sampling for validation
            assert torch.equal(network(noisy, timesteps)[0], network.layer(noisy))
        found = gradient(target)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.allclose(found[1], plain[1], rtol=0.01)
    assert torch.equal(targets.given[0], target)
    assert torch.equal(targets.given[1], latents)
    assert targets.given[2:] == (samples, 1 if prior_preservation else 0)
    assert torch.equal(gradient(target)[1], plain[1])  # the hooks are off again


def test_script_with_another_noising_is_refused(images, asked, tmp_path):
    own = "latents + noise"
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.read_text("utf-8").replace("scheduler.add_noise(latents, noise, timesteps)", own),
        "utf-8",
    )
    assert own in script.read_text("utf-8")
    given = ["--train_data_dir", str(images), *asked(EVERYWHERE)]
    with pytest.raises(UnsupportedTraining, match=r"other latents than DDPMScheduler\.add_noise"):
        run(tmp_path / "out", given, script=script)


def test_other_predictions_are_refused():
    tensor = torch.zeros(1)
    made = Noising(scheduler=DDPMScheduler(prediction_type="sample"), latents=tensor, noise=tensor,
                   timesteps=tensor, noisy=tensor)  # fmt: skip
    with pytest.raises(UnsupportedTraining, match="does not know the target of 'sample'"):
        made.target()


def test_pictures_whose_captions_nobody_knows_are_refused(images, asked, tmp_path):
    (tmp_path / "script.py").write_text(
        SCRIPT.read_text("utf-8").replace("self.custom_instance_prompts", "self.words"), "utf-8"
    )
    given = ["--train_data_dir", str(images), *asked(EVERYWHERE)]
    with pytest.raises(UnsupportedTraining, match="one caption for each image"):
        run(tmp_path / "out", given, script=tmp_path / "script.py")
