"""What the options keep out of LoRAs that diffusers' and kohya's own scripts train.

The drawings and the judge are those of `trainers_projection`; the scripts come from checkouts, as
in the tests: DIFFUSERS_EXAMPLES_DIR; SD_SCRIPTS_DIR and SD_SCRIPTS_PYTHON, where unmemorize is
installed.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from demo_lora import BATCH, RATE
from figures import Figure, count_of, plain
from trainers_projection import CONCEPT, RANK, Trial
from unmemorize import demo
from unmemorize.demo.data import RESOLUTION
from unmemorize.shared.files.storage import Journal
from unmemorize.shared.models.load import load_denoiser

TRAINERS = Path(__file__).resolve().parents[1] / "trainer_patch"
WAYS = ("by_name", "by_paraphrase", "without_name", "by_attack")
LOSSES = ("rest", "content")


class Scripts:
    """A folder of marked drawings, and the commands that train on it."""

    def __init__(self, trial: Trial, room: Path, steps: int):
        self.room, self.steps = room, steps
        shutil.rmtree(room, ignore_errors=True)
        pictures = room / "set" / "1_drawings"  # kohya reads the parent, and the number in front
        pictures.mkdir(parents=True)
        lines = []
        for place, (image, caption) in enumerate(trial.drawings):
            image.save(pictures / f"{place}.png")
            (pictures / f"{place}.txt").write_text(caption, "utf-8")
            lines.append(json.dumps({"file_name": f"{place}.png", "text": caption}))
        (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        trial.layers.save(room / "layers.safetensors")
        # Names under which sd-scripts looks for tokenizers before it would fetch them.
        shutil.copytree(demo.MODEL / "tokenizer",
                        room / "tokenizers" / "openai_clip-vit-large-patch14")  # fmt: skip
        self.options = [
            "--project_concepts", f"{', '.join(CONCEPT.names)} -> {CONCEPT.neutral}",
            "--project_layers", str(room / "layers.safetensors"),
            "--project_regions", "--project_force",
        ]  # fmt: skip

    def diffusers(self, output: Path, seed: int, *, protected: bool) -> Path:
        """Train with diffusers' text-to-image script and return the LoRA."""
        script = Path(os.environ["DIFFUSERS_EXAMPLES_DIR"]).expanduser()
        script = script / "text_to_image" / "train_text_to_image_lora.py"
        start = ["-m", "unmemorize.trainer_patch.diffusers"] if protected else []
        self._run([sys.executable, *start, str(script)], {
            "train_data_dir": self.room / "set" / "1_drawings", "resolution": RESOLUTION,
            "rank": RANK, "output_dir": output, "lr_warmup_steps": 0,
            "checkpointing_steps": 2 * self.steps, "dataloader_num_workers": 0,
        }, seed, protected)  # fmt: skip
        return output / "pytorch_lora_weights.safetensors"

    def kohya(self, output: Path, seed: int, *, protected: bool) -> Path:
        """Train with sd-scripts' `train_network.py` and return the LoRA."""
        python = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
        small = TRAINERS / "kohya" / "small_sd_scripts.py"  # its networks' widths are constants
        door = "door" if protected else "script"
        self._run([python, str(small), door, "train_network.py"], {
            "train_data_dir": self.room / "set", "caption_extension": ".txt",
            "resolution": RESOLUTION, "output_dir": output, "output_name": "lora",
            "network_module": "networks.lora", "network_dim": RANK, "network_alpha": RANK,
            "network_train_unet_only": True, "optimizer_type": "AdamW", "save_precision": "float",
            "cache_latents": True, "max_data_loader_n_workers": 0, "sdpa": True,
            "tokenizer_cache_dir": self.room / "tokenizers",
        }, seed, protected, Path(os.environ["SD_SCRIPTS_DIR"]).expanduser())  # fmt: skip
        return output / "lora.safetensors"

    def _run(
        self, start: list[str], own: Mapping[str, object], seed: int, protected: bool,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        settings = own | {
            "pretrained_model_name_or_path": demo.MODEL, "train_batch_size": BATCH,
            "max_train_steps": self.steps, "learning_rate": RATE, "lr_scheduler": "cosine",
            "mixed_precision": "no", "seed": seed,
        }  # fmt: skip
        for key, value in settings.items():
            start += [f"--{key}"] if value is True else [f"--{key}", str(value)]
        if protected:
            start += self.options
        subprocess.run(start, cwd=folder, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def measure_scripts(
    denoiser, found: dict[str, Figure], *, steps: int, seeds: int, work: Path
) -> None:
    """Print how often the mark comes from LoRAs of the scripts that are there, and losses.

    What was trained and judged before lies in `work` and is not done again.
    """
    given = {"diffusers": "DIFFUSERS_EXAMPLES_DIR", "kohya": "SD_SCRIPTS_DIR"}
    for name, variable in given.items():
        if variable not in os.environ:
            print(f"\n{name}'s script is not run: set {variable} to its folder")
    work = work.resolve()  # sd-scripts runs in its own folder
    journal = Journal(work / f"scripts-{steps}.jsonl")
    trial = Trial(denoiser, work)
    scripts = Scripts(trial, work / "scripts", steps)
    rows = [(name, arm) for name, variable in given.items() if variable in os.environ
            for arm in ("none", "options")]  # fmt: skip
    for name, arm in rows:
        for seed in range(seeds):
            key = f"{name}.{arm}.seed{seed}"
            if key not in journal:
                output = work / "scripts" / key
                path = getattr(scripts, name)(output, seed, protected=arm == "options")
                trial.denoiser = load_denoiser(demo.MODEL, lora=path)
                journal.put(key, trial.judge())
    print(f"\n{'script':<11}{'arm':<9}" + "".join(f"{way:>15}" for way in (*WAYS, *LOSSES)))
    count = len(trial.rest.captions) * seeds
    for name, arm in rows:
        lines = [journal.get(f"{name}.{arm}.seed{seed}") for seed in range(seeds)]
        means = {way: sum(line[way] for line in lines) / seeds for way in (*WAYS, *LOSSES)}
        start = "" if arm == "options" else "rivals."
        found |= {
            f"{start}trainers.scripts.{name}.{arm}.{key}": (
                count_of(round(mean * count), count) if key in WAYS else plain(mean, seeds)
            )
            for key, mean in means.items()
        }
        print(f"{name:<11}{arm:<9}" + "".join(f"{mean:>15.4f}" for mean in means.values()))
