"""Loading a base."""

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from foreword.models import splits_words

WORDS = [f"▁{word}" for word in ("coffee", "shop", "city", "centre")]


@pytest.mark.parametrize("whole", [True, False])
def test_tokenizer_that_was_misread_is_noticed(whole):
    """Pieces that score higher than the words they make up."""
    letters = sorted({letter for word in WORDS for letter in word} | {"a"})
    scores = [("<unk>", 0.0), *((word, -1.0 if whole else -99.0) for word in WORDS), *((one, -2.0) for one in letters)]
    own = Tokenizer(models.Unigram(scores, unk_id=0))
    own.normalizer = normalizers.Replace(" ", "▁")
    assert splits_words(PreTrainedTokenizerFast(tokenizer_object=own)) == (not whole)
