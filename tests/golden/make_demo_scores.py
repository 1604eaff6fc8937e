"""Write demo_scores.json: scores of a few captions, by which every library version is compared."""

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
    denoiser = load_denoiser(demo.MODEL, device="cpu", dtype=torch.float32)
    scores = detect(denoiser, texts, DetectionConfig()).scores.tolist()
    target = Path(__file__).parent / "demo_scores.json"
    target.write_text(json.dumps(dict(zip(texts, scores, strict=True)), indent=1) + "\n", "utf-8")
