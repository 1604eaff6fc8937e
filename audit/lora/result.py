"""The results of an audit of a LoRA: plain frozen values; page and files are made of them alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ...shared.score.rates import clopper_pearson

MATRIX = "similarity.npz"
"""The file with `matrix`: cosines [generation image]."""
Verdict = Literal["verbatim", "template", "near", "base", "none"]
"""A training image comes back; only its layout; closer than controls are; the base model draws it
without the LoRA; nothing of the kind: the gravest first."""
Mark = Literal["verbatim", "near", ""]
"""A generation is a copy of a training image, or nearer to it than controls come."""
MARKS: tuple[Mark, ...] = ("", "near", "verbatim")
"""As the file of the matrix numbers them."""
Asked = Literal["caption", "example", "trigger", "paraphrase", "empty", "attack"]
"""Which prompt a generation was made from."""


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share with its 95 % Clopper-Pearson interval."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> "Rate":
        """Return a share with its interval; of nothing it is 0 to 1."""
        low, high = clopper_pearson(count, total) if total else (0.0, 1.0)
        return cls(count=count, total=total, low=low, high=high)


@dataclass(frozen=True, kw_only=True)
class TrainingImage:
    """One image of the training folder."""

    name: str
    """Relative to the folder, with forward slashes."""
    sha256: str
    caption: str
    """Empty when there is none."""
    repeats: int
    """Times the trainer shows it in an epoch."""
    size: tuple[int, int]
    """Width and height in pixels."""
    held_out: bool = False
    """Not trained on: a control of the same subject."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The images a LoRA was trained on, as they lie in a folder."""

    folder: Path
    layout: Literal["kohya", "metadata", "plain"]
    """`10_name class` folders; a metadata file; images with or without caption files."""
    images: tuple[TrainingImage, ...]
    """Sorted by name; held-out ones come last."""
    trigger: str
    """The word that stands for what is taught, empty when none is known."""
    held_out_folder: Path | None = None
    """Where the held-out images lie when it is not `folder`; their names are relative to it."""
    warnings: tuple[str, ...] = ()

    @property
    def trained(self) -> tuple[TrainingImage, ...]:
        """Return the images that were trained on; their positions are the first."""
        return tuple(image for image in self.images if not image.held_out)

    def path_of(self, image: TrainingImage) -> Path:
        """Return the file of an image of the set."""
        elsewhere = self.held_out_folder if image.held_out else None
        return (elsewhere or self.folder) / image.name


@dataclass(frozen=True, kw_only=True)
class DuplicateGroup:
    """Images of the training set that are near-duplicates of each other."""

    images: tuple[int, ...]
    """Positions in the training set, two or more."""
    exact: bool
    """All have the same bytes."""
    similarity: float
    """Lowest cosine within the group."""


@dataclass(frozen=True, kw_only=True)
class LoraFacts:
    """What a LoRA file is and says of itself."""

    name: str
    """File name."""
    sha256: str
    dialect: Literal["kohya", "peft", "diffusers", "lycoris", "comfyui"]
    kinds: tuple[str, ...]
    """lora, locon, loha, lokr, dora: what its modules are."""
    rank: int | None
    """Largest rank; None where a kind has none."""
    modules: int
    epoch: int | None = None
    epochs: int | None = None
    steps: int | None = None
    images: int | None = None
    """Training images times repeats, as the header says."""
    base_name: str | None = None
    """Of the model it was trained on."""
    base_hash: str | None = None
    """As the trainer wrote it."""
    says: tuple[str, ...] = ()
    """Sentences: the header against the folder and the base model; what differs comes first."""
    warnings: tuple[str, ...] = ()
    """Those of `says` that a user must act on, such as another base model."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One generated image."""

    path: str
    """Relative to the output folder."""
    prompt: str
    asked: Asked
    source: int | None
    """Training image whose caption or paraphrase the prompt is."""
    seed: int
    lora: bool
    """False: the same prompt and seed with the LoRA off, a control."""
    nearest: int
    """Training image that is most similar."""
    similarity: float
    """Cosine to it."""
    mark: Mark = ""
    """Against whichever training image it is graver."""


@dataclass(frozen=True, kw_only=True)
class PromptScore:
    """How strongly a prompt drives the prediction."""

    prompt: str
    asked: Asked
    source: int | None
    on: float
    """Mean L2 norm of the text-conditional noise with the LoRA, latent units."""
    off: float
    """Without it; `on - off` is the LoRA's part."""


@dataclass(frozen=True, kw_only=True)
class ImageVerdict:
    """Whether one training image comes back."""

    image: int
    """Position in the training set."""
    verdict: Verdict
    similarity: float
    """Cosine of the most similar generation."""
    control: float
    """The same with the LoRA off."""
    ceiling: float
    """Cosine of the image and its own autoencoder round trip."""
    generation: int | None
    """Position of the most similar generation."""
    attracted: int
    """Generations to which this image is the nearest of all."""
    closeness: float | None = None
    """Distance of the generation that comes nearest for its own words, over the distance of a copy
    by the image's own yardstick: below 1 it is one. None without a yardstick."""
    closeness_off: float | None = None
    """The same with the LoRA off."""


@dataclass(frozen=True, kw_only=True)
class Clique:
    """Generations of the extraction attack that agree with each other."""

    size: int
    member: str
    """Path of the one nearest to the mean."""
    nearest: int
    """Training image most similar to it."""
    similarity: float
    extracted: bool
    """Similar enough to count as that image."""


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The extraction attack from base to LoRA (FineXtract)."""

    generations: int
    guidance: float
    """w of e_base(0) + w (e_lora(c) - e_base(0))."""
    cliques: tuple[Clique, ...]
    """Largest first."""
    extracted: Rate
    """Distinct training images brought out, of all."""


@dataclass(frozen=True, kw_only=True)
class EpochPoint:
    """One saved epoch."""

    name: str
    epoch: int
    score: float
    """Mean LoRA-on minus LoRA-off score of the captions."""
    similarity: float
    """Mean over the training images of the most similar generation's cosine."""
    reproduced: Rate
    """Training images that come back verbatim."""
    inside: bool
    """Within what controls do."""


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What carries the verdicts: every image has a yardstick of its own."""

    method: str
    """How they were made, a sentence."""
    controls: int
    """What the yardstick with the fewest was taken from."""
    enough: bool
    """False: so few controls carry no verdict."""


@dataclass(frozen=True, kw_only=True)
class PositiveControl:
    """The demo model's planted duplicates, measured in the same run by the same instrument."""

    found: Rate
    """The planted images that came back."""
    works: bool
    detail: str
    """A sentence: what was measured and what came out."""


@dataclass(frozen=True, kw_only=True)
class Headline:
    """What may be said of the whole LoRA."""

    text: str
    """A sentence, or why none can be given and what would be needed."""
    given: bool
    """False: refused."""
    reproduced: Rate
    """Training images judged verbatim."""
    controls: Rate
    """The same of controls: LoRA off, or held-out images."""
    p_value: float | None
    """One-sided Fisher's exact test of the two; None when refused, and where it is not below .05:
    each image is judged by itself."""


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Something that makes images come back, and what to do about it."""

    kind: Literal["duplicates", "captions", "repeats", "epochs", "rank"]
    evidence: str
    """A sentence with numbers."""
    change: str
    """What to do, a sentence with numbers."""
    flags: str = ""
    """Training options that would prevent it, to be typed; empty when there are none."""


@dataclass(frozen=True, kw_only=True)
class LoraAudit:
    """Everything the page shows and the files hold."""

    model: str
    model_fingerprint: str
    """sha256 over the weights of the base model, LoRA left out."""
    lora: LoraFacts
    training: TrainingSet
    duplicates: tuple[DuplicateGroup, ...]
    scores: tuple[PromptScore, ...]
    generations: tuple[Generation, ...]
    verdicts: tuple[ImageVerdict, ...]
    """Of the images that are not held out, in their order."""
    thresholds: Thresholds
    headline: Headline
    positive_control: PositiveControl
    attack: Attack | None
    epochs: tuple[EpochPoint, ...] = ()
    """Rising; empty when only one file was given."""
    best_epoch: int | None = None
    """Position of the last epoch inside the controls' interval."""
    causes: tuple[Cause, ...] = ()
    words: tuple[tuple[str, tuple[tuple[str, float], ...]], ...] = ()
    """Per flagged caption, its words with their significance."""
    settings: tuple[tuple[str, str], ...] = ()
    """Name and value of all that decides the result: seeds, steps, versions, features."""
    video: bool = False
    """Clips were drawn and no images; `images` of the training set may be clips as well."""
    open: tuple[str, ...] = ()
    """Sentences on what was not asked: of a quick audit, or of one that is not finished."""
    folder: Path = Path()
    """Output folder; holds the generated images and `similarity.npz`."""

    @property
    def ranked(self) -> list[ImageVerdict]:
        """Return the verdicts, the gravest first, and of equal ones the most similar."""
        gravity = get_args(Verdict).index
        return sorted(self.verdicts, key=lambda v: (gravity(v.verdict), -v.similarity, v.image))
