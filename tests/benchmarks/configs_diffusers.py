"""Decides on the LoRA commands in the READMEs of diffusers' examples, by its real classes."""

import re
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))

import tiny
import tiny_families
from configs_kinds import Decision, reason
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.trainer_patch.diffusers.data import EmptyPrompt
from unmemorize.trainer_patch.diffusers.launch import UNSUPPORTED, _validate_arguments
from unmemorize.trainer_patch.diffusers.loop import faults_of
from unmemorize.trainer_patch.hooks import REFUSALS, refuse
from unmemorize.trainer_patch.options import settings_from

SCRIPTS = {
    "lora": "sd1", "lora_sdxl": "sdxl", "lora_sd3": "sd3", "lora_flux": "flux",
    "lora_flux_kontext": "flux_kontext", "lora_flux2": "flux2", "lora_flux2_klein": "flux2_klein",
    "lora_flux2_img2img": "flux2", "lora_hidream": "hidream_image",
    "lora_lumina2": "lumina2", "lora_qwen_image": "qwen_image", "lora_sana": "sana",
    "lora_z_image": "z_image",
}  # fmt: skip
"""By what ends a script's name, the family that it trains."""
LAYERS = ["to_k", "to_q", "to_v", "to_out.0"]
"""That the scripts train by default."""


def commands() -> Iterator[tuple[str, str, dict[str, object]]]:
    """Yield name, family and arguments of every documented command."""
    for folder in ("dreambooth", "text_to_image"):
        for page in sorted(Path(folder).glob("README*.md")):
            text = page.read_text("utf-8").replace("\\\n", " ")
            found = re.findall(r"accelerate launch.*?train_\w*?(lora\w*)\.py(.*)", text)
            for number, (kind, typed) in enumerate(found, 1):
                given = re.findall(r"--(\w+)(?:[= ](\"[^\"]*\"|[^\s-]\S*))?", typed)
                values = {name: value.strip('"') or True for name, value in given}
                family = SCRIPTS.get(kind, kind.removeprefix("lora_"))
                yield f"{folder}/{page.stem} {number}", family, values


def start(family: str, given: dict[str, object], option: dict[str, str]) -> None:
    """Do what a training does between its arguments and its first step."""
    from peft import LoraConfig

    settings = settings_from(option)
    _validate_arguments(Namespace(**dict.fromkeys(UNSUPPORTED) | given), settings)
    pipeline = (tiny.PIPELINES.get(family) or getattr(tiny_families, family))()
    denoiser = PipelineDenoiser(pipeline)
    layers = given.get("lora_layers")
    targets = str(layers).split(",") if layers else LAYERS
    network = denoiser.family.network
    network.add_adapter(LoraConfig(r=4, target_modules=targets))
    refuse(faults_of(network, settings))
    if settings.filter:
        EmptyPrompt.of(denoiser)


def main() -> None:
    """Tell the decision on every command."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "concept.safetensors"
        ConceptSubspace.empty(32).save(path)
        for name, family, given in commands():
            if not (family in tiny.PIPELINES or hasattr(tiny_families, family)):
                Decision("diffusers", name, family, "unknown model", "unknown model").tell()
                continue
            asked = ({"mem_filter": "inf"}, {"project_concepts": str(path)})
            why = [
                reason(lambda each=each: start(family, given, each), REFUSALS)  # noqa: B023
                for each in asked
            ]
            Decision("diffusers", name, family, *why).tell()


if __name__ == "__main__":
    main()
