"""Choose the next token of each row: penalties, bias, temperature, top-k, top-p, seeds, log-probabilities.

A row's choice depends on its own logits, its own past and its own seed alone, never on what else is in the batch.
"""

import random
from collections import Counter
from collections.abc import Sequence
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .engine import Sampling, Token

__all__ = ["Chooser", "choose"]

_LIKELIEST = 256  # sorted first where top-p is asked for; all the others only where these are not enough


class Chooser:
    """How the tokens of one answer are chosen."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], device: torch.device) -> None:
        self.sampling = sampling
        self._random = random.Random(sampling.seed)
        self._counts = Counter[int]()  # of the answer's tokens
        self._seen = dict.fromkeys(prompt) if sampling.repetition_penalty != 1 else {}
        self._device = device
        self.takes_likeliest = (
            (sampling.temperature == 0 or sampling.top_k == 1)
            and sampling.logprobs is None
            and not sampling.logit_bias
            and (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1, 0, 0)
        )

    def choose(self, logits: Float[Tensor, " V"]) -> Token:
        """The next token after these logits, in float32 or more."""
        sampling = self.sampling
        changed = self._penalized(logits)
        if sampling.temperature == 0 or sampling.top_k == 1:
            chosen = int(changed.argmax())
        else:
            chosen = _sample(changed / sampling.temperature, sampling.top_k, sampling.top_p, self._random.random())
        self._counts[chosen] += 1
        if sampling.repetition_penalty != 1:
            self._seen[chosen] = None
        if sampling.logprobs is None:
            return Token(chosen)
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(sampling.logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)

    def _penalized(self, logits: Float[Tensor, " V"]) -> Float[Tensor, " V"]:
        sampling = self.sampling
        seen = list(self._seen)
        counted = list(self._counts) if sampling.presence_penalty or sampling.frequency_penalty else []
        biased = list(sampling.logit_bias)
        if not (seen or counted or biased):
            return logits
        logits = logits.clone()
        if seen:
            index = self._index(seen)
            values, penalty = logits[index], sampling.repetition_penalty
            logits[index] = torch.where(values > 0, values / penalty, values * penalty)
        if counted:
            times = torch.tensor([self._counts[i] for i in counted], dtype=logits.dtype, device=self._device)
            logits[self._index(counted)] -= sampling.presence_penalty + sampling.frequency_penalty * times
        if biased:
            bias = torch.tensor([sampling.logit_bias[i] for i in biased], dtype=logits.dtype, device=self._device)
            logits[self._index(biased)] += bias
        return logits

    def _index(self, ids: list[int]) -> Int[Tensor, " N"]:
        return torch.tensor(ids, device=self._device)


def choose(logits: Float[Tensor, "B V"], choosers: Sequence[Chooser]) -> list[Token | None]:
    """The next token of each row; `None` where the logits are not finite numbers."""
    values, likeliest = (tensor.tolist() for tensor in logits.max(-1))  # for all rows at once: most want no more
    tokens = list[Token | None]()
    for row, chooser in enumerate(choosers):
        if not isfinite(values[row]):
            tokens.append(None)
        elif chooser.takes_likeliest:
            tokens.append(Token(likeliest[row]))
        else:
            tokens.append(chooser.choose(logits[row].to(torch.promote_types(torch.float32, logits.dtype))))
    return tokens


def _sample(logits: Float[Tensor, " V"], top_k: int, top_p: float, number: float) -> int:
    """The token at which the running sum of the probabilities, those left over, passes `number` (0 to 1)."""
    ids = None
    if top_k:
        logits, ids = logits.topk(min(top_k, len(logits)))
    probabilities = logits.double().softmax(-1)
    if top_p < 1:
        likeliest, order = probabilities.topk(min(_LIKELIEST, len(probabilities)))
        if float(likeliest.sum()) < top_p:
            likeliest, order = probabilities.sort(descending=True, stable=True)
        before = likeliest.cumsum(-1) - likeliest
        kept = int((before < top_p).sum())  # the fewest that together have top_p, at least one
        probabilities = likeliest[:kept]
        ids = order[:kept] if ids is None else ids[order[:kept]]
    sums = probabilities.cumsum(-1)
    place = min(int(torch.searchsorted(sums, number * float(sums[-1]), right=True)), len(sums) - 1)
    return place if ids is None else int(ids[place])
