"""Results become tables, targets and a report."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def entry(group, variant, milliseconds, **info):
    """One result as pytest-benchmark writes it."""
    return {
        "group": group,
        "name": f"test[{variant}]",
        "stats": {"data": [x / 1e3 for x in milliseconds]},
        "extra_info": {
            "variant": variant,
            "device": "a device",
            "threads": 2,
            "copy_GBps": 20.0,
            "matmul_GFLOPS": 100.0,
            **info,
        },
    }


def results_file(path, entries, *, commit="0123456789abcdef", dirty=False):
    content = {
        "commit_info": {"id": commit, "dirty": dirty},
        "datetime": "2025-01-02T03:04:05",
        "benchmarks": entries,
    }
    path.write_text(json.dumps(content))
    return path


WEIGHTED = "weighted_merge forward N=3"


@pytest.fixture
def merges(tmp_path):
    floor = {"baseline": "eager", "bytes": 8e6, "flops": 1e6, "floor_ms": 0.4}
    return results_file(
        tmp_path / "merges.json",
        [
            entry(WEIGHTED, "eager", [10, 10, 16], achieved_over_floor=0.04, **floor),
            # the third round was slow for all
            entry(WEIGHTED, "native", [2, 2, 4], achieved_over_floor=0.2, **floor),
            entry(WEIGHTED, "foreach", [1, 4, 8], achieved_over_floor=0.1, **floor),
        ],
    )


def test_table_has_a_line_per_variant(merges):
    from benchmarks import report

    header, rule, *lines = report.table(report.read([merges])).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rule.split("|")) == len(header.split("|"))
    assert cells[0] == [WEIGHTED, "eager", "10", "15", "1", "", "0.8", "0.1", "0.4", "4%"]
    assert cells[1] == ["", "native", "2", "25", "0.2", "", "4", "0.5", "0.4", "20%"]
    assert cells[2][:5] == ["", "foreach", "4", "44", "0.4"]


def test_targets_compare_round_by_round(merges):
    from benchmarks import report

    text = report.document(report.read([merges]), "report.png")
    assert "a device; 2 threads; commit 0123456789ab; 2025-01-02; copy 20 GB/s" in text
    assert "Targets: 2 of 2 met." in text
    # rounds: 0.2, 0.2, 0.25
    assert f"- met: {WEIGHTED}: over eager: 0.2 (≤ 0.25)" in text
    # rounds: 2, 0.5, 0.5
    assert "foreach and torch.compile: 0.5 (≤ 1)" in text


def test_a_missed_target_is_said(tmp_path):
    from benchmarks import report

    group = "batched_lora forward d,o,t=(4, 4, 4) r=4"
    file = results_file(
        tmp_path / "lora.json",
        [
            entry(group, "base layer", [10]),
            entry(group, "peft mixed batch", [18]),
            entry(group, "bmm", [14]),
            entry(group, "native", [15]),
            entry(group, "native N=1", [14]),
        ],
    )
    text = report.document(report.read([file]), "report.png")
    assert "MISSED: " + group + ": over the best of peft" in text
    assert "time above the base layer, over peft's: 0.625 (≤ 0.5)" in text
    assert "N=8 over N=1: 1.07 (≤ 1.15)" in text
    assert "Targets: 1 of 3 met." in text


def test_targets_of_a_gpu(tmp_path):
    from benchmarks import report

    at_floor = {"floor_ms": 9.0, "bytes": 1.0, "flops": 1.0}
    lora = "batched_lora forward+backward d,o,t=(4, 4, 4) r="
    file = results_file(
        tmp_path / "gpu.json",
        [
            entry(WEIGHTED, "triton", [10], achieved_over_floor=0.89, **at_floor),
            *(entry(lora + r, "base layer", [10]) for r in ("16", "64")),
            *(entry(lora + r, "triton", [31]) for r in ("16", "64")),
        ],
    )
    text = report.document(report.read([file]), "report.png")
    assert f"MISSED: {WEIGHTED}: share of the copy bandwidth: 0.89 (≥ 0.9)" in text
    assert f"MISSED: {lora}16: over the base layer alone, r ≤ 16: 3.1 (≤ 3)" in text
    assert "Targets: 0 of 2 met." in text


def test_several_files_become_one_report(merges, tmp_path, capsys):
    from benchmarks import report

    other = results_file(tmp_path / "step.json", [entry("step", "exact", [700])])
    report.main([str(merges), str(other), "--output", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.strip() == capsys.readouterr().out.strip()
    assert "| step | exact | 700 | 0 |" in text
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_that_cannot_be_drawn_is_written(merges, tmp_path, monkeypatch):
    from benchmarks import report

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError):
        report.main([str(merges), "--output", str(tmp_path / "out")])
    assert "Targets: 2 of 2 met." in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"commit": "fedcba9876543210"}, "several commits: 0123456789ab, fedcba987654"),
        ({"dirty": True}, "several commits: 0123456789ab, 0123456789ab with changes"),
    ],
)
def test_refuses_to_mix_commits(merges, tmp_path, second, message):
    from benchmarks import report

    other = results_file(tmp_path / "other.json", [entry("g", "v", [1])], **second)
    with pytest.raises(ValueError, match=message):
        report.read([merges, other])


def test_refuses_empty_results(tmp_path):
    from benchmarks import report

    with pytest.raises(ValueError, match="no results"):
        report.read([results_file(tmp_path / "empty.json", [])])


def test_a_report_says_which_times_have_the_hosts_part(tmp_path):
    from benchmarks import report

    entries = [entry("g", name, [1], wall_ms=2, with_host=name == "eager") for name in "ab"]
    said = "with a part of the host's"
    assert said not in report.document(report.read([results_file(tmp_path / "a", entries)]), "p")
    entries.append(entry("g", "eager", [3], wall_ms=4, with_host=True))
    text = report.document(report.read([results_file(tmp_path / "b", entries)]), "p")
    assert said in text
    assert "|  | eager | 3* |" in text
    assert "| g | a | 1 |" in text
