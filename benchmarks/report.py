"""Turns a benchmark run into the tables and plots of the README and docs/results.md.

usage: python benchmarks/report.py results.json [--output docs/images]

Prints Markdown; writes speed.png (and memory.png where peak memory over depth was measured) into the output folder. A
fused time without green parity in its own run is an error, not a number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

YARDSTICKS = ("eager", "compile", "compile-graph")
FUSED = ("fused", "fused-graph")
MEMORY = "segment memory"

# An RTX 3090's data sheet: what predicts its times, as no one was measured
RTX_3090_BYTES_PER_SECOND = 936e9
RTX_3090_FLOPS_PER_SECOND = 71e12


@dataclass(frozen=True)
class Row:
    """All variants of one case; seconds and peak bytes by variant."""

    operation: str
    case: str
    seconds: dict[str, float]
    peak: dict[str, int]
    flops: float | None
    bytes: float | None

    def best(self, variants: tuple[str, ...]) -> float | None:
        return min((self.seconds[v] for v in variants if v in self.seconds), default=None)

    def speed_up(self, *yardsticks: str) -> float | None:
        """How many times faster the best fused variant is than the best of `yardsticks`; None where one is missing."""
        fused, other = self.best(FUSED), self.best(yardsticks)
        return other / fused if fused and other else None

    def predicted_3090(self) -> float | None:
        """Seconds on an RTX 3090, from the bytes and operations that must be done."""
        bounds = (
            self.bytes and self.bytes / RTX_3090_BYTES_PER_SECOND,
            self.flops and self.flops / RTX_3090_FLOPS_PER_SECOND,
        )
        return max((bound for bound in bounds if bound), default=None)

    def achieved(self, gpu: dict) -> str:
        """Share of the measured roof that bounds this case: matrix peak or copy bandwidth."""
        fused = self.best(FUSED)
        if not fused or not gpu:
            return ""
        shares = {
            f"{(self.flops or 0) / fused / 1e12:.0f} TFLOP/s": (self.flops or 0) / gpu["matmul_flops_per_second"],
            f"{(self.bytes or 0) / fused / 1e12:.2f} TB/s": (self.bytes or 0) / gpu["copy_bytes_per_second"],
        }
        rate, bound = max(shares.items(), key=lambda item: item[1])
        return f"{rate}, {bound / fused:.0%}" if bound else ""


def load(path: Path) -> tuple[list[Row], dict]:
    """Rows in the order of the run, and what it says of its machine.

    Raises:
        ValueError: the file holds no benchmark of this suite, or a fused time without green parity.
    """
    data = json.loads(path.read_text())
    grouped: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for benchmark in data["benchmarks"]:
        extra = benchmark["extra_info"]
        if "operation" not in extra:
            continue
        if extra["variant"] in FUSED and extra.get("parity") != "green":
            raise ValueError(f"{path}: {benchmark['name']} has no green parity; its time means nothing")
        extra.setdefault("seconds", benchmark["stats"]["median"])
        grouped[extra["operation"], extra["case"]].append(extra)
    if not grouped:
        raise ValueError(f"{path} holds no benchmark of this suite; make it with --benchmark-json")
    rows = [
        Row(
            operation,
            case,
            {e["variant"]: e["seconds"] for e in extras},
            {e["variant"]: e["peak_bytes"] for e in extras if "peak_bytes" in e},
            extras[0].get("flops"),
            extras[0].get("bytes"),
        )
        for (operation, case), extras in grouped.items()
    ]
    return rows, data["machine_info"]


def speed_table(rows: list[Row], gpu: dict) -> str:
    heads = [
        "what", *YARDSTICKS, *FUSED, "times eager", "times torch.compile", "achieved, of the measured roof",
        "peak memory, eager / fused", "RTX 3090, predicted",
    ]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            f"{row.operation}, {row.case}",
            *(_time(row.seconds.get(variant)) for variant in (*YARDSTICKS, *FUSED)),
            _times(row.speed_up("eager")),
            _times(row.speed_up("compile", "compile-graph")),
            row.achieved(gpu),
            " / ".join(_size(row.peak.get(variant)) for variant in ("eager", "fused")) if row.peak else "",
            _time(row.predicted_3090()),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(rows: list[Row]) -> str:
    variants = list(dict.fromkeys(variant for row in rows for variant in row.peak))
    lines = ["| N = T | " + " | ".join(variants) + " |", "|---|" + "---|" * len(variants)]
    lines += [f"| {row.case} | " + " | ".join(_size(row.peak.get(v)) for v in variants) + " |" for row in rows]
    return "\n".join(lines)


def plot_speed(rows: list[Row], path: Path) -> None:
    """Bars of how many times faster than eager each other variant is, where all are timed alike (no launches bound)."""
    rows = [row for row in rows if "eager" in row.seconds and len(row.seconds) > 1 and "fused-graph" not in row.seconds]
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{row.operation}, {row.case}" for row in rows]
    bars = {
        "best of torch.compile": [row.best(YARDSTICKS[1:]) for row in rows],
        "fused": [row.best(FUSED) for row in rows],
    }
    for index, (label, seconds) in enumerate(bars.items()):
        values = [row.seconds["eager"] / s if s else 0.0 for row, s in zip(rows, seconds, strict=True)]
        places = [place + 0.4 * index - 0.2 for place in range(len(rows))]
        drawn = axes.barh(places, values, height=0.38, label=label)
        axes.bar_label(drawn, [f"{value:.1f}" if value else "" for value in values], padding=3, fontsize=8)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xlim(right=1.5 * axes.get_xlim()[1])  # room for the numbers behind the bars
    axes.set_xlabel("times as fast as eager PyTorch (log scale)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(bars))
    figure.savefig(path, dpi=150)


def plot_memory(rows: list[Row], path: Path) -> None:
    """Peak memory of one training step of a segment over its depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for variant in dict.fromkeys(variant for row in rows for variant in row.peak):
        points = [(int(row.case), row.peak[variant] / 2**20) for row in rows if variant in row.peak]
        style = {"linestyle": "--", "zorder": 3} if variant.startswith("fused") else {}  # visible where lines coincide
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=variant, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("N = T (cycles and L steps of a cycle)")
    axes.set_ylabel("peak memory of a step, MiB")
    axes.legend()
    figure.savefig(path, dpi=150)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.3g} µs"


def _times(factor: float | None) -> str:
    return f"{factor:.1f}" if factor is not None else ""


def _size(count: int | None) -> str:
    return f"{count / 2**20:.1f} MiB" if count is not None else ""


def describe(machine: dict) -> str:
    gpu = machine.get("gpu")
    if not gpu:
        return f"CPU only (torch {machine.get('torch', '?')}): the fused kernels were not measured."
    return (
        f"{gpu['name']}, torch {machine['torch']}. Measured in the same run: copy "
        f"{gpu['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 matrix product "
        f"{gpu['matmul_flops_per_second'] / 1e12:.0f} TFLOP/s, one launch {gpu['launch_seconds'] * 1e6:.1f} µs."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what pytest wrote with --benchmark-json")
    parser.add_argument("--output", type=Path, default=Path("docs/images"), help="folder of the plots")
    options = parser.parse_args(arguments)
    try:
        rows, machine = load(options.results)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.operation != MEMORY]
    grown = [row for row in rows if row.operation == MEMORY]
    print(describe(machine), speed_table(timed, machine.get("gpu", {})), sep="\n\n")
    plot_speed(timed, options.output / "speed.png")
    if grown:
        print("\nPeak memory of one forward + backward of a segment:\n", memory_table(grown), sep="\n")
        plot_memory(grown, options.output / "memory.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
