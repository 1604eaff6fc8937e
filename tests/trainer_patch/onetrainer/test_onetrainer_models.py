"""SDXL, SD3 and Flux at tiny size with random weights, trained by the real OneTrainer."""

import json
import warnings
from functools import cache, partial
from pathlib import Path

import pytest
import tiny
import tiny_families
import torch
from checkouts import CAPTIONS
from onetrainer_lora import largest_share, same_tensors, told
from safetensors.torch import load_file, save_file
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.training.concept.concept import parse_concepts
from unmemorize.shared.training.concept.fitting import fit_subspace
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.concept.text_states import encoders_of, text_path_of
from unmemorize.shared.training.layers.fitting import layers_without_text
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

pytestmark = pytest.mark.slow
CONCEPT = "cat, red cat -> dog"
KINDS = {
    "sdxl": {"model_type": "STABLE_DIFFUSION_XL_10_BASE"},
    "sd3": {"model_type": "STABLE_DIFFUSION_3", "output_model_format": "LEGACY_LORA"},
    "flux": {"model_type": "FLUX_DEV_1", "output_model_format": "LEGACY_LORA"},
}
FILTERED = {"chroma": {"model_type": "CHROMA_1"}, "z_image": {"model_type": "Z_IMAGE"}}
"""Kinds for which there is the filter alone."""


@pytest.fixture(scope="module")
def pipelines():
    """Pipelines whose CLIP encoders read 77 tokens, a number that OneTrainer knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CLIP_LENGTH", 77)
        patch.setattr(tiny, "clip_tokenizer", partial(tiny.clip_tokenizer, 77))
        return {kind: tiny.PIPELINES[kind]() for kind in KINDS}


@pytest.fixture(scope="module")
def saved(pipelines, room):
    """Function that saves a kind of model once and returns its folder."""
    from transformers import CLIPTextModel

    @cache
    def save(kind: str) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of classes that move in diffusers
            pipeline = pipelines.get(kind) or getattr(tiny_families, kind)()
        folder = room / f"model {kind}"
        if kind == "chroma":
            pipeline.tokenizer.model_max_length = 77  # as published: OneTrainer pads to it
        pipeline.save_pretrained(folder)
        text_encoder = folder / "text_encoder" / "model.safetensors"
        if isinstance(pipeline.text_encoder, CLIPTextModel):
            name_as_published(text_encoder, "text_model.")
        if kind == "z_image":
            name_as_published(text_encoder, "model.")
        return folder

    return save


@pytest.fixture(scope="module")
def trained(train, saved):
    """Function that trains a kind of model for two steps."""

    def run(kind: str, name: str, *options: str, **changed) -> Path | str:
        settings = (KINDS | FILTERED)[kind] | {
            "base_model_name": str(saved(kind)), "epochs": 1,
            "aspect_ratio_bucketing": False,  # its steps are as large as the images
        } | changed  # fmt: skip
        return train(f"{kind} {name}", *options, **settings)

    return run


def name_as_published(path: Path, start: str) -> None:
    """Give a text encoder's weights the names of published files, which some releases leave out."""
    state = load_file(path)
    save_file({start + key.removeprefix(start): state[key] for key in state}, path)


@pytest.mark.parametrize("kind", [*KINDS, *FILTERED])
def test_every_kind_of_model_is_filtered(trained, kind):
    before = trained(kind, "plain", door=False)
    same = trained(kind, "inf", "--mem_filter", "inf")
    assert same_tensors(before, same)
    assert told(same, "filter")["seen"] == len(CAPTIONS)
    report = json.loads((same.parent / "lora.memorized.json").read_text())
    assert min(sample["highest"] for sample in report["samples"]) > 0
    learnt = load_file(before)
    nothing = load_file(trained(kind, "zero", "--mem_filter", "0"))
    ups = [key for key in nothing if "lora_up" in key]
    assert any(learnt[key].any() for key in ups)
    assert not any(nothing[key].any() for key in ups)


def test_sdxl_is_projected(trained, pipelines):
    path = trained("sdxl", "kept", "--project_concepts", CONCEPT, "--project_force")
    account = told(path, "projection")
    assert (account["width"], account["encoders"]) == (56, [32, 24])
    assert account["residual"] < 1e-6
    pipeline = pipelines["sdxl"]
    text_path = text_path_of(PipelineDenoiser(pipeline), encoders_of(pipeline))
    subspace = fit_subspace(text_path, parse_concepts(CONCEPT), CAPTIONS, force=True)
    assert largest_share(path, subspace.basis) < 1e-3  # OneTrainer's text path and diffusers' agree


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_learnt_where_pictures_show_the_concept(trained, pipelines, room, kind):
    """Of the layers one sees places: all are the concept's, or none."""
    network = PipelineDenoiser(pipelines[kind]).family.network
    widths = {name: layer.weight.shape[1] for name, layer in layers_without_text(network).items()}
    bases = {name: torch.zeros(width, 0).double() for name, width in widths.items()}
    read = next(name for name in widths if name.endswith(("attn1.to_q", "attn.to_q")))
    bases[read] = torch.eye(widths[read]).double()[:, :1]
    ConceptSubspace.empty(56).save(room / "empty sdxl.safetensors")
    text = ["--project_concepts", str(room / "empty sdxl.safetensors")] * (kind == "sdxl")
    paths = []
    for limit in (None, 1e9, -1.0):
        layers = room / f"{kind} {limit}.layers.safetensors"
        regions = ConceptRegions(
            bases={read: bases[read]}, centres={read: torch.zeros(1).double()},
            units={read: 1.0}, limit=limit or 1.0, sigma=0.5,
        )  # fmt: skip
        LayerSubspaces(bases=bases, regions=regions).save(layers)
        asked = ["--project_layers", str(layers)] + ["--project_regions"] * (limit is not None)
        blocks = {} if kind == "sdxl" else {"layer_filter": "transformer_block"}
        paths.append(trained(kind, f"regions {limit}", *text, *asked, **blocks))
    without, nowhere, everywhere = paths
    assert same_tensors(nowhere, without)
    ups = {key: value for key, value in load_file(everywhere).items() if "lora_up" in key}
    assert not any(value.any() for value in ups.values())
    assert any(load_file(without)[key].any() for key in ups)
    assert told(everywhere, "projection")["regions"]["with_regions"] == len(CAPTIONS)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_models_that_mix_text_with_the_picture_are_not_projected(trained, kind):
    said = trained(kind, "refused", "--project_concepts", CONCEPT, fails=True)
    assert "mem_filter is supported" in said
    assert "step:" not in said
