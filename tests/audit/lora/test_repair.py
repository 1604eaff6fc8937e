"""Repair of a LoRA: the algebra of its methods, its file, its search, on tiny real pipelines."""

import math

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from unmemorize.audit.common.measure import silent
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.header import parse_metadata
from unmemorize.audit.lora.remarks import _own_remarks
from unmemorize.audit.lora.repair import distillation, predictions
from unmemorize.audit.lora.repair.case import Case
from unmemorize.audit.lora.repair.config import METHODS, RepairConfig
from unmemorize.audit.lora.repair.directions import Directions, _directions, _squares, alignment
from unmemorize.audit.lora.repair.predictions import Sample, kept, make_batches, steering
from unmemorize.audit.lora.repair.result import Trial, rate_of
from unmemorize.audit.lora.repair.search import search
from unmemorize.audit.lora.repair.weights import LoraWeights
from unmemorize.cli import app
from unmemorize.shared.files.weights import ModelError
from unmemorize.shared.models.adapter import PipelineDenoiser
from unmemorize.shared.models.lora.attach import load_lora

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
RANK = 4
MEMORIZED, OTHERS = ("red cat", "the cat"), ("green dog on the mat", "house", "tall tree", "sea")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kohya_file(pipeline, path, scale: float = 0.02, **metadata):
    """Write a LoRA on what reads the text, in kohya's dialect and in float16."""
    state = {}
    for number, (name, layer) in enumerate(pipeline.unet.named_modules()):
        if name.endswith(("attn2.to_k", "attn2.to_v", "attn1.to_q")):
            stem, (out, into) = f"lora_unet_{name.replace('.', '_')}", layer.weight.shape
            state |= {
                f"{stem}.lora_down.weight": seeded(RANK, into, seed=number),
                f"{stem}.lora_up.weight": scale * seeded(out, RANK, seed=number + 500),
                f"{stem}.alpha": torch.tensor(float(RANK)),
            }
    save_file({key: value.half() for key, value in state.items()}, path, metadata)
    return path


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    pipeline = tiny.stable_diffusion()
    path = kohya_file(pipeline, tmp_path_factory.mktemp("lora") / "lora.safetensors", 0.2)
    load_lora(pipeline, path)
    denoiser = PipelineDenoiser(pipeline)

    def batches(prompts, seed):
        samples = [Sample(prompt=text, latents=seeded(*denoiser.latent_shape, seed=place).float())
                   for place, text in enumerate(prompts)]  # fmt: skip
        return make_batches(denoiser, samples, 4, levels=6, seed=seed)

    return Case(denoiser=denoiser, weights=LoraWeights(pipeline, path), bars=silent,
                memorized=batches(MEMORIZED, 0), held=batches(OTHERS, 1))  # fmt: skip


def test_directions_are_those_of_the_product_and_are_weighed_one_by_one():
    up, down = seeded(20, RANK, seed=1), seeded(RANK, 12, seed=2)
    u, s, v = torch.linalg.svd(up @ down, full_matrices=False)
    found = Directions.of(up, down)
    torch.testing.assert_close(found.s, s[:RANK])
    torch.testing.assert_close((found.u * found.s) @ found.v.T, up @ down)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    expected = (u[:, :RANK] * s[:RANK] * weights) @ v[:RANK]
    torch.testing.assert_close(found.weigh(up, weights) @ down, expected)
    assert (expected - up @ down).norm() > 0.1 * expected.norm()


def test_alignment_is_1_within_the_principal_subspace_and_0_outside():
    u, v = (torch.linalg.qr(seeded(16, 16, seed=seed)).Q for seed in (3, 4))
    base = (u * torch.arange(16.0, 0, -1, dtype=torch.float64)) @ v.T
    chosen = [0, 1, 2, 15]  # the subspace is of 16 / 8 dimensions
    directions = Directions(u=u[:, chosen], s=torch.ones(4).double(), v=v[:, chosen])
    torch.testing.assert_close(alignment(directions, base), torch.tensor([1.0, 1, 0, 0]).double())
    crossed = Directions(u=u[:, [0]], s=torch.ones(1).double(), v=v[:, [15]])
    torch.testing.assert_close(alignment(crossed, base), torch.zeros(1).double())  # both sides


@pytest.mark.parametrize("name", METHODS)
def test_every_path_ends_at_the_lora_itself(case, name, monkeypatch):
    monkeypatch.setattr(distillation, "STEPS", 2)
    path, original = METHODS[name](case), case.weights.original
    whole, least = path(1.0), path(0.0)
    for place, factor in original.items():
        torch.testing.assert_close(whole[place], factor, rtol=1e-4, atol=1e-5)
        assert torch.equal(case.weights.parameter(place), factor), "the live LoRA was moved"
    assert any((least[place] - factor).norm() > 0.01 * factor.norm()
               for place, factor in original.items())  # fmt: skip


def test_strength_keeps_about_itself_and_the_ends_are_exact(case):
    case.weights.put(METHODS["strength"](case)(1.0))
    assert kept(case.denoiser, case.held) == pytest.approx(1.0, abs=1e-4)
    case.weights.put(METHODS["strength"](case)(0.0))
    assert kept(case.denoiser, case.held) == pytest.approx(0.0, abs=1e-4)
    case.weights.put(METHODS["strength"](case)(0.6))
    assert kept(case.denoiser, case.held) == pytest.approx(0.6, abs=0.1)
    case.weights.put(case.weights.original)


def test_distillation_moves_memorized_captions_and_holds_others(case, monkeypatch):
    monkeypatch.setattr(distillation, "STEPS", 40)
    monkeypatch.setattr(distillation, "RATE", 0.06)
    case.weights.put(METHODS["distillation"](case)(0.0))
    lost, held = (kept(case.denoiser, batches) for batches in (case.memorized, case.held))
    case.weights.put(case.weights.original)
    assert lost + 0.1 < held
    assert lost < 0.8
    assert not any(case.weights.parameter(place).requires_grad for place in case.weights.original)


def test_squares_are_those_of_differences_in_a_direction(case):
    """Hutchinson's estimate from many random signs against a step in each direction's weight."""
    weights, found = case.weights, _directions(case)
    place = max(found, key=lambda place: float(found[place].s[0]))
    batch = case.held[0]
    estimate = _squares(case, {place: found[place]}, (batch,) * 60)[place]
    exact, step = [], 1e-2
    for direction in range(RANK):
        gates = torch.ones(RANK)
        sides = []
        for sign in (1, -1):
            gates[direction] = 1 + sign * step
            up = found[place].weigh(weights.original[place], gates)
            weights.put(weights.original | {place: up})
            sides.append(steering(case.denoiser, batch))
        exact.append(((sides[0] - sides[1]) / (2 * step)).square().sum())
    weights.put(weights.original)
    torch.testing.assert_close(estimate, torch.stack(exact), rtol=0.8, atol=0)


def test_the_file_keeps_names_dtypes_and_header(tmp_path):
    pipeline = tiny.stable_diffusion()
    path = kohya_file(pipeline, tmp_path / "a.safetensors", ss_epoch="3", sshs_model_hash="ab")
    load_lora(pipeline, path)
    weights = LoraWeights(pipeline, path)
    changed = {place: 0.5 * factor for place, factor in weights.original.items()}
    weights.save(changed, tmp_path / "b.safetensors", {"unmemorize.repair": "strength, 0.5 left"})
    old, new = load_file(path), load_file(tmp_path / "b.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in new.items()} == {
        k: (v.dtype, v.shape) for k, v in old.items()
    }
    for key, value in new.items():
        expected = 0.5 * old[key] if key.endswith("lora_up.weight") else old[key]
        torch.testing.assert_close(value, expected)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"ss_epoch": "3", "unmemorize.repair": "strength, 0.5 left"}


def test_joined_and_swapped_rows_go_back_where_they_were(tmp_path):
    """Stability AI's names join query, key and value, and swap halves of the last layer."""
    pipeline = tiny.stable_diffusion_3()
    network = pipeline.transformer
    width = network.transformer_blocks[0].attn.to_q.in_features
    stems = {"joint_blocks.0.x_block.attn.qkv": 3 * width,
             "final_layer.adaLN_modulation.1": 2 * width}  # fmt: skip
    state = {}
    for number, (stem, rows) in enumerate(stems.items()):
        state |= {f"lora_unet_{stem.replace('.', '_')}.lora_down.weight":
                  seeded(RANK, width, seed=number).float(),
                  f"lora_unet_{stem.replace('.', '_')}.lora_up.weight":
                  seeded(rows, RANK, seed=number + 9).float()}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors")
    load_lora(pipeline, tmp_path / "a.safetensors")
    weights = LoraWeights(pipeline, tmp_path / "a.safetensors")
    assert len(weights.original) == 4
    weights.save(weights.original, tmp_path / "same.safetensors", {})
    for key, value in load_file(tmp_path / "same.safetensors").items():
        assert torch.equal(value, state[key])
    marked = {place: factor + torch.arange(len(factor))[:, None] for place, factor in
              weights.original.items()}  # fmt: skip
    weights.save(marked, tmp_path / "b.safetensors", {})
    other = tiny.stable_diffusion_3()
    load_lora(other, tmp_path / "b.safetensors")
    again = LoraWeights(other, tmp_path / "b.safetensors")
    for place, factor in marked.items():
        assert torch.equal(again.original[place], factor)


def test_what_is_no_plain_lora_is_refused_by_name(tmp_path):
    pipeline = tiny.stable_diffusion()
    name = next(n for n, _ in pipeline.unet.named_modules() if n.endswith("attn2.to_k"))
    out, into = pipeline.unet.get_submodule(name).weight.shape
    stem = f"lora_unet_{name.replace('.', '_')}"
    save_file({f"{stem}.hada_w1_a": torch.ones(out, 2), f"{stem}.hada_w1_b": torch.ones(2, into),
               f"{stem}.hada_w2_a": torch.ones(out, 2), f"{stem}.hada_w2_b": torch.ones(2, into)},
              tmp_path / "loha.safetensors")  # fmt: skip
    with pytest.raises(ModelError, match=r"is a LoHa in 1 module .*plain LoRA"):
        LoraWeights(pipeline, tmp_path / "loha.safetensors")


@pytest.mark.parametrize("limit", [0.3, 0.71])
def test_the_search_ends_just_below_where_images_come_back(limit):
    def judge(left, factors):
        assert factors == {"left": left}
        back = rate_of([left > limit])
        return Trial(method="m", left=left, back=back, images=back, kept=left)

    trials = [trial for trial, _ in search(lambda left: {"left": left}, judge, halvings=6)]
    best = max(trial.left for trial in trials if not trial.back.count)
    assert limit - 2**-6 <= best <= limit
    assert [
        t.left
        for t, _ in search(
            lambda left: {"left": left},
            lambda left, factors: Trial(
                method="m", left=left, back=rate_of([True]), images=rate_of([True]), kept=left
            ),
        )
    ] == [0.0]


def test_batches_cover_the_noise_levels_and_repeat(case):
    samples = [Sample(prompt="sea", latents=seeded(*case.denoiser.latent_shape).float())]
    one, same = (make_batches(case.denoiser, samples, 12, levels=6, seed=3) for _ in range(2))
    assert len({float(batch.sigma) for batch in one}) == 6
    assert all(torch.equal(a.x, b.x) for a, b in zip(one, same, strict=True))
    assert all(len(batch.x) == predictions.ROWS for batch in one)


def test_the_header_is_recognised_and_told_from_a_training():
    header = parse_metadata({
        "unmemorize.repair": "distillation, 0.25 left", "unmemorize.repair.source": "a.safetensors",
        "unmemorize.repair.source_sha256": "ab" * 32, "unmemorize.repair.came_back": "6 of 14",
        "unmemorize.repair.kept": "0.912",
    })  # fmt: skip
    (remark,) = _own_remarks(header, None)
    assert remark.text.startswith("The header says that it was repaired with Unmemorize (distil")
    for said in ("a.safetensors", "ab" * 32, "6 of 14", "0.912"):
        assert said in remark.text


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    audit = LoraAuditConfig(lora=tmp_path / "a.safetensors", images=tmp_path)
    for settings, says in (
        ({"output": tmp_path / "a.safetensors"}, "is the LoRA itself"),
        ({"output": tmp_path / "a.pt"}, "must end in .safetensors"),
        ({"output": tmp_path / "b.safetensors", "methods": ("magic",)}, "got magic"),
        ({"output": tmp_path / "b.safetensors", "methods": ()}, "got none"),
    ):
        with pytest.raises(ValueError, match=says):
            RepairConfig(audit=audit, **settings)


def test_a_repair_without_lora_or_images_says_what_it_needs():
    for arguments, says in ((["--images", "x"], "needs --lora"), (["--lora", "x"], "--images")):
        answer = CliRunner().invoke(app, ["repair", "demo", *arguments])
        assert answer.exit_code == 2
        assert says in answer.output


def test_kept_of_a_lora_without_effect_is_all(case):
    still = [batch for batch in case.held[:1]]
    same = [predictions.Batch(**{**vars(b), "without": b.with_lora}) for b in still]
    assert math.isclose(kept(case.denoiser, same), 1.0)
