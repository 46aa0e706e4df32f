"""The prose check finds the dropped habits and accepts plain sentences."""

import pytest

from tests.support.prose import NOUN_CLAUSE, YOU, Text, find_habits, python_texts, rate


@pytest.mark.parametrize(
    "sentence",
    [
        "Whatever whoever sends.",
        "It is made anew.",
        "There is nobody.",
        "X is no setting.",
        "The value is none of ours.",
        "The order was set aside.",
        "The caller is told so.",
        "there are {names}",
    ],
)
def test_a_dropped_habit_is_found(sentence: str) -> None:
    """Each sentence has a dropped habit, and the finding names the file and the line."""
    (line, *_) = find_habits(Text("docs/x.md", 7, f"\n{sentence}"))
    assert line.startswith("docs/x.md:8: ")


@pytest.mark.parametrize("sentence", ["It is no longer needed.", "The result is None.", "You tell them."])
def test_plain_sentences_pass(sentence: str) -> None:
    """Ordinary words that resemble a habit are accepted."""
    assert [*find_habits(Text("docs/x.md", 1, sentence))] == []


def test_strings_are_read_in_the_code_and_not_in_tests() -> None:
    """Strings are checked in the code, but not in tests, where they are inputs."""
    source = '"""A docstring."""\nX = "a string"  # a comment\n'
    assert [text.text for text in python_texts("service/x.py", source)] == [
        '"""A docstring."""',
        '"a string"',
        "# a comment",
    ]
    assert [text.text for text in python_texts("tests/x.py", source)] == ['"""A docstring."""', "# a comment"]


def test_rates_leave_code_out() -> None:
    """Words in code count neither as words nor as matches."""
    assert rate(YOU, "You run it. `you` ran\n```\nyou\n```\n") == pytest.approx(250)
    assert rate(NOUN_CLAUSE, "It keeps what is written.") == pytest.approx(200)
