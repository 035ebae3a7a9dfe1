"""A cache for a batch whose rows come and go: each row's keys and values end at one column, so they begin at different ones.

        column   0  1  2  3  4  5  6  7  8
        row 0          a  b  c  d  e  |          the window: columns from the longest row's first to `end`
        row 1                   f  g  |          the next tokens of all rows go into column `end`

To the model it is a cache of `width` tokens padded on the left, so masks, sliding windows and positions are those that
Transformers makes for any padded batch. Nothing is copied in a step: the window is a view of one buffer a layer. When the
window meets the buffer's end it moves back to the beginning, once in as many steps as it has columns or more.

Layers with a sliding window keep all their tokens; the mask limits what is seen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .errors import UnsupportedModelError

__all__ = ["SlotCache", "sliding_layers"]

_COLUMNS = 256  # that a buffer has at first


def sliding_layers(model: PreTrainedModel) -> tuple[bool, ...]:
    """For each layer of a decoder, whether it has a sliding window.

    Raises:
        UnsupportedModelError: a layer keeps something else than keys and values of its own.
    """
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(f"{type(model).__name__} is an encoder-decoder; decoders alone can be served.")
    layers = DynamicCache(config=config).layers
    others = sorted({type(layer).__name__ for layer in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"})
    if others or not layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers that keep more than keys and values of each token ({', '.join(others)}), "
            "which cannot be served in batches whose rows come and go. Use foreword generate."
        )
    assert all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return tuple(isinstance(layer, DynamicSlidingWindowLayer) for layer in layers)


class _Window:
    """Where the rows are, the same in all layers."""

    def __init__(self) -> None:
        self.rows, self.columns = 1, _COLUMNS  # of the buffers
        self.count = 0  # rows in use: the first ones
        self.start, self.end = 0, 0


class SlotCache(Cache):
    """Keys and values of rows of different lengths, for a forward pass over all of them.

    Args:
        sliding: for each layer, whether it has a sliding window: `sliding_layers(model)`.

    Example:
        >>> cache = SlotCache(sliding_layers(model))                      # doctest: +SKIP
        >>> cache.begin([3, 5])  # two rows, of three and five tokens     # doctest: +SKIP
        >>> cache.reserve(5)                                              # doctest: +SKIP
        >>> model(ids, attention_mask=cache.mask(5), cache=cache)         # doctest: +SKIP
        >>> cache.advance(5)                                              # doctest: +SKIP
    """

    def __init__(self, sliding: Sequence[bool]) -> None:
        self._window = _Window()
        self._sliding = tuple(sliding)
        self._padding: list[int] = []  # for each row, how many of the next columns are none of its tokens
        self.lengths: list[int] = []
        super().__init__(layers=[_SlotLayer(self._window, is_sliding) for is_sliding in sliding])

    @property
    def width(self) -> int:
        """How many columns the longest row takes."""
        return self._window.end - self._window.start

    @property
    def num_bytes(self) -> int:
        """What the buffers take."""
        buffers = [t for layer in self._slots for t in (layer.keys, layer.values) if t is not None]
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)

    @property
    def _slots(self) -> "list[_SlotLayer]":
        return self.layers  # pyright: ignore[reportReturnType]

    def begin(self, lengths: Sequence[int]) -> None:
        """Make room for rows that have no tokens yet: as many as `lengths`, which says how many tokens will come.

        Their tokens are given padded on the left to the longest.
        """
        assert not self.lengths, "the cache is in use"
        self.lengths = [0] * len(lengths)
        self._padding = [max(lengths) - length for length in lengths]
        self._window.count = len(lengths)
        self._move(len(lengths), max(lengths), end=0)

    def mask(self, queries: int) -> Bool[Tensor, "B S"] | None:
        """Which columns of the window and the next `queries` hold tokens; `None` where all of them do."""
        width = self.width + queries
        lengths = torch.tensor([n + max(queries - p, 0) for n, p in zip(self.lengths, self._padding, strict=True)])
        return None if bool((lengths == width).all()) else torch.arange(width) >= width - lengths[:, None]

    def positions(self, queries: int) -> Int[Tensor, "B T"]:
        """Where the next `queries` columns' tokens are in their rows; 0 for padding."""
        begin = torch.tensor([n - p for n, p in zip(self.lengths, self._padding, strict=True)])
        return (begin[:, None] + torch.arange(queries)).clamp_min(0)

    def reserve(self, queries: int) -> None:
        """Have `queries` free columns behind the window. To be called before a forward pass."""
        if self._window.end + queries > self._window.columns:
            self._move(self._window.count, self.width + queries, end=self.width)

    def advance(self, queries: int) -> None:
        """The next `queries` columns have been filled by a forward pass."""
        self._window.end += queries
        for row, padding in enumerate(self._padding):
            self.lengths[row] += max(queries - padding, 0)
            self._padding[row] = max(padding - queries, 0)

    def join(self, other: "SlotCache", row: int) -> None:
        """Take over a row of another cache, as the last one."""
        length, window = other.lengths[row], self._window
        window.count += 1
        end = max(window.end, length)
        if window.count > window.rows or end > window.columns:
            end = max(self.width, length)
            self._move(window.count, end, end)
        elif end > window.end:  # the window begins too early for so long a row
            self._move(window.count, end, end)
        self.lengths.append(length)
        self._padding.append(0)
        window.start = min(window.start, end - length)
        for own, theirs in zip(self._slots, other._slots, strict=True):
            own.copy(window.count - 1, end - length, theirs, row, other._window.end - length, length)

    def leave(self, row: int) -> None:
        """Give up a row. The last one takes its number."""
        last, window = len(self.lengths) - 1, self._window
        length = self.lengths[last]
        if row != last:
            for layer in self._slots:
                layer.copy(row, window.end - length, layer, last, window.end - length, length)
            self.lengths[row], self._padding[row] = length, self._padding[last]
        self.lengths.pop()
        self._padding.pop()
        window.count = last
        window.start = window.end - max(self.lengths, default=0)
        if not self.lengths:
            window.start = window.end = 0
            if window.columns > _COLUMNS:  # give back what long rows took
                window.rows, window.columns = 1, _COLUMNS
                for layer in self._slots:
                    layer.reset()

    def _move(self, rows: int, needed: int, end: int) -> None:
        """Let the window end at `end`, in buffers with room for `rows` and twice the `needed` columns.

        Twice, so that the window moves only once in as many steps as it has columns.
        """
        window, capacity, columns = self._window, self._window.rows, _COLUMNS
        while columns < 2 * needed:
            columns *= 2
        if columns < window.columns < 8 * columns:  # smaller buffers only where it matters
            columns = window.columns
        while capacity < rows:
            capacity *= 2
        for layer in self._slots:
            layer.move(capacity, columns, window.start, window.end, end)
        window.rows, window.columns, window.start, window.end = capacity, columns, end - self.width, end


class _SlotLayer(CacheLayerMixin):
    """One layer's buffers: keys `[rows, G, columns, D]` and values `[rows, G, columns, E]`."""

    def __init__(self, window: _Window, is_sliding: bool) -> None:
        super().__init__()
        self.window, self.is_sliding = window, is_sliding

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self.window.rows, key_states.shape[1], self.window.columns)
        # Zeros, not whatever was in memory: columns before a row's first token are masked, but 0 * nan would be nan.
        self.keys = key_states.new_zeros(*shape, key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[3])
        self.is_initialized = True

    def update(
        self,
        key_states: Float[Tensor, "B G T D"],
        value_states: Float[Tensor, "B G T E"],
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "B G S D"], Float[Tensor, "B G S E"]]:
        """Write the new tokens behind the window; the window with them."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        start, end, new, count = self.window.start, self.window.end, key_states.shape[2], len(key_states)
        self.keys[:count, :, end : end + new] = key_states
        self.values[:count, :, end : end + new] = value_states
        return self.keys[:count, :, start : end + new], self.values[:count, :, start : end + new]

    def copy(self, row: int, column: int, other: "_SlotLayer", its_row: int, its_column: int, length: int) -> None:
        """Take `length` columns of a row of another layer."""
        if other.keys is None or other.values is None:
            return
        if self.keys is None or self.values is None:
            self.lazy_initialization(other.keys, other.values)
        assert self.keys is not None
        assert self.values is not None
        self.keys[row, :, column : column + length] = other.keys[its_row, :, its_column : its_column + length]
        self.values[row, :, column : column + length] = other.values[its_row, :, its_column : its_column + length]

    def move(self, rows: int, columns: int, start: int, end: int, new_end: int) -> None:
        """Let columns `start` to `end` end at `new_end`, in buffers of this size."""
        if self.keys is None or self.values is None:
            return
        self.keys = _moved(self.keys, rows, columns, start, end, new_end)
        self.values = _moved(self.values, rows, columns, start, end, new_end)

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.window.end - self.window.start

    def get_max_length(self) -> int:
        return -1


def _moved(buffer: Tensor, rows: int, columns: int, start: int, end: int, new_end: int) -> Tensor:
    new_start = new_end - (end - start)
    if (len(buffer), buffer.shape[2]) == (rows, columns) and (new_end <= start or new_start >= end):  # no overlap
        moved = buffer
    else:
        moved = buffer.new_zeros(rows, buffer.shape[1], columns, buffer.shape[3])
    moved[: len(buffer), :, new_start:new_end] = buffer[:, :, start:end]
    return moved
