"""Which of the denoiser's parameters a run trains."""

# S_u and S_l = what the defender and the attacks change

from __future__ import annotations

from mima.families import Family
from mima.immunization.config import ImmunizeConfig


def adapted_names(family: Family, parameters: str | None) -> tuple[str, ...]:
    """The weights that an adaptation changes, by the name of the setting."""
    if parameters == "lora":
        return tuple(family.lora_targets())
    return () if parameters is None else tuple(family.parameter_names(parameters))


def trained_names(
    family: Family, config: ImmunizeConfig
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """S_u and S_l: names of the denoiser's parameters that each level of a run trains.

    Raises:
        MimaError: a setting matches no parameter.
    """
    kinds = dict.fromkeys(adapter.parameters for adapter in config.adapters)
    lower = dict.fromkeys(name for kind in kinds for name in adapted_names(family, kind))
    return tuple(family.parameter_names(config.upper.parameters)), tuple(lower)
