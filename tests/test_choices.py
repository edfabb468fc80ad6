"""The lists of choices are those of what they choose from."""

from __future__ import annotations

from typing import get_args

import torch

from mima import choices
from mima.erasure import VARIANTS
from mima.immunization.config import RECIPES


def test_lists_of_choices_match_what_is_chosen():
    assert set(get_args(choices.ErasureMethod)) == {"uce", *VARIANTS}
    assert set(get_args(choices.Task)) == set(RECIPES)
    assert all(
        isinstance(getattr(torch, name), torch.dtype) for name in get_args(choices.Precision)
    )
