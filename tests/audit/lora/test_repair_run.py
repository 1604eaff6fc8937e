"""Whole repairs on the demo: a real LoRA that gives drawings back, and what is refused."""

import json

import pytest
from needs import need_package, need_sscd
from small_audit import example_lora, write_drawings, write_others
from typer.testing import CliRunner
from unmemorize.audit.lora.config import LoraAuditConfig
from unmemorize.audit.lora.header import read_header
from unmemorize.audit.lora.repair import distillation, run
from unmemorize.audit.lora.repair.config import RepairConfig
from unmemorize.audit.lora.repair.result import back
from unmemorize.audit.lora.repair.run import NothingToRepair, run_repair
from unmemorize.cli import app
from unmemorize.shared.files.weights import file_sha256

need_package("faiss")
need_package("peft")


@pytest.fixture
def config(root, tmp_path) -> LoraAuditConfig:
    need_sscd()
    return LoraAuditConfig(
        lora=example_lora(root), images=write_drawings(root, tmp_path / "5_drawing"),
        held_out=write_others(tmp_path / "others"), images_per_prompt=1, attack_images=0,
        generation_steps=8, batch_size=8, device="cpu",
    )  # fmt: skip


@pytest.mark.slow
def test_the_drawings_come_back_no_more_and_the_file_says_why(config, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "STEPS", 60)
    for name in ("MEMORIZED", "MEASURED"):
        monkeypatch.setattr(run, name, 16)
    done = run_repair(RepairConfig(
        audit=config, output=tmp_path / "repaired.safetensors", report=tmp_path / "report",
        methods=("strength", "distillation"),
    ))  # fmt: skip
    assert len(back(done.before)) >= 2
    assert back(done.after) == []
    assert not done.chosen.back.count
    assert done.chosen.kept == max(trial.kept for trial in done.trials if not trial.back.count)
    assert done.after.lora.sha256 == file_sha256(done.output) == done.sha256
    header = read_header(done.output)
    assert header.ours["repair"].startswith(done.chosen.method)
    assert header.ours["repair.source_sha256"] == file_sha256(config.lora)
    assert any("was repaired with Unmemorize" in said for said in done.after.lora.says)
    document = json.loads((done.folder / "repair.json").read_text("utf-8"))
    assert document["back"]["after"] == []
    assert (done.folder / "repair.html").stat().st_size > 20_000


@pytest.mark.slow
def test_a_lora_that_gives_nothing_back_is_refused(config, tmp_path):
    weak = LoraAuditConfig(**{**vars(config), "strength": 0.02})
    with pytest.raises(NothingToRepair, match="Nothing to repair: "):
        run_repair(RepairConfig(audit=weak, output=tmp_path / "repaired.safetensors",
                                report=tmp_path / "report"))  # fmt: skip
    assert not (tmp_path / "repaired.safetensors").exists()


def test_what_cannot_be_repaired_is_refused_before_anything_is_drawn(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.safetensors").write_bytes(b"")
    lora, images = str(config.lora), str(config.images)
    for model, folder, output, says in (
        ("demo-flow", images, "new", "Give the base model that it was trained on"),
        ("demo", str(tmp_path / "empty"), "new", "image"),
        ("demo", images, "there", "exists. Choose another --output"),
    ):
        answer = CliRunner().invoke(app, [
            "repair", model, "--lora", lora, "--images", folder, "--device", "cpu", "--report",
            str(tmp_path / "report"), "--output", str(tmp_path / f"{output}.safetensors"),
        ])  # fmt: skip
        assert answer.exit_code == 1, answer.output
        assert says in answer.output
        assert "Unexpected" not in answer.output
        assert not (tmp_path / "new.safetensors").exists()
        assert not list(tmp_path.glob("report/**/*.png"))
