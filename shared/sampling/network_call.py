"""One call of a diffusers network, read by meaning, cut to rows, and replaced in part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..arrays import take_rows
from ..score.denoiser import Conditioning

POSITIONS = ("sample", "timestep", "encoder_hidden_states")
"""Arguments of U-Nets that may come without a name; pipelines name those of transformers."""


@dataclass(frozen=True, kw_only=True)
class NetworkCall:
    """Arguments of one call; replacing makes new ones, the caller's stay as they are."""

    args: tuple
    kwargs: dict[str, Any]

    @property
    def latents(self) -> Tensor:
        """Return the latents that the network reads, one row per row of the batch."""
        return self._get(self._latents_name)

    @property
    def timestep(self) -> float:
        """Return the time that the network reads, in its own units; waits for the device."""
        timestep = self._get("timestep")
        return float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)

    @property
    def pooled(self) -> Tensor | None:
        """Return the pooled text [row width]; None where the network reads none."""
        if "pooled_projections" in self.kwargs:
            return self.kwargs["pooled_projections"]
        return (self.kwargs.get("added_cond_kwargs") or {}).get("text_embeds")

    @property
    def latent_size(self) -> tuple[int, int]:
        """Return height and width of the latents, unpacked."""
        ids = self.kwargs.get("img_ids")
        if ids is None:
            height, width = self.latents.shape[-2:]
        else:  # Flux numbers the patches of 2 x 2 by row and column
            height, width = (2 * (int(ids[..., axis].max()) + 1) for axis in (1, 2))
        return height, width

    def conditioning(self, rows: Sequence[int]) -> Conditioning:
        """Return the text at `rows` as the network reads it."""
        return Conditioning(
            embeddings=self._get("encoder_hidden_states")[rows],
            pooled=None if self.pooled is None else self.pooled[rows],
        )

    def with_latents(self, rows: Sequence[int], latents: Tensor) -> "NetworkCall":
        """Return the call with other latents at `rows`, in its own dtype."""
        return self._set(self._latents_name, written(self.latents, rows, latents))

    def with_conditioning(self, rows: Sequence[int], cond: Conditioning) -> "NetworkCall":
        """Return the call with other text at `rows`, in its own dtypes."""
        name = "encoder_hidden_states"
        call = self._set(name, written(self._get(name), rows, cond.embeddings.detach()))
        if cond.pooled is None or self.pooled is None:
            return call
        pooled = written(self.pooled, rows, cond.pooled.detach())
        if "pooled_projections" in self.kwargs:
            return call._set("pooled_projections", pooled)
        added = {**self.kwargs["added_cond_kwargs"], "text_embeds": pooled}
        return call._set("added_cond_kwargs", added)

    def only(self, rows: Sequence[int]) -> "NetworkCall":
        """Return the call for these rows alone."""
        batch = len(self.latents)
        return NetworkCall(
            args=take_rows(self.args, rows, batch), kwargs=take_rows(self.kwargs, rows, batch)
        )

    @property
    def _latents_name(self) -> str:
        return "hidden_states" if "hidden_states" in self.kwargs else "sample"

    def _get(self, name: str) -> Any:
        return self.kwargs[name] if name in self.kwargs else self.args[POSITIONS.index(name)]

    def _set(self, name: str, value: Any) -> "NetworkCall":
        if name in self.kwargs:
            return replace(self, kwargs={**self.kwargs, name: value})
        at = POSITIONS.index(name)
        return replace(self, args=(*self.args[:at], value, *self.args[at + 1 :]))


def written(tensor: Tensor, rows: Sequence[int], values: Tensor) -> Tensor:
    """Return a copy of `tensor` with `values` at `rows`, in its own dtype and on its device."""
    tensor = tensor.clone()
    tensor[list(rows)] = values.to(tensor)
    return tensor
