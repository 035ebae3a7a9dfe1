"""Figures against numbers worked out by hand, from the definitions of CoNLL 2003 and SQuAD."""

import pytest

from foreword.scores import Entity, draw_confusion, entities, entity_f1, label_figures, squad_figures

RIGHT = ["cat", "cat", "cat", "cat", "dog", "dog", "owl", "owl", "owl", "owl"]
FOUND = ["cat", "cat", "cat", "dog", "dog", "owl", "owl", "owl", "owl", "elk"]


@pytest.mark.feature("classification head")
def test_accuracy_macro_f1_and_figures_of_each_label():
    figures, details = label_figures(FOUND, RIGHT)
    assert figures["accuracy"] == 70.0
    assert details["labels"] == {
        "cat": {"precision": 100.0, "recall": 75.0, "f1": 85.71, "rows": 4},
        "dog": {"precision": 50.0, "recall": 50.0, "f1": 50.0, "rows": 2},
        "elk": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0},
        "owl": {"precision": 75.0, "recall": 75.0, "f1": 75.0, "rows": 4},
    }
    assert figures["f1"] == pytest.approx((85.71 + 50 + 0 + 75) / 4, abs=0.01)
    assert details["confusion"]["labels"] == ["cat", "dog", "elk", "owl"]
    assert details["confusion"]["counts"] == [[3, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 3]]


@pytest.mark.feature("classification head")
@pytest.mark.parametrize("size", [2, 30])
def test_confusion_matrix_is_drawn(tmp_path, size):
    counts = [[row * column for column in range(size)] for row in range(size)]
    draw_confusion([f"label {i}" for i in range(size)], counts, tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.feature("token classification head")
@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-LOC", {Entity("PER", 0, 1), Entity("LOC", 3, 3)}),
        ("B-PER B-PER", {Entity("PER", 0, 0), Entity("PER", 1, 1)}),
        ("B-PER I-LOC I-LOC", {Entity("PER", 0, 0), Entity("LOC", 1, 2)}),
        ("O I-PER I-PER O I-PER", {Entity("PER", 1, 2), Entity("PER", 4, 4)}),
        ("B-A-B I-A-B", {Entity("A-B", 0, 1)}),
    ],
)
def test_entities_of_labels(labels, found):
    assert entities(labels.split()) == found


@pytest.mark.feature("token classification head")
def test_entity_counts_only_where_kind_and_ends_are_right():
    right = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    assert entity_f1(right, right) == 100.0
    found = [["B-PER", "O", "O", "B-LOC"], ["B-PER", "B-ORG"]]  # of 4 answered 2 are right, of 3
    assert entity_f1(found, right) == pytest.approx(100 * 2 * 2 / (4 + 3), abs=0.01)
    assert entity_f1([["O"]], [["O"]]) == 0.0


@pytest.mark.feature("question answering head")
@pytest.mark.parametrize(
    ("answer", "rights", "exact", "f1"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 100.0, 100.0),
        ("in the city of Paris", ["Paris", "city of light"], 0.0, 57.14),  # in city of paris: 2 of 4 and of 3 words
        ("London", ["Paris"], 0.0, 0.0),
        ("Paris Paris", ["Paris"], 0.0, 66.67),
        ("the", ["a"], 100.0, 100.0),
        ("", ["Paris"], 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(answer, rights, exact, f1):
    assert squad_figures([answer], [rights]) == {"exact_match": exact, "f1": f1}
