"""Decides on the presets of kohya_ss and lora-scripts, in the folder of sd-scripts."""

import argparse
import importlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "trainer_patch" / "kohya"))
sys.path.insert(0, str(Path.cwd()))

import small_sd_scripts as small
import toml
import torch
from configs_kinds import Decision, reason
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.projection.factors import UnsupportedTraining
from unmemorize.shared.training.protection import Protection
from unmemorize.trainer_patch.hooks import REFUSALS
from unmemorize.trainer_patch.kohya.checks import check_network, check_training
from unmemorize.trainer_patch.kohya.request import BASE_MODULE, MODULE, read_request

SCRIPTS = {"sd1": "train_network", "sd2": "train_network", "sdxl": "sdxl_train_network",
           "flux": "flux_train_network", "chroma": "flux_train_network"}  # fmt: skip
TRAINERS = {"train_network": "NetworkTrainer", "sdxl_train_network": "SdxlNetworkTrainer",
            "flux_train_network": "FluxNetworkTrainer"}  # fmt: skip
WIDTHS = {"train_network": (768, 16), "sdxl_train_network": (2048, 32)}
"""Of text states, with the most dimensions that a subspace gets."""
LYCORIS = {"LoHa": "loha", "LoKr": "lokr", "iA3": "ia3", "LoCon": "locon"}
PASSED = ("conv_dim", "conv_alpha", "factor", "use_cp", "decompose_both", "train_on_input")


def of_window(preset: Mapping[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """Return family, file and further arguments, as kohya_ss makes them of a preset."""
    kind, text, unet = (str(preset.get("LoRA_type")), float(preset.get("text_encoder_lr") or 0),
                        float(preset.get("unet_lr") or 0))  # fmt: skip
    family = "sdxl" if preset.get("sdxl") else "flux" if preset.get("flux1_checkbox") else "sd1"
    held = {
        "network_dim": int(preset["network_dim"]), "network_alpha": float(preset["network_alpha"]),
        "network_module": "networks.lora_flux" if family == "flux" else "networks.lora",
        "network_train_unet_only": text == 0 and unet != 0,
        "network_train_text_encoder_only": text != 0 and unet == 0,
        "cache_text_encoder_outputs": bool(preset.get("sdxl_cache_text_encoder_outputs")
                                           or preset.get("flux1_cache_text_encoder_outputs")),
        "save_model_as": preset.get("save_model_as") or "safetensors",
    }  # fmt: skip
    if kind.startswith("LyCORIS/"):
        given = {key: preset[key] for key in PASSED if preset.get(key) is not None}
        pairs = given | {
            "algo": LYCORIS[kind.partition("/")[2]],
            "preset": preset.get("LyCORIS_preset") or "full",
        }
        held |= {"network_module": "lycoris.kohya",
                 "network_args": [f"{key}={value}" for key, value in pairs.items()]}  # fmt: skip
    return family, held, shlex.split(preset.get("additional_parameters") or "")


def configurations() -> Iterator[tuple[str, str, str, dict[str, Any], list[str]]]:
    """Yield source, name, family, the file's values and further arguments."""
    if folder := os.environ.get("KOHYA_SS_DIR"):
        for path in sorted(Path(folder).glob("presets/lora/*.json")):
            yield "kohya_ss", path.stem, *of_window(json.loads(path.read_text("utf-8")))
    if folder := os.environ.get("LORA_SCRIPTS_DIR"):

        def flat(name: str) -> dict[str, Any]:
            held = toml.loads((Path(folder) / "config" / name).read_text("utf-8"))
            return {key: value for part in held.values() for key, value in part.items()}

        plain = flat("lora.toml")
        yield "lora-scripts", "lora.toml", "sd1", plain, []
        yield "lora-scripts", "default.toml", "sd1", flat("default.toml"), []
        preset = toml.loads((Path(folder) / "config/presets/example.toml").read_text("utf-8"))
        yield "lora-scripts", "presets/example.toml", "sd1", plain | preset["data"], []
        preset = toml.loads((Path(folder) / "config/presets/chroma.toml").read_text("utf-8"))
        of_form = {"network_module": "networks.lora_flux", "network_train_unet_only": True,
                   "cache_text_encoder_outputs": True, "network_dim": 4}  # fmt: skip
        yield "lora-scripts", "presets/chroma.toml", "chroma", of_form | preset["data"], []


@cache
def parts(script: str) -> tuple[torch.nn.Module, list[torch.nn.Module]]:
    """Return a small network that reads text of the real width, and its text encoders."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    if script == "train_network":
        small.small_sd()
        from library.original_unet import UNet2DConditionModel

        unet = UNet2DConditionModel(sample_size=8, attention_head_dim=8, cross_attention_dim=768)
        return unet, [small.clip(CLIPTextModel, 768, 1, 768)]
    if script == "sdxl_train_network":
        small.small_sdxl()
        from library.sdxl_original_unet import SdxlUNet2DConditionModel

        encoders = [small.clip(CLIPTextModel, 768, 1, 768),
                    small.clip(CLIPTextModelWithProjection, 1280, 1, 1280)]  # fmt: skip
        return SdxlUNet2DConditionModel(), encoders
    small.small_flux()
    from library import flux_utils

    return flux_utils.load_flow_model()[1], [flux_utils.load_clip_l(), flux_utils.load_t5xxl()]


def start(family: str, held: Mapping[str, Any], more: list[str], option: str) -> None:
    """Do what a training does until its first step, without images."""
    script = SCRIPTS[family]
    module = importlib.import_module(script)
    from library.args import read_config_from_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.toml"
        path.write_text(toml.dumps(dict(held)), "utf-8")
        typed = ["--config_file", str(path), *more, "--network_module", MODULE,
                 "--network_args", option]  # fmt: skip
        parser = module.setup_parser()
        known, _ = parser.parse_known_args(typed)
        before, sys.argv = sys.argv, [f"{script}.py", *typed]
        try:
            args: argparse.Namespace = read_config_from_file(known, parser)
        finally:
            sys.argv = before
        trainer = getattr(module, TRAINERS[script])
        request = read_request(args, trainer)
        check_training(trainer, args, request)
    unet, encoders = parts(script)
    base = importlib.import_module(request.base_module)
    own = {key: value for key, value in request.network_args.items() if key != BASE_MODULE}
    try:
        network = base.create_network(
            1.0, args.network_dim, args.network_alpha, None,
            encoders if script != "train_network" else encoders[0], unet, **own,
        )  # fmt: skip
    except Exception as error:
        raise UnsupportedTraining(
            f"{request.base_module} itself makes no network of it: {error}"
        ) from error
    network.apply_to(
        encoders if script != "train_network" else encoders[0], unet,
        not args.network_train_unet_only, not args.network_train_text_encoder_only,
    )  # fmt: skip
    check_network(network)
    protection = Protection(request.settings, output=Path("unused"))
    protection.fit(lambda _: None, [])
    protection.protect(network)


def main() -> None:
    """Tell the decision on every configuration."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for source, name, family, held, more in configurations():
            width, rank = WIDTHS.get(SCRIPTS[family], (768, 16))
            path = Path(folder) / f"{width}.safetensors"
            if not path.exists():
                columns = torch.randn(width, rank, dtype=torch.float64)
                ConceptSubspace(basis=torch.linalg.qr(columns).Q).save(path)
            print(f"{source} {name}", file=sys.stderr)
            why = [
                reason(lambda asked=asked: start(family, held, more, asked), REFUSALS)  # noqa: B023
                for asked in ("mem_filter=inf", f"project_concepts={path}")
            ]
            Decision(source, name, family, *why).tell()


if __name__ == "__main__":
    main()
