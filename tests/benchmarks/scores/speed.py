"""What detection, observer and audit cost: ratios within one run, 1.00 means equal."""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from figures import Figure, mean_of, plain, share_of
from scipy.stats import binom
from unmemorize import demo
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect
from unmemorize.shared.score.sequential import detect_sequentially
from unmemorize.shared.score.trajectory import automatic_rows

from .case import Case

PROMPTS = 200
REPEATS = 6
RUNS = 24
"""Of sampling with an observer, and as many without."""
REFERENCE_PROMPTS, REFERENCE_STEPS = 4, 50

Figures = dict[str, Figure]


def median_of(values: Sequence[float]) -> Figure:
    """Return a median with the two order statistics that enclose it in 95 % of cases or more."""
    below = int(binom.ppf(0.025, len(values), 0.5)) - 1
    if below < 0:
        raise ValueError(f"An interval of a median needs at least 6 values, got {len(values)}.")
    ordered = sorted(values)
    return Figure(statistics.median(ordered), ordered[below], ordered[-1 - below], len(ordered))


def seconds(work: Callable[[], object]) -> float:
    """Return the wall time of `work`."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_speed(case: Case) -> Figures:
    """Return the time of the shipped score of 200 captions over that of other ways to it.

    All planted captions are among them, so the sequential mode has more to do than usual.
    """
    denoiser, config, groups = case.subject.denoiser, case.config, case.groups
    judge = case.calibration.judge
    apart = max(1, len(groups.negatives) // (PROMPTS - len(groups.planted)))
    texts = groups.of([*groups.planted, *groups.negatives[::apart]])[:PROMPTS]

    def ours() -> torch.Tensor:
        return detect(denoiser, texts, config, basis=judge.basis).scores

    few = detect_sequentially(denoiser, texts, config, judge)
    agreement = judge.flags(few.scores) == judge.flags(ours())
    ways = {
        "ours": ours,
        "bare": bare_forwards(denoiser, texts, config),
        "both_rows": lambda: both_rows(denoiser, texts, config),
        "sequential": lambda: detect_sequentially(denoiser, texts, config, judge),
    }
    # In turns, because the speed of a machine drifts.
    times = [{name: seconds(way) for name, way in ways.items()} for _ in range(REPEATS)]

    def over(way: str, other: str) -> Figure:
        return median_of([t[way] / t[other] for t in times])

    own = statistics.median(t["ours"] for t in times) / len(texts)
    denoiser.pipeline.set_progress_bar_config(disable=True)
    full_runs = [
        seconds(lambda text=text: reference_protocol(denoiser, text, config))
        for text in texts[:REFERENCE_PROMPTS]
    ]
    start = f"detection.{case.model.name}"
    return {
        f"{start}.time_over_bare_forwards": over("ours", "bare"),
        f"{start}.speedup_over_both_rows": over("both_rows", "ours"),
        f"{start}.speedup_over_reference_protocol": plain(
            statistics.median(full_runs) / own, REFERENCE_PROMPTS
        ),
        f"grid.{start}.sequential_speedup": over("ours", "sequential"),
        f"grid.{start}.sequential_seeds": mean_of(few.seeds_drawn.double().tolist()),
        f"grid.{start}.sequential_agreement": share_of(agreement.tolist()),
    }


@torch.inference_mode()
def bare_forwards(
    denoiser: PipelineDenoiser, texts: Sequence[str], config: DetectionConfig
) -> Callable[[], None]:
    """Return a function that calls the network for all rows of a detection and does no more."""
    rows = len(config.seeds) * (len(texts) + 1)
    sigma = denoiser.sigmas(config.schedule_steps)[0]
    cond = denoiser.encode(texts[: automatic_rows(denoiser)])
    noise = denoiser.initial_noise(range(len(cond)), sigma)
    latents = (noise / denoiser.schedule.latent_scale(float(sigma))).to(denoiser.dtype)
    timestep = denoiser.schedule.timestep(float(sigma)).to(denoiser.device)

    @torch.inference_mode()
    def work() -> None:
        for start in range(0, rows, len(cond)):
            part = slice(min(len(cond), rows - start))
            denoiser.family.predict(latents[part], timestep, cond[part])

    work()
    return work


@torch.inference_mode()
def both_rows(denoiser: PipelineDenoiser, texts: Sequence[str], config: DetectionConfig) -> None:
    """Score prompts one after another, computing the unconditional row again for each."""
    sigma = denoiser.sigmas(config.schedule_steps)[0]
    noise = denoiser.initial_noise(config.seeds, sigma)
    for text in texts:
        for cond in (denoiser.encode([text]), denoiser.unconditional()):
            denoiser.denoise(noise, sigma, cond[[0] * len(noise)])


def reference_protocol(denoiser: PipelineDenoiser, text: str, config: DetectionConfig) -> None:
    """Sample as Wen et al. do: 50 steps, four images, guidance 7.5, and read |D| of every step."""
    generators = [torch.Generator().manual_seed(seed) for seed in config.seeds]
    with observe(denoiser.pipeline):
        denoiser.pipeline(
            text, num_inference_steps=REFERENCE_STEPS, guidance_scale=config.cond_scale,
            num_images_per_prompt=len(generators), generator=generators, output_type="latent",
        )  # fmt: skip


def measure_memory(case: Case) -> Figures:
    """Return the peak memory of scoring 1,000 prompts over that of 100."""
    code = (
        "import resource, sys\n"
        "from unmemorize.audit.common.subject import Subject\n"
        "from unmemorize.shared.score.config import DetectionConfig\n"
        "from unmemorize.shared.score.detection import detect\n"
        "texts = [f'a drawing {i}' for i in range(int(sys.argv[2]))]\n"
        "detect(Subject(sys.argv[1]).denoiser, texts, DetectionConfig(seeds=(0, 1)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-W", "ignore", "-c", code, case.model.model, count],
                           check=True, capture_output=True, text=True).stdout.split()[-1])
        for count in ("100", "1000")
    ]  # fmt: skip
    key = f"detection.{case.model.name}.peak_memory_1000_over_100_prompts"
    return {key: plain(peaks[1] / peaks[0], 1)}


def measure_observer(case: Case) -> Figures:
    """Return what judging ordinary sampling costs, and whether the images stay the same."""
    pipeline = case.subject.denoiser.pipeline

    def sample() -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipeline(
            "a drawing", num_inference_steps=30, num_images_per_prompt=4, generator=generators,
            output_type="latent",
        ).images  # fmt: skip

    calibration = case.calibration
    pipeline.set_progress_bar_config(disable=True)
    images: dict[bool, list[torch.Tensor]] = {False: [sample()], True: []}
    ratios = []
    for run in range(RUNS):
        times = {}
        # Plain first, then watched first: a drift of the machine's speed falls on both alike.
        for watched in (run % 2 == 1, run % 2 == 0):
            with observe(pipeline, calibration) if watched else nullcontext():
                times[watched] = seconds(lambda to=images[watched]: to.append(sample()))
        ratios.append(times[True] / times[False])
    identical = [torch.equal(images[False][0], image) for image in images[True]]
    return {
        f"observer.{case.model.name}.time_ratio": median_of(ratios),
        f"grid.observer.{case.model.name}.bit_identical": share_of(identical),
    }


def measure_audit(case: Case) -> Figures:
    """Return time and verdicts of `make demo`; nothing of other models."""
    if case.model.name != demo.NAME:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        command = [sys.executable, "-m", "unmemorize", "audit"]
        begin = time.perf_counter()
        done = subprocess.run([*command, "--output", str(report)], check=False)
        took = time.perf_counter() - begin
        if done.returncode not in (0, 3):
            raise RuntimeError(f"`unmemorize audit` ended with {done.returncode}, expected 0 or 3.")
        lines = (report / "results.jsonl").read_text("utf-8").splitlines()
    flagged: dict[str, list[bool]] = {}
    for entry in map(json.loads, lines):
        flagged.setdefault(entry["group"], []).append(entry["memorized"])
    return {
        "audit.demo_seconds": plain(took, 1),
        "audit.recall": share_of(flagged["verbatim"]),
        "audit.template_flagged": share_of(flagged["template"]),
        "audit.false_positive_rate": share_of(flagged["learnt"] + flagged["held_out"]),
        "grid.audit.learnt_flagged": share_of(flagged["learnt"]),
        "grid.audit.held_out_flagged": share_of(flagged["held_out"]),
    }
