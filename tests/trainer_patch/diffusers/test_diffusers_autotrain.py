"""A training script that somebody else wrote and published, on the demo model."""

import json
import shutil
from pathlib import Path

import diffusers_autotrain
import pytest
from demo_subspaces import WIDTH, make_regions, make_subspace
from diffusers_runs import header_of, records_of, residual, run, same, weights_of
from needs import skip_unless_ci
from unmemorize import demo
from unmemorize.shared.training.concept.subspace import ConceptSubspace

pytestmark = pytest.mark.slow
if not diffusers_autotrain.TREE.is_dir():
    skip_unless_ci(
        "needs AutoTrain's script: python "
        "tests/trainer_patch/diffusers/diffusers_autotrain.py fetch"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo model, its text encoder named as this script asks for it."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(demo.MODEL, folder)
    path = folder / "text_encoder" / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"architectures": ["CLIPTextModel"]}
    path.write_text(json.dumps(config), "utf-8")
    return folder


@pytest.fixture(scope="module")
def train(model, tmp_path_factory):
    """Function that trains with some arguments and returns the output folder."""
    from PIL import Image

    pictures = tmp_path_factory.mktemp("instances")
    for place in range(4):
        Image.new("RGB", (80, 80), (60 * place, 90, 100)).save(pictures / f"{place}.png")

    def trained(*arguments, protected=True):
        output = tmp_path_factory.mktemp("run") / "out"
        given = ["--instance_data_dir", str(pictures), "--instance_prompt", "a red star"]
        return run(output, [*given, *arguments], script=Path(diffusers_autotrain.__file__),
                   model=model, protected=protected)  # fmt: skip

    return trained


@pytest.fixture(scope="module")
def plain(train):
    return weights_of(train(protected=False))


@pytest.mark.parametrize("more", [(), ("--pre_compute_text_embeddings",)])
def test_infinite_threshold_changes_no_bit(train, plain, more):
    output = train("--mem_filter", "inf", *more)
    assert same(weights_of(output), plain)
    records = records_of(output)
    assert {Path(record["file"]).name for record in records} == {f"{n}.png" for n in range(4)}
    assert {record["caption"] for record in records} == {"a red star"}


def test_threshold_zero_learns_nothing(train, plain):
    ups = [key for key in plain if "lora_B" in key or ".up." in key]
    assert any(plain[key].any() for key in ups)
    learnt = weights_of(train("--mem_filter", "0"))
    assert not any(learnt[key].any() for key in ups)


def test_text_side_stays_outside_the_subspace(train, plain, tmp_path):
    subspace = make_subspace(tmp_path, WIDTH)
    output = train("--project_concepts", str(subspace))
    basis = ConceptSubspace.load(subspace).basis
    assert residual(weights_of(output), basis) < 1e-6
    assert residual(plain, basis) > 0.1
    assert json.loads(header_of(output)["unmemorize.projection"])["steps"] == 4


def test_nothing_is_learnt_where_everything_is_the_concept(train, tmp_path):
    subspace, regions = make_subspace(tmp_path, WIDTH), make_regions(tmp_path, -1.0)
    options = ("--project_concepts", str(subspace), "--project_layers", str(regions),
               "--project_regions")  # fmt: skip
    spared = train("--instance_prompt", "a red cat", *options)
    assert not any(value.any() for key, value in weights_of(spared).items() if "lora_B" in key)
    told = json.loads(header_of(spared)["unmemorize.projection"])["regions"]
    assert told["samples"] == told["named"] == told["with_regions"] > 0
    # Of a red star there is nothing to spare.
    assert same(weights_of(train(*options)), weights_of(train(*options[:-1])))
