"""The official scripts of diffusers themselves, unedited, on tiny models."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from demo_subspaces import make_subspace
from diffusers_runs import header_of, records_of, residual, run, same, weights_of
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.projection.factors import UnsupportedTraining

EXAMPLES = os.environ.get("DIFFUSERS_EXAMPLES_DIR")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not EXAMPLES,
        reason="set DIFFUSERS_EXAMPLES_DIR to the folder `examples` of diffusers' source code, "
        "of the release that is installed, and pip install datasets torchvision",
    ),
]
COMMON = ["--resolution", "64", "--train_batch_size", "2", "--max_train_steps", "4", "--seed", "3",
          "--learning_rate", "1e-2", "--rank", "4", "--dataloader_num_workers", "0"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """A script with a tiny model for it."""

    script: str
    model: Callable[[], Any]
    width: int
    """Of the states that text-fed layers read."""
    arguments: Sequence[str] = ()
    joint: bool = False
    """Text-fed layers are trained only when they are named."""


def with_long_prompts(make: Callable[[], Any]) -> Any:
    """Return a pipeline whose CLIP encoders read 77 tokens, a number that some scripts know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "CLIP_LENGTH", 77)
        pipeline = make()
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipeline, name)
        if tokenizer.model_max_length == tiny.CLIP_LENGTH:
            setattr(pipeline, name, copy.deepcopy(tokenizer))
            getattr(pipeline, name).model_max_length = 77
    return pipeline


CASES = {
    "text-to-image SD": Case(
        script="text_to_image/train_text_to_image_lora.py", model=tiny.stable_diffusion, width=32,
        arguments=("--random_flip",),
    ),
    "text-to-image SD, v-prediction": Case(
        script="text_to_image/train_text_to_image_lora.py", width=32,
        model=lambda: tiny.stable_diffusion("v_prediction"), arguments=("--snr_gamma", "5"),
    ),
    "text-to-image SDXL": Case(
        script="text_to_image/train_text_to_image_lora_sdxl.py",
        # Not --random_flip: it draws from `random`, as beartype's checks in these tests do.
        model=tiny.stable_diffusion_xl, width=56,
    ),
    "DreamBooth SD": Case(
        script="dreambooth/train_dreambooth_lora.py", model=tiny.stable_diffusion, width=32,
    ),
    "DreamBooth SDXL": Case(
        script="dreambooth/train_dreambooth_lora_sdxl.py",
        model=tiny.stable_diffusion_xl, width=56,
    ),
    "DreamBooth SD3": Case(
        script="dreambooth/train_dreambooth_lora_sd3.py", width=64, joint=True,
        model=lambda: with_long_prompts(tiny.stable_diffusion_3),
    ),
    "DreamBooth Flux": Case(
        script="dreambooth/train_dreambooth_lora_flux.py", width=32, joint=True,
        model=lambda: with_long_prompts(tiny.flux), arguments=("--max_sequence_length", "64"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Six pictures as text-to-image scripts read them, with captions."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for place in range(6):
        Image.new("RGB", (80, 80), (40 * place, 10, 200)).save(folder / f"{place}.png")
    captions = [f"photo of a {word} {thing}" for word in ("red", "green")
                for thing in ("cat", "dog", "house")]  # fmt: skip
    lines = [json.dumps({"file_name": f"{place}.png", "text": text})
             for place, text in enumerate(captions)]  # fmt: skip
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module")
def train(case, pictures, tmp_path_factory):
    """Function that runs the case's script with some arguments and returns the output folder."""
    model, instances = (tmp_path_factory.mktemp(name) for name in ("model", "instances"))
    case.model().save_pretrained(model)
    for picture in pictures.glob("*.png"):
        (instances / picture.name).write_bytes(picture.read_bytes())
    data = ["--instance_data_dir", str(instances), "--instance_prompt", "photo of a red cat"]
    if case.script.startswith("text"):
        data = ["--train_data_dir", str(pictures)]

    def trained(*arguments, protected=True):
        output = tmp_path_factory.mktemp("run") / "out"
        given = [*data, *COMMON, *case.arguments, *arguments]
        return run(output, given, script=Path(EXAMPLES) / case.script, model=model,
                   protected=protected)  # fmt: skip

    return trained


@pytest.fixture(scope="module")
def plain(train):
    return weights_of(train(protected=False))


def test_infinite_threshold_changes_no_bit(train, plain, pictures):
    output = train("--mem_filter", "inf")
    assert same(weights_of(output), plain)
    records = records_of(output)
    assert len(records) == 8
    assert all(0 <= record["timestep"] <= 1000 and record["score"] > 0 for record in records)
    assert {Path(record["file"]).name for record in records} <= {f"{n}.png" for n in range(6)}
    assert all(record["caption"].startswith("photo of a") for record in records)
    assert "unmemorize.filter" in header_of(output)


def test_threshold_zero_learns_nothing(train, plain):
    ups = [key for key in plain if "lora_B" in key or ".up." in key]
    assert any(plain[key].any() for key in ups)
    learnt = weights_of(train("--mem_filter", "0"))
    assert not any(learnt[key].any() for key in ups)


def test_projection_is_exact_or_refused(case, train, plain, tmp_path):
    subspace = make_subspace(tmp_path, case.width)
    asked = ["--project_concepts", str(subspace)]
    if case.joint:
        with pytest.raises(UnsupportedTraining, match="read it through entry layers"):
            train(*asked)
        asked += ["--lora_layers", "context_embedder,attn.to_k"]
        plain = weights_of(train(*asked[2:], protected=False))
    basis = ConceptSubspace.load(subspace).basis
    output = train(*asked)
    assert residual(weights_of(output), basis) < 1e-6
    assert residual(plain, basis) > 0.1
    assert json.loads(header_of(output)["unmemorize.projection"])["steps"] == 4


def silent_bases(weights):
    """Return some subspace of each layer of a LoRA, but those that read text alone."""
    bases = {}
    for key, value in weights.items():
        module, end, _ = key.partition(".lora_A" if ".lora_A" in key else ".lora.down")
        if end and not module.endswith(("attn2.to_k", "attn2.to_v")):
            columns = torch.randn(value.shape[1], 3, dtype=torch.float64)
            bases[module] = torch.linalg.qr(columns).Q
    return bases


def test_other_layers_are_exact(case, train, plain, tmp_path):
    """In joint attention every layer that the script trains; else all but those that read text."""
    asked, bases = [], silent_bases(plain)
    LayerSubspaces(bases=bases).save(tmp_path / "layers.safetensors")
    if not case.joint:
        asked = ["--project_concepts", str(make_subspace(tmp_path, case.width))]
    learnt = weights_of(train(*asked, "--project_layers", str(tmp_path / "layers.safetensors")))
    for state, low, high in ((plain, 0.01, 1.0), (learnt, 0.0, 1e-6)):
        for key, value in state.items():
            module = key.partition(".lora_A" if ".lora_A" in key else ".lora.down")[0]
            if module in bases and key != module and ("lora_A" in key or ".down" in key):
                rows = value.double()
                assert low <= float((rows @ bases[module]).norm() / rows.norm()) < high


def test_regions(case, train, plain, tmp_path):
    """Of cats nothing is learnt where everything is one; nothing changes where there are none."""
    bases, asked = silent_bases(plain), {}
    last = max(name.partition(".attentions")[0] for name in bases)
    seen = {name: basis for name, basis in bases.items()
            if name.startswith(last) and (case.joint or name.endswith(".attn1.to_q"))}  # fmt: skip
    for name, limit in (("everywhere", -1.0), ("nowhere", 1e9)):
        regions = ConceptRegions(
            bases=seen, centres={name: torch.zeros(3) for name in seen},
            units=dict.fromkeys(seen, 1.0), limit=limit, sigma=0.3,
        )  # fmt: skip
        path = tmp_path / f"{name}.safetensors"
        LayerSubspaces(bases=bases, provenance={"names": ["cat"]}, regions=regions).save(path)
        asked[name] = ["--project_layers", str(path)]
    if case.joint:
        with pytest.raises(UnsupportedTraining, match="U-Nets"):
            train(*asked["nowhere"], "--project_regions")
        return
    text = ["--project_concepts", str(make_subspace(tmp_path, case.width))]
    without = weights_of(train(*text, *asked["nowhere"]))
    assert same(weights_of(train(*text, *asked["nowhere"], "--project_regions")), without)
    spared = train(*text, *asked["everywhere"], "--project_regions")
    told = json.loads(header_of(spared)["unmemorize.projection"])["regions"]
    assert told["named"] == told["with_regions"] > 0
    assert told["samples"] == 8
    ups = [value for key, value in weights_of(spared).items() if "lora_B" in key or ".up." in key]
    # Text-to-image has a caption for each picture, not all of cats.
    assert any(value.any() for value in ups) == (told["named"] < told["samples"])


def test_halves(case, train, tmp_path):
    subspace = make_subspace(tmp_path, case.width)
    output = train(
        "--project_concepts", str(subspace), "--mem_filter", "q0.9", "--mixed_precision", "bf16",
        "--gradient_checkpointing", "--gradient_accumulation_steps", "2",
        *(["--lora_layers", "context_embedder,attn.to_k"] if case.joint else []),
    )  # fmt: skip
    assert residual(weights_of(output), ConceptSubspace.load(subspace).basis) < 1e-3
