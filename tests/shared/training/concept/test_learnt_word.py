"""A word for images: what it changes while it is known, and that it learns."""

import pytest
import tiny
import torch
from unmemorize import demo
from unmemorize.shared.mitigation.residual import residual_probe
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.load import load_denoiser
from unmemorize.shared.training.concept.concept import Concept
from unmemorize.shared.training.concept.fitting import ConceptNotSeparable, fit_subspace
from unmemorize.shared.training.concept.learnt_word import WORD, knowing, learn
from unmemorize.shared.training.concept.text_states import text_path_of
from unmemorize.shared.training.examination import concepts_of

FAMILIES = {"SD 1": (tiny.stable_diffusion, 1), "SDXL": (tiny.stable_diffusion_xl, 2)}


@pytest.fixture(params=FAMILIES)
def denoiser(request):
    make, _ = FAMILIES[request.param]
    return PipelineDenoiser(make(), resolution=tiny.RESOLUTION)


def test_the_word_begins_as_the_neutral_one_and_moves_by_itself(denoiser):
    before = denoiser.encode(["a red cat on the mat"])
    with knowing(denoiser.pipeline, "cat") as vectors:
        # One embedding that every encoder of the pipeline has of its own.
        assert len({vector.data_ptr() for vector in vectors}) == len(vectors) >= 1
        same = denoiser.encode([f"a red {WORD} on the mat"])
        assert torch.equal(same.embeddings, before.embeddings)
        with torch.no_grad():
            for vector in vectors:
                vector.add_(1.0)
        moved = denoiser.encode([f"a red {WORD} on the mat"])
        assert [token.word for token in moved.tokens[0]] == [t.word for t in before.tokens[0]]
        place = next(at for at, token in enumerate(moved.tokens[0]) if token.word == 2)
        differs = (moved.embeddings - before.embeddings).abs().amax(-1)[0]
        assert not differs[:place].any()  # CLIP reads from left to right
        assert (differs[place:] > 0).all()
        assert torch.equal(denoiser.encode(["a red cat on the mat"]).embeddings, before.embeddings)


def test_nothing_stays_behind_the_block(denoiser):
    pipeline = denoiser.pipeline
    parts = [name for name in ("tokenizer", "tokenizer_2") if hasattr(pipeline, name)]
    tokenizers = [getattr(pipeline, name) for name in parts]
    lengths = [len(each) for each in tokenizers]
    with pytest.raises(KeyError), knowing(pipeline, "cat"):
        raise KeyError
    assert all(getattr(pipeline, name) is each
               for name, each in zip(parts, tokenizers, strict=True))  # fmt: skip
    assert [len(each) for each in tokenizers] == lengths
    table = pipeline.text_encoder.get_input_embeddings()
    assert not table._forward_hooks
    assert not table._forward_pre_hooks


def test_models_that_mix_text_and_image_are_refused():
    with (
        pytest.raises(ValueError, match="SD 1, SD 2 and SDXL"),
        knowing(tiny.stable_diffusion_3(), "cat"),
    ):
        pytest.fail("was entered")


def test_a_word_that_learnt_nothing_has_no_subspace(denoiser):
    concept = Concept(names=(WORD,), neutral="cat", templates=("a {} on the mat",) * 4)
    with knowing(denoiser.pipeline, "cat"), pytest.raises(ConceptNotSeparable, match="exactly as"):
        fit_subspace(text_path_of(denoiser), [concept], ["a red dog"])


def test_subspaces_from_images_are_not_built_again_from_words():
    with pytest.raises(ValueError, match="learnt from images"):
        concepts_of({"concepts": [], "templates": [], "learnt": {"pictures": 3}})


@pytest.mark.slow
def test_the_word_learns_to_denoise_its_images():
    """Loss on noises that were not learnt on, with the word and with the neutral one."""
    denoiser = load_denoiser(demo.MODEL)
    latents = denoiser.encode_images([demo.training_images()[0]] * 2)
    templates = ("a {} , drawing", "{}")

    def loss(prompt: str) -> float:
        generator = torch.Generator().manual_seed(77)
        start = denoiser.encode([prompt])
        return residual_probe(
            denoiser, latents[0], start=start, generator=generator, iterations=1, lr=1e-9
        ).loss_before

    neutral = loss("a animal , drawing")
    with knowing(denoiser.pipeline, "animal") as vectors:
        learn(denoiser, vectors, latents, templates, steps=30, rate=0.02)
        assert loss(f"a {WORD} , drawing") < 0.99 * neutral
