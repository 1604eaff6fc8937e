"""The learnt word of a concept audit is learnt once, kept, and read again as it was."""

import tiny
import torch
from PIL import Image
from unmemorize.audit.common.measure import silent
from unmemorize.audit.concept.inversion import reading_word
from unmemorize.shared.files.tensors import TensorFolder
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.training.concept.learnt_word import WORD


def test_a_word_is_kept_for_a_continued_job(tmp_path):
    Image.new("RGB", (64, 64), "#ff00d4").save(tmp_path / "a.png")
    denoiser = PipelineDenoiser(tiny.stable_diffusion(), resolution=64)
    kept = TensorFolder(tmp_path / "words")

    def read(number: int, steps: int) -> torch.Tensor:
        with reading_word(denoiser, [tmp_path / "a.png"], kept, number, steps=steps, bars=silent):
            return denoiser.encode([f"a cat, {WORD}"]).embeddings

    first = read(0, 3)
    assert torch.equal(read(0, 3), first)  # not learnt again
    assert kept.numbers() == [0]
    assert not torch.equal(read(1, 1), first)
    assert kept.numbers() == [0, 10]
