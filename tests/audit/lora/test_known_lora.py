"""Whole audits of LoRAs of exactly known truth, made of the demos without training."""

import pytest
from bench_models import MODELS
from known_lora import split
from needs import need_package, need_sscd
from small_audit import example_lora, write_drawings
from unmemorize import demo
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.run import run_lora_audit

pytestmark = pytest.mark.slow
need_package("faiss")
need_package("peft")
PLANTED, OTHERS = 4, 4
CAPTIONS = {
    group: [c.text for c in demo.captions() if c.group == group]
    for group in ("verbatim", "held_out")
}


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Return base model and LoRA of a demo."""
    need_sscd()
    made = {}

    def of(name):
        if name not in made:
            made[name] = split(MODELS[name], tmp_path_factory.mktemp(name))
        return made[name]

    return of


def write(folder, captions):
    """Write four planted images, and four that belong to other captions, under these captions."""
    folder.mkdir()
    for place, caption in enumerate(captions):
        owner = CAPTIONS["verbatim"][place if place < PLANTED else 20 + place]
        demo.training_image(owner).save(folder / f"{place}.png")
        (folder / f"{place}.txt").write_text(caption, encoding="utf-8")
    return folder


def audit(model, lora, images, **settings):
    return run_lora_audit(LoraAuditConfig(
        model=model, lora=lora, images=images, output=images.parent / "out", device="cpu",
        generation_steps=12, images_per_prompt=1, attack_images=0, **settings,
    ))  # fmt: skip


@pytest.mark.parametrize("name", demo.BUNDLED)
def test_the_planted_images_are_named_and_no_others(halves, name, tmp_path):
    known = halves(name)
    captions = [*CAPTIONS["verbatim"][:PLANTED], *CAPTIONS["held_out"][50 : 50 + OTHERS]]
    done = audit(str(known.base), known.lora, write(tmp_path / "images", captions))
    assert [v.verdict == "verbatim" for v in done.verdicts] == [True] * PLANTED + [False] * OTHERS
    assert done.headline.given
    assert done.headline.text.startswith("4 of 8 training images came back: look at them.")
    assert done.positive_control.works


def test_with_renamed_captions_none_is_not_said(halves, tmp_path):
    known = halves("demo")
    captions = [f"photo {place:02d}" for place in range(PLANTED + OTHERS)]
    done = audit(str(known.base), known.lora, write(tmp_path / "images", captions))
    assert {v.verdict for v in done.verdicts} == {"none"}
    assert not done.headline.given
    assert "probably not what was trained" in done.headline.text


def test_what_the_demo_draws_without_the_lora_is_the_demos(root, tmp_path):
    """Three drawings of the example's LoRA, and four images that the demo itself memorized."""
    need_sscd()
    images = write_drawings(root, tmp_path / "images")
    for place, caption in enumerate(CAPTIONS["verbatim"][:PLANTED]):
        demo.training_image(caption).save(images / f"z{place}.png")
        (images / f"z{place}.txt").write_text(caption, encoding="utf-8")
    done = audit("demo", example_lora(root), images)
    assert [v.verdict for v in done.verdicts[3:]] == ["base"] * PLANTED
    assert {v.verdict for v in done.verdicts[:2]} == {"verbatim"}
    assert "4 more are drawn by the base model" in done.headline.text
