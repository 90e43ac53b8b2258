"""Results of `spmoe bench` as tables and plots."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from spmoe.errors import InvalidArgument
from spmoe.policies import traits_of

Row = Mapping[str, Any]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


# Heading -> what a cell shows. Times in ms, sizes in MB (10^6 bytes).
COLUMNS: dict[str, Callable[[Row], str]] = {
    "policy": lambda row: f"{row['policy']} + {row['eviction']}",
    "memory": lambda row: str(row["expert_memory"]),
    "draft": lambda row: str(row["draft_length"]),
    "TPOT ms": lambda row: f"{row['tpot_s']['mean'] * 1e3:.1f}",
    "p90": lambda row: f"{row['tpot_s']['p90'] * 1e3:.1f}",
    "tokens/s": lambda row: f"{row['tokens_per_s']:.1f}",
    "accept": lambda row: _share(row["acceptance"]),
    "hit": lambda row: _share(row["hit_rate"]),
    "late": lambda row: _share(row["late_rate"]),
    "recall": lambda row: _share(row["recall"]),
    "MB/token": lambda row: f"{row['bytes_per_token'] / 1e6:.1f}",
    "wasted": lambda row: _share(row["wasted_share"]),
    "stall ms": lambda row: f"{row['stall_s_per_token'] * 1e3:.1f}",
    "x bound": lambda row: _ratio(row["ratio_to_bound"]),
    "x slot bound": lambda row: _ratio(row["ratio_to_slot_bound"]),
    "identical": lambda row: "yes" if row["identical"] else "NO",
}


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table's body, a list of texts for each row."""
    return [[show(row) for show in COLUMNS.values()] for row in rows]


def caption(result: Mapping[str, Any]) -> str:
    """Return where and how the rows were measured, in a line."""
    machine = result["machine"]
    link = f"link {result['link_peak_gbps']:.2f} GB/s" + (" (paced)" if result["paced"] else "")
    degraded = result["degrade_prediction"]
    return f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; {link}" + (
        f"; {degraded:.0%} of predictions replaced" if degraded else ""
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *cells(result["rows"])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{caption(result)}\n\n{table}\n"


def write_csv(path: str | PathLike[str], result: Mapping[str, Any]) -> None:
    """Write every key of every row."""
    flat = [
        {key: value for key, value in row.items() if key != "tpot_s"}
        | {f"tpot_s_{name}": value for name, value in row["tpot_s"].items()}
        for row in result["rows"]
    ]
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)


def check_plot(path: str | PathLike[str]) -> None:
    """Check that a picture can be drawn to a file of this name.

    Raises:
        InvalidArgument: matplotlib is not installed, or does not know the format.
    """
    formats = sorted(_figure().canvas.get_supported_filetypes())
    if Path(path).suffix.removeprefix(".").lower() not in formats:
        raise InvalidArgument(f"{path}: name a file that ends in .{', .'.join(formats)}")


def plot(path: str | PathLike[str], result: Mapping[str, Any]) -> None:
    """Draw time per token over expert memory, a line a policy; the bound dashed.

    Raises:
        InvalidArgument: matplotlib is not installed.
    """
    figure = _figure()
    axes = figure.subplots()
    lines: dict[str, list[Row]] = {}
    for row in result["rows"]:
        lines.setdefault(f"{row['policy']}, draft {row['draft_length']}", []).append(row)
    for name, rows in lines.items():
        memory = [row["expert_memory_bytes"] / 1e6 for row in rows]
        axes.plot(memory, [row["tpot_s"]["mean"] * 1e3 for row in rows], marker="o", label=name)
    bounds = [
        row for row in result["rows"] if traits_of(row["policy"]).replays and row["bound_tpot_s"]
    ]
    if bounds:
        memory = [row["expert_memory_bytes"] / 1e6 for row in bounds]
        axes.plot(memory, [row["bound_tpot_s"] * 1e3 for row in bounds], "k--", label="bound")
    axes.set_xlabel("expert memory, MB")
    axes.set_ylabel("time per output token, ms")
    axes.set_ylim(bottom=0)
    axes.set_title(caption(result), fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            "plots need matplotlib: pip install matplotlib, or leave --plot out"
        ) from error
    return Figure(figsize=(7, 4.5), layout="constrained")
