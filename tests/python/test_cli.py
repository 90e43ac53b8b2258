"""The command line as a user meets it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import spmoe
from spmoe import cli

# The keys that a script may rely on.
GENERATE_KEYS = {
    *("text", "token_ids", "prompt_tokens", "new_tokens", "finish_reason", "ttft_s", "tpot_s"),
    *("tokens_per_s", "iterations", "drafted", "accepted", "acceptance", "hits", "late", "misses"),
    *("hit_rate", "demand_bytes", "prefetch_used_bytes", "prefetch_wasted_bytes"),
    *("bytes_per_token", "stall_s", "link_busy_s", "expert_memory_bytes", "expert_total_bytes"),
    *("pinned_bytes", "pinned_gbps", "device"),
    "peak_rss_bytes",
}


@pytest.fixture
def model(target_path: Path) -> list[object]:
    return [target_path, "--draft-model", target_path, "--expert-memory", "50%"]


def test_text_goes_to_output_and_the_table_to_errors(run, model) -> None:
    found = run("generate", *model, "-p", "Hello", "-n", 8)
    assert found.status == 0
    assert len(found.out) > 1
    for row in ("time to first token", "time per output token", "acceptance", "expert memory"):
        assert row in found.err
        assert row not in found.out


def test_quiet_prints_the_text_alone(run, model) -> None:
    found = run("generate", *model, "-p", "Hello", "-n", 8, "--quiet")
    assert found.err == ""
    assert found.out == run("generate", *model, "-p", "Hello", "-n", 8).out


def test_json_is_one_object_with_the_agreed_keys(run, model) -> None:
    found = run("generate", *model, "-p", "Hello", "-n", 8, "--json", "--draft-length", 4)
    figures = json.loads(found.out)
    assert figures.keys() >= GENERATE_KEYS
    assert (figures["prompt_tokens"], figures["new_tokens"]) == (5, 8)
    assert figures["drafted"] > 0
    assert found.err == ""


def test_speculation_can_be_turned_off_and_changes_no_token(run, model) -> None:
    with_draft = json.loads(run("generate", *model, "-p", "Hello", "-n", 8, "--json").out)
    without = json.loads(
        run("generate", *model, "-p", "Hello", "-n", 8, "--json", "--no-speculation").out
    )
    assert without["drafted"] == 0
    assert without["token_ids"] == with_draft["token_ids"]


def test_a_prompt_may_come_from_a_file(run, model, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Hello")
    found = run("generate", *model, "-f", file, "-n", 8, "--quiet")
    assert found.out == run("generate", *model, "-p", "Hello", "-n", 8, "--quiet").out


def test_every_flag_has_an_environment_twin(run, target_path: Path) -> None:
    found = run(
        "generate",
        target_path,
        SPMOE_PROMPT="Hello",
        SPMOE_MAX_NEW_TOKENS="3",
        SPMOE_EXPERT_MEMORY="100%",
        SPMOE_JSON="1",
    )
    figures = json.loads(found.out)
    assert figures["new_tokens"] == 3
    assert figures["expert_memory_bytes"] == figures["expert_total_bytes"]
    for verb, parameter in options():
        flag = parameter.opts[0].removeprefix("--").replace("-", "_").upper()
        assert parameter.envvar in (f"SPMOE_{flag}", f"SPMOE_{verb.upper()}_{flag}")


def options() -> Iterator[tuple[str, click.Parameter]]:
    for verb, command in cli.cli.commands.items():
        yield from ((verb, p) for p in command.params if isinstance(p, click.Option))


def test_an_environment_twin_means_the_same_to_every_verb() -> None:
    meanings: dict[str, set[tuple[object, ...]]] = {}
    for _, parameter in options():
        kind = (parameter.type.name, parameter.is_flag, parameter.multiple, parameter.nargs)
        meanings.setdefault(str(parameter.envvar), set()).add(kind)
    assert [twin for twin, kinds in meanings.items() if len(kinds) > 1] == []
    ambiguous = {twin for twin in meanings if re.match("SPMOE_(BENCH|VERIFY|PROFILE)_", twin)}
    documented = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    assert ambiguous
    assert all(f"`{twin}`" in documented for twin in ambiguous)
    written = set(re.findall("`(SPMOE_[A-Z_]+)`", documented)) - {"SPMOE_CACHE"}
    assert written <= meanings.keys()


@pytest.mark.parametrize("stop", ["two words", "\n", " "])
def test_the_twin_of_stop_holds_one_string(
    run, target_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    asked: list[object] = []
    plain = spmoe.Engine.generate

    def generate(engine: spmoe.Engine, prompt: str, **settings: object) -> object:
        asked.append(settings["stop"])
        return plain(engine, prompt, **settings)

    monkeypatch.setattr(spmoe.Engine, "generate", generate)
    command = ("generate", target_path, "-p", "Hello", "-n", 2, "--json", "--policy", "on-demand")
    assert run(*command, SPMOE_STOP=stop).status == 0
    assert run(*command, "--stop", "a", "--stop", "b c").status == 0
    assert asked == [(stop,), ("a", "b c")]


def test_verify_reports_identical_texts(run, model) -> None:
    found = run("verify", *model, "--prompts", 2, "-n", 6, "--json")
    outcome = json.loads(found.out)
    assert found.status == 0
    assert (outcome["identical"], outcome["total"], outcome["new_tokens"]) == (2, 2, 12)
    assert outcome["first_difference"] is None
    assert run("verify", *model, "--prompts", 2, "-n", 6).out.startswith("2 of 2 identical")


def test_verify_shows_the_first_difference_and_fails(
    run, model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import spmoe.bench.verification as verification  # noqa: PLR0402

    alone = verification.generate_alone

    def wrong(*arguments):
        """The target alone, with its two likeliest tokens exchanged everywhere."""
        _, scores = alone(*arguments)
        first, second = scores.topk(2).indices.T
        rows = range(len(scores))
        scores[rows, first], scores[rows, second] = scores[rows, second], scores[rows, first]
        return second.tolist(), scores

    monkeypatch.setattr(verification, "generate_alone", wrong)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Hello\n\nWorld\n")
    found = run("verify", *model, "--prompts-file", prompts, "-n", 4, "--json")
    outcome = json.loads(found.out)
    assert found.status == 1
    assert (outcome["identical"], outcome["total"]) == (0, 2)
    first = outcome["first_difference"]
    assert (first["prompt"], first["position"]) == (0, 0)
    assert len(first["expected"]) == len(first["found"]) == 2
    assert first["expected"][0]["token_id"] != first["found"][0]["token_id"]


def test_help_names_every_verb(run) -> None:
    text = run("--help").out
    assert all(verb in text for verb in ("generate", "verify", "bench", "demo", "doctor"))
