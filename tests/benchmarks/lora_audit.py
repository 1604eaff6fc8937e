"""What the audit of a LoRA finds, against a known truth: ``make bench NAME=lora_audit``.

Parts: `levels` (LoRAs of the demo model trained with PEFT to none, some and verbatim: the planted
images must be named, and drawings of the same captions that were never trained on must not),
`clean` (20 lightly trained LoRAs, each another seed: no headline), `known` (LoRAs of exactly known
truth, of the models named with --models), `simulated` (folders of one subject in one pose) and
`scale` (100,000 vectors in the index). The first two need npm for new drawings. What is finished in
--work is not done again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench_models import MODELS, chosen_models
from figures import Figure, command_of, count_of, plain, record, share_of
from lora_known import measure_known, measure_simulated
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
    denoiser: PipelineDenoiser, work: Path, figures: dict[str, Figure], levels: Sequence[str]
) -> None:
    """Print per level how many planted images are named, and whether silence is kept elsewhere."""
    sets = choose(COUNT, PLANTED, seed=0)
    columns = ("recall", "precision", "others_named", "false_headlines", "extracted",
               "lora_delta.auc")  # fmt: skip
    print(f"\n{'level':<10}" + "".join(f"{name:>17}" for name in columns))
    for level in (each for each in LEVELS if each.name in levels):
        folder = work / level.name
        lora = train_lora(denoiser, sets, level, folder / f"{level.name}.safetensors", seed=0)
        found = audit(sets, lora, folder)
        never = audit(sets, lora, folder, other=True, attack_images=0)
        verdicts = [v.verdict for v in sorted(found.verdicts, key=lambda v: v.image)]
        repeated = PLANTED if level.planted > 1 else 0
        planted, others = verdicts[:repeated], verdicts[repeated:]
        rises = [(score.source < PLANTED, score.on - score.off) for score in found.scores
                 if score.asked == "caption" and score.source < COUNT]  # fmt: skip
        claimed = never.headline.given and never.headline.reproduced.count > 0
        line = {
            "others_named": share_of([verdict == "verbatim" for verdict in others]),
            "others_near": share_of([verdict in ("near", "template") for verdict in others]),
            "false_headlines": share_of([claimed]),
            "extracted": count_of(found.attack.extracted.count, COUNT),
            # LoRA-on minus LoRA-off score of captions: those of planted images against the others.
            "lora_delta.auc": plain(roc_auc_score(*zip(*rises, strict=True)), len(rises)),
        }
        if planted:
            line["recall"] = share_of([verdict == "verbatim" for verdict in planted])
            line["near"] = share_of([verdict in ("near", "template") for verdict in planted])
        if named := verdicts.count("verbatim"):
            line["precision"] = count_of(planted.count("verbatim"), named)
        figures |= {f"lora_audit.{level.name}.{key}": figure for key, figure in line.items()}
        cells = (f"{line[name].value:.3f}" if name in line else "" for name in columns)
        print(f"{level.name:<10}" + "".join(f"{cell:>17}" for cell in cells)
              + f"  {found.headline.text}")  # fmt: skip
        if level is LEVELS[-1]:  # where images come back: elsewhere a score has nothing to tell
            figures["lora_audit.lora_delta.auc"] = line["lora_delta.auc"]


def measure_clean(
    denoiser: PipelineDenoiser, work: Path, figures: dict[str, Figure], runs: int
) -> None:
    """Print how many lightly trained LoRAs get a headline that images come back; none should."""
    level = next(each for each in LEVELS if each.planted == 1)
    claims, copies = [], 0
    for seed in tqdm(range(1, runs + 1), "clean"):
        folder, sets = work / f"clean-{seed:02d}", choose(CLEAN_COUNT, 0, seed)
        lora = train_lora(denoiser, sets, level, folder / "clean.safetensors", seed=seed)
        found = audit(sets, lora, folder, attack_images=0, images_per_prompt=1)
        count = found.headline.reproduced.count
        claims.append(found.headline.given and count > 0)
        copies += count
    figures |= {
        "lora_audit.clean.false_headlines": share_of(claims),
        "lora_audit.clean.named": count_of(copies, runs * CLEAN_COUNT),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen parts, print and record the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("levels", "clean", "known", "simulated", "scale")
    names = [level.name for level in LEVELS]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--levels", nargs="+", choices=names, default=names)
    parser.add_argument("--runs", type=int, default=CLEAN, help="clean ones")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="of `known`; default: all")
    parser.add_argument("--planted", type=int, default=20, help="captions of `known`")
    parser.add_argument("--others", type=int, default=16, help="learnt captions of `known`")
    parser.add_argument("--steps", type=int, default=20, help="of an image of `known`")
    parser.add_argument("--folders", type=int, default=40, help="simulated ones")
    parser.add_argument("--work", type=Path, default=Path("build/lora_audit"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)

    def scale(figures: dict[str, Figure]) -> None:
        from lora_audit_scale import measure_scale

        measure_scale(figures)

    works = {
        "levels": lambda figures: measure_levels(_fresh(), args.work, figures, args.levels),
        "clean": lambda figures: measure_clean(_fresh(), args.work, figures, args.runs),
        "known": lambda figures: measure_known(
            chosen_models(args.models),
            args.work / "known",
            figures,
            planted=args.planted,
            others=args.others,
            steps=args.steps,
        ),
        "simulated": lambda figures: measure_simulated(args.work, figures, args.folders),
        "scale": scale,
    }
    for part in args.only:
        figures: dict[str, Figure] = {}
        works[part](figures)
        record(figures, command_of("lora_audit", argv), output=args.output)


def _fresh() -> PipelineDenoiser:
    """Return a demo model of its own: training puts a LoRA on it."""
    return load_denoiser(demo.MODEL)


if __name__ == "__main__":
    main()
