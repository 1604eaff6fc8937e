"""Projection and memorization filter in ostris' ai-toolkit, which stays unmodified.

ai-toolkit loads what lies in its folder `extensions`. Put a file `extensions/unmemorize.py` there:

    from unmemorize.trainer_patch.ai_toolkit import AI_TOOLKIT_EXTENSIONS

Then change the type of a training in its configuration, and add the options:

    process:
      - type: unmemorize   # was sd_trainer, or diffusion_trainer
        unmemorize:
          project_concepts: "mickey mouse, mickey -> a character"
          mem_filter: x1.5
"""


class UnmemorizeExtension:
    """The training `type: unmemorize`, as ai-toolkit's loader of extensions wants it."""

    uid = "unmemorize"
    name = "LoRA Trainer with Unmemorize"

    @classmethod
    def get_process(cls) -> type:
        """Return the class of the training; imported when ai-toolkit asks, since it is slow."""
        from extensions_built_in.sd_trainer.DiffusionTrainer import DiffusionTrainer

        from .process import ProtectedProcess

        class ProtectedTrainer(ProtectedProcess, DiffusionTrainer):
            """ai-toolkit's trainer, of the command line and of its web page, protected."""

        return ProtectedTrainer


AI_TOOLKIT_EXTENSIONS = [UnmemorizeExtension]
"""Where ai-toolkit looks."""
