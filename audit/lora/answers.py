"""What `unmemorize audit --lora --images` prints: a table and closing sentences."""

from ...shared.wording import visible
from ..model.answers import SHOWN, Table
from .result import LoraAudit
from .tell import PAGE

ORDER = ("verbatim", "template", "near", "none")


def audit_table(audit: LoraAudit) -> Table:
    """Return the training images, those that come back first."""
    ranked = sorted(audit.verdicts, key=lambda v: (ORDER.index(v.verdict), -v.similarity))
    rows = [
        [audit.training.images[v.image].name, v.verdict, f"{v.similarity:.2f}", f"{v.control:.2f}",
         str(v.attracted), audit.training.images[v.image].caption[:60]]
        for v in ranked[:SHOWN]
    ]  # fmt: skip
    left = len(ranked) - len(rows)
    title = "Training images, nearest first" + (f" ({left} more in the report)" if left else "")
    return title, ["image", "verdict", "similarity", "LoRA off", "nearest of", "caption"], rows


def audit_verdict(audit: LoraAudit) -> str:
    """Return the headline, what carries it, what to do, and where to look."""
    lines = [audit.headline.text, audit.positive_control.detail, audit.thresholds.method]
    lines += [f"Warning: {text}" for text in (*audit.lora.warnings, *audit.training.warnings)]
    if audit.attack:
        out = audit.attack.extracted
        lines.append(
            f"The extraction attack brought out {out.count} of {out.total} training images."
        )
    if audit.epochs:
        best = audit.best_epoch
        lines.append(
            "No saved epoch is inside what controls do." if best is None else
            f"The last epoch inside what controls do: {audit.epochs[best].name}"
        )  # fmt: skip
    lines += [f"{cause.change} {cause.flags}".strip() for cause in audit.causes]
    lines.append(f"Report: {audit.folder / PAGE}")
    return "\n".join(visible(line) for line in lines)
