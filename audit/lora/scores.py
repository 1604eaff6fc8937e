"""How strongly the questions drive the prediction, with the LoRA and without it."""

from collections.abc import Sequence
from contextlib import nullcontext

from ..common.job import Job, content_key
from ..common.measure import Bars, measure
from ..common.subject import Facts, Subject
from .asking import Question
from .config import LoraAuditConfig
from .result import PromptScore


class Scoring:
    """Measures with the journal of one job; what stands there is not measured again."""

    def __init__(self, facts: Facts, config: LoraAuditConfig, job: Job, key: str, bars: Bars):
        self.facts, self.config, self.job, self.bars = facts, config, job, bars
        self.key = key
        """Stands for model and settings in the journal."""

    def questions(self, asked: Sequence[Question], subject: Subject) -> tuple[PromptScore, ...]:
        """Return the mean |D| of every distinct prompt, with the subject's LoRA and without."""
        first = {question.prompt: question for question in reversed(asked)}
        prompts = list(dict.fromkeys(question.prompt for question in asked))
        on, off = (self.scores(prompts, subject, lora=lora) for lora in (True, False))
        return tuple(
            PromptScore(prompt=prompt, asked=first[prompt].asked, source=first[prompt].source,
                        on=on[prompt], off=off[prompt])
            for prompt in prompts
        )  # fmt: skip

    def scores(self, prompts: Sequence[str], subject: Subject, *, lora: bool) -> dict[str, float]:
        """Return the score of each prompt with the subject's LoRA, or of the base model."""
        key = content_key(self.key, subject.fingerprint if lora else None)
        journal = self.job.journal("scores")
        known = sum(content_key(key, prompt) in journal for prompt in prompts)
        off = not lora and known < len(prompts)  # a finished job never loads the model
        with subject.denoiser.lora_disabled() if off else nullcontext():
            measured = measure(
                subject, self.facts, prompts, self.config.detection, journal, job_key=key,
                bars=self.bars, phase=f"LoRA {'on' if lora else 'off'}",
            )  # fmt: skip
        return dict(zip(prompts, measured.detection.scores.tolist(), strict=True))
