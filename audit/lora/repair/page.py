"""Page and JSON of a repair: what came back before and after it, and what it kept."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ....shared.drawing.chart import Axis, Chart, round_ticks
from ....shared.drawing.score_charts import LETTERS
from ....shared.drawing.theme import Theme
from ....shared.files.storage import write_text
from ...common.pages import TEMPLATES, Embedder, embedded_chart, render_page
from ...common.result import dumps, versions
from ..page import ASKED
from ..page_images import LARGE, Thumbnails
from ..result import LoraAudit
from .result import Repair, Trial, back

if TYPE_CHECKING:
    from PIL.Image import Image

PAGE, DOCUMENT = "repair.html", "repair.json"
SCHEMA_VERSION = 1
"""Of repair.json."""


def tell(repair: Repair, *, include_images: bool) -> None:
    """Write page and JSON into the report's folder, where both audits lie.

    Args:
        repair: What they show.
        include_images: Show training images and their copies as they are, else a few pixels.

    Raises:
        ImportError: The extra `reports` is not installed.
        StorageError: Nothing can be written.
    """
    write_text(repair.folder / DOCUMENT, dumps(to_document(repair), indent=1) + "\n")
    write_text(repair.folder / PAGE, render(repair, include_images=include_images))


def to_document(repair: Repair) -> dict[str, Any]:
    """Return the repair as plain JSON values, without folders of this machine."""
    return {
        "title": "unmemorize LoRA repair",
        "schema_version": SCHEMA_VERSION,
        "unmemorize": versions()["unmemorize"],
        "headline": repair.headline,
        "clear": repair.clear,
        "source": {"name": repair.before.lora.name, "sha256": repair.before.lora.sha256},
        "repaired": {"name": repair.output.name, "sha256": repair.sha256},
        "base": {"name": repair.before.model, "sha256": repair.before.model_fingerprint},
        "back": {"before": [_name(repair.before, i) for i in back(repair.before)],
                 "after": [_name(repair.after, i) for i in back(repair.after)]},
        "by_words": {words: {"before": asdict(before), "after": asdict(after)}
                     for words, before, after in repair.by_words},
        "attack": {"before": repair.before.attack and asdict(repair.before.attack.extracted),
                   "after": repair.after.attack and asdict(repair.after.attack.extracted)},
        "chosen": asdict(repair.chosen),
        "trials": [asdict(trial) for trial in repair.trials],
        "prompts_held": repair.held,
        "prompts_measured": repair.measured,
        "likeness": {"repaired": repair.likeness, "base": repair.likeness_base},
        "audits": {"before": repair.before.headline.text, "after": repair.after.headline.text},
    }  # fmt: skip


def render(repair: Repair, *, include_images: bool) -> str:
    """Return the page as HTML; arguments and errors of `tell`."""
    embed = Embedder(repair.folder)
    return render_page(
        "repair.html.j2",
        style=(TEMPLATES / "lora.css").read_text("utf-8"),
        repair=repair,
        asked=ASKED,
        version=versions()["unmemorize"],
        include_images=include_images,
        targets=len(back(repair.before)),
        left=len(back(repair.after)),
        cards=_cards(repair, include_images=include_images),
        pictured=[(each.prompt, [("base model", embed(each.base)),
                                 ("LoRA", embed(each.lora)),
                                 ("repaired", embed(each.repaired))])
                  for each in repair.pictured],
        curve=embedded_chart(lambda theme, width: trial_chart(repair, theme=theme, width=width),
                             desk=1760, phone=720),
    )  # fmt: skip


def _name(audit: LoraAudit, image: int) -> str:
    return audit.training.images[image].name


def _cards(repair: Repair, *, include_images: bool) -> list[dict[str, Any]]:
    """Return each image that came back, with what was drawn from one prompt and noise."""
    thumbnails = {audit is repair.after: Thumbnails(audit, include_images=include_images)
                  for audit in (repair.before, repair.after)}  # fmt: skip
    places = {(g.prompt, g.seed, g.asked): n for n, g in enumerate(repair.after.generations)
              if g.lora}  # fmt: skip
    verdicts = {v.image: v for v in repair.before.verdicts}
    cards = []
    for image in back(repair.before):
        verdict, now = verdicts[image], repair.after.verdicts[image]
        made = repair.before.generations[verdict.generation or 0]
        place = places[made.prompt, made.seed, made.asked]
        cards.append({
            "caption": repair.before.training.images[image].caption,
            "before": verdict, "after": now,
            "tiles": [
                ("training image", thumbnails[False].training(image, LARGE)),
                ("before", thumbnails[False].generation(verdict.generation or 0, LARGE)),
                ("after, same words and seed", thumbnails[True].generation(place, LARGE)),
            ],
        })  # fmt: skip
    return cards


def trial_chart(repair: Repair, *, theme: Theme = "light", width: int = 1760) -> "Image":
    """Return what comes back against what is kept; the chosen trial is marked.

    The baseline, strength, is drawn in rings.

    Args:
        repair: Its trials are shown, a line a method.
        theme: Colours.
        width: Pixels.
    """
    most = max(trial.back.total for trial in repair.trials)
    x = Axis(label="kept of the LoRA (%)", low=-4, high=104, ticks=round_ticks(0, 100, 10))
    y = Axis(label="come back", low=-0.06 * most, high=1.1 * most,
             ticks=round_ticks(0, most, 6, whole=True))  # fmt: skip
    height = max(640, round(0.42 * width))
    chart = Chart(x, y, width=width, height=height, size=LETTERS, theme=theme)
    methods: dict[str, list[Trial]] = {}
    for trial in repair.trials:
        methods.setdefault(trial.method, []).append(trial)
    for name, trials in methods.items():
        role = "flagged" if name == repair.chosen.method else "other"
        points = sorted((100 * trial.kept, float(trial.back.count)) for trial in trials)
        chart.line(points, role, opacity=0.5)
        chart.dots(points, role, shape="ring" if name == "strength" else "disc")
        chart.label(*points[-1], name)
    chosen = repair.chosen
    chart.dots([(100 * chosen.kept, float(chosen.back.count))], "flagged", shape="diamond",
               radius=0.6)  # fmt: skip
    return chart.image()
