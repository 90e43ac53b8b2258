"""What do policies, memory and link come to for a model's shape, on this machine or its GPU?

Drives `spmoe.Runtime` alone over random weights. Such weights have no routing of their own, so that
routing, predictions and acceptance come from a statistical model, or from a pair's recording
(`record_routing.py`) that is mapped onto the shape; the caption says from which. Draft and dense
part are slept, for as long as is given. The first request of each row is not counted.

    python bench/python/replay_routing.py mixtral-8x7b --layers 4 --link-gbps 0,2
    python bench/python/replay_routing.py qwen3-30b-a3b --device cuda:0 --draft-ms 4.3
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

import spmoe
from replay import Pace, Replay, Tensors, to_row
from replay_costs import measure_costs
from scripted import ModelShape, Request, RoutingModel, draw, map_recording
from spmoe.cli.options import device_option, pinned_option
from spmoe.cli.progress import progress_bar
from spmoe.config import default_cache, format_bytes, parse_memory
from spmoe.costs.costs import Costs
from spmoe.errors import Error
from spmoe.policies import POLICIES, PROBE
from spmoe.runtime import Runtime
from spmoe.settings import check_dtype
from spmoe.system.devices import device_model, native_name, resolve_device
from spmoe.system.machine import cpu_model, read_memory
from synthetic_checkpoint import SHAPES, expert_format, hub_tensors, make_config, write_checkpoint

FREE_SHARE = 0.8  # of what is free, that --layers fit takes; the rest is for everything else

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "link GB/s": lambda row: f"{row['link_peak_gbps']:.2f}" + (" (paced)" if row["paced"] else ""),
    "policy": lambda row: f"{row['policy']} + {row['eviction']}",
    "memory": lambda row: row["expert_memory"],
    "iteration ms": lambda row: f"{row['iteration_s']['mean'] * 1e3:.1f}",
    "p90": lambda row: f"{row['iteration_s']['p90'] * 1e3:.1f}",
    "ms/token": lambda row: f"{row['tpot_s'] * 1e3:.1f}",
    "hit": lambda row: f"{row['hit_rate']:.1%}",
    "late": lambda row: f"{row['late_rate']:.1%}",
    "recall": lambda row: "-" if row["recall"] is None else f"{row['recall']:.1%}",
    "MB/token": lambda row: f"{row['bytes_per_token'] / 1e6:.1f}",
    "wasted": lambda row: f"{row['wasted_share']:.1%}",
    "link used": lambda row: "-" if row["link_share"] is None else f"{row['link_share']:.1%}",
    "stall": lambda row: f"{row['stall_share']:.1%}",
}


@click.command()
@click.argument("shape", type=click.Choice(list(SHAPES)))
@click.option(
    "--layers",
    default="all",
    show_default=True,
    help="Layers with experts: a number, all, or fit: as many as disk, RAM and device hold.",
)
@click.option("--shrink", type=click.IntRange(min=1), default=1, help="Divides widths, for trials.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Write there, or use what is.")
@device_option
@pinned_option
@click.option("--dtype", default="bfloat16", show_default=True, help="Of activations.")
@click.option("--policies", default="all", show_default=True, help="all, or on-demand,horizon.")
@click.option("--expert-memory", default="10%,25%,50%", show_default=True)
@click.option("--link-gbps", default="0", show_default=True, help="Paces; 0 is unpaced: 0,2.")
@click.option("--requests", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--iterations", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--recording", type=click.Path(path_type=Path, exists=True), help="In place of:")
@click.option("--draft-length", type=click.IntRange(0, 31), default=4, show_default=True)
@click.option(
    "--kept",
    default="0.38:0.54",
    show_default=True,
    help="Of a token's experts, those of the token before, first layer to last. The default is "
    "that of the built-in pair 8x.",
)
@click.option(
    "--acceptance",
    default=0.974,
    show_default=True,
    help="Of a drafted token. The default was published for Mixtral with Mistral-7B "
    "(arXiv:2510.10302).",
)
@click.option("--recall", default=0.957, show_default=True, help="Of the draft; built-in pair 8x.")
@click.option(
    "--target-recall", default=0.876, show_default=True, help="Of the layer before; 8x too."
)
@click.option("--draft-ms", default=0.0, show_default=True, help="Of a draft step, slept.")
@click.option("--dense-ms", default=0.0, show_default=True, help="Of a layer's dense part, slept.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Every figure.")
@click.option("--md", "md_path", type=click.Path(path_type=Path), help="The table in Markdown.")
def main(json_path: Path | None, md_path: Path | None, **flags: Any) -> None:
    """Replay scripted routing over random weights of SHAPE and print a table."""
    try:
        config = make_config(flags["shape"], layers=_layers(flags), shrink=flags["shrink"])
        with progress_bar(quiet=False) as progress, _checkpoint(config, flags, progress) as files:
            result = _run(config, files, flags, progress)
    except Error as error:
        raise click.ClickException(str(error)) from error
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    lines += [[show(row) for show in COLUMNS.values()] for row in result["rows"]]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    text = f"{result['caption']}\n\n{text}\n"
    click.echo(text, nl=False)
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1))
    if md_path is not None:
        md_path.write_text(text)


def _layers(flags: dict[str, Any]) -> int | None:
    """Return how many layers with experts to run; None: all that the model has."""
    text = flags["layers"]
    if text == "fit":
        return fitting_layers(flags)
    if text != "all" and not (text.isdigit() and int(text)):
        raise click.UsageError(f'--layers "{text}" is not a number, all or fit')
    return None if text == "all" else int(text)


def fitting_layers(flags: dict[str, Any]) -> int:
    """Return how many of a shape's layers disk, RAM and device hold at the largest memory.

    Args:
        flags: The options shape, shrink, device, expert_memory and checkpoint.

    Raises:
        Error: They do not hold two.
    """
    one, two = (
        sum(tensor.nbytes for tensor in hub_tensors(config).values())
        for config in (
            make_config(flags["shape"], layers=layers, shrink=flags["shrink"]) for layers in (1, 2)
        )
    )
    layer_bytes = two - one
    memory = flags["expert_memory"].split(",")
    pool_share = max(parse_memory(text, layer_bytes) / layer_bytes for text in memory)
    folder: Path = flags["checkpoint"] or default_cache()
    while not folder.exists():
        folder = folder.parent
    disk_bytes = shutil.disk_usage(folder).free - (one - layer_bytes)
    ram_bytes = read_memory().usable_bytes or 0  # layers rest in the page cache, or pinned
    # Free bytes, and how much of a layer goes there.
    places = [(disk_bytes, 1.0), (ram_bytes, 1.0)]
    device = resolve_device(flags["device"])
    if device.type == "cpu":
        places.append((ram_bytes, 1.0 + pool_share))
    else:
        places.append((torch.cuda.mem_get_info(device)[0], pool_share))
    fitting = min(int(FREE_SHARE * free / share / layer_bytes) for free, share in places)
    if fitting < 2:
        raise Error(
            f"two layers of {flags['shape']} are {format_bytes(2 * layer_bytes)}, for which "
            "disk, RAM or device have no room: choose a smaller shape, or less "
            "--expert-memory"
        )
    return min(fitting, int(SHAPES[flags["shape"]]["layers"]))


@contextmanager
def _checkpoint(config: Any, flags: dict[str, Any], progress: Any) -> Iterator[list[Path]]:
    """Yield the shards of the shape's checkpoint: a temporary one, if no directory is given."""
    directory: Path | None = flags["checkpoint"]
    if directory is not None:
        if not any(directory.glob("*.safetensors")):
            write_checkpoint(directory, config, seed=flags["seed"], progress=progress)
        yield sorted(directory.glob("*.safetensors"))
        return
    default_cache().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="replay-", dir=default_cache()) as place:
        directory = Path(place) / flags["shape"]
        write_checkpoint(directory, config, seed=flags["seed"], progress=progress)
        yield sorted(directory.glob("*.safetensors"))


def _run(
    config: Any, files: Sequence[Path], flags: dict[str, Any], progress: Any
) -> dict[str, Any]:
    experts = expert_format(config)
    store = spmoe.open_store(files, interleaved=experts.interleaved)
    if (store.expert_count, store.hidden, store.inter) != experts.shape:
        raise Error(
            f"{files[0].parent} is not of the shape {flags['shape']}: give another --checkpoint, "
            "or none"
        )
    k = SHAPES[flags["shape"]]["num_experts_per_tok"]
    script, driven_by = _script(ModelShape(store.layer_count, store.expert_count, k), flags)
    where = resolve_device(flags["device"])
    tensors = Tensors(check_dtype(flags["dtype"]) or torch.float32, where)
    pace = Pace(draft_s=flags["draft_ms"] / 1e3, dense_s=flags["dense_ms"] / 1e3)
    policies = POLICIES if flags["policies"] == "all" else flags["policies"].split(",")

    def open_runtime(memory: int | str, link_gbps: float, policy: str) -> Runtime:
        return Runtime(
            store,
            expert_memory=memory,
            experts_per_token=k,
            activation=experts.activation.name,
            alpha=experts.activation.alpha,
            limit=experts.activation.limit,
            device=native_name(where),
            pinned_memory=flags["pinned_memory"],
            link_gbps=link_gbps,
            policy=policy,
            eviction="auto",
        )

    links = [float(gbps) for gbps in flags["link_gbps"].split(",")]
    grid = list(itertools.product(links, flags["expert_memory"].split(","), policies))
    rows: list[dict[str, Any]] = []
    measured: dict[float, tuple[Costs, float]] = {}
    for number, (link_gbps, memory, policy) in enumerate(grid, 1):
        if link_gbps not in measured:
            one_layer = store.expert_count * -(-store.blob_bytes // 256) * 256
            with open_runtime(one_layer, link_gbps, PROBE) as small:
                measured[link_gbps] = measure_costs(
                    small, k, rows=flags["draft_length"] + 1, pace=pace, tensors=tensors
                )
        costs, peak_gbps = measured[link_gbps]
        with open_runtime(memory, link_gbps, policy) as runtime:
            replay = Replay(runtime, experts_per_token=k, costs=costs, pace=pace, tensors=tensors)
            if runtime.traits.replays:
                runtime.replay_routing(
                    [access for request in script for each in request for access in each.accesses()]
                )
            replay.run(script[0])
            with runtime.counting() as used:
                seconds = [s for request in script[1:] for s in replay.run(request)]
            rows.append(
                {"policy": policy, "eviction": runtime.stats(by_layer=False)["eviction"]}
                | {"expert_memory": memory, "expert_memory_bytes": runtime.expert_memory_bytes}
                | {"link_gbps": link_gbps, "paced": bool(link_gbps), "link_peak_gbps": peak_gbps}
                | to_row(seconds, script[1:], used, peak_gbps=peak_gbps)
            )
        progress(f"{policy}, {memory}", number, len(grid))
    return {"caption": _caption(store, flags, driven_by, where), "driven_by": driven_by} | {
        "settings": {name: str(value) for name, value in flags.items() if name != "checkpoint"},
        "rows": rows,
    }


def _script(shape: ModelShape, flags: dict[str, Any]) -> tuple[list[Request], str]:
    """Return the requests, one more than are counted, and what drives them, in words."""
    counts = {"requests": flags["requests"] + 1, "iterations": flags["iterations"]}
    target_recall, seed = flags["target_recall"], flags["seed"]
    if flags["recording"] is not None:
        recording = json.loads(flags["recording"].read_text())
        script = map_recording(recording, shape, target_recall=target_recall, seed=seed, **counts)
        iterations = [iteration for request in script for iteration in request]
        drafted = sum(iteration.drafted for iteration in iterations)
        accepted = sum(iteration.accepted for iteration in iterations)
        return script, (
            f"routing, predictions and acceptance recorded from the pair {recording['pair']} "
            f"({recording['prompts']}, {recording['draft_length']} drafted, "
            f"{accepted / max(1, drafted):.1%} accepted), each of its {recording['experts']} "
            f"experts a group of the model's; layer before predicts {target_recall:.1%}"
        )
    first, _, last = flags["kept"].partition(":")
    model = RoutingModel(
        kept=(float(first), float(last or first)),
        acceptance=flags["acceptance"],
        draft_recall=flags["recall"],
        target_recall=target_recall,
    )
    script = draw(model, shape, draft_length=flags["draft_length"], seed=seed, **counts)
    return script, (
        f"a statistical model: {model.kept[0]:.0%} (first layer) to {model.kept[1]:.0%} (last) of "
        f"a token's experts kept from the token before, the rest uniform; {flags['draft_length']} "
        f"drafted, each accepted with {model.acceptance:.1%}; draft predicts "
        f"{model.draft_recall:.1%}, layer before {target_recall:.1%}"
    )


def _caption(store: Any, flags: dict[str, Any], driven_by: str, device: torch.device) -> str:
    where = f"{cpu_model()}, {torch.get_num_threads()} cores"
    if device.type == "cuda":
        where = f"{device_model(native_name(device))}, experts in page-locked memory: "
        where += str(flags["pinned_memory"])
    shrunk = f", widths divided by {flags['shrink']}" if flags["shrink"] > 1 else ""
    return (
        f"{flags['shape']}{shrunk}, {store.layer_count} MoE layers of {store.expert_count} experts "
        f"of {store.blob_bytes / 1e6:.1f} MB, random weights, {flags['dtype']} activations; "
        f"{where}, torch {torch.__version__}. Driven by {driven_by}. Draft step "
        f"{flags['draft_ms']:g} ms and dense part {flags['dense_ms']:g} ms a layer slept; "
        f"{flags['requests']} requests of up to {flags['iterations']} iterations behind one that "
        "is not counted, no prompt read."
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
