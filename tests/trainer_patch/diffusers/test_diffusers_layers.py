"""Layers with subspaces of their own, in trainings of the demo and of joint-attention models."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from demo_subspaces import WIDTH, layer_residuals, make_layers, make_subspace
from diffusers_runs import LORA, header_of, residual, run, same, weights_of
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from typer.testing import CliRunner
from unmemorize import cli
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.lora.layer_names import cores
from unmemorize.shared.score.denoiser import concatenate
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.fitting import CaptionedLatents, fit_layer_subspaces
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.projection.projection import ProjectionFailed
from unmemorize.trainer_patch.diffusers.loop import protect


def test_every_layer_of_the_lora_stays_outside_its_subspace(train, plain, subspace, layers):
    output = train("--project_concepts", str(subspace), "--project_layers", str(layers))
    assert max(layer_residuals(weights_of(output), layers)) < 1e-6
    assert residual(weights_of(output), ConceptSubspace.load(subspace).basis) < 1e-6
    assert min(layer_residuals(plain, layers)) > 0.01
    told = json.loads(header_of(output)["unmemorize.projection"])
    down = [key for key in plain if "lora_A" in key]
    # The file holds feed-forward layers and convolutions too, which this LoRA does not train.
    assert told["modules"] == len(down) < len(load_file(layers))
    assert told["layers"]["count"] == len(layer_residuals(plain, layers))
    assert told["layers"]["names"] == ["cat"]
    assert any(weights_of(output)[key].any() for key in plain if "lora_B" in key)


def answer_to(lora, layers, *more: str):
    arguments = ["concept", "test", str(layers), "--lora", str(lora / LORA), *more]
    return CliRunner().invoke(cli.app, arguments)


def test_a_saved_lora_is_tested_on_its_layers(train, subspace, layers):
    kept = train("--project_concepts", str(subspace), "--project_layers", str(layers))
    unprotected = train(protected=False)
    found = {}
    for lora, code in ((kept, 0), (unprotected, 3)):
        done = answer_to(lora, layers, "--json")
        assert done.exit_code == code
        found[lora] = json.loads(done.stdout)["lora"]
        shares = [layer["share"] for layer in found[lora].values()]
        assert shares == pytest.approx(layer_residuals(weights_of(lora), layers))
    assert all(layer["within"] for layer in found[kept].values())
    assert not any(layer["within"] for layer in found[unprotected].values())
    assert " NO " not in answer_to(kept, layers).stdout
    assert " NO " in answer_to(unprotected, layers).stdout


def test_a_layer_without_a_subspace_is_not_within(train, subspace, layers, tmp_path):
    kept = train("--project_concepts", str(subspace), "--project_layers", str(layers))
    held = LayerSubspaces.load(layers)
    lost = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    fewer = {name: basis for name, basis in held.bases.items() if name != lost}
    LayerSubspaces(bases=fewer).save(tmp_path / "fewer.safetensors")
    done = answer_to(kept, tmp_path / "fewer.safetensors", "--json")
    assert done.exit_code == 3
    outside = {name for name, layer in json.loads(done.stdout)["lora"].items()
               if not layer["within"]}  # fmt: skip
    assert outside == {f"unet.{lost}"}
    assert "no subspace" in answer_to(kept, tmp_path / "fewer.safetensors").stdout
    LayerSubspaces(bases={"elsewhere": held.bases[lost]}).save(tmp_path / "other.safetensors")
    assert "none of the 1 layers" in answer_to(kept, tmp_path / "other.safetensors").stderr


@pytest.mark.parametrize("more", [("demo",), ("--prompt", "a cat")])
def test_options_that_layers_have_no_use_for_are_refused(train, layers, more):
    done = answer_to(train(protected=False), layers, *more)
    assert done.exit_code == 2
    assert "in a LoRA alone" in " ".join(done.stderr.split())


def test_half_precision_and_resuming(train, images, subspace, layers, tmp_path):
    import shutil

    common = ("--mixed_precision", "bf16", "--max_train_steps", "6", "--checkpointing_steps", "3",
              "--project_concepts", str(subspace), "--project_layers", str(layers))  # fmt: skip
    whole = train(*common)
    assert max(layer_residuals(weights_of(whole), layers)) < 1e-6
    shutil.copytree(whole / "checkpoint-3", tmp_path / "out" / "checkpoint-3")
    resumed = ["--train_data_dir", str(images), *common]
    run(tmp_path / "out", [*resumed, "--resume_from_checkpoint", "checkpoint-3"])
    assert json.loads(header_of(tmp_path / "out")["unmemorize.projection"])["steps"] == 6
    assert max(layer_residuals(weights_of(tmp_path / "out"), layers)) < 1e-6


def test_empty_subspaces_change_no_bit(train, plain, tmp_path):
    nothing = (make_subspace(tmp_path, WIDTH, rank=0), make_layers(tmp_path, rank=0))
    asked = zip(("--project_concepts", "--project_layers"), map(str, nothing), strict=True)
    output = train(*(part for pair in asked for part in pair))
    assert same(weights_of(output), plain)


def test_a_layer_without_a_subspace_is_refused(images, tmp_path, subspace, layers):
    def refused(*more: str) -> str:
        given = ["--train_data_dir", str(images), "--project_layers", str(layers), *more]
        with pytest.raises(UnsupportedTraining) as caught:
            run(tmp_path / "out", given)
        return str(caught.value)

    assert "attn2.to_k" in refused()  # reads text, and no concept is given
    reason = refused("--project_concepts", str(subspace), "--use_dora")
    assert "DoRA" in reason
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


PROMPTS = ("a red cat", "a green cat", "the cat with sea", "cat")
OTHERS = ("a house with tall tree", "the dog", "a photo of sea", "tree and house")
TARGETS = {
    "SD 3": (tiny.stable_diffusion_3, ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj"]),
    "Flux": (tiny.flux, ["to_q", "to_k", "to_v", "add_k_proj", "add_v_proj", "proj_mlp"]),
}
"""Joint attention: layers that read pictures, text, and in Flux both in one sequence."""


@pytest.fixture(params=TARGETS)
def joint(request, tmp_path):
    """A denoiser with a LoRA, its optimizer, and the file of its layers."""
    make, targets = TARGETS[request.param]
    denoiser = PipelineDenoiser(make(), resolution=tiny.RESOLUTION)
    network = denoiser.family.network
    sides = [
        CaptionedLatents(
            latents=torch.randn(4, *denoiser.latent_shape,
                                generator=torch.Generator().manual_seed(seed)),
            captions=captions,
        )
        for seed, captions in enumerate((PROMPTS, OTHERS))
    ]  # fmt: skip
    path = tmp_path / "layers.safetensors"
    fit_layer_subspaces(denoiser, network, *sides, cap=3).save(path)
    network.requires_grad_(False)
    torch.manual_seed(0)
    network.add_adapter(LoraConfig(r=4, target_modules=targets))
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=1e-2)
    return denoiser, optimizer, path


def train_joint(denoiser, optimizer, steps: int = 3) -> None:
    cond = concatenate([denoiser.encode([prompt]) for prompt in PROMPTS])
    for step in range(steps):
        shape = (len(PROMPTS), *denoiser.latent_shape)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        output = denoiser.family.predict(latents, torch.tensor(500.0), cond)
        F.mse_loss(output, torch.ones_like(output)).backward()
        optimizer.step()
        optimizer.zero_grad()


def changes(network, path) -> list[float]:
    """Return by layer |s B A V| / |s B A|, from PEFT's own delta."""
    bases = {cores(name): basis for name, basis in load_file(path).items()}
    found = []
    for name, module in network.named_modules():
        if hasattr(module, "get_delta_weight"):
            delta = module.get_delta_weight("default").detach().double()
            basis = bases[cores(name)]
            assert basis.shape[1]
            found.append(float((delta @ basis).norm() / delta.norm()))
    assert len(found) > 4
    return found


def test_joint_attention_is_exact_where_layers_have_subspaces(joint, tmp_path):
    denoiser, optimizer, path = joint
    pipeline, network = denoiser.pipeline, denoiser.family.network
    output = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    with protect(pipeline, optimizer, output=output, project_layers=str(path)) as loop:
        train_joint(denoiser, optimizer)
        assert max(changes(network, path)) < 1e-6
        state = get_peft_model_state_dict(network)
        pipeline.save_lora_weights(output.parent, transformer_lora_layers=state)
        loop.stamp(output)
        spoilt = {f"transformer.{key}": value + 0.01 for key, value in state.items()}
        with pytest.raises(ProjectionFailed, match="reach into the prohibited subspace"):
            save_and_check(loop.protection, spoilt, tmp_path / "spoilt.safetensors")
    train_joint(denoiser, optimizer)  # no longer protected
    assert max(changes(network, path)) > 1e-3


def save_and_check(protection, state, path) -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, path)
    protection.after_save(path)


def test_words_are_refused_where_no_trained_layer_reads_text(joint, tmp_path):
    denoiser, optimizer, path = joint
    with (
        pytest.raises(UnsupportedTraining, match="kept off subspaces of their own"),
        protect(
            denoiser.pipeline, optimizer, output=tmp_path / "lora", project_layers=str(path),
            project_concepts="cat -> a house", project_force=True,
        ),
    ):  # fmt: skip
        pytest.fail("was protected")
