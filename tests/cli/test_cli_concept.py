"""`unmemorize concept`: built from the demo, written, shown, tested, and refused in words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner
from unmemorize import cli, demo
from unmemorize.shared.training.concept.subspace import ConceptSubspace, remove
from unmemorize.shared.training.examination import concepts_of

NAMES = ["--name", "bear", "--synonym", "teddy bear", "--neutral", "animal"]
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_{}.lora_{}.weight"


@pytest.fixture
def unmemorize(tmp_path, monkeypatch):
    """Function that runs the command line in an empty folder: exit code, JSON, stderr."""
    monkeypatch.chdir(tmp_path)
    lines = ["a {} , animal", "postage stamp, {}", "{} at night", "playing card, {}"] * 2
    (tmp_path / "templates.txt").write_text("\n".join(f"{x} {i}" for i, x in enumerate(lines)))
    captions = [c.text for c in demo.captions()[:40]] + ["a red Bear, at night"]
    (tmp_path / "captions.txt").write_text("\n".join(captions), encoding="utf-8")

    def run(*arguments: object) -> tuple[int, dict, str]:
        words = ["concept", *map(str, arguments)]
        done = CliRunner().invoke(cli.app, words)
        document = json.loads(done.stdout) if "--json" in words else {}
        return done.exit_code, document, done.stderr

    return run


def build(unmemorize, *more: object) -> tuple[int, dict, str]:
    return unmemorize(
        "build", "demo", *NAMES, "--templates", "templates.txt", "--captions", "captions.txt",
        "--device", "cpu", "--json", *more,
    )  # fmt: skip


def test_a_concept_is_built_shown_and_tested(unmemorize, tmp_path):
    code, refused, err = build(unmemorize)
    assert code == 1
    assert refused["error"]["type"] == "ConceptNotSeparable"
    assert "'bear' lies outside (at most 10%)" in err
    assert not Path("concept.safetensors").exists()

    code, built, _ = build(unmemorize, "--force", "--cap", 3)
    assert code == 0
    assert (built["accepted"], built["rank"], built["width"]) == (False, 3, 128)
    assert built["captions"] == {"retained": 40, "named a concept": 1}
    assert built["concepts"] == [{"names": ["bear", "teddy bear"], "neutral": "animal"}]

    _, shown, _ = unmemorize("show", "concept.safetensors", "--json")
    assert shown == {key: built[key] for key in built if key != "output"}
    asked = ("--prompt", "one bear", "--prompt", "sushi", "--captions", "captions.txt")
    code, tested, _ = unmemorize("test", "concept.safetensors", "demo", *asked, "--json")
    assert code == 3
    assert tested["residuals"]["bear"] == pytest.approx(built["residuals"][0])
    assert tested["collateral"] == pytest.approx(built["collateral"])
    assert [each["named"] for each in tested["prompts"]] == ["bear", None]
    assert all(0 <= each["share"] <= 1 for each in tested["prompts"])

    code, both, _ = unmemorize(
        "build", "demo", "--name", "castle", "--neutral", "house", "--also", "concept.safetensors",
        "--templates", "templates.txt", "--force", "--json", "--output", "two.safetensors",
    )  # fmt: skip
    assert [each["names"][0] for each in both["concepts"]] == ["castle", "bear"]
    assert len(concepts_of(ConceptSubspace.load(tmp_path / "two.safetensors").provenance)) == 2


def test_a_concept_is_named_as_for_a_trainer(unmemorize):
    """The text that README shows for --project_concepts; the same file as by options."""
    _, by_options, _ = build(unmemorize, "--force")
    text = "bear, teddy bear -> animal"
    rest = ("--templates", "templates.txt", "--captions", "captions.txt", "--device", "cpu")
    code, by_text, err = unmemorize("build", "demo", text, *rest, "--json", "--force")
    assert code == 0, err
    assert by_text == by_options


@pytest.mark.parametrize("command", ["show", "test"])
def test_tables_hold_the_same(unmemorize, command):
    build(unmemorize, "--force")
    captions = ("demo", "--captions", "captions.txt") if command == "test" else ()
    done = CliRunner().invoke(cli.app, ["concept", command, "concept.safetensors", *captions])
    assert "bear" in done.stdout
    assert "10%" in done.stdout


def test_what_a_lora_reads_of_the_subspace(unmemorize):
    build(unmemorize, "--force")
    basis = ConceptSubspace.load(Path("concept.safetensors")).basis
    down = torch.randn(4, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clear = remove(down, basis).float()
    found = {}
    for name, value in (("clear", clear), ("reading", down.float())):
        factors = {LAYER.format("k", "A"): clear, LAYER.format("v", "A"): value.clone()}
        ups = {LAYER.format(each, "B"): torch.ones(64, 4) for each in "kv"}
        save_file(factors | ups, f"{name}.safetensors")
        _, tested, _ = unmemorize(
            "test", "concept.safetensors", "demo", "--captions", "captions.txt",
            "--lora", f"{name}.safetensors", "--json",
        )  # fmt: skip
        found[name] = [layer["within"] for layer in tested["lora"].values()]
        assert len(tested["lora"]) == 2
    assert found == {"clear": [True, True], "reading": [True, False]}


def test_files_that_cannot_be_used_are_named(unmemorize, tmp_path):
    path = tmp_path / "other.safetensors"
    ConceptSubspace.empty(64).save(path)
    _, error, err = unmemorize("test", path, "demo", "--json")
    assert "width 64, this model's have 128" in err
    assert error["error"]["type"] == "ModelError"
    path.write_bytes(path.read_bytes()[:-5] if path.stat().st_size > 500 else b"\x09")
    assert "not a whole safetensors file" in unmemorize("show", path)[2]
    header = {"unmemorize.subspace": "[]"}
    save_file({"basis": torch.eye(4, 1, dtype=torch.float64)}, path, metadata=header)
    assert "is [], expected an object" in unmemorize("show", path)[2]
    nothing = torch.full((4, 1), torch.nan, dtype=torch.float64)
    save_file({"basis": nothing}, path, metadata={"unmemorize.subspace": "{}"})
    code, _, err = unmemorize("show", path)
    assert (code, "NaN" in err) == (1, True)
    ConceptSubspace.empty(128).save(path)
    assert "does not say from which names" in unmemorize("test", path, "demo")[2]
    assert "no such file" in unmemorize("show", tmp_path / "none.safetensors")[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--name", " ", "--neutral", "animal"], "none that is empty"),
        (["--name", "bear", "--neutral", "Bear"], "must differ from every name"),
        (["--name", "bear", "--neutral", "animal", "--energy", "0"], "`energy`"),
        (["--name", "bear", "--neutral", "animal", "--templates", "captions.txt"], "{} once"),
        (["bear"], "no neutral word"),
        ([" ; "], "No concept is named"),
        (["bear -> animal", "--neutral", "animal"], "not both"),
    ],
)
def test_nonsense_is_refused(unmemorize, options, message):
    code, _, err = unmemorize("build", "demo", *options)
    assert code == 2
    assert message in err
