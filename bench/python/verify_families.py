"""Does every model family write what `model.generate` writes, drafted? The table of docs/models.md.

Makes a tiny random checkpoint of each family that the tests hold to the contract, in float32, and
runs `spmoe.verify` on it with two drafts: a copy of the target that cannot propose every third
token (most proposals are right), and a dense one-layer model (nearly none is).

    python bench/python/verify_families.py --md docs/models.md
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import transformers
from safetensors.torch import load_file, save_file

import spmoe
from spmoe.cli.progress import progress_bar
from spmoe.models.cache_support import cache_support
from spmoe.models.loading import load_plain, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "python"))
from families import ALL_FAMILIES, make_checkpoint, make_dense_draft

BEGIN, END = "<!-- verify_families.py: begin -->\n", "<!-- verify_families.py: end -->\n"
PROMPTS = [list(b"Once upon a time there was a disk"), list(b"def add(a, b):\n    ")]
WAYS = {
    "crop": "cut off",
    "restore": "state restored",
    "restart": "read again",
}


@dataclass(frozen=True)
class Row:
    """One family."""

    family: str
    way: str
    likely: spmoe.Verification
    unlikely: spmoe.Verification


@click.command()
@click.option("--new-tokens", "-n", default=48, show_default=True, help="Of each text.")
@click.option("--draft-length", default=4, show_default=True)
@click.option("--family", multiple=True, type=click.Choice(sorted(ALL_FAMILIES)), help="Only it.")
@click.option("--md", type=click.Path(path_type=Path), help="Put the table into this document.")
def main(new_tokens: int, draft_length: int, family: tuple[str, ...], md: Path | None) -> None:
    """Verify each family and print the table; exit with 1 if a text differs."""
    torch.set_num_threads(1)  # models so small wait for threads longer than they compute
    rows = []
    names = family or tuple(ALL_FAMILIES)
    with tempfile.TemporaryDirectory() as folder, progress_bar(quiet=False) as progress:
        for number, name in enumerate(names):
            progress(name, number, len(names))
            target = make_checkpoint(name, Path(folder) / name)
            copy = forgetful_copy(name, Path(folder) / f"{name}-draft")
            dense = make_dense_draft(Path(folder) / f"{name}-dense")
            # Some families' tokenizer classes add a token of their own.
            load_tokenizer(target).save_pretrained(dense)
            outcomes = [
                spmoe.verify(
                    target,
                    draft,
                    PROMPTS,
                    max_new_tokens=new_tokens,
                    draft_length=draft_length,
                    expert_memory="50%",
                )
                for draft in (copy, dense)
            ]
            support = cache_support(load_plain(target))
            way = WAYS[support.rewind] if support.several else "decodes plainly"
            rows.append(Row(name, way, *outcomes))
    table = markdown(rows, new_tokens)
    print(table)
    if md is not None:
        text = md.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        md.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    same = all(
        outcome.identical == outcome.total for row in rows for outcome in (row.likely, row.unlikely)
    )
    sys.exit(0 if same else 1)


def forgetful_copy(family: str, path: Path) -> Path:
    """Write a copy of the family's checkpoint that gives every third token the logit 0."""
    make_checkpoint(family, path)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if name.endswith("lm_head.weight"):
                tensors[name][::3] = 0
        save_file(tensors, file, metadata={"format": "pt"})
    return path


def markdown(rows: list[Row], new_tokens: int) -> str:
    """Return the table, with what it was made with above it."""

    def accepted(outcome: spmoe.Verification) -> str:
        return f"{outcome.accepted} of {outcome.drafted}" if outcome.drafted else "none drafted"

    def identical(row: Row) -> str:
        both = (row.likely, row.unlikely)
        return f"{sum(o.identical for o in both)} of {sum(o.total for o in both)}"

    lines = [
        f"torch {torch.__version__}, transformers {transformers.__version__}, float32, "
        f"{len(PROMPTS)} prompts a draft, {new_tokens} tokens a text at most.",
        "",
        "| family | rejected tokens | accepted, a copy drafts | accepted, a dense model drafts | "
        "texts identical |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.family} | {row.way} | {accepted(row.likely)} | {accepted(row.unlikely)} | "
        f"{identical(row)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
