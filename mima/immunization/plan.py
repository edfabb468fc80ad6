"""What a run will train and need, said before any weight is loaded."""

# N = concepts, K = lower-level steps, S_u and S_l = what the defender and the attacks change

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mima.bilevel import lower
from mima.bilevel.hypergradient import accumulate
from mima.bilevel.outer import upper_gradient
from mima.concepts import Concept
from mima.errors import MimaError
from mima.families import Family, ModelSource, Params, family_of, load_pipeline
from mima.families.base import PIXELS_AT_ONCE
from mima.families.frozen import Upcast, hold_frozen
from mima.families.skeleton import open_skeleton
from mima.immunization.config import ImmunizeConfig, LowerConfig
from mima.immunization.encoding import ConceptData
from mima.immunization.levels import Problem, recomputed_blocks, trained_names
from mima.immunization.meta_memory import counted
from mima.immunization.objectives import READS_START
from mima.immunization.offload import idle_modules
from mima.merging import MergeLayer
from mima.storage.inputs import expanded
from mima.training.batches import CHUNK, Batch, Encoded, predictions

FLOAT32 = 4
"""Bytes."""
FOLLOWED = 2
"""Lower-level steps that are followed on the meta device."""
LARGE_MODEL = 2**30
"""Bytes of a model's weights from which on a run is planned before it starts."""
DEVICES = {
    **{"l4": 22.5, "rtx3090": 23.6, "rtx4090": 23.6, "a10": 22.5, "rtx5090": 31.4},
    **{"l40s": 44.5, "a6000": 47.5, "a100-40": 39.4, "a100": 79.2, "h100": 79.1, "h200": 139.8},
}
"""GiB that a program finds on a GPU of a name."""
GPU_CONTEXT = int(0.6 * 2**30)
"""Bytes that a CUDA context and the libraries' workspaces take."""
BACKWARD, DOUBLE_BACKWARD = 2, 6
"""Of a forward's time: a backward, and a backward through a backward."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will train and need.

    Attributes:
        device: where it is to run, as it was named.
        capacity: bytes that the run may have there; None where that is not known.
        trained: by group, the names of the parameters.
        numels: sizes of these parameters, by name.
        memory: by phase of the run, by part, bytes at the most.
        disk: by part, bytes at the most.
        free_disk: bytes, where the run is to write something.
        steps: outer steps, those of all concepts where each is immunized alone.
        pictures: of one outer step, how many pictures go forward, backward, and backward through a
            backward.
        drawn: pictures that go forward, without a graph, to draw class pictures.
        seconds: of one picture's forward, where it was measured.
        refusal: why the run cannot fit, and with which settings it would; None where it fits.
    """

    device: str
    capacity: int | None
    trained: Mapping[str, Sequence[str]]
    numels: Mapping[str, int]
    memory: Mapping[str, Mapping[str, int]]
    disk: Mapping[str, int]
    free_disk: int | None = None
    steps: int
    pictures: Mapping[str, float]
    drawn: int
    seconds: float | None = None
    refusal: str | None = None

    @property
    def peak(self) -> int:
        """Bytes of memory at the most."""
        return max(sum(parts.values()) for parts in self.memory.values())

    @property
    def forwards(self) -> float:
        """What one outer step takes, in forwards of one picture."""
        p = self.pictures
        return p["forward"] + BACKWARD * p["backward"] + DOUBLE_BACKWARD * p["backward of backward"]

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice, as far as that is known."""
        disk = self.free_disk is None or sum(self.disk.values()) <= self.free_disk
        return disk and (self.capacity is None or self.peak <= self.capacity)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterable[str]:
        yield "trains:"
        for group, names in self.trained.items():
            count = sum(self.numels[name] for name in names)
            yield f"  {group}: {len(names)} tensors, {count / 1e6:.1f} M parameters"
            for kind, number in Counter(map(_kind, names)).most_common():
                yield f"    {number} × {kind}"
        yield f"memory on {self.device}, {_gib(self.peak)} at the peak:"
        for phase, parts in self.memory.items():
            yield f"  {phase}: {_gib(sum(parts.values()))}"
            yield from (f"    {part}: {_gib(size)}" for part, size in parts.items() if size)
        yield f"disk: {_gib(sum(self.disk.values()))}"
        yield from (f"  {part}: {_gib(size)}" for part, size in self.disk.items() if size)
        told = ", ".join(f"{n:g} {way}" for way, n in self.pictures.items() if n)
        yield (
            f"time: {self.steps} outer steps of {self.forwards:g} forwards of one picture each "
            f"({told})"
        )
        if self.drawn:
            yield f"  {self.drawn} forwards before that, where class pictures are to be drawn"
        if self.seconds is not None:
            total = self.seconds * (self.steps * self.forwards + self.drawn)
            hours = f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.1f} minutes"
            yield f"  one took {self.seconds:.3g} s here: about {hours} in all"


def plan(
    model: Any,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    *,
    device: str | torch.device | None = None,
    output: Path | None = None,
    delta: bool = False,
    measure: bool = False,
) -> Plan:
    """Say what a run will train and need, from configurations and the headers of weights alone.

    One outer step is followed on the meta device, of two concepts and two lower-level steps; what
    grows with their number is added. Not counted: what an allocator loses, and the text encoder's
    activations where new words are trained.

    Args:
        model: a ``ModelSource``, or a pipeline in memory, which is left as it is.
        concepts: N concepts.
        config: the settings.
        device: of the run: ``cpu``, ``cuda``, a key of ``DEVICES`` (``h100``), or a size (``24
            GiB``) of a GPU's memory.
        output: where the run writes; None writes nothing.
        delta: whether it writes the changed weights alone.
        measure: time one forward where the device is this machine's; a model on disk is opened
            for it.

    Raises:
        MimaError: the model, a setting or the device is not to be had, see ``open_skeleton``.

    Example:
        >>> print(plan(ModelSource("embedded"), concepts, ImmunizeConfig(), device="h100"))
    """
    if device is None and hasattr(model, "components"):
        device = family_of(model).device
    options: dict[str, Any] = {"device": device, "output": output, "delta": delta}
    found = _plan(model, concepts, config, **options)
    if measure and found.device.split(":")[0] in ("cpu", "cuda"):
        found = replace(found, seconds=_seconds(model, config, found.device))
    return replace(found, refusal=_refusal(found, model, concepts, config, options))


def _plan(
    model: Any,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    *,
    device: str | torch.device | None,
    output: Path | None,
    delta: bool,
) -> Plan:
    label, capacity = device_memory(device)
    on_cpu = label.startswith("cpu")
    # weights of the pipeline in memory cannot leave it
    opened = not hasattr(model, "components")
    pipeline = open_skeleton(model)
    family = family_of(pipeline, resolution=config.resolution)
    upper_names, lower_names = trained_names(family, config)
    both = [name for name in upper_names if name in lower_names]
    trained = {
        "both levels": both,
        "the defender alone": [name for name in upper_names if name not in lower_names],
        "simulated attacks alone": [name for name in lower_names if name not in upper_names],
    }
    names = dict.fromkeys((*upper_names, *lower_names))
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module) and (opened or module is family.denoiser):
            hold_frozen(module, names if module is family.denoiser else ())
    numels = {n: p.numel() for n, p in family.denoiser.named_parameters() if n in names}
    encoded = _encoded(family)
    pictures = sum(
        len(c.images) + (len(c.class_images) or config.num_class_images) * _has_prior(config)
        for c in concepts
    )
    encodings = _num_bytes(encoded.latents[:1]) * pictures + sum(
        _num_bytes(v) for v in encoded.prompts.values()
    ) * len({image.prompt for concept in concepts for image in concept.images})

    idle = idle_modules(pipeline, reads_text=_attacker(config).train_token)
    waiting = _weights_of(m for m in _others(pipeline, family) if not (opened and m in idle))
    denoiser = {
        ("trained weights, " if name in names else "frozen weights, ") + dtype: 0
        for name, p in family.denoiser.named_parameters()
        for dtype in [_dtype_of(p)]
    }
    for name, p in family.denoiser.named_parameters():
        part = ("trained weights, " if name in names else "frozen weights, ") + _dtype_of(p)
        denoiser[part] += _num_bytes(p)
    ground = {
        "Python and its libraries" if on_cpu else "CUDA's context": (
            _resident() if on_cpu else GPU_CONTEXT
        ),
        "encoded pictures and prompts": encodings if on_cpu else 0,
    }
    mine = sum(numels[name] for name in upper_names) * FLOAT32
    memory = {
        "preparing": {
            **ground,
            **denoiser,
            "text encoders and VAE": _weights_of(_others(pipeline, family)),
            "activations": _preparing(
                family,
                encoded,
                most=max(max(len(c.images), len(c.class_images)) for c in concepts),
                drawn=min(CHUNK, config.num_class_images) if _lacking(concepts, config) else 0,
            ),
        }
    }
    if config.method != "none":
        offloaded = config.offload_optimizer and not on_cpu
        memory["outer steps"] = {
            **ground,
            **denoiser,
            "encoders that stay": waiting,
            "weights as they were before": mine if _reads_start(config) else 0,
            "immunized models": (
                len(concepts) * sum(numels.values()) * FLOAT32
                if config.method == "compose" and on_cpu
                else 0
            ),
            "attackers that live on": (
                len(concepts) * _attacked(family, config, numels) * (3 if _adam(config) else 1)
                if _attacker(config).age
                else 0
            ),
            "AdamW's moments": 0 if offloaded else 2 * mine,
            **_step(family, encoded, concepts, config, numels),
        }
    whole = sum(
        p.numel() * FLOAT32
        for module in (family.denoiser, *(_others(pipeline, family) if opened else ()))
        for p in module.parameters()
    )
    memory["the result, in float32"] = {**ground, "weights": whole}
    changed = sum(numels.values()) * FLOAT32
    disk: dict[str, int] = {}
    if output is not None:
        disk = {
            "checkpoints, two and one that is being written": 3 * (changed + 2 * mine),
            "encoded pictures and prompts": encodings,
            "encoders, while the run lasts": (
                _weights_of(idle) if on_cpu and opened and config.method != "none" else 0
            ),
            "the result": changed if delta else whole,
        }
    return Plan(
        device=label,
        capacity=capacity,
        trained={group: found for group, found in trained.items() if found},
        numels=numels,
        memory=memory,
        disk=disk,
        free_disk=None if output is None else _free_disk(output),
        steps=config.steps * (len(concepts) if config.method == "compose" else 1),
        pictures=pictures_of_a_step(config, len(concepts)),
        drawn=_drawn(pipeline, concepts, config),
    )


def _refusal(
    found: Plan,
    model: Any,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    options: Mapping[str, Any],
) -> str | None:
    """Why a run does not fit, and with which settings it would."""
    if found.fits:
        return None
    needed, free = sum(found.disk.values()), found.free_disk
    if free is not None and needed > free:
        hint = "" if options["delta"] else "; delta writes the changed weights alone"
        return f"disk: the run writes up to {_gib(needed)}, {_gib(free)} are free{hint}"
    assert found.capacity is not None
    problem = f"memory: the run needs {_gib(found.peak)}, {found.device} has {_gib(found.capacity)}"
    larger = "it takes a smaller model or a larger device"
    # no setting below changes these phases
    for phase in ("preparing", "the result, in float32"):
        alone = sum(found.memory[phase].values())
        if alone > found.capacity:
            return f"{problem}; {phase} alone takes {_gib(alone)}: {larger}"
    settings: dict[str, Any] = {}
    best = found
    for name, value in _savers(config):
        try:
            other = _plan(model, concepts, _with(config, {**settings, name: value}), **options)
        except ValueError:
            # the run's other settings exclude this one
            continue
        if other.peak >= best.peak:
            continue
        settings[name], best = value, other
        if best.fits:
            said = ", ".join(f"{key}: {str(v).lower()}" for key, v in settings.items())
            return f"{problem}; with {said} it needs {_gib(best.peak)}"
    return (
        f"{problem}; with the settings that save memory it still needs {_gib(best.peak)}: {larger}"
    )


def plannable(config: ImmunizeConfig) -> bool:
    """Whether a run has one kind of attacker and no benign adaptations: others are not planned."""
    return isinstance(config.lower, LowerConfig) and not config.reads_benign


def _attacker(config: ImmunizeConfig) -> LowerConfig:
    if not isinstance(config.lower, LowerConfig) or config.reads_benign:
        raise MimaError(
            "dry run: a run with several kinds of attackers (lower: [...]) or with benign "
            "adaptations (upper.benign, lower.benign_start) is not planned"
        )
    return config.lower


def large(model: Any) -> bool:
    """Whether a model is of a size at which planning its run is worth the seconds."""
    if isinstance(model, ModelSource):
        path = expanded(str(model.model))
        files = [path] if path.is_file() else [*path.glob("*/*.safetensors"), *path.glob("*/*.bin")]
        return sum(file.stat().st_size for file in files) > LARGE_MODEL
    modules = (m for m in model.components.values() if isinstance(m, torch.nn.Module))
    return _weights_of(modules) > LARGE_MODEL


def _seconds(model: Any, config: ImmunizeConfig, device: str) -> float:
    """Of one picture's forward on a device of this machine, the second of two."""
    if isinstance(model, ModelSource):
        model = load_pipeline(model, dtype=None, device=device)
        for module in model.components.values():
            if isinstance(module, torch.nn.Module):
                hold_frozen(module)
    family = family_of(model, resolution=config.resolution)
    side = family.resolution // family.pipeline.vae_scale_factor
    channels = family.pipeline.vae.config.latent_channels
    noisy = torch.zeros(1, channels, side, side, device=family.device, dtype=family.dtype)
    timesteps = torch.full((1,), 500.0, device=family.device)
    conditioning = family.encode_prompts(["a photo"])
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            # reading a value waits for the device
            family.predict(noisy, timesteps, conditioning).sum().item()
    return time.perf_counter() - started


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
    for level, other in (("upper", config.upper), ("lower", _attacker(config))):
        if other.batch_size > 1:
            yield f"{level}.batch_size", 1
    for level, other in (("upper", config.upper), ("lower", _attacker(config))):
        if other.parameters not in ("cross_attention_kv", "lora", None):
            yield f"{level}.parameters", "cross_attention_kv"


def _with(config: ImmunizeConfig, settings: Mapping[str, Any]) -> ImmunizeConfig:
    plain = config.model_dump()
    for name, value in settings.items():
        *levels, last = name.split(".")
        place = plain
        for level in levels:
            place = place[level]
        place[last] = value
    return ImmunizeConfig.model_validate(plain)


def device_memory(device: str | torch.device | None) -> tuple[str, int | None]:
    """A device's name, and the bytes that a run may have there; None where that is not known.

    Raises:
        MimaError: no such device is known.
    """
    name = "cuda" if device is None and torch.cuda.is_available() else str(device or "cpu").lower()
    if name in DEVICES:
        return name, int(DEVICES[name] * 2**30)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?) ?(g|gb|gib|m|mb|mib)", name):
        unit = {"g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}
        return f"a GPU of {name}", int(float(size[1]) * unit[size[2]])
    if name.split(":")[0] == "cuda":
        if not torch.cuda.is_available():
            raise MimaError(
                f"device {name}: this machine has no usable CUDA device; a plan for another "
                f"machine names one of {', '.join(DEVICES)}, or a size such as 24gib"
            )
        free, _ = torch.cuda.mem_get_info(name)
        return name, free + torch.cuda.memory_reserved(name)
    if name != "cpu":
        raise MimaError(
            f"device {name!r} is unknown; a plan takes cpu, cuda, {', '.join(DEVICES)}, or a size "
            "such as 24gib"
        )
    try:
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        available = int(told["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return name, None
    return name, available + _resident()


def _resident() -> int:
    """Bytes of this process in memory."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def pictures_of_a_step(config: ImmunizeConfig, count: int) -> dict[str, float]:
    """How many pictures go forward, backward, and backward through a backward in one outer step.

    Of ``alternating``, the mean of its two kinds of step.

    Args:
        config: the settings.
        count: N.
    """
    low, up = _attacker(config), config.upper
    K = low.steps
    below = low.batch_size * (2 if low.prior_weight else 1)
    prior = (up.prior_batch_size or up.batch_size) if up.prior_weight else 0
    apart = up.ascent_ratio is not None
    above = up.batch_size + (0 if apart else prior)
    states = 1 if up.path_every is None else len([*range(up.path_every, K, up.path_every), K])
    done = min(config.concepts_per_step or count, count)
    if config.method == "none":
        return {"forward": 0, "backward": 0, "backward of backward": 0}
    if config.method == "alternating":
        both = count * (below + above) / 2
        return {"forward": both, "backward": both, "backward of backward": 0}
    if config.method == "compose":
        done = 1
    # the first pass, the upper level, and what retains
    steps, upper, kept = K * below, states * above, prior * apart
    forward = backward = float(steps + upper + kept)
    if up.objective in READS_START:
        forward += upper
    if apart and up.retain == "distill":
        forward += kept
    twice = 0.0
    if config.hypergradient == "exact":
        again = (K - 1 + K) * below
        # of each step's gradient: backward with a graph
        forward, backward, twice = forward + again, backward + again, float(K * below)
    elif config.hypergradient == "finite_difference":
        # Adam's rule reads the gradient of the last step as well
        again = (K - 1 + 2 * K + (low.optimizer == "adam")) * below
        forward, backward = forward + again, backward + again
    if config.gradient_checkpointing:
        forward += backward
    return {
        "forward": done * forward,
        "backward": done * backward,
        "backward of backward": done * twice,
    }


class _OnMeta(Problem):
    """A problem without autocast, which does not know the meta device; ``counted`` imitates it."""

    def predictions(
        self, batches: Sequence[Batch], params: Params
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        frozen = {} if self.config.precision == "float32" else self._frozen
        return predictions(self.family, batches, {**frozen, **params})


def _encoded(family: Family) -> Encoded:
    """Two pictures of one prompt, on the meta device."""
    side = family.resolution // family.pipeline.vae_scale_factor
    channels = family.pipeline.vae.config.latent_channels
    # text encoders look whether anything is masked, which the meta device cannot say
    with counted(()):
        prompts = family.encode_prompts(["a photo"])
    return Encoded(
        torch.empty(2, channels, side, side, device="meta"),
        prompts,
        torch.zeros(2, dtype=torch.long),
    )


def _step(
    family: Family,
    encoded: Encoded,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    numels: Mapping[str, int],
) -> dict[str, int]:
    """Bytes of an outer step's own tensors, at their peak."""
    K, every = _attacker(config).steps, config.upper.path_every
    states = 1 if every is None else len([*range(every, K, every), K])
    few_steps = min(K, FOLLOWED)
    # at every step that is followed, or at the last alone
    few_states = few_steps if states >= few_steps else 1
    few = {"steps": few_steps}, {"path_every": 1 if few_states > 1 else None}
    reduced = config.model_copy(
        update={
            "lower": _attacker(config).model_copy(update={**few[0], "age": None}),
            "upper": config.upper.model_copy(update=few[1]),
            "concepts_per_step": None,
        }
    )
    count = min(len(concepts), max(2, config.upper.concepts_per_forward))
    if config.method == "compose":
        count = 1
    names = [concept.name for concept in concepts[:count]]
    data = [ConceptData(name, encoded, encoded) for name in names]
    merges = config.method in ("mima", "alternating")
    merge = MergeLayer(torch.full((count,), 1 / count, device="meta")) if merges else None
    problem = _OnMeta(family, data, reduced, merge)
    theta = problem.theta()
    held = [
        *family.denoiser.parameters(),
        *family.denoiser.buffers(),
        *(encoded.latents, *encoded.prompts.values(), *problem._start.values()),
        # bfloat16 copies of frozen weights, which ``_frozen`` of a float32 file makes
        *(copies := problem._frozen if config.precision != "float32" else {}).values(),
    ]
    with ExitStack() as stack:
        stack.enter_context(recomputed_blocks(family.denoiser, config.gradient_checkpointing))
        shapes = [value.shape for value in theta.values()]
        half = config.precision == "bfloat16"
        live = stack.enter_context(counted(held, shapes, bfloat16=half))
        _follow(problem, theta)
    frozen = {n: p for n, p in family.denoiser.named_parameters() if n in copies}
    made = sum(
        0 if isinstance(p, Upcast) and p.stored.dtype == torch.bfloat16 else _num_bytes(copies[n])
        for n, p in frozen.items()
    )
    attacked = _attacked(family, config, numels)
    kept = 0
    if config.hypergradient != "first_order" and config.method != "alternating":
        moments, gradient = (2, config.hypergradient != "exact") if _adam(config) else (0, 0)
        kept = (K - few_steps) * attacked * (1 + moments + gradient)
    merged = sum(numels[name] for name in problem.lower_names) * FLOAT32
    per_state = merged * (1 if config.hypergradient == "first_order" else 2)
    return {
        "casts of frozen weights": live.largest_cast + made,
        "attacks, their gradients and merge": live.parts.get("weights", 0),
        "further states of the path": kept + (states - few_states) * per_state,
        "activations": live.parts.get("activations", 0),
    }


def _attacked(family: Family, config: ImmunizeConfig, numels: Mapping[str, int]) -> int:
    """Bytes of what an attack trains."""
    _, names = trained_names(family, config)
    if _attacker(config).parameters != "lora":
        return sum(numels[name] for name in names) * FLOAT32
    shapes = (family.denoiser.get_parameter(name).shape for name in names)
    rank = _attacker(config).rank
    most = max(rank) if isinstance(rank, tuple) else rank
    return sum(FLOAT32 * most * (o + d) for o, d in shapes)


def _adam(config: ImmunizeConfig) -> bool:
    return _attacker(config).optimizer == "adam"


def _follow(problem: Problem, theta: Params) -> None:
    """One outer step, up to the gradient that the optimizer reads."""
    if problem.config.method == "alternating":
        total: dict[str, torch.Tensor] = {}
        for task in problem.lower_levels(0):
            gradient = lower.gradient(task, lower.start(task, theta), theta, 0)
            accumulate(total, {name: g / 2 for name, g in gradient.items()})
        del total
        upper_gradient(theta, problem.upper_levels(0))
        return
    outer = problem.hypergradient(theta, problem.lower_levels(0), problem.upper_path(0))
    retain = problem.retaining_gradient(theta, 0)
    # clipped or balanced, while both are there
    _ = {name: value * 1.0 for name, value in (retain or outer).gradient.items()}


def _preparing(family: Family, encoded: Encoded, *, most: int, drawn: int) -> int:
    """Bytes of activations while pictures are encoded and class pictures are drawn.

    Args:
        family: on the meta device.
        encoded: a prompt as the denoiser reads it.
        most: pictures of a concept.
        drawn: class pictures that are drawn at once.
    """
    modules = (family.denoiser, family.pipeline.vae)
    held = [x for m in modules for x in (*m.parameters(), *m.buffers())]
    side = family.resolution
    with torch.no_grad(), counted(held) as live:
        rows = min(most, CHUNK, max(1, PIXELS_AT_ONCE // side**2))
        family.encode_images(torch.empty(rows, 3, side, side, device="meta"))
        if drawn:
            # with guidance, twice as many
            batch = 2 * drawn
            noisy = encoded.latents[:1].expand(batch, -1, -1, -1).clone()
            text = {n: v.expand(batch, *v.shape[1:]).clone() for n, v in encoded.prompts.items()}
            family.predict(noisy, torch.zeros(batch, device="meta"), text)
    return live.peak + live.largest_cast


def _others(pipeline: Any, family: Family) -> list[torch.nn.Module]:
    return [
        module
        for module in pipeline.components.values()
        if isinstance(module, torch.nn.Module) and module is not family.denoiser
    ]


def _weights_of(modules: Iterable[torch.nn.Module]) -> int:
    return sum(_num_bytes(p) for module in modules for p in module.parameters())


def _num_bytes(x: torch.Tensor) -> int:
    stored = x.stored if isinstance(x, Upcast) else x
    return stored.numel() * stored.element_size()


def _dtype_of(x: torch.Tensor) -> str:
    return str((x.stored if isinstance(x, Upcast) else x).dtype).removeprefix("torch.")


def _has_prior(config: ImmunizeConfig) -> bool:
    return bool(config.upper.prior_weight or _attacker(config).prior_weight)


def _reads_start(config: ImmunizeConfig) -> bool:
    return config.upper.objective in READS_START or config.upper.retain == "distill"


def _lacking(concepts: Sequence[Concept], config: ImmunizeConfig) -> int:
    """Concepts whose class pictures are to be drawn."""
    return sum(not concept.class_images for concept in concepts) if _has_prior(config) else 0


def _drawn(pipeline: Any, concepts: Sequence[Concept], config: ImmunizeConfig) -> int:
    """Forwards of one picture that draw the class pictures, with guidance."""
    steps = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    return _lacking(concepts, config) * config.num_class_images * int(steps) * 2


def _free_disk(output: Path) -> int | None:
    folder = output.expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _kind(name: str) -> str:
    """A parameter's name without its place."""
    return re.sub(r"^.*\.(?=\w+\.[^.]*[a-z_][^.]*(?:\.\d+)?\.(?:weight|bias)$)", "", name)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**24 else f"{math.ceil(size / 2**20)} MiB"
