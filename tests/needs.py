"""What tests need that not everyone has: without it they skip for people and fail in CI."""

import importlib
import os
from types import ModuleType
from typing import NoReturn

import pytest

INSTALL = 'pip install --editable ".[all,sscd,tests]"'


def skip_unless_ci(reason: str) -> NoReturn:
    """Skip the test, fixture or module at hand; where `CI` is set, fail it.

    Args:
        reason: What is missing and what to type.
    """
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def need_package(name: str) -> ModuleType:
    """Import a module that only an extra brings, or skip."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        skip_unless_ci(f"needs {error.name}: {INSTALL}")


def need_sscd(variant: str = "distilled") -> None:
    """Skip unless the weights of the encoder are installed, and what runs them."""
    from unmemorize.audit.common.sscd import has_sscd
    from unmemorize.cli.doctor import examine

    if not has_sscd(variant):
        lines = [each["type"] for each in examine()["missing"] if "SSCD" in each["purpose"]]
        skip_unless_ci(f"needs SSCD: {' && '.join(lines)}")
