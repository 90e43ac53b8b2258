"""The documents: links lead somewhere, fields and messages are the code's, words are plain."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgb

import draw_timeline
from plain_words import BANNED, OPENERS
from spmoe.bench.verification import Difference, Verification
from spmoe.costs.costs import Costs
from spmoe.costs.profile import Fingerprint
from spmoe.doctor.link import Link
from spmoe.doctor.report import Report
from spmoe.reporting.metrics import Metrics
from spmoe.system.machine import Memory, Processor, System

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
assert _spec is not None
assert _spec.loader is not None
build_docs: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build_docs)

DOCUMENTS = build_docs.documents(ROOT)
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]

_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


def read(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def prose(document: Path) -> str:
    """Return a document's text; code and the targets of links are left out."""
    text = _COMMENT.sub("", _CODE.sub("...", read(document)))
    return re.sub(r"\]\([^)]*\)", "]", text)


def sentences(document: Path) -> Iterator[str]:
    """Yield the sentences of a document; a cell of a table and an item of a list each begin one."""
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-|#]|\d+\.) )|\|", prose(document)):
        text = " ".join(block.split()).lstrip("-#| ")
        text = re.sub(r"^\d+\. ", "", text)
        yield from (part for part in re.split(r"(?<=[.:;?!]) (?=[A-Z*])", text) if part)


def anchors(document: Path) -> set[str]:
    """Return what GitHub and mkdocs name a document's headings."""
    heads = re.findall(r"^#+ (.*)$", _CODE.sub(lambda m: m[0].strip("`"), read(document)), re.M)
    return {re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(name: str) -> None:
    document = ROOT / name
    for link in build_docs.links(read(document)):
        path, _, anchor = link.partition("#")
        if "://" in path:
            continue
        target = (document.parent / path).resolve() if path else document
        assert target.is_file(), f"{name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{name} links to {link}, which has no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_words_are_those_of_the_field(name: str) -> None:
    text = prose(ROOT / name)
    for word, better in BANNED.items():
        found = re.search(rf"\b(?:{word})\b.{{0,40}}", text, re.I | re.S)
        assert found is None, f'{name}: "{found and found[0]}": say {better}'


@pytest.mark.parametrize("name", NAMES)
def test_no_word_stands_twice(name: str) -> None:
    text = re.sub(r"[|*#]|\n\s*\n", " . ", prose(ROOT / name))
    found = re.search(r"\b([a-z]+)\s+\1\b.{0,40}", text, re.I | re.S)
    assert found is None, f'{name}: "{found and found[0]}"'


@pytest.mark.parametrize("name", NAMES)
def test_a_sentence_opens_with_its_subject(name: str) -> None:
    for sentence in sentences(ROOT / name):
        opener = next((word for word in OPENERS if re.match(rf"{word}\b", sentence)), None)
        is_heading = f"# {sentence}" in read(ROOT / name)
        assert opener is None or sentence.endswith("?") or is_heading, f"{name}: {sentence}"


def test_a_banned_word_would_be_found() -> None:
    for text in ("The draft foretold it.", "It is told of.", "The copy has landed.", "of\nlate"):
        assert any(re.search(rf"\b(?:{word})\b", " ".join(text.split()), re.I) for word in BANNED)


def fields_of(section: str) -> set[str]:
    """Return the names in backticks under a heading of docs/json.md."""
    text = read(ROOT / "docs" / "json.md")
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert body is not None
    return set(re.findall(r"`([^`\n]+)`", body[1]))


def names_of(*classes: Any) -> set[str]:
    return {field.name for kind in classes for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("section", "fields"),
    [
        ("generate", names_of(Metrics) | {"text", "token_ids", "load_seconds", "decoded_plainly"}),
        ("verify", names_of(Verification, Difference) | {"proved"}),
        ("profile", names_of(Costs, Fingerprint) | {"spread", "path"}),
        ("doctor", names_of(Report, Processor, Memory, System, Link) | {"cures"}),
    ],
)
def test_every_field_of_json_is_described(section: str, fields: set[str]) -> None:
    assert fields <= fields_of(section)


def test_every_field_of_a_bench_is_described() -> None:
    kept = json.loads((ROOT / "bench" / "results" / "8x-link1.json").read_text(encoding="utf-8"))
    row = kept["rows"][0]
    assert kept.keys() | kept["machine"].keys() | row.keys() | row["tpot_s"].keys() <= fields_of(
        "bench"
    )


def texts_of_the_code() -> Iterator[str]:
    """Yield the string literals of the package, and the source of the core as one text."""
    for file in sorted((ROOT / "python" / "spmoe").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
    for file in sorted((ROOT / "csrc").rglob("*.cpp")):
        # Adjacent literals are one, and so are those with a value between them.
        yield re.sub(r'"\s*(?:\+[^"]*)?"', "", file.read_text(encoding="utf-8"))


def test_messages_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    code = list(texts_of_the_code())
    rows = re.findall(r"^\| `([^`]+)` \|", read(ROOT / "docs" / "troubleshooting.md"), re.M)
    assert len(rows) > 20
    for message in rows:
        for part in re.split(r"<\w+>", message):
            literal = part.strip('" ')
            assert any(literal in text for text in code), f"no code says {literal!r}"


def test_the_tables_of_the_readme_are_those_of_the_results() -> None:
    rows = json.loads((ROOT / "bench" / "results" / "8x-link1.json").read_text())["rows"]
    readme = read(ROOT / "README.md")
    for policy in ("on-demand", "sp-moe", "horizon", "oracle"):
        line = next(text for text in readme.splitlines() if text.startswith(f"| `{policy}`"))
        found = [int(ms) for ms in re.findall(r"\b(\d+) ms", line)]
        wanted = {
            row["expert_memory"]: round(row["tpot_s"]["mean"] * 1e3)
            for row in rows
            if row["policy"] == policy
        }
        assert found == [wanted["25%"], wanted["50%"]]


def contrast(colour: Any, page: str) -> float:
    """Return the contrast ratio of two colours, from 1 to 21, as WCAG 2 defines it."""

    def luminance(of: Any) -> float:
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(of)]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    low, high = sorted((luminance(colour), luminance(page)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])  # GitHub's, light and dark
def test_a_timeline_is_readable_on_light_and_dark_pages(page: str) -> None:
    assert contrast(draw_timeline.TEXT, page) >= 4
    bars = [draw_timeline.COLOURS(share / 16) for share in range(17)]
    assert all(contrast(bar[:3], page) >= 3 for bar in (*bars, (*to_rgb(draw_timeline.PHASE), 1)))


def test_the_site_has_every_document_and_all_that_they_link_to() -> None:
    files = {str(path.relative_to(ROOT)) for path in build_docs.linked_files(ROOT)}
    assert files >= {*NAMES, "docs/iteration.svg", "docs/timeline.svg", "bench/results/8x-link1.md"}
    kept = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {name}\n" in kept for name in NAMES)


def test_a_broken_link_stops_the_build(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("See [there](nowhere.md).")
    with pytest.raises(FileNotFoundError, match=r"README.md links to nowhere\.md"):
        build_docs.linked_files(tmp_path)
    script = tmp_path / "tools" / "build_docs.py"
    script.parent.mkdir()
    script.write_text((ROOT / "tools" / "build_docs.py").read_text())
    ran = subprocess.run([sys.executable, script, "true"], check=False, capture_output=True)
    assert ran.returncode == 1


def steps() -> list[tuple[str, list[str], list[Path]]]:
    """Return the steps of docs/follow-the-code.md: what happens, functions, files."""
    page = ROOT / "docs" / "follow-the-code.md"
    rows = [line.strip("| ").split(" | ") for line in read(page).splitlines() if "](" in line]
    return [
        (
            row[0],
            re.findall(r"`([^`]+)`", row[1]),
            [page.parent / link for link in re.findall(r"\]\(([^)]+)\)", row[2])],
        )
        for row in rows
        if len(row) == 3
    ]


def test_each_step_through_the_code_names_functions_of_the_file_that_it_links() -> None:
    found = steps()
    assert len(found) > 25
    for what, functions, files in found:
        assert functions, what
        text = "\n".join(file.read_text() for file in files)
        for function in functions:
            owner, _, name = function.replace("::", ".").rpartition(".")
            defined = rf"(?:def |[\w>&*\]] (?:{owner}::)?){name}\("
            assert re.search(defined, text), f"{function} is not defined in {files} ({what})"
            assert not owner or re.search(rf"\b{owner}\b", text), f"{owner} is not in {files}"
