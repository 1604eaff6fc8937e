"""Watched sampling of the demo model: as graphs, and as a function that runs inside ComfyUI."""

import torch
from comfyui import node, pack
from demo_side import caption

STEPS = 4
PROMPT = caption()
TEXTS = {
    "1": node("UnmemorizeLoadDemoModel"),
    "2": node("CLIPTextEncode", text=PROMPT, clip=["1", 1]),
    "3": node("CLIPTextEncode", text="", clip=["1", 1]),
    "4": node("EmptyLatentImage", width=128, height=128, batch_size=1),
}
WATCH = {"watch": node("UnmemorizeWatch", model=["1", 0], measure_anyway=False)}


def sampler(model: list, **changes) -> dict:
    settings = {
        "seed": 1, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
        "denoise": 1.0, "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
    }  # fmt: skip
    return node("KSampler", model=model, **settings | changes)


def report(latent: list, **changes) -> dict:
    settings = {"record": ["watch", 1], "latent": latent, "steps": 1, "save_score": False}
    return node("UnmemorizeReport", **settings | changes)


def watched_run(changes: dict, options: dict, between: list, before: bool, batch: int) -> dict:
    """Sample through the nodes' own code; return latents, rows and how often the network ran.

    Args:
        changes: Of the sampler's settings.
        options: Of the watch; None samples without one.
        between: Names of ComfyUI's own nodes, which patch as other packs do.
        before: They are added before the watch, not after it.
        batch: Images.
    """
    import nodes as comfyui_nodes

    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    watching = pack("nodes.engine.watching")
    calls = []
    model.add_wrapper_with_key("apply_model", "count", counting(calls))
    record = None
    with torch.inference_mode():
        positive, negative = (
            clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (PROMPT, "")
        )
        if between and before:
            model = patched(model, between)
        if options is not None:
            model, record = watching.watch(model, **options)
        if between and not before:
            model = patched(model, between)
        latent = {"samples": torch.zeros(batch, 4, 16, 16)}
        settings = {
            "seed": 1, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal",
        } | changes  # fmt: skip
        out = comfyui_nodes.common_ksampler(
            model, **settings, positive=positive, negative=negative, latent=latent
        )[0]["samples"]
    runs = [] if record is None else record.runs
    return {
        "samples": out,
        "calls": len(calls),
        "rows": sum(calls),
        "sigmas": [list(run.sigmas) for run in runs],
        "traces": [run.traces for run in runs],
        "reasons": [run.reason for run in runs],
        "extra": [run.extra_passes for run in runs],
    }


def counting(calls: list) -> object:
    def apply_model(executor, x, *args, **kwargs):
        calls.append(len(x))
        return executor(x, *args, **kwargs)

    return apply_model


def patched(model: object, names: list) -> object:
    """Add ComfyUI's own guidance nodes, which other packs' hooks are like."""
    import nodes as comfyui_nodes

    for name in names:
        cls = comfyui_nodes.NODE_CLASS_MAPPINGS[name]
        arguments = {"APG": {"eta": 1.0, "norm_threshold": 5.0, "momentum": 0.0},
                     "RescaleCFG": {"multiplier": 0.7},
                     "PerturbedAttentionGuidance": {"scale": 3.0},
                     "TCFG": {}}[name]  # fmt: skip
        function = getattr(cls, "execute", None)
        out = function(model=model, **arguments) if function else cls().patch(model, **arguments)
        model = (out.result if hasattr(out, "result") else out)[0]
    return model


def sample(comfy, changes=None, options=None, between=(), before=False, batch=1) -> dict:
    return comfy.call(watched_run, changes or {}, options, list(between), before, batch)
