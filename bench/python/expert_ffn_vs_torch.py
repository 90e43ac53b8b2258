"""How fast do spmoe's kernels run one resident expert over a few rows, against torch's?

Prints GB of weights a second, by rows, of `spmoe.Runtime.forward` with every expert resident, and
of torch's two matrix products and SiLU over as many weights of the same shape and dtype: the
experts of one layer in turn, on the same machine, in the same run. Other work of forward, such as
reading the router's choice back, is counted. On a processor that others use too, set
OMP_WAIT_POLICY=PASSIVE, or torch's threads wait for each other.

    python bench/python/expert_ffn_vs_torch.py qwen3-30b-a3b [--device cuda:0] [--json F]
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch.nn.functional import linear, silu

import spmoe
from spmoe.runtime import Runtime
from spmoe.system.devices import device_model, native_name, resolve_device
from spmoe.system.machine import cpu_model
from synthetic_checkpoint import SHAPES, expert_format, make_config, write_checkpoint

ROWS = (1, 2, 4, 8, 16, 32)


def pass_seconds(run: Callable[[int], torch.Tensor], experts: int, device: torch.device) -> float:
    """Return how long ``run`` takes over all experts, one after the other."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for expert in range(experts):
        run(expert)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(runtime: Runtime, repeats: int) -> list[dict[str, float]]:
    """Return rows of the table: rows of input, and GB/s of spmoe and torch."""
    store, device = runtime.store, runtime.device
    shape = (store.expert_count, 2 * store.inter, store.hidden)
    gate_up = torch.randn(shape, device=device, dtype=torch.bfloat16).mul_(0.02)
    down = torch.randn(shape[0], store.hidden, store.inter, device=device).mul_(0.02).bfloat16()
    table = []
    for rows in ROWS:
        x = torch.randn(rows, store.hidden, device=device, dtype=torch.bfloat16)
        weights = torch.ones(rows, 1, device=device)
        chosen = [torch.full((rows, 1), e, device=device) for e in range(store.expert_count)]

        def ours(expert: int) -> torch.Tensor:
            return runtime.forward(0, x, chosen[expert], weights)  # noqa: B023

        def torchs(expert: int) -> torch.Tensor:
            gate, up = linear(x, gate_up[expert]).chunk(2, dim=-1)  # noqa: B023
            return linear(silu(gate) * up, down[expert])

        found: dict[str, float] = {"rows": rows}
        for name, run in (("spmoe_gbps", ours), ("torch_gbps", torchs)):
            seconds = [pass_seconds(run, store.expert_count, device) for _ in range(repeats + 1)]
            total = store.blob_bytes * store.expert_count
            found[name] = total / statistics.median(seconds[1:]) / 1e9  # the first one fills
        table.append(found)
    return table


@click.command()
@click.argument("shape", type=click.Choice(sorted(SHAPES)))
@click.option("--device", default="host")
@click.option("--shrink", default=1, help="Divides the widths, for trials.")
@click.option("--repeats", default=9)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(shape: str, device: str, shrink: int, repeats: int, json_file: Path | None) -> None:
    """Print a table of rows for the experts of SHAPE."""
    chosen = resolve_device(device)
    processor = cpu_model() if chosen.type == "cpu" else device_model(native_name(chosen))
    config = make_config(shape, layers=1, shrink=shrink)
    experts = expert_format(config)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_checkpoint(model, config)
        files = sorted(model.glob("*.safetensors"))
        store = spmoe.open_store(files, interleaved=experts.interleaved)
        with Runtime(
            store,
            expert_memory="100%",
            experts_per_token=1,
            activation=experts.activation.name,
            alpha=experts.activation.alpha,
            limit=experts.activation.limit,
            device=native_name(chosen),
        ) as runtime:
            table = measure(runtime, repeats)
    print(f"{shape}, widths / {shrink}, {store.expert_count} experts, bfloat16; {processor}")
    for row in table:
        print(
            f"rows {row['rows']:2}: spmoe {row['spmoe_gbps']:7.1f} GB/s, "
            f"torch {row['torch_gbps']:7.1f} GB/s"
        )
    if json_file is not None:
        result = {"shape": shape, "shrink": shrink, "processor": processor, "rows": table}
        json_file.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
