"""Every kind of file that is read back: how one is made, how it is read, and what is right.

`read` returns what was read as a value that can be compared. `stated` returns what a mutated file
itself states, by the plainest reader there is: of files that other programs write, another value
is no damage. Files of ours have a digest, so that nothing but the original may come out of them.
"""

import csv
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from unmemorize.audit.common.job import READER as JOB
from unmemorize.audit.common.job import StrangeJob
from unmemorize.audit.lora.document import DIGEST, DOCUMENT, SCHEMA_VERSION, TITLE
from unmemorize.audit.lora.header import read_header
from unmemorize.audit.lora.verify import ReportError, verify_report
from unmemorize.shared.files.images import ImageNotRead, read_image
from unmemorize.shared.files.prompts import PromptError, read_prompts
from unmemorize.shared.files.schema import digest_of
from unmemorize.shared.files.storage import Journal, StorageError
from unmemorize.shared.files.weights import ModelError, read_tensors
from unmemorize.shared.models.checks import weight_files
from unmemorize.shared.models.folder import read_components
from unmemorize.shared.models.lora.peft_config import config_beside
from unmemorize.shared.score.calibration import Calibration
from unmemorize.shared.score.calibration_file import CalibrationError, basis_path
from unmemorize.shared.score.config import DetectionConfig
from unmemorize.shared.score.detection import Detection
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.filter.sample_log import Sample
from unmemorize.shared.training.layers.regions import ConceptRegions
from unmemorize.shared.training.layers.subspaces import LayerSubspaces
from unmemorize.shared.training.protection import Protection
from unmemorize.shared.training.settings import FilterSettings, ProtectionSettings
from unmemorize.shared.training.state import READER as STATE

CONTROLS, ELEMENTS = 120, 12


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    name: str
    file: str
    """Its name."""
    make: Callable[[Path], object]
    """Writes the seed, and what has to lie beside it."""
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    """Those that a file of this kind may end in."""
    stated: Callable[[Path], Any] | None = None


class Damaged(ValueError):
    """What `verify` says of a report that does not fit."""


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_calibration(path: Path) -> None:
    config = DetectionConfig(seeds=(0, 1))
    prompts = tuple(f"control {index}" for index in range(CONTROLS))
    detection = Detection(
        prompts=prompts,
        traces=seeded(CONTROLS, 2, 1).abs(),
        latent_elements=ELEMENTS,
        config=config,
    )
    made = Calibration.from_controls(
        detection, model="abc", settings={"latent_shape": [3, 2, 2], "steps": 1}, name="test"
    )
    differences = seeded(2, CONTROLS, ELEMENTS, seed=1)
    made.with_residual(differences, {"told": [0, 1]}).with_observed(differences).save(path)


def make_bases(path: Path) -> None:
    make_calibration(path.with_suffix(".json"))


def read_calibration(path: Path) -> Any:
    made = Calibration.load(path.with_suffix(".json"))
    return made.to_values(), basis_path(path).read_bytes()


def protection(folder: Path) -> Protection:
    settings = FilterSettings(quantile=0.75, recall=4)
    return Protection(ProtectionSettings(filter=settings), output=folder / "lora.safetensors")


def make_state(path: Path) -> None:
    made = protection(path.parent)
    samples = [Sample(file=f"{row}.png", caption=f"caption {row % 3}") for row in range(4)]
    for step in range(12):
        cond = seeded(4, 4, 2, 2, seed=step, dtype=torch.float32)
        made.weigh(cond, torch.zeros_like(cond), timesteps=torch.full((4,), 500), samples=samples)
    path.write_text(json.dumps(made.state_dict()), encoding="utf-8")


def read_state(path: Path) -> Any:
    made = protection(path.parent)
    made.load_state_dict(STATE.parse_file(path))
    return made.state_dict()


def orthonormal(width: int, rank: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(seeded(width, rank, seed=seed)).Q


def make_subspace(path: Path) -> None:
    made = {"names": ["zorp"], "accepted": True, "residuals": [0.01]}
    ConceptSubspace(basis=orthonormal(12, 3, 0), provenance=made).save(path)


def read_subspace(path: Path) -> Any:
    made = ConceptSubspace.load(path)
    return made.basis.tolist(), made.provenance


def make_layers(path: Path) -> None:
    bases = {f"blocks_{index}_attn2_to_k": orthonormal(8, 2, index) for index in range(3)}
    regions = ConceptRegions(
        bases=dict([*bases.items()][:1]), centres={"blocks_0_attn2_to_k": seeded(2)},
        units={"blocks_0_attn2_to_k": 1.5}, limit=2.0, sigma=0.4,
    )  # fmt: skip
    LayerSubspaces(bases=bases, provenance={"names": ["zorp"]}, regions=regions).save(path)


def read_layers(path: Path) -> Any:
    made = LayerSubspaces.load(path)
    regions = made.regions and (
        {name: centre.tolist() for name, centre in made.regions.centres.items()},
        made.regions.units, made.regions.limit, made.regions.sigma,
    )  # fmt: skip
    return {name: basis.tolist() for name, basis in made.bases.items()}, made.provenance, regions


PEFT = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "bias": "none",
    "rank_pattern": {"to_k": 2}, "alpha_pattern": {"down_blocks.0.*to_v": 16.0},
    "target_modules": ["to_k", "to_v"], "base_model_name_or_path": "demo",
}  # fmt: skip


def read_peft(path: Path) -> Any:
    made = config_beside(path.with_name("adapter_model.safetensors"))
    for name in ("down_blocks.0.attentions.0.attn2.to_v", "mid_block.attn2.to_k", "a" * 100):
        made.alpha_of(name, made._first(made.ranks, name, made.rank))
    return made.rank, made.alpha, dict(made.ranks), dict(made.alphas), made.rslora


def stated_peft(path: Path) -> Any:
    values = json.loads(path.read_text("utf-8-sig"))
    return (
        values["r"], values["lora_alpha"], values.get("rank_pattern") or {},
        values.get("alpha_pattern") or {}, bool(values.get("use_rslora")),
    )  # fmt: skip


INDEX = {
    "_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0",
    "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"], "safety_checker": [None, None],
    "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"],
    "requires_safety_checker": False,
}  # fmt: skip
PARTS = ("unet", "vae", "text_encoder")


def make_index(path: Path) -> None:
    import diffusers

    for _, name in filter(lambda part: isinstance(part, list), INDEX.values()):
        getattr(diffusers, str(name), None)  # imported here, not while the time is taken
    text(INDEX)(path)


def stated_index(path: Path) -> Any:
    values = json.loads(path.read_text("utf-8-sig"))
    return {
        name: tuple(values[name])
        for name in PARTS if values.get(name) and values[name][0] is not None
    }  # fmt: skip


WEIGHTS = "diffusion_pytorch_model.safetensors.index.json"


def make_weight_index(path: Path) -> None:
    files = {f"layer.{index}.weight": f"part-{index // 3}.safetensors" for index in range(9)}
    path.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": files}), "utf-8")


def stated_weight_index(path: Path) -> Any:
    files = json.loads(path.read_text("utf-8-sig"))["weight_map"].values()
    return [path.parent / Path(name).name for name in sorted(set(files))]


def make_report(path: Path) -> None:
    (path.parent / "report.html").write_text("all", encoding="utf-8")
    sha256 = "f7a4b2e1" * 8
    document: dict[str, Any] = {
        "title": TITLE, "schema_version": SCHEMA_VERSION, "unmemorize": "0.1.0",
        "inputs": {"lora": {"name": "mine.safetensors", "sha256": sha256}, "images": {"a": sha256}},
        "headline": {"text": "2 of 4", "given": True, "p_value": 0.004}, "files": {"gone": sha256},
    }  # fmt: skip
    path.write_text(json.dumps(document | {DIGEST: digest_of(document, DIGEST)}), "utf-8")


def read_report(path: Path) -> Any:
    checks = verify_report(path)
    if not all(each.fits for each in checks):
        raise Damaged("; ".join(each.detail for each in checks))
    return [each.detail for each in checks]


def make_lora(path: Path) -> None:
    tensors = {
        f"lora_unet_{name}.{part}": seeded(*shape, seed=1, dtype=torch.float16)
        for name in ("to_k", "to_v")
        for part, shape in (("lora_down.weight", (2, 8)), ("lora_up.weight", (8, 2)))
    }
    metadata = {
        "ss_network_dim": "2", "ss_tag_frequency": json.dumps({"1_zorp": {"zorp": 4}}),
        "ss_dataset_dirs": json.dumps({"1_zorp": {"n_repeats": 1, "img_count": 4}}),
    }  # fmt: skip
    save_file(tensors, path, metadata=metadata)


def read_lora(path: Path) -> Any:
    tensors, header = read_tensors(path), read_header(path)
    assert header.shapes == {name: tuple(each.shape) for name, each in tensors.items()}
    return {name: each.tolist() for name, each in tensors.items()}


def stated_lora(path: Path) -> Any:
    return {name: each.tolist() for name, each in load(path.read_bytes()).items()}


TEXTS = ["a cat, sleeping", "ein Bär", "a dog\twith a hat", "猫", "a [trigger] (bold:1.2)"]


def make_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["file_name", "caption"], *([f"{t}.png", t] for t in TEXTS)])


def make_jsonl(path: Path) -> None:
    rows = [json.dumps({"prompt": text, "seed": 1}) for text in TEXTS]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def read_texts(path: Path) -> list[str]:
    return [prompt.text for prompt in read_prompts(path)]


COLUMNS = ("prompt", "caption", "text", "Prompt", "Caption", "Text", "TEXT")


def text_of(row: Any) -> str:
    text = row if isinstance(row, str) else row[next(name for name in COLUMNS if name in row)]
    return "".join("\ufffd" if "\ud800" <= each <= "\udfff" else each for each in text or "")


def stated_csv(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8-sig")
    return [text_of(row) for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)]


def stated_jsonl(path: Path) -> list[str]:
    lines = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    return [text_of(json.loads(line)) for line in lines if line.strip()]


def stated_txt(path: Path) -> list[str]:
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    return text.removesuffix("\n").split("\n")


def make_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"caption": TEXTS, "seed": [1] * len(TEXTS)}), path)


def stated_parquet(path: Path) -> list[str]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if name in COLUMNS]
    return [text_of(row) for row in file.read(columns=names).to_pylist()]


def make_journal(path: Path) -> None:
    journal = Journal(path)
    for index in range(6):
        journal.put(f"{index}", {"score": index / 7, "words": ["a", "b"]})


def read_journal(path: Path) -> Any:
    # What is torn at the end is computed again: fewer entries are no damage.
    journal = Journal(path)
    for key in map(str, range(6)):
        if key in journal and journal.get(key) != {"score": int(key) / 7, "words": ["a", "b"]}:
            return key
    return "as written"


def make_image(form: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        from PIL import Image

        pixels = random.Random(0).randbytes(24 * 20 * 3)
        Image.frombytes("RGB", (24, 20), pixels).save(path, format=form)

    return make


def read_picture(path: Path) -> Any:
    image = read_image(path)
    return image.mode, image.size == read_image(path).size


def text(values: Any) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps(values), encoding="utf-8")


MODEL, PROMPT, PICTURE = (ModelError,), (PromptError,), (ValueError, ImageNotRead)
KINDS = (
    Kind("calibration", "c.json", make_calibration, read_calibration, (CalibrationError,)),
    Kind("bases", "c.safetensors", make_bases, read_calibration, (CalibrationError,)),
    Kind("state", "state.json", make_state, read_state, (ModelError, ValueError)),
    Kind("subspace", "s.safetensors", make_subspace, read_subspace, MODEL),
    Kind("layers", "l.safetensors", make_layers, read_layers, MODEL),
    Kind("adapter_config", "adapter_config.json", text(PEFT), read_peft, MODEL, stated_peft),
    Kind("model_index", "model_index.json", make_index, lambda path: read_components(path.parent),
         MODEL, stated_index),
    Kind("weight_index", WEIGHTS, make_weight_index, lambda path: weight_files(path.parent), MODEL,
         stated_weight_index),
    Kind("audit", DOCUMENT, make_report, read_report, (ReportError, Damaged)),
    Kind("lora", "mine.safetensors", make_lora, read_lora, MODEL, stated_lora),
    Kind("journal", "j.jsonl", make_journal, read_journal, (StorageError,)),
    Kind("job", "job.json", text({"job": "audit", "seeds": [0, 1]}),
         lambda path: JOB.read(path, dict[str, Any]), (StrangeJob,),
         lambda path: json.loads(path.read_text("utf-8-sig"))),
    Kind("prompts_txt", "p.txt", lambda path: path.write_text("\n".join(TEXTS), "utf-8"),
         read_texts, PROMPT, stated_txt),
    Kind("prompts_csv", "p.csv", make_csv, read_texts, PROMPT, stated_csv),
    Kind("prompts_jsonl", "p.jsonl", make_jsonl, read_texts, PROMPT, stated_jsonl),
    Kind("prompts_parquet", "p.parquet", make_parquet, read_texts, PROMPT, stated_parquet),
    *(Kind(f"image_{form.lower()}", f"i.{form.lower()}", make_image(form), read_picture, PICTURE,
           lambda path: ("RGB", True))
      for form in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP")),
)  # fmt: skip
"""All of them, by the row of the table."""
