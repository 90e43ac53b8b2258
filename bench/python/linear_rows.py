"""Which matrix product suits a few rows on this machine?

Prints GB of weights a second of torch's linear layer and of the turned product of
`spmoe.models.linear`, by rows, for weights of some shapes.

    python bench/python/linear_rows.py [--shapes 576x576,49152x576] [--mib 64] [--json F]
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import click
import torch

from spmoe.models.linear import Product, pass_seconds, turned_product, usual_product

ROWS = (1, 2, 3, 5, 9)


def measure(product: Product, weights: list[torch.Tensor], rows: int, repeats: int) -> float:
    """Return 10^9 bytes a second: the median over passes through all of ``weights``."""
    x = torch.randn(rows, weights[0].shape[1]).to(weights[0].dtype)
    seconds = [pass_seconds(product, weights, x) for _ in range(repeats + 1)]
    bytes_read = sum(weight.numel() * weight.element_size() for weight in weights)
    return bytes_read / statistics.median(seconds[1:]) / 1e9  # the first one prepares


@click.command()
@click.option("--shapes", default="576x576,1536x576,576x1536,49152x576", help="out x in, ...")
@click.option("--mib", default=64, help="Weights of each shape, together, at least.")
@click.option("--repeats", default=9)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(shapes: str, mib: int, repeats: int, json_file: Path | None) -> None:
    """Print a table of shapes and rows."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    rows = []
    for shape in shapes.split(","):
        out, inner = map(int, shape.split("x"))
        for dtype in (torch.float32, torch.bfloat16):
            size = out * inner * dtype.itemsize
            weights = [
                torch.randn(out, inner).to(dtype) for _ in range(max(1, (mib << 20) // size))
            ]
            for count in ROWS:
                usual, turned = (
                    measure(product, weights, count, repeats)
                    for product in (usual_product, turned_product)
                )
                name = str(dtype).removeprefix("torch.")
                print(
                    f"{shape:>12} {name:>8} rows {count}: {usual:5.1f} GB/s, turned {turned:5.1f}"
                )
                rows.append(
                    {"shape": shape, "dtype": name, "rows": count, "usual_gbps": usual}
                    | {"turned_gbps": turned}
                )
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
