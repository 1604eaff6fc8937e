"""What works on which family of pipelines, found by running it, and written to docs/models.md.

Every family is built at tiny size of its real classes with random weights, so a cell says that the
code fits the architecture; how well something is found or stopped is measured elsewhere.

    python tests/benchmarks/matrix.py [--families NAME ...]

Exit code 1: an entry got worse; the family's row then stays as it was.
"""

import argparse
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "shared"))

import tiny  # noqa: E402
import tiny_families  # noqa: E402
from unmemorize.shared.mitigation import METHODS, make_method  # noqa: E402
from unmemorize.shared.models.adapter import PipelineDenoiser  # noqa: E402
from unmemorize.shared.models.calibrate import calibrate  # noqa: E402
from unmemorize.shared.models.calls.hold import accepted  # noqa: E402
from unmemorize.shared.models.lora.attach import load_lora  # noqa: E402
from unmemorize.shared.sampling.guard import guard  # noqa: E402
from unmemorize.shared.sampling.observer import observe  # noqa: E402
from unmemorize.shared.score.config import DetectionConfig  # noqa: E402
from unmemorize.shared.score.detection import detect  # noqa: E402
from unmemorize.shared.words.explanation import explain  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
WORKS = "works"
PROMPTS = ["a red cat on the mat", "tall tree"]
CONTROLS = ["sea", "a mat on the tree", "dog and cat", "green house", "a photo of sea", "cat"]
CONFIG = DetectionConfig(seeds=(0, 1))
FAMILIES = {**tiny.PIPELINES, **tiny_families.IMAGES, **tiny_families.VIDEOS}
SETTINGS: dict[str, dict[str, Any]] = {
    "embedding": {"iterations": 1}, "initial_noise": {"iterations": 1},
    "ordinary": {"iterations": 1},
}  # fmt: skip
"""One iteration shows whether a method runs."""


class Refused(Exception):
    """Something was refused with a reason, or did not do what it is for."""


class Family:
    """One family at tiny size, and its cells."""

    def __init__(self, name: str):
        self.frames = tiny_families.FRAMES if name in tiny_families.VIDEOS else None
        self.pipeline = FAMILIES[name]()
        self.denoiser = PipelineDenoiser(
            self.pipeline, resolution=tiny.RESOLUTION, frames=self.frames
        )
        self._calibration: Any = None

    def run(self, prompts: list[str] = PROMPTS) -> Any:
        """Return latents of a guided run of two images."""
        family = self.denoiser.family
        given = family.guided_arguments(3.0, 2) | {
            "prompt": list(prompts), "num_inference_steps": 2, "output_type": "latent",
            "generator": [torch.Generator("cpu").manual_seed(seed) for seed in (0, 1)],
        }  # fmt: skip
        if family.guidance_distilled and family.guidance.negative:
            given |= {family.guidance.scale: 3.0, "negative_prompt": ["", ""]}
        output = self.pipeline(**accepted(self.pipeline, given))
        return output.images if hasattr(output, "images") else output.frames

    def detect(self) -> None:
        """Score two prompts."""
        scores = detect(self.denoiser, PROMPTS, CONFIG).scores
        if not scores.isfinite().all() or scores[0] == scores[1]:
            raise Refused(f"scores {scores.tolist()}")

    def explain(self) -> None:
        """Find the words of a prompt."""
        found = explain(self.denoiser, PROMPTS[0], CONFIG)
        if len(found.significance) != 6:
            raise Refused(f"{len(found.significance)} words of 6")

    def observe(self) -> None:
        """Read scores of a run, whose images must stay."""
        plain = self.run()
        with observe(self.pipeline) as record:
            observed = self.run()
        if not torch.equal(plain, observed):
            raise Refused("the images change")
        if not record.runs[0].measurable:
            raise Refused(record.runs[0].reason)

    def guard(self, name: str) -> None:
        """Let a method act on a run."""
        settings = dict(SETTINGS.get(name, {}))
        if name == "neighbour":
            settings["latents"] = torch.randn(1, *self.denoiser.latent_shape)
        if self._calibration is None:
            self._calibration = calibrate(self.denoiser, CONTROLS, CONFIG, false_positive_rate=0.2)
        method, calibration = make_method(name, **settings), self._calibration
        with guard(self.pipeline, method=method, calibration=calibration, gate="always") as record:
            guarded = self.run(PROMPTS[:1] * 2)
        if not all(image.fired for image in record.runs[0].images):
            raise Refused("it did not act")
        if not torch.isfinite(guarded).all():
            raise Refused("the images are not finite")

    def lora_audit(self) -> None:
        """Put a LoRA on, draw with it and without, bring images to latents and back."""
        from peft import LoraConfig

        if not hasattr(self.pipeline, "save_lora_weights"):
            raise Refused(f"diffusers loads no LoRA into a {type(self.pipeline).__name__}")
        network = self.denoiser.family.network
        layers = [
            name for name, layer in network.named_modules()
            if isinstance(layer, torch.nn.Linear) and re.search(r"to_[qkv]$|to_out\.0$|attn", name)
        ]  # fmt: skip
        config = LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        network.add_adapter(config)
        with tempfile.TemporaryDirectory() as folder:
            self.pipeline.save_lora_weights(folder, **{
                f"{self.denoiser.family.network_name}_lora_layers": _lora_of(network)
            })  # fmt: skip
            network.delete_adapters(["default"])
            load_lora(self.pipeline, next(Path(folder).iterdir()), 1.0)
        images = self._drawn()
        with self.denoiser.lora_disabled():
            without = self._drawn()
        if [i.tobytes() for i in images] == [i.tobytes() for i in without]:
            raise Refused("the LoRA changes nothing")
        if not self.denoiser.decode(self.denoiser.encode_images(images)).isfinite().all():
            raise Refused("images do not come back from latents")

    def _drawn(self) -> list[Any]:
        """Return images by the audit's way of drawing; of clips all frames."""
        if not self.denoiser.family.video:
            return self.denoiser.generate(PROMPTS, (0, 1), steps=1)
        clips = self.denoiser.generate_clips(PROMPTS, (0, 1), 1, 5.0)
        return [frame for clip in clips for frame in clip]


def _lora_of(network: Any) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(network)


def cells(name: str) -> dict[str, str]:
    """Return what each column says of a family."""
    family = Family(name)
    actions: dict[str, Callable[[], None]] = {
        "detect": family.detect, "explain": family.explain, "observe": family.observe,
    }  # fmt: skip
    for method in METHODS:
        actions[f"guard: {method}"] = lambda method=method: family.guard(method)
    actions["LoRA audit"] = family.lora_audit
    found = {}
    for column, action in actions.items():
        try:
            action()
            found[column] = WORKS
        except (ValueError, Refused) as error:
            found[column] = f"refused: {_short(error)}"
        except Exception as error:  # what nobody thought of is a fault, and stands there as one
            found[column] = f"fails: {type(error).__name__}: {_short(error)}"
    return found


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    return text if len(text) < 200 else text[:197] + "..."


def page(rows: dict[str, dict[str, str]]) -> str:
    """Return docs/models.md."""
    columns = list(next(iter(rows.values())))
    notes: list[str] = []

    def cell(text: str) -> str:
        if text == WORKS:
            return WORKS
        if text not in notes:
            notes.append(text)
        return f"[{text.split(':')[0]}](#note-{notes.index(text) + 1})"

    table = [
        f"| {name} | " + " | ".join(cell(row[column]) for column in columns) + " |"
        for name, row in rows.items()
    ]
    return "\n".join([
        "# Models", "",
        "Written by `make matrix`, which builds each family of pipelines at tiny size, of its real",
        "classes with random weights, and runs every column on it. *works* says that the code fits",
        "the architecture, and not how well something is found or stopped; *refused* and *fails*",
        "lead to the message. The column *LoRA audit* runs the audit's parts that depend on the",
        "family: the LoRA read, switched off and on, images drawn, brought to latents and back.",
        "A diffusers pipeline that is not listed is tried: it is followed when it passes the check",
        "of `shared/models/families/undeclared.py`, and else refused with the reason.", "",
        "| family | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|", *table, "", "## Notes", "",
        *(f'{at}. <a id="note-{at}"></a>{note}' for at, note in enumerate(notes, 1)), "",
    ])  # fmt: skip


def read_page(text: str) -> dict[str, dict[str, str]]:
    """Return the rows of docs/models.md, with the notes in place of their numbers."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    notes = dict(re.findall(r'^\d+\. <a id="note-(\d+)"></a>(.*)$', text, re.M))

    def whole(cell: str) -> str:
        number = re.fullmatch(r"\[\w+\]\(#note-(\d+)\)", cell)
        return notes[number[1]] if number else cell

    return {
        name: dict(zip(lines[0][1:], map(whole, cells), strict=True)) for name, *cells in lines[1:]
    }


def worse(found: dict[str, str], before: dict[str, str]) -> list[str]:
    """Return what is worse than before: it worked, or was refused and fails."""
    return [
        f"{column}: {found[column]}"
        for column, was in before.items()
        if column in found and _rank(found[column]) > _rank(was)
    ]


def _rank(cell: str) -> int:
    """Return 0 for what works, 1 for what is refused, 2 for what fails."""
    return (WORKS, "refused", "fails").index(cell.split(":")[0])


def main() -> int:
    """Run the matrix, and write the rows in which nothing got worse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    chosen = parser.parse_args().families
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    lost = []
    for name in chosen:
        found = cells(name)
        # Read anew: another process may have written rows of other families meanwhile.
        rows = read_page(PAGE.read_text("utf-8")) if PAGE.exists() else {}
        print(name, {c: t for c, t in found.items() if t != WORKS}, flush=True)
        if faults := worse(found, rows.get(name, {})):
            lost += [f"{name}, {fault}" for fault in faults]
            continue
        rows[name] = found
        PAGE.write_text(page({key: rows[key] for key in FAMILIES if key in rows}), "utf-8")
    if lost:
        print("Worse than docs/models.md:", *lost, sep="\n  ")
    return bool(lost)


if __name__ == "__main__":
    sys.exit(main())
