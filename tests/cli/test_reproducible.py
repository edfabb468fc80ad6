"""Two runs of a command with one seed, in two processes, write the same bytes."""

from __future__ import annotations

from pathlib import Path

from support.commands import in_a_process, write_config

ADAPT = ["adapt", "cat", "--model", "MODEL", "--steps", "2", "--lr", "0.01"]
COMMANDS = {
    "lora": [*ADAPT, "--rank", "2"],
    "whole dreambooth": [*ADAPT, "--method", "dreambooth", "--whole"],
    "immunize": ["immunize", "run.yaml"],
    "delta": ["immunize", "run.yaml", "--delta"],
}


def test_two_runs_write_the_same_bytes(workdir, small_model):
    write_config(workdir / "run.yaml", model=str(small_model))
    commands = [
        ([small_model if word == "MODEL" else word for word in words] + ["-o", name], {})
        for name, words in COMMANDS.items()
    ]
    written = []
    for seed in ("1", "2"):
        # sets of texts have another order in each process
        ended = in_a_process(*commands, cwd=workdir, PYTHONHASHSEED=seed, OMP_NUM_THREADS="1")
        assert [code for code, _ in ended] == [0] * len(commands), ended
        Path(seed).mkdir()
        for name in COMMANDS:
            Path(name).rename(Path(seed, name))
        files = [path for path in Path(seed).rglob("*") if path.is_file()]
        written.append({str(path.relative_to(seed)): path.read_bytes() for path in files})
    first, second = written
    assert first.keys() == second.keys()
    for name in COMMANDS:
        assert sum(path.startswith(f"{name}/") for path in first) > 1
    assert [path for path in first if first[path] != second[path]] == []
