"""Run an audit of a LoRA: read, ask, draw, compare, judge, tell; killed anywhere, it continues.

    audit = run_lora_audit(LoraAuditConfig(lora=Path("my.safetensors"), images=Path("my_images")))

Whatever takes time is stored as soon as it is finished: scores in ``<output>/journal``, images as
files that are whole or absent. Everything else follows from these, so that an audit that was
stopped and continued ends with the same bytes as one that was not.
"""

from ...shared.dependencies import check_installed
from ..common.job import open_job
from ..common.measure import Bars, silent
from ..common.sscd import Sscd
from ..common.subject import Subject
from .ask import ask
from .compare import compare
from .config import LoraAuditConfig, identity_of
from .draw import draw
from .feature_cache import FeatureCache
from .judge import judge
from .read import read
from .result import LoraAudit
from .tell import tell
from .work import Notify, Work

NEEDS = {"reports": ("jinja2", "networkx", "PIL", "scipy"), "models": ("peft", "accelerate"),
         "sscd": ("faiss",)}  # fmt: skip


def run_lora_audit(
    config: LoraAuditConfig, bars: Bars = silent, notify: Notify = lambda sentence: None
) -> LoraAudit:
    """Audit a LoRA and write page, files and images into `config.output`.

    Args:
        config: What to audit and where to write.
        bars: Makes the progress bars.
        notify: Takes sentences, before hours of work, about what looks wrong and how long it takes.

    Raises:
        ImportError: An optional package is missing; says what to type.
        ModelError: The model or a LoRA cannot be used.
        PromptError: The training folder cannot be read.
        ValueError: The epochs cannot be read.
        FolderTaken: The output folder holds something else.
        StorageError: Nothing can be written; what was finished is kept.
        DrawingError: One of several processes has failed; what was finished is kept.
    """
    for extra, modules in NEEDS.items():  # before hours of work, not after
        check_installed(modules, purpose="An audit of a LoRA", extra=extra)
    encoder, subject = Sscd(), Subject.of(config)
    features = FeatureCache(encoder)
    material = read(config, subject.location)
    epochs = [epoch.sha256 for epoch in material.epochs]
    identity = identity_of(config, material.training, epochs, subject, features.name)
    with open_job(
        config.output, identity, overwrite=config.overwrite, check=lambda: subject.denoiser
    ) as job:
        work = Work(
            config=config, subject=subject, job=job, encoder=encoder,
            facts=subject.facts(job.journal("model"), config.detection), features=features,
            drawn=FeatureCache(encoder, job.folder / "journal" / "features"),
            bars=bars, notify=notify,
        )  # fmt: skip
        plan = ask(material, work)
        drawn = draw(plan, work)
        compared = compare(plan, drawn, work)
        audit = judge(plan, drawn, compared, work)
        tell(audit, include_images=config.include_images)
    return audit
