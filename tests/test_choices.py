"""The lists of choices are those of what they choose from."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from mima import choices
from mima.adaptation import METHODS
from mima.erasure import VARIANTS
from mima.evaluation import PRESETS
from mima.immunization.recipes import RECIPES, TASKS
from mima.storage.inputs import is_hub_id


def test_lists_of_choices_match_what_is_chosen():
    assert set(get_args(choices.ErasureMethod)) == {"uce", *VARIANTS}
    assert set(get_args(choices.Task)) == set(TASKS)
    assert set(get_args(choices.Recipe)) == set(RECIPES)
    assert all(
        isinstance(getattr(torch, name), torch.dtype) for name in get_args(choices.Precision)
    )
    assert set(get_args(choices.AdaptationMethod)) == set(METHODS)
    assert set(get_args(choices.Preset)) == set(PRESETS)
    assert all(torch.device(name).type == name for name in choices.DEVICES)


@pytest.mark.parametrize(
    "name", ["a/b", "a", "a/b/c", "a--b/c", "a/b..c", "a/b.git", "-a/b", "a/" + "b" * 97, ""]
)
def test_names_of_the_hub_are_those_that_the_hub_allows(name):
    try:
        validate_repo_id(name)
    except HFValidationError:
        allowed = False
    else:
        allowed = "/" in name
    assert is_hub_id(name) == allowed
