"""Tasks with a head: prefix and head are trained together, kept together, and lent to the model together."""

from typing import Any

import pytest
import torch
from tiny import HEAD_ROWS, gradients_of, make_pair_tokenizer, make_tokenizer
from torch.nn.functional import cross_entropy
from zoo import ENCODERS, make_model

import foreword
from foreword import Prefix, PrefixConfig, TrainConfig, attach, evaluate, text_prefix, train
from foreword.data import IGNORED
from foreword.errors import ConfigError, DataError, ModelMismatchError
from foreword.fingerprint import check_fingerprint, digest, fingerprint
from foreword.heads import head_names, head_tensors, note_missing
from foreword.initialization import random_prefix
from foreword.tasks import TASKS, find_labels, read, task_of

EVERY = [*ENCODERS, "llama", "gpt2"]
TITLES = {
    "classification": "classification head",
    "token_classification": "token classification head",
    "question_answering": "question answering head",
}
EACH_TASK = [pytest.param(task, marks=pytest.mark.feature(title)) for task, title in TITLES.items()]
SMALL = PrefixConfig(num_virtual_tokens=3)


def make_base(family: str, task: str, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """A tiny model with the head of the task, and its tokenizer."""
    head, labels = TASKS[task].model_class, find_labels(TASKS[task], HEAD_ROWS[task])
    if labels is not None:
        changes |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return make_model(family, seed, head, **changes), make_pair_tokenizer() if family in ENCODERS else make_tokenizer()


def examples_of(model: Any, tokenizer: Any, task: str, count: int = 4) -> list[Any]:
    rows = read(TASKS[task], HEAD_ROWS[task])[0][:count]
    return TASKS[task].encode(rows, tokenizer, TASKS[task].about(model, tokenizer), 100)[0]


@pytest.fixture
def bert() -> tuple[Any, Any]:
    return make_base("bert", "classification")


def head_of(prefix: Prefix) -> dict[str, torch.Tensor]:
    assert prefix.head is not None
    return prefix.head


def random_with_head(model: Any, seed: int = 0) -> Prefix:
    """A random prefix with a random head that fits the model."""
    generator = torch.Generator().manual_seed(seed)
    head = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in head_tensors(model).items()}
    return random_prefix(model, 3, seed).with_head(head).double()


# ---------------------------------------------------------------------------------------- training, and what comes of it


@pytest.mark.parametrize("task", EACH_TASK)
@pytest.mark.parametrize("family", EVERY)
def test_prefix_and_head_learn_and_the_file_answers_alike(family, task, tmp_path):
    model, tokenizer = make_base(family, task)
    before, losses = digest(model), []
    rows = HEAD_ROWS[task][:4]
    config = TrainConfig(
        task=task, steps=24, learning_rate=0.1, head_learning_rate=0.1, held_out_fraction=0.0, dropout=False
    )
    prefix = train(model, tokenizer, rows, SMALL, config, on_step=lambda p: losses.append(p.loss))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert digest(model) == before
    assert prefix.metadata["task"] == task
    assert prefix.head is not None
    assert prefix.head.keys() == set(head_names(model))
    assert not any(torch.equal(head_of(prefix)[name], own) for name, own in head_tensors(model).items())
    loaded = foreword.load(foreword.save(prefix, tmp_path / "p.safetensors"))
    other, _ = make_base(family, task)
    for name in head_names(other):
        other.get_parameter(name).data.normal_()  # as at each load
    one, few = (
        evaluate(other, tokenizer, HEAD_ROWS[task], loaded, batch_size=size).answers["prefix"] for size in (1, 5)
    )
    assert one == few  # however the rows are padded
    with attach(model, prefix), torch.no_grad():
        trained = sum(
            TASKS[task].loss(model, [examples_of(model, tokenizer, task, 4)[i : i + 1]]).sum() for i in range(4)
        )
    with attach(other, loaded), torch.no_grad():
        torch.testing.assert_close(TASKS[task].loss(other, [examples_of(other, tokenizer, task)]).sum(), trained)


@pytest.mark.parametrize("task", EACH_TASK)
@pytest.mark.parametrize("family", EVERY)
def test_loss_is_a_sum_over_rows_and_every_tensor_gets_a_gradient(family, task):
    model, tokenizer = make_base(family, task)
    examples = examples_of(model, tokenizer, task, 5)
    prefix = random_with_head(model)
    with attach(model, prefix):
        whole = TASKS[task].loss(model, [examples]).sum()
        torch.testing.assert_close(whole, sum(TASKS[task].loss(model, [[example]]).sum() for example in examples))
        whole.backward()
    assert all(gradient.abs().sum() > 0 for gradient in gradients_of(prefix))


@pytest.mark.parametrize("task", EACH_TASK)
def test_loss_is_that_of_the_model_itself(task):
    """For one row Transformers' own loss is the mean over the labels; QA's over the two ends."""
    model, tokenizer = make_base("bert", task)
    for example in examples_of(model, tokenizer, task):
        labels = torch.tensor([example.labels])
        given = {"labels": labels.squeeze(-1) if task == "classification" else labels}
        if task == "question_answering":
            given = {"start_positions": labels[:, 0], "end_positions": labels[:, 1]}
        types = {} if example.token_types is None else {"token_type_ids": torch.tensor([example.token_types])}
        expected = model(input_ids=torch.tensor([example.input_ids]), **types, **given).loss
        found = TASKS[task].loss(model, [[example]]).sum() / example.units
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.feature("classification head")
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_head_learns_at_its_own_rate_and_micro_batches_change_nothing(family):
    model, tokenizer = make_base(family, "classification")
    rows = HEAD_ROWS["classification"]

    def trained(**options: Any) -> Prefix:
        options.setdefault("dropout", False)
        config = TrainConfig(task="classification", steps=3, batch_size=6, **options)
        return train(model, tokenizer, rows, SMALL, config)

    whole, split, still = trained(), trained(micro_batches=3), trained(head_learning_rate=1e-12)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for name, own in head_tensors(model).items():
        torch.testing.assert_close(head_of(still)[name], own.float(), rtol=0, atol=1e-6)
        assert not torch.allclose(head_of(whole)[name], own.float(), rtol=0, atol=1e-4)


@pytest.mark.feature("classification head")
def test_dropout_is_that_of_the_base_and_repeats_with_the_seed():
    model, tokenizer = make_base("bert", "classification")

    def trained(**options: Any) -> Prefix:
        config = TrainConfig(task="classification", steps=3, **options)
        return train(model, tokenizer, HEAD_ROWS["classification"], SMALL, config)

    without, by_default, again, other = trained(dropout=False), trained(), trained(dropout=True), trained(seed=1)
    assert torch.equal(by_default.keys[0], again.keys[0])
    assert not torch.allclose(by_default.keys[0], without.keys[0])
    assert not torch.allclose(by_default.keys[0], other.keys[0])
    assert not model.training


@pytest.mark.feature("classification head")
def test_one_virtual_token_is_trained_as_none_is_frozen():
    model, tokenizer = make_base("bert", "classification")
    made = [
        train(
            model,
            tokenizer,
            HEAD_ROWS["classification"],
            PrefixConfig(1),
            TrainConfig(task="classification", steps=steps),
        )
        for steps in (1, 3)
    ]
    assert made[0].num_virtual_tokens == 1
    assert not torch.equal(made[0].keys[0], made[1].keys[0])


@pytest.mark.feature("classification head")
def test_base_in_bfloat16_trains_a_head_in_float32():
    model, tokenizer = make_base("bert", "classification")
    model = model.to(torch.bfloat16)
    config = TrainConfig(task="classification", steps=3, head_learning_rate=1e-4)
    prefix = train(model, tokenizer, HEAD_ROWS["classification"], SMALL, config)
    weight = head_of(prefix)["classifier.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())  # finer than the base could hold


@pytest.mark.feature("classification head")
@pytest.mark.parametrize("initialization", ["random", "noop", "text", "demonstrations"])
@pytest.mark.parametrize("family", ["bert", "modernbert", "llama"])
def test_prefix_of_a_head_may_start_anywhere(family, initialization):
    model, tokenizer = make_base(family, "classification")
    text = "is it glad or sad?" if initialization == "text" else None
    config = TrainConfig(task="classification", steps=2)
    start = PrefixConfig(3, initialization=initialization, init_text=text)
    assert train(model, tokenizer, HEAD_ROWS["classification"], start, config).num_virtual_tokens == 3
    with pytest.raises(ConfigError, match="virtual tokens cannot start from a text of"):
        start = PrefixConfig(30, initialization="text", init_text="glad or sad?")
        train(model, tokenizer, HEAD_ROWS["classification"], start, config)


@pytest.mark.feature("classification head")
def test_text_prefix_of_an_encoder_is_its_own_keys_and_values(bert):
    model, tokenizer = bert
    ids, kept = tokenizer("glad or sad")["input_ids"], {}
    attention = model.bert.encoder.layer[1].attention.self
    attention.key.register_forward_hook(lambda module, args, output: kept.update(key=output))
    prefix = text_prefix(model, ids)
    torch.testing.assert_close(prefix.keys[1].flatten(1), kept["key"][0])
    assert prefix.position_offset == 0


# -------------------------------------------------------------------------------------------------- lending the head


@pytest.mark.feature("classification head")
@pytest.mark.parametrize("family", EVERY)
def test_model_has_the_head_while_attached_and_its_own_after(family):
    model, tokenizer = make_base(family, "classification")
    ids = torch.tensor([tokenizer("glad")["input_ids"]])
    one, other, plain = random_with_head(model), random_with_head(model, 1), random_prefix(model, 3).double()
    own = {name: model.get_parameter(name) for name in head_names(model)}
    with torch.no_grad():
        base = model(ids).logits
        with attach(model, one) as attachment:
            first = model(ids).logits
            attachment.use(other)
            second = model(ids).logits
            attachment.use(plain)
            assert all(model.get_parameter(name) is parameter for name, parameter in own.items())
            attachment.use(one)
            torch.testing.assert_close(model(ids).logits, first)
        assert all(model.get_parameter(name) is parameter for name, parameter in own.items())
        torch.testing.assert_close(model(ids).logits, base)
        for name, parameter in own.items():
            parameter.copy_(head_of(one)[name])
        with attach(model, one.with_head(None)):
            torch.testing.assert_close(model(ids).logits, first)
    assert not torch.allclose(first, base)
    assert not torch.allclose(first, second)


@pytest.mark.feature("classification head")
def test_one_batch_has_one_head(bert):
    model, tokenizer = bert
    ids = torch.tensor([tokenizer("glad")["input_ids"]] * 2)
    one, same, other = random_with_head(model), random_with_head(model, 1), random_with_head(model, 2)
    same = same.with_head(one.head)
    with attach(model, [one, same]), torch.no_grad():
        mixed = model(ids).logits
    for i, prefix in enumerate((one, same)):
        with attach(model, prefix), torch.no_grad():
            torch.testing.assert_close(model(ids).logits[i], mixed[i])
    for rows in ([one, other], [one, None], [one, one.with_head(None)]):
        with pytest.raises(ConfigError, match="different heads"):
            attach(model, rows)
    with attach(model, one) as attachment:
        with pytest.raises(ConfigError, match="attached already"):
            attach(model, other)
        assert model.get_parameter("classifier.weight") is head_of(one)["classifier.weight"]
        attachment.detach()
        attachment.detach()


@pytest.mark.feature("classification head")
def test_head_that_does_not_fit_is_refused(bert):
    prefix = random_with_head(bert[0])
    labels = {"id2label": {i: str(i) for i in range(5)}, "label2id": {str(i): i for i in range(5)}}
    five = make_model("bert", head="ForSequenceClassification", **labels)
    with pytest.raises(ModelMismatchError, match=r"classifier.bias \(2,\), but .* has \(5,\).*load_base"):
        attach(five, prefix)
    masked = make_model("bert", head="ForMaskedLM")
    masked.bert.load_state_dict(bert[0].bert.state_dict(), strict=False)
    with pytest.raises(ModelMismatchError, match="has no such parameter"):
        attach(masked, prefix)


@pytest.mark.feature("classification head")
@pytest.mark.parametrize("family", EVERY)
def test_fingerprint_leaves_the_head_out(family):
    model, _ = make_base(family, "classification")
    taken = fingerprint(model)
    again, _ = make_base(family, "classification")
    for name in head_names(again):
        again.get_parameter(name).data.normal_()
    assert fingerprint(again) == taken
    tokens, _ = make_base(family, "token_classification")
    tokens.base_model.load_state_dict(model.base_model.state_dict(), strict=False)  # a pooler may be missing
    check_fingerprint(taken, tokens, family)
    check_fingerprint(fingerprint(tokens), model, family)
    with pytest.raises(ModelMismatchError, match="other weights"):
        check_fingerprint(taken, make_base(family, "classification", seed=1)[0], family)


@pytest.mark.feature("classification head")
def test_parameters_that_a_checkpoint_lacks_belong_to_the_head(bert):
    model, _ = bert
    assert set(head_names(model)) == {"classifier.weight", "classifier.bias"}
    note_missing(model, ["bert.pooler.dense.weight"])
    assert set(head_names(model)) == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"}
    assert head_names(make_model("bert")) == []


# ------------------------------------------------------------------------------------------------------- rows and ids


def encoded(task: str, row: dict[str, Any], tokenizer: Any = None, **about: Any) -> Any:
    rows, _ = read(TASKS[task], [row])
    [example], _ = TASKS[task].encode(rows, tokenizer or make_pair_tokenizer(), about, 100)
    return example


@pytest.mark.feature("classification head")
def test_one_text_or_two():
    tokenizer: Any = make_pair_tokenizer()
    one = encoded("classification", {"text": "ab", "label": 1}, labels=["0", "1"])
    assert tokenizer.decode(one.input_ids).replace(" ", "") == "<cls>ab<sep>"
    assert (one.labels, one.token_types, one.units) == ((1,), None, 1)
    two = encoded("classification", {"text": "ab", "text_pair": "c", "label": True}, labels=["false", "true"])
    assert tokenizer.decode(two.input_ids).replace(" ", "") == "<cls>ab<sep>c<sep>"
    assert (two.labels, two.token_types) == ((1,), (0, 0, 0, 0, 1, 1))
    row = {"text": "ab", "text_pair": "c", "label": "x"}
    plain = encoded("classification", row, make_tokenizer(), labels=["x", "y"])  # it knows no pairs: a line between
    assert make_tokenizer().decode(plain.input_ids) == "ab\nc"


@pytest.mark.feature("token classification head")
@pytest.mark.parametrize("make", [make_pair_tokenizer, make_tokenizer])
def test_first_token_of_each_word_carries_its_label(make):
    row = {"tokens": ["see", "Zoë", "x"], "labels": ["O", "B", "O"]}
    example = encoded("token_classification", row, make(), labels=["B", "O"])
    start = 1 if make is make_pair_tokenizer else 0
    places = {start: 1, start + 4: 0, start + 9: 1}  # bytes: see, a space, Z o and two for ë, a space, x
    assert {i: n for i, n in enumerate(example.labels) if n != IGNORED} == places
    assert example.units == 3


@pytest.mark.feature("token classification head")
def test_word_without_a_token_is_named():
    tokenizer = make_pair_tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(DataError, match="row 1: the tokenizer makes no token of its own of word 2, 'x'"):
        encoded("token_classification", {"tokens": ["a", "x"], "labels": ["O", "O"]}, tokenizer, labels=["O", "P"])


@pytest.mark.feature("question answering head")
@pytest.mark.parametrize("make", [make_pair_tokenizer, make_tokenizer])
def test_answer_is_found_in_the_context(make):
    row = {"question": "cat?", "context": "a cat, Zoë's cat", "answer": "cat"}
    for extra, at in (({}, 2), ({"answer_start": 13}, 13)):
        example = encoded("question_answering", row | extra, make())
        first, last = (example.spans[label] for label in example.labels)
        assert (first[0], last[1]) == (at, at + 3)
        assert example.units == 2
    inside = [span for span in example.spans if span is not None]
    assert (inside[0][0], inside[-1][1]) == (0, len(row["context"]))


@pytest.mark.feature("question answering head")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_answer_is_the_likeliest_stretch_of_the_context(family):
    model, tokenizer = make_base(family, "question_answering")
    rows = read(TASKS["question_answering"], HEAD_ROWS["question_answering"])[0]
    prefix = random_with_head(model)
    prefix.metadata["task"] = "question_answering"
    found = evaluate(model, tokenizer, rows, prefix).answers["prefix"]
    for row, answer in zip(rows, found, strict=True):
        example: Any = TASKS["question_answering"].encode([row], tokenizer, {}, 100)[0][0]
        with attach(model, prefix), torch.no_grad():
            types = {} if example.token_types is None else {"token_type_ids": torch.tensor([example.token_types])}
            output = model(input_ids=torch.tensor([example.input_ids]), **types)
        scores = {
            (output.start_logits[0, i] + output.end_logits[0, k]).item(): (a[0], b[1])
            for i, a in enumerate(example.spans)
            for k, b in enumerate(example.spans)
            if a is not None and b is not None and i <= k
        }
        first, end = scores[max(scores)]
        assert answer == row.inputs["context"][first:end].strip()


@pytest.mark.parametrize(
    ("task", "row", "told"),
    [
        ("classification", {"label": "a"}, 'no "text"; the row has label'),
        ("classification", {"text": "a"}, 'no "label"; the row has text'),
        ("classification", {"text": " ", "label": "a"}, '"text" is empty'),
        ("classification", {"text": "a", "text_pair": 3, "label": "a"}, '"text_pair" must be a string, got int'),
        ("classification", {"text": "a", "label": 0.5}, "a label must be a text or a whole number, got 0.5"),
        ("classification", {"text": "a", "label": ""}, "a label must be a text"),
        (
            "token_classification",
            {"tokens": "a b", "labels": ["O"]},
            "\"tokens\" must be a list of words, got str 'a b'",
        ),
        (
            "token_classification",
            {"tokens": ["a", ""], "labels": ["O", "O"]},
            "must be a list of words, got a list of 2",
        ),
        ("token_classification", {"tokens": ["a"]}, 'no "labels"; the row has tokens'),
        (
            "token_classification",
            {"tokens": ["a", "b"], "labels": ["O"]},
            "list of 2 labels, one a token, got a list of 1",
        ),
        ("question_answering", {"question": "a?", "context": "b"}, 'no "answer"'),
        ("question_answering", {"question": "a?", "context": "b", "answer": "c"}, "'c' does not stand in the context"),
        (
            "question_answering",
            {"question": "a?", "context": "b c", "answer": "c", "answer_start": 0},
            "\"answer_start\" 0 points at 'b', expected the answer 'c'",
        ),
        (
            "question_answering",
            {"question": "a?", "context": "b c", "answer": "c", "answer_start": -1},
            '"answer_start" must be a whole number, 0 or more, got -1',
        ),
    ],
)
def test_bad_row_is_named(task, row, told):
    with pytest.raises(DataError, match="row 2.*--skip-bad-rows") as error:
        read(TASKS[task], [HEAD_ROWS[task][0], row])
    assert told in str(error.value)
    rows, bad = read(TASKS[task], [HEAD_ROWS[task][0], row], skip_bad=True)
    assert (len(rows), len(bad)) == (1, 1)


@pytest.mark.feature("classification head")
def test_mistakes_are_found_before_training(bert):
    model, tokenizer = bert
    rows, config = HEAD_ROWS["classification"], TrainConfig(task="classification")
    with pytest.raises(DataError, match="row 1: label 'odd' is none of the model's: bad, good"):
        train(model, tokenizer, [{"text": "a", "label": "odd"}, *rows], SMALL, config)
    with pytest.raises(DataError, match="row 1: 142 tokens, more than max_length=128"):
        train(model, tokenizer, [{"text": "x" * 140, "label": "bad"}, *rows], SMALL, config)
    with pytest.raises(ConfigError, match=r"needs a model with its head \(...ForTokenClassification\), got Bert"):
        train(model, tokenizer, rows, SMALL, TrainConfig(task="token_classification"))
    llama, tokenizer = make_base("llama", "classification")
    llama.config.pad_token_id = None
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification has no padding token"):
        train(llama, tokenizer, rows, SMALL, config)


# ------------------------------------------------------------------------------------------------ figures and answers


@pytest.mark.feature("classification head")
def test_evaluation_measures_labels_and_names_what_it_cannot(bert):
    model, tokenizer = bert
    prefix = random_with_head(model)
    prefix.metadata |= {"task": "classification", "labels": ["bad", "good"]}
    rows = [*HEAD_ROWS["classification"], {"text": "a", "label": "odd"}]  # a label that the prefix cannot give
    report = evaluate(model, tokenizer, rows, prefix)
    right = [answer == row["label"] for answer, row in zip(report.answers["prefix"], rows, strict=True)]
    assert report.metrics["prefix"]["accuracy"] == round(100 * sum(right) / len(rows), 2)
    assert report.details["prefix"]["confusion"]["labels"] == ["bad", "good", "odd"]
    assert report.to_json()["rows"][-1].keys() == {"text", "references", "prefix"}
    with pytest.raises(ConfigError, match="a prefix with a head is compared with nothing, got base"):
        evaluate(model, tokenizer, rows, prefix, compare=["base"])
    with pytest.raises(ConfigError, match="A head generates no text: leave out max_new_tokens"):
        evaluate(model, tokenizer, rows, prefix, max_new_tokens=5)
    with pytest.raises(DataError, match="row 1: 202 tokens, but BertForSequenceClassification reads at most 128"):
        evaluate(model, tokenizer, [{"text": "x" * 200, "label": "bad"}], prefix)
    with pytest.raises(ConfigError, match="A base alone has no trained head"):
        TASKS["classification"].answer(model, tokenizer, report.rows[:1], [None])
    prefix.metadata["task"] = "juggling"
    with pytest.raises(ConfigError, match="the task 'juggling'; this version knows completion"):
        task_of(prefix)


@pytest.mark.feature("token classification head")
def test_f1_is_of_entities_where_labels_mark_them():
    rows = read(TASKS["token_classification"], HEAD_ROWS["token_classification"])[0][:2]
    right = [row.answer for row in rows]
    measure = TASKS["token_classification"].measure
    assert measure(right, rows)[0] == {"accuracy": 100.0, "f1": 100.0}
    found = [["O", "B-PET", "O"], right[1]]  # the entity of the first row ends too early
    figures, details = measure(found, rows)
    assert (figures["f1"], details["f1_of"]) == (50.0, "entities")
    plain = read(TASKS["token_classification"], [{"tokens": ["a", "b"], "labels": ["NOUN", "VERB"]}])[0]
    figures, details = measure([["NOUN", "NOUN"]], plain)
    assert (figures["f1"], details["f1_of"]) == (pytest.approx(100 * (2 / 3) / 2, abs=0.01), "labels")


def test_answers_are_near_what_cross_entropy_says(bert):
    """The likeliest label is the one with the least loss."""
    model, tokenizer = bert
    prefix = random_with_head(model)
    prefix.metadata |= {"task": "classification", "labels": ["bad", "good"]}
    report = evaluate(model, tokenizer, HEAD_ROWS["classification"], prefix)
    for row, answer in zip(report.rows, report.answers["prefix"], strict=True):
        [example], _ = TASKS["classification"].encode([row], tokenizer, prefix.metadata, 100)
        with attach(model, prefix), torch.no_grad():
            logits = model(input_ids=torch.tensor([example.input_ids])).logits
        losses = [float(cross_entropy(logits, torch.tensor([i]))) for i in range(2)]
        assert answer == ["bad", "good"][losses.index(min(losses))]
