"""Why a run cannot fit, and with which settings it would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mima.immunization.config import ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.planning.result import Plan, gib


def refusal_of(
    found: Plan, config: ImmunizeConfig, planned: Callable[[ImmunizeConfig], Plan], *, delta: bool
) -> str | None:
    """Why a run does not fit, and with which settings it would; None where it fits.

    Args:
        found: the run's plan.
        config: its settings.
        planned: plans the same run with other settings.
        delta: whether it writes the changed weights alone.
    """
    if found.fits:
        return None
    needed, free = sum(found.disk.values()), found.free_disk
    if free is not None and needed > free:
        hint = "" if delta else "; delta writes the changed weights alone"
        return f"disk: the run writes up to {gib(needed)}, {gib(free)} are free{hint}"
    assert found.capacity is not None
    problem = f"memory: the run needs {gib(found.peak)}, {found.device} has {gib(found.capacity)}"
    larger = "it takes a smaller model or a larger device"
    # no setting below changes these phases
    for phase in ("preparing", "the result, in float32"):
        alone = sum(found.memory[phase].values())
        if alone > found.capacity:
            return f"{problem}; {phase} alone takes {gib(alone)}: {larger}"
    settings: dict[str, Any] = {}
    best = found
    for name, value in _savers(config):
        try:
            other = planned(with_settings(config, {**settings, name: value}))
        except ValueError:
            # the run's other settings exclude this one
            continue
        if other.peak >= best.peak:
            continue
        settings[name], best = value, other
        if best.fits:
            said = ", ".join(f"{key}: {json.dumps(v)}" for key, v in settings.items())
            return f"{problem}; with {said} it needs {gib(best.peak)}"
    return (
        f"{problem}; with the settings that save memory it still needs {gib(best.peak)}: {larger}"
    )


def _savers(config: ImmunizeConfig) -> Iterable[tuple[str, Any]]:
    """Settings that save memory, those that change a run's result the least first."""
    if not config.gradient_checkpointing:
        yield "gradient_checkpointing", True
    if not config.offload_optimizer:
        yield "offload_optimizer", True
    if config.hypergradient != "first_order" and config.method != "alternating":
        yield "hypergradient", "first_order"
    if config.precision != "bfloat16":
        yield "precision", "bfloat16"
    if config.upper.path_every is not None:
        yield "upper.path_every", None
    levels: dict[str, tuple[UpperConfig | LowerConfig, ...]] = {
        "upper": (config.upper,),
        "lower": config.attackers,
    }
    for level, several in levels.items():
        if any(one.batch_size > 1 for one in several):
            yield f"{level}.batch_size", 1
    if (config.upper.prior_batch_size or 1) > 1:
        yield "upper.prior_batch_size", 1
    for level, several in levels.items():
        if any(one.parameters not in ("cross_attention_kv", "lora", None) for one in several):
            yield f"{level}.parameters", "cross_attention_kv"


def with_settings(config: ImmunizeConfig, settings: Mapping[str, Any]) -> ImmunizeConfig:
    """The configuration with other settings; one of ``lower`` is every attacker's."""
    plain = config.model_dump()
    for name, value in settings.items():
        *levels, last = name.split(".")
        places = [plain]
        for level in levels:
            inner = [place[level] for place in places]
            places = [one for x in inner for one in (x if isinstance(x, (list, tuple)) else [x])]
        for place in places:
            place[last] = value
    return ImmunizeConfig.model_validate(plain)
