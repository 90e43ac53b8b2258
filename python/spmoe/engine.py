"""`load` a target and a draft; `Engine` writes text with them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any, Literal, Self

import torch

from spmoe import predictor, speculative
from spmoe.config import check_draft_length
from spmoe.draft_length import DraftLength
from spmoe.errors import Error, InvalidArgument
from spmoe.layer_map import LayerMap
from spmoe.metrics import Metrics, Timing, summarise
from spmoe.models.cached import CachedCausalLM, CausalLM
from spmoe.models.experts import attach
from spmoe.models.loading import (
    TargetModel,
    load_draft,
    load_target,
    load_tokenizer,
)
from spmoe.models.text import Prompt, TextWriter, Tokenizer, encode
from spmoe.pairing import check_pairing
from spmoe.progress import Progress, silent
from spmoe.runtime import Runtime
from spmoe.trace import Phase

log = logging.getLogger("spmoe")


@dataclass(frozen=True, slots=True)
class Generation:
    """What a request wrote.

    Attributes:
        text: New text, without special tokens, up to a stop string if one ended it.
        token_ids: New token ids, with the end-of-text token if one ended it.
        stats: What it cost.
    """

    text: str
    token_ids: list[int]
    stats: Metrics

    @property
    def finish_reason(self) -> str:
        """Return "stop" (end-of-text token or stop string) or "length"."""
        return self.stats.finish_reason


class Engine:
    """A target whose experts are offloaded, its tokenizer, and perhaps a draft; see `load`.

    A draft of another depth or width predicts experts through ``layer_map``, one of the target's
    depth and width without.

    Thread-safe: requests of several threads interleave, and the figures of each then count what the
    others did meanwhile. A context manager.
    """

    def __init__(
        self,
        target: TargetModel,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        draft: CausalLM | None = None,
        draft_length: int | str = 4,
        layer_map: LayerMap | None = None,
    ) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.draft = draft
        self.draft_length = check_draft_length(draft_length)
        self.layer_map = layer_map
        self.last: Metrics | None = None  # figures of the last request
        self.phases: list[Phase] = []  # draft and verify, if the runtime keeps spans
        self._covered_rows = 0  # of the running verification, which the draft predicted for
        self._hooks = ExitStack()
        attach(target, runtime)
        self._watch()

    def generate(self, prompt: Prompt, **options: Any) -> Generation:
        """Write text after ``prompt`` and return it whole. Options as for `stream`."""
        request = _Request(self, prompt, **options)
        for _ in request.run():
            pass
        return request.result()

    def stream(self, prompt: Prompt, **options: Any) -> Iterator[str]:
        """Write text after ``prompt``, yielding pieces as they are written.

        Args:
            prompt: Text, chat messages ({"role": ..., "content": ...}), or token ids.
            **options: ``max_new_tokens`` (128); ``draft_length`` (the engine's; 0 decodes
                plainly); ``stop``, strings at whose first appearance the text ends, itself left
                out; ``raw`` (False): a text prompt goes in as it is, not as a chat message.

        Raises:
            InvalidArgument: The prompt is empty or longer than the model's context, or an option
                is wrong.
            DeviceError: An expert could not be read. The engine stays usable.
        """
        return _Request(self, prompt, **options).run()

    def iterate(
        self, prompt: Prompt, *, max_new_tokens: int, draft_length: int | Literal["auto"]
    ) -> Iterator[speculative.Iteration]:
        """Decode without stopping at any token, and yield the iterations themselves."""
        tokens = self.encode(prompt)
        drafter = None
        if self.draft is not None and draft_length != 0:
            drafter = CachedCausalLM(self.draft)
        adaptive = DraftLength() if draft_length == "auto" and drafter is not None else None
        self.runtime.begin_request()
        for iteration in speculative.decode(
            CachedCausalLM(self.target.model),
            drafter,
            tokens,
            draft_length=adaptive.choose if adaptive is not None else int(draft_length or 0),
            max_length=min(len(tokens) + max_new_tokens, self.context_length),
            worth_another=adaptive.worth_another if adaptive is not None else None,
        ):
            self.runtime.end_iteration(iteration.accepted)
            if adaptive is not None and iteration.draft_steps + len(iteration.tokens) > 1:
                adaptive.observe(iteration)
            self._covered_rows = 0
            if self.runtime.trace_spans:
                self.phases += _phases(iteration)
            yield iteration

    def _watch(self) -> None:
        """Report predictions from the models' states as the policy wants them."""
        sources = predictor.SOURCES.get(self.runtime.policy, ())
        target_source: Literal["draft", "target"] = "target"
        if "draft" in sources and self.draft is not None:
            mismatch = predictor.draft_mismatch(self.target, self.draft)
            if mismatch and self.layer_map is None:
                log.warning(
                    "%s, and no layer map is there for them: experts are predicted inside the "
                    "target instead; `spmoe profile` fits a map",
                    mismatch,
                )
                sources, target_source = ("target",), "draft"
            else:
                self._hooks.enter_context(
                    predictor.draft_predictions(
                        self.target,
                        self.draft,
                        self._tell_draft,
                        layer_map=self.layer_map if mismatch else None,
                    )
                )
        if "target" in sources:

            def tell(layer: int, scores: torch.Tensor) -> None:
                self.runtime.predict(layer, scores, source=target_source)

            self._hooks.enter_context(
                predictor.target_predictions(
                    self.target, tell, first_row=lambda: self._covered_rows
                )
            )

    def _tell_draft(self, layer: int, scores: torch.Tensor) -> None:
        if layer == 0:
            self._covered_rows += 1
        self.runtime.predict(layer, scores, source="draft")

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """Return the token ids of a prompt: chat-templated text or messages, or ids as given.

        Raises:
            InvalidArgument: It is empty, holds an unknown token id, or exceeds the context.
        """
        tokens = encode(self.tokenizer, prompt, raw=raw)
        vocabulary = int(self.target.model.config.get_text_config().vocab_size)
        wrong = [token for token in tokens if not 0 <= token < vocabulary]
        if not tokens or wrong:
            found = f"has token id {wrong[0]}" if wrong else "is empty"
            raise InvalidArgument(
                f"the prompt {found}; give at least one token from 0 to {vocabulary - 1}"
            )
        if len(tokens) >= self.context_length:
            raise InvalidArgument(
                f"the prompt has {len(tokens)} tokens, but the model's context is "
                f"{self.context_length} and the answer needs room in it: shorten the prompt"
            )
        return tokens

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer that target and draft can read."""
        models = [self.target.model, *([self.draft] if self.draft is not None else [])]
        return min(int(model.config.max_position_embeddings) for model in models)

    def stats(self) -> dict[str, Any]:
        """Return the last request's figures under "request", the runtime's totals under "total"."""
        return {
            "request": self.last.as_dict() if self.last else None,
            "total": self.runtime.stats(),
        }

    def close(self) -> None:
        """Give the expert memory back. May be called twice."""
        self._hooks.close()
        self.runtime.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Request:
    """One request from prompt to figures."""

    def __init__(
        self,
        engine: Engine,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int | str | None = None,
        stop: str | Sequence[str] = (),
        raw: bool = False,
    ) -> None:
        if max_new_tokens < 1:
            raise InvalidArgument(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.engine = engine
        self.prompt = engine.encode(prompt, raw=raw)
        self.max_new_tokens = max_new_tokens
        self.draft_length = check_draft_length(
            engine.draft_length if draft_length is None else draft_length
        )
        stops = [stop] if isinstance(stop, str) else list(stop)
        self.writer = TextWriter(engine.tokenizer, [text for text in stops if text])
        self.metrics: Metrics | None = None

    def run(self) -> Iterator[str]:
        """Yield pieces of text; the figures are there once it is exhausted or closed."""
        engine = self.engine
        ends = engine.target.end_token_ids
        finish_reason = "length"
        iterations = drafted = accepted = 0
        start = time.perf_counter()
        before = engine.runtime.stats()
        first = last = 0.0
        try:
            for iteration in engine.iterate(
                self.prompt, max_new_tokens=self.max_new_tokens, draft_length=self.draft_length
            ):
                last = time.perf_counter() - start
                first = first or last
                iterations += 1
                drafted += iteration.drafted
                accepted += iteration.accepted
                for token in iteration.tokens:
                    self.writer.add(token)
                    if token in ends or self.writer.stopped:
                        finish_reason = "stop"
                        break
                if piece := self.writer.take():
                    yield piece
                if finish_reason == "stop":
                    break
            if piece := self.writer.finish():
                yield piece
        finally:
            if iterations:
                self.metrics = engine.last = summarise(
                    before=before,
                    after=engine.runtime.stats(),
                    timing=Timing(first, last),
                    prompt_tokens=len(self.prompt),
                    new_tokens=len(self.writer.token_ids),
                    finish_reason=finish_reason,
                    drafted=drafted,
                    accepted=accepted,
                    iterations=iterations,
                    expert_memory_bytes=engine.runtime.expert_memory_bytes,
                    expert_total_bytes=engine.runtime.store.total_bytes,
                )

    def result(self) -> Generation:
        """Return what was written; only after `run`."""
        if self.metrics is None:
            raise Error("the request wrote nothing")
        return Generation(self.writer.text, self.writer.token_ids, self.metrics)


def _phases(iteration: speculative.Iteration) -> list[Phase]:
    verify_s = iteration.end_s - iteration.verify_s
    drafted = f"{iteration.drafted} tokens"
    verified = f"{iteration.accepted} accepted"
    return [
        Phase("draft", drafted, verify_s - iteration.draft_s, verify_s),
        Phase("verify", verified, verify_s, iteration.end_s),
    ]


def load(
    target: str | PathLike[str],
    draft: str | PathLike[str] | None = None,
    *,
    expert_memory: int | str = "25%",
    device: str = "auto",
    draft_length: int | str = 4,
    policy: str = "horizon",
    eviction: str = "auto",
    dtype: torch.dtype | str | None = None,
    link_gbps: float = 0.0,
    trace_spans: int = 0,
    progress: Progress | None = None,
) -> Engine:
    """Load a Mixture-of-Experts model without its experts, and perhaps a draft for it.

    Args:
        target: Directory or hub id of the model whose output counts.
        draft: Directory or hub id of a model of the same tokenizer that proposes tokens; None
            decodes plainly. Changes speed, never the text.
        expert_memory: Memory for experts: "25%" of all, "6GiB", or bytes.
        device: "auto" or "host".
        draft_length: Tokens drafted an iteration, from 0 to 31, or "auto": chosen each time.
        policy: What is prefetched: one of `spmoe.runtime.POLICIES`. Changes speed, never the text.
        eviction: What leaves for it: one of `spmoe.runtime.EVICTIONS`, or "auto".
        dtype: Of the target's activations and of all its weights but the experts', which keep the
            checkpoint's; None means float32 on the host. The draft keeps its checkpoint's.
        link_gbps: Paces the link to so many 10^9 bytes a second; 0 means as fast as it goes.
        trace_spans: Spans of time that `Runtime.spans` keeps.
        progress: Called as things are loaded, with a description, and done of total.

    Raises:
        InvalidArgument: A model without experts, a budget too small, a draft that does not fit.
        CheckpointError: A shard is missing or damaged.
        OutOfMemory: The budget is not to be had.
    """
    report = progress or silent
    check_draft_length(draft_length)
    steps = 3 if draft is not None else 2
    report("loading the target without its experts", 0, steps)
    loaded = load_target(target, dtype=resolve_dtype(dtype))
    tokenizer = load_tokenizer(target)
    drafter = None
    if draft is not None:
        report("loading the draft", 1, steps)
        drafter = load_draft(draft)
        check_pairing(tokenizer, load_tokenizer(draft), loaded.model.config, drafter.config)
    report("allocating expert memory", steps - 1, steps)
    runtime = Runtime(
        loaded.store,
        expert_memory=expert_memory,
        experts_per_token=loaded.experts_per_token,
        activation=loaded.activation,
        alpha=loaded.alpha,
        limit=loaded.limit,
        device=device,
        link_gbps=link_gbps,
        policy=policy,
        eviction=eviction,
        trace_spans=trace_spans,
    )
    report("ready", steps, steps)
    return Engine(loaded, tokenizer, runtime, draft=drafter, draft_length=draft_length)


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the torch dtype that a setting means; None means float32."""
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype or torch.float32
    if resolved not in (torch.float32, torch.bfloat16, torch.float16):
        raise InvalidArgument(f'dtype "{dtype}" is not float32, bfloat16 or float16')
    return resolved
