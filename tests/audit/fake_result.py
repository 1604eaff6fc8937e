"""An audit result made of seeded numbers, as full as a real one, without a model."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from unmemorize.audit.common.result import ModelInfo
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.inputs import Inputs
from unmemorize.audit.model.result import (
    AuditEntry,
    AuditResult,
    GeneratedImage,
    NearestImage,
    NearPrompt,
    OccludedWord,
    RedrawnImage,
    WordSignificance,
    rate,
    summarize,
)
from unmemorize.shared.files.prompts import PromptSet
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection

SHAPE = (4, 16, 16)
GROUPS = ("verbatim", "template", "learnt")
HOSTILE = (
    "</style></script><img src=x onerror=alert(1)>\"'`{{7*7}}<script>alert(2)</script>"
    "\x00\x1b\u202e"
)


def calibrate(rng: np.random.Generator, steps: int, name: str) -> Calibration:
    traces = torch.from_numpy(rng.gamma(60, 0.05, (150, 4, steps)))
    config = DetectionConfig(steps=steps)
    detection = Detection(
        prompts=tuple(f"control {i}" for i in range(150)), traces=traces, latent_elements=1024,
        config=config,
    )  # fmt: skip
    settings = {"dtype": "float32", "steps": steps, "seeds": [0, 1, 2, 3], "schedule_steps": 50}
    return Calibration.from_controls(detection, model="ab" * 32, settings=settings, name=name)


def save_picture(folder: Path, name: str, image: Image.Image) -> str:
    path = folder / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return f"images/{name}"


def plain_picture(index: int, kind: int) -> Image.Image:
    noise = np.random.default_rng([index, kind]).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32))


def make_entry(
    index: int, prompt: str, trace: np.ndarray, calibration: Calibration, folder: Path,
    *, pictured: bool, text: str, group: str | None, picture=plain_picture,
) -> AuditEntry:  # fmt: skip
    """Return one prompt; `text` fills every field that holds somebody's words."""
    score, rng = float(trace.mean()), np.random.default_rng(index)
    memorized, images, explanation = score > calibration.threshold, (), None
    if pictured:
        training = save_picture(folder, f"{index}-training.png", picture(index, 0))
        images = tuple(
            GeneratedImage(
                path=save_picture(folder, f"{index}-{seed}.png", picture(index, seed + 1)),
                seed=seed,
                nearest=NearestImage(
                    path=training, caption=text or prompt, similarity=0.9 if memorized else 0.4,
                    ratio=0.2 if memorized else 0.8, own_ratio=0.3 if memorized else None,
                    is_own=memorized, copied=memorized,
                ),
            )
            for seed in range(2 if memorized else 1)
        )  # fmt: skip
    if memorized and prompt.split():
        words = tuple(prompt.split())
        falls = (score / 2 * rng.random(len(words))).tolist()
        falls[-1] = -0.1 if len(words) > 1 else falls[-1]
        order = sorted(range(len(words)), key=lambda i: -falls[i])[:24]
        top = text or words[order[0]]
        explanation = WordSignificance(
            method="leave_out",
            words=words,
            significance=tuple(
                fall if i in order else None for i, fall in enumerate(falls)
            ),
            occlusions=tuple(
                OccludedWord(word=top if i == order[0] else words[i], index=i, score_before=score,
                             score_after=score - falls[i]) for i in order
            ),
            suggestions=(f"without “{top}” the magnitude falls from {score:.2f} to 1",),
            notes=(text or "All words were left out.",),
            redrawn=(RedrawnImage(
                word=top, index=order[0], prompt=text or " ".join(words[1:]), seed=0,
                path=save_picture(folder, f"{index}-without.png", picture(index, 5)),
                nearest=images[0].nearest, outcome="gone",
            ),) if images else (),
        )  # fmt: skip
    p_value = calibration.p_values([score]).item()
    return AuditEntry(
        index=index, prompt=prompt, sources=(text or "captions.txt:1",), count=1 + (index == 1),
        cut=text if index == 0 else "", group=group, score=score,
        trace=tuple(map(tuple, trace.tolist())), magnitude=score,
        magnitude_per_element=score / math.sqrt(math.prod(SHAPE)), collapse=None, p_value=p_value,
        q_value=min(1.0, 4 * p_value),
        memorized=memorized, near=None, explanation=explanation, images=images,
        map=save_picture(folder, f"{index}-map.png", picture(index, 9))
        if memorized and images else None,
    )  # fmt: skip


def make_result(
    folder: Path, prompts: list[str] | None = None, *, text: str = "", hits: int = 6,
    steps: int = 1, demo: bool = True, groups: list[str] | None = None, picture=plain_picture,
    pictured: int = 24, near: int = 0,
) -> AuditResult:  # fmt: skip
    """Return a result whose first `hits` prompts are flagged; with a model name of `text`.

    The last `near` of them are near the first prompt.
    """
    rng = np.random.default_rng(1)
    prompts = prompts or [f"a drawing of thing number {i}" for i in range(40)]
    calibration = calibrate(rng, steps, text or "demo")
    entries = []
    for index, prompt in enumerate(prompts):
        mean = 6.5 - 2 * index / max(hits, 1) if index < hits else 2.7
        trace = rng.gamma(200, mean / 200, (4, steps)) if index < hits else np.clip(
            rng.gamma(60, mean / 60, (4, steps)), 0, calibration.threshold * 0.98)  # fmt: skip
        if index < hits:
            trace = np.maximum(trace, calibration.threshold * 1.05)
        group = (groups[index] if groups else GROUPS[index % 3]) if demo else None
        spread = index >= hits and (index - hits) % max(1, (len(prompts) - hits) // 8) == 0
        entries.append(make_entry(
            index, prompt, trace, calibration, folder, text=text, group=group, picture=picture,
            pictured=index < min(hits, pictured) or spread,
        ))  # fmt: skip
    member = NearPrompt(index=0, prompt=prompts[0], overlap=0.75, cosine=0.875)
    for index in range(hits - near, hits):
        entries[index] = replace(entries[index], near=member)
    model = ModelInfo(
        name=text or "model", fingerprint="ab" * 32, lora=text or None, parametrization="epsilon",
        dtype="float32", device="cpu", latent_shape=SHAPE, guidance_distilled=False,
    )  # fmt: skip
    config = AuditConfig(
        model="demo" if demo else "model", prompts=() if demo else (Path(text or "captions.txt"),),
        detection=DetectionConfig(steps=steps),
    )  # fmt: skip
    return AuditResult(
        config=config, model=model, calibration=calibration, entries=tuple(entries), folder=folder,
        summary=make_summary(config, model, calibration, entries, text),
    )  # fmt: skip


def make_summary(
    config: AuditConfig, model: ModelInfo, calibration: Calibration, entries: list[AuditEntry],
    text: str,
) -> dict:  # fmt: skip
    prompts = tuple(entry.prompt for entry in entries)
    inputs = Inputs(
        prompts=PromptSet(prompts=prompts, sources=(("a.txt:1",),) * len(prompts),
                          images=((),) * len(prompts), read=len(prompts) + 1, empty=0),
        groups=tuple(entry.group for entry in entries),
        controls_name=calibration.controls, controls=("control 0",),
    )  # fmt: skip
    shown = [bool(i.nearest.copied) for e in entries for i in e.images if e.memorized]
    similarity = {"method": text or "pixels", "training_images": 400, "threshold": 0.31,
                  "own_threshold": 0.45, "false_positive_rate": 0.01, "dimension": 9.1,
                  "others_drawn": 0, "copies": rate(sum(shown), len(shown))}  # fmt: skip
    summary = summarize(
        config, inputs, model, calibration, entries, caveats=[text] if text else [],
        similarity=similarity if shown else None, timings={"detection": 1.5},
    )  # fmt: skip
    if text:
        summary["warnings"].append(text)
        summary["settings"][text] = text
        summary["versions"][text] = text
    return summary
