"""A concept as an adapter: a small LoRA that draws it on one model, its file, and its switch.

The file is a LoRA that diffusers and PEFT load, so that anybody can look at what was learnt. Its
header says of which model it is, how it was made, and the numbers that show that it learnt the
concept and nothing else. Trainers take the difference of predictions with the adapter and without.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...arrays import Float, Tensor
from ...files.weights import ModelError, read_header, read_metadata
from ...models.lora.layer_names import cores
from ...models.offload import weights_of
from ...wording import counted, name_some
from .subspace import load_tensors, parse_provenance, save_tensors

FORMAT = 1
"""Version of the file's header."""
HEADER, SAMPLES = "unmemorize.concept", "unmemorize.concept.weights"
"""Where a file's metadata keep the account, and values of the model's weights, both as JSON."""
ADAPTED = re.compile(r"(^|\.)(attn\w*|attention|self_attn|cross_attn|ff\w*|mlp|proj_mlp)(\.|$)")
"""Names of the linear layers that an adapter is learnt on: all attention and feed-forward."""
FACTORS = ".lora_A.weight", ".lora_B.weight"
SAMPLED = 8
"""Values of each weight that are kept, to know the model again."""
SAME = 0.01
"""How far they may be from the model's, as a share. Rounding to bfloat16 moves them by .001."""
NEEDED = {
    "model": ("sha256", "pipeline", "network", "parametrization"),
    "numbers": ("concept", "others", "threshold", "recall", "false_positives"),
    "made": ("from",),
}
"""What an account must hold."""

Pairs = Mapping[str, tuple[Tensor, Tensor]]
"""By the layer's name in diffusers: A [rank in ...] and B [out rank]; the change is B A."""


@dataclass(frozen=True, kw_only=True)
class ConceptAdapter:
    """What draws a concept on one model."""

    pairs: Pairs
    samples: Mapping[str, list[float]]
    """By layer, some values of the weight of the model that it was learnt on."""
    account: Mapping[str, Any]
    """Plain data, kept with the file.

    `model`: sha256 of its files, pipeline, network and parametrization. `names`: what captions call
    the concept, may be empty. `made`: from images or from a LoRA, and how. `numbers`: on images
    that it was not taught with, by how much it lowers the loss on those of the concept and on
    others, the threshold between them, and which share of each lies above it.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """What captions call the concept; empty where it has no name."""
        return tuple(self.account.get("names", ()))

    def save(self, path: Path) -> None:
        """Write a safetensors file that diffusers loads as a LoRA, whole or not at all."""
        component = "unet" if self.account["model"]["network"].startswith("UNet") else "transformer"
        tensors = {
            f"{component}.{name}{end}": factor
            for name, pair in self.pairs.items()
            for end, factor in zip(FACTORS, pair, strict=True)
        }
        account = {"format": FORMAT} | dict(self.account)
        save_tensors(path, tensors, {HEADER: account, SAMPLES: self.samples})

    @classmethod
    def load(cls, path: Path) -> "ConceptAdapter":
        """Read a file that `save` wrote.

        Raises:
            ModelError: The file is missing, cut, of another kind or version, without the numbers
                that show what it learnt, or these say that it learnt nothing.
        """
        tensors, metadata = load_tensors(
            path, HEADER, "holds no concept that `unmemorize concept learn` wrote. A LoRA of the "
            "concept becomes one with: unmemorize concept learn MODEL --images FOLDER --from-lora "
            f"{path}",
            known=(HEADER, SAMPLES),
        )  # fmt: skip
        try:
            account = parse_provenance(metadata[HEADER], f"{path}: the header's {HEADER}")
            samples = parse_provenance(metadata[SAMPLES], f"{path}: the header's {SAMPLES}")
            pairs = _pairs(tensors)
        except (KeyError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
        if (version := account.pop("format", None)) != FORMAT:
            raise ModelError(
                f"{path} has the format {version}, this version of unmemorize reads {FORMAT}. "
                "Learn the concept again: unmemorize concept learn"
            )
        lacking = [
            f"{part}.{key}"
            for part, keys in NEEDED.items()
            for key in keys
            if key not in (account.get(part) or {})
        ]
        if lacking:
            raise ModelError(
                f"{path} lacks {name_some(lacking)}, which say what the adapter learnt and on "
                "which model. Learn the concept again: unmemorize concept learn"
            )
        made = cls(pairs=pairs, samples=samples, account=account)
        if fault := not_learnt(account["numbers"]):
            raise ModelError(f"{path} is of no use: {fault}")
        return made


def holds_adapter(path: Path) -> bool:
    """Return whether a file holds a concept's adapter, as `ConceptAdapter.save` wrote it.

    Raises:
        ModelError: The file is missing, or not a whole safetensors file.
    """
    read_header(path)
    return HEADER in read_metadata(path)


def not_learnt(numbers: Mapping[str, Any]) -> str:
    """Return why an adapter did not learn its concept, with what to bring; empty where it did."""
    gain, above = numbers["concept"], numbers["recall"]
    if gain > numbers["others"] and above >= 0.5:
        return ""
    fault = (
        "the adapter learnt the concept too weakly"
        if gain > numbers["others"]
        else "the model draws the concept as well without the adapter as with it"
    )
    return (
        f"{fault}. It lowers the loss of images of the concept by {gain:.4f} and that of others by "
        f"{numbers['others']:.4f}, and tells {above:.0%} of the concept's images from others. "
        "Bring --others that resemble the concept's images and lack it, 16 or more images on which "
        "the concept is large and the content unlike, or more steps, as --steps 240 for a small "
        "mark. What the model knows already cannot be learnt."
    )


class ConceptSwitch:
    """Puts a concept's adapter on a network for as long as a block lasts.

    The layers change nothing outside of the block, and whatever else is on them (the LoRA that is
    being trained) stays as it is: inside the block the adapter's change is added.
    """

    def __init__(self, network: nn.Module, adapter: ConceptAdapter, strength: float = 1.0):
        """Look the layers up, in any dialect of their names, and see that it is the same model.

        Args:
            network: U-Net or transformer, with or without a LoRA of PEFT or a trainer on it.
            adapter: Of that model.
            strength: Factor of the change; 1 is as it was taught.

        Raises:
            ModelError: A layer is missing or of another size, or the weights are another model's.
        """
        self._pairs, self._strength = adapter.pairs, strength
        self._layers = located(network, adapter)
        check_same_model(network, adapter, self._layers)
        self._moved: dict[tuple[str, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def on(self) -> Iterator[None]:
        """Add the adapter's change to what the layers return, without gradients of its own."""
        with adding(self._layers, self._factors):
            yield

    def _factors(self, name: str, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of a layer where and as it computes, moved once."""
        key = name, like.device, like.dtype
        if key not in self._moved:
            a, b = self._pairs[name]
            self._moved[key] = a.to(like), self._strength * b.to(like)
        return self._moved[key]


Placed = Mapping[str, tuple[nn.Module, int]]
"""By the adapter's name of a layer: the live layer, and the first of its rows that are meant."""


@contextmanager
def adding(
    layers: Placed, factors: Callable[[str, Tensor], tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Add B A x to what layers return for as long as the block lasts.

    Args:
        layers: By name; of joined layers each part is one.
        factors: Returns A and B of a name, for inputs like a tensor.
    """
    with ExitStack() as undo:
        for name, (layer, first) in layers.items():

            def add(
                layer: nn.Module, args: tuple[Tensor], output: Tensor,
                name: str = name, first: int = first,
            ) -> Tensor:  # fmt: skip
                a, b = factors(name, args[0])
                change = _change(layer, args[0].to(a.dtype), a, b).to(output.dtype)
                if change.shape == output.shape:
                    return output + change
                rest = output.shape[-1] - first - change.shape[-1]
                return output + nn.functional.pad(change, (first, rest))

            undo.callback(layer.register_forward_hook(add).remove)
        yield


def adapted_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """Return the layers that an adapter is learnt on, by name: attention and feed-forward.

    Raises:
        ModelError: There are none.
    """
    layers = {
        name: layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and ADAPTED.search(name)
    }
    if not layers:
        raise ModelError(
            f"{type(network).__name__} has no linear layers in attention or feed-forward blocks, "
            "on which an adapter could be learnt."
        )
    return layers


def located(network: nn.Module, adapter: ConceptAdapter) -> Placed:
    """Return the live layers of an adapter, in any dialect of their names.

    Raises:
        ModelError: One is missing, or has another size.
    """
    wanted = {cores(name)[0]: name for name in adapter.pairs}
    found: dict[str, tuple[nn.Module, int]] = {}
    for name, layer in network.named_modules():
        if getattr(layer, "weight", None) is None or not isinstance(layer.weight, Tensor):
            continue
        parts, first = cores(name), 0
        if not set(parts) & wanted.keys() or wanted[parts[0]] in found:
            continue
        if missing := [part for part in parts if part not in wanted]:
            raise ModelError(f"{name} joins {', '.join(parts)}: the adapter lacks {missing[0]}.")
        for part in parts:
            found[wanted[part]] = layer, first
            first += len(adapter.pairs[wanted[part]][1])
    if missing := [name for name in adapter.pairs if name not in found]:
        count = counted(len(missing), "layer is", "layers are")
        raise ModelError(
            f"The concept is of another architecture ({adapter.account['model']['network']}): "
            f"{count} not in this {type(network).__name__}, {name_some(missing, 3)}. Learn it on "
            "this model: unmemorize concept learn"
        )
    return found


def weight_samples(network: nn.Module, layers: Placed, pairs: Pairs) -> dict[str, list[float]]:
    """Return some values of the weight of each layer, by which the model is known again.

    Quantized weights, which hold codes, are left out.

    Raises:
        ModelError: A weight has another size than the adapter's factors.
    """
    state = weights_of(network) if any(p.is_meta for p in network.parameters()) else {}
    names = {id(layer): name for name, layer in network.named_modules()}
    samples, wrong = {}, []
    for name, (layer, first) in layers.items():
        a, b = pairs[name]
        weight = state.get(f"{names[id(layer)]}.weight", layer.weight).detach()
        if not weight.is_floating_point() or weight.element_size() == 1 or weight.ndim < 2:
            continue
        rows = weight[first : first + len(b)].flatten(1)
        if rows.shape != (len(b), a[0].numel()):
            wrong.append(f"{name} ({tuple(rows.shape)}, expected {(len(b), a[0].numel())})")
            continue
        flat = rows.flatten()
        places = torch.linspace(0, len(flat) - 1, SAMPLED, dtype=torch.float64).long()
        samples[name] = [float(f"{v:.6g}") for v in flat[places.to(flat.device)].float().tolist()]
    if wrong:
        raise ModelError(
            f"The concept is of another architecture: {counted(len(wrong), 'layer', 'layers')} of "
            f"another size, {name_some(wrong, 2)}. Learn it on this model: unmemorize concept learn"
        )
    return samples


def check_same_model(network: nn.Module, adapter: ConceptAdapter, layers: Placed) -> None:
    """Make sure that a network is the one that an adapter was learnt on, up to its precision.

    Raises:
        ModelError: It is another.
    """
    here = weight_samples(network, layers, adapter.pairs)
    shares = []
    for name in here.keys() & adapter.samples.keys():
        live, kept = torch.tensor(here[name]), torch.tensor(adapter.samples[name])
        shares.append(float((live - kept).norm() / kept.norm().clamp_min(1e-12)))
    far = sum(shares) / len(shares) if shares else 0.0
    if far > SAME:
        raise ModelError(
            f"The concept was learnt on another model (sha256 "
            f"{adapter.account['model']['sha256'][:12]}): values of its weights differ by "
            f"{far:.1%} from this one's. Learn it on this model: unmemorize concept learn"
        )


def _change(layer: nn.Module, x: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, "..."]:
    """Return B A x for a linear layer, or for a convolution with its stride and padding."""
    if a.ndim == 2:
        return nn.functional.linear(nn.functional.linear(x, a), b)
    conv: Any = getattr(layer, "base_layer", layer)
    low = nn.functional.conv2d(x, a, None, conv.stride, conv.padding, conv.dilation)
    return nn.functional.conv2d(low, b[..., None, None])


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors by layer, from the keys of a file.

    Raises:
        KeyError: A factor has no partner.
    """
    stems = dict.fromkeys(key.removesuffix(end) for key in tensors for end in FACTORS
                          if key.endswith(end))  # fmt: skip
    if 2 * len(stems) != len(tensors):
        raise ValueError("it holds tensors that are no factors.")
    return {
        stem.partition(".")[2]: (tensors[stem + FACTORS[0]], tensors[stem + FACTORS[1]])
        for stem in stems
    }
