"""Time per token over the cutoff layer: how deep drafting should prefetch.

Forces each cutoff layer on `sp-moe` in turn and prints the curve, with the layers that the rules
choose: our latency model and the paper's two inequalities. Source: SP-MoE, arXiv:2510.10302,
section 3.2 and its figure of TPOT against L.

    python bench/python/cutoff_sweep.py --demo --link-gbps 2 --plot sweep.svg
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, get_args

import click
from matplotlib.figure import Figure

from spmoe.bench.bounds import link_peak_gbps
from spmoe.bench.cell import Cell, Models, Tally, load_models, open_engine, run_prompt
from spmoe.cli.options import find_models, link_option, pair_options
from spmoe.cli.progress import progress_bar
from spmoe.decoding.planner import CutoffRule
from spmoe.prompts import select_prompts
from spmoe.settings import Settings
from spmoe.system.machine import cpu_model

RULES: tuple[CutoffRule, ...] = get_args(CutoffRule)


@click.command()
@pair_options
@link_option
@click.option("--expert-memory", default="25%", show_default=True)
@click.option("--draft-length", default=4, show_default=True)
@click.option("--step", default=3, show_default=True, help="Between forced cutoff layers.")
@click.option("--prompts", default="own:0:2", show_default=True)
@click.option("--max-new-tokens", "-n", default=48, show_default=True)
@click.option("--repeats", default=2, show_default=True)
@click.option("--md", type=click.Path(path_type=Path), help="The table in Markdown.")
@click.option("--plot", type=click.Path(path_type=Path), help="The curve, a picture.")
def main(**flags: Any) -> None:
    """Force every STEP-th cutoff layer on sp-moe and print time per token."""
    target, draft = find_models(**flags)
    settings = Settings(dtype=flags["dtype"] or "float32", link_gbps=flags["link_gbps"])
    models = load_models(target, draft, settings)
    layers = len(models.target.moe_layers)
    cutoffs: list[int | CutoffRule] = [*range(0, layers, flags["step"]), layers, *RULES]
    prompts = select_prompts(flags["prompts"])
    tallies: dict[int | CutoffRule, Tally] = {cutoff: Tally() for cutoff in cutoffs}
    chosen: dict[int | CutoffRule, list[int]] = {rule: [] for rule in RULES}
    runs = [(p, cutoff) for _ in range(flags["repeats"]) for p in prompts for cutoff in cutoffs]
    with progress_bar(quiet=False) as progress:
        for number, (prompt, cutoff) in enumerate(runs):
            layers_used = _run(models, prompt.text, cutoff, tallies[cutoff], flags)
            if cutoff in chosen:
                chosen[cutoff] += layers_used
            progress(f"cutoff layer {cutoff}", number, len(runs))
    peak = link_peak_gbps(models)
    text = _table(tallies, chosen, layers)
    paced = " (paced)" if flags["link_gbps"] else ""
    caption = (
        f"{cpu_model()}; link {peak:.2f} GB/s{paced}; sp-moe, expert memory "
        f"{flags['expert_memory']}, {flags['draft_length']} drafted"
    )
    click.echo(f"{caption}\n\n{text}")
    if flags["md"]:
        flags["md"].write_text(f"{caption}\n\n{text}\n")
    if flags["plot"]:
        _plot(flags["plot"], tallies, chosen, caption)


def _run(
    models: Models, text: str, cutoff: int | CutoffRule, tally: Tally, flags: dict[str, Any]
) -> list[int]:
    """Decode one prompt with a forced cutoff layer or by a rule; return the layers used."""
    cell = Cell("sp-moe", "auto", flags["expert_memory"], flags["draft_length"])
    used: list[int] = []
    with open_engine(models, cell, paced=True) as engine:
        if isinstance(cutoff, int):
            engine.cutoff_layer = cutoff
        else:
            engine.planner.cutoff_rule = cutoff
        set_limits = engine.runtime.set_limits

        def remember(**limits: Any) -> None:
            used.append(limits["cutoff_layer"])
            set_limits(**limits)

        engine.runtime.set_limits = remember
        run_prompt(engine, engine.encode(text), flags["max_new_tokens"], tally)
    return used


def _tpot_ms(tally: Tally) -> float:
    return statistics.fmean(tally.token_s) * 1e3


def _table(
    tallies: dict[int | CutoffRule, Tally], chosen: dict[int | CutoffRule, list[int]], layers: int
) -> str:
    lines = ["| cutoff layer | TPOT ms | MB/token | stall ms |", "| --- | --- | --- | --- |"]
    for cutoff, tally in tallies.items():
        tokens = len(tally.token_s)
        name = str(cutoff)
        if used := chosen.get(cutoff):
            mean = statistics.fmean(used)
            name += f": {min(used)} to {max(used)}, mean {mean:.1f} of {layers}"
        lines.append(
            f"| {name} | {_tpot_ms(tally):.1f} | {tally.counters.link_bytes / tokens / 1e6:.1f} "
            f"| {tally.counters.stall_s / tokens * 1e3:.1f} |"
        )
    return "\n".join(lines)


def _plot(
    path: Path,
    tallies: dict[int | CutoffRule, Tally],
    chosen: dict[int | CutoffRule, list[int]],
    caption: str,
) -> None:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    forced = [cutoff for cutoff in tallies if cutoff not in chosen]
    axes.plot(forced, [_tpot_ms(tallies[layer]) for layer in forced], marker="o")
    for rule, used in chosen.items():
        mean = statistics.fmean(used)
        axes.errorbar(
            [mean],
            [_tpot_ms(tallies[rule])],
            xerr=[[mean - min(used)], [max(used) - mean]],
            fmt="s",
            capsize=3,
            label=rule,
        )
    axes.set_xlabel("cutoff layer")
    axes.set_ylabel("time per output token, ms")
    axes.set_ylim(bottom=0)
    axes.set_title(caption, fontsize=7)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
