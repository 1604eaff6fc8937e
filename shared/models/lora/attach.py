"""LoRA files on a diffusers pipeline: read strictly, switched off and on again."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...dependencies import require
from ...files.weights import ModelError
from ...wording import counted, name_some
from .files import COMPONENTS, LoraFile, Place, read_lora
from .lycoris import attach_products, detach_products

ADAPTER = "unmemorize"


def load_lora(pipeline: Any, path: Path) -> None:
    """Put a LoRA file on a pipeline, all of it, or raise and leave the pipeline as it was.

    The dialects (kohya, PEFT, diffusers, LyCORIS) are read by diffusers' own converters, which skip
    what they do not know; here every key must arrive in the layer it names, with the file's scale.
    LoHa, LoKr and DoRA become layers of PEFT.

    Raises:
        ModelError: When the file is not a whole LoRA for this architecture; names the keys.
    """
    require("peft", purpose="Loading a LoRA", extra="models")
    file = read_lora(pipeline, path)
    _check_fits(pipeline, file, path)
    _attach(pipeline, file, path)


def _modules(pipeline: Any, component: str) -> dict[str, torch.nn.Module]:
    """Return the modules of a component, without the prefix transformers 5 dropped."""
    part = getattr(pipeline, component, None)
    if not isinstance(part, torch.nn.Module):
        return {}
    return {name.removeprefix("text_model."): module for name, module in part.named_modules()}


def _check_fits(pipeline: Any, file: LoraFile, path: Path) -> None:
    """Raise ModelError unless every module is there and has the factors' sizes."""
    modules = {component: _modules(pipeline, component) for component in COMPONENTS}
    shapes = {
        place: (len(pair["B"]), *pair["A"].shape[1:]) for place, pair in file.pairs.items()
    } | {place: product.shape for place, product in file.products.items()}
    absent, wrong = [], []
    for (component, name), shape in shapes.items():
        module = modules[component].get(name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        if weight is None:
            absent.append(f"{component}.{name}")
        elif not _fits(file, (component, name), shape, weight):
            wrong.append(
                f"{component}.{name} ({shape[0]} x {shape[1]} in the file, "
                f"{weight.shape[0]} x {weight.shape[1]} in the model)"
            )
    if absent or wrong:
        told = []
        if absent:
            modules = counted(len(absent), "module is", "modules are")
            told.append(f"{modules} not in it: {name_some(absent)}")
        if wrong:
            modules = counted(len(wrong), "has", "have")
            told.append(f"{modules} another size: {name_some(wrong, 3)}")
        raise ModelError(
            f"{path} is a LoRA for another architecture than this {type(pipeline).__name__}: "
            f"{'; '.join(told)}. Give the base model it was trained on."
        )


def _fits(file: LoraFile, place: Place, shape: tuple[int, ...], weight: Tensor) -> bool:
    """Return whether a module of the file can be put on a weight."""
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    if place in file.products:  # those of convolutions are flat
        return (shape[0], math.prod(shape[1:])) == (rows, columns)
    pair, magnitude = file.pairs[place], file.magnitudes.get(place)
    return (
        shape == tuple(weight.shape)
        and pair["A"].shape[0] == pair["B"].shape[1]
        and (magnitude is None or len(magnitude) == rows)
    )


def _attach(pipeline: Any, file: LoraFile, path: Path) -> None:
    """Load the factors and see that each layer holds them, and the scale of the file."""
    taken = {name for layer in _layers(pipeline) for name in layer.scaling}
    adapter = next(
        f"{ADAPTER}_{i}" for i in range(999)
        if not any(name.startswith(f"{ADAPTER}_{i}") for name in taken)
    )  # fmt: skip
    try:
        _load_parts(pipeline, file, adapter)
        lost = []
        for (component, name), pair in file.pairs.items():
            layer = _modules(pipeline, component).get(name)
            magnitude = file.magnitudes.get((component, name))
            expected = pair if magnitude is None else pair | {"magnitude": magnitude}
            if not _holds(layer, adapter, expected):
                lost.append(f"{component}.{name}")
            elif file.scales or not file.metadata:  # diffusers loses alphas of text encoders
                rank = len(pair["A"])
                alpha = file.scales.get(f"{component}.{name}", float(rank))
                layer.lora_alpha[adapter], layer.scaling[adapter] = alpha, alpha / rank
        if lost:
            modules = counted(len(lost), "module was", "modules were")
            raise ModelError(f"{path}: {modules} not filled: {name_some(lost)}.")
        for part, products in _products(pipeline, file):
            attach_products(part, products, adapter)
    except Exception as error:
        for part, products in _products(pipeline, file):
            detach_products(part, products, adapter)
        if any(adapter in getattr(layer, "lora_A", {}) for layer in _layers(pipeline)):
            pipeline.delete_adapters(adapter)
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} could not be loaded: {error}") from error
    for layer in _layers(pipeline):
        for name in layer.adapter_layer_names:
            for factor in getattr(layer, name).values():
                factor.requires_grad_(False)


def _holds(layer: Any, adapter: str, factors: dict[str, Tensor]) -> bool:
    """Return whether a layer carries exactly these factors."""
    if layer is None or adapter not in getattr(layer, "lora_A", {}):
        return False
    own = {"A": layer.lora_A[adapter].weight, "B": layer.lora_B[adapter].weight}
    if adapter in layer.lora_magnitude_vector:
        own["magnitude"] = layer.lora_magnitude_vector[adapter].weight.flatten()
    return own.keys() == factors.keys() and all(
        torch.equal(own[f].cpu(), factors[f].to(own[f].dtype)) for f in own
    )


def _products(pipeline: Any, file: LoraFile) -> Iterator[tuple[torch.nn.Module, dict]]:
    """Yield the components with LoHa or LoKr modules, and these by their full names."""
    for part in sorted({component for component, _ in file.products}):
        module = getattr(pipeline, part)
        yield (
            module,
            {
                f"{_prefix(module)}{name}": product
                for (component, name), product in file.products.items()
                if component == part
            },
        )


def _prefix(module: torch.nn.Module) -> str:
    """Return what transformers 4 puts before the names of a text encoder's modules."""
    return "text_model." if hasattr(module, "text_model") else ""


def _load_parts(pipeline: Any, file: LoraFile, adapter: str) -> None:
    """Hand each component its factors under the names PEFT uses."""
    metadata = None if file.scales else file.metadata
    for part in sorted({component for component, _ in file.pairs}):
        module = getattr(pipeline, part)
        state = {}
        for (component, name), pair in file.pairs.items():
            if component == part:
                layer = f"{part}.{_prefix(module)}{name}"
                state |= {f"{layer}.lora_{factor}.weight": pair[factor] for factor in "AB"}
                if (magnitude := file.magnitudes.get((component, name))) is not None:
                    like = (1, -1, 1, 1) if pair["A"].ndim == 4 else (-1,)
                    state[f"{layer}.lora_magnitude_vector.weight"] = magnitude.view(like)
        common = {"adapter_name": adapter, "_pipeline": pipeline, "metadata": metadata}
        if part in ("unet", "transformer"):
            module.load_lora_adapter(state, prefix=part, **common)
        else:
            pipeline.load_lora_into_text_encoder(
                state, network_alphas=None, text_encoder=module, prefix=part, **common
            )


def _layers(pipeline: Any) -> list[Any]:
    """Return the PEFT layers of all components."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # diffusers cannot have loaded a LoRA without it
        return []
    components = (getattr(pipeline, name, None) for name in COMPONENTS)
    return [
        module
        for component in components
        if isinstance(component, torch.nn.Module)
        for module in component.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def has_lora(pipeline: Any) -> bool:
    """Return whether the pipeline carries a LoRA, active or not."""
    return bool(_layers(pipeline))


@contextmanager
def lora_disabled(pipeline: Any) -> Iterator[None]:
    """Switch every LoRA of the pipeline off for a block; afterwards all is as before.

    Raises:
        ValueError: When a LoRA is fused into the weights and cannot be switched off.
    """
    layers = _layers(pipeline)
    if any(layer.merged for layer in layers):
        raise ValueError("A LoRA is fused into the weights. Type: pipeline.unfuse_lora()")
    active = [layer for layer in layers if not layer.disable_adapters]
    trained = [(p, p.requires_grad) for layer in active for p in layer.parameters()]
    try:
        for layer in active:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in active:
            layer.enable_adapters(True)
        for parameter, flag in trained:  # PEFT switches gradients along with adapters
            parameter.requires_grad_(flag)
