"""Documents end to end in one row: what tells a model of them, and whether it then keeps them apart."""

from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .anatomy import input_device, sample_inputs, stacks
from .attachment import attach
from .prefix import Prefix

__all__ = ["can_pack", "packed_inputs"]

_packing: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_pack(model: PreTrainedModel) -> bool:
    """Whether documents end to end in one row are to the model what rows of their own are; found by trying.

    They are not where something else than attention passes from token to token (state spaces, convolutions), where
    attention is no plain softmax over a window of tokens, or where no kernel of the device takes packed documents.
    """
    if model not in _packing:
        _packing[model] = _packs(model)
    return _packing[model]


@torch.no_grad()
def _packs(model: PreTrainedModel) -> bool:
    found = stacks(model)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    device = input_device(model)
    half = model.dtype in (torch.bfloat16, torch.float16)
    if len(found) != 1 or not found[0].takes_positions or model.main_input_name != "input_ids":
        return False
    if device.type != "cuda" or not half or not kinds <= {"full_attention", "sliding_attention"}:
        return False
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    documents = [sample_inputs(model, length, generator)["input_ids"] for length in (5, 12, 9)]
    positions = torch.cat([torch.arange(ids.shape[1], device=device) for ids in documents]) + found[0].first_position
    starts = torch.tensor([0, 5, 17, 26], dtype=torch.int32, device=device)
    sites = found[0].sites[: (len(found[0].sites) + 1) // 2]  # a layer without a prefix has to keep them apart as well
    tensors = [(draw(2, site.num_kv_heads, site.key_dim), draw(2, site.num_kv_heads, site.value_dim)) for site in sites]
    with attach(model, Prefix(sites, tensors, position_offset=2)):
        expected = torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in documents]).float()
        packed = {"input_ids": torch.cat(documents, 1), "position_ids": positions[None]} | packed_inputs(
            starts, 12, device
        )
        try:
            together = model(**packed, use_cache=False).logits[0].float()
        except (TypeError, ValueError, RuntimeError):  # some models take no such arguments, some no such mask
            return False
    return bool((together - expected).norm() < 0.05 * expected.norm())


def packed_inputs(starts: Tensor | None, longest: int, device: torch.device) -> dict[str, Any]:
    """What tells a model of packed documents, beside `position_ids`: Transformers' names, and a mask so that it makes none.

    Without `starts` every row is one document of `longest` tokens.
    """
    inputs = {
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return inputs if starts is None else inputs | {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
