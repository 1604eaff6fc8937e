"""The settings of a repair."""

from dataclasses import dataclass, replace
from pathlib import Path

from ..config import LoraAuditConfig
from .case import Method
from .directions import filtering, sensitive
from .distillation import distillation
from .strength import strength

METHODS: dict[str, Method] = {
    "strength": strength, "filtering": filtering, "sensitive": sensitive,
    "distillation": distillation,
}  # fmt: skip
BEFORE, AFTER = "before", "after"
"""Folders of the two audits."""


@dataclass(frozen=True, kw_only=True)
class RepairConfig:
    """Which LoRA to repair, how, and where to write."""

    audit: LoraAuditConfig
    """How the LoRA is audited before and after; `output` there is not used."""
    output: Path
    """The repaired LoRA."""
    report: Path = Path("unmemorize-repair")
    """Folder of both audits and of the page."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Those that are tried; what keeps most of the LoRA is taken."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.methods if name not in METHODS] or not self.methods:
            raise ValueError(
                f"`methods` must be some of {', '.join(METHODS)}, got "
                f"{', '.join(unknown) if isinstance(unknown, list) else 'none'}."
            )
        if self.audit.quick:
            raise ValueError("A quick audit asks too little to call a LoRA repaired.")
        if self.audit.quantize or self.audit.offload:
            raise ValueError(
                "A repair needs the base model's whole weights where it computes: leave `quantize` "
                "and `offload` out."
            )
        if self.output.suffix != ".safetensors":
            raise ValueError(f"`output` must end in .safetensors, got {self.output.name!r}.")
        if self.output.resolve() == self.audit.lora.resolve():
            raise ValueError(
                "`output` is the LoRA itself, which is what the result is compared with: choose "
                "another name."
            )

    @property
    def before(self) -> LoraAuditConfig:
        """The audit of the LoRA as it is."""
        return replace(self.audit, output=self.report / BEFORE)

    def after(self, repaired: Path) -> LoraAuditConfig:
        """The audit of a repaired file."""
        return replace(self.audit, lora=repaired, output=self.report / AFTER, overwrite=True,
                       epochs=())  # fmt: skip
