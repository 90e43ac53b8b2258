"""Damaged metadata: refused in spmoe's own words, with the file and the cure, or harmless."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_checkpoint
from spmoe.errors import CheckpointError, Error, InvalidArgument, OutOfMemory
from spmoe.models.blame import blaming
from spmoe.models.cache_support import cache_support
from spmoe.models.experts import attach
from spmoe.models.loading import load_draft, load_target, load_tokenizer

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
DEEP = "[" * 100_000
PROMPT = torch.tensor([[1, 2, 3, 4]])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint("mixtral", tmp_path_factory.mktemp("good"))
    assert {file.name for file in path.iterdir()} >= {CONFIG, GENERATION, TOKENIZER, INDEX}
    return path


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to damage."""
    return Path(shutil.copytree(good, tmp_path / "model"))


def load_all(model: Path) -> None:
    """Read the model as a target, with its tokenizer, and as a draft; run both a little."""
    target = load_target(model)
    load_tokenizer(model)("some text")
    draft = load_draft(model)
    for loaded in (target.model, draft):
        cache_support(loaded)  # as `spmoe.load` does; reports what their code raises
    with torch.inference_mode(), target.open_runtime(expert_memory="100%") as runtime:
        attach(target, runtime)
        assert target.model(PROMPT).logits.shape == draft(PROMPT).logits.shape


@pytest.mark.parametrize("file", [CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, INDEX])
@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "[1]", "5", '"x"', DEEP, "\xff\xfe{}", "\0"]
)
def test_a_file_that_is_no_json_object_is_named(model: Path, file: str, text: str) -> None:
    (model / file).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"{file}.*(copy|download)"):
        load_all(model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_local_experts", "8"),
        ("num_hidden_layers", 10**9),
        ("num_local_experts", -1),
        ("num_experts_per_tok", 99),
        ("hidden_size", 0),
        ("hidden_size", -64),
        ("hidden_size", 10**9),
        ("hidden_size", None),
        ("hidden_act", "nope"),
        ("vocab_size", -5),
        ("num_attention_heads", 0),
        ("num_attention_heads", 1.5),
        ("num_key_value_heads", 3),
        ("rope_parameters", {"rope_type": "nope"}),
        ("rope_parameters", 7),
        ("dtype", "nope"),
        ("max_position_embeddings", "x"),
        ("max_position_embeddings", None),
        ("eos_token_id", "x"),
        ("model_type", "nope"),
        ("model_type", 3),
        ("transformers_weights", "absent.safetensors"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(model: Path, field: str, value: Any) -> None:
    kept = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps(kept | {field: value}))
    with pytest.raises(CheckpointError, match=r"config.json|absent.safetensors"):
        load_all(model)


@pytest.mark.parametrize("value", ["x", [[257]], {"a": 1}, -1, 2.5, [True]])
def test_an_end_of_text_that_is_no_token_is_refused(model: Path, value: Any) -> None:
    (model / GENERATION).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config.json .*or remove it"):
        load_target(model)


def truncated(text: bytes, random: random.Random) -> bytes:
    return text[: random.randrange(len(text))]


def flipped(text: bytes, random: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(random.randint(1, 4)):
        changed[random.randrange(min(len(text), 4000))] = random.randrange(256)
    return bytes(changed)


def replaced(text: bytes, random: random.Random) -> bytes:
    """Give one value anywhere in the JSON another type or an absurd size."""
    kept = json.loads(text)
    places: list[tuple[Any, Any]] = []
    inside = [kept]
    while inside:
        part = inside.pop()
        keys = list(part if isinstance(part, dict) else range(len(part)))
        places += [(part, key) for key in keys]
        inside += [part[key] for key in keys if isinstance(part[key], dict | list)]
    values: list[Any] = [None, True, 0, -1, 3, 1.5, 1e308, "", "x", "x" * 5000, [], {}, [[]]]
    values += [{"a": None}, [None] * 9, "../x", float("nan")]
    part, key = random.choice(places[:400])
    if isinstance(part, dict) and random.random() < 0.2:
        del part[key]
    else:
        part[key] = copy.deepcopy(random.choice(values))
    return json.dumps(kept).encode()


DAMAGE = [truncated, flipped, replaced]


def damaged_copies(good: Path, at: Path, seed: int, rounds: int) -> Iterator[tuple[Path, str]]:
    """Damage one file at a time, at random; yield the model and what was done."""
    choice = random.Random(seed)
    model = Path(shutil.copytree(good, at))
    files = [CONFIG, GENERATION, TOKENIZER, TOKENIZER_CONFIG, INDEX]
    shards = sorted(file.name for file in good.glob("*.safetensors"))
    for round_ in range(rounds):
        file = (files * 3 + [choice.choice(shards)])[round_ % (len(files) * 3 + 1)]
        damage = choice.choice(DAMAGE[: 2 if file in shards else 3])
        whole = (good / file).read_bytes()
        (model / file).write_bytes(damage(whole, choice))
        yield model, f"seed {seed}, round {round_}: {file} {damage.__name__}"
        (model / file).write_bytes(whole)


def check_damaged_models_load_or_are_refused(good: Path, at: Path, rounds: int) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    texts: list[str] = []
    for model, what in damaged_copies(good, at, seed, rounds):
        try:
            load_all(model)
        except Error as error:
            texts.append(str(error))
        except BaseException as error:
            raise AssertionError(f"{what} ended in {error!r}") from error
    assert texts
    assert all(texts)


@pytest.mark.filterwarnings("ignore")  # of transformers, about what it reads
def test_a_model_that_is_damaged_at_random_loads_or_is_refused(good: Path, tmp_path: Path) -> None:
    check_damaged_models_load_or_are_refused(good, tmp_path / "model", rounds=32)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_models_that_are_damaged_at_random_load_or_are_refused(
    good: Path, tmp_path: Path
) -> None:
    check_damaged_models_load_or_are_refused(good, tmp_path / "model", rounds=400)


def test_a_limit_of_open_files_is_named(good: Path) -> None:
    load_all(good)  # every module that loading imports is there
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    refused: list[str] = []
    try:
        for limit in range(opened, opened + 16):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
            try:
                load_target(good)
                load_draft(good)
            except CheckpointError as error:
                refused.append(str(error))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert refused
    assert all("ulimit -n" in message for message in refused)


class PanicException(BaseException):
    """As tokenizers raises where its Rust panics."""


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (KeyError("x"), CheckpointError),
        (RecursionError(), CheckpointError),
        (PanicException("unwrap"), CheckpointError),
        (OSError(24, "Too many open files"), CheckpointError),
        (InvalidArgument("quantized"), InvalidArgument),
        (MemoryError(), OutOfMemory),
        (torch.OutOfMemoryError("CUDA"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(1), SystemExit),
    ],
)
def test_what_libraries_raise_is_translated(
    raised: BaseException, expected: type[BaseException]
) -> None:
    with pytest.raises(expected) as caught, blaming(lambda reason: f"x.json is damaged ({reason})"):
        raise raised
    assert type(caught.value) is expected
    if expected is CheckpointError:
        assert caught.value.__cause__ is raised
        assert type(raised).__name__ in str(caught.value)
