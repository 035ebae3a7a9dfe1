"""Rows: every format, every mistake with its place, and what the model sees."""

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ROWS, make_tokenizer

from foreword.data import IGNORED, collate, encode, prompt_ids, read_rows, schedule
from foreword.errors import DataError


def write(path, text) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_formats_read_alike(tmp_path, rows_file):
    import pandas

    frame = pandas.DataFrame(ROWS)
    frame.to_csv(tmp_path / "rows.csv", index=False)
    frame.to_parquet(tmp_path / "rows.parquet")
    wanted = [(r["prompt"], r["completion"]) for r in ROWS]
    for source in (rows_file, tmp_path / "rows.csv", tmp_path / "rows.parquet", ROWS):
        rows, bad = read_rows(source)
        assert [(row.prompt, row.completion) for row in rows] == wanted
        assert not bad


def test_chat_messages_end_with_the_completion():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    [row], _ = read_rows([{"messages": messages}])
    assert (row.prompt, row.completion, len(row.messages)) == ("Hi", "Hello", 2)
    [row], _ = read_rows([{"messages": messages[:2], "references": ["Hey", "Hello"]}])
    assert (row.completion, row.answers) == ("Hey", ["Hey", "Hello"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a"}', 'no "completion"'),
        ('{"completion": "a"}', 'no "prompt" and no "messages"; the row has completion'),
        ('{"prompt": 3, "completion": "a"}', '"prompt" must be a string, got int'),
        ('{"prompt": "a", "completion": "  "}', '"completion" is empty'),
        ('{"prompt": "a", "completion": "b", "references": [1]}', '"references" must be a list'),
        ('{"messages": []}', '"messages" must be a non-empty list'),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "nothing before it"),
        ('{"messages": [{"content": "a"}]}', 'message 1 must be an object with "role"'),
        ("[1, 2]", "expected an object with fields, got list"),
        ('{"prompt": "a"', "not JSON"),
        (b'{"prompt": "\xff", "completion": "b"}', "not UTF-8"),
    ],
)
def test_bad_row_is_named_with_its_line(tmp_path, line, told):
    good = json.dumps(ROWS[0]).encode() + b"\n"
    file = write(
        tmp_path / "rows.jsonl", good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good
    )
    with pytest.raises(DataError, match=r"rows.jsonl:3.*--skip-bad-rows") as error:
        read_rows(file)
    assert told in str(error.value)
    rows, bad = read_rows(file, skip_bad=True)
    assert len(rows) == 2
    assert len(bad) == 1
    assert told in bad[0]


def test_files_that_cannot_be_read(tmp_path):
    for source, told in (
        (tmp_path / "none.jsonl", "no such file"),
        (write(tmp_path / "rows.txt", "x"), "format of a .txt file"),
        (write(tmp_path / "empty.jsonl", "\n"), "no usable rows"),
        (write(tmp_path / "latin.csv", b"prompt,completion\na,b\n\xe9,x\n"), "latin.csv:3: not UTF-8"),
        (write(tmp_path / "bad.parquet", "x"), "cannot be loaded"),
        ("nosuch/dataset", "cannot be loaded by the datasets library"),
    ):
        with pytest.raises(DataError, match=told):
            read_rows(source)


def test_model_sees_the_template_and_learns_the_completion(tokenizer):
    row = {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}
    rows, _ = read_rows([row])
    [example], _ = encode(rows, tokenizer, tokenizer.chat_template, 100)
    assert tokenizer.decode(example.input_ids) == "<user>ab<eos><assistant>cd<eos>"
    assert tokenizer.decode(example.input_ids[example.prompt_length :]) == "cd<eos>"
    assert list(example.input_ids[: example.prompt_length]) == prompt_ids(rows[0], tokenizer, tokenizer.chat_template)
    [plain], _ = encode(rows, make_tokenizer(None), None, 100)
    assert tokenizer.decode(plain.input_ids) == "abcd<eos>"


def test_too_long_rows_are_named_or_left_out(tokenizer):
    rows, _ = read_rows([*ROWS[:2], {"prompt": "x" * 200, "completion": "y"}])
    with pytest.raises(DataError, match="row 3: 2[0-9][0-9] tokens, more than max_length=100"):
        encode(rows, tokenizer, None, 100)
    examples, bad = encode(rows, tokenizer, None, 100, skip_bad=True)
    assert (len(examples), len(bad)) == (2, 1)


def test_template_that_refuses_is_an_error(tokenizer):
    rows, _ = read_rows(ROWS[:1])
    with pytest.raises(DataError, match="refuses these messages: no users"):
        prompt_ids(rows[0], tokenizer, "{{ raise_exception('no users') }}")


@pytest.mark.parametrize("packed", [False, True])
def test_batch_holds_each_row_and_predicts_its_completion(tokenizer, packed):
    examples, _ = encode(read_rows([ROWS[0], {"prompt": "a", "completion": "b"}, ROWS[1]])[0], tokenizer, None, 100)
    groups = [examples[:2], examples[2:]]
    batch = collate(groups, packed)
    width = batch.input_ids.shape[1]
    owners, flat = torch.tensor(batch.owners).repeat_interleave(width), batch.input_ids.flatten()
    real = batch.labels != IGNORED
    assert torch.equal(flat[batch.places[real] + 1], batch.labels[real])
    for run, group in enumerate(groups):
        expected = [token for example in group for token in example.input_ids[example.prompt_length :]]
        assert batch.labels[real][owners[batch.places[real]] == run].tolist() == expected
    assert set(batch.columns.tolist()) >= set((batch.places % width).tolist())
    if packed:
        assert batch.starts is not None
        assert batch.position_ids is not None
        documents = [flat[a:b].tolist() for a, b in itertools.pairwise(batch.starts.tolist())]
        assert all(list(example.input_ids) in documents for example in examples)
        assert max(map(len, documents)) <= batch.longest
        starts = (batch.position_ids.flatten() == 0).nonzero().squeeze(-1)
        assert set(starts.tolist()) == set(batch.starts.tolist()) - {flat.numel()}
    else:
        assert [row[: len(e.input_ids)] for row, e in zip(batch.input_ids.tolist(), examples, strict=True)] == [
            list(example.input_ids) for example in examples
        ]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3))
def test_every_epoch_has_every_row_once_in_batches_of_like_length(lengths, size, seed, epoch):
    batches = schedule(lengths, size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert batches == schedule(lengths, size, seed, epoch)
    assert all(len(batch) <= size for batch in batches)
    assert sum(len(batch) < size for batch in batches) <= 1
    if len(lengths) <= 16 * size:
        spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches)
        assert all(high <= low for (_, high), (low, _) in itertools.pairwise(spans))
