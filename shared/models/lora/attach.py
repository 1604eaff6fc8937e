"""LoRA files on a diffusers pipeline, as layers of PEFT: read strictly, switched off and on."""

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...dependencies import require
from ...files.weights import ModelError
from ...wording import counted, name_some
from .files import LoraFile, Pair, read_lora
from .lycoris import Product
from .names import CARRIERS

logger = logging.getLogger(__name__)

ADAPTER = "unmemorize"
LARGE = 10.0
"""A change of so many times a weight's own size is told; trainings end far below 1."""
TINY = 1e-30


def load_lora(pipeline: Any, path: Path, strength: float = 1.0) -> None:
    """Put a LoRA file on a pipeline, all of it, or raise and leave the pipeline as it was.

    The loaders of libraries skip what they do not know. Here PEFT makes a layer for every module
    of the file, and each takes the factors and the scale that the file has for it. What is left
    out, and changes out of proportion, are logged as warnings.

    Args:
        pipeline: A diffusers pipeline.
        path: The file.
        strength: Factor of every module's scale, as interfaces call it.

    Raises:
        ModelError: When the file is not a whole LoRA for this architecture, or changes nothing;
            names the keys.
    """
    require("peft", purpose="Loading a LoRA", extra="models")
    file = read_lora(pipeline, path)
    targets = _targets(pipeline, file, path)
    remarks = _remarks(pipeline, file, targets, path)
    taken = {name for layer in _layers(pipeline) for name in layer.scaling}
    adapter = next(
        f"{ADAPTER}_{i}" for i in range(999)
        if not any(name.startswith(f"{ADAPTER}_{i}") for name in taken)
    )  # fmt: skip
    before = {name: _state(getattr(pipeline, name)) for name in targets}
    try:
        for component, modules in targets.items():
            _attach(getattr(pipeline, component), modules, adapter, strength)
    except BaseException as error:
        for component, modules in targets.items():
            _detach(getattr(pipeline, component), modules, adapter, before[component])
        if isinstance(error, Exception):
            raise ModelError(f"{path} could not be loaded: {error}") from error
        raise
    for remark in remarks:
        logger.warning("%s", remark)


def _remarks(
    pipeline: Any, file: LoraFile, targets: Mapping[str, Mapping[str, Any]], path: Path
) -> list[str]:
    """Return what a user should know of a file that can be loaded.

    Raises:
        ModelError: No module changes anything.
    """
    shares = {}
    for component, modules in targets.items():
        for name, module in modules.items():
            layer = getattr(pipeline, component).get_submodule(name)
            weight = getattr(layer, "base_layer", layer).weight
            try:
                size = module.size()
            except RuntimeError as error:
                raise ModelError(
                    f"{path} could not be loaded: the factors of {component}.{name} do not fit "
                    f"together ({error})."
                ) from error
            still = isinstance(module, Pair) and module.magnitude is not None
            if size := size or float(still):  # magnitudes alone may change a weight
                shares[f"{component}.{name}"] = size / max(float(weight.float().norm()), TINY)
    if not shares:
        raise ModelError(
            f"{path} is a LoRA without any effect: in each module ({len(file.modules)}) a factor "
            "or the alpha is zero. Give the file of a later step, or of a training that moved it."
        )
    remarks = []
    if huge := [name for name, share in shares.items() if share > LARGE]:
        most = max(shares, key=lambda name: shares[name])
        remarks.append(
            f"{path} changes {counted(len(huge), 'weight', 'weights')} of {len(file.modules)} by "
            f"more than {LARGE:g} times its own size ({most}: {shares[most]:.3g} times): what it "
            "draws may be noise. Is its alpha right?"
        )
    if file.embeddings:
        names = name_some(file.embeddings)
        remarks.append(
            f"{path} brings {counted(len(file.embeddings), 'embedding', 'embeddings')} along that "
            f"{'is' if len(file.embeddings) == 1 else 'are'} left out: {names}. Prompts that name "
            "them are read without them."
        )
    return remarks


def _state(part: nn.Module) -> tuple[list[tuple[nn.Parameter, bool]], dict[str, Any]]:
    """Return what PEFT changes of a network besides its layers: gradients and attributes."""
    own = {name: vars(part)[name] for name in ("peft_config", "_hf_peft_config_loaded")
           if name in vars(part)}  # fmt: skip
    return [(p, p.requires_grad) for p in part.parameters()], own


def _targets(pipeline: Any, file: LoraFile, path: Path) -> dict[str, dict[str, Pair | Product]]:
    """Return the file's modules by component and by the full name of the layer they change.

    Raises:
        ModelError: A layer is not there, or has another size.
    """
    targets: dict[str, dict[str, Pair | Product]] = {}
    absent, wrong = [], []
    for component in CARRIERS:
        part = getattr(pipeline, component, None)
        named = part.named_modules() if isinstance(part, nn.Module) else ()
        layers = {name.removeprefix("text_model."): (name, layer) for name, layer in named}
        for (owner, short), module in file.modules.items():
            if owner != component:
                continue
            name, layer = layers.get(short, (short, None))
            weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
            if weight is None:
                absent.append(f"{component}.{short}")
            elif not _fits(module, weight):
                sizes = [" x ".join(map(str, shape)) for shape in (module.shape, weight.shape)]
                wrong.append(
                    f"{component}.{short} ({sizes[0]} in the file, {sizes[1]} in the model)"
                )
            targets.setdefault(component, {})[name] = module
    faults = []
    if absent:
        modules = counted(len(absent), "module is", "modules are")
        faults.append(f"{modules} not in it: {name_some(absent)}")
    if wrong:
        modules = counted(len(wrong), "has", "have")
        faults.append(f"{modules} another size: {name_some(wrong, 3)}")
    if faults:
        raise ModelError(
            f"{path} is a LoRA for another architecture than this {type(pipeline).__name__}: "
            f"{'; '.join(faults)}. Give the base model it was trained on."
        )
    return targets


def _fits(module: Pair | Product, weight: Tensor) -> bool:
    """Return whether a module of the file can be put on a weight."""
    rows, columns = weight.shape[0], math.prod(weight.shape[1:])
    if isinstance(module, Product):  # those of convolutions are flat
        return (module.shape[0], math.prod(module.shape[1:])) == (rows, columns)
    return (
        module.shape == tuple(weight.shape)
        and module.rank == module.b.shape[1]
        and (module.magnitude is None or len(module.magnitude) == rows)
    )


@torch.no_grad()
def _attach(
    part: nn.Module,
    modules: Mapping[str, Pair | Product],
    adapter: str,
    strength: float,
) -> None:
    """Make a layer of PEFT for each module and fill it.

    Args:
        part: The network; when this raises, `_detach` brings it back.
        modules: By the full name of the layer they change.
        adapter: Name by which PEFT knows them.
        strength: Factor of every module's scale.

    Raises:
        RuntimeError: The factors of a module do not fit together, or not to its layer.
    """
    import peft

    alike: dict[tuple, list[str]] = {}
    for name, module in modules.items():
        alike.setdefault(module.settings, []).append(name)
    for names in alike.values():
        module, options = modules[names[0]], {"target_modules": "|".join(map(re.escape, names))}
        if isinstance(module, Product):  # ranks come with the factors
            configs = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}
            config = configs[module.algorithm](r=1, alpha=1, **options)
        else:
            alpha = module.rank if module.alpha is None else module.alpha
            config = peft.LoraConfig(
                r=module.rank, lora_alpha=alpha, use_dora=module.magnitude is not None, **options
            )
        with warnings.catch_warnings():
            # Each group is on layers of its own.
            warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
            peft.inject_adapter_in_model(config, part, _adapter_of(module, adapter))
    for name, module in modules.items():
        layer, own = part.get_submodule(name), _adapter_of(module, adapter)
        _fill(layer, module, own)
        layer.scaling[own] *= strength
    part._hf_peft_config_loaded = True  # for the pipeline's own methods, such as fuse_lora


def _adapter_of(module: Pair | Product, adapter: str) -> str:
    """Return the adapter's name: PEFT knows one parametrization by a name."""
    return f"{adapter}_{module.algorithm}" if isinstance(module, Product) else adapter


def _fill(layer: Any, module: Pair | Product, adapter: str) -> None:
    """Put the factors of a file into a layer that PEFT made."""
    if isinstance(module, Product):
        weight = layer.get_base_layer().weight
        for name in layer.adapter_layer_names:
            factors = getattr(layer, name)
            if adapter in factors:
                del factors[adapter]
            if name in module.factors:
                factors[adapter] = nn.Parameter(module.factors[name].to(weight))
        layer.scaling[adapter] = module.scaling
        layer.get_delta_weight(adapter)
    else:
        layer.lora_A[adapter].weight.copy_(module.a)
        layer.lora_B[adapter].weight.copy_(module.b)
        if module.magnitude is not None:
            magnitude = layer.lora_magnitude_vector[adapter].weight
            magnitude.copy_(module.magnitude.view_as(magnitude))
    for name in layer.adapter_layer_names:
        getattr(layer, name).requires_grad_(False)


def _detach(
    part: nn.Module, modules: Mapping[str, Any], adapter: str,
    before: tuple[list[tuple[nn.Parameter, bool]], dict[str, Any]],
) -> None:  # fmt: skip
    """Take out the layers that `_attach` has made, as far as it came."""
    for name, module in modules.items():
        layer, own = part.get_submodule(name), _adapter_of(module, adapter)
        if own in getattr(layer, "scaling", {}):
            layer.delete_adapter(own)
            if not layer.scaling:
                above, _, last = name.rpartition(".")
                setattr(part.get_submodule(above), last, layer.base_layer)
        getattr(part, "peft_config", {}).pop(own, None)
    trained, attributes = before
    for parameter, flag in trained:
        parameter.requires_grad_(flag)
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name not in attributes:
            vars(part).pop(name, None)


def _layers(pipeline: Any) -> list[Any]:
    """Return the PEFT layers of all components."""
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:  # diffusers cannot have loaded a LoRA without it
        return []
    components = (
        [pipeline]
        if isinstance(pipeline, nn.Module)
        else (getattr(pipeline, name, None) for name in CARRIERS)
    )
    return [
        module
        for component in components
        if isinstance(component, nn.Module)
        for module in component.modules()
        if isinstance(module, BaseTunerLayer)
    ]


def has_lora(pipeline: Any) -> bool:
    """Return whether the pipeline carries a LoRA, active or not."""
    return bool(_layers(pipeline))


def adapter_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a network that PEFT added to it, of any kind of adapter."""
    layers = _layers(network)
    base = {id(each) for layer in layers for each in layer.get_base_layer().parameters()}
    return [each for layer in layers for each in layer.parameters() if id(each) not in base]


@contextmanager
def lora_disabled(pipeline: Any) -> Iterator[None]:
    """Switch every LoRA of a pipeline or a network off for a block; afterwards all is as before.

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
