"""A request's prompt as tokens. Text of the client never becomes a control token; the chat template's own does.

The tokenizer reads control tokens (`<|im_end|>`) wherever they occur in a text, so a message could end its own turn and
begin one of the system. Each such text in a message is therefore cut after its first character, and the pieces of the
prompt are tokenized one by one: no piece contains a whole control token of the client. A prompt without such texts is
tokenized as a whole, exactly as in training.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slmops.contracts.errors import PromptRefused
from slmops.gateway.serving.inference import ChatMessage, InferenceRequest, Tool
from slmops.gateway.serving.tool_calls import MARKERS
from slmops.gateway.serving.tool_templates import call_id, find_format
from slmops.kit.prompt_tokens import PromptTokenizer


class PromptEncoder:
    """Makes the tokens of requests. Raises `OSError` or `ValueError` if the files of the model's folder are damaged."""

    def __init__(self, tokenizer: PromptTokenizer, folder: Path) -> None:
        self._tokenizer = tokenizer
        tokens, template = _added_tokens(folder), _chat_template(folder)
        special = {text for text, token in tokens.items() if token.special}
        # Tokens such as <think> are not "special", but the template gives them a meaning.
        named = {text for text in tokens if text.strip() and text in template}
        self._cuts = _pattern(special | named)
        # An assistant's message is an earlier answer, from which templates remove the reasoning by its tags.
        self._cuts_of_answers = _pattern(special)
        self.tool_format = find_format(tokenizer.render)
        markers = MARKERS[self.tool_format] if self.tool_format else ()
        self.markers = {text: tokens[text].id for text in markers if text in tokens and tokens[text].id >= 0}
        """The ids of the texts around calls, where they are tokens of their own."""
        self.control_markers = {text: number for text, number in self.markers.items() if tokens[text].special}

    def encode(self, request: InferenceRequest) -> list[int]:
        """Raises `PromptRefused` if the prompt is empty or the chat template rejects the messages."""
        mark = secrets.token_hex(16)  # nobody can guess it, and templates and JSON leave letters and digits unchanged
        try:
            first, *others = self._text(request, mark).split(mark)
            # A chat template writes the BOS token itself; before a text without a template, the tokenizer does.
            begin = self._tokenizer.text if request.messages is None and first else self._tokenizer.part
            tokens = [*begin(first), *(token for piece in others for token in self._tokenizer.part(piece))]
        except RuntimeError:
            # The library's message may quote the prompt.
            raise PromptRefused("the model's chat template rejected these messages") from None
        if not tokens:
            raise PromptRefused("the prompt is empty")
        return tokens

    def _text(self, request: InferenceRequest, mark: str) -> str:
        """Returns the text of the prompt, with `mark` wherever it is cut."""
        if request.messages is None:
            return str(_cut(request.prompt or "", self._cuts, mark))
        tools = [_cut(_plain(tool), self._cuts, mark) for tool in request.tools.offered] if request.tools else ()
        return self._tokenizer.render([self._message(message, mark) for message in request.messages], tools)

    def _message(self, message: ChatMessage, mark: str) -> dict[str, Any]:
        cuts = self._cuts_of_answers if message.role == "assistant" else self._cuts
        text, fields = {"content": message.content}, message.model_dump(exclude_none=True, exclude={"role", "content"})
        return {"role": message.role, **_cut(text, cuts, mark), **_cut(self._with_ids(fields), self._cuts, mark)}

    def _with_ids(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Returns the fields with the ids of calls in the form that the template accepts."""
        if answered := fields.get("tool_call_id"):
            fields["tool_call_id"] = call_id(self.tool_format, answered)
        if calls := fields.get("tool_calls"):
            fields["tool_calls"] = [call | {"id": call_id(self.tool_format, call["id"] or "")} for call in calls]
        return fields


def _plain(tool: Tool) -> dict[str, Any]:
    return {"type": "function", "function": tool.model_dump(exclude_none=True)}


def _cut(value: Any, cuts: re.Pattern[str] | None, mark: str) -> Any:
    """Inserts `mark` after the first character of each control token in the texts of `value`, a JSON value."""
    if isinstance(value, str):
        return cuts.sub(lambda found: found[0] + mark, value) if cuts else value
    if isinstance(value, dict):
        return {_cut(name, cuts, mark): _cut(one, cuts, mark) for name, one in value.items()}
    return [_cut(one, cuts, mark) for one in value] if isinstance(value, (list, tuple)) else value


def _pattern(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Returns a pattern that matches the first character of each of `texts`, also where they overlap."""
    whole = "|".join(re.escape(text) for text in sorted(texts) if len(text) > 1)
    return re.compile(f"(?=(?:{whole})).", re.DOTALL) if whole else None


@dataclass(frozen=True, slots=True)
class _Added:
    id: int
    special: bool


def _added_tokens(folder: Path) -> dict[str, _Added]:
    """Returns the texts that the tokenizer always reads as one token: their ids, and whether each is declared as
    special."""
    tokens = [(token.get("id", -1), token) for token in _tokenizer_json(folder)]
    declared = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    tokens += declared.items() if isinstance(declared, dict) else []
    return {str(token["content"]): _Added(int(number), bool(token.get("special"))) for number, token in tokens}


def _tokenizer_json(folder: Path) -> list[dict[str, Any]]:
    """Reads only the added tokens: a vocabulary of megabytes would need much memory."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r'"added_tokens"\s*:\s*(?=\[)', text)
    return list(json.JSONDecoder().raw_decode(text, found.end())[0]) if found else []


def _chat_template(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    return json.dumps(_json(folder / "tokenizer_config.json").get("chat_template", ""), ensure_ascii=False)


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes())) if path.exists() else {}
