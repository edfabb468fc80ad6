"""What a run will train and need, said before any weight is loaded."""

# N = concepts, K = lower-level steps, S_u and S_l = what the defender and the attacks change

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mima.concepts import Concept
from mima.distributed import world_size
from mima.families import ModelSource, family_of, load_pipeline
from mima.families.frozen import hold_frozen, stored_bytes
from mima.families.pipelines import networks, networks_beside
from mima.families.skeleton import open_skeleton
from mima.immunization.checks import check_drawn, check_model
from mima.immunization.config import ImmunizeConfig
from mima.immunization.objectives import reads_start
from mima.immunization.offload import idle_modules
from mima.immunization.parameters import trained_names
from mima.immunization.planning.devices import GPU_CONTEXT, device_memory, free_disk, resident
from mima.immunization.planning.outer_step import MOMENTS, attacked, step_parts
from mima.immunization.planning.refusal import refusal_of
from mima.immunization.planning.result import Plan
from mima.immunization.planning.shards import Mesh, gathered_at_once, received, rows_of
from mima.immunization.planning.sizes import (
    FLOAT32,
    dtype_of,
    encoded_pictures,
    encodings_size,
    matched,
    moments,
    preparing,
    served,
    weights_size,
)
from mima.immunization.planning.work import concepts_of_a_step, drawn, lacking, pictures_of_a_step
from mima.storage.inputs import expanded
from mima.training.batches import CHUNK

LARGE_MODEL = 2**30
"""Bytes of a model's weights from which on a run is planned before it starts."""


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
    loses, and the text encoder's activations where new words are trained. Not checked, for it takes
    the weights: whether an erased checkpoint can be read, and whether a merge can tell the texts
    apart.

    In shards, memory is that of one process, and what each receives from the others is counted on
    paper. There are as many processes as were started, or as ``WORLD_SIZE`` says; of one, as many
    as ``shards``.

    Args:
        model: a ``ModelSource``, or a pipeline in memory, which is left as it is.
        concepts: N concepts.
        config: the settings.
        benign: the concepts that must stay learnable, where the settings read some.
        device: of the run: ``cpu``, ``cuda``, a key of ``GPU_GIB`` (``h100``), or a size (``24
            GiB``) of a GPU's memory.
        output: where the run writes; None writes nothing.
        delta: whether it writes the changed weights alone.
        measure: time one forward where the device is this machine's; a model on disk is opened
            for it.

    Raises:
        MimaError: the model, a setting or the device is not to be had, see ``open_skeleton``, or
            the run would refuse the model or the concepts, see ``check_model``.

    Examples:
        >>> print(plan(ModelSource("embedded"), concepts, ImmunizeConfig(), device="h100"))
    """
    if device is None and hasattr(model, "components"):
        device = family_of(model).device

    def planned(settings: ImmunizeConfig) -> Plan:
        return _plan(
            model, concepts, settings, benign=benign, device=device, output=output, delta=delta
        )

    found = planned(config)
    if measure and found.device.split(":")[0] in ("cpu", "cuda"):
        found = replace(found, seconds=_seconds(model, config, found.device))
    return replace(found, refusal=refusal_of(found, config, planned, delta=delta))


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
    family = family_of(pipeline, resolution=config.resolution, training=config.training)
    upper_names, lower_names = trained_names(family, config)
    check_model(pipeline, concepts, config)
    if config.shards > 1 and opened:
        check_drawn(concepts, config, on_cpu=on_cpu)
    mesh = Mesh(max(1, world_size() // config.shards), config.shards)
    both = [name for name in upper_names if name in lower_names]
    trained = {
        "both levels": both,
        "the defender alone": [name for name in upper_names if name not in lower_names],
        "simulated attacks alone": [name for name in lower_names if name not in upper_names],
    }
    names = dict.fromkeys((*upper_names, *lower_names))
    for module in networks(pipeline).values():
        if opened or module is family.denoiser:
            hold_frozen(module, names if module is family.denoiser else ())
    numels = {n: p.numel() for n, p in family.denoiser.named_parameters() if n in names}
    # what one process has of them
    own = {n: mesh.rows(p.shape) for n, p in family.denoiser.named_parameters() if n in names}
    encoded = encoded_pictures(family)
    encodings = encodings_size(encoded, concepts, benign, config)

    idle = idle_modules(pipeline, reads_text=config.reads_text)
    others = networks_beside(pipeline, family.denoiser).values()
    waiting = weights_size(m for m in others if not (opened and m in idle))
    denoiser = {
        ("trained weights, " if name in names else "frozen weights, ") + dtype: 0
        for name, p in family.denoiser.named_parameters()
        for dtype in [dtype_of(p)]
    }
    for name, p in family.denoiser.named_parameters():
        part = ("trained weights, " if name in names else "frozen weights, ") + dtype_of(p)
        denoiser[part] += stored_bytes(p)
    ground = {
        "Python and its libraries" if on_cpu else "CUDA's context": (
            resident() if on_cpu else GPU_CONTEXT
        ),
        "encoded pictures and prompts": encodings if on_cpu else 0,
    }
    mine = sum(own[name] for name in upper_names) * FLOAT32
    kept, all_kept = (moments(family, config, upper_names, n) for n in (own, numels))
    done = concepts_of_a_step(config, len(concepts))

    def living(sizes: Mapping[str, int]) -> int:
        return done * max(
            attacked(family, attacker, sizes) * (1 + MOMENTS[attacker.optimizer])
            if attacker.age
            else 0
            for attacker in config.attackers
        )

    split: dict[str, int] = {}
    if mesh.shards > 1:
        split = {
            "the denoiser's shard": rows_of(family.denoiser, mesh) * FLOAT32,
            "trained weights' rows": sum(own.values()) * FLOAT32,
        }
    # no GPU is to hold the whole of a denoiser that is held in shards
    on_host = bool(split) and opened and not on_cpu
    memory = {
        "preparing": {
            **ground,
            **({} if on_host else denoiser),
            "text encoders and VAE": weights_size(others),
            "activations": preparing(
                family,
                encoded,
                most=max(max(len(c.images), len(c.class_images)) for c in (*concepts, *benign)),
                drawn=min(CHUNK, config.num_class_images) if lacking(concepts, config) else 0,
            ),
        }
    }
    if config.method != "none":
        offloaded = config.offload_optimizer
        memory["outer steps"] = {
            **ground,
            **(split or denoiser),
            "blocks that compute, whole": gathered_at_once(family.denoiser) if split else 0,
            "encoders that stay": waiting,
            "weights as they were before": mine if reads_start(config.upper) else 0,
            "immunized models": (
                # where each begins, and on a CPU what each has become
                (1 + len(concepts) * on_cpu) * sum(numels.values()) * FLOAT32
                if config.method == "compose"
                else 0
            ),
            # those that were alive before the step, and where they are after it
            "attackers that live on": 2 * living(own),
            "what benign adaptations predicted": matched(encoded, config, len(benign)),
            "the optimizer's moments": 0 if offloaded else kept,
            **step_parts(family, encoded, concepts, config, own, len(benign), mesh),
        }
    whole = sum(
        p.numel() * FLOAT32
        for module in (family.denoiser, *(others if opened else ()))
        for p in module.parameters()
    )
    largest = max(p.numel() for p in family.denoiser.parameters()) * FLOAT32
    # shards are gathered in the main process, on the CPU
    memory["the result, in float32"] = {
        **ground,
        **split,
        "weights": largest if split and not on_cpu else whole,
    }
    changed = sum(numels.values()) * FLOAT32
    disk: dict[str, int] = {}
    if output is not None:
        # those of each concept that compose immunized stay until the end
        times = 2 * (len(concepts) if config.method == "compose" else 1) + 1
        disk = {
            "checkpoints, two and one that is being written": (
                times * (changed + all_kept + living(numels) + served(config, lower_names, numels))
            ),
            "encoded pictures and prompts": encodings,
            "encoders, while the run lasts": (
                weights_size(idle) if on_cpu and opened and config.method != "none" else 0
            ),
            "the optimizer's moments": all_kept if on_cpu and config.offload_optimizer else 0,
            "the result": changed if delta else whole,
        }
    return Plan(
        device=label,
        capacity=capacity,
        trained={group: found for group, found in trained.items() if found},
        numels=numels,
        memory=memory,
        disk=disk,
        free_disk=None if output is None else free_disk(output),
        steps=config.steps * (len(concepts) if config.method == "compose" else 1),
        pictures=pictures_of_a_step(config, len(concepts), len(benign)),
        drawn=drawn(pipeline, concepts, config),
        processes=mesh.groups * mesh.shards,
        shards=mesh.shards,
        host={
            "the denoiser, before its shard is taken": sum(denoiser.values()) if on_host else 0,
            "the result, in the main process": whole if split and not on_cpu else 0,
        },
        received=received(
            family.denoiser, names, config, mesh, count=len(concepts), benign=len(benign)
        ),
    )


def large(model: Any) -> bool:
    """Whether a model is of a size at which planning its run is worth the seconds."""
    if isinstance(model, ModelSource):
        path = expanded(str(model.model))
        files = [path] if path.is_file() else [*path.glob("*/*.safetensors"), *path.glob("*/*.bin")]
        return sum(file.stat().st_size for file in files) > LARGE_MODEL
    return weights_size(networks(model).values()) > LARGE_MODEL


def _seconds(model: Any, config: ImmunizeConfig, device: str) -> float:
    """Of one picture's forward on a device of this machine, the second of two."""
    if isinstance(model, ModelSource):
        model = load_pipeline(model, dtype=None, device=device)
        for network in networks(model).values():
            hold_frozen(network)
    family = family_of(model, resolution=config.resolution, training=config.training)
    noisy = torch.zeros(family.latent_shape(1), device=family.device, dtype=family.dtype)
    timesteps = torch.full((1,), 500.0, device=family.device)
    conditioning = family.encode_prompts(["a photo"])
    started = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.no_grad():
            # reading a value waits for the device
            family.predict(noisy, timesteps, conditioning).sum().item()
    return time.perf_counter() - started
