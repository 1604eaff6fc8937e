"""Whether the words that a LoRA was asked are those that it was trained with.

Asked for by other words images do not come back, and that says nothing. The header of many LoRAs
counts the words of their captions. Where it is silent, a user who gives the words as an option
answers for them; else the score has to: what a LoRA learnt by heart drives the prediction harder
with it than without, and harder than it makes any other prompt do. What was learnt lightly may not.
"""

from collections.abc import Mapping, Sequence

from ...shared.score.controls import load_controls
from ...shared.wording import counted, name_some, visible
from .ask import Plan
from .result import PromptScore
from .work import Work

CONTROLS = 20
"""Prompts that were not trained, and whose rise tells what the LoRA does to any prompt."""
MORE = 1.25
"""Times that the score of a trained caption rises as much as that of any of these."""


def doubt_of(plan: Plan, scores: Sequence[PromptScore], work: Work) -> str:
    """Return why the words may not be those of the training, a sentence; empty for no doubt."""
    images = plan.training.trained
    if plan.unknown:
        names = name_some((visible(images[i].caption) for i in plan.unknown), 2)
        holds = counted(len(plan.unknown), "caption holds", "captions hold")
        return (
            f"{holds} none of the words that the LoRA's header counts ({names}). Give the captions "
            "that were trained."
        )
    if plan.unknown is not None or work.config.trigger or work.config.instance_prompt:
        return ""
    prompts = load_controls("art")[:CONTROLS]
    on, off = (work.scores(prompts, work.subject, lora=lora) for lora in (True, False))
    return doubt_by_scores(
        [score for score in scores if score.asked in ("caption", "trigger")],
        {prompt: (on[prompt], off[prompt]) for prompt in prompts},
    )


def doubt_by_scores(
    asked: Sequence[PromptScore], controls: Mapping[str, tuple[float, float]]
) -> str:
    """Return a sentence where no caption's score rises more than those of other prompts.

    Args:
        asked: Captions and trigger.
        controls: Score with the LoRA and without, by prompt.
    """
    most = max(on / off for on, off in controls.values())
    if any(score.on > MORE * most * score.off for score in asked):
        return ""
    return (
        f"with the LoRA on, the words asked drive the model no harder than any other words do (at "
        f"most {max(score.on / score.off for score in asked):.1f} times as hard as without it, of "
        f"{len(controls)} other prompts {most:.1f}), and its header counts none. So they are "
        "probably not what was trained, or little was learnt. Give the words of the training "
        "(captions, --instance-prompt, --trigger)."
    )
