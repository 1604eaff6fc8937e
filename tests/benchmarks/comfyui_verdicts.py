"""False verdicts of the ComfyUI nodes on ordinary captions of the demo, setting by setting.

Every image has a caption and a starting noise of its own. A verdict is settled at the first step:
sampling ends there. Flagged is a share of all images: one without a verdict is not flagged.
"""

from comfyui import pack

NUMBER = 300
SETTINGS = {  # scheduler, steps, denoise
    "normal_20": ("normal", 20, 1.0),
    "karras_30": ("karras", 30, 1.0),
    "simple_4": ("simple", 4, 1.0),
    "ddim_uniform_50": ("ddim_uniform", 50, 1.0),
    "ddim_uniform_10": ("ddim_uniform", 10, 1.0),
    "image_denoise_80": ("normal", 20, 0.8),
}


def prepared() -> dict:
    """Return model, encoder and calibration as a first use of Memorization Check leaves them."""
    automatic, demo = pack("nodes.engine.automatic"), pack("nodes.engine.demo_model")
    model, clip, _ = demo.load_model()
    own = demo.ordinary_captions(automatic.NUMBER)
    model.set_attachments(automatic.OWN_CONTROLS, own)
    import torch

    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    empty = pack("nodes.engine.measuring").encoded(clip, "")
    made = automatic.automatic(model, clip, empty, latent)
    every = demo.ordinary_captions(10_000)
    others = list(dict.fromkeys(text for text in every if text not in own))
    texts = pack("shared.score.controls").spread(others, NUMBER)
    return {"model": model, "clip": clip, "empty": empty, "latent": latent, "calibration": made,
            "texts": texts}  # fmt: skip


def flagged(name: str, first: int, last: int) -> list:
    """Return of captions `first` to `last` what the report says: True, False, or None of neither.

    Runs inside ComfyUI.
    """
    import torch

    import nodes as comfyui_nodes

    watching, runs = pack("nodes.engine.watching"), pack("shared.sampling.watched_runs")
    encode = pack("nodes.engine.measuring").encoded
    told = []
    with torch.inference_mode():
        if not known:
            known.update(prepared())
        for index in range(first, min(last, len(known["texts"]))):
            positive = encode(known["clip"], known["texts"][index])
            if name == "check":
                check = pack("nodes.engine.checking").check_prompt
                (flag,) = check(
                    known["model"], known["clip"], positive, None, known["latent"]
                ).flags
                told.append(flag)
                continue
            scheduler, steps, denoise = SETTINGS[name]
            watched, record = watching.watch(known["model"])
            start = known["latent"]["samples"]
            if denoise < 1:
                start = torch.randn(start.shape, generator=torch.Generator().manual_seed(index))
            seed = 1000 * [*SETTINGS].index(name) + index + 100  # none of the calibration's
            comfyui_nodes.common_ksampler(
                watched, seed, steps, 7.0, "euler", scheduler, positive, known["empty"],
                {"samples": start}, denoise=denoise, start_step=0, last_step=1,
            )  # fmt: skip
            (image,) = runs.judge(record.runs[-1], known["calibration"]).images
            told.append(image.memorized)
    return told


known: dict = {}
"""What `prepared` has made in this process."""
