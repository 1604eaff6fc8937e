"""A run that is not what the controls were has scores, the reason, and no verdict.

Each row once gave a verdict that was wrong: an ordinary prompt "looks memorized" from another
scheduler or from an image, a memorized one that comes in late scored 0 with p = 1.
"""

import pytest
from comfyui import newest, pack
from demo_side import caption

pytestmark = [pytest.mark.comfy, newest]
ORDINARY, MEMORIZED = caption("held_out"), caption()
FITS = {
    "normal": {},
    "karras": {"scheduler": "karras"},
    "many steps": {"steps": 12, "scheduler": "simple", "sampler": "dpmpp_2m"},
    "second order": {"sampler": "heun"},
    "time ranges that hold the first step": {
        "positive": {"start_percent": 0.0, "end_percent": 0.5}
    },
}
NONE = {  # settings, and what the reason says
    "another scheduler": ({"scheduler": "ddim_uniform", "steps": 8}, "noise level"),
    "from an image": ({"denoise": 0.8, "image": 1.0, "steps": 6}, "noise level"),
    "from an image, half": ({"denoise": 0.5, "image": 1.0}, "did not begin at pure noise"),
    "second stage": ({"first": 2, "image": 1.0}, "did not begin at pure noise"),
    "cfg 1 in the first half": ({"cfg_override": (0.0, 0.5), "steps": 6}, "was not measured"),
    "prompt from 30 %": ({"positive": {"start_percent": 0.3, "end_percent": 1.0}, "steps": 6},
                         "was not measured"),
    "area": ({"positive": {"area": (8, 8, 0, 0), "strength": 1.0}}, "area"),
    "strength": ({"positive": {"strength": 0.5}}, "strength"),
    "two prompts": ({"combined": True}, "2 parts"),
    "another negative": ({"negative": "a blurry photo"}, "negative prompt is another"),
    "another size": ({"size": 8}, "latents are 4 x 8 x 8"),
}  # fmt: skip


def verdicts(settings: dict) -> dict:
    """Return per setting what a report says of it: how many images are flagged, and why none."""
    import torch

    import nodes as comfyui_nodes

    model, clip, _ = pack("nodes.engine.demo_model").load_model()
    encode = pack("nodes.engine.measuring").encoded
    watching, runs = pack("nodes.engine.watching"), pack("shared.sampling.watched_runs")
    automatic = pack("nodes.engine.automatic")
    told = {}
    with torch.inference_mode():
        own = pack("nodes.engine.demo_model").ordinary_captions(100)
        model.set_attachments(automatic.OWN_CONTROLS, own)
        empty, latent = encode(clip, ""), {"samples": torch.zeros(1, 4, 16, 16)}
        calibration = automatic.automatic(model, clip, empty, latent)
        for name, (prompt, changes) in settings.items():
            positive = encode(clip, prompt)
            positive[0][1].update(changes.get("positive", {}))
            if changes.get("combined"):
                positive += encode(clip, "a red house")
            negative = encode(clip, changes["negative"]) if "negative" in changes else empty
            watched, record = watching.watch(model)
            if override := changes.get("cfg_override"):
                cls = comfyui_nodes.NODE_CLASS_MAPPINGS["CFGOverride"]
                (watched,) = cls.execute(watched, 1.0, *override).result
            size = changes.get("size", 16)
            start = torch.full((1, 4, size, size), changes.get("image", 0.0))
            first = changes.get("first")
            comfyui_nodes.common_ksampler(
                watched, 1, changes.get("steps", 4), 5.0, changes.get("sampler", "euler"),
                changes.get("scheduler", "normal"), positive, negative, {"samples": start},
                denoise=changes.get("denoise", 1.0), disable_noise=first is not None,
                start_step=first,
            )  # fmt: skip
            verdict = runs.judge(record.runs[-1], calibration)
            told[name] = [
                verdict.hits, verdict.measure, " ".join(verdict.caveats), runs.headline(verdict)
            ]  # fmt: skip
    return told


def test_runs_that_begin_as_the_controls_did_have_a_verdict(comfy):
    asked = {f"{p} {name}": (p, changes) for name, changes in FITS.items()
             for p in (ORDINARY, MEMORIZED)}  # fmt: skip
    for name, (hits, measure, caveats, _) in comfy.call(verdicts, asked).items():
        assert (measure, caveats) == ("residual", ""), name
        assert hits == name.startswith(MEMORIZED), name


def test_other_runs_have_none_and_say_why(comfy):
    asked = {f"{name}: {p}": (p, changes) for name, (changes, _) in NONE.items()
             for p in (ORDINARY, MEMORIZED)}  # fmt: skip
    for name, (hits, _, caveats, headline) in comfy.call(verdicts, asked).items():
        assert hits == 0, name
        assert headline == "No verdict: scores only", name
        assert NONE[name.partition(":")[0]][1] in caveats, (name, caveats)
