"""Figures of detection, observer and audit on the demo model: ``make bench NAME=detection``.

Prints tables and writes bench.json. Times are ratios within this one run; 1.00 means equal.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score, roc_curve
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.demo import data
from unmemorize.shared.models.load import load_denoiser, model_fingerprint
from unmemorize.shared.sampling.observer import observe
from unmemorize.shared.score.calibration import Calibration, settings_of
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection, detect
from unmemorize.shared.score.sequential import detect_sequentially

REFERENCE_STEPS = 50
TIMED_PROMPTS = 200


def tpr_at(rate: float, truth: Sequence[bool], scores: Sequence[float]) -> float:
    """Return the true-positive rate at the last threshold with at most `rate` false positives."""
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    return float(tpr[fpr <= rate].max())


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Return the median wall time of `work`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def timed_captions() -> list[data.Caption]:
    """Return 200 captions: all verbatim ones, the rest learnt and held out in equal parts."""
    groups = {g: [c for c in demo.audited() if c.group == g] for g in data.GROUPS}
    half = (TIMED_PROMPTS - len(groups["verbatim"])) // 2
    return groups["verbatim"] + groups["learnt"][:half] + groups["held_out"][:half]


@torch.inference_mode()
def bare_forwards(denoiser, rows: int, batch: int) -> float:
    """Return the seconds that `rows` rows take in the network alone, `batch` rows at a time."""
    unet = denoiser.pipeline.unet
    latents = torch.randn(batch, *denoiser.latent_shape)
    embeddings = denoiser.encode(["a drawing"] * batch).embeddings
    unet(latents, 981, embeddings)

    def work() -> None:
        for start in range(0, rows, batch):
            count = min(batch, rows - start)
            unet(latents[:count], 981, embeddings[:count])

    return seconds(work)


@torch.inference_mode()
def both_rows(denoiser, prompts: Sequence[str], config: DetectionConfig) -> None:
    """Score prompts one after another, computing the unconditional row again for each."""
    sigma = denoiser.sigmas(config.schedule_steps)[0]
    noise = denoiser.initial_noise(config.seeds, sigma)
    for prompt in prompts:
        cond, empty = denoiser.encode([prompt]), denoiser.unconditional()
        rows = [0] * len(noise)
        x0_uncond = denoiser.denoise(noise, sigma, empty[rows])
        x0_cond = denoiser.denoise(noise, sigma, cond[rows])
        (x0_uncond - x0_cond).flatten(1).norm(dim=1)


def reference_protocol(denoiser, prompts: Sequence[str], config: DetectionConfig) -> torch.Tensor:
    """Return [prompt seed step] |D| of full sampling: 50 steps, 4 images, guidance 7.5."""
    traces = []
    for prompt in tqdm(prompts, "reference protocol"):
        generators = [torch.Generator().manual_seed(seed) for seed in config.seeds]
        with observe(denoiser.pipeline) as record:
            denoiser.pipeline(
                prompt, num_inference_steps=REFERENCE_STEPS, guidance_scale=config.cond_scale,
                num_images_per_prompt=len(config.seeds), generator=generators, output_type="latent",
            )  # fmt: skip
        traces.append(torch.as_tensor(record.runs[0].l2))
    return torch.stack(traces)


def measure_accuracy(denoiser, bench: dict) -> None:
    """Print AUC and TPR at 1 % FPR of one step, by group and number of seeds."""
    config = DetectionConfig()
    captions = demo.audited()
    found = detect(denoiser, [c.text for c in captions], config)
    print("\nagainst learnt + held out, one step")
    print(f"{'positives':<12}{'seeds':>6}{'AUC':>8}{'TPR@1%FPR':>11}")
    for group in ("verbatim", "template"):
        kept = [i for i, c in enumerate(captions) if c.group in (group, "learnt", "held_out")]
        truth = [captions[i].group == group for i in kept]
        for seeds in (1, 4):
            scores = found.traces[kept, :seeds].mean((1, 2)).tolist()
            auc, tpr = roc_auc_score(truth, scores), tpr_at(0.01, truth, scores)
            print(f"{group:<12}{seeds:>6}{auc:>8.4f}{tpr:>11.3f}")
            suffix = "" if seeds == 4 else "_one_seed"
            prefix = "detection." if group == "verbatim" else "detection.template."
            bench |= {f"{prefix}auc{suffix}": auc, f"{prefix}tpr_at_1pct_fpr{suffix}": tpr}


def measure_speed(denoiser, bench: dict) -> None:
    """Print the time of 200 prompts relative to bare forwards, both rows, and full sampling."""
    config, captions = DetectionConfig(), timed_captions()
    prompts, truth = [c.text for c in captions], [c.group == "verbatim" for c in captions]
    detect(denoiser, prompts[:8], config)
    rows = len(prompts) * len(config.seeds) + len(config.seeds)
    found: list[Detection] = []
    # Alternating, because the machine's speed drifts.
    pairs = [
        (
            seconds(lambda: found.append(detect(denoiser, prompts, config))),
            bare_forwards(denoiser, rows, 32),
        )
        for _ in range(3)
    ]
    ours = statistics.median(t for t, _ in pairs)
    naive = seconds(lambda: both_rows(denoiser, prompts, config))
    calibration = Calibration.from_controls(
        detect(denoiser, demo.controls(), config), model=model_fingerprint(demo.MODEL),
        settings=settings_of(denoiser, config), name="held-out captions",
    )  # fmt: skip
    sequential: list[Detection] = []
    fast = seconds(
        lambda: sequential.append(detect_sequentially(denoiser, prompts, config, calibration)), 3
    )
    traces: list[torch.Tensor] = []
    reference = seconds(lambda: traces.append(reference_protocol(denoiser, prompts, config)))

    def auc(scores: torch.Tensor) -> float:
        return float(roc_auc_score(truth, scores.tolist()))

    bench |= {
        "detection.time_over_bare_forwards": statistics.median(t / b for t, b in pairs),
        "detection.speedup_over_both_rows": naive / ours,
        "detection.speedup_over_reference_protocol": reference / ours,
        "detection.auc_200": auc(found[0].scores),
        "detection.auc_reference_protocol": auc(traces[0].mean((1, 2))),
        "detection.auc_five_steps": auc(traces[0][:, :, :5].mean((1, 2))),
        "detection.auc_one_seed_all_steps": auc(traces[0][:, :1].mean((1, 2))),
        "detection.tpr_reference_protocol": tpr_at(0.01, truth, traces[0].mean((1, 2)).tolist()),
        "detection.tpr_five_steps": tpr_at(0.01, truth, traces[0][:, :, :5].mean((1, 2)).tolist()),
        "detection.sequential_speedup": reference / fast,
        "detection.sequential_auc": auc(sequential[0].scores),
        "detection.sequential_seeds": sequential[0].seeds_drawn.double().mean().item(),
    }


def measure_memory(bench: dict) -> None:
    """Print the peak memory of scoring 1,000 prompts relative to 100."""
    code = (
        "import resource, sys\n"
        "from unmemorize import demo\n"
        "from unmemorize.shared.score.config import DetectionConfig\n"
        "from unmemorize.shared.score.detection import detect\n"
        "from unmemorize.shared.models.load import load_denoiser\n"
        "texts = [f'{c.text} {i}' for i in range(4) for c in demo.audited()][:int(sys.argv[1])]\n"
        "detect(load_denoiser(demo.MODEL), texts, DetectionConfig(seeds=(0, 1)))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks = [
        int(subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(count)],
                           check=True, capture_output=True, text=True).stdout.split()[-1])
        for count in (100, 1000)
    ]  # fmt: skip
    bench |= {"detection.peak_memory_1000_over_100_prompts": peaks[1] / peaks[0],
              "detection.peak_memory_mib_100": peaks[0] / 1024}  # fmt: skip


def measure_observer(denoiser, bench: dict) -> None:
    """Print what watching ordinary sampling costs, and whether the images stay the same."""
    pipeline = denoiser.pipeline

    def sample():
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        return pipeline(
            "a drawing", num_inference_steps=30, num_images_per_prompt=4, generator=generators,
            output_type="latent",
        ).images  # fmt: skip

    sample()
    times: dict[bool, list[float]] = {False: [], True: []}
    images: list[torch.Tensor] = []
    for repeat in range(24):
        # Plain, watched, watched, plain: a drift of the machine's speed falls on both alike.
        watched = repeat % 4 in (1, 2)
        with observe(pipeline) if watched else nullcontext():
            times[watched].append(seconds(lambda: images.append(sample())))
    bench |= {
        "observer.overhead": statistics.median(times[True]) / statistics.median(times[False]),
        "observer.bit_identical": all(torch.equal(images[0], image) for image in images),
    }


def measure_audit(bench: dict) -> None:
    """Print time and verdicts of `unmemorize audit` on the demo, from a warm environment."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "unmemorize", "audit", "--output", f"{folder}/report"],
            check=False,
        )
        bench["audit.demo_seconds"] = time.perf_counter() - start
        if done.returncode not in (0, 3):
            raise RuntimeError(f"audit ended with {done.returncode}")
        lines = Path(folder, "report", "results.jsonl").read_text("utf-8").splitlines()
    flagged: dict[str, list[bool]] = {}
    for entry in map(json.loads, lines):
        flagged.setdefault(entry["group"], []).append(entry["memorized"])
    clean = flagged["learnt"] + flagged["held_out"]
    bench |= {
        "audit.recall": statistics.mean(flagged["verbatim"]),
        "audit.template_flagged": statistics.mean(flagged["template"]),
        "audit.false_positive_rate": statistics.mean(clean),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print the table and write bench.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("accuracy", "speed", "memory", "observer", "audit")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    args = parser.parse_args(argv)
    bench: dict = json.loads(args.output.read_text()) if args.output.exists() else {}
    denoiser = load_denoiser(demo.MODEL)
    denoiser.pipeline.set_progress_bar_config(disable=True)
    for part, work in (
        ("accuracy", lambda: measure_accuracy(denoiser, bench)),
        ("speed", lambda: measure_speed(denoiser, bench)),
        ("memory", lambda: measure_memory(bench)),
        ("observer", lambda: measure_observer(denoiser, bench)),
        ("audit", lambda: measure_audit(bench)),
    ):
        if part in args.only:
            work()
            args.output.write_text(json.dumps(bench, indent=1, sort_keys=True) + "\n")
    print(f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, Python {platform.python_version()}\n")  # fmt: skip
    print("| figure | value |\n|---|---|")
    for key, value in sorted(bench.items()):
        print(f"| {key} | {value if isinstance(value, bool) else f'{value:.3f}'} |")


if __name__ == "__main__":
    main()
