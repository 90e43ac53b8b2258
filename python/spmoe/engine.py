"""`Engine`: a target whose experts are offloaded, and perhaps a draft, writing text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spmoe.config import check_draft_length, format_bytes
from spmoe.costs.costs import Costs
from spmoe.costs.memory_plan import MemoryPlan
from spmoe.decoding import speculative
from spmoe.decoding.generation import Generation, check_max_new_tokens, check_stop, write
from spmoe.decoding.planner import Planner
from spmoe.decoding.prior import Shape
from spmoe.decoding.request import Request
from spmoe.decoding.turns import Turns
from spmoe.errors import Error, InvalidArgument
from spmoe.models.cache_support import cache_support
from spmoe.models.cached import CausalLM, context_length
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel
from spmoe.models.processors import set_aside
from spmoe.models.text import Prompt, Tokenizer, encode
from spmoe.models.writer import TextWriter
from spmoe.prediction import predictor
from spmoe.prediction.layer_map import LayerMap
from spmoe.reporting.metrics import Course, Metrics, summarise
from spmoe.reporting.trace import Phase
from spmoe.runtime import Runtime
from spmoe.system.closeable import Closeable

log = logging.getLogger("spmoe")


@dataclass(slots=True)
class _Text:
    """A request for text, checked, and its figures once it has ended."""

    request: Request
    tokens: list[int]  # of the prompt
    max_new_tokens: int
    writer: TextWriter
    metrics: Metrics | None = None


class Engine(Closeable):
    """A target whose experts are offloaded, its tokenizer, and perhaps a draft; see `load`.

    Thread-safe. One request is answered at a time: those of several threads wait their turn, in the
    order in which they came, and the figures of each are its own. A thread that asks for a request
    while it reads a stream that is not finished gets an `Error`, for it would wait forever. A
    context manager.

    Args:
        target: From `load_target`.
        tokenizer: Its own.
        runtime: From ``target.open_runtime``; closed with the engine.
        draft: Proposes tokens; of the same tokenizer.
        draft_length: As for `load`.
        costs: Of this machine; without them policies run without limits.
        layer_map: Lets a draft of another depth or width predict experts.
        on_close: Called by `close`, at the end of it.
    """

    def __init__(
        self,
        target: TargetModel,
        tokenizer: Tokenizer,
        runtime: Runtime,
        *,
        draft: CausalLM | None = None,
        draft_length: int | str = 4,
        costs: Costs | None = None,
        layer_map: LayerMap | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self.target = target
        self.tokenizer = tokenizer
        self.runtime = runtime
        self.draft = draft
        self.draft_length = check_draft_length(draft_length)
        self.planner: Planner | None = None  # learns from every request
        if costs is not None:
            shape = Shape(
                layers=runtime.store.layer_count,
                experts=runtime.store.expert_count,
                experts_per_token=target.experts_per_token,
                memory_bytes=runtime.expert_memory_bytes,
            )
            self.planner = Planner(costs, shape, policy=runtime.traits)
        self.cutoff_layer: int | None = None  # in place of the planner's
        self.layer_map = None if layer_map is None else layer_map.to(runtime.device)
        self.last: Metrics | None = None  # figures of the last request
        self.load_seconds: dict[str, float] = {}  # step of `load` -> how long it took
        self.memory: MemoryPlan | None = None  # how `load` divided it
        self.prompt_chunk: int | None = None  # tokens of a pass over the prompt; None: all in one
        self.draft_note: str | None = None if draft is not None else "no draft model"
        self._turns = Turns()
        self._running = Request(target, None, runtime)  # or the latest that ran; at first none
        self._predictions_failed = False
        self._hooks = ExitStack()
        self.not_applied = self._set_aside()  # of the target's generation configuration
        if on_close is not None:
            self._hooks.callback(on_close)
        attach(target, runtime)
        for model in (target.model, *([draft] if draft is not None else [])):
            cache_support(model)  # tries the model before its states are watched
        self._watch()

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int | str | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
    ) -> Generation:
        """Write text after ``prompt`` and return it whole. Arguments and errors as for `stream`."""
        text = self._begin(prompt, max_new_tokens, draft_length, stop, raw)
        for _ in self._turns.hold(self._write(text)):
            pass
        if text.metrics is None:
            raise Error("the request wrote nothing")
        return Generation(text.writer.text, text.writer.token_ids, text.metrics)

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int | str | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
    ) -> Generator[str]:
        """Write text after ``prompt``, yielding it as it is written.

        Its turn begins with the first chunk that is asked for, and ends when the stream is read to
        its end, closed, or dropped.

        Args:
            prompt: Text, chat messages ({"role": ..., "content": ...}), or token ids: integers, a
                tensor or array, or what the tokenizer returned.
            max_new_tokens: The text has at most this many tokens; at least 1.
            draft_length: Tokens drafted an iteration, or "auto"; 0 decodes plainly, None takes the
                engine's own.
            stop: One string or several. The text ends before the first that appears in it.
            raw: A text prompt is read as it is, not as a chat message.

        Raises:
            InvalidArgument: The prompt is empty or longer than the model's context, or an argument
                is wrong.
            DeviceError: An expert could not be read. The engine stays usable.
            CheckpointError: A file of the target was written to after it was loaded.
            Error: This thread reads another stream of the engine that is not finished, or the
                engine is closed.
        """
        return self._turns.hold(
            self._write(self._begin(prompt, max_new_tokens, draft_length, stop, raw))
        )

    def iterate(
        self, prompt: Prompt, *, max_new_tokens: int, draft_length: int | Literal["auto"]
    ) -> Generator[speculative.Iteration]:
        """Decode without stopping at any token, and yield the iterations themselves.

        Turns and errors as for `stream`.
        """
        tokens = self.encode(prompt)
        return self._turns.hold(self._decode(self._request(draft_length), tokens, max_new_tokens))

    @property
    def phases(self) -> list[Phase]:
        """Drafts and verifications of the latest request, if the runtime keeps spans."""
        return self._running.phases

    def _begin(
        self,
        prompt: Prompt,
        max_new_tokens: int,
        draft_length: int | str | None,
        stop: str | Sequence[str] | None,
        raw: bool,
    ) -> _Text:
        """Check the arguments of a request, before its turn."""
        count = check_max_new_tokens(max_new_tokens)
        stops = check_stop(stop)
        tokens = self.encode(prompt, raw=raw)
        length = check_draft_length(self.draft_length if draft_length is None else draft_length)
        return _Text(self._request(length), tokens, count, TextWriter(self.tokenizer, stops))

    def _request(self, draft_length: int | Literal["auto"]) -> Request:
        length = None if draft_length == "auto" else draft_length
        if length is None and self.draft is not None and self.planner is None:
            raise InvalidArgument(
                'draft_length "auto" needs the costs of this machine, which were not measured: '
                'give draft_length="auto" to spmoe.load'
            )
        return Request(
            self.target,
            self.draft,
            self.runtime,
            draft_length=length,
            planner=self.planner,
            cutoff_layer=self.cutoff_layer,
            prompt_chunk=self.prompt_chunk,
        )

    def _decode(
        self, request: Request, tokens: list[int], max_new_tokens: int
    ) -> Generator[speculative.Iteration]:
        """Make the request the running one; only in its turn."""
        self._running = request
        yield from request.iterations(
            tokens, min(len(tokens) + max_new_tokens, self.context_length)
        )

    def _write(self, text: _Text) -> Generator[str]:
        """Yield chunks of text; the figures are there once it is exhausted or closed."""
        course = Course(prompt_tokens=len(text.tokens))
        iterations = self._decode(text.request, text.tokens, text.max_new_tokens)
        try:
            with self.runtime.counting() as used:
                yield from write(iterations, text.writer, self.target.end_token_ids, course)
        finally:
            if course.iterations:
                text.metrics = self.last = summarise(
                    course,
                    used,
                    self.runtime.stats(by_layer=False),
                    expert_memory_bytes=self.runtime.expert_memory_bytes,
                    expert_total_bytes=self.runtime.store.total_bytes,
                )
                log.info(
                    "%d tokens in %.2f s after a prompt of %d; %d of %d drafted were accepted",
                    course.new_tokens,
                    course.last_token_s,
                    course.prompt_tokens,
                    course.accepted,
                    course.drafted,
                )

    def _set_aside(self) -> list[str]:
        """Return the settings of the target that are not applied, with a warning if any are."""
        settings = set_aside(self.target.model)
        if settings:
            log.warning(
                "generation_config.json of the target asks for %s, which spmoe does not apply: "
                "texts are those of greedy decoding without",
                ", ".join(settings),
            )
        return settings

    def _watch(self) -> None:
        """Report predictions from the models' states as the policy wants them."""
        sources = self.runtime.traits.reads
        target_source: Literal["draft", "target"] = "target"
        unread: Exception | None = None  # why the draft's states are not
        if "draft" in sources and self.draft is not None:
            mismatch = predictor.draft_mismatch(self.target, self.draft)
            layer_map = self.layer_map if mismatch else None
            if layer_map is not None:
                layer_map.check(self.target, self.draft)
            try:
                self._hooks.enter_context(
                    predictor.draft_predictions(
                        self.target,
                        self.draft,
                        self._report_draft,
                        layer_map=layer_map,
                        wanted=self._predicts,
                        on_error=self._stop_predicting,
                    )
                )
            except Exception as error:  # of the models' code
                sources, target_source, unread = ("target",), "draft", error
        if "target" not in sources:
            return

        def report(layer: int, scores: torch.Tensor) -> None:
            self.runtime.predict(layer, scores, source=target_source)

        try:
            self._hooks.enter_context(
                predictor.target_predictions(
                    self.target,
                    report,
                    first_row=lambda: self._running.first_uncovered_row,
                    wanted=self._predicts,
                    on_error=self._stop_predicting,
                )
            )
        except Exception as error:  # of the models' code
            self._stop_predicting(error)
            return
        if unread is not None:
            log.warning(
                "the draft's states cannot predict experts (%s): they are predicted inside "
                "the target instead",
                unread,
            )

    def _stop_predicting(self, error: Exception) -> None:
        """Go on without predictions: they change speed alone."""
        if not self._predictions_failed:
            self._predictions_failed = True
            log.warning(
                "experts are not predicted any more, but fetched on demand (%s: %s)",
                type(error).__name__,
                error,
            )

    def _predicts(self, layer: int) -> bool:
        """Whether a prediction for ``layer`` would be used."""
        return not self._predictions_failed and self._running.wants(layer)

    def _report_draft(self, layer: int, scores: torch.Tensor) -> None:
        if layer == 0:
            self._running.cover_row()
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
        """Tokens of prompt and answer that the target can read."""
        return context_length(self.target.model)

    def stats(self) -> dict[str, Any]:
        """Return the last request's figures under "request", the runtime's totals under "total"."""
        return {
            "request": self.last.as_dict() if self.last else None,
            "total": self.runtime.stats(),
        }

    def __repr__(self) -> str:
        store, config = self.runtime.store, self.target.model.config
        draft = "none" if self.draft is None else self.draft.config.model_type
        return (
            f"<spmoe.Engine {config.model_type}, {store.layer_count} layers of "
            f"{store.expert_count} experts, {format_bytes(self.runtime.expert_memory_bytes)} of "
            f"{format_bytes(store.total_bytes)} in expert memory on {self.runtime.device}, policy "
            f"{self.runtime.policy}, draft {draft}, draft length {self.draft_length}>"
        )

    def close(self) -> None:
        """Give the expert memory back. May be called twice."""
        self.runtime.close()
        self._turns.close()
        self._hooks.close()
