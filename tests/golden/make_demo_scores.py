"""Write the bundled models' scores of a few captions, by which library versions are compared."""

import json
from pathlib import Path

import torch
from unmemorize import demo
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import detect

if __name__ == "__main__":
    groups = ("verbatim", "template", "learnt", "held_out")
    texts = [c.text for g in groups for c in [c for c in demo.captions() if c.group == g][:3]]
    for name in demo.BUNDLED:
        denoiser = load_denoiser(demo.locate(name), device="cpu", dtype=torch.float32)
        scores = detect(denoiser, texts, DetectionConfig()).scores.tolist()
        target = Path(__file__).parent / f"{name.replace('-', '_')}_scores.json"
        golden = json.dumps(dict(zip(texts, scores, strict=True)), indent=1) + "\n"
        target.write_text(golden, "utf-8")
