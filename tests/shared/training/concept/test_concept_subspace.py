"""A concept's subspace: against a slow construction, on planted geometry, and as a file."""

import math
from functools import partial

import pytest
import torch
from small_text import AXES, CAPTIONS, COMMON, FIRST, QUIX, WIDTH, ZORBO, seeded, text_path
from toy import ToyDenoiser
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.training.concept.concept import Concept, PromptPair, load_templates
from unmemorize.shared.training.concept.fitting import ConceptNotSeparable, fit_subspace
from unmemorize.shared.training.concept.subspace import ConceptSubspace, remove
from unmemorize.shared.training.concept.text_states import TextStates, differences, text_path_of


def projector(basis: torch.Tensor) -> torch.Tensor:
    return basis @ basis.T


def slow_basis(concept: Concept, captions: list[str], price: float = 2.0) -> torch.Tensor:
    """The definition, one token after another: where the concept is worth its price."""
    pairs = concept.pairs(holdout=False)
    gram, totals = torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64), [0.0, 0.0]
    for prompt in [*captions, *dict.fromkeys(pair.twin for pair in pairs)]:
        encoded = text_path([prompt])
        words = len(prompt.split())
        padding = len(encoded.states[0]) - words - 2
        for place, state in enumerate(encoded.states[0]):
            group, weight = int(place > 0), 1 / padding if place > words + 1 else 1.0
            gram[group] += weight * torch.outer(state, state) / state.norm() ** 2
            totals[group] += weight
    change, total = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0.0
    for pair in pairs:
        ours, twin = text_path([pair.prompt]).states[0], text_path([pair.twin]).states[0]
        mean = sum(twin[1 + word] for word in pair.twin_subject) / len(pair.twin_subject)
        rows = [ours[1 + word] - mean for word in pair.subject]
        end, twin_end = 1 + len(pair.prompt.split()), 1 + len(pair.twin.split())
        rows.append(ours[end] - twin[twin_end])
        padding = range(max(end, twin_end) + 1, len(ours))
        rows += [(ours[p] - twin[p]) / math.sqrt(len(padding)) for p in padding]
        for row in rows:
            change += torch.outer(row, row)
            total += float(row @ row)
    values, vectors = torch.linalg.eigh(
        change / total - price * (gram[0] / totals[0] + gram[1] / totals[1])
    )
    chosen, reached = [], 0.0
    for place in range(WIDTH - 1, -1, -1):
        if values[place] <= 0 or reached >= 0.95 or len(chosen) == 16:
            break
        chosen.append(vectors[:, place])
        reached += float(chosen[-1] @ (change / total) @ chosen[-1])
    return torch.stack(chosen, dim=1)


@pytest.mark.parametrize(
    "concept", [ZORBO, QUIX, Concept(names=("quix",), neutral="old red thing")]
)
def test_basis_is_that_of_the_slow_construction(concept):
    subspace = fit_subspace(text_path, [concept], CAPTIONS, force=True)
    expected = slow_basis(concept, CAPTIONS)
    torch.testing.assert_close(projector(subspace.basis), projector(expected), rtol=0, atol=1e-8)
    assert subspace.rank >= 1


def test_planted_directions_are_inside_and_what_every_prompt_needs_is_not():
    subspace = fit_subspace(text_path, [ZORBO], CAPTIONS)
    marks = AXES[COMMON : COMMON + 2]
    assert remove(marks, subspace.basis).norm(dim=1).max() < 0.3
    assert (FIRST @ subspace.basis).norm() < 1e-8
    assert (AXES[COMMON + 2] @ subspace.basis).norm() < 0.1  # another concept's, never named
    assert subspace.provenance["accepted"]
    assert subspace.provenance["residuals"][0] <= 0.1
    assert subspace.provenance["collateral"] <= 0.05


def test_without_a_price_other_text_would_be_lost():
    concept = Concept(names=("house", "tree"), neutral="thing")

    def taken(price: float) -> float:
        made = fit_subspace(text_path, [concept], CAPTIONS, price=price, energy=1.0, force=True)
        return made.provenance["collateral"]

    assert taken(0.0) > taken(2.0) > taken(8.0)
    assert taken(8.0) < 0.3 * taken(0.0)


def test_joined_concepts_hold_each_and_nothing_twice():
    each = [fit_subspace(text_path, [c], CAPTIONS, force=True) for c in (ZORBO, QUIX)]
    both = fit_subspace(text_path, [ZORBO, QUIX], CAPTIONS, force=True)
    assert both.rank == sum(subspace.rank for subspace in each)
    for subspace in each:
        assert remove(subspace.basis.T, both.basis).norm(dim=1).max() < 0.1
    twice = fit_subspace(text_path, [QUIX, QUIX], CAPTIONS, force=True)
    torch.testing.assert_close(projector(twice.basis), projector(each[1].basis))


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_scale_of_joined_encoders_does_not_decide(scale):
    parts = (24, WIDTH - 24)
    plain, scaled = (
        fit_subspace(partial(text_path, scale=s, parts=parts), [ZORBO], CAPTIONS, force=True)
        for s in (1.0, scale)
    )
    factors = torch.tensor([1.0] * parts[0] + [scale] * parts[1], dtype=torch.float64)
    expected = torch.linalg.qr(factors[:, None] * plain.basis).Q
    torch.testing.assert_close(projector(scaled.basis), projector(expected), rtol=0, atol=1e-7)
    assert remove(scaled.basis.T, plain.basis).norm() > 0.1  # the case is not trivial


def test_captions_that_name_the_concept_are_not_retained():
    subspace = fit_subspace(text_path, [ZORBO], CAPTIONS)
    naming = [*CAPTIONS, "a red Zorbo, at night", "the big zorb"]
    other = fit_subspace(text_path, [ZORBO], naming)
    assert torch.equal(subspace.basis, other.basis)
    assert other.provenance["captions"] == {"retained": len(CAPTIONS), "named a concept": 2}
    assert not ZORBO.is_named_in("a zorbos thing")


def test_a_prompt_that_names_the_concept_has_a_twin():
    concept = Concept(names=("zorb", "Big Zorb"), neutral="a thing")
    pair = concept.pair_of("one (big zorb), at night")
    assert pair == PromptPair(
        prompt="one (big zorb), at night", twin="one a thing at night",
        subject=range(1, 3), twin_subject=range(1, 3),
    )  # fmt: skip
    assert concept.pair_of("zorb").twin == "a thing"
    assert concept.pair_of("a big zorbos thing") is None


def test_a_name_that_is_read_as_its_neutral_word_is_an_error():
    def deaf(prompts):
        return text_path([prompt.replace("quix", "thing") for prompt in prompts])

    with pytest.raises(ConceptNotSeparable, match="reads 'quix' exactly as 'thing'"):
        fit_subspace(deaf, [QUIX], CAPTIONS, force=True)


def test_cap_bounds_the_rank_and_a_missed_concept_is_refused():
    assert fit_subspace(text_path, [ZORBO], CAPTIONS, cap=1, force=True).rank == 1
    with pytest.raises(ConceptNotSeparable, match="of 'zorbo' lies outside"):
        fit_subspace(text_path, [ZORBO], CAPTIONS, cap=1)


def test_common_words_are_refused_unless_forced():
    concept = Concept(names=("house", "tree"), neutral="thing")
    with pytest.raises(ConceptNotSeparable, match="No subspace of this text encoder, of any rank"):
        fit_subspace(text_path, [concept], CAPTIONS)
    forced = fit_subspace(text_path, [concept], CAPTIONS, force=True)
    assert not forced.provenance["accepted"]
    assert forced.provenance["not_separable"] == ["house"]


def test_padding_counts_as_one_row():
    pairs = QUIX.pairs(holdout=True)[:1]
    rows = differences(text_path, pairs)
    words = len(pairs[0].prompt.split())
    state, twin = (text_path([text]).states[0] for text in (pairs[0].prompt, pairs[0].twin))
    padding = rows[2:]
    assert len(padding) == len(state) - words - 2
    expected = (state[-1] - twin[-1]).square().sum()
    torch.testing.assert_close(padding.square().sum(), expected)


def test_a_subject_that_is_cut_off_is_an_error():
    concept = Concept(names=("zorbo",), neutral="thing", templates=("very " * 30 + "{}",) * 4)
    with pytest.raises(ValueError, match="does not read the subject"):
        fit_subspace(text_path, [concept], CAPTIONS)


def test_a_denoiser_is_a_text_path():
    denoiser = ToyDenoiser()
    states = text_path_of(denoiser)(["a red cat", "dog"])
    assert torch.equal(states.states, denoiser.encode(["a red cat", "dog"]).embeddings)
    assert states.words[0][:4] == (None, 0, 1, 2)


def test_templates_are_many_and_whole():
    templates = load_templates()
    assert 30 <= len(templates) <= 60
    assert len(set(templates)) == len(templates)
    pair = Concept(names=("Big Blue",), neutral="a thing").pairs(holdout=False)[0]
    assert pair.prompt == "a photo of Big Blue"
    assert pair.twin == "a photo of a thing"
    assert [pair.prompt.split()[i] for i in pair.subject] == ["Big", "Blue"]
    sides = [QUIX.pairs(holdout=side) for side in (False, True)]
    assert not {p.prompt for p in sides[0]} & {p.prompt for p in sides[1]}
    assert [len(side) for side in sides] == [36, 12]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ()}, "`names` must hold"),
        ({"names": ("zorbo", " ")}, "`names` must hold"),
        ({"neutral": ""}, "`neutral` must not be empty"),
        ({"neutral": "Zorbo"}, "`neutral` must differ"),
        ({"templates": ("a photo of{}",) * 4}, "4 do not"),
        ({"templates": ("a {}",)}, "at least 4"),
    ],
)
def test_a_concept_refuses_nonsense(settings, message):
    with pytest.raises(ValueError, match=message):
        Concept(**({"names": ("zorbo",), "neutral": "thing"} | settings))


def test_states_refuse_nonsense():
    with pytest.raises(ValueError, match="2 prompts"):
        TextStates(states=torch.zeros(2, 3, 4), words=((None,) * 3,))
    with pytest.raises(ValueError, match="sum to the width"):
        TextStates(states=torch.zeros(1, 1, 4), words=((None,),), encoders=(2, 3))
    with pytest.raises(ValueError, match="NaN"):
        TextStates(states=torch.full((1, 1, 4), torch.nan), words=((None,),))


def orthonormal(width: int, rank: int) -> torch.Tensor:
    return torch.linalg.qr(seeded(width, rank)).Q


def test_a_file_gives_back_the_subspace(tmp_path):
    subspace = fit_subspace(text_path, [ZORBO], CAPTIONS)
    subspace.save(tmp_path / "zorbo.safetensors")
    loaded = ConceptSubspace.load(tmp_path / "zorbo.safetensors", width=WIDTH)
    assert torch.equal(loaded.basis, subspace.basis)
    assert loaded.provenance == subspace.provenance
    with pytest.raises(ModelError, match="this model's have 768"):
        ConceptSubspace.load(tmp_path / "zorbo.safetensors", width=768)
    empty = ConceptSubspace.empty(8)
    empty.save(tmp_path / "empty.safetensors")
    assert ConceptSubspace.load(tmp_path / "empty.safetensors").rank == 0


def test_damaged_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "subspace.safetensors"
    ConceptSubspace(basis=orthonormal(32, 4)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        ConceptSubspace.load(path)
    header = {"unmemorize.subspace": "{}"}
    for basis, message in [
        (torch.full((4, 1), torch.nan, dtype=torch.float64), "NaN"),
        (torch.ones(4, 2, dtype=torch.float64), "must be orthonormal"),
        (torch.ones(4, dtype=torch.float64), r"must be \[width rank\]"),
        (torch.eye(4), "in float64"),
    ]:
        save_file({"basis": basis}, path, metadata=header)
        with pytest.raises(ModelError, match=message):
            ConceptSubspace.load(path)
    basis = orthonormal(4, 1).contiguous()
    two = {"basis": basis, "more": basis.clone()}
    for tensors, metadata in [({"basis": basis}, None), (two, header)]:
        save_file(tensors, path, metadata=metadata)
        with pytest.raises(ModelError, match="not a concept subspace"):
            ConceptSubspace.load(path)
    save_file({"basis": orthonormal(4, 1).contiguous()}, path, metadata={
        "unmemorize.subspace": "{"
    })  # fmt: skip
    with pytest.raises(ModelError, match="damaged"):
        ConceptSubspace.load(path)
