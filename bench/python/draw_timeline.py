"""One iteration of a trace as a picture, readable on a light and on a dark page.

spmoe generate --demo -p "..." --trace trace.json
python bench/python/draw_timeline.py trace.json timeline.svg --iteration 5
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from matplotlib import rc_context
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure

# Each has a contrast of 3 and more with white and with the dark page of GitHub; text has 4.
TEXT = "#767676"
LAYERS = ("#3b7dd8", "#a9549c", "#d97706")  # first layer to last
PHASE = "#6e7781"  # of the draft's and the target's pass; the text on it is white
COLOURS = LinearSegmentedColormap.from_list("layers", LAYERS)
_ROWS = ("draft", "verify", "compute", "wait", "link: demand", "link: prefetch")


@click.command()
@click.argument("trace", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("picture", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--iteration", default=5, show_default=True, help="Which one, from 0.")
@click.option("--title", default="", help="Above the picture.")
def main(trace: Path, picture: Path, iteration: int, title: str) -> None:
    """Draw one iteration of TRACE, from `spmoe generate --trace`, into PICTURE."""
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if "tid" in event and event["ph"] == "M"
    }
    spans = [event | {"row": names[event["tid"]]} for event in events if event["ph"] == "X"]
    drafts = sorted(
        (span for span in spans if span["row"] == "draft" and span["dur"] > 0), key=_start
    )
    if iteration >= len(drafts):
        raise click.UsageError(f"the trace has {len(drafts)} iterations that draft")
    start = _start(drafts[iteration])
    verify = min(
        (span for span in spans if span["row"] == "verify" and _start(span) >= start), key=_start
    )
    end = _start(verify) + verify["dur"]
    inside = [span for span in spans if _start(span) < end and _start(span) + span["dur"] > start]
    # Text as text, not as shapes: a smaller file, which a reader can search.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "spmoe"}):
        _draw(inside, start, end, title).savefig(picture, transparent=True, metadata={"Date": None})


def _start(span: dict[str, Any]) -> float:
    return float(span["ts"])


def _layer(span: dict[str, Any]) -> int | None:
    """Return the layer that a span's name begins with: "layer 3" or "L3 expert 5"."""
    first, _, rest = span["name"].partition(" ")
    if first == "layer":
        return int(rest)
    return int(first[1:]) if first[:1] == "L" else None


def _draw(spans: list[dict[str, Any]], start: float, end: float, title: str) -> Figure:
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots()
    depth = max((_layer(span) or 0 for span in spans), default=0)
    shade = Normalize(0, max(depth, 1))
    for span in spans:
        row = len(_ROWS) - 1 - _ROWS.index(span["row"])
        left = max(_start(span), start)
        width = min(_start(span) + span["dur"], end) - left
        layer = _layer(span)
        colour = PHASE if layer is None else COLOURS(shade(layer))
        axes.barh(
            row, width / 1e3, left=(left - start) / 1e3, height=0.8, color=colour, linewidth=0
        )
        if layer is None:
            axes.text(
                (left - start + width / 2) / 1e3,
                row,
                span["name"],
                ha="center",
                va="center",
                fontsize=8,
                color="white",
            )
    axes.set_yticks(range(len(_ROWS)), reversed(_ROWS))
    axes.set_ylim(-0.6, len(_ROWS) - 0.4)
    axes.set_xlim(0, (end - start) / 1e3)
    axes.set_xlabel("time since the iteration began, ms", color=TEXT)
    axes.set_title(title, fontsize=9, color=TEXT)
    axes.tick_params(colors=TEXT)
    for side in axes.spines.values():
        side.set_color(TEXT)
    bar = figure.colorbar(ScalarMappable(shade, COLOURS), ax=axes)
    bar.set_label("layer of the target", color=TEXT)
    bar.ax.tick_params(colors=TEXT)
    bar.outline.set_edgecolor(TEXT)
    return figure


if __name__ == "__main__":
    main()
