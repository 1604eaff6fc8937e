"""Decides on OneTrainer's LoRA presets, in its folder."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

from configs_kinds import WORDS, Decision, reason
from modules.util.config.TrainConfig import TrainConfig
from unmemorize.trainer_patch.hooks import REFUSALS
from unmemorize.trainer_patch.onetrainer.checks import check_configuration
from unmemorize.trainer_patch.options import settings_from


def main() -> None:
    """Tell the decision on every preset."""
    asked = [settings_from({"mem_filter": "inf"}), settings_from({"project_concepts": WORDS})]
    for path in sorted(Path("training_presets").rglob("*.json")):
        held = json.loads(path.read_text("utf-8"))
        if held.get("training_method") != "LORA":
            continue
        plain = TrainConfig.default_values()
        # As its window takes its own presets: they have no version, and are of the present one.
        config = plain.from_dict({**held, "__version": plain.config_version})
        why = [
            reason(lambda each=each: check_configuration(config, each), REFUSALS)  # noqa: B023
            for each in asked
        ]
        Decision("OneTrainer", path.stem.lstrip("#"), str(config.model_type), *why).tell()


if __name__ == "__main__":
    main()
