"""Checkpoints of a run whose model several processes hold between them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from mima.bilevel.lower import Tensors
from mima.distributed import Ranks
from mima.families.sharded import ShardedDenoiser
from mima.storage.atomic import sha256_of
from mima.storage.checkpoint import (
    WHOLE_FILE,
    Checkpoint,
    CheckpointFolder,
    distributed_checkpoint,
    kept_in_shards,
)


class ShardedState:
    """Writes and reads checkpoints of which each process has its rows, all processes together.

    A checkpoint is in the form of ``torch.distributed.checkpoint``: a file for each process, on a
    disk that all see. Any number of processes can read it, with any number of shards; one that a
    single process wrote can be read in shards, too.
    """

    def __init__(self, folder: CheckpointFolder, denoiser: ShardedDenoiser, ranks: Ranks) -> None:
        self._folder = folder
        self._denoiser = denoiser
        self._ranks = ranks

    def write(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, as ``CheckpointFolder.write`` does.

        Raises:
            MimaError: in every process, where one cannot write.
        """
        ranks, begun = self._ranks, False

        def save(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
            nonlocal begun
            begun = True
            ranks.broadcast(str(folder))
            problem, sums = self._save(folder, tensors)
            if problem is not None:
                raise OSError(0, problem)
            return sums

        def write() -> None:
            try:
                self._folder.write(checkpoint, save)
            finally:
                if not begun:
                    ranks.broadcast(None)

        if not ranks.main:
            folder: str | None = ranks.broadcast(None)
            if folder is not None:
                self._save(Path(folder), checkpoint.tensors)
        ranks.together(write)

    def latest(self) -> Checkpoint | None:
        """The last checkpoint that is intact, with this process' rows; None where there is none.

        Raises:
            MimaError: in every process, where all are damaged.
        """
        found: list[tuple[Checkpoint | None, str]] = []

        def find() -> None:
            where = ""

            def note(folder: Path) -> Tensors:
                nonlocal where
                where = str(folder)
                return {}

            found.append((self._folder.latest(note), where))

        self._ranks.together(find)
        kept, folder = self._ranks.broadcast(found[0] if found else (None, ""))
        if kept is None:
            return None
        return Checkpoint(kept.step, self._load(Path(folder)), kept.state)

    def _save(
        self, folder: Path, tensors: Mapping[str, torch.Tensor]
    ) -> tuple[str | None, dict[str, str]]:
        """This process' file; what went wrong, and the checksums of all processes' files."""
        checkpoint = distributed_checkpoint()
        state = {key: self._as_part(key, value) for key, value in tensors.items()}
        try:
            checkpoint.save(state, checkpoint_id=folder)
        except checkpoint.CheckpointException as error:
            # raised in every process
            rank, (reason, _) = next(iter(error.failures.items()))
            return f"process {rank}: {reason}", {}
        everyone, rank, size = sorted(folder.glob("*.distcp")), *self._ranks.place
        mine = {file.name: sha256_of(file) for file in everyone[rank::size]}
        sums = self._ranks.all_gather_everywhere(mine)
        return None, {name: digest for part in sums for name, digest in part.items()}

    def _load(self, folder: Path) -> Tensors:
        if (folder / WHOLE_FILE).is_file():
            with safe_open(folder / WHOLE_FILE, framework="pt") as file:
                return {
                    key: self._own_rows(key, file.get_tensor(key)).clone()
                    for key in file.keys()  # noqa: SIM118
                }
        state: Tensors = {}
        for key, (size, dtype) in kept_in_shards(folder).items():
            name = self._weight(key)
            if name is None or size != self._denoiser.shapes[name]:
                state[key] = torch.empty(size, dtype=dtype)
            else:
                rows = torch.empty_like(self._denoiser.theta[name], dtype=dtype)
                state[key] = self._denoiser.distributed(name, rows)
        distributed_checkpoint().load(state, checkpoint_id=folder)
        return {
            key: value.to_local() if isinstance(value, torch.distributed.tensor.DTensor) else value
            for key, value in state.items()
        }

    def _as_part(self, key: str, value: torch.Tensor) -> torch.Tensor:
        name = self._weight(key)
        if name is None or value.shape != self._denoiser.theta[name].shape:
            return value
        return self._denoiser.distributed(name, value)

    def _own_rows(self, key: str, whole: torch.Tensor) -> torch.Tensor:
        name = self._weight(key)
        if name is None or whole.shape != self._denoiser.shapes[name]:
            return whole
        return self._denoiser.rows(whole)

    def _weight(self, key: str) -> str | None:
        """The weight whose rows a tensor of a checkpoint has, as ``upper.exp_avg.NAME``."""
        parts = key.split(".")
        ends = (".".join(parts[i:]) for i in range(1, len(parts)))
        return next((name for name in ends if name in self._denoiser.theta), None)
