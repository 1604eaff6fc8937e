"""What OneTrainer's data pipeline makes of prompts, and which images and captions it reads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...shared.patching import HookMissing
from ...shared.training.concept.text_states import TextStates, read_states
from ...shared.training.filter.sample_log import Sample
from ..step import repeated

TEXT = ("tokens", "text_encoder")
"""How the names of a batch's entries begin that hold text, encoded or to be encoded."""
STATES = "hidden_state"
"""How the names of those end that a U-Net's cross-attention reads."""
PRUNING = "PruneMaskedTokens"
"""Class of the module that cuts the padding off."""
REGULARIZATION = "PRIOR_PREDICTION"
"""Type of images whose target is the base model's own prediction: nothing of them is learnt."""


class TextSide:
    """Runs prompts through the text part of the trainer's own pipeline.

    Whatever the configuration says of clip skip, lengths and precision is in it.
    """

    def __init__(self, trainer: Any):
        """Take a trainer that has started."""
        self._trainer = trainer

    @contextmanager
    def encoders_there(self) -> Iterator[None]:
        """Hold the text encoders on the training's device: the trainer has put them away."""
        trainer = self._trainer
        trainer.model_setup.prepare_text_caching(trainer.model, trainer.config)
        try:
            yield
        finally:
            trainer.model_setup.setup_train_device(trainer.model, trainer.config)
            trainer.model.eval()

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what a batch of these prompts would hold of text, each [prompt ...]."""
        from mgds.MGDS import MGDS
        from mgds.OutputPipelineModule import OutputPipelineModule
        from mgds.PipelineModule import PipelineState
        from mgds.pipelineModules.MapData import MapData

        trainer = self._trainer
        modules = trainer.data_loader._preparation_modules(trainer.config, trainer.model)
        # Some loaders cut the padding off for their cache, and put it on again behind that.
        modules = [module for module in modules if type(module).__name__ != PRUNING]
        outputs = (name for module in modules for name in module.get_outputs())
        names = [name for name in outputs if name and name.startswith(TEXT)]
        source = MapData(in_name="concept.prompt", out_name="prompt", map_fn=str)
        data = MGDS(
            trainer.train_device,
            [{"prompt": prompt} for prompt in prompts],
            {},
            [source, *modules, OutputPipelineModule(names)],
            batch_size=1,
            state=PipelineState(1),
        )
        return torch.utils.data.default_collate(_items(data))

    def states(self, prompts: Sequence[str]) -> TextStates:
        """Return what cross-attention reads; a `TextPath`. For SD 1, SD 2 and SDXL."""
        encoded = self.encode(prompts)
        parts = [encoded[name].float() for name in sorted(encoded) if name.endswith(STATES)]
        model = self._trainer.model
        tokenizer = model.tokenizer if len(parts) == 1 else model.tokenizer_1
        return read_states(parts, tokenizer, prompts)


def learnt_rows(batch: Mapping[str, Any]) -> list[int]:
    """Return the rows of a batch that the LoRA learns from."""
    types = enumerate(batch["concept_type"])
    return [row for row, each in types if str(each) != REGULARIZATION]


def without_text(batch: Mapping[str, Any], empty: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a batch whose captions are all empty.

    Args:
        batch: Of the trainer's data loader.
        empty: The empty prompt's entries, [1 ...], as `TextSide.encode` gives them.

    Raises:
        HookMissing: The batch holds text that the pipeline's text part does not make.
        UnsupportedTraining: Its captions have another length than the empty prompt.
    """
    texts = {name: text for name, text in batch.items() if name.startswith(TEXT)}
    if missing := sorted(texts.keys() - empty.keys()):
        raise HookMissing(
            f"The batch holds {missing[0]}, which the empty prompt has not: this version of "
            "OneTrainer is not supported."
        )
    changed = {name: repeated(empty[name], text).clone() for name, text in texts.items()}
    return {**batch, **changed}


class BatchSamples:
    """Names the samples of a batch by file, with the caption of the data set.

    The batch's own caption may be shuffled, which would make many samples of one.
    """

    def __init__(self, trainer: Any):
        """List the images and captions of a trainer that has started."""
        from mgds.OutputPipelineModule import OutputPipelineModule

        loader, config, model = trainer.data_loader, trainer.config, trainer.model
        data = loader._create_mgds(
            config,
            [
                loader._enumerate_input_modules(config),
                loader._load_input_modules(config, model.train_dtype),
                OutputPipelineModule(["image_path", "prompt"]),
            ],
            type(model.train_progress)(),
        )
        self._samples = {
            item["image_path"]: Sample(file=item["image_path"], caption=item["prompt"])
            for item in _items(data)
        }

    @property
    def files(self) -> list[str]:
        """Every image."""
        return list(self._samples)

    @property
    def captions(self) -> list[str]:
        """Every caption once."""
        return list(dict.fromkeys(sample.caption for sample in self._samples.values()))

    def of(self, batch: Mapping[str, Any]) -> list[Sample]:
        """Return the samples of a batch, in its order."""
        return [self._samples.get(path, Sample(file=path)) for path in batch["image_path"]]


def _items(data: Any) -> list[dict[str, Any]]:
    """Return all items of a data set of the trainer's kind, in one epoch."""
    data.start_next_epoch()
    return list(data)
