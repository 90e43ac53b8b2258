"""`Engine`: a target whose experts are offloaded, and perhaps a draft, writing text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch

from spmoe import predictor, speculative
from spmoe.closeable import Closeable, at_work
from spmoe.config import check_draft_length, format_bytes
from spmoe.costs import Costs
from spmoe.draft_length import DraftLength
from spmoe.errors import InvalidArgument
from spmoe.layer_map import LayerMap
from spmoe.memory_plan import MemoryPlan
from spmoe.metrics import Metrics
from spmoe.models.cache_support import cache_support, cached
from spmoe.models.cached import CausalLM, context_length
from spmoe.models.experts import attach
from spmoe.models.loading import TargetModel
from spmoe.models.processors import request_processors, set_aside
from spmoe.models.text import Prompt, Tokenizer, encode
from spmoe.planner import COUNTERS, Limits, Planner, Shape
from spmoe.request import Generation, Request
from spmoe.runtime import Runtime
from spmoe.trace import Phase

log = logging.getLogger("spmoe")

PLAIN_FIRST = 3  # iterations: the first after a prefill still fill what it has evicted


class Engine(Closeable):
    """A target whose experts are offloaded, its tokenizer, and perhaps a draft; see `load`.

    Thread-safe: requests of several threads interleave, and the figures of each then count what the
    others did meanwhile. A context manager.

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
        self.planner: Planner | None = None
        self._lengths: DraftLength | None = None  # for "auto"; learns from every such request
        if costs is not None:
            shape = Shape(
                layers=runtime.store.layer_count,
                experts=runtime.store.expert_count,
                experts_per_token=target.experts_per_token,
                memory_bytes=runtime.expert_memory_bytes,
            )
            self.planner = Planner(costs, shape, policy=runtime.traits)
            self._lengths = DraftLength(
                self.planner.verify_s,
                self.planner.draft_s,
                costs.draft_token_s,
                plain_first=PLAIN_FIRST,
            )
        self.cutoff_layer: int | None = None  # in place of the planner's
        self.layer_map = None if layer_map is None else layer_map.to(runtime.device)
        self.last: Metrics | None = None  # figures of the last request
        self.load_seconds: dict[str, float] = {}  # step of `load` -> how long it took
        self.memory: MemoryPlan | None = None  # how `load` divided it
        self.phases: list[Phase] = []  # draft and verify, if the runtime keeps spans
        self._limits: Limits | None = None  # of the running iteration
        self._covered_rows = 0  # of the running verification, which the draft predicted for
        self._reread_rows = 0  # before these, which the target has read before
        self.prompt_chunk: int | None = None  # tokens of a pass over the prompt; None: all in one
        self.draft_note: str | None = None if draft is not None else "no draft model"
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
        request = Request(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            draft_length=draft_length,
            stop=stop,
            raw=raw,
        )
        for _ in request.run():
            pass
        return request.result()

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 128,
        draft_length: int | str | None = None,
        stop: str | Sequence[str] | None = None,
        raw: bool = False,
    ) -> Iterator[str]:
        """Write text after ``prompt``, yielding it as it is written.

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
        """
        return Request(
            self,
            prompt,
            max_new_tokens=max_new_tokens,
            draft_length=draft_length,
            stop=stop,
            raw=raw,
        ).run()

    def iterate(
        self, prompt: Prompt, *, max_new_tokens: int, draft_length: int | Literal["auto"]
    ) -> Iterator[speculative.Iteration]:
        """Decode without stopping at any token, and yield the iterations themselves."""
        tokens = self.encode(prompt)
        max_length = min(len(tokens) + max_new_tokens, self.context_length)
        drafter = None
        if self.draft is not None and draft_length != 0:
            drafter = cached(self.draft)
        adaptive: DraftLength | None = None
        if draft_length == "auto" and drafter is not None:
            if self._lengths is None:
                raise InvalidArgument(
                    'draft_length "auto" needs the costs of this machine, which were not measured: '
                    'give draft_length="auto" to spmoe.load'
                )
            adaptive = self._lengths

        def choose(backlog: int, left: int) -> int:
            fixed = 0 if draft_length == "auto" else draft_length
            length = fixed if adaptive is None else adaptive.choose(backlog, left)
            self._set_limits(length if drafter is not None else 0)
            if drafter is not None:
                self._reread_rows = backlog + drafter.length - target.length
            return length

        target = cached(self.target.model)
        self.runtime.begin_request()
        counters: dict[str, Any] | None = None
        finite = True
        iterations = speculative.decode(
            target,
            drafter,
            tokens,
            draft_length=choose,
            max_length=max_length,
            worth_another=adaptive.worth_another if adaptive is not None else None,
            read_last=self._reads_last,
            process=request_processors(self.target.model, tokens, max_length),
            prompt_chunk=self.prompt_chunk,
        )
        for iteration in at_work(iterations):
            self.runtime.end_iteration(iteration.accepted)
            prefill = counters is None
            if adaptive is not None and not prefill:
                adaptive.observe(iteration)
            counters = self._observe(iteration, counters)
            self._covered_rows = 0
            if finite and not iteration.finite:
                finite = False
                log.warning("the target's logits are not finite: %s", self._nonfinite_place())
            if self.runtime.trace_spans:
                self.phases += _phases(iteration)
            yield iteration

    def _nonfinite_place(self) -> str:
        """Say where weights are not finite, as those of a damaged disk are."""
        cure = "download the checkpoint again, or check the disk"
        for name, weight in self.target.model.named_parameters():
            if not bool(weight.isfinite().all()):
                return f"the weight {name} is not; {cure}"
        if (place := self.runtime.store.find_nonfinite()) is not None:
            layer, expert, file = place
            return f"expert {expert} of MoE layer {layer} is not, in {file}; {cure}"
        return "no weight that was looked at is the cause; the text may be meaningless"

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

    def _set_limits(self, draft_length: int) -> None:
        if self.planner is None:
            return
        limits = self.planner.limits(draft_length)
        if self.cutoff_layer is not None:
            limits = replace(limits, cutoff_layer=self.cutoff_layer)
        self._limits = limits
        self.runtime.set_limits(
            cutoff_layer=limits.cutoff_layer,
            budget_bytes=limits.budget_bytes,
            break_even=limits.break_even,
        )

    def _observe(
        self, iteration: speculative.Iteration, before: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Report an iteration to the planner; a prefill, which has none before it, is left out."""
        after = self.runtime.stats(by_layer=False)
        if self.planner is not None and before is not None:
            grown = {name: after[name] - before[name] for name in COUNTERS}
            self.planner.observe(
                iteration, grown, read_last=self._reads_last(), reread=iteration.reread
            )
        return after

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
                self._hooks.enter_context(self._draft_predictions(self.draft, layer_map))
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
                    first_row=self._first_uncovered_row,
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

    def _draft_predictions(
        self, draft: CausalLM, layer_map: LayerMap | None
    ) -> AbstractContextManager[None]:
        return predictor.draft_predictions(
            self.target,
            draft,
            self._report_draft,
            layer_map=layer_map,
            wanted=self._predicts,
            on_error=self._stop_predicting,
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

    def _first_uncovered_row(self) -> int:
        return self._reread_rows + self._covered_rows if self._covered_rows else 0

    def _reads_last(self) -> bool:
        return self._limits is not None and self._limits.read_last

    def _predicts(self, layer: int) -> bool:
        """Whether the policy would do anything about a prediction for ``layer``."""
        if self._predictions_failed:
            return False
        return self._limits is None or self._limits.uses_prediction(self.runtime.traits, layer)

    def _report_draft(self, layer: int, scores: torch.Tensor) -> None:
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
        self._hooks.close()


def _phases(iteration: speculative.Iteration) -> list[Phase]:
    verify_s = iteration.end_s - iteration.verify_s
    drafted = f"{iteration.drafted} tokens"
    verified = f"{iteration.accepted} accepted"
    return [
        Phase("draft", drafted, verify_s - iteration.draft_s, verify_s),
        Phase("verify", verified, verify_s, iteration.end_s),
    ]
