"""Answers in the form that OpenAI's clients read: whole, or as the chunks of a stream."""

import time
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .answers import Piece
from .engine import Token

__all__ = ["Form"]


class Form:
    """How the answers to one request look.

    Args:
        chat: `chat.completion` objects, else `text_completion` ones.
        request_id: of the request.
        model: its model.
        tokenizer: to write tokens beside their log-probabilities.
        prompt_tokens: how many the prompts have.
        logprobs: whether log-probabilities were asked for.
        echo: for completions, what stands before each answer.
    """

    def __init__(
        self,
        *,
        chat: bool,
        request_id: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        prompt_tokens: int,
        logprobs: bool,
        echo: Sequence[str] = (),
    ) -> None:
        self.chat, self._tokenizer, self._logprobs, self._echo = chat, tokenizer, logprobs, echo
        self._prompt_tokens = prompt_tokens
        self._begun = set[int]()
        self._offsets = dict[int, int]()
        self._about = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }

    def usage(self, made: int) -> dict[str, int]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self._prompt_tokens + made,
        }

    def chunk(self, number: int, piece: Piece) -> dict[str, Any]:
        """A piece of an answer as a chunk of a stream."""
        first, text = number not in self._begun, self._text(number, piece.text)
        logprobs = self._written(number, piece.tokens) if piece.tokens else None
        choice: dict[str, Any] = {"index": number, "logprobs": logprobs, "finish_reason": piece.finish}
        if self.chat:
            choice["delta"] = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        else:
            choice["text"] = text
        return self._stream([choice])

    def usage_chunk(self, made: int) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        return self._stream([]) | {"usage": self.usage(made)}

    def whole(self, answers: Sequence[Sequence[Piece]], made: int) -> dict[str, Any]:
        """All answers at once."""
        choices = []
        for number, pieces in enumerate(answers):
            text = self._text(number, "".join(piece.text for piece in pieces))
            tokens = [token for piece in pieces for token in piece.tokens]
            choice = {"index": number, "logprobs": self._written(number, tokens), "finish_reason": pieces[-1].finish}
            own = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
            choices.append(choice | own)
        kind = "chat.completion" if self.chat else "text_completion"
        return self._about | {"object": kind, "choices": choices, "usage": self.usage(made)}

    def _stream(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._about | {"object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def _text(self, number: int, text: str) -> str:
        if number in self._begun:
            return text
        self._begun.add(number)
        return self._echo[number] + text if self._echo else text

    def _written(self, number: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        if self.chat:
            entries = [
                self._entry(t.id, t.logprob) | {"top_logprobs": [self._entry(*one) for one in t.top]} for t in tokens
            ]
            return {"content": entries, "refusal": None}
        texts, offsets = [self._tokenizer.decode([t.id]) for t in tokens], []
        place = self._offsets.get(number, len(self._echo[number]) if self._echo else 0)
        for text in texts:
            offsets.append(place)
            place += len(text)
        self._offsets[number] = place
        return {
            "tokens": texts,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self._tokenizer.decode([i]): p for i, p in ((t.id, t.logprob), *t.top)} for t in tokens],
            "text_offset": offsets,
        }

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = str(self._tokenizer.decode([token]))
        whole = "\ufffd" not in text  # else it is a part of a character, whose bytes the text does not show
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}
