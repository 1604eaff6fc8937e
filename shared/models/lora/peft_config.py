"""The scale of every module that PEFT has trained, from the configuration that it writes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files.schema import Count
from ...files.weights import READER, ModelError, read_metadata

MERGE = "Merge it into its base model with the tool that made it, and give the merged model."
"""The remedy for a file that nothing here reads."""
HEADER_KEY = "lora_adapter_metadata"
"""Key of a file's header under which diffusers keeps PEFT's configuration, by component."""
READ = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
WITHOUT_EFFECT = {
    # what is known of the factors themselves
    "peft_type", "use_dora", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
    # what concerned the training alone
    "lora_dropout", "eva_config", "lora_ga_config", "runtime_config", "megatron_core",
    "megatron_config", "qalora_group_size", "velora_config", "ensure_weight_tying",
    # names
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "_custom_modules",
}  # fmt: skip
"""Options of PEFT's LoraConfig that leave the change by given factors as it is."""
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "lora_ga")
"""Values of init_lora_weights that leave the base model's weights alone. PiSSA, OLoRA, CorDA and
LoftQ take something out of them, so that their factors fit no released model."""


RUNAWAY = re.compile(r"[)][*+{]|([*+}].*){4}")
"""Patterns that may be matched for ever: a group that repeats, or four repetitions in a row."""
LONGEST = 500
"""Characters of a pattern; names of modules have less than 100."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Of PEFT's LoraConfig what changes the effect of given factors."""

    r: Count
    lora_alpha: float
    rank_pattern: dict[str, Count] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = None


@dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """Ranks and scales of the modules of one component."""

    where: str
    """File, and key in it, for messages."""
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    """By regular expressions of module names, first match wins."""
    alphas: Mapping[str, float]
    rslora: bool
    """The scale is alpha / sqrt(rank) (Kalajdzievski, arXiv:2312.03732), not alpha / rank."""

    @classmethod
    def of(cls, config: Any, where: str) -> "PeftConfig":
        """Read a LoraConfig as PEFT writes it.

        Raises:
            ModelError: It is no LoraConfig, or sets something that is not applied here.
        """
        config = READER.check(config, dict[str, Any], where)
        if (kind := config.get("peft_type") or "LORA") != "LORA":
            raise ModelError(f"{where} describes a {kind}, not a LoRA. {MERGE}")
        others = {k: v for k, v in config.items() if v and k not in READ | WITHOUT_EFFECT}
        if others.get("bias") == "none":
            del others["bias"]
        start = others.pop("init_lora_weights", None)
        if start not in PLAIN_STARTS:
            others["init_lora_weights"] = start
        if others:
            named = ", ".join(f"{key}={value!r}" for key, value in others.items())
            raise ModelError(f"{where} sets {named[:300]}, which is not applied here. {MERGE}")
        read = READER.check(config, LoraConfig, where, foreign=True)
        for pattern in (*(read.rank_pattern or ()), *(read.alpha_pattern or ())):
            if len(pattern) > LONGEST or RUNAWAY.search(pattern):
                raise ModelError(
                    f"{where}: {pattern[:60]!r} repeats what is repeated, or is longer than "
                    f"{LONGEST} signs: matching it could take for ever. {MERGE}"
                )
        return cls(
            where=where, rank=read.r, alpha=read.lora_alpha, ranks=read.rank_pattern or {},
            alphas=read.alpha_pattern or {}, rslora=bool(read.use_rslora),
        )  # fmt: skip

    def alpha_of(self, name: str, rank: int) -> float:
        """Return the alpha of a module for which alpha / rank is PEFT's scale.

        Args:
            name: Of the module in its component.
            rank: Of its factors.

        Raises:
            ModelError: The configuration states another rank, or a pattern is no expression.
        """
        stated = self._first(self.ranks, name, self.rank)
        if stated != rank:
            raise ModelError(
                f"{self.where} gives {name} the rank {stated}, its factors have {rank}. Put the "
                "configuration and the weights of one and the same training together."
            )
        alpha = self._first(self.alphas, name, self.alpha)
        return alpha * rank**0.5 if self.rslora else alpha

    def _first(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """Return the value of the first pattern that matches a name to its end, as PEFT does."""
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", name):
                    return value
            except re.error as error:
                raise ModelError(f"{self.where}: {pattern!r} is no pattern ({error}).") from error
        return default


def config_beside(path: Path) -> PeftConfig:
    """Return the configuration that PEFT wrote beside a file.

    Raises:
        ModelError: There is none, or it cannot be used.
    """
    beside = path.with_name("adapter_config.json")
    if not beside.is_file():
        raise ModelError(
            f"{path} was written by PEFT, which states the LoRA's scale in {beside.name} beside "
            f"it; there is no such file. Put it there: {beside}"
        )
    return PeftConfig.of(READER.parse_file(beside), str(beside))


def configs_in_header(path: Path) -> dict[str, PeftConfig]:
    """Return PEFT's configurations by component, as diffusers writes them into a file's header.

    Raises:
        ModelError: They are there and cannot be used.
    """
    text = read_metadata(path).get(HEADER_KEY)
    if text is None:
        return {}
    where = f"{path}: the header's {HEADER_KEY}"
    flat = READER.check(READER.parse(text, where), dict[str, Any], where)
    parts: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        component, _, option = key.partition(".")
        parts.setdefault(component, {})[option] = value
    return {name: PeftConfig.of(part, f"{where}, {name}") for name, part in parts.items()}
