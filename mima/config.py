"""The settings of a run, under the name by which users import them."""

from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.from_file import ImmunizeRun, load_config
from mima.immunization.recipes import RECIPES

__all__ = [
    "RECIPES",
    "ImmunizeConfig",
    "ImmunizeRun",
    "LowerConfig",
    "UpperConfig",
    "load_config",
]
