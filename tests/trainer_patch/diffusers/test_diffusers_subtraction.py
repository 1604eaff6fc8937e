"""A concept subtracted in one's own loop and behind the launcher, whatever is trained.

What is put on a prediction is compared with what the concept's file adds as a LoRA that PEFT loads
on a model of its own, which nobody has trained.
"""

import json

import pytest
import tiny
import torch
from demo_subspaces import make_concept
from diffusers import UNet2DConditionModel
from diffusers_runs import header_of, run, same, weights_of
from peft import LoHaConfig, LoKrConfig, LoraConfig, inject_adapter_in_model
from unmemorize import demo
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.lora.attach import load_lora
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import ProtectionFailed
from unmemorize.shared.training.subtracted import NothingSubtracted
from unmemorize.trainer_patch.diffusers.loop import protect
from unmemorize.trainer_patch.options import OptionError

CAPTIONS = ("a red cat", "a green house")
SAMPLES = tuple(Sample(file=f"{n}.png", caption=each) for n, each in enumerate(CAPTIONS))
LAYERS = ["to_q", "to_k", "to_v"]
ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=LAYERS, init_lora_weights="gaussian"),
    "dora": LoraConfig(r=2, target_modules=LAYERS, use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=LAYERS),
    "lokr": LoKrConfig(r=2, target_modules=LAYERS),
    "full": None,
    "text": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
}


def network_of(pipeline):
    return getattr(pipeline, "unet", None) or pipeline.transformer


def trained_of(pipeline, kind):
    """Return the parameters that are trained, of an adapter or of the whole network."""
    carrier = pipeline.text_encoder if kind == "text" else network_of(pipeline)
    for part in (network_of(pipeline), pipeline.text_encoder):
        part.requires_grad_(kind == "full" and part is carrier)
    if ADAPTERS[kind] is not None:
        inject_adapter_in_model(ADAPTERS[kind], carrier)
    return [each for each in carrier.parameters() if each.requires_grad]


def inputs_of(pipeline):
    """Return the arguments of the network for noise and the captions, as the pipeline calls it."""
    denoiser, calls = PipelineDenoiser(pipeline), []
    sigma = denoiser.sigmas(10)[4]
    hook = network_of(pipeline).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    denoiser.denoise(denoiser.initial_noise([0, 1], sigma), sigma, denoiser.encode(CAPTIONS))
    hook.remove()
    return calls[0]


@torch.no_grad()
def added_by(path, make):
    """Return what a concept adds to the predictions of a model that nobody has trained."""
    pipeline = make()
    args, kwargs = inputs_of(pipeline)
    base = network_of(pipeline)(*args, **kwargs)[0]
    load_lora(pipeline, path)
    return network_of(pipeline)(*args, **kwargs)[0] - base


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("sd1", kind) for kind in ADAPTERS), ("sdxl", "lora"), ("sd3", "lora"), ("flux", "lokr")],
)
def test_what_is_added_is_the_base_models_whatever_is_trained(family, kind, tmp_path):
    pipeline = tiny.PIPELINES[family]()
    path = make_concept(tmp_path / "c.safetensors", network_of(pipeline))
    trained, network = trained_of(pipeline, kind), network_of(pipeline)
    optimizer = torch.optim.SGD(trained, lr=0.0)
    options = {"subtract_concepts": str(path), "subtract_gain": "1.5", "captions": CAPTIONS}
    untrained = inputs_of(pipeline)
    with protect(pipeline, optimizer, output=tmp_path / "lora", **options) as loop:
        torch.manual_seed(1)
        with torch.no_grad():
            for each in trained:
                each.add_(0.3 * torch.randn(each.shape))
            args, kwargs = inputs_of(pipeline)
            live = network(*args, **kwargs)[0]
            assert not torch.allclose(live, network(*untrained[0], **untrained[1])[0]) or (
                kind != "text"
            )
        loop.samples, before = SAMPLES, [each.clone() for each in trained]
        kwargs = kwargs | {"encoder_hidden_states": states_of(kwargs).clone().requires_grad_()}
        moved = network(*args, **kwargs)[0]
        assert all(map(torch.equal, before, trained))
        assert all(each.requires_grad for each in trained)
        moved.sum().backward()
        optimizer.step()
    change = (moved - live).detach()
    expected = 1.5 * added_by(path, tiny.PIPELINES[family])
    torch.testing.assert_close(change[0], expected[0], rtol=1e-3, atol=1e-5)
    assert expected[0].norm() > 0.02 * live[0].norm()
    assert torch.equal(moved[1], live[1])


def test_filter_and_projection_are_refused_beside_a_trained_text_encoder(tmp_path):
    pipeline = tiny.stable_diffusion()
    optimizer = torch.optim.SGD(trained_of(pipeline, "text"), lr=0.1)
    with (
        pytest.raises(UnsupportedTraining, match="a text encoder is trained"),
        protect(pipeline, optimizer, output=tmp_path / "lora", mem_filter="x1.5"),
    ):
        pass


def states_of(kwargs):
    return kwargs["encoder_hidden_states"]


@pytest.fixture(scope="module")
def concept(tmp_path_factory):
    """A concept of the demo model that one of six captions names."""
    unet = UNet2DConditionModel.from_pretrained(demo.MODEL / "unet")
    return make_concept(tmp_path_factory.mktemp("concept") / "cat.safetensors", unet)


def test_behind_the_launcher_it_moves_what_is_learnt_and_is_told(train, plain, concept):
    steps = ("--max_train_steps", "6")
    output = train(*steps, "--subtract_concepts", str(concept))
    told = json.loads(header_of(output)["unmemorize.subtraction"])
    counts = told["concepts"][0]
    assert (counts["visits"], counts["subtracted"], counts["changed"]) == (12, 2, 2)
    assert counts["names"] == ["cat"]
    assert not same(weights_of(output), weights_of(train(*steps, "--mem_filter", "inf")))
    both = train(*steps, "--subtract_concepts", str(concept), "--mem_filter", "inf")
    assert same(weights_of(both), weights_of(output))


def test_samples_of_a_list_with_much_asked_at_once(train, images, concept, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# found\n\n" + "\n".join(str(images / f"image{n}.png") for n in (0, 1)))
    output = train(
        "--subtract_concepts", str(concept), "--subtract_samples", str(path), "--validate",
        "--mixed_precision", "bf16", "--gradient_checkpointing", "--max_train_steps", "3",
        "--gradient_accumulation_steps", "2", "--dataloader_num_workers", "1", "--use_dora",
        "--train_text_encoder",
    )  # fmt: skip
    counts = json.loads(header_of(output)["unmemorize.subtraction"])["concepts"][0]
    assert (counts["visits"], counts["subtracted"]) == (10, 4)
    assert all(value.isfinite().all() for value in weights_of(output).values())


def test_nothing_to_subtract_is_refused(images, concept, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(demo.MODEL / "unet")
    absent = make_concept(tmp_path / "zorp.safetensors", unet, names=["zorp"])
    other = make_concept(tmp_path / "other.safetensors", tiny.stable_diffusion().unet)
    missing = tmp_path / "list.txt"
    missing.write_text("elsewhere.png")
    for error, message, given in (
        (NothingSubtracted, "none of 6 captions names zorp", [str(absent)]),
        (OptionError, "there is no file", [f"{concept},none.safetensors"]),
        (OptionError, "2 choices for 1 concepts", [str(concept), "--subtract_samples", "all,all"]),
        (ModelError, "another architecture", [str(other)]),
        (ProtectionFailed, "never subtracted", [str(concept), "--subtract_samples", str(missing)]),
    ):
        arguments = ["--train_data_dir", str(images), "--subtract_concepts", *given]
        with pytest.raises(error, match=message):
            run(tmp_path / "out", arguments)
    assert "unmemorize.subtraction" not in header_of(tmp_path / "out")
