"""Trainings of the demo model's LoRA, each done once for all tests that look at it."""

import pytest


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A training folder."""
    from diffusers_runs import make_images

    return make_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="session")
def train(images, tmp_path_factory):
    """Function that runs the small script with some arguments and returns the output folder."""
    from diffusers_runs import run

    done = {}

    def trained(*arguments, protected=True):
        if (key := (arguments, protected)) not in done:
            folder = tmp_path_factory.mktemp("run") / "out"
            given = ["--train_data_dir", str(images), *arguments]
            done[key] = run(folder, given, protected=protected)
        return done[key]

    return trained


@pytest.fixture(scope="session")
def plain(train):
    """What the script learns unprotected."""
    from diffusers_runs import weights_of

    return weights_of(train(protected=False))


@pytest.fixture(scope="session")
def layers(tmp_path_factory):
    """File of subspaces of three dimensions for each layer that reads no text."""
    from demo_subspaces import make_layers

    return make_layers(tmp_path_factory.mktemp("layers"))


@pytest.fixture(scope="session")
def subspace(tmp_path_factory):
    """File of a subspace of five dimensions."""
    from demo_subspaces import WIDTH, make_subspace

    return make_subspace(tmp_path_factory.mktemp("subspace"), WIDTH)
