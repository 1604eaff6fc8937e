"""Regions of the concept in ai-toolkit: everywhere, nowhere, and in captions that do not name it.

The layers' subspaces are arbitrary: what is shown is what happens in the regions, and that they are
those which diffusers finds.
"""

from functools import partial
from pathlib import Path

import pytest
from ai_toolkit_lora import CACHED, MIXED, STEPS, USUAL, header, same_tensors, ups
from demo_subspaces import make_regions
from safetensors.torch import load_file
from unmemorize import demo
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.models.lora.layer_names import cores
from unmemorize.shared.training.layers.regions import looking
from unmemorize.shared.training.layers.subspaces import LayerSubspaces

pytestmark = pytest.mark.slow
EVERYWHERE, NOWHERE = -1.0, 1e9
"""Limits of scores, which are never negative."""
SOMEWHERE = 1.7
FROM = {"network": {"pretrained_lora_path": "WITHOUT"}}
ON_DISK = {"dataset": {"cache_latents_to_disk": True}}
HALF = ON_DISK | {"train": {"steps": 4}, "name": "regions again"}
JOBS = {
    "regions off": (None, (), {}),
    "everywhere": (EVERYWHERE, (), {}),
    "unlearnt": (EVERYWHERE, (), FROM),
    "nowhere": (NOWHERE, (), {}),
    "not named": (EVERYWHERE, ("quix",), {}),
    "sushi": (EVERYWHERE, ("sushi",), {}),
    "mixed off": (None, (), MIXED),
    "mixed nowhere": (NOWHERE, (), MIXED),
    "mixed everywhere": (EVERYWHERE, (), MIXED),
    "cached off": (None, (), CACHED),
    "cached nowhere": (NOWHERE, (), CACHED),
    "cached everywhere": (EVERYWHERE, (), CACHED),
    "regularized": (EVERYWHERE, (), {"datasets": "TWO"}),
    "somewhere": (SOMEWHERE, ("sushi",), ON_DISK),
    "regions half": (SOMEWHERE, ("sushi",), HALF),
    "regions again": (SOMEWHERE, ("sushi",), ON_DISK),
}
"""By name: where the regions are, without them None; whose they are; and what is unusual."""


@pytest.fixture(scope="session")
def layers(room):
    """Function that returns the file of the layers."""
    return partial(make_regions, room)


@pytest.fixture(scope="session")
def spared(run, room, layers):
    """Function that returns the LoRA of a job."""
    first = room / "regions off" / "regions off.safetensors"
    folders = [{"folder_path": str(room / "images"), "is_reg": each} for each in (False, True)]
    words = {"WITHOUT": str(first), "TWO": [USUAL["dataset"] | folder for folder in folders]}

    def filled(value):
        if isinstance(value, dict):
            return {key: filled(each) for key, each in value.items()}
        return words.get(value, value) if isinstance(value, str) else value

    jobs = {}
    for name, (limit, names, changed) in JOBS.items():
        asked = {
            "project_concepts": "EMPTY", "project_regions": limit is not None, "mem_filter": "inf",
            "project_layers": str(layers(NOWHERE if limit is None else limit, names)),
        }  # fmt: skip
        jobs[name] = asked, filled(changed)
    said = run(jobs)
    assert "Error running job" not in said, said[said.index("Error running job") :][:3000]
    return lambda name: room / name / f"{name}.safetensors"


def counts(path: Path) -> dict:
    return header(path)["unmemorize.projection"]["regions"]


def largest(path: Path) -> float:
    """Return the largest entry of any up factor, which all start at 0."""
    return max(float(up.abs().max()) for up in ups(path))


def test_every_other_layer_is_kept_off_its_own_subspace(spared, layers):
    bases = LayerSubspaces.load(layers(NOWHERE, ())).bases
    by_core = {cores(name)[0]: basis for name, basis in bases.items()}
    shares = []
    for key, value in load_file(spared("regions off")).items():
        layer, factor, _ = key.partition(".lora_down")
        if factor and (basis := by_core.get(cores(layer)[0])) is not None:
            rows = value.double().movedim(1, -1)
            shares.append(float((rows @ basis).norm() / rows.norm()))
    assert len(shares) > 100
    assert max(shares) < 1e-6


@pytest.mark.parametrize("kind", ["", "mixed ", "cached "])
def test_nothing_is_learnt_where_everything_is_the_concept(spared, kind):
    path = spared(f"{kind}everywhere")
    assert largest(path) == 0
    assert largest(spared("regions off")) > 1e-4
    assert counts(path) == {
        "samples": 2 * STEPS, "named": 2 * STEPS, "with_regions": 2 * STEPS, "share_of_places": 1,
    }  # fmt: skip


def test_the_target_there_is_without_the_lora(spared):
    """Were it the LoRA's own prediction, no gradient would move it."""
    before, after = load_file(spared("regions off")), load_file(spared("unlearnt"))
    assert max(float((after[k] - before[k]).abs().max()) for k in before if "lora_up" in k) > 1e-3


@pytest.mark.parametrize("kind", ["", "mixed ", "cached "])
def test_no_bit_changes_where_nothing_shows_the_concept(spared, kind):
    before = spared(f"{kind or 'regions '}off")
    for name in (f"{kind}nowhere", "not named")[: 1 if kind else 2]:
        assert same_tensors(spared(name), before)
        assert counts(spared(name))["with_regions"] == 0
    assert largest(before) > 1e-4


def test_only_samples_that_name_the_concept_are_spared(spared):
    path = spared("sushi")
    assert largest(path) > 1e-4
    assert not same_tensors(path, spared("regions off"))
    assert counts(path) == {"samples": 12, "named": 3, "with_regions": 3, "share_of_places": 1}


def test_regularization_images_are_left_alone(spared):
    path = spared("regularized")
    assert largest(path) > 1e-4
    assert 0 < counts(path)["samples"] < header(path)["unmemorize.filter"]["seen"]


def test_places_are_those_that_diffusers_finds_and_a_resumed_training_counts_on(
    spared, room, layers
):
    """One picture names the concept; it is looked at with the same noise in each of its visits."""
    whole = counts(spared("somewhere"))
    [file] = (room / "somewhere images").rglob("0_*.safetensors")
    latents = load_file(file)["latent"][None]
    denoiser = load_denoiser(demo.MODEL)
    regions = LayerSubspaces.load(layers(SOMEWHERE, ("sushi",))).regions
    found = regions.find(denoiser.family.network, looking(denoiser, regions.sigma), latents)
    share = float(found.float().mean())
    assert 0.02 < share < 0.98
    assert whole == {"samples": 12, "named": 3, "with_regions": 3,
                     "share_of_places": pytest.approx(share)}  # fmt: skip
    assert counts(spared("regions again")) == whole
