"""What repairs buy, on LoRAs of exactly known truth: ``make bench NAME=repair``.

    ARGS="--models demo"    some of the models; without, the demo's two

A folder holds planted images, which the LoRA alone gives back, and images of learnt captions, of
which none is learnt by heart. `verbatim.back` is of the planted ones that came back before the
repair, in the audit of the repaired file; `kept` of the predictions for prompts that no method saw,
and under `rivals.` the most that each other way keeps in its best trial without a copy. What is
finished in --work is not done again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench_models import MODELS, BenchModel
from figures import Figure, command_of, count_of, plain, record
from known_lora import split
from PIL import Image
from unmemorize import demo
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.repair.config import METHODS, RepairConfig
from unmemorize.audit.lora.repair.result import Repair, back
from unmemorize.audit.lora.repair.run import run_repair
from unmemorize.cli.common.terminal import bar
from unmemorize.shared.score.config import DetectionConfig


def write_folder(model: BenchModel, folder: Path, planted: int, others: int, meant: int) -> Path:
    """Write planted images and learnt ones with their captions, and further captions beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {group: [c.text for c in model.captions() if c.group == group]
             for group in ("verbatim", "learnt")}  # fmt: skip
    for place, text in enumerate([*texts["verbatim"][:planted], *texts["learnt"][:others]]):
        full = demo.training_image(text) if model.name in demo.BUNDLED else None
        image = full or Image.fromarray(model.training_images(text)[0])
        image.save(folder / f"{place:02d}.png")
        (folder / f"{place:02d}.txt").write_text(text, encoding="utf-8")
    lines = "\n".join(texts["learnt"][others : others + meant])
    folder.with_suffix(".txt").write_text(lines + "\n", encoding="utf-8")
    return folder


def repair(model: BenchModel, args: argparse.Namespace) -> Repair:
    """Split a model into base and LoRA, and repair the LoRA."""
    work = args.work / model.name
    known = split(model, work / "halves")
    images = write_folder(model, work / "images", args.planted, args.others, args.meant)
    audit = LoraAuditConfig(
        model=str(known.base), lora=known.lora, images=images,
        prompts=(images.with_suffix(".txt"),), device="cpu", images_per_prompt=args.images,
        attack_images=args.attack, detection=DetectionConfig(seeds=(0,)),
        generation_steps=args.steps, batch_size=8, overwrite=True,
    )  # fmt: skip
    config = RepairConfig(audit=audit, output=work / "repaired.safetensors",
                          report=work / "report", methods=tuple(args.methods))  # fmt: skip
    return run_repair(config, bar, lambda sentence: print(sentence, flush=True))


def figures_of(name: str, done: Repair, planted: int) -> dict[str, Figure]:
    """Return the figures of a model."""
    was = [image for image in back(done.before) if image < planted]
    still = [image for image in back(done.after) if image in was]
    found = {
        f"repair.{name}.verbatim.back": count_of(len(still), len(was)),
        f"repair.{name}.kept": plain(done.chosen.kept, done.measured),
        f"repair.{name}.likeness": plain(done.likeness, done.measured),
        f"rivals.repair.{name}.none.back": count_of(len(was), planted),
        f"rivals.repair.{name}.base.likeness": plain(done.likeness_base, done.measured),
    }
    for method in {trial.method for trial in done.trials}:
        best = done.best_of.get(method)
        found[f"rivals.repair.{name}.{method}.kept"] = plain(best.kept if best else 0.0,
                                                             done.measured)  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Repair, print and record the figures of the chosen models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=demo.BUNDLED)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=tuple(METHODS))
    parser.add_argument("--planted", type=int, default=6)
    parser.add_argument("--others", type=int, default=6)
    parser.add_argument(
        "--meant", type=int, default=16, help="further learnt captions, as --prompts"
    )
    parser.add_argument("--images", type=int, default=2, help="of each caption")
    parser.add_argument("--attack", type=int, default=0, help="images of each caption")
    parser.add_argument("--steps", type=int, default=12, help="of an image")
    parser.add_argument("--work", type=Path, default=Path("build/bench-repair"))
    parser.add_argument("--output", type=Path, help="of a trial, instead of docs/figures.json")
    args = parser.parse_args(argv)
    for name in args.models:
        found = figures_of(name, repair(MODELS[name], args), args.planted)
        record(found, command_of("repair", argv), output=args.output)


if __name__ == "__main__":
    main()
