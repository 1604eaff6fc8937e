"""The bundled models by their names: what they are called, where they lie, what is known."""

from pathlib import Path

import pytest
from unmemorize import demo
from unmemorize.audit.common.measure import silent
from unmemorize.audit.common.subject import Subject
from unmemorize.audit.model.comparison import known_images
from unmemorize.audit.model.config import AuditConfig
from unmemorize.audit.model.inputs import read_inputs
from unmemorize.cli.concept.options import retained_captions

NAMES = tuple(demo.BUNDLED)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stands_for_the_bundled_model_and_a_path_for_a_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    bundled, mine = Subject(name), Subject(f"./{name}")
    assert (bundled.is_demo, bundled.name) == (True, name)
    assert Path(bundled.location) == demo.locate(name)
    assert (mine.is_demo, mine.name, mine.location) == (False, name, f"./{name}")


def test_they_differ_in_their_weights():
    assert NAMES == ("demo", "demo-flow")
    one, two = (Subject(name).fingerprint for name in NAMES)
    assert one != two


def test_captions_controls_and_training_images_are_the_same():
    one, two = (read_inputs(AuditConfig(model=name)) for name in NAMES)
    assert one == two
    assert {*one.groups} == {"verbatim", "template", "learnt", "held_out"}
    assert one.controls == tuple(demo.controls())
    assert retained_captions(NAMES[0], None) == retained_captions(NAMES[1], None)
    images = [known_images(name, one.prompts, silent) for name in NAMES]
    assert images[0] == images[1]
    assert images[0].image(one.prompts.prompts[one.groups.index("verbatim")]) is not None
    with pytest.raises(ValueError, match="No prompts were named"):
        read_inputs(AuditConfig(model="demo-flows"))
