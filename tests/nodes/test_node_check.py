"""Memorization Check: a verdict with nothing else connected, the same whatever sampler follows."""

import pytest
from comfyui import newest, node, pack
from demo_side import caption

pytestmark = pytest.mark.comfy
DEMO = {
    "demo": node("UnmemorizeLoadDemoModel"),
    "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
}
OUTPUTS = {"verdict": ["check", 1], "memorized": ["check", 2], "chart": ["check", 3]}


def text(prompt: str) -> dict:
    return node("CLIPTextEncode", clip=["demo", 1], text=prompt)


def check(positive: list, **inputs) -> dict:
    return node(
        "UnmemorizeCheck", model=["demo", 0], positive=positive, latent=["latent", 0], **inputs
    )


def test_a_verdict_with_nothing_else_connected(comfy):
    graph = DEMO | {"text": text(caption()), "check": check(["text", 0])}
    run = comfy.run(graph, keep=OUTPUTS, fresh=True)
    assert run["memorized"] is True
    assert run["verdict"].startswith("Looks memorized\nscore ")
    assert "100 control prompts" in run["verdict"]
    assert run["chart"].shape[2:] == (640, 3)
    (saved,) = (comfy.base / "user" / "unmemorize").glob("*.json")
    made = saved.stat().st_mtime_ns

    graph["text"] = text(caption("held_out"))
    later = comfy.run(graph, keep=OUTPUTS, fresh=True)
    assert later["memorized"] is False
    assert later["verdict"].startswith("Does not look memorized")
    assert saved.stat().st_mtime_ns == made
    assert later.seconds < run.seconds / 3
    assert comfy.run(graph, keep=OUTPUTS).ran == []


@newest
def test_other_nodes_find_the_calibration_that_was_made(comfy):
    """Without one they have no verdict, or refuse; a prompt with an area has none either way."""
    graph = DEMO | {
        "text": text(caption()),
        "empty": text(""),
        "detect": node("UnmemorizeDetect", model=["demo", 0], positive=["text", 0],
                       negative=["empty", 0], latent=["latent", 0], seeds=4, steps=1),
        "guard": node("UnmemorizeGuard", model=["demo", 0], gate="auto", method="static delay"),
        "sampled": node("KSampler", model=["guard", 0], seed=3, steps=2, cfg=5.0,
                        sampler_name="euler", scheduler="normal", denoise=1.0,
                        positive=["text", 0], negative=["empty", 0], latent_image=["latent", 0]),
        "report": node("UnmemorizeReport", record=["guard", 1], latent=["sampled", 0], steps=1,
                       save_score=False),
    }  # fmt: skip
    keep = {"detect": ["detect", 0], "flag": ["detect", 4], "report": ["report", 2],
            "memorized": ["report", 4]}  # fmt: skip
    for path in (comfy.base / "user" / "unmemorize").glob("*"):
        path.unlink()
    without = comfy.run(graph, keep=keep, fresh=True, check=False)
    assert "Put Memorization Check in front" in without.error

    comfy.run(DEMO | {"text": text(caption()), "check": check(["text", 0])}, fresh=True)
    run = comfy.run(graph, keep=keep, fresh=True)
    assert run["flag"] is True
    assert "100 controls" in run["detect"]
    assert run["memorized"] is True
    assert "Score: residual" in run["report"]
    assert "guard acted by delayed_guidance" in run["report"]

    graph["area"] = node("ConditioningSetArea", conditioning=["text", 0], width=64, height=64, x=0,
                         y=0, strength=1.0)  # fmt: skip
    graph["detect"]["inputs"]["positive"] = ["area", 0]
    part = comfy.run({k: v for k, v in graph.items() if k not in ("guard", "sampled", "report")},
                     keep={k: keep[k] for k in ("detect", "flag")})  # fmt: skip
    assert part["flag"] is False
    assert "no verdict: the controls are texts alone, and here a prompt has area" in part["detect"]


OTHER = caption("learnt")


def checked(parts: list) -> list:
    """Return verdict and outputs of a CONDITIONING of several entries, by a few controls."""
    import torch

    checking = pack("nodes.engine.checking")
    with torch.inference_mode():
        model, clip, _ = pack("nodes.engine.demo_model").load_model()
        model.set_attachments("unmemorize controls", tuple(f"a {n} cat" for n in range(100)))
        encode = pack("nodes.engine.measuring").encoded
        positive = [
            [encode(clip, text)[0][0], encode(clip, text)[0][1] | extra] for text, extra in parts
        ]
        check = checking.check_prompt(
            model, clip, positive, None, {"samples": torch.zeros(1, 4, 16, 16)}
        )
        return [list(check.scores), list(check.left_out), str(check)]


@newest
def test_each_part_is_measured_by_itself_without_what_stands_around_it(comfy):
    """Averaged with another, in a small area or late in time a memorized prompt scores less."""
    area = {"area": (4, 4, 0, 0), "strength": 0.3, "start_percent": 0.6, "end_percent": 1.0}
    together, left_out, told = comfy.call(checked, [[caption(), area], [OTHER, {}]])
    alone, nothing, _ = comfy.call(checked, [[caption(), {}]])
    assert together[0] == pytest.approx(alone[0], rel=1e-4)
    assert together[1] < together[0]
    assert set(left_out) == set(area)
    assert nothing == []
    assert "part 2 of the prompt" in told
    assert "without: area, end_percent, start_percent, strength" in told
