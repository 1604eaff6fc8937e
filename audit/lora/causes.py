"""What makes training images come back, as far as an audit can see it, and what to do about it.

Each cause is a count of this audit, never a proof: which of several causes did it shows only in the
next training. No change makes a LoRA safe; whether it helped, the next audit says.
"""

from collections import Counter

from ...shared.wording import counted
from .result import Cause, LoraAudit

COMING_BACK = ("verbatim", "template")
KOHYA = ("kohya", "lycoris")
"""Dialects of files that sd-scripts writes; the others come from scripts of diffusers."""
FILTER = "--mem_filter q0.95"
"""Our option for both trainers: samples that are being memorized are left out of the loss."""
LEAST_RANK = 4


def find_causes(audit: LoraAudit) -> tuple[Cause, ...]:
    """Return the causes that this audit shows, duplicates first; none where no image comes back."""
    back = {v.image for v in audit.verdicts if v.verdict in COMING_BACK}
    if not back:
        return ()
    trained = {verdict.image for verdict in audit.verdicts}
    groups = [sorted(trained.intersection(group.images)) for group in audit.duplicates]
    groups = [group for group in groups if len(group) > 1]
    distinct = trained.difference(*(group[1:] for group in groups))
    causes = (
        _duplicates(back, trained, groups),
        _captions(audit, back, distinct),
        _repeats(audit, back, trained),
        _epochs(audit),
        _rank(audit, len(distinct)),
    )
    return tuple(cause for cause in causes if cause)


def _duplicates(back: set[int], trained: set[int], groups: list[list[int]]) -> Cause | None:
    """Images that are in the folder more than once are shown more often than the others."""
    inside = {image for group in groups for image in group}
    if not back & inside:
        return None
    surplus = len(inside) - len(groups)
    return Cause(
        kind="duplicates",
        evidence=f"{len(inside)} of {len(trained)} training images are near-duplicates of others, "
        f"in {counted(len(groups), 'group', 'groups')}. {_among(back, inside, trained)}",
        change=f"Keep one image of each group and take {counted(surplus, 'file', 'files')} out: "
        f"{counted(len(trained) - surplus, 'image remains', 'images remain')}.",
        flags=FILTER,
    )


def _captions(audit: LoraAudit, back: set[int], distinct: set[int]) -> Cause | None:
    """Different images with the same words: what tells them apart is learnt by heart."""
    captions = {index: audit.training.images[index].caption.strip() for index in distinct}
    counts = Counter(captions.values())
    same = {index for index in distinct if counts[captions[index]] > 1}
    if not back & same:
        return None
    texts = len({captions[index] for index in same})
    return Cause(
        kind="captions",
        evidence=f"{len(same)} of {len(distinct)} distinct training images share "
        f"{counted(texts, 'caption', 'captions')} word for word. {_among(back, same, distinct)}",
        change=f"Describe what differs, so that the {len(same)} images have {len(same)} captions "
        f"instead of {texts}; where captions are tags, let the trainer shuffle and drop some.",
        flags="--shuffle_caption --keep_tokens 1 --caption_tag_dropout_rate 0.1"
        if audit.lora.dialect in KOHYA
        else "",
    )


def _repeats(audit: LoraAudit, back: set[int], trained: set[int]) -> Cause | None:
    """The more often an image is shown, the sooner it comes back."""
    repeats = {index: audit.training.images[index].repeats for index in trained}
    often, first = (end(repeats[index] for index in back) for end in (max, min))
    if often < 2:
        return None
    # The highest repeats up to which no image came back, if there are any such images.
    fewer = max((count for count in repeats.values() if count < first), default=often // 2)
    kept = [index for index in repeats if repeats[index] <= fewer]
    epoch = audit.lora.epoch
    over = f", {often * epoch} times over {epoch} epochs" if epoch and epoch > 1 else ""
    reason = (
        f"none of the {counted(len(kept), 'image', 'images')} repeated {fewer} times or less "
        "came back" if kept else "a first step of half as many; audit the result"
    )  # fmt: skip
    return Cause(
        kind="repeats",
        evidence=f"Images that come back are shown up to {often} times in an epoch{over}.",
        change=f"Lower the repeats from {often} to {fewer} ({reason})."
        + (f" In kohya's layout the folder's name says it: {fewer}_name."
           if audit.training.layout == "kohya" else ""),
        flags=FILTER,
    )  # fmt: skip


def _epochs(audit: LoraAudit) -> Cause | None:
    """An earlier epoch may be within the controls; without saved ones nobody knows."""
    if audit.epochs:
        return _earlier_epoch(audit)
    epoch = audit.lora.epoch
    if not epoch or epoch < 2:
        return None
    return Cause(
        kind="epochs",
        evidence=f"The file is of epoch {epoch}; earlier ones were not given.",
        change=f"Save all {epoch} epochs and audit them with --epochs: the curve shows after "
        "which one images begin to come back.",
        flags=_every_epoch(audit),
    )


def _earlier_epoch(audit: LoraAudit) -> Cause | None:
    last = audit.epochs[-1]
    rose = f"At epoch {last.epoch} {last.reproduced.count} of {last.reproduced.total} come back"
    if audit.best_epoch is None:
        first = audit.epochs[0]
        return Cause(
            kind="epochs",
            evidence=f"{rose}; the first saved one, epoch {first.epoch}, is already above the "
            f"controls with {first.reproduced.count}.",
            change=f"Train anew and stop before epoch {first.epoch}"
            + (", or halve the repeats." if first.epoch < 2 else "."),
            flags=f"{_stop_after(audit, max(first.epoch - 1, 1))} {FILTER}",
        )
    best = audit.epochs[audit.best_epoch]
    if best == last:
        return None
    return Cause(
        kind="epochs",
        evidence=f"{rose}; at epoch {best.epoch}, {best.reproduced.count} of "
        f"{best.reproduced.total}, as controls do.",
        change=f"Publish epoch {best.epoch} ({best.name}) after an audit of its own, or stop the "
        f"training there: {best.epoch} epochs instead of {last.epoch}.",
        flags=f"{_stop_after(audit, best.epoch)} {_every_epoch(audit)}",
    )


def _stop_after(audit: LoraAudit, epoch: int) -> str:
    kohya = audit.lora.dialect in KOHYA
    return f"--max_train_epochs {epoch}" if kohya else f"--num_train_epochs {epoch}"


def _every_epoch(audit: LoraAudit) -> str:
    """Return the option that saves each epoch; scripts of diffusers count steps."""
    if audit.lora.dialect in KOHYA:
        return "--save_every_n_epochs 1"
    steps, epoch = audit.lora.steps, audit.lora.epoch
    return f"--checkpointing_steps {max(steps // epoch, 1)}" if steps and epoch else ""


def _rank(audit: LoraAudit, distinct: int) -> Cause | None:
    """From one direction per distinct image on, a layer can keep them all apart."""
    rank = audit.lora.rank
    # The kinds other than low-rank ones have no rank; Kronecker factors multiply theirs.
    if rank is None or rank <= LEAST_RANK or rank < distinct or "lokr" in audit.lora.kinds:
        return None
    lower = max(LEAST_RANK, 1 << max(distinct // 2, 1).bit_length() - 1)
    named = "--network_dim {0}" if audit.lora.dialect in KOHYA else "--rank {0}"
    return Cause(
        kind="rank",
        evidence=f"Rank {rank} for {distinct} distinct images: each layer has a direction to spare "
        "for every single image.",
        change=f"Train with rank {lower} instead of {rank}. That is a rule of thumb; what it "
        "brings shows in the next audit.",
        flags=named.format(lower),
    )


def _among(back: set[int], some: set[int], trained: set[int]) -> str:
    """Return how many images come back among some and among the others."""

    def share(of: set[int]) -> str:
        count = len(back & of)
        return f"{count} {'comes' if count == 1 else 'come'} back"

    others = trained - some
    rest = f", of the {len(others)} others {share(others)}" if others else ""
    return f"Of these {share(some)}{rest}."
