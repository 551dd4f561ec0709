"""Names of classes: their order, and the class that a label asks for."""

import numpy as np
import pytest

from fastcm.errors import InputError
from fastcm.weights.class_names import check_names, class_number, in_order, listed


def test_numbers_are_in_the_order_of_their_values():
    assert in_order({"b", "10", "2", "a", "1", "02"}) == ("1", "02", "2", "10", "a", "b")


@pytest.mark.parametrize(
    ("label", "classes", "number"),
    [
        (1, ("1", "2", "10"), 1),
        (np.int64(2), ("1", "2", "10"), 2),
        ("1", ("1", "2", "10"), 0),
        ("2", ("cat", "dog", "eel"), 2),
        ("2", ("0", "1", "2"), 2),
        ("dog", ("cat", "dog", "dog"), 1),
    ],
)
def test_ints_are_places_and_text_is_a_name(label, classes, number):
    assert class_number(label, classes) == number


@pytest.mark.parametrize(
    ("label", "classes", "message"),
    [
        ("3", ("1", "2", "10"), "unknown class in labels: 3. Give one of the names 1, 2, 10."),
        ("3", ("0", "1", "2"), "class out of range in labels: 3. The model has the classes 0 to 2."),
        ("kat", ("cat", "dog"), "unknown class in labels: kat. Did you mean 'cat'?"),
        (1.0, ("cat", "dog"), "unknown class in labels: 1.0. Give a name or a number from 0 to 1."),
    ],
)
def test_labels_that_are_none(label, classes, message):
    with pytest.raises(InputError) as error:
        class_number(label, classes)
    assert str(error.value) == message


def test_lists_are_short_and_quoted():
    assert listed(["cat", "dog, big", 'a "b"']) == 'cat, "dog, big", "a ""b"""'
    assert listed([str(number) for number in range(2000)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, … (2,000)"


def test_names_with_letters_of_any_language_are_good():
    names = ("zèbre", "猫", "👩‍🚀", "a b")
    assert check_names(names, "x") == names
    with pytest.raises(InputError, match="a class name that is no text in x: 3"):
        check_names(["a", 3], "x")
