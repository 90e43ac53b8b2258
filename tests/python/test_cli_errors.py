"""Mistakes on the command line: found before anything is loaded, said in one line."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import spmoe
from spmoe.cli.progress import progress_bar
from spmoe.decoding.prior import Choice
from spmoe.policies import EVICTIONS, POLICIES


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading anything fails the test."""

    def load(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(spmoe, "load", load)
    monkeypatch.setattr(spmoe, "verify", load)
    monkeypatch.setattr("spmoe.demo.pair.ensure_pair", load)
    monkeypatch.setattr(spmoe.bench, "bench", load)
    monkeypatch.setattr(spmoe.costs.measure, "make_profile", load)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("generate -p Hi", "give either MODEL .* or --demo"),
        ("generate MODEL --demo -p Hi", "give either MODEL .* or --demo"),
        ("generate MODEL", "give the prompt with either --prompt or --file"),
        ("generate MODEL -p Hi -f FILE", "give the prompt with either --prompt or --file"),
        ("generate MODEL -p Hi --temprature 1", "No such option '--temprature'"),
        ("generate MODEL -p Hi -n 0", "0 is not in the range"),
        ("generate MODEL -p Hi -n 1.5", "'1.5' is not a valid integer"),
        ("generate MODEL -p Hi --expert-memory lots", "not an amount of memory"),
        ("generate MODEL -p Hi --expert-memory -5%", "not an amount of memory"),
        ("generate MODEL -p Hi --pinned-memory much", "not an amount of memory"),
        ("generate MODEL -p Hi --draft-length -3", 'must be "auto" or from 0'),
        ("generate MODEL -p Hi --draft-length 32", 'must be "auto" or from 0'),
        ("generate MODEL -p Hi --policy bogus", "'bogus' is not one of .*'horizon'"),
        ("generate MODEL -p Hi --eviction bogus", "'bogus' is not one of 'auto'.*'lru'"),
        ("generate MODEL -p Hi --dtype int8", "'int8' is not one of 'auto', 'float32'"),
        ("generate MODEL -p Hi --device tpu", 'device "tpu" is not one of auto, host, cuda'),
        ("generate MODEL -p Hi --link-gbps -1", "-1.0 is not in the range"),
        ("generate MODEL -p Hi --seed 99999999999999999999", "is not in the range"),
        ("generate MODEL -p Hi --demo=64x", "'64x' is not one of '8x', '32x'"),
        ("generate MODEL -p ", "the prompt is empty"),
        ("generate MODEL -p caf\udce9", "character 3 is a lone surrogate"),
        ("generate MODEL -f FILE", r"the prompt is not UTF-8 text \(byte 0"),
        ("generate MODEL -f no/such/file", "No such file or directory"),
        ("generate MODEL -p Hi --trace no/such/x.json", "there is no folder no/such; make it"),
        ("generate MODEL -p Hi --trace FOLDER", "File '.*' is a directory"),
        ("generate MODEL -p Hi --trace FILE/x.json", "there is no folder"),
        ("verify MODEL --policy bogus", "'bogus' is not one of"),
        ("verify", "give either MODEL .* or --demo"),
        ("verify MODEL --prompts 99", "99 prompts asked, but there are 20"),
        ("verify MODEL --prompts-file EMPTY", "has no prompt; give one a line"),
        ("verify MODEL --prompts-file FILE", "is not UTF-8 text"),
        ("verify MODEL --prompts-file no/such", "does not exist"),
        ("bench MODEL --policies horizon,bogus", "'bogus' is not one of 'all'"),
        ("bench MODEL --evictions bogus", "'bogus' is not one of 'auto'"),
        ("bench MODEL --expert-memory 10%,lots", "not an amount of memory"),
        ("bench MODEL --expert-memory ,", "give at least one value"),
        ("bench MODEL --draft-length 4,99", 'must be "auto" or from 0'),
        ("bench MODEL --prompts own:7", "has no slice of the form"),
        ("bench MODEL --prompts no/such", "a file of one prompt a line"),
        ("bench MODEL --prompts EMPTY", "has no prompt; give one a line"),
        ("bench MODEL --json no/such/x.json", "there is no folder no/such"),
        ("bench MODEL --csv no/such/x.csv", "there is no folder no/such"),
        ("bench MODEL --md FOLDER", "is a directory"),
        ("bench MODEL --plot no/such/x.png", "there is no folder no/such"),
        ("profile MODEL --expert-memory lots", "not an amount of memory"),
        ("profile MODEL --repeats 1", "1 is not in the range"),
        ("demo 64x", "'64x' is not one of"),
    ],
)
def test_wrong_usage_ends_with_status_2_before_anything_is_loaded(
    run: Any, tmp_path: Path, command: str, message: str
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("\n \n")
    places = {"MODEL": "no/such/model", "FOLDER": tmp_path, "EMPTY": tmp_path / "empty"}
    places["FILE"] = tmp_path / "binary"
    arguments = [re.sub("^[A-Z]+", lambda m: str(places.get(m[0], m[0])), part)
                 for part in command.split(" ")]  # fmt: skip
    found = run(*arguments)
    assert found.status == 2
    assert found.out == ""
    assert "Traceback" not in found.err
    assert re.search(message, " ".join(found.err.split())), found.err


@pytest.mark.usefixtures("nothing_loaded")
def test_a_plot_of_an_unknown_format_is_refused_at_once(run: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    found = run("bench", "MODEL", "--plot", tmp_path / "plot.foo")
    assert found.status == 2
    assert "name a file that ends in" in found.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.usefixtures("nothing_loaded")
def test_a_folder_that_cannot_be_written_to_is_refused(run: Any, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found = run("generate", "MODEL", "-p", "Hi", "--trace", tmp_path / "x.json")
    assert found.status == 2
    assert "cannot be written to" in found.err


def test_help_names_the_choices(run: Any) -> None:
    for verb, choices in (
        ("generate", (*POLICIES, *EVICTIONS)),
        ("bench", (*POLICIES, *EVICTIONS)),
    ):
        text = run(verb, "--help").out
        assert all(choice in text for choice in choices)


@pytest.mark.parametrize(("verb", "status"), [("generate", 1), ("verify", 2)])
def test_an_error_of_a_model_is_one_line(
    run: Any, target_path: Path, tmp_path: Path, verb: str, status: int
) -> None:
    damaged = Path(shutil.copytree(target_path, tmp_path / "damaged"))
    next(damaged.glob("model-00002*")).unlink()
    prompt = ["-p", "Hi"] if verb == "generate" else ["--prompts", "1"]
    for arguments, message in (
        ([target_path, "--expert-memory", "1"], "give at least .* bytes"),
        (["no/such/model"], "neither a directory nor a model"),
        ([damaged], "model-00002-of-.* missing"),
    ):
        found = run(verb, *arguments, *prompt, HF_HUB_OFFLINE="1")
        assert found.status == status
        assert found.out == ""
        assert re.fullmatch(f"error: [^\n]*{message}[^\n]*\n", found.err), found.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: x: No space left"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "error: No space left"),
        (OSError("odd"), 1, "error: odd"),
        (MemoryError(), 1, "error: out of memory"),
        (UnicodeEncodeError("ascii", "日", 0, 1, "no"), 1, "error: .*PYTHONIOENCODING=utf-8"),
        (spmoe.DeviceError("two\nlines"), 1, "error: two lines"),
        (KeyboardInterrupt(), 130, "aborted"),
    ],
)
def test_what_others_raise_is_one_line(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, line: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(spmoe, "load", load)
    found = run("generate", "MODEL", "-p", "Hi")
    assert found.status == status
    assert re.fullmatch(f"{line}[^\n]*", found.err.strip()), found.err


def test_a_fault_of_the_program_does_not_pass_for_a_difference(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(spmoe, "verify", verify)
    found = run("verify", "MODEL", "--prompts", 1)
    assert found.status == 2
    assert "ZeroDivisionError" in found.err


def test_a_reader_that_leaves_ends_the_program_without_a_word() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output:
        found = subprocess.run(
            [sys.executable, "-m", "spmoe", "--help"],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (found.returncode, found.stderr) == (1, "")


class TestProgressWithoutATerminal:
    @pytest.fixture
    def timers(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        """Timers that a test lets run out."""
        made: list[Any] = []

        class Timer:
            def __init__(self, seconds: float, function: Any) -> None:
                self.seconds, self.function, self.cancelled = seconds, function, False
                made.append(self)

            def start(self) -> None: ...

            def cancel(self) -> None:
                self.cancelled = True

        monkeypatch.setattr(threading, "Timer", Timer)
        return made

    def test_work_that_lasts_over_two_seconds_is_one_line(
        self, timers: list[Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with progress_bar(False) as report:
            report("loading the target", 0, 3)
            report("loading the draft", 1, 3)
            assert capsys.readouterr().err == ""
            (timer,) = timers
            assert timer.seconds == 2
            timer.function()
            report("allocating memory", 2, 3)
            assert capsys.readouterr().err == "loading the draft (1 of 3) ...\n"
            report("filling memory, MB", 10, 4000)
            timers[1].function()
        assert capsys.readouterr().err == "filling memory, MB (10 of 4000) ...\n"
        assert [timer.cancelled for timer in timers] == [True, True]

    def test_work_that_ends_sooner_is_not_spoken_of(self, timers: list[Any]) -> None:
        with progress_bar(False) as report:
            report("making a pair", 0, 1)
            report("ready", 1, 1)
            report("loading", 0, 1)
        assert [timer.cancelled for timer in timers] == [True, True]

    def test_quiet_is_quiet(self, timers: list[Any]) -> None:
        with progress_bar(True) as report:
            report("loading", 0, 1)
        assert timers == []


class TestTable:
    @pytest.fixture
    def logger(self) -> Iterator[None]:
        yield
        log = logging.getLogger("spmoe")
        log.handlers.clear()
        log.setLevel(logging.NOTSET)

    @pytest.mark.parametrize(
        ("flags", "reason"),
        [
            (["--draft-model", "MODEL", "--no-speculation"], "--no-speculation"),
            (["--draft-model", "MODEL", "--draft-length", "0"], "draft length 0"),
            ([], "no draft model"),
        ],
    )
    def test_it_says_why_nothing_was_drafted_and_where_time_to_load_went(
        self, run: Any, target_path: Path, flags: list[str], reason: str
    ) -> None:
        flags = [str(target_path) if flag == "MODEL" else flag for flag in flags]
        command = ["generate", target_path, *flags, "-p", "Hi", "-n", 3, "--policy", "on-demand"]
        text = run(*command).err
        assert f"decoded plainly: {reason}" in text
        assert re.search(r"time to load +│ \d+\.\d s \(target \d+\.\d, ", text)
        figures = json.loads(run(*command, "--json").out)
        assert figures["decoded_plainly"] == f"decoded plainly: {reason}"
        assert figures["load_seconds"]["target"] > 0

    def test_it_says_that_drafting_does_not_pay(
        self, run: Any, target_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = Choice(0, prefetch=False)
        monkeypatch.setattr(
            "spmoe.decoding.draft_length.DraftLength.choose", lambda *_, **__: plain
        )
        command = ("generate", target_path, "--draft-model", target_path, "-p", "Hi", "-n")
        text = run(*command, 12, "--expert-memory", "25%", COLUMNS="120").err
        assert re.search(r"drafting does not pay on this link, \d+\.\d GB/s", text)
        text = run(*command, 3, COLUMNS="120").err
        assert "the text ended before a draft was tried" in text

    def test_the_memory_that_auto_chose_is_one_line(self, run: Any, target_path: Path) -> None:
        command = ("generate", target_path, "-p", "Hi", "-n", 2, "--policy", "on-demand")
        first, *_ = run(*command).err.splitlines()
        assert re.fullmatch("expert memory .* of .*: .* free, less dense .*, reserve .*", first)
        assert "free, less" not in run(*command, "--expert-memory", "50%").err
        assert run(*command, "--quiet").err == ""

    @pytest.mark.usefixtures("logger")
    def test_the_main_steps_are_logged(self, run: Any, target_path: Path) -> None:
        command = ("generate", target_path, "-p", "Hi", "-n", 3, "--policy", "on-demand", "--quiet")
        assert run(*command).err == ""
        text = run(*command, "--verbose").err
        assert re.search(r"INFO loading the target without its experts: \d", text)
        assert "INFO <spmoe.Engine qwen3_moe, 3 layers of 8 experts" in text
        assert re.search(r"INFO 3 tokens in .* after a prompt of 2; 0 of 0 drafted", text)
