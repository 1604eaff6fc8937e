"""LoRA Check: a LoRA that changes nothing changes no score, another one does; folders are read."""

import json

import pytest
from comfyui import newest, node
from demo_side import caption
from safetensors.torch import save_file
from torch import randn, zeros

pytestmark = pytest.mark.comfy
NAME = "lora_unet_time_embedding_linear_1"
OUTPUTS = {name: ["check", i] for i, name in enumerate(["table", "report", "data", "increase"])}


def graph(lora: str, **inputs) -> dict:
    return {
        "demo": node("UnmemorizeLoadDemoModel"),
        "lora": node("LoraLoader", model=["demo", 0], clip=["demo", 1], lora_name=lora,
                     strength_model=1.0, strength_clip=1.0),
        "latent": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "check": node("UnmemorizeLoraCheck", **{
            "model": ["demo", 0], "clip": ["demo", 1], "model_with_lora": ["lora", 0],
            "clip_with_lora": ["lora", 1], "latent": ["latent", 0], "captions": caption(),
            "folder": "", "controls": 2, "seeds": 1, "steps": 1} | inputs),
    }  # fmt: skip


def write_lora(comfy, name: str, up) -> None:
    folder = comfy.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    weights = {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": randn(4, 64)}
    save_file(weights, folder / name)


@newest
def test_changes_are_those_of_the_lora(comfy, tmp_path):
    write_lora(comfy, "nothing.safetensors", zeros(256, 4))
    write_lora(comfy, "something.safetensors", randn(256, 4))
    (tmp_path / "image.txt").write_text("a caption of the folder", "utf-8")
    (tmp_path / "image.png").write_bytes(b"")
    none = comfy.run(graph("nothing.safetensors"), keep=OUTPUTS)
    assert none["increase"] == 0
    some = comfy.run(graph("something.safetensors", folder=str(tmp_path)), keep=OUTPUTS)
    data = json.loads(some["data"])
    assert {one["prompt"] for one in data["captions"]} == {caption(), "a caption of the folder"}
    assert len(data["controls"]) == 2
    assert all(abs(one["increase"]) > 1e-3 for one in data["captions"])
    off = {one["prompt"]: one["off"] for one in json.loads(none["data"])["captions"]}
    assert off.items() <= {one["prompt"]: one["off"] for one in data["captions"]}.items()
    assert some["table"].shape[2:] == (640, 3)
    assert (
        "There are no captions"
        in comfy.run(graph("nothing.safetensors", captions=" \n"), check=False, keep=OUTPUTS).error
    )
