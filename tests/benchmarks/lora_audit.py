"""What the audit of a LoRA finds, against a known truth: ``make bench NAME=lora_audit``.

Parts: `levels` (LoRAs of the demo model trained with PEFT to none, some and verbatim: the planted
images must be named, and drawings of the same captions that were never trained on must not),
`clean` (20 lightly trained LoRAs, each another seed: no headline) and `scale` (100,000 vectors in
the index). The first two need npm for new drawings. What is finished in --work is not done again.
"""

import argparse
import json
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from lora_training import LEVELS, WORD, Sets, choose, train_lora
from sklearn.metrics import roc_auc_score
from tqdm.auto import tqdm
from unmemorize import demo
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.result import LoraAudit
from unmemorize.audit.lora.run import run_lora_audit
from unmemorize.cli.common.terminal import bar
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.load import load_denoiser

COUNT, PLANTED = 20, 6
"""Images of a folder, and how many of them are shown more often."""
CLEAN, CLEAN_COUNT = 20, 12
"""Runs in which nothing is shown more often, and their images."""


def audit(sets: Sets, lora: Path, work: Path, *, other: bool = False, **settings) -> LoraAudit:
    """Audit a LoRA with its folder, or with other drawings of the same captions.

    The other drawings are the held-out controls of the true folder.
    """
    places = range(len(sets.captions))
    images = sets.write(work / "images", places)
    never = sets.write(work / "never", places, other=True)
    return run_lora_audit(
        LoraAuditConfig(
            model=str(demo.MODEL), lora=lora, images=never if other else images,
            held_out=None if other else never, trigger=WORD,
            output=work / ("audit-never" if other else "audit"), device="cpu",
            generation_steps=20, **settings,
        ),
        bar,
    )  # fmt: skip


def measure_levels(
    denoiser: PipelineDenoiser, work: Path, bench: dict, levels: Sequence[str]
) -> None:
    """Print per level how many planted images are named, and whether silence is kept elsewhere."""
    sets = choose(COUNT, PLANTED, seed=0)
    print(f"\n{'level':<10}{'recall':>8}{'precision':>11}{'false':>7}{'extracted':>11}"
          f"{'delta AUC':>11}")  # fmt: skip
    for level in (each for each in LEVELS if each.name in levels):
        folder = work / level.name
        lora = train_lora(denoiser, sets, level, folder / f"{level.name}.safetensors", seed=0)
        found = audit(sets, lora, folder)
        never = audit(sets, lora, folder, other=True, attack_images=0)
        named = {v.image for v in found.verdicts if v.verdict == "verbatim"}
        planted = set(range(PLANTED))
        claimed = never.headline.given and never.headline.reproduced.count > 0
        rises = [(score.source in planted, score.on - score.off) for score in found.scores
                 if score.asked == "caption" and score.source < COUNT]  # fmt: skip
        figures = {
            "recall": len(named & planted) / PLANTED,
            "precision": len(named & planted) / len(named) if named else 1.0,
            "false_headlines": float(claimed),
            "extracted": float(found.attack.extracted.count),
            # LoRA-on minus LoRA-off score of captions: those of planted images against the others.
            "lora_delta.auc": float(roc_auc_score(*zip(*rises, strict=True))),
        }
        bench |= {f"lora_audit.{level.name}.{key}": value for key, value in figures.items()}
        print(f"{level.name:<10}{figures['recall']:>8.3f}{figures['precision']:>11.3f}"
              f"{claimed:>7}{found.attack.extracted.count:>11}{figures['lora_delta.auc']:>11.3f}"
              f"  {found.headline.text}")  # fmt: skip
    # Where images come back: elsewhere there is nothing for a score to tell.
    if (key := f"lora_audit.{LEVELS[-1].name}.lora_delta.auc") in bench:
        bench["lora_audit.lora_delta.auc"] = bench[key]


def measure_clean(denoiser: PipelineDenoiser, work: Path, bench: dict, runs: int) -> None:
    """Print how many lightly trained LoRAs get a headline that images come back; none should."""
    level = next(each for each in LEVELS if each.planted == 1)
    false, copies = 0, 0
    for seed in tqdm(range(1, runs + 1), "clean"):
        folder, sets = work / f"clean-{seed:02d}", choose(CLEAN_COUNT, 0, seed)
        lora = train_lora(denoiser, sets, level, folder / "clean.safetensors", seed=seed)
        found = audit(sets, lora, folder, attack_images=0, images_per_prompt=1)
        count = found.headline.reproduced.count
        false, copies = false + (found.headline.given and count > 0), copies + count
    bench |= {"lora_audit.none.false_headlines": float(false), "lora_audit.none.runs": float(runs)}
    print(
        f"\n{false} false headlines in {runs} clean runs; {copies} of {runs * CLEAN_COUNT} images "
        "were judged verbatim"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print the tables and write bench.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts, names = ("levels", "clean", "scale"), [level.name for level in LEVELS]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--levels", nargs="+", choices=names, default=names)
    parser.add_argument("--runs", type=int, default=CLEAN, help="clean ones")
    parser.add_argument("--work", type=Path, default=Path("build/lora_audit"))
    parser.add_argument("--output", type=Path, default=Path("bench.json"))
    args = parser.parse_args(argv)
    bench: dict = json.loads(args.output.read_text()) if args.output.exists() else {}

    def scale() -> None:
        from lora_audit_scale import measure_scale

        measure_scale(bench)

    works = {
        "levels": lambda: measure_levels(_fresh(), args.work, bench, args.levels),
        "clean": lambda: measure_clean(_fresh(), args.work, bench, args.runs),
        "scale": scale,
    }
    for part in args.only:
        works[part]()
        args.output.write_text(json.dumps(bench, indent=1, sort_keys=True) + "\n")
    print(f"\n{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, Python {platform.python_version()}\n")  # fmt: skip
    print("| figure | value |\n|---|---|")
    for key, value in sorted(bench.items()):
        if key.startswith("lora_audit."):
            print(f"| {key} | {value:.4g} |")


def _fresh() -> PipelineDenoiser:
    """Return a demo model of its own: training puts a LoRA on it."""
    return load_denoiser(demo.MODEL)


if __name__ == "__main__":
    main()
