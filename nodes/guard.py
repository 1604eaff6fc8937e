"""Node: mitigation while any sampler samples, only where a prompt is memorized."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from comfy_api.latest import io

from ..shared.mitigation.delayed_guidance import DelayedGuidance
from ..shared.mitigation.initial_noise import InitialNoise
from ..shared.mitigation.method import Method
from ..shared.score.calibration import Calibration
from .engine.damped_attention import ComfyAttractionRepulsion
from .engine.guarding import guard
from .engine.neighbours import FolderNeighbours
from .engine.watching import watch
from .inputs import (
    GATES,
    CalibrationSocket,
    RecordSocket,
    gate_of,
    schema,
    target_inputs,
    target_of,
)

Number = partial(io.Float.Input, optional=True)


class MemorizationGuard(io.ComfyNode):
    """Methods that act on guidance, attention or the initial noise, behind a gate."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="UnmemorizeGuard",
            search_aliases=["unmemorize guard", "memorisation", "delayed guidance", "mitigation"],
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("gate", options=list(GATES), default="auto"),
                *method_inputs(),
                io.Conditioning.Input("negative", optional=True),
                CalibrationSocket.Input("calibration", optional=True),
                io.Boolean.Input("force", default=False, optional=True),
                io.Vae.Input("vae", optional=True),
            ],
            outputs=[io.Model.Output("guarded"), RecordSocket.Output("record")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        gate: str,
        method: str | Mapping[str, Any],
        negative: list | None = None,
        calibration: Calibration | None = None,
        force: bool = False,
        vae: Any = None,
        **parameters: Any,
    ) -> io.NodeOutput:
        if gate == "never":
            return io.NodeOutput(*watch(model))
        chosen = chosen_method(method, parameters, vae)
        # Without a calibration the run looks for the one that was made by itself at its size.
        waits = gate == "auto" and calibration is None
        decides = None if waits else gate_of(gate, calibration)
        guarded = guard(model, chosen, decides, empty=negative, force=force)
        return io.NodeOutput(*guarded)


def method_inputs() -> list:
    """Return the combo of methods, which shows the parameters of the chosen one alone.

    ComfyUI before 0.16 has no such combo: all parameters are shown then, under the names that API
    prompts use in either case.
    """
    inputs = {name: parameters() for name, (_, parameters) in METHODS.items()}
    if hasattr(io, "DynamicCombo"):
        options = [io.DynamicCombo.Option(name, own) for name, own in inputs.items()]
        return [io.DynamicCombo.Input("method", options=options)]
    every = {own.id: own for group in inputs.values() for own in group}
    for name, own in every.items():
        own.id = f"method.{name}"
    return [io.Combo.Input("method", options=[*inputs]), *every.values()]


def chosen_method(
    method: str | Mapping[str, Any], others: Mapping[str, Any], vae: Any = None
) -> Method:
    """Return the method that the widgets choose.

    Args:
        method: The combo's value: its name, or with its parameters as `DynamicCombo` gives them.
        others: Parameters of all methods by prefixed name, where there is no such combo.
        vae: VAE that is connected, for the method that encodes images.
    """
    if isinstance(method, str):
        flat = {name.removeprefix("method."): value for name, value in others.items()}
        method = flat | {"method": method}
    make, parameters = METHODS[method["method"]]
    if make is _training_images:
        make = partial(make, vae)
    own = {parameter.id: method.get(parameter.id) for parameter in parameters()}
    # A parameter that an API prompt leaves out is absent or None, by version.
    return make(**{key: value for key, value in own.items() if value is not None})


def _opposite(opposite_scale: float = -2.0, opposite_until: float = 0.35) -> Method:
    """Return opposite guidance as its authors set it: the prompt comes in where it ends."""
    return DelayedGuidance(
        mode="static",
        start_percent=opposite_until,
        opposite_scale=opposite_scale,
        opposite_until=opposite_until,
    )


def _initial_noise(
    iterations: int = 50,
    learning_rate: float = 0.01,
    target_from: str = "calibration",
    target_quantile: float = 0.8,
    target_norm: float = 3.0,
) -> Method:
    target = target_of(target_from, target_quantile, target_norm)
    return InitialNoise(iterations=iterations, learning_rate=learning_rate, **target)


def _training_images(
    vae: Any, folder: str = "", despecification: float = 6.5, repulsion: float = 0.5
) -> Method:
    if vae is None:
        raise ValueError(
            "The method training images of Memorization Guard encodes the images of a folder: "
            "connect the model's VAE."
        )
    settings = {"despecification": despecification, "repulsion": repulsion}
    return FolderNeighbours(folder=folder, vae=vae, settings=settings)


def _delay_inputs() -> list:
    return [
        Number(
            "start_percent", default=0.5, min=0.0, max=1.0, step=0.01,
            tooltip="Share of the noise schedule after which the prompt comes in, 0 to 1; with "
            "delayed guidance at the latest. The paper takes 0.5.",
        ),
        Number(
            "scale_before", default=0.0, min=-20.0, max=20.0, step=0.1,
            tooltip="cfg until then, -20 to 20: 0 leaves the prompt out, 1 follows it without "
            "guidance.",
        ),
    ]  # fmt: skip


def _opposite_inputs() -> list:
    return [
        Number(
            "opposite_scale", default=-2.0, min=-20.0, max=0.0, step=0.1,
            tooltip="cfg until opposite_until, -20 to 0; the authors take -2.",
        ),
        Number(
            "opposite_until", default=0.35, min=0.0, max=1.0, step=0.01,
            tooltip="Share of the noise schedule, 0 to 1, after which the sampler's own cfg "
            "comes in; the authors take 0.35.",
        ),
    ]  # fmt: skip


def _attention_inputs() -> list:
    return [
        Number(
            "alpha", default=0.3, min=0.0, max=1.0, step=0.01,
            tooltip="Factor on the logits of tokens that spike, 0 to 1; 1 damps nothing. The "
            "authors take 0.3.",
        ),
        Number(
            "tau", default=0.1, min=-10.0, max=10.0, step=0.01,
            tooltip="A token spikes this many standard deviations above the mean over tokens, "
            "-10 to 10; the authors take 0.1.",
        ),
        Number(
            "repulsion", default=2.0, min=0.0, max=20.0, step=0.1,
            tooltip="How far away from the undamped prediction, 0 to 20 as cfg counts; the "
            "authors take 2.",
        ),
        io.Boolean.Input(
            "fade", default=True, optional=True,
            tooltip="Let the repulsion fall to 0 over the noise schedule, as the authors do.",
        ),
        io.Combo.Input(
            "blocks", options=["early", "all"], default="early", optional=True,
            tooltip="Damp in the down and middle blocks of the U-Net, or in all of them.",
        ),
    ]  # fmt: skip


def _noise_inputs() -> list:
    return [
        io.Int.Input(
            "iterations", default=50, min=0, max=1000, optional=True,
            tooltip="Steps at most, 0 to 1000. Each costs two passes there and back per image.",
        ),
        Number(
            "learning_rate", default=0.01, min=0.0001, max=1.0, step=0.001, round=0.0001,
            tooltip="Size of a step of AdamW in units of the noise's standard deviation, 0.0001 to "
            "1; the authors take 0.01.",
        ),
        *target_inputs(optional=True),
    ]  # fmt: skip


def _training_inputs() -> list:
    return [
        io.String.Input(
            "folder", default="", optional=True,
            tooltip="Folder of training images, absolute or below ComfyUI's input folder, with all "
            "below it. Captions beside them are not used here; unmemorize mitigate uses them.",
        ),
        Number(
            "despecification", default=6.5, min=0.0, max=100.0, step=0.1,
            tooltip="How far cfg is reduced: this number times the similarity to the nearest "
            "training image, 0 to 100, at most down to 1.",
        ),
        Number(
            "repulsion", default=0.5, min=0.0, max=10.0, step=0.05,
            tooltip="How far away from that image, 0 to 10 as a share of the predicted image.",
        ),
    ]  # fmt: skip


METHODS: dict[str, tuple[Callable[..., Method], Callable[[], list]]] = {
    "delayed guidance": (partial(DelayedGuidance, mode="dynamic"), _delay_inputs),
    "static delay": (partial(DelayedGuidance, mode="static"), _delay_inputs),
    "opposite guidance": (_opposite, _opposite_inputs),
    "attention": (ComfyAttractionRepulsion, _attention_inputs),
    "initial noise": (_initial_noise, _noise_inputs),
    "training images": (_training_images, _training_inputs),
}
"""By the name in the combo: what makes the method, and the parameters that this takes, by id."""
