"""The options mean the same on the command line, in TOML and as key=value strings."""

import argparse
import math
from pathlib import Path

import pytest
from unmemorize.shared.training.concept.concept import Concept, parse_concepts
from unmemorize.shared.training.concept.subspace import ConceptSubspace
from unmemorize.shared.training.settings import (
    FilterSettings,
    ProjectionSettings,
    ProtectionSettings,
)
from unmemorize.trainer_patch.options import (
    NAMES,
    PREFIXES,
    OptionError,
    add_options,
    settings_from,
)
from unmemorize.trainer_patch.typed import refuse_hidden, refuse_nothing, refuse_unknown

MOUSE = Concept(names=("mickey mouse", "mickey"), neutral="a character")
PIKACHU = Concept(names=("pikachu",), neutral="an animal")
TEXT = "mickey mouse, mickey -> a character; pikachu -> an animal"
ASKED = ProtectionSettings(
    projection=ProjectionSettings(concepts=(MOUSE, PIKACHU), energy=0.9, cap=8, force=True),
    filter=FilterSettings(
        quantile=0.95, action="downweight", recall=16, report=Path("out/ranked.v1.json")
    ),
)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


def test_three_ways_say_the_same():
    line = parsed(
        "--project_concepts", TEXT, "--project_energy", "0.9", "--project_cap=8",
        "--project_force", "--mem_filter", "q0.95", "--mem_filter_action", "downweight",
        "--mem_filter_recall", "16", "--mem_filter_report", "out/ranked.v1",
    )  # fmt: skip
    toml = {
        "project_concepts": TEXT, "project_energy": 0.9, "project_cap": 8, "project_force": True,
        "mem_filter": "q0.95", "mem_filter_action": "downweight", "mem_filter_recall": 16,
        "mem_filter_report": "out/ranked.v1.json", "learning_rate": 1e-4,
    }  # fmt: skip
    strings = {key: str(value).lower() for key, value in toml.items()}
    for given in (vars(line), toml, strings):
        assert settings_from(given) == ASKED


def test_not_given_is_off():
    nothing = settings_from(vars(parsed()))
    assert nothing == ProtectionSettings()
    assert not nothing
    assert not settings_from({"mem_filter": "off", "project_concepts": ""})
    assert not settings_from({"mem_filter": False, "project_force": False})


@pytest.mark.parametrize(
    ("text", "limit"), [("0", 0.0), (0, 0.0), (0.05, 0.05), ("inf", math.inf), ("1e-3", 1e-3)]
)
def test_numbers_are_absolute_thresholds_and_zero_is_one_of_them(text, limit):
    assert settings_from({"mem_filter": text}).filter == FilterSettings(limit=limit)


@pytest.mark.parametrize("text", ["x1.5", "X1.50", "q0.9"])
def test_a_letter_says_what_the_number_is_of(text):
    found = settings_from({"mem_filter": text}).filter
    assert found == (FilterSettings(quantile=0.9) if text[0] == "q" else FilterSettings(ratio=1.5))
    assert settings_from({"mem_filter": found.text}).filter == found


def test_layers_stand_alone_or_beside_concepts(tmp_path):
    path = tmp_path / "layers.safetensors"
    with pytest.raises(OptionError, match=r"--project_layers: there is no file"):
        settings_from({"project_layers": str(path)})
    path.touch()
    alone = settings_from({"project_layers": str(path)}).projection
    assert alone == ProjectionSettings(layers=path)
    assert not alone.of_text
    both = settings_from({"project_layers": str(path), "project_concepts": TEXT}).projection
    assert (both.layers, both.concepts, both.of_text) == (path, (MOUSE, PIKACHU), True)
    spared = settings_from({"project_layers": str(path), "project_regions": "true"}).projection
    assert spared == ProjectionSettings(layers=path, regions=True)
    for given in ({"project_regions": True}, {"project_regions": "on", "project_concepts": TEXT}):
        with pytest.raises(OptionError, match="--project_regions needs --project_layers"):
            settings_from(given)
    with pytest.raises(OptionError, match="--project_energy does nothing without --project_conc"):
        settings_from({"project_layers": str(path), "project_energy": "0.9"})


def test_a_saved_subspace_is_named_by_its_file(tmp_path):
    path = tmp_path / "mouse.safetensors"
    with pytest.raises(OptionError, match="there is no file"):
        settings_from({"project_concepts": str(path)})
    ConceptSubspace.empty(8).save(path)
    assert settings_from({"project_concepts": str(path)}).projection.file == path
    with pytest.raises(OptionError, match="--project_cap does nothing"):
        settings_from({"project_concepts": str(path), "project_cap": 4})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"project_concepts": "mickey"}, r"no neutral word.*mickey -> a character"),
        ({"project_concepts": "mickey ->"}, "no neutral word"),
        ({"project_concepts": "-> a thing"}, "`names` must hold"),
        ({"project_concepts": "a -> A"}, r"must differ.*--project_concepts"),
        ({"project_concepts": TEXT, "project_energy": "2"}, "`energy` must be"),
        ({"project_concepts": TEXT, "project_cap": "1.5"}, "--project_cap cannot be '1.5'"),
        ({"project_concepts": TEXT, "project_force": "maybe"}, "must be true or false"),
        ({"project_force": True}, "does nothing without --project_concepts"),
        ({"mem_filter_report": "x"}, "does nothing without --mem_filter"),
        ({"mem_filter_recall": "8"}, "does nothing without --mem_filter"),
        ({"mem_filter": "1", "mem_filter_recall": "often"}, "--mem_filter_recall cannot be"),
        ({"mem_filter": "1", "mem_filter_recall": "0"}, "a sample is measured"),
        ({"mem_filter": "95%"}, "--mem_filter cannot be '95%'"),
        ({"mem_filter": "q95"}, "`quantile` must be"),
        ({"mem_filter": "x1"}, "`ratio` must be above 1"),
        ({"mem_filter": "x"}, "--mem_filter cannot be 'x'"),
        ({"mem_filter": "-1"}, "at least 0"),
        ({"mem_filter": "1", "mem_filter_action": "stop"}, "--mem_filter_action is one of"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, message):
    with pytest.raises(OptionError, match=message):
        settings_from(given)


def test_names_spelt_wrongly_are_refused():
    refuse_unknown(dict.fromkeys(NAMES) | {"conv_dim": "4"})
    with pytest.raises(OptionError, match="`project_concept` is not an option"):
        refuse_unknown({"project_concept": TEXT})


def test_concepts_may_stand_in_a_file(tmp_path):
    path = tmp_path / "concepts.txt"
    with pytest.raises(OptionError, match="there is no file"):
        settings_from({"project_concepts": str(path)})
    path.write_text("mickey mouse, mickey -> a character\n\npikachu -> a mouse\n", "utf-8")
    told = settings_from({"project_concepts": str(path), "project_cap": "8"}).projection
    assert [concept.names[0] for concept in told.concepts] == ["mickey mouse", "pikachu"]
    assert (told.concepts[0].neutral, told.cap) == ("a character", 8)


def test_watching_alone_only_records():
    for name in ("warn", "stop"):
        watched = FilterSettings(**{name: True})
        assert settings_from({f"mem_{name}": "true"}).filter == watched
        assert watched.watches
        with_threshold = settings_from({f"mem_{name}": True, "mem_filter": "x1.5"}).filter
        assert with_threshold == FilterSettings(ratio=1.5, **{name: True})
        with pytest.raises(OptionError, match=f"--mem_{name} does nothing with mem_filter off"):
            settings_from({f"mem_{name}": True, "mem_filter": "off"})
    assert settings_from({"mem_warn": True, "mem_filter_report": "a"}).filter.report == Path(
        "a.json"
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [("mem_fliter", "mem_filter"), ("mem-filter", "mem_filter"), ("MemFilter", "mem_filter"),
     ("projct_regions", "project_regions"), ("mem_filter_reprot", "mem_filter_report")],
)  # fmt: skip
def test_a_name_nearly_like_an_option_is_refused_with_the_option(name, meant):
    for prefixes in (PREFIXES, ()):
        with pytest.raises(OptionError, match=f"`{name}` is not an option; type {meant}"):
            refuse_unknown(["conv_dim", name], prefixes)
    refuse_unknown(["project_dir", "network_dim", "max_timestep", "text_encoder_lr"], ())


def test_options_in_a_section_are_refused():
    refuse_hidden({"mem_filter": 1, "train": {"lr": 1}, "parts": [{"a": 1}]}, "to the top")
    for hidden in ({"train": {"mem_filter": 1}}, {"parts": [{"b": {"mem_fliter": 1}}]}):
        section = next(iter(hidden))
        with pytest.raises(OptionError, match=f"in `{section}`, where it is not read. Move it: to"):
            refuse_hidden(hidden, "to the top")


def test_who_asks_for_nothing_is_told_so():
    refuse_nothing({"mem_filter": "off"}, "ours", "--mem_filter x1.5")
    with pytest.raises(OptionError, match=r"ours is asked for nothing.*--mem_filter x1.5"):
        refuse_nothing({"mem_filter": None, "project_force": False}, "ours", "--mem_filter x1.5")


def test_concepts_are_split_at_semicolons():
    assert parse_concepts(TEXT + "; ") == (MOUSE, PIKACHU)


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in NAMES)
