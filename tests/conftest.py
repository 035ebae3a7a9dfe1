"""Shapes enforced in every annotated function, and what the tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's library is imported
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: more threads only wait for each other

from jaxtyping import install_import_hook

install_import_hook("foreword", "beartype.beartype")

import json  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import transformers  # noqa: E402
from tiny import FAMILIES, ROWS, make_model, make_tokenizer  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerFast  # noqa: E402

transformers.logging.disable_progress_bar()


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make_model(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")
    return file


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with its tokenizer, to be loaded by name."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model("llama").float().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
