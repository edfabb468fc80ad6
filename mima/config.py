"""The settings of a run, under the name by which users import them."""

from mima.immunization.config import (
    RECIPES,
    ImmunizeConfig,
    ImmunizeRun,
    LowerConfig,
    UpperConfig,
    load_config,
)

__all__ = [
    "RECIPES",
    "ImmunizeConfig",
    "ImmunizeRun",
    "LowerConfig",
    "UpperConfig",
    "load_config",
]
