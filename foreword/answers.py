"""Answers as text: what an engine says about a request, token by token, made readable and cut at stop strings.

Knows no HTTP. Everything here runs on one event loop.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

from .engine import Engine, Event, Failed, Request, Token
from .errors import ForewordError

__all__ = ["Answer", "Piece", "Reader", "merged"]

_UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no whole character


@dataclass(frozen=True)
class Piece:
    """The next part of an answer: text that will not be taken back, and the tokens that have come since the last."""

    text: str
    tokens: tuple[Token, ...] = ()
    finish: Literal["stop", "length"] | None = None


class Reader:
    """Turns the tokens of one answer into text, as far as it is certain.

    Bytes that are no whole character yet are held back, and so is what may be the beginning of a stop string.

    Args:
        tokenizer: what made the prompt.
        stop: strings that end the answer. The text ends before the first of them.

    Example:
        >>> from transformers import AutoTokenizer
        >>> reader = Reader(AutoTokenizer.from_pretrained("gpt2"), stop=["."])  # doctest: +SKIP
        >>> reader.read(464), reader.read(13), reader.stopped                   # doctest: +SKIP
        ('The', '', True)
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop, self.stopped = tokenizer, tuple(stop), False
        self._ids: list[int] = []
        self._known, self._read = 0, 0  # ids before the first are out of sight; those before the second are in the text
        self._held = ""

    def read(self, token: int) -> str:
        """What the answer is longer by."""
        self._ids.append(token)
        before = self._decode(self._ids[self._known : self._read])
        now = self._decode(self._ids[self._known :])
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            return ""
        self._known, self._read = self._read, len(self._ids)
        return self._release(now[len(before) :])

    def rest(self) -> str:
        """What was held back, once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._known : self._read])
        text = self._release(self._decode(self._ids[self._known :])[len(before) :])
        return text if self.stopped else text + self._held

    def _decode(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(string) for string in self.stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        kept = max((_overlap(text, string) for string in self.stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` may be the beginning of `string`."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)


class Answer:
    """One answer in the making. Iterate over its pieces; leaving the iteration cancels the request.

    Raises:
        ForewordError: as `Engine.submit`, when made; as the engine's `Failed` event, while iterating.
    """

    def __init__(self, engine: Engine, request: Request, reader: Reader) -> None:
        self.request, self.reader, self.num_tokens = request, reader, 0
        self._engine, self._events = engine, asyncio.Queue[Event]()
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        engine.submit(request, emit)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """The parts of the answer as they come; the last one has a `finish`."""
        try:
            while True:
                event = await self._events.get()
                tokens, text = list[Token](), ""
                while isinstance(event, Token):  # all that have come, as one piece
                    self.num_tokens += 1
                    tokens.append(event)
                    text += self.reader.read(event.id)
                    if self.reader.stopped:
                        yield Piece(text, tuple(tokens), "stop")
                        return
                    if self._events.empty():
                        break
                    event = self._events.get_nowait()
                if isinstance(event, Failed):
                    raise event.error
                if not isinstance(event, Token):
                    reason = "length" if event.reason == "length" else "stop"
                    yield Piece(text + self.reader.rest(), tuple(tokens), reason)
                    return
                yield Piece(text, tuple(tokens))
        finally:
            self.close()

    def close(self) -> None:
        """End the request, if it has not ended. For answers that are not iterated over to the end."""
        self._engine.cancel(self.request.id)


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers as they come, each with its answer's number.

    Raises:
        ForewordError: one of them failed; the others are cancelled.
    """
    pieces = asyncio.Queue[tuple[int, Piece] | BaseException | None]()

    async def pump(number: int, answer: Answer) -> None:
        try:
            async for piece in answer.pieces():
                pieces.put_nowait((number, piece))
            pieces.put_nowait(None)
        except ForewordError as error:
            pieces.put_nowait(error)

    tasks = [asyncio.create_task(pump(number, answer)) for number, answer in enumerate(answers)]
    try:
        left = len(tasks)
        while left:
            item = await pieces.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for answer in answers:  # a task that never began did not close its own
            answer.close()
