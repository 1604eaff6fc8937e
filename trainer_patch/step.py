"""One training step under protection: the extra passes, loss weights, and what is not taught.

The order is the same in every trainer. `Step` is made before the step's own prediction, because the
extra passes start from that random state. `measure` makes them: on the empty prompt for the filter,
without the LoRA and with a concept's adapter for concept subtraction. `weights` turns predictions
into a weight for each sample's loss, `subtracted` moves the step's own prediction by what concepts
add, `target` replaces the target in a concept's regions. What differs between trainers is
`TrainerAdapter`.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..shared.arrays import take_rows
from ..shared.patching import HookMissing
from ..shared.training.filter.sample_log import Sample
from ..shared.training.projection.factors import UnsupportedTraining
from ..shared.training.protection import Protection
from ..shared.training.replay import RandomState, aside
from ..shared.training.subtracted import SubtractedTraining


@dataclass(frozen=True, kw_only=True)
class Call:
    """A step's own prediction, which can be made again."""

    run: Callable[..., Any]
    """The trainer's function that predicts."""
    given: Mapping[str, Any]
    """Its arguments in this step, by name."""
    samples: Mapping[int, Sample] = field(default_factory=dict)
    """By row of the batch, those that the methods are for. Rows without a sample, such as class
    images, are left alone."""
    kept: frozenset[int] = frozenset()
    """Rows taught what the base model predicts already, so that nothing is subtracted."""
    timesteps: Tensor | None = None
    """Of every row, [row], in the units of the training schedule."""

    @classmethod
    def of(cls, run: Callable[..., Any], signature: inspect.Signature, args: tuple,
           kwargs: Mapping[str, Any]) -> "Call":  # fmt: skip
        """Give the arguments of a call their names."""
        given = signature.bind(*args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        return cls(run=run, given=given)

    def again(self, **changed: Any) -> Any:
        """Return what the trainer's function returns, with some arguments changed."""
        return self.run(**{**self.given, **changed})

    def only(self, rows: Tensor, count: int, names: Collection[str] | None = None) -> "Call":
        """Return the call for some rows [row] of a batch of `count`.

        Args:
            rows: Numbers of the rows.
            count: Rows that the tensors of the whole batch have.
            names: Arguments that hold one row a sample; None looks at all arguments.
        """
        batched = {key: self.given[key] for key in (self.given if names is None else names)}
        return replace(self, given={**self.given, **take_rows(batched, rows, count)})

    def check_timesteps(self, repeated: Tensor) -> None:
        """Raise HookMissing unless a repeated prediction drew the timesteps of the step."""
        if not torch.equal(self.timesteps, repeated):
            raise HookMissing("A repeated prediction drew other timesteps than the training.")


@runtime_checkable
class TrainerAdapter(Protocol):
    """What a trainer has to bring. The extra passes run without gradient and leave no trace.

    The first two members serve all methods, `without_text` the memorization filter, `with_text`
    its controls, `without_lora` these, base targets and concept subtraction, `look` base targets,
    the others base targets and concept subtraction. Besides, the trainer makes a `Call` of each
    step's own prediction.
    """

    device: torch.device
    """On which the network draws random numbers."""
    repeats_rows: bool
    """Whether single rows of a batch can be predicted again. False where the trainer itself draws
    noise and timesteps for a whole batch while it predicts."""

    def without_text(self, call: Call, rows: Tensor | None) -> Tensor:
        """Return the prediction with the empty prompt in place of every caption, [row *latent].

        Args:
            call: Of the step.
            rows: Rows of the batch to predict, [row]; None for all.
        """

    def with_text(self, call: Call, rows: Tensor | None) -> Tensor:
        """Return the prediction with the captions once more, as `without_text` returns it."""

    def network(self, call: Call) -> nn.Module:
        """Return the bare network, whose layers show where the concept is and bear its adapter."""

    def without_lora(self) -> AbstractContextManager:
        """Return a block in which the network predicts as it did before the training."""

    def base(self, call: Call, rows: Tensor) -> Tensor:
        """Return the prediction for the step's own inputs at some rows; called without the LoRA.

        Where text encoders are trained, the text is that of the untrained ones.
        """

    def look(self, call: Call, rows: Tensor, latents: Tensor) -> None:
        """Run the network once on these clean latents with still noise and the empty prompt.

        Args:
            call: Of the step.
            rows: Rows of the batch that the latents are of, [row].
            latents: [row channel height width]; the noise level is that of the regions.
        """


class Step:
    """One step, from before its own prediction on."""

    def __init__(self, protection: Protection, trainer: TrainerAdapter, call: Call):
        """Remember the random state, from which every extra pass starts.

        Args:
            protection: Of the training.
            trainer: Makes the extra passes.
            call: Of the prediction that is about to be made; replace `Step.call` where samples or
                timesteps are only known later.
        """
        self.call = call
        self._protection, self._trainer = protection, trainer
        self._state = RandomState.now(trainer.device)
        self._plain: Tensor | None = None
        self._controls: tuple[Tensor, Tensor] | None = None
        self._shown, self._added = torch.zeros(0, dtype=torch.long), torch.zeros(0)

    def measure(self) -> None:
        """Make the extra passes that the filter and concept subtraction need in this step.

        Best called before the step's own prediction: its activations wait for the backward pass,
        and would be in memory together with those of these passes.
        """
        if self._protection.filter:
            self._predict_without_text()
        if self._protection.subtraction:
            self._predict_concepts(self._protection.subtraction)

    def subtracted(self, prediction: Tensor) -> Tensor:
        """Return the step's own prediction plus gain x what concepts add to the base model's.

        The loss of it is that of the prediction and a target without the concepts. What is added
        has no gradient. Without a sample that shows a concept it is the very same tensor.

        Args:
            prediction: [row *latent]; float32 or wider comes back, since what is added is small.
        """
        if not len(self._shown):
            return prediction
        whole = torch.zeros_like(prediction, dtype=self._added.dtype)
        whole[self._shown.to(whole.device)] = self._added
        return prediction + whole

    def _predict_concepts(self, subtraction: SubtractedTraining) -> None:
        """Predict without the LoRA, with each concept's adapter and without it."""
        trainer, call = self._trainer, self.call
        places = [row for row in call.samples if row not in call.kept]
        samples = [call.samples[row] for row in places]
        shown = [{places[at] for at in rows} for rows in subtraction.showing(samples)]
        self._shown = torch.tensor(sorted(set().union(*shown)), dtype=torch.long)
        if not len(self._shown):
            return

        def predict(rows: Tensor) -> Tensor:
            with aside(self._state):
                return trainer.base(call, rows)

        with aside(self._state), trainer.without_lora():
            self._added = subtraction.added(
                self._shown, shown, network=trainer.network(call), predict=predict
            )

    def _predict_without_text(self) -> None:
        rows, samples, timesteps = self._measured()
        due = self._protection.due(samples, timesteps)
        if due.any():
            some = rows[due] if self._trainer.repeats_rows and not due.all() else None
            with aside(self._state):
                plain = self._trainer.without_text(self.call, some)
            self._plain = plain[rows] if some is None and len(plain) != len(rows) else plain
        controls = rows[self._protection.controls_due(samples)]
        if len(controls):
            with self._trainer.without_lora():
                self._controls = (
                    self._predicted(self._trainer.with_text, controls),
                    self._predicted(self._trainer.without_text, controls),
                )

    def _predicted(self, predict: Callable[[Call, Tensor | None], Tensor], rows: Tensor) -> Tensor:
        """Return what an extra pass predicts for some rows of the batch."""
        single = self._trainer.repeats_rows
        with aside(self._state):
            prediction = predict(self.call, rows if single else None)
        return prediction if single else prediction[rows]

    def weights(self, prediction: Tensor, signal: Tensor | None = None) -> Tensor:
        """Return what to multiply the loss of each row by, [row]; 1 for rows without a sample.

        Args:
            prediction: The step's own, [row *latent].
            signal: By training timestep the factor from velocity to noise, sqrt(abar), for
                networks that predict velocities of a noise schedule.
        """
        rows, samples, timesteps = self._measured()
        ours = prediction if len(rows) == len(prediction) else prediction[rows]
        weights = self._protection.weigh(
            ours,
            ours[:0].detach() if self._plain is None else self._plain,
            timesteps=timesteps,
            samples=samples,
            scale=None if signal is None else signal[timesteps.cpu().long()],
            # Dropout matters only where single rows might be repeated.
            before=self._state if self._trainer.repeats_rows else None,
            controls=self._controls,
        )
        if len(rows) == len(prediction):
            return weights
        whole = weights.new_ones(len(prediction))
        whole[rows] = weights
        return whole

    def target(self, target: Tensor, latents: Tensor) -> Tensor:
        """Return the step's target, replaced by base predictions where images show the concept.

        Args:
            target: What the network would be taught, [row channel height width].
            latents: Clean ones, in the network's scale, of the same shape.
        """
        targets, trainer, call = self._protection.base_targets, self._trainer, self.call
        places = list(call.samples)
        named = [places[at] for at in targets.naming(list(call.samples.values()))]
        if not named:
            return target

        def base(rows: Tensor) -> Tensor:
            with aside(self._state):
                return trainer.base(call, rows)

        with aside(self._state), trainer.without_lora():
            return targets.target(
                target, latents, named, network=trainer.network(call), base=base,
                look=partial(trainer.look, call, torch.tensor(named)),
            )  # fmt: skip

    def _measured(self) -> tuple[Tensor, list[Sample], Tensor]:
        """Return the rows that have a sample, the samples, and their timesteps."""
        rows = torch.tensor(list(self.call.samples), dtype=torch.long)
        timesteps = self.call.timesteps
        if len(rows) != len(timesteps):
            timesteps = timesteps[rows]
        return rows, list(self.call.samples.values()), timesteps


def repeated(empty: Tensor, text: Tensor) -> Tensor:
    """Return the empty prompt's row as often as there are rows of text, in the text's dtype.

    Args:
        empty: Encoded empty prompt, [1 ...].
        text: Encoded captions of a batch, [row ...].

    Raises:
        UnsupportedTraining: The captions are padded to another length.
    """
    if empty.shape[1:] != text.shape[1:]:
        raise UnsupportedTraining(
            f"The training encodes captions to {tuple(text.shape[1:])}, and the empty prompt to "
            f"{tuple(empty.shape[1:])}: the memorization filter needs prompts of one length."
        )
    return empty.to(text.device, text.dtype).expand_as(text)
