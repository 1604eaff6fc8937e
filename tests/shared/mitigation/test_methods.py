"""The table of methods, and making one by name."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from unmemorize.shared.mitigation import METHODS, make_method
from unmemorize.shared.mitigation.method import Method

LATENTS = {"neighbour": {"latents": torch.zeros(1, 4, 8, 8)}}


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_made_by_name(name):
    method = make_method(name, **LATENTS.get(name, {}))
    assert type(method) is METHODS[name]
    assert isinstance(method, Method)
    assert method.name == name
    assert inspect.getmodule(type(method)).__name__.endswith(f".{name}")
    with pytest.raises(FrozenInstanceError):
        method.name = "other"


def test_settings_arrive():
    assert make_method("attention", alpha=0.5).alpha == 0.5


def test_unknown_names_and_settings_are_listed():
    with pytest.raises(
        ValueError, match=r"no method 'magic'; choose one of reword, ordinary, embedding"
    ):
        make_method("magic")
    with pytest.raises(ValueError, match=r"'attention' has no setting beta, gamma; it has alpha,"):
        make_method("attention", gamma=1.0, beta=1.0)
    with pytest.raises(ValueError, match="'neighbour' needs latents"):
        make_method("neighbour")
    with pytest.raises(ValueError, match="`alpha` must lie in"):
        make_method("attention", alpha=2.0)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_described(name):
    source = inspect.getsource(METHODS[name]).splitlines()
    for field in fields(METHODS[name]):
        (line,) = [i for i, text in enumerate(source) if text.startswith(f"    {field.name}: ")]
        assert source[line + 1].startswith('    """'), field.name


def test_only_torch_is_needed(loaded_after):
    loaded = loaded_after("import unmemorize.shared.mitigation")
    assert "unmemorize.shared.mitigation.attention" in loaded
    assert not {"diffusers", "transformers", "scipy"} & loaded
