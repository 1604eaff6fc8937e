"""A pipeline that no family declares: tried by running it, and checked, or refused with the reason.

One network pass of a single image shows how the pipeline packs latents and what it makes of the
network's output, another one how it is guided. What was learnt so is then put to the test.
"""

import inspect
import re
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ...score.denoiser import Conditioning
from ..calls.hold import accepted, unfollowed
from ..calls.network_call import NetworkCall, NotFollowed, names_of
from ..calls.quiet import quiet
from .family import NETWORKS, OTHER_PROMPT, Family, Guidance

_TRIED: "WeakKeyDictionary[Any, type[Family]]" = WeakKeyDictionary()
STEPS = 4
"""Of a trial run, of which the first is made."""
SIDE = 256
"""Pixels of a trial image, at most."""
FRAMES = 9
"""Of a trial clip."""
EDITING = re.compile("Edit|Fill|Inpaint|Img2Img|ImageTo|Control|Upscale|Redux|Condition")
"""Words in the names of pipelines that take an image."""


class _Stepped(BaseException):
    """The scheduler's step; no pipeline catches it as an error of its own."""


class _Trial:
    """One step of a pipeline's run: what its network was called with, and what became of it."""

    def __init__(self, family: Family, prompt: str, **arguments: Any):
        self.calls: list[tuple[NetworkCall, Any]] = []
        self.sample = self.output = torch.empty(0)
        pipeline, scheduler = family.pipeline, family._scheduler()
        kept, names = dict(vars(pipeline)), names_of(family.network)

        def seen(network: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            self.calls.append((NetworkCall(args=args, kwargs=kwargs, names=names), output))

        def step(model_output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> None:
            self.output, self.sample, self.timestep = model_output, sample, float(timestep)
            raise _Stepped

        scheduler.step = step
        hook = family.network.register_forward_hook(seen, with_kwargs=True)
        given = {
            "prompt": prompt, "num_inference_steps": STEPS, "output_type": "latent",
            "generator": torch.Generator("cpu").manual_seed(0), **family._arguments(), **arguments,
        }  # fmt: skip
        try:
            with quiet(), unfollowed(), torch.no_grad():
                vars(pipeline)["scheduler"] = scheduler
                vars(pipeline)["_progress_bar_config"] = {"disable": True}
                pipeline(**accepted(pipeline, given))
        except _Stepped:
            pass
        finally:
            hook.remove()
            vars(pipeline).clear()
            vars(pipeline).update(kept)
        if not self.calls:
            raise NotFollowed("its call made no step with its network")


def undeclared(pipeline: Any, known: str) -> type[Family]:
    """Return a family made for a pipeline that none declares, once it has passed the check.

    Args:
        pipeline: Of diffusers.
        known: The names of the declared ones, for the message.

    Raises:
        ValueError: It is refused; says why, and what to load instead where that is known.
    """
    cls = type(pipeline)
    if not (hasattr(pipeline, "components") and hasattr(pipeline, "scheduler")):
        raise ValueError(
            f"{cls.__name__} is not supported; expected one of {known}. Load the text-to-image "
            "pipeline of this model."
        )
    if reason := refusal(cls):
        raise ValueError(f"{cls.__name__} is not supported: {reason}")
    if pipeline not in _TRIED:
        try:
            _TRIED[pipeline] = _learnt(pipeline)
        except Exception as error:  # a call that was never meant for this raises anything
            reason = str(error) if isinstance(error, NotFollowed) else (
                f"its call fails for a prompt alone ({type(error).__name__}: {str(error)[:200]})"
            )  # fmt: skip
            raise ValueError(
                f"{cls.__name__} is not supported: it was tried as a text-to-image pipeline, and "
                f"{reason}. {instead(cls)}"
            ) from error
    return _TRIED[pipeline]


def refusal(cls: type) -> str:
    """Return why pipelines of a class cannot be text-to-image, "" if they may be tried."""
    takes = inspect.signature(cls.__call__).parameters
    if "prompt" not in takes:
        return f"it takes no prompt, so it is not text-to-image. {instead(cls)}"
    needed = [
        name for name, each in takes.items()
        if each.default is inspect.Parameter.empty and name not in ("self", "prompt")
        and each.kind is not inspect.Parameter.VAR_KEYWORD
    ]  # fmt: skip
    needed += [name for name in ("mask_image", "strength") if name in takes]
    return f"its call needs `{needed[0]}`. {instead(cls)}" if needed else ""


def instead(cls: type) -> str:
    """Return what to load instead of a pipeline that needs more than a prompt.

    Diffusers' own tables know the text-to-image pipeline of some; of others it has the beginning of
    their name: QwenImageEditPlusPipeline comes from QwenImagePipeline.
    """
    import diffusers

    with warnings.catch_warnings():  # all pipelines are imported, and what some import warns
        warnings.simplefilter("ignore")
        from diffusers.pipelines import auto_pipeline

    names = []
    texts = auto_pipeline.AUTO_TEXT2IMAGE_PIPELINES_MAPPING
    for mapping in (
        auto_pipeline.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
        auto_pipeline.AUTO_INPAINT_PIPELINES_MAPPING,
    ):
        names += [
            texts[key].__name__ for key, own in mapping.items() if own is cls and key in texts
        ]
    stem = cls.__name__.removesuffix("Pipeline")
    names += [
        f"{stem[:end]}Pipeline" for end in range(len(stem) - 1, 2, -1)
        if not EDITING.search(stem[:end]) and hasattr(diffusers, f"{stem[:end]}Pipeline")
    ]  # fmt: skip
    if not names:
        return "Load the text-to-image pipeline of this model."
    return f"Load the same files as a diffusers.{names[0]}."


def _learnt(pipeline: Any) -> type[Family]:
    declared: dict[str, Any] = {"pipelines": (type(pipeline).__name__,)}
    names = [name for name in NETWORKS if getattr(pipeline, name, None) is not None]
    if not names:
        raise NotFollowed(f"it has none of the networks {', '.join(NETWORKS)}")
    declared["network_name"] = names[0]
    declared["packed"] = hasattr(pipeline, "_unpack_latents")
    declared["patch"] = 2 if declared["packed"] else 1
    takes = inspect.signature(type(pipeline).__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in takes else "guidance_scale"
    declared["guidance"] = Guidance(
        scale=scale if scale in takes else "", negative=scale == "true_cfg_scale"
    )
    height, width = _declare(declared)(pipeline, None)._pixels()
    declared["video"] = "num_frames" in takes
    given = (min(height, SIDE), min(width, SIDE)), FRAMES if declared["video"] else None
    family = _declare(declared)(pipeline, *given)
    trial = _Trial(family, OTHER_PROMPT)
    call, raw = trial.calls[0]
    if (trial.sample.ndim == 3) != declared["packed"]:
        raise NotFollowed("its latents are a sequence that nothing unpacks to an image")
    if call.latents.shape[1:] != trial.sample.shape[1:]:
        raise NotFollowed(
            f"its network reads latents of shape {tuple(call.latents.shape[1:])}, its scheduler "
            f"keeps them as {tuple(trial.sample.shape[1:])}"
        )
    declared["negated"] = not torch.equal(
        Family.prediction(raw, call.latents).float(), trial.output.float()
    )
    declared["backwards"] = float(call.time) == 0
    if declared["guidance"].scale:
        declared["guidance"] = _guidance(_declare(declared)(pipeline, *given), declared["guidance"])
    declared["guidance_distilled"] = not declared["guidance"].scale
    learnt = _declare(declared)
    check(learnt(pipeline, *given), trial)
    return learnt


def _declare(attributes: dict[str, Any]) -> type[Family]:
    return type("Undeclared", (Family,), dict(attributes))


def _guidance(family: Family, guidance: Guidance) -> Guidance:
    """Return how a pipeline is guided, from one guided step."""
    given = {guidance.scale: 3.0, **({"negative_prompt": ""} if guidance.negative else {})}
    trial = _Trial(family, OTHER_PROMPT, **given)
    first = trial.calls[0][0]
    rows = len(first.latents)
    if len(trial.calls) == 1 and rows == 1:
        return Guidance(scale="")
    if (len(trial.calls), rows) not in ((1, 2), (2, 1)):
        raise NotFollowed(
            f"it is guided by {len(trial.calls)} network calls of {rows} rows; known are one of "
            "two, or two of one"
        )
    path = family.layout.embeddings
    texts = NetworkCall(
        args=first.args, kwargs=first.kwargs, names=first.names, layout=family.layout
    ).conditioning(range(rows))
    prompt = family.encode([OTHER_PROMPT])
    found = [_close(texts, row, prompt) for row in range(rows)]
    if sum(found) != 1:
        raise NotFollowed(f"the prompt is not found in `{'.'.join(path)}` of a guided call")
    if len(trial.calls) == 2 and not found[0]:
        raise NotFollowed("its network is called for the negatives first")
    return Guidance(
        calls=len(trial.calls), prompt_first=rows == 2 and found[0], scale=guidance.scale,
        negative=guidance.negative,
    )  # fmt: skip


def _close(texts: Conditioning, row: int, prompt: Conditioning) -> bool:
    own, other = texts.embeddings[row], prompt.embeddings[0]
    length = min(len(own), len(other))
    return torch.allclose(own[:length].float(), other[:length].float(), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def check(family: Family, trial: _Trial) -> None:
    """Raise NotFollowed unless a family follows its pipeline.

    Zero change has to give the prediction that the pipeline's own call gave, bit for bit; the empty
    prompt has to move it; clean latents have to decode to finite images.
    """
    latents = family.unpack(trial.calls[0][0].latents)
    time = torch.tensor(trial.timestep)
    own = family.predict(latents, time, family.encode([OTHER_PROMPT]))
    expected = family.unpack(trial.output.to(own.dtype))
    if own.shape != expected.shape or not torch.equal(own, expected):
        raise NotFollowed("its first prediction, repeated without a change, comes out differently")
    if torch.equal(family.predict(latents, time, family.encode([""])), own):
        raise NotFollowed("the empty prompt gives the same prediction as another one")
    vae = family.pipeline.vae
    clean = family.to_autoencoder(latents).to(latents.device, vae.dtype)
    if not torch.isfinite(vae.decode(clean, return_dict=False)[0]).all():
        raise NotFollowed("its autoencoder gives no finite image of its latents")
