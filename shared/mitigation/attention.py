"""Attraction-repulsion: away from the prompt's prediction, towards one with damped attention.

GUARD (Guidance Using Attractive-Repulsive Dynamics), Zhao et al., ICML 2026, arXiv:2603.00133.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .method import Method, Mitigation, Start, Step

BLOCKS = {
    "early": {"down_blocks", "mid_block"},
    "all": {"down_blocks", "mid_block", "up_blocks"},
}
"""Parts of a U-Net by the setting's value."""
PROCESSORS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "SlicedAttnProcessor",
    "XFormersAttnProcessor",
)
"""Attention of diffusers that adds a mask to the logits and does nothing besides."""
UPCASTING = ("AttnProcessor", "SlicedAttnProcessor")
"""Of these, the ones that obey `upcast_attention`."""


@dataclass(frozen=True, kw_only=True)
class AttractionRepulsion(Method):
    """Predict e_0 + s (e_plus - e_0) - r (e_minus - e_0).

    e_0 is the unconditional prediction, e_minus the conditional one, e_plus the conditional one
    with spiking cross-attention damped, which takes one more pass; s is the run's own guidance
    scale (paper: 7.5). The weights 1 - s + r, s and -r sum to 1, so it reads the same for noise and
    velocities.
    """

    name: ClassVar[str] = "attention"
    needs_guidance: ClassVar[bool] = True

    alpha: float = 0.3
    """Factor on the logits of spiking tokens, 0..1 (authors' README: spike_scale, 0.3); 1.0 damps
    nothing and takes no pass."""
    tau: float = 0.1
    """A token spikes in a head when the largest of its logits over the image lies more than tau
    standard deviations above the mean over the tokens, the first left out (authors' README:
    spike_threshold, 0.1)."""
    repulsion: float = 2.0
    """r, at least 0 (authors' README: repulsion_scale, 2.0)."""
    fade: bool = True
    """Let r fall to 0 as a quarter of a cosine over the schedule (authors' code; not in the
    paper's formula)."""
    blocks: str = "early"
    """Where attention is damped: "early" in the down and middle blocks (authors' README:
    BLOCKS_EARLY), "all" in the up blocks, too."""

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"`alpha` must lie in 0..1, got {self.alpha}.")
        if math.isnan(self.tau):
            raise ValueError(f"`tau` must be a number, got {self.tau}.")
        if not (self.repulsion >= 0 and math.isfinite(self.repulsion)):
            raise ValueError(f"`repulsion` must be at least 0, got {self.repulsion}.")
        if self.blocks not in BLOCKS:
            raise ValueError(f"`blocks` must be one of {', '.join(BLOCKS)}, got {self.blocks!r}.")

    def start(self, start: Start) -> "TwoForces":
        """Return the two forces on one run.

        Raises:
            ValueError: The network is no U-Net with cross-attention, or its attention was replaced.
        """
        return TwoForces(self, cross_attention(start.network, self.blocks))


class TwoForces(Mitigation):
    """Attraction and repulsion in one run."""

    def __init__(self, settings: AttractionRepulsion, modules: Sequence[nn.Module]):
        super().__init__()
        self.settings, self.modules = settings, modules

    def guide(self, step: Step) -> Tensor | None:
        """Return the prediction between the two forces."""
        settings = self.settings
        if settings.alpha == 1.0 and settings.repulsion == 0:
            return None
        plus = step.cond
        if settings.alpha != 1.0:
            with damped(self.modules, settings.alpha, settings.tau):
                plus = step.predict()
        r = settings.repulsion
        if settings.fade:
            r *= math.cos(step.percent * math.pi / 2)
        # GUARD's rule with e_plus and e_minus both relative to the unconditional prediction.
        attraction = step.cond_scale * (plus - step.uncond)
        return step.uncond + attraction - r * (step.cond - step.uncond)


def cross_attention(network: nn.Module | None, blocks: str) -> list[nn.Module]:
    """Return the cross-attention of a U-Net in some blocks.

    Raises:
        ValueError: There is none, or it is not diffusers' own; names what is supported.
    """
    supported = (
        "Attraction-repulsion works on diffusers U-Nets with cross-attention, which are Stable "
        "Diffusion 1, 2 and XL"
    )
    if network is None:
        raise ValueError(f"{supported}; the host gave no network. Choose another method.")
    modules = {
        name: module
        for name, module in network.named_modules()
        if name.endswith(".attn2")
        and BLOCKS[blocks] & set(name.split("."))
        and getattr(module, "is_cross_attention", False)
    }
    if not modules:
        raise ValueError(
            f"{supported}; this {type(network).__name__} has none in its {blocks} blocks. "
            "Choose another method."
        )
    for name, module in modules.items():
        processor = type(module.processor).__name__
        if processor not in PROCESSORS:
            raise ValueError(
                f"{supported}, with their own attention; {name} has {processor}. Unload what "
                "replaced it (an IP-Adapter, for instance), or choose another method."
            )
    return list(modules.values())


@contextmanager
def damped(modules: Sequence[Any], alpha: float, tau: float) -> Iterator[None]:
    """Damp spiking tokens in these modules for a block; their processors come back in any case."""
    with ExitStack() as undo:
        for module in modules:
            undo.callback(module.set_processor, module.processor)
            module.set_processor(_Damped(module.processor, alpha, tau))
        yield


def damping(logits: Tensor, alpha: float, tau: float) -> Tensor:
    """Return what to add to logits so that those of spiking tokens are multiplied by alpha.

    The paper speaks of attention mass, the authors' code takes logits; so does this.

    Args:
        logits: [head place token], the heads of all images one after another.
        alpha: 0..1.
        tau: In standard deviations.
    """
    peaks = logits.amax(dim=1)
    mean, std = peaks[:, 1:].mean(1, keepdim=True), peaks[:, 1:].std(1, keepdim=True)
    spikes = (peaks - mean) / (std + 1e-6) > tau
    spikes[:, 0] = False  # the first token takes most of the attention in every prompt
    return (alpha - 1) * logits * spikes[:, None]


class _Damped:
    """Stands in for a processor: adds the damping to its mask and leaves the rest to it."""

    def __init__(self, processor: Any, alpha: float, tau: float):
        self.processor, self.alpha, self.tau = processor, alpha, tau

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key = attn.to_q(hidden_states), attn.to_k(context)
        dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
        query, key = (attn.head_to_batch_dim(part.to(wide)) for part in (query, key))
        mask = damping(attn.scale * query @ key.transpose(1, 2), self.alpha, self.tau)
        if attention_mask is not None:
            rows, tokens = context.shape[:2]
            mask = mask + attn.prepare_attention_mask(attention_mask, tokens, rows)
        # A mask must have the logits' dtype, and these two widen logits if `upcast_attention`.
        widened = attn.upcast_attention and type(self.processor).__name__ in UPCASTING
        return self.processor(
            attn,
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            attention_mask=mask if widened else mask.to(dtype),
        )
