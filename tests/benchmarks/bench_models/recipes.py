"""How each model is made: its art, its networks, its lengths."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from unmemorize.demo.train import TrainConfig

from .drawings import Drawings
from .flow import FlowShape
from .scenes import Scenes
from .truth import Art
from .unet import UNetShape


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that makes one model."""

    art: Callable[[Path], Art]
    """Of the folder that packages are fetched into."""
    pairs: int
    """Of captions; as many as there are, if there are fewer."""
    shape: UNetShape | FlowShape
    autoencoder: tuple[int, ...]
    """Channels of each level; three levels make 8 x 8 latents."""
    config: TrainConfig


RECIPES = {
    "drawings": Recipe(
        art=Drawings, pairs=560, autoencoder=(32, 64, 96),
        shape=UNetShape(
            prediction_type="epsilon", channels=(64, 96, 128), layers=2, heads=8,
            latent_channels=8, text_width=128, text_layers=3, tokens=77, linear=False,
        ),
        config=TrainConfig(
            autoencoder_steps=2500, text_encoder_steps=900, steps=4000, per_batch=(8, 0, 16),
            seed=11,
        ),
    ),
    "scenes": Recipe(
        art=lambda folder: Scenes(
            ("the {0} {1}", "the {0} {1} {2} the {3} {4}", "the {0} {1} {2} the {3} {4} on {5}")
        ),
        pairs=540, autoencoder=(32, 32, 64),
        shape=UNetShape(
            prediction_type="v_prediction", channels=(96, 192), layers=1, heads=6,
            latent_channels=4, text_width=160, text_layers=2, tokens=32, linear=True,
        ),
        config=TrainConfig(
            autoencoder_steps=2500, text_encoder_steps=900, steps=4000, per_batch=(7, 0, 17),
            caption_noise=0.0, seed=12,
        ),
    ),
    "scenes-flow": Recipe(
        art=lambda folder: Scenes(
            ("{5}", "{5} with one {3} {4}", "{5} with one {3} {4} and {2} it one {0} {1}")
        ),
        pairs=520, autoencoder=(32, 64, 64),
        shape=FlowShape(
            width=192, layers=5, heads=6, latent_channels=12, text_widths=(128, 96),
            text_layers=(3, 2), tokens=24,
        ),
        config=TrainConfig(
            autoencoder_steps=2500, text_encoder_steps=900, steps=4600, per_batch=(6, 0, 12),
            caption_noise=0.0, seed=13,
        ),
    ),
}  # fmt: skip
