"""Benchmark results as one Markdown table and one plot.

    pytest benchmarks/ --benchmark-json=results.json
    python -m benchmarks.report results.json [more.json ...] [--output folder]

Writes `report.md` and `report.png`. Above the table, the report lists the speed targets of
`benchmarks/targets.py` that the results decide, with the ratios reached.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.targets import Verdict, verdicts


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one comparison."""

    group: str
    variant: str
    samples: tuple[float, ...]
    """Seconds, in the order of the rounds."""
    info: dict[str, Any]
    """pytest-benchmark's extra_info: see `benchmarks.harness.replay`."""

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, relative to the median."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return (high - low) / 2 / self.seconds


@dataclass(frozen=True, kw_only=True)
class Results:
    """What one or several runs measured, on one device."""

    rows: tuple[Row, ...]
    commit: str
    date: str

    def groups(self) -> Iterator[tuple[str, list[Row]]]:
        """The comparisons, in the order in which they ran."""
        for group in dict.fromkeys(row.group for row in self.rows):
            yield group, [row for row in self.rows if row.group == group]


def read(paths: Iterable[Path]) -> Results:
    """Read pytest-benchmark's JSON files.

    Raises:
        ValueError: no results in them, or results of several commits or devices.
    """
    rows, commits, dates = [], [], []
    for path in paths:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        commit = content["commit_info"]
        commits.append(str(commit["id"])[:12] + (" with changes" if commit.get("dirty") else ""))
        dates.append(content["datetime"][:10])
        for entry in content["benchmarks"]:
            info = entry["extra_info"]
            rows.append(
                Row(
                    group=entry["group"] or entry["name"],
                    variant=info.get("variant", entry["name"]),
                    samples=tuple(entry["stats"]["data"]),
                    info=info,
                )
            )
    if not rows:
        raise ValueError("no results: did pytest run with --benchmark-json?")
    for what, found in (("commits", commits), ("devices", [device_of([row]) for row in rows])):
        distinct = sorted({x for x in found if x})
        if len(distinct) > 1:
            raise ValueError(f"results of several {what}: {', '.join(distinct)}")
    return Results(rows=tuple(rows), commit=commits[0], date=dates[0])


def device_of(rows: Sequence[Row]) -> str:
    """The device's name, as far as the rows tell it."""
    return next((row.info["device"] for row in rows if "device" in row.info), "")


def table(results: Results) -> str:
    """One line per variant, those of a comparison under each other.

    `of baseline`: median time relative to the comparison's baseline. `of floor`: the floor, the
    larger of bytes / copy bandwidth and FLOPs / rate of a matrix product of the same dtype, over
    the median time. `wall ms`, on a GPU: from the call to its result, with the host's part, which
    the median leaves out, but where `*` says that the GPU could not wait for the host.
    """
    header = (
        *("comparison", "variant", "median ms", "± %", "of baseline", "wall ms"),
        *("GB/s", "GFLOP/s", "floor ms", "of floor"),
    )
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for group, rows in results.groups():
        baseline = {row.variant: row.seconds for row in rows}.get(rows[0].info.get("baseline", ""))
        for row in rows:
            cells = [
                group,
                row.variant,
                _number(row.seconds * 1e3) + "*" * bool(row.info.get("with_host")),
                f"{row.spread:.0%}".removesuffix("%"),
                _number(row.seconds / baseline) if baseline else "",
                _number(row.info["wall_ms"]) if "wall_ms" in row.info else "",
                _rate(row.info.get("bytes"), row.seconds),
                _rate(row.info.get("flops"), row.seconds),
                _number(row.info["floor_ms"]) if row.info.get("floor_ms") else "",
                f"{row.info['achieved_over_floor']:.0%}" if row.info.get("floor_ms") else "",
            ]
            lines.append("| " + " | ".join(cells) + " |")
            group = ""  # named once
    return "\n".join(lines)


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def _rate(amount: float | None, seconds: float) -> str:
    return _number(amount / seconds / 1e9) if amount else ""


def document(results: Results, plot: str) -> str:
    """The report: device and commit, targets, table, plot."""
    first = next((row.info for row in results.rows if "device" in row.info), {})
    facts = [f"commit {results.commit}", results.date]
    if first:
        facts = [first["device"], f"{first['threads']} threads", *facts]
        facts.append(f"copy {first['copy_GBps']:.0f} GB/s")
        facts.append(
            f"{first.get('matmul_dtype', 'float32')} product {first['matmul_GFLOPS']:.0f} GFLOP/s"
        )
    lines = ["# Benchmarks", "", "; ".join(facts) + ".", ""]
    samples = {
        group: {row.variant: row.samples for row in rows} for group, rows in results.groups()
    }
    floors = {
        (row.group, row.variant): row.info["achieved_over_floor"]
        for row in results.rows
        if row.info.get("floor_ms")
    }
    decided = verdicts(samples, floors)
    if decided:
        lines += [f"Targets: {sum(v.met for v in decided)} of {len(decided)} met.", ""]
        lines += [_verdict(v) for v in decided] + [""]
    lines.append(table(results))
    if any(row.info.get("with_host") for row in results.rows):
        lines += ["", "\\* with a part of the host's: the GPU did not wait until it was done."]
    return "\n".join([*lines, "", f"![time over floor]({plot})", ""])


def _verdict(v: Verdict) -> str:
    sign = "≤" if v.at_most else "≥"
    return f"- {'met' if v.met else 'MISSED'}: {v.group}: {v.text}: {v.value:.3g} ({sign} {v.bar})"


def draw(results: Results, path: Path) -> None:
    """A row per comparison: each variant's time over the floor (over the fastest without one)."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    groups = list(results.groups())
    variants = list(dict.fromkeys(row.variant for row in results.rows))
    colours = plt.get_cmap("tab20").colors
    markers = "osD^v<>PX*"
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.3 * len(groups)), layout="constrained")
    for number, variant in enumerate(variants):
        points = []
        for height, (_, rows) in enumerate(groups):
            fastest = min(row.seconds for row in rows)
            points += [
                (row.seconds / ((row.info.get("floor_ms") or 0) / 1e3 or fastest), height)
                for row in rows
                if row.variant == variant
            ]
        axes.plot(
            *zip(*points, strict=True),
            linestyle="",
            marker=markers[number % len(markers)],
            color=colours[number % len(colours)],
            label=variant,
        )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [group for group, _ in groups], fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("time over the floor (over the fastest where there is no floor)")
    axes.set_title(f"{device_of(results.rows)}, {results.commit}, {results.date}", fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.report")
    parser.add_argument("results", nargs="+", type=Path, help="files of --benchmark-json")
    parser.add_argument("--output", type=Path, default=Path(), help="folder (default: here)")
    args = parser.parse_args(arguments)
    results = read(args.results)
    args.output.mkdir(parents=True, exist_ok=True)
    text = document(results, "report.png")
    (args.output / "report.md").write_text(text, encoding="utf-8")
    print(text)
    # last, for a machine may lack matplotlib
    draw(results, args.output / "report.png")


if __name__ == "__main__":
    main()
