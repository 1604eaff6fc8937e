"""The demo on a GPU in half precision: the processor's answers in float32 again, and how fast.

make gpu-check                               # on `cuda`, in float16 and in bfloat16
make gpu-check ARGS="--device cpu --small"   # without a GPU: checks the check
"""

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import unmemorize
from unmemorize import demo
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.config import DetectionConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "audit" / "lora"))
from small_audit import example_lora, write_drawings, write_others  # noqa: E402

DTYPES = ("float16", "bfloat16")
ON_THE_PROCESSOR = ("cpu", "float32")
NEAR, SAME = 0.05, 0.9
"""Most that a typical number may differ by, relative; least share of decisions that must agree.
Noise is drawn in the network's dtype, so that a half precision starts from other noise."""
FILTER = "x1.5"
Numbers = dict[str, list[float]]
"""What a part answers, by name; decisions are 0 and 1."""


@dataclass(kw_only=True)
class Place:
    """Where the parts run, and what they leave to each other."""

    device: str
    dtype: str
    small: bool
    folder: Path
    denoiser: PipelineDenoiser = field(init=False)
    calibration: Calibration = field(init=False)
    """Made by `detect`, used by `guard`."""

    def __post_init__(self) -> None:
        self.denoiser = load_denoiser(
            demo.MODEL, device=self.device, dtype=getattr(torch, self.dtype)
        )

    def prompts(self, few: int, many: int) -> list[str]:
        """Return as many planted captions as held-out ones."""
        groups: dict[str, list[str]] = {}
        for caption in demo.audited():
            groups.setdefault(caption.group, []).append(caption.text)
        count = few if self.small else many
        return groups["verbatim"][:count] + groups["held_out"][:count]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    part: str
    what: str
    dtype: str
    measure: str
    value: float
    good: bool
    seconds: tuple[float, float]
    """Of the whole part, on the processor and on the device."""


def detect(place: Place) -> Numbers:
    """Calibrate on the demo's controls, and score planted and held-out captions."""
    config = DetectionConfig(seeds=(0, 1) if place.small else (0, 1, 2, 3))
    controls = demo.controls()[::16] if place.small else demo.controls()
    rate = 0.1 if place.small else 0.01
    place.calibration = unmemorize.calibrate(
        place.denoiser, controls, config, false_positive_rate=rate
    )
    judge, texts = place.calibration.judge, place.prompts(4, 48)
    magnitudes = unmemorize.detect(place.denoiser, texts, config).scores
    flags = judge.flags(unmemorize.detect(place.denoiser, texts, config, basis=judge.basis).scores)
    return {"magnitudes": magnitudes.tolist(), "flagged": flags.double().tolist()}


def explain(place: Place) -> Numbers:
    """Rank words by leaving them out, and by a gradient through the text encoder."""
    found: Numbers = {"first words": [], "gradients": []}
    config = DetectionConfig(seeds=(0, 1))
    for prompt in place.prompts(1, 12):
        left_out = unmemorize.explain(place.denoiser, prompt, config)
        found["first words"] += [float(i == left_out.ranked[0]) for i in range(len(left_out.words))]
        gradients = unmemorize.explain(place.denoiser, prompt, config, method="input_gradient")
        found["gradients"] += [max(gradients.significance)]
    return found


def guard(place: Place) -> Numbers:
    """Sample a planted and a held-out caption under guard: which of them it acts on."""
    prompts, pipeline = place.prompts(1, 4), place.denoiser.pipeline
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator("cpu").manual_seed(seed) for seed in range(len(prompts))]
    with unmemorize.guard(pipeline, calibration=place.calibration) as guarded:
        pipeline(prompts, num_inference_steps=10, generator=seeds)
    (run,) = guarded.runs
    return {"acted on": [float(image.fired) for image in run.images]}


def audit(place: Place) -> Numbers:
    """Audit the LoRA of the example workflow with the drawings it was trained on."""
    folder = place.folder / "audit"
    folder.mkdir(parents=True)
    done = run_lora_audit(LoraAuditConfig(
        lora=example_lora(ROOT), images=write_drawings(ROOT, folder / "5_drawing"),
        held_out=write_others(folder / "others"), output=folder / "report",
        device=place.device, dtype=place.dtype, quick=True, attack_images=0,
        generation_steps=8 if place.small else 20, images_per_prompt=1 if place.small else 4,
    ))  # fmt: skip
    return {
        "came back": [float(verdict.verdict == "verbatim") for verdict in done.verdicts],
        "similarity": [verdict.similarity for verdict in done.verdicts],
    }


def train(place: Place) -> Numbers:
    """Train a LoRA under projection and filter, mixed precision on the device."""
    import peft

    denoiser = load_denoiser(demo.MODEL, device=place.device, dtype=getattr(torch, place.dtype))
    pipeline, captions = denoiser.pipeline, place.prompts(2, 4)
    unet, device = pipeline.unet, denoiser.device
    torch.manual_seed(0)
    unet.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    factors = [factor for factor in unet.parameters() if factor.requires_grad]
    for factor in factors:
        factor.data = factor.data.float()
    optimizer = torch.optim.AdamW(factors, lr=1e-3)
    text = denoiser.encode(captions).embeddings
    draws, scores = torch.Generator().manual_seed(0), []
    clean = torch.randn(len(captions), *denoiser.latent_shape, generator=draws)
    with (
        unmemorize.protect(
            pipeline, optimizer, output=place.folder / f"{place.dtype}.safetensors",
            captions=captions, mem_filter=FILTER, project_concepts="cat, kitten -> animal",
            project_force=True,
        ) as loop,
        torch.autocast(device.type, unet.dtype, enabled=unet.dtype != torch.float32),
    ):  # fmt: skip
        for _ in range(2 if place.small else 40):
            loop.samples = captions
            noise = torch.randn(clean.shape, generator=draws)
            times = torch.randint(600, 1000, (len(clean),), generator=draws)
            noisy = pipeline.scheduler.add_noise(clean, noise, times)
            inputs = [part.to(device, unet.dtype) for part in (noisy, noise)]
            output = unet(inputs[0], times.to(device), text).sample
            torch.nn.functional.mse_loss(output.float(), inputs[1].float()).backward()
            optimizer.step()
            optimizer.zero_grad()
            scores.append(loop.protection.scalars()["unmemorize/score"])
        worst = loop.protection.projection.verify()
    return {"filter's scores": scores, "projected": [float(worst < 1e-6)]}


PARTS: dict[str, Callable[[Place], Numbers]] = {
    "detect": detect, "explain": explain, "guard": guard, "audit": audit, "train": train,
}  # fmt: skip
"""In this order: a guard takes the calibration that detection makes."""


def compare(expected: Sequence[float], found: Sequence[float]) -> tuple[str, float, bool]:
    """Return how two answers are compared, the number, and whether it is good.

    Decisions are compared one by one, numbers by the median of their relative differences.
    """
    if len(expected) != len(found):
        return "answers", len(found) - len(expected), False
    if {*expected, *found} <= {0.0, 1.0}:
        share = sum(a == b for a, b in zip(expected, found, strict=True)) / len(expected)
        return "agree", share, share >= SAME
    differences = [abs(a - b) / max(abs(a), 1e-12) for a, b in zip(expected, found, strict=True)]
    typical = statistics.median(differences)
    return "differ by", typical, typical <= NEAR


def timed(part: str, place: Place) -> tuple[Numbers, float]:
    """Return what a part answers, and how long it took; numbers on the CPU have been waited for."""
    start = time.perf_counter()
    return PARTS[part](place), time.perf_counter() - start


def check(device: str, dtypes: Sequence[str], parts: Sequence[str], *, small: bool) -> list[Row]:
    """Return every comparison of a device with the processor."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:

        def place(where: str, dtype: str) -> Place:
            return Place(device=where, dtype=dtype, small=small, folder=Path(folder) / dtype)

        reference = place(*ON_THE_PROCESSOR)
        answers = {part: timed(part, reference) for part in parts}
        for dtype in dtypes:
            here = place(device, dtype)
            for part, (expected, slow) in answers.items():
                found, fast = timed(part, here)
                for what, numbers in expected.items():
                    measure, value, good = compare(numbers, found[what])
                    rows.append(Row(part=part, what=what, dtype=dtype, measure=measure,
                                    value=value, good=good, seconds=(slow, fast)))  # fmt: skip
    return rows


def table(rows: Sequence[Row], machine: Mapping[str, str]) -> str:
    """Return the comparisons as a table of markdown, under what they were made on."""
    lines = [", ".join(f"{name} {value}" for name, value in machine.items()), ""]
    lines += ["| part | answer | in | | | seconds, CPU | seconds, device |", "|---" * 7 + "|"]
    for row in rows:
        slow, fast = row.seconds
        lines.append(
            f"| {row.part} | {row.what} | {row.dtype} | {row.measure} {row.value:.3g} | "
            f"{'good' if row.good else 'NOT GOOD'} | {slow:.1f} | {fast:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, and return 1 where an answer is another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--small", action="store_true", help="a few prompts and steps")
    asked = parser.parse_args(arguments)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --small checks the check itself")
    if "guard" in asked.only and "detect" not in asked.only:
        parser.error("guard needs the calibration that detect makes: name both")
    gpu = asked.device.startswith("cuda")
    machine = {
        "device": torch.cuda.get_device_name(asked.device) if gpu else platform.machine(),
        "torch": torch.__version__,
        "sizes": "small" if asked.small else "whole",
    }
    parts = [part for part in PARTS if part in asked.only]
    rows = check(asked.device, asked.dtypes, parts, small=asked.small)
    print(table(rows, machine))
    return 0 if all(row.good for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
