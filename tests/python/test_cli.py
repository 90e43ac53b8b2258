"""The command line as a user meets it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

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


class Outcome:
    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object, **environment: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["spmoe", *map(str, arguments)])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return run


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
    for command in cli.cli.commands.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                twin = "SPMOE_" + parameter.opts[0].removeprefix("--").replace("-", "_").upper()
                assert parameter.envvar == twin


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
    import spmoe.verification as verification  # noqa: PLR0402

    class Wrong(verification.CachedCausalLM):
        """The target alone, with two tokens' logits exchanged: another text."""

        def read(self, tokens, *, last=1):
            logits = super().read(tokens, last=last).clone()
            best = logits.argmax(-1)
            logits[range(last), best] -= 1e6
            return logits

    monkeypatch.setattr(verification, "CachedCausalLM", Wrong)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-p", "Hi"], "give either MODEL .* or --demo"),
        (["MODEL"], "give the prompt with either --prompt or --file"),
        (["MODEL", "-p", "Hi", "--temprature", "1"], "No such option '--temprature'"),
        (["MODEL", "-p", "Hi", "-n", "0"], "0 is not in the range"),
        (["MODEL", "-p", "Hi", "--expert-memory", "lots"], "not an amount of memory"),
        (["MODEL", "-p", "Hi", "--expert-memory", "1"], "give at least .* bytes"),
        (["MODEL", "-p", "Hi", "--draft-length", "-3"], 'draft_length must be "auto" or from 0'),
        (["no/such/model", "-p", "Hi"], "neither a directory nor a model"),
        (["MODEL", "-p", ""], "the prompt is empty"),
        (["MODEL", "-p", "Hi", "--demo=64x"], "'64x' is not one of '8x', '32x'"),
    ],
)
def test_a_mistake_is_one_message_with_the_cure(
    run, target_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [str(target_path) if part == "MODEL" else part for part in arguments]
    found = run("generate", *arguments)
    assert found.status in (1, 2)
    assert found.out == ""
    assert "Traceback" not in found.err
    assert re.search(message, found.err), found.err


def test_a_damaged_checkpoint_is_one_message(run, target_path: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(target_path, tmp_path / "broken"))
    next(broken.glob("model-00002*")).unlink()
    found = run("generate", broken, "-p", "Hi")
    assert found.status == 1
    assert found.err.startswith("error: model-00002-of-")
    assert "missing" in found.err


def test_help_names_every_verb(run) -> None:
    text = run("--help").out
    assert all(verb in text for verb in ("generate", "verify", "bench", "demo", "doctor"))
