"""What does it save to predict experts? Policies beside each other, over a link of a given rate.

Runs the built-in pair on this machine. Each policy decodes the same prompt with the same kernels,
the same draft and a cold cache; they differ in when experts are fetched.

python examples/compare_policies.py [--tokens N]
"""

import argparse

from rich.console import Console
from rich.table import Table

from spmoe.bench import bench
from spmoe.cli.progress import progress_bar
from spmoe.demo.pair import ensure_pair
from spmoe.prompts import load_prompts

LINK_GBPS = 1.0  # slower than two cores compute, as a PCIe link is beside a GPU
MEMORY = "50%"
DRAFT_LENGTH = 4
FETCHED = {
    "on-demand": "when their layer runs",
    "sp-moe": "on the draft's predictions, up to a cutoff layer",
    "horizon": "on the draft's predictions, by deadline and probability",
}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--tokens", type=int, default=24, help="new tokens of each run")
tokens = parser.parse_args().tokens

with progress_bar(quiet=False) as progress:
    pair = ensure_pair("8x", progress=progress)
    result = bench(
        pair.target,
        pair.draft,
        load_prompts()[:1],
        policies=tuple(FETCHED),
        expert_memory=[MEMORY],
        draft_lengths=[DRAFT_LENGTH],
        max_new_tokens=tokens,
        repeats=1,
        link_gbps=LINK_GBPS,
        device="host",
        progress=progress,
    )

machine = result["machine"]
print(
    f"Built-in pair, {MEMORY} of its experts in memory, {DRAFT_LENGTH} tokens drafted an "
    f"iteration, {tokens} tokens after one prompt.\n"
    f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}; the link from RAM is "
    f"paced to {LINK_GBPS:g} GB/s (measured: {result['link_peak_gbps']:.2f})."
)
table = Table("policy", "experts are fetched", "ms a token", "MB a token", "waits, ms a token")
for row in result["rows"]:
    table.add_row(
        row["policy"],
        FETCHED[row["policy"]],
        f"{row['tpot_s']['mean'] * 1e3:.0f}",
        f"{row['bytes_per_token'] / 1e6:.0f}",
        f"{row['stall_s_per_token'] * 1e3:.0f}",
    )
Console(width=100).print(table)
same = all(row["identical"] for row in result["rows"])
print(
    "Every policy wrote the tokens of the target alone."
    if same
    else "A policy wrote other tokens than the target alone: please report it."
)
raise SystemExit(0 if same else 1)
