"""The text path of ai-toolkit: from prompts to what its network reads."""

from collections.abc import Sequence
from typing import Any

from ...shared.models.tokens import read
from ...shared.training.concept.text_states import TextPath, TextStates


def text_path(sd: Any) -> TextPath:
    """Return the text path of ai-toolkit's model, for SD 1, SD 2 and SDXL.

    Args:
        sd: Its text encoders are there and not trained.
    """

    def encode(prompts: Sequence[str]) -> TextStates:
        tokenizer, *_ = _listed(sd.tokenizer)
        widths = tuple(encoder.config.hidden_size for encoder in _listed(sd.text_encoder))
        states = sd.encode_prompt(list(prompts)).text_embeds.detach()
        readings = (read(tokenizer, prompt, states.shape[1]) for prompt in prompts)
        return TextStates(
            states=states,
            words=tuple(tuple(token.word for token in reading.tokens) for reading in readings),
            encoders=widths if len(widths) > 1 else (),
        )

    return encode


def _listed(value: Any) -> list[Any]:
    """Return a model's parts of one kind as a list: where there is only one, it stands alone."""
    return value if isinstance(value, list) else [value]
