"""What a run will train and need, said before any weight is loaded."""

# N = concepts, K = lower-level steps, S_u and S_l = what the defender and the attacks change

from __future__ import annotations

import inspect
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from mima.families import Conditioning, Family, ModelSource, Params, family_of, load_pipeline
from mima.families.base import PIXELS_AT_ONCE
from mima.families.frozen import Upcast, hold_frozen
from mima.families.pipelines import Pipeline
from mima.families.skeleton import open_skeleton
from mima.immunization.attackers import Alive, Attacker
from mima.immunization.config import BenignConfig, ImmunizeConfig, LowerConfig, UpperConfig
from mima.immunization.encoding import ConceptData, caption_kinds
from mima.immunization.levels import NOBODY, Problem, recomputed_blocks, trained_names
from mima.immunization.meta_memory import counted
from mima.immunization.objectives import READS_START
from mima.immunization.offload import idle_modules
from mima.immunization.trained_words import TrainedWord
from mima.merging import MergeLayer
from mima.storage.inputs import expanded
from mima.training.batches import CHUNK, Batch, Encoded, predictions

FLOAT32 = 4
"""Bytes."""
FOLLOWED = 2
"""Lower-level steps that are followed on the meta device."""
KINDS = 12
"""Kinds of tensors that are told by name."""
LARGE_MODEL = 2**30
"""Bytes of a model's weights from which on a run is planned before it starts."""
DEVICES = {
    **{"l4": 22.5, "rtx3090": 23.6, "rtx4090": 23.6, "a10": 22.5, "rtx5090": 31.4},
    **{"l40s": 44.5, "a6000": 47.5, "a100-40": 39.4, "a100": 79.2, "h100": 79.1, "h200": 139.8},
}
"""GiB that a program finds on a GPU of a name."""
GPU_CONTEXT = int(0.6 * 2**30)
"""Bytes that a CUDA context and the libraries' workspaces take."""
MOMENTS = {"sgd": 0, "momentum": 1, "adam": 2}
"""Tensors that an attacker's update rule keeps for each that the attacker trains."""
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
            kinds = Counter(map(_kind, names)).most_common()
            yield from (f"    {number} × {kind}" for kind, number in kinds[:KINDS])
            if len(kinds) > KINDS:
                yield f"    {len(kinds) - KINDS} further kinds of tensors"
        yield f"memory on {self.device}, {_gib(self.peak)} at the peak:"
        for phase, parts in self.memory.items():
            yield f"  {phase}: {_gib(sum(parts.values()))}"
            yield from (f"    {part}: {_gib(size)}" for part, size in parts.items() if size)
        yield f"disk: {_gib(sum(self.disk.values()))}"
        yield from (f"  {part}: {_gib(size)}" for part, size in self.disk.items() if size)
        told = ", ".join(f"{round(n, 1):g} {way}" for way, n in self.pictures.items() if n)
        each = f"{round(self.forwards, 1):g} forwards of one picture each"
        yield f"time: {self.steps} outer steps of {each} ({told})"
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
    benign: Sequence[Concept] = (),
    device: str | torch.device | None = None,
    output: Path | None = None,
    delta: bool = False,
    measure: bool = False,
) -> Plan:
    """Say what a run will train and need, from configurations and the headers of weights alone.

    One outer step is followed on the meta device, of two concepts (or one of each kind of attacker)
    and two lower-level steps; what grows with their number is added. Not counted: what an allocator
    loses, and the text encoder's activations where new words are trained.

    Args:
        model: a ``ModelSource``, or a pipeline in memory, which is left as it is.
        concepts: N concepts.
        config: the settings.
        benign: the concepts that must stay learnable, where the settings read some.
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
    options: dict[str, Any] = {
        "benign": benign,
        "device": device,
        "output": output,
        "delta": delta,
    }
    found = _plan(model, concepts, config, **options)
    if measure and found.device.split(":")[0] in ("cpu", "cuda"):
        found = replace(found, seconds=_seconds(model, config, found.device))
    return replace(found, refusal=_refusal(found, model, concepts, config, options))


def _plan(
    model: Any,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    *,
    benign: Sequence[Concept],
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
    encodings = _encodings(encoded, concepts, benign, config)

    # the published update draws captions for each merge
    reads_text = config.train_tokens or config.method == "alternating"
    idle = idle_modules(pipeline, reads_text=reads_text)
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
    done = _concepts_of_a_step(config, len(concepts))
    living = done * max(
        _attacked(family, attacker, numels) * (1 + MOMENTS[attacker.optimizer])
        if attacker.age
        else 0
        for attacker in config.attackers
    )
    memory = {
        "preparing": {
            **ground,
            **denoiser,
            "text encoders and VAE": _weights_of(_others(pipeline, family)),
            "activations": _preparing(
                family,
                encoded,
                most=max(max(len(c.images), len(c.class_images)) for c in (*concepts, *benign)),
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
            # those that were alive before the step, and where they are after it
            "attackers that live on": 2 * living,
            "what benign adaptations predicted": _matched(encoded, config, len(benign)),
            "AdamW's moments": 0 if offloaded else 2 * mine,
            **_step(family, encoded, concepts, config, numels, len(benign)),
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
            "checkpoints, two and one that is being written": (
                3 * (changed + 2 * mine + living + _served(config, lower_names, numels))
            ),
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
        pictures=pictures_of_a_step(config, len(concepts), len(benign)),
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
            said = ", ".join(f"{key}: {json.dumps(v)}" for key, v in settings.items())
            return f"{problem}; with {said} it needs {_gib(best.peak)}"
    return (
        f"{problem}; with the settings that save memory it still needs {_gib(best.peak)}: {larger}"
    )


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
    noisy = torch.zeros(
        1, family._latent_channels, side, side, device=family.device, dtype=family.dtype
    )
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


def _with(config: ImmunizeConfig, settings: Mapping[str, Any]) -> ImmunizeConfig:
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


Work = dict[str, float]
"""Pictures that go through the network, by the way that they go."""
FORWARD, THERE_AND_BACK = ("forward",), ("forward", "backward")


def _work(count: float, ways: Sequence[str], twice: float = 0.0) -> Work:
    told = {way: count * (way in ways) for way in THERE_AND_BACK}
    return {**told, "backward of backward": twice}


def _total(*parts: tuple[float, Work]) -> Work:
    """The sum of so many times each."""
    return {way: sum(times * part[way] for times, part in parts) for way in _work(0, ())}


def pictures_of_a_step(config: ImmunizeConfig, count: int, benign: int = 0) -> Work:
    """How many pictures go forward, backward, and backward through a backward in one outer step.

    The mean over the run's steps and over what attackers draw: of steps that simulate an attack and
    those that it serves again, of ``alternating``'s two kinds of step, of kinds of attackers, of
    steps with and without benign adaptations.

    Args:
        config: the settings.
        count: N.
        benign: concepts that must stay learnable.
    """
    up, attackers = config.upper, config.attackers
    prior = (up.prior_batch_size or up.batch_size) if up.prior_weight else 0
    apart = up.ascent_ratio is not None
    above = up.batch_size * (2 if up.objective == "pair" else 1) + (0 if apart else prior)
    if config.method == "none":
        return _work(0, ())
    if config.method == "alternating":
        below = attackers[0].batch_size * (2 if attackers[0].prior_weight else 1)
        found = _work(count * (below + above) / 2, THERE_AND_BACK)
    else:
        shares = sum(attacker.share for attacker in attackers)
        attack = _total(*((a.share / shares, _attack(a, config)) for a in attackers))
        upper = len(attackers[0].states(up.path_every)) * above
        again = upper * (up.objective in READS_START) + prior * apart * (up.retain == "distill")
        done = _concepts_of_a_step(config, count)
        found = _total(
            (done / config.attack_every, attack),
            (done, _work(upper + prior * apart, THERE_AND_BACK)),
            (done, _work(again, FORWARD)),
            (1, _benign_work(config, up.benign, benign) if up.benign else _work(0, ())),
        )
    if config.gradient_checkpointing:
        found["forward"] += found["backward"]
    return found


def _concepts_of_a_step(config: ImmunizeConfig, count: int) -> int:
    return 1 if config.method == "compose" else min(config.concepts_per_step or count, count)


def _adaptation(low: LowerConfig, mode: str) -> Work:
    """K steps, and the second pass that differentiates through them."""
    K, below = low.steps, low.batch_size * (2 if low.prior_weight else 1)
    if mode == "exact":
        # of each step's gradient: backward with a graph
        return _work((3 * K - 1) * below, THERE_AND_BACK, K * below)
    if mode == "finite_difference":
        # Adam's rule reads the gradient of the last step as well
        return _work((4 * K - 1 + (low.optimizer == "adam")) * below, THERE_AND_BACK)
    return _work(K * below, THERE_AND_BACK)


def _attack(low: LowerConfig, config: ImmunizeConfig) -> Work:
    """One attack in one outer step, with what it begins with on a benign concept."""
    attack = _adaptation(low, config.hypergradient)
    if low.benign_start is None:
        return attack
    begun = sum(low.benign_start) / 2 * low.batch_size / _outer_steps(low)
    # the second pass over the concepts makes an attack anew
    passes = 2 if config.method == "mima" and config.hypergradient != "first_order" else 1
    return _total((1, attack), (passes, _work(begun, THERE_AND_BACK)))


def _outer_steps(low: LowerConfig) -> float:
    """How many outer steps an attacker lives through, in the mean."""
    if low.age is None:
        return 1.0
    youngest, oldest = low.age
    # each age as often as a log-uniform draw gives it
    lives = (
        math.ceil(age / low.steps) * math.log((age + 1) / age)
        for age in range(youngest, oldest + 1)
    )
    return sum(lives) / math.log((oldest + 1) / youngest)


def _benign_work(config: ImmunizeConfig, benign: BenignConfig, count: int) -> Work:
    """Benign adaptations of one outer step, in the mean."""
    low = benign.lower or config.attackers[0].as_benign
    times = math.ceil(config.steps / benign.every) * min(benign.concepts_per_step, count)
    held_out = len(low.states(benign.path_every)) * config.upper.batch_size
    parts = [
        (times / config.steps, _adaptation(low, config.hypergradient)),
        (times / config.steps, _work(held_out, THERE_AND_BACK)),
    ]
    if benign.target == "match":
        # the model before immunization takes each path once
        paths = min(times, benign.paths * count)
        parts += [
            (paths / config.steps, _adaptation(low, "first_order")),
            (paths / config.steps, _work(held_out, FORWARD)),
        ]
    return _total(*parts)


class _OnMeta(Problem):
    """A problem without autocast, which does not know the meta device; ``counted`` imitates it."""

    def predictions(
        self, batches: Sequence[Batch], params: Params
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        frozen = {} if self.config.precision == "float32" else self._frozen
        return predictions(self.family, batches, {**frozen, **params})

    def attacker(self, n: int, step: int, alive: Mapping[int, Alive] = NOBODY) -> Attacker:
        """One of each kind in turn, where a run draws them."""
        kinds = self.config.attackers
        return Attacker(kinds[n % len(kinds)], self.config.seed, n, step)


class _WordOnMeta(TrainedWord):
    """A new word whose embedding reaches the denoiser's text, past the text encoders."""

    def read(self, family: Family, rows: Sequence[int], embedding: torch.Tensor) -> Conditioning:
        text = family.encode_prompts([self.prompt])["encoder_hidden_states"]
        return {"encoder_hidden_states": text.expand(len(rows), -1, -1) + embedding.sum()}


def _encoded(family: Family) -> Encoded:
    """Two pictures of one prompt, on the meta device."""
    side = family.resolution // family.pipeline.vae_scale_factor
    # text encoders look whether anything is masked, which the meta device cannot say
    with counted(()):
        prompts = family.encode_prompts(["a photo"])
    return Encoded(
        torch.empty(2, family._latent_channels, side, side, device="meta"),
        prompts,
        torch.zeros(2, dtype=torch.long),
    )


def _encodings(
    encoded: Encoded,
    concepts: Sequence[Concept],
    benign: Sequence[Concept],
    config: ImmunizeConfig,
) -> int:
    """Bytes of all pictures and prompts as the denoiser reads them."""
    pictures = sum(len(concept.images) for concept in (*concepts, *benign))
    prompts = sum(len({x.prompt for x in c.images}) for c in benign)
    prompts += len(caption_kinds(config)) * sum(len({x.prompt for x in c.images}) for c in concepts)
    if config.has_prior:
        for concept in concepts:
            own = {x.prompt for x in concept.class_images}
            drawn = config.num_class_images
            pictures += len(concept.class_images) or drawn
            said = concept.class_prompt and config.captions is None
            prompts += len(own) or (1 if said else drawn)
    text = sum(_num_bytes(v) for v in encoded.prompts.values())
    return _num_bytes(encoded.latents[:1]) * pictures + text * prompts


def _matched(encoded: Encoded, config: ImmunizeConfig, count: int) -> int:
    """Bytes that the model before immunization predicts after benign adaptations, kept."""
    benign = config.upper.benign
    if benign is None or benign.target != "match":
        return 0
    low = benign.lower or config.attackers[0].as_benign
    states = len(low.states(benign.path_every))
    each = encoded.latents[0].numel() * FLOAT32 * config.upper.batch_size
    return count * benign.paths * states * each


def _served(config: ImmunizeConfig, names: Sequence[str], numels: Mapping[str, int]) -> int:
    """Bytes of the states of an attack that are kept for later outer steps."""
    if config.attack_every == 1:
        return 0
    states = len(config.attackers[0].states(config.upper.path_every))
    return states * sum(numels[name] for name in names) * FLOAT32


def _kinds(config: ImmunizeConfig) -> list[LowerConfig]:
    """Attackers of different memory, a few steps each; drawn settings as large as they may be."""
    found: list[LowerConfig] = []
    for attacker in config.attackers:
        start = attacker.benign_start
        one = attacker.model_copy(
            update={
                "steps": min(attacker.steps, FOLLOWED),
                "lr": 1.0,
                "rank": _highest_rank(attacker),
                "captions": ("as_is",),
                "benign_start": start and (min(1, start[1]),) * 2,
                "share": 1.0,
                "age": None,
            }
        )
        if one not in found:
            found.append(one)
    return found


def _highest_rank(low: LowerConfig) -> int:
    return max(low.rank) if isinstance(low.rank, tuple) else low.rank


def _every(low: LowerConfig, every: int | None) -> int | None:
    """Every which state of the steps that are followed is to count, for every which of all."""
    if low.steps <= FOLLOWED:
        return every
    # at every step that is followed, or at the last alone
    return 1 if len(low.states(every)) >= FOLLOWED > 1 else None


def _further(low: LowerConfig, every: int | None, mode: str, attacked: int, merged: int) -> int:
    """Bytes that the steps of a path which are not followed add to those that are.

    Args:
        low: the adaptation.
        every: which of its states count.
        mode: how it is differentiated.
        attacked: bytes of what it trains.
        merged: bytes of its change.
    """
    few = low.model_copy(update={"steps": min(low.steps, FOLLOWED)})
    states = len(low.states(every)) - len(few.states(_every(low, every)))
    if mode == "first_order":
        return states * merged
    gradient = mode == "finite_difference" and low.optimizer == "adam"
    kept = (low.steps - few.steps) * attacked * (1 + MOMENTS[low.optimizer] + gradient)
    return kept + states * 2 * merged


def _step(
    family: Family,
    encoded: Encoded,
    concepts: Sequence[Concept],
    config: ImmunizeConfig,
    numels: Mapping[str, int],
    benign: int,
) -> dict[str, int]:
    """Bytes of an outer step's own tensors, at their peak."""
    kinds, upper, low = _kinds(config), config.upper, config.attackers[0]
    mode = "first_order" if config.method == "alternating" else config.hypergradient
    done = _concepts_of_a_step(config, len(concepts))
    count = min(done, max(2, upper.concepts_per_forward, len(kinds)))
    reduced = config.model_copy(
        update={
            "lower": tuple(kinds),
            "upper": upper.model_copy(
                update={
                    "path_every": _every(low, upper.path_every),
                    "benign": upper.benign and _short_benign(upper.benign, low),
                }
            ),
            "concepts_per_step": None,
        }
    )
    _, names = trained_names(family, config)
    merged = sum(numels[name] for name in names) * FLOAT32
    states = max(
        _further(a, upper.path_every, mode, _attacked(family, a, numels), merged)
        for a in config.attackers
    )
    beside = _further(low, upper.path_every, "first_order", 0, merged)
    further = {"attack": states, "retain": beside if config.attack_every > 1 else 0}
    if upper.benign is not None:
        own = upper.benign.lower or low.as_benign
        size = sum(numels[n] for n in _names_of(family, own)) * FLOAT32
        trained = _attacked(family, own, numels)
        further["retain"] += _further(own, upper.benign.path_every, mode, trained, size)
    found = [
        _followed(
            family,
            encoded,
            [concept.name for concept in concepts[:count]],
            reduced.model_copy(update={"lower": tuple(kinds[first:] + kinds[:first])}),
            further,
            min(benign, 2),
        )
        for first in range(0, len(kinds), count)
    ]
    return max(found, key=lambda parts: sum(parts.values()))


def _short_benign(benign: BenignConfig, low: LowerConfig) -> BenignConfig:
    own = benign.lower or low.as_benign
    return benign.model_copy(
        update={
            "path_every": _every(own, benign.path_every),
            "lower": own.model_copy(
                update={"steps": min(own.steps, FOLLOWED), "rank": _highest_rank(own)}
            ),
        }
    )


def _followed(
    family: Family,
    encoded: Encoded,
    names: Sequence[str],
    config: ImmunizeConfig,
    further: Mapping[str, int],
    benign: int,
) -> dict[str, int]:
    """Bytes of one outer step, of a few steps each, that is followed on the meta device.

    Args:
        family: on the meta device.
        encoded: two pictures.
        names: the step's concepts.
        config: the settings of the shortened step.
        further: bytes that the whole one adds, by phase.
        benign: concepts that must stay learnable.
    """
    count = len(names)
    data = [ConceptData(name, encoded, encoded) for name in names]
    others = [ConceptData(f"benign {b}", encoded, None) for b in range(benign)]
    merges = config.method in ("mima", "alternating")
    merge = MergeLayer(torch.full((count,), 1 / count, device="meta")) if merges else None
    word = _WordOnMeta(
        text="<new>",
        indices=(),
        embedding=torch.empty(1, device="meta"),
        prompt="a photo",
        prompts=(),
    )
    words = [word] * count if config.train_tokens else []
    problem = _OnMeta(family, data, config, merge, words=words, benign=others)
    theta = problem.theta()
    held = [
        *family.denoiser.parameters(),
        *family.denoiser.buffers(),
        *(encoded.latents, *encoded.prompts.values(), *problem._start.values()),
        # bfloat16 copies of frozen weights, which ``_frozen`` of a float32 file makes
        *(copies := problem._frozen if config.precision != "float32" else {}).values(),
    ]
    found: list[dict[str, int]] = []
    with ExitStack() as stack:
        stack.enter_context(recomputed_blocks(family.denoiser, config.gradient_checkpointing))
        shapes = [value.shape for value in theta.values()]
        half = config.precision == "bfloat16"
        live = stack.enter_context(counted(held, shapes, bfloat16=half))
        for phase in _follow(problem, theta):
            found.append(
                {
                    "attacks, their gradients and merge": live.parts.get("weights", 0),
                    "further states of the path": further[phase],
                    "activations": live.parts.get("activations", 0),
                }
            )
            live.restart()
    frozen = {n: p for n, p in family.denoiser.named_parameters() if n in copies}
    made = sum(
        0 if isinstance(p, Upcast) and p.stored.dtype == torch.bfloat16 else _num_bytes(copies[n])
        for n, p in frozen.items()
    )
    largest = max(found, key=lambda parts: sum(parts.values()))
    return {"casts of frozen weights": live.largest_cast + made, **largest}


def _names_of(family: Family, low: LowerConfig) -> list[str]:
    """What an adaptation changes."""
    if low.parameters == "lora":
        return list(family.lora_targets())
    return [] if low.parameters is None else list(family.parameter_names(low.parameters))


def _attacked(family: Family, low: LowerConfig, numels: Mapping[str, int]) -> int:
    """Bytes of what an adaptation trains."""
    names = _names_of(family, low)
    if low.parameters != "lora":
        return sum(numels[name] for name in names) * FLOAT32
    shapes = (family.denoiser.get_parameter(name).shape for name in names)
    return sum(FLOAT32 * _highest_rank(low) * (o + d) for o, d in shapes)


def _follow(problem: Problem, theta: Params) -> Iterator[str]:
    """One outer step, up to the gradient that the optimizer reads; the phase that is over."""
    if problem.config.method == "alternating":
        total: dict[str, torch.Tensor] = {}
        for task in problem.lower_levels(0):
            gradient = lower.gradient(task, lower.start(task, theta), theta, 0)
            accumulate(total, {name: g / 2 for name, g in gradient.items()})
        del total
        upper_gradient(theta, problem.upper_levels(0))
        yield "attack"
        return
    outer = problem.hypergradient(theta, problem.lower_levels(0), problem.upper_path(0))
    yield "attack"
    retain = problem.retaining_gradient(theta, 0)
    # clipped or balanced, while both are there
    _ = {name: value * 1.0 for name, value in (retain or outer).gradient.items()}
    yield "retain"


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


def _others(pipeline: Pipeline, family: Family) -> list[torch.nn.Module]:
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


def _reads_start(config: ImmunizeConfig) -> bool:
    compared = config.upper.benign is not None and config.upper.benign.target == "match"
    return config.upper.objective in READS_START or config.upper.retain == "distill" or compared


def _lacking(concepts: Sequence[Concept], config: ImmunizeConfig) -> int:
    """Concepts whose class pictures are to be drawn."""
    return sum(not concept.class_images for concept in concepts) if config.has_prior else 0


def _drawn(pipeline: Pipeline, concepts: Sequence[Concept], config: ImmunizeConfig) -> int:
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
