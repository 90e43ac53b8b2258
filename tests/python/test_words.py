"""Comments, docstrings and names of the code use the words of the field, as the documents do."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from plain_words import BANNED_IN_CODE, OPENERS

ROOT = Path(__file__).parents[2]
FOLDERS = ("bench", "csrc", "examples", "python/spmoe", "tests/cpp", "tests/python", "tools")
CPP = {".cpp", ".cu", ".cuh", ".h", ".hpp"}

# Words that are the field's own in a folder: of vector units, tokenizers and pytest.
TERMS = {
    "csrc/compute": r"lanes?",
    "tests/cpp/emulated": r"lanes?",
    "tests/python": r"marks?|word ?piece",
}

BANNED_WORD = re.compile(rf"\b(?:{'|'.join(BANNED_IN_CODE)})\b", re.IGNORECASE)

Found = tuple[int, str]  # line, text


def files() -> list[str]:
    """Return the source files of the folders, as paths from the root."""
    found = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*")))
    return [str(f.relative_to(ROOT)) for f in found if f.suffix in {".py", *CPP}]


def words_of(name: str) -> str:
    """Return the words of a name: kv_cache and KvCache are both "kv cache"."""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)).lower()


def paragraphs(lines: list[Found]) -> Iterator[Found]:
    """Yield comments, those on consecutive lines as one text."""
    for at, (line, text) in enumerate(lines):
        if at == 0 or lines[at - 1][0] != line - 1:
            first, texts = line, []
        texts.append(text.strip(" /<#"))
        if at + 1 == len(lines) or lines[at + 1][0] != line + 1:
            yield first, " ".join(texts)


def python_prose(source: str) -> Iterator[Found]:
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    yield from paragraphs([(t.start[0], t.string) for t in tokens if t.type == tokenize.COMMENT])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def python_names(source: str) -> Iterator[Found]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def cpp_lines(source: str) -> Iterator[tuple[int, str, str]]:
    """Yield line, code and comment; strings are left out."""
    for number, text in enumerate(source.splitlines(), 1):
        code, _, comment = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text).partition("//")
        yield number, code, comment


def prose_of(file: str, source: str) -> Iterator[Found]:
    if file.endswith(".py"):
        return python_prose(source)
    return paragraphs([(line, text) for line, _, text in cpp_lines(source) if text])


def names_of(file: str, source: str) -> Iterator[Found]:
    if file.endswith(".py"):
        return python_names(source)
    return (
        (line, name)
        for line, code, _ in cpp_lines(source)
        for name in re.findall(r"[A-Za-z_]\w*", code)
    )


def faults(file: str, source: str) -> Iterator[str]:
    """Yield what is wrong with the words of a source file."""
    terms = "|".join(term for folder, term in TERMS.items() if file.startswith(folder)) or "(?!)"
    texts = list(prose_of(file, source))
    named = [
        (line, words_of(name)) for line, name in names_of(file, source) if name != "pytestmark"
    ]
    for line, text in (*texts, *named):
        for found in BANNED_WORD.finditer(re.sub(terms, "", text, flags=re.I)):
            better = next(b for w, b in BANNED_IN_CODE.items() if re.fullmatch(w, found[0], re.I))
            yield f'{file}:{line}: "{found[0]}" in "{text[:60]}": say {better}'
    for line, text in texts:
        for opener in re.finditer(rf"(?:^|[.!?]\s+)(?:{'|'.join(OPENERS)})\b[^.?]*([.?]|$)", text):
            if opener[1] != "?":
                yield f'{file}:{line}: "{opener[0]}" has no noun as its subject'


@pytest.mark.parametrize("folder", FOLDERS)
def test_words_of_the_code_are_those_of_the_field(folder: str) -> None:
    checked = [f for f in files() if f.startswith(folder)]
    assert checked
    wrong = [fault for f in checked for fault in faults(f, (ROOT / f).read_text(encoding="utf-8"))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("a.py", "def foretell(): ...\n"),
        ("a.py", "told_layers = 1\n"),
        ("a.py", "x = 1  # of late\n"),
        ("a.py", '"""What a file holds."""\n'),
        ("a.py", "# A copy that is\n# under way.\n"),
        ("a.hpp", "/// A copy. What it moves.\nint x;\n"),
        ("a.hpp", "enum class CopyLane { one };\n"),
        ("a.hpp", "int x;  ///< of the backlog\n"),
    ],
)
def test_a_word_of_the_house_would_be_found(file: str, source: str) -> None:
    assert list(faults(file, source))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("a.py", 'x = "told"\n'),
        ("a.py", '"""What does it cost?"""\n'),
        ("a.hpp", 'auto x = "told";  // text\n'),
        ("csrc/compute/a.cu", "int lane = 0;\n"),
    ],
)
def test_strings_questions_and_terms_are_left_alone(file: str, source: str) -> None:
    assert not list(faults(file, source))
