"""One loaded model and the generation of one answer. The only file that imports onnxruntime-genai."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import onnxruntime_genai as og

from slmops.contracts.errors import ContextLengthExceeded, InferenceFailed, PromptRefused
from slmops.contracts.manifest import ADAPTER_PATH
from slmops.gateway.serving.inference import Done, FinishReason, InferenceRequest, Token, ToolCall, ToolFormat
from slmops.gateway.serving.prompts import PromptEncoder
from slmops.gateway.serving.scores import Scores, ShownScores
from slmops.gateway.serving.stopwords import StopWords
from slmops.gateway.serving.tool_calls import ToolCallParser
from slmops.gateway.serving.tool_guidance import grammar
from slmops.kit.prompt_tokens import PromptTokenizer

# A long prompt is read in chunks between the tokens of other answers. The result is the same, bit for bit.
PREFILL_CHUNK_TOKENS = 64
_SHOWN_CHARACTERS = 300
"""Of the runtime's message about a schema, which quotes it. The message is sent to the client and not logged."""


class LoadedModel:
    """A model loaded from an onnxruntime-genai folder. Raises `InferenceFailed` if it does not load.

    `context_tokens` bounds prompt and answer together, and so the key-value cache of one request.
    """

    def __init__(self, folder: Path, *, context_tokens: int, threads: int | None = None) -> None:
        og.disable_telemetry_events()
        try:
            config = og.Config(str(folder))
            config.overlay(json.dumps(_session(threads or len(os.sched_getaffinity(0)))))
            self.model = og.Model(config)
            self.tokenizer = og.Tokenizer(self.model)
            self._prompts = PromptEncoder(PromptTokenizer(self.tokenizer, folder), folder)
            self.adapters = og.Adapters(self.model) if (folder / ADAPTER_PATH).exists() else None
            if self.adapters:
                self.adapters.load(str(folder / ADAPTER_PATH), ADAPTER_PATH)
            described = json.loads((folder / "genai_config.json").read_text())["model"]
            trained, self.vocabulary_tokens = int(described["context_length"]), int(described["vocab_size"])
        except (RuntimeError, OSError, ValueError, KeyError, TypeError) as error:
            raise InferenceFailed(f"the model could not be loaded: {error}", where=folder.name) from error
        self.context_tokens = min(context_tokens, trained)
        self.end_tokens = frozenset(int(token) for token in self.tokenizer.eos_token_ids)

    @property
    def tool_format(self) -> ToolFormat | None:
        """How the model writes calls of tools; None if its chat template does not know tools."""
        return self._prompts.tool_format

    @property
    def markers(self) -> dict[int, str]:
        """The tokens around calls, whose text the tokenizer may hide."""
        return {token: text for text, token in self._prompts.markers.items()}

    def guidance(self, request: InferenceRequest) -> Guidance | None:
        """Returns what holds the answer to a schema or to calls of tools; None if it is free."""
        if request.json_schema is not None:
            return Guidance("json_schema", request.json_schema, "the JSON schema in response_format")
        form = self.tool_format
        lark = grammar(request.tools, form, self._prompts.control_markers) if request.tools and form else None
        return None if lark is None else Guidance("lark_grammar", lark, "a JSON schema in tools")

    def encode(self, request: InferenceRequest) -> list[int]:
        """Returns the prompt's tokens.

        Raises `PromptRefused` if the prompt is empty or if the chat template rejects the messages or tools, and
        `ContextLengthExceeded` if the prompt leaves no room for an answer.
        """
        if request.tools and self.tool_format is None:
            raise PromptRefused("the chat template of this model does not know tools")
        tokens = self._prompts.encode(request)
        if len(tokens) >= self.context_tokens:
            # OpenAI's wording, by which clients recognize that they must shorten the conversation.
            raise ContextLengthExceeded(
                f"This model's maximum context length is {self.context_tokens} tokens, prompt and answer together. "
                f"However, your messages resulted in {len(tokens)} tokens",
                fix="Please reduce the length of the messages.",
            )
        return tokens


@dataclass(frozen=True, slots=True)
class Guidance:
    """A grammar of the runtime. `source` is where the client wrote it."""

    kind: str
    text: str
    source: str


def _session(threads: int) -> dict[str, object]:
    # The library's own default is half of the processors. With spinning, a second runner (the one that is being
    # probed while this one serves) would occupy its processors even while it waits.
    # Severity 3 (error): the inputs of an adapter cause runtime warnings that would fill the log.
    options = {"intra_op_num_threads": threads, "session.intra_op.allow_spinning": "0", "log_severity_level": 3}
    return {"model": {"decoder": {"session_options": options}}}


class Generation:
    """The generation of one answer. `step` does one unit of work, so that several answers can take turns."""

    def __init__(self, model: LoadedModel, request: InferenceRequest, received: float) -> None:
        """`received`: `time.perf_counter()` when the request arrived. Time to first token starts there."""
        self._model, self._received = model, received
        self._unread = self._prompt = model.encode(request)
        params = og.GeneratorParams(model.model)
        params.set_search_options(**_search(request, len(self._prompt), model))
        self._guidance = model.guidance(request)
        self._generator = _generator(model, params, self._guidance)
        if model.adapters:
            self._generator.set_active_adapter(model.adapters, ADAPTER_PATH)
        self._stream = model.tokenizer.create_stream()
        self._scores, self._shown = Scores(request, model.tokenizer.decode), ShownScores()
        self._stops = StopWords(request.stop)
        self._parser = _parser(request, model)
        self._markers = model.markers if self._parser else {}
        self._completion_tokens = 0
        self._first = self._last = received
        self._finish: FinishReason | None = None
        self._text: list[str] = []
        self._calls: list[ToolCall] = []

    def step(self) -> Token:
        """Reads a chunk of the prompt or generates one token. Returns the part of the answer that is now final."""
        if self._unread:
            chunk, self._unread = self._unread[:PREFILL_CHUNK_TOKENS], self._unread[PREFILL_CHUNK_TOKENS:]
            self._generator.append_tokens(chunk)
            return Token("")
        token = self._next_token()
        self._last = time.perf_counter()
        self._first = self._first if self._completion_tokens else self._last
        self._completion_tokens += 1
        ended, score = token in self._model.end_tokens, self._scores.record(token)
        decoded = "" if ended else self._decoded(token)
        self._shown.add(None if ended else score, decoded)
        text = self._stops.feed(decoded)
        if self._stops.hit or ended:
            self._finish = "stop"
        elif self._generator.is_done():
            self._finish = "length"
        if self._finish:
            text += self._stops.flush()
        scores = self._shown.take(text, everything=self._finish is not None and not self._stops.hit)
        text, calls = self._split(text)
        self._text.append(text)
        self._calls += calls
        return Token(text, scores, calls)

    def _decoded(self, token: int) -> str:
        text, marker = str(self._stream.decode(token)), self._markers.get(token, "")
        return text if marker in text else text + marker

    def _split(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Splits off the calls of tools."""
        if self._parser is None:
            return text, ()
        text, calls = self._parser.feed(text)
        if self._finish:
            rest, others = self._parser.finish()
            text, calls = text + rest, calls + others
        if self._finish == "stop" and (calls or self._calls):
            self._finish = "tool_calls"
        return text, calls

    def _next_token(self) -> int:
        try:
            self._scores.prepare(self._generator)
            self._generator.generate_next_token()
        except RuntimeError:
            if not self._guidance:
                raise
            # A schema may exceed what the runtime can follow. The client chose it, so it is not the release's failure.
            raise PromptRefused(f"the runtime cannot follow {self._guidance.source} any further") from None
        return int(self._generator.get_next_tokens()[0])

    def done(self) -> Done | None:
        """Returns the whole answer once it is finished, otherwise None."""
        if self._finish is None:
            return None
        decoding, decoded = self._last - self._first, self._completion_tokens - 1
        return Done(
            text="".join(self._text),
            finish_reason=self._finish,
            prompt_tokens=len(self._prompt),
            completion_tokens=self._completion_tokens,
            ttft_s=self._first - self._received,
            tokens_per_s=decoded / decoding if decoded and decoding > 0 else None,
            calls=tuple(self._calls),
        )


def _parser(request: InferenceRequest, model: LoadedModel) -> ToolCallParser | None:
    form = model.tool_format
    return ToolCallParser(form, request.tools.callable) if request.tools and form else None


def _generator(model: LoadedModel, params: og.GeneratorParams, guidance: Guidance | None) -> og.Generator:
    """Returns a generator whose text fits `guidance`, if there is any. Raises `PromptRefused` for a bad schema."""
    if guidance is None:
        return og.Generator(model.model, params)
    try:
        # Without forced tokens: `get_next_tokens` would not return them.
        params.set_guidance(guidance.kind, guidance.text)
        return og.Generator(model.model, params)
    except RuntimeError as error:
        if "grammar" not in str(error):
            raise
        reason = str(error).removeprefix("Error creating grammar: ")[:_SHOWN_CHARACTERS]
        raise PromptRefused(f"{guidance.source} is not supported: {reason}") from None


def _search(request: InferenceRequest, prompt_tokens: int, model: LoadedModel) -> dict[str, object]:
    options: dict[str, object] = {
        # This is also the size of the key-value cache, which is allocated at the start.
        "max_length": min(prompt_tokens + request.max_tokens, model.context_tokens),
        "do_sample": request.temperature > 0,
        "top_p": request.top_p,
    }
    if request.temperature > 0:
        options["temperature"] = request.temperature
    if request.top_k is not None:
        options["top_k"] = min(request.top_k, model.vocabulary_tokens)
    if request.repetition_penalty != 1:
        options["repetition_penalty"] = request.repetition_penalty
    if request.seed is not None:
        options["random_seed"] = request.seed % 2**31
    return options
