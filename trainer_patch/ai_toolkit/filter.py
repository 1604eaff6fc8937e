"""The memorization filter in a step of ai-toolkit: one more prediction, on the empty prompt."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...shared.training.filter.filter import scale_gradient
from ...shared.training.protection import Protection
from ...shared.training.replay import RandomState, aside
from .samples import samples_of


class StepFilter:
    """Repeats the trainer's prediction without text, and gates the gradient of the real one.

    Several losses of ai-toolkit are computed from that prediction, and only some are weighed by
    sample. No gradient reaches it from what is left out, through any of them.
    """

    def __init__(self, protection: Protection, sd: Any):
        """Encode the empty prompt, while the text encoders are there.

        Args:
            protection: With a filter.
            sd: ai-toolkit's model; its text encoders are not trained.
        """
        self._protection, self._sd = protection, sd
        self._empty = sd.encode_prompt([""]).detach()
        velocity = not sd.is_flow_matching and sd.prediction_type == "v_prediction"
        self._signal = sd.noise_scheduler.alphas_cumprod.cpu().sqrt() if velocity else None

    def predict(self, run: Callable[..., Tensor], given: dict[str, Any]) -> Tensor:
        """Return the prediction of a step.

        Args:
            run: The trainer's `predict_noise`.
            given: Its arguments.
        """
        samples, timesteps = samples_of(given["batch"]), given["timesteps"]
        state = RandomState.now(timesteps.device)
        plain = None
        if self._protection.due(samples, timesteps).any():
            # Before the real one: some models leave on the batch what they predicted last.
            with aside(state):
                plain = run(**given | {"conditional_embeds": self._without_text(len(samples))})
        prediction = run(**given)
        weights = self._protection.weigh(
            prediction,
            prediction[:0].detach() if plain is None else plain,
            timesteps=timesteps,
            samples=samples,
            scale=None if self._signal is None else self._signal[timesteps.cpu().long()],
        )
        return scale_gradient(prediction, weights)

    def _without_text(self, rows: int) -> Any:
        """Return the empty prompt's conditioning for a batch."""
        from toolkit.prompt_utils import concat_prompt_embeds

        return concat_prompt_embeds([self._empty] * rows)
