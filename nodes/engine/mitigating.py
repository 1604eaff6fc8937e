"""What the mitigating nodes have in common: when to act, how far, and a run before its start."""

import torch
from comfy_api.latest import io

from ...shared.arrays import Float, Tensor
from ...shared.mitigation.gate import AppliedGate, Gate
from ...shared.mitigation.method import Start
from ...shared.score.calibration import Calibration
from .comfy_denoiser import ModelDenoiser
from .measuring import caveat_of
from .model_identity import settings
from .schema import CalibrationSocket

GATES = {"auto": "calibrated", "always": "always", "never": "never"}
"""Modes of the gate by what the widget calls them."""
PROMPT = "prompt"
"""Name of the one prompt of a denoiser here."""
TARGETS = ("calibration", "norm")


def gate_input() -> io.Combo.Input:
    """Return the input that says when to act."""
    return io.Combo.Input(
        "gate",
        options=list(GATES),
        default="auto",
        tooltip="auto: act if the prompt scores above the calibration's threshold. always: act on "
        "every prompt. never: switched off, nothing is measured.",
    )


def calibration_inputs() -> list:
    """Return the optional inputs of what the gate and the target are taken from."""
    return [
        CalibrationSocket.Input(
            "calibration",
            optional=True,
            tooltip="Of this very model and size: what the gate auto and target_quantile go by.",
        ),
        io.Boolean.Input(
            "force",
            default=False,
            optional=True,
            tooltip="Use a calibration of another model or other settings all the same.",
        ),
    ]


def target_inputs() -> list:
    """Return the inputs of the score at which a search may stop."""
    return [
        io.Combo.Input(
            "target_from",
            options=list(TARGETS),
            default=TARGETS[0],
            tooltip="Where the score to stop at comes from: target_quantile of the calibration's "
            "controls, or target_norm.",
        ),
        io.Float.Input(
            "target_quantile", default=0.8, min=0.0, max=1.0, step=0.01,
            tooltip="Stop when no more than this share of control prompts scores lower, 0 to 1. "
            "Only with target_from calibration.",
        ),
        io.Float.Input(
            "target_norm", default=3.0, min=0.0, max=10000.0, step=0.1,
            tooltip="Stop at this score, L2 norm in latent units, 0 to 10000; the paper takes 1 to "
            "5 for Stable Diffusion 1.4. Only with target_from norm.",
        ),
    ]  # fmt: skip


def target_settings(
    target_from: str, target_quantile: float, target_norm: float
) -> dict[str, float | None]:
    """Return what the widgets of `target_inputs` say, as the methods call it."""
    target = target_norm if target_from == "norm" else None
    return {"target": target, "target_quantile": target_quantile}


def gate_of(choice: str, calibration: Calibration | None) -> Gate:
    """Return the gate that the widget chose; prompts are probed at all the calibration's seeds.

    Raises:
        ValueError: It would have nothing to decide by.
    """
    if choice == "auto" and calibration is None:
        raise ValueError(
            "The gate auto needs a calibration to decide by: connect one (nodes Calibrate or Load "
            "Calibration), or set the gate to always."
        )
    seeds = 1 if calibration is None else len(calibration.settings["seeds"])
    return Gate(mode=GATES[choice], calibration=calibration, seeds=seeds)


def probe_rows(gate: Gate) -> int:
    """Return how many rows the network computes to score one prompt."""
    return 0 if gate.calibration is None else 2 * gate.seeds * gate.config.steps


def probe_of(
    denoiser: ModelDenoiser, gate: Gate, model: str, *, force: bool
) -> tuple[AppliedGate, str]:
    """Return what scores prompts for a gate, and "" or a caveat to print with every score.

    Args:
        denoiser: The network, at the size of the images.
        gate: Its calibration must fit.
        model: Sha256 of the weights.
        force: It need not fit.

    Raises:
        ValueError: It does not; names what differs.
    """
    caveat = ""
    if gate.calibration is not None:
        caveat = caveat_of(gate.calibration, model, settings(denoiser, gate.config), force)
    return AppliedGate(gate, denoiser), caveat


def start_of(denoiser: ModelDenoiser, gate: Gate, noise: Float[Tensor, " image *latent"]) -> Start:
    """Return a sampling run before its first step, at the first level that the gate measures at.

    Args:
        denoiser: With the prompt under the name `PROMPT`, and with gradients.
        gate: Its calibration may give a target.
        noise: Of unit variance.
    """
    rows, sigma = [0] * len(noise), denoiser.sigmas(gate.config.schedule_steps)[0]
    x = noise.to(denoiser.device) * denoiser.noise_scale(sigma)
    with torch.no_grad():
        x0_uncond = denoiser.denoise(x, sigma, denoiser.unconditional()[rows])
    return Start(
        denoiser=denoiser,
        cond=denoiser.encode([PROMPT])[rows],
        x=x,
        sigma=sigma,
        x0_uncond=x0_uncond,
        generator=torch.Generator("cpu").manual_seed(0),
        calibration=gate.calibration,
        network=denoiser.network.diffusion_model,
    )
