from __future__ import annotations

from typing import Any

import pytest

from trunkline.models.seq2seq.records import Record, content, pair_of, text_of
from trunkline.models.text.sources import BadRecord


@pytest.mark.parametrize(
    ("history", "turns"),
    [
        ([["q1", "a1"], ["q2", "a2"]], ("q1", "a1", "q2", "a2")),
        ([{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}], ("q1", "a1")),
        ('[["q1", "a1"]]', ("q1", "a1")),
        ([], ()),
        (None, ()),
        (" ", ()),
        ("null", ()),
    ],
)
def test_history_is_read_from_pairs_and_messages(history: Any, turns: tuple[str, ...]) -> None:
    found = pair_of({"prompt": "p", "response": "r", "history": history})
    assert found == Record("p", "r", turns)
    assert found.turns == (*turns, "p")


def test_fields_have_other_names_where_they_are_given() -> None:
    record = {"question": "q", "answer": "a", "id": 3, "empty": "", "prompt": "not this"}
    found = pair_of(record, ("question", "answer"))
    assert found == Record("q", "a", (), ("the field 'id' is not used", "the field 'prompt' is not used"))


def test_a_text_is_a_string_or_a_field() -> None:
    assert text_of("one") == text_of({"text": "one"}) == Record("one")
    assert text_of({"text": "one", "url": "x"}).notes == ("the field 'url' is not used",)


def test_equal_records_have_equal_content_and_no_others() -> None:
    one = Record("p", "r", ("a",), ("said",))
    assert content(one) == content(one._replace(notes=()))
    others = [
        Record("p", "r"),
        Record("a", "r", ("p",)),
        Record("p", "r", ("a", "b")),
        Record("p", "x", ("a",)),
        Record("p\nr"),
    ]
    assert len({content(record) for record in [one, *others]}) == 6


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([1], "not an object"),
        ({"prompt": "p"}, "has no 'response': mend it, or say by --fields what the two fields are called"),
        ({"prompt": "p", "response": "r", "history": 5}, "'history' is neither a list of messages nor of pairs"),
        ({"prompt": "p", "response": "r", "history": [["q"]]}, "'history' is neither a list of messages nor of pairs"),
        (
            {"prompt": "p", "response": "r", "history": ["q", "a"]},
            "'history' is neither a list of messages nor of pairs",
        ),
        ({"prompt": "p", "response": "r", "history": [{"role": "user"}]}, "a turn of 'history' is not text"),
        ({"prompt": "p", "response": "r", "history": [["q", " "]]}, "a turn of 'history' is empty"),
        ({"prompt": "p", "response": "r", "history": "[["}, "'history' is text that is not JSON"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(record: Any, reason: str) -> None:
    with pytest.raises(BadRecord) as raised:
        pair_of(record)
    assert str(raised.value).startswith(reason)
