"""Decides on ai-toolkit's LoRA examples, in its folder, with its own classes of settings."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path.cwd()))

import yaml
from configs_kinds import WORDS, Decision, reason
from toolkit.config_modules import DatasetConfig, ModelConfig, NetworkConfig, TrainConfig
from unmemorize.trainer_patch.ai_toolkit.checks import (
    SECTION,
    check_configuration,
    check_model,
    check_section,
    settings_in,
)
from unmemorize.trainer_patch.hooks import REFUSALS

IMAGES_IN_TEXT = re.compile(r"^\s+self\.encode_control_in_text_embeddings = True", re.M)


def reads_images_as_text(arch: str) -> bool:
    """Return whether the class of an architecture says so: its module needs its own packages."""
    for path in Path("extensions_built_in").rglob("*.py"):
        text = path.read_text("utf-8")
        if re.search(rf"^\s+arch = \"{re.escape(arch)}\"", text, re.M):
            return bool(IMAGES_IN_TEXT.search(text))
    return False


def start(process: dict[str, Any], option: dict[str, str]) -> None:
    """Do what the training does before its first step, without a model."""
    asked = process | {"type": SECTION, SECTION: option}
    check_section(asked)
    settings = settings_in(asked[SECTION])
    model = ModelConfig(**process["model"])
    held = SimpleNamespace(
        accelerator=SimpleNamespace(distributed_type="NO", num_processes=1),
        network_config=NetworkConfig(**process["network"]),
        train_config=TrainConfig(**process["train"]), model_config=model,
        dataset_configs=[DatasetConfig(**each) for each in process["datasets"]],
        embed_config=process.get("embedding"), adapter_config=process.get("adapter"),
        decorator_config=process.get("decorator"),
    )  # fmt: skip
    check_configuration(held, settings)
    images = reads_images_as_text(model.arch)
    loaded = SimpleNamespace(
        x0_pred=False, encode_control_in_text_embeddings=images, is_flow_matching=True,
        prediction_type="epsilon",
    )  # fmt: skip
    check_model(loaded, settings)


def main() -> None:
    """Tell the decision on every example."""
    for path in sorted(Path("config/examples").glob("train_lora*.yaml")):
        try:
            process = yaml.safe_load(path.read_text("utf-8"))["config"]["process"][0]
        except yaml.YAMLError:
            why = "the file itself is no YAML"
            Decision("ai-toolkit", path.stem, f"{path.stem}, which is no YAML", why, why).tell()
            continue
        family = ModelConfig(**process["model"]).arch
        why = [
            reason(lambda each=each: start(process, each), REFUSALS)  # noqa: B023
            for each in ({"mem_filter": "inf"}, {"project_concepts": WORDS})
        ]
        Decision("ai-toolkit", path.stem, family, *why).tell()


if __name__ == "__main__":
    main()
