"""A LoRA on a pipeline whose factors B can be exchanged, and the file that they came from.

Every repair leaves the factors A alone. With the singular value decomposition U S V^T of a module's
change B A, directions are weighed by U diag(g) U^T B, so that A, rank, alpha, names and dialect of
the file stay as they were.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ....shared.files.storage import replace_atomically
from ....shared.files.weights import ModelError, read_metadata
from ....shared.models.lora.files import Pair, read_lora
from ....shared.models.lora.names import CARRIERS, Place
from ....shared.wording import counted, name_some

Factors = Mapping[Place, Tensor]
"""The factor B of each module [out rank ...], float32."""
STALE = ("sshs_model_hash", "sshs_legacy_hash")
"""Hashes of the file's own weights, which kohya's scripts write."""


class LoraWeights:
    """The modules of a LoRA as they lie on a pipeline."""

    def __init__(self, pipeline: Any, path: Path):
        """Find the layers of a LoRA that was loaded from `path`.

        Raises:
            ModelError: Its modules are no plain pairs of factors, or their way back into the file
                is not known; says which.
        """
        self.path, self._file = path, read_lora(pipeline, path)
        _refuse(self._file.modules, path)
        if lost := [".".join(place) for place in self._file.modules.keys() - self._file.sources]:
            raise ModelError(
                f"{path} cannot be repaired: only diffusers' converters know where "
                f"{counted(len(lost), 'module belongs', 'modules belong')} "
                f"({name_some(sorted(lost), 2)}), and they know no way back. Save it in the "
                "dialect of diffusers first (pipeline.load_lora_weights, then "
                "save_lora_weights), and repair that file."
            )
        self.layers = _layers(pipeline)
        self.original: Factors = {
            place: pair.b.float().to(self.layers[place].weight.device)
            for place, pair in self._file.modules.items() if isinstance(pair, Pair)
        }  # fmt: skip
        """As the file has them."""

    def down(self, place: Place) -> Tensor:
        """Return the factor A of a module [rank in], float32."""
        pair = self._file.modules[place]
        assert isinstance(pair, Pair)
        return pair.a.float().flatten(1).to(self.original[place].device)

    def base(self, place: Place) -> Tensor:
        """Return the weight that a module changes [out in], float32."""
        layer: Any = self.layers[place]
        return layer.get_base_layer().weight.detach().float().flatten(1)

    def parameter(self, place: Place) -> nn.Parameter:
        """Return the live factor B of a module."""
        layer: Any = self.layers[place]
        (factor,) = layer.lora_B.values()
        return factor.weight

    @torch.no_grad()
    def put(self, factors: Factors) -> None:
        """Exchange the factors B of all modules."""
        for place, factor in factors.items():
            self.parameter(place).copy_(factor)

    def save(self, factors: Factors, path: Path, history: Mapping[str, str]) -> None:
        """Write the file anew with other factors B, in its own names, order and dtypes.

        Args:
            factors: Of all modules.
            path: Written whole or not at all.
            history: Added to the header; hashes of the old weights are taken out of it.
        """
        from safetensors.torch import load_file, save_file

        tensors = load_file(self.path)
        changed = {source.key: tensors[source.key].float() for source in
                   self._file.sources.values()}  # fmt: skip
        for place, source in self._file.sources.items():
            factor = factors[place].detach().cpu()
            rows = len(factor)
            if source.swapped:
                factor = factor.roll(rows // 2, dims=0)
            whole = changed[source.key]
            whole[source.first : source.first + rows] = factor.view_as(
                whole[source.first : source.first + rows]
            )
        tensors |= {key: whole.to(tensors[key].dtype) for key, whole in changed.items()}
        metadata = {key: value for key, value in read_metadata(self.path).items()
                    if key not in STALE}  # fmt: skip
        with replace_atomically(path) as part:
            save_file(tensors, part, metadata | dict(history))


def _refuse(modules: Mapping[Place, Any], path: Path) -> None:
    """Raise ModelError unless all modules are plain pairs of factors."""
    kinds = {
        place: "DoRA" if isinstance(module, Pair) else {"loha": "LoHa", "lokr": "LoKr"}[
            module.algorithm]
        for place, module in modules.items()
        if not isinstance(module, Pair) or module.magnitude is not None
    }  # fmt: skip
    if kinds:
        names = sorted(".".join(place) for place in kinds)
        raise ModelError(
            f"{path} is a {' and '.join(sorted(set(kinds.values())))} in "
            f"{counted(len(kinds), 'module', 'modules')} ({name_some(names, 2)}); `repair` changes "
            "plain LoRA (LoCon included) only. Train again with the flags that the audit names."
        )


def _layers(pipeline: Any) -> dict[Place, nn.Module]:
    """Return the LoRA layers of a pipeline that carries one LoRA."""
    from peft.tuners.lora import LoraLayer

    components = {name: getattr(pipeline, name, None) for name in CARRIERS}
    return {
        (component, name.removeprefix("text_model.")): layer
        for component, part in components.items() if isinstance(part, nn.Module)
        for name, layer in part.named_modules() if isinstance(layer, LoraLayer)
    }  # fmt: skip
