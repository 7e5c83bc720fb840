from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from trunkline.engine.errors import ConfigError, DataError
from trunkline.models.causal_lm.prepare import SUFFIXES
from trunkline.models.causal_lm.records import Conversation, Kind, Preference, Text, record_of
from trunkline.models.text import sources
from trunkline.models.text.sources import Place, Problem, find_files, read_records

USER, ANSWER, OTHER = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a"), ("assistant", "b")))


def read(path: Path, kind: Kind = "text") -> list[Any]:
    return [
        item if isinstance(item, Problem) else item[1] for item in read_records([path], partial(record_of, kind=kind))
    ]


def read_lines(folder: Path, kind: Kind, *lines: Any) -> list[Any]:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read(path, kind)


def reason(folder: Path, kind: Kind, record: Any) -> str:
    (problem,) = read_lines(folder, kind, record)
    assert isinstance(problem, Problem)
    assert problem.place == Place(folder / "records.jsonl", 1)
    return problem.reason


def test_texts_come_from_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 3}\n\n"two"\n')
    (tmp_path / "b.json").write_text('\ufeff[{"text": "three"}, "four"]')
    pl.DataFrame({"text": ["five", "six"], "id": [1, None]}).write_parquet(tmp_path / "c.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/d.txt").write_text("seven\n\nstill seven\n")
    (tmp_path / "README.md").write_text("passed over")
    (tmp_path / ".hidden.txt").write_text("passed over")
    files = find_files([tmp_path], SUFFIXES)
    assert [path.name for path in files] == ["a.jsonl", "b.json", "c.parquet", "d.txt"]
    items = list(read_records(files, partial(record_of, kind="text")))
    assert [item[1].text for item in items if not isinstance(item, Problem)] == [
        *("one", "two", "three", "four", "five", "six"),
        "seven\n\nstill seven\n",
    ]
    places = [str(item[0]).removeprefix(f"{tmp_path}/") for item in items if not isinstance(item, Problem)]
    assert places == [
        *("a.jsonl: line 1", "a.jsonl: line 3", "b.json: item 1", "b.json: item 2"),
        *("c.parquet: row 1", "c.parquet: row 2", "sub/d.txt"),
    ]


def test_bad_lines_are_shown_with_their_place_and_the_others_read(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "good"}\n{"text": "\xff"}\n{"text": \n[1]\n{"txt": "x"}\n{"text": " \\n"}\n{"text": 5}\n'
        b'{"text": "\\ud800"}\n' + b"[" * 100_000 + b'\n{"text": "also good"}'
    )
    found = read(path)
    assert [item for item in found if isinstance(item, Text)] == [Text("good"), Text("also good")]
    assert [str(item).removeprefix(f"{path}: ") for item in found if isinstance(item, Problem)] == [
        "line 2: not UTF-8",
        "line 3: not JSON",
        "line 4: not an object",
        "line 5: has no 'text'",
        "line 6: the text is empty",
        "line 7: the text is not text",
        "line 8: holds a lone surrogate (\\ud800 to \\udfff), which is no character",
        "line 9: not JSON",
    ]


def test_a_record_longer_than_the_limit_is_passed_over_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "long.jsonl"
    path.write_text("".join(f'{{"text": "{"x" * n}"}}\n' for n in (3, 5 << 19, 1 << 19, 4)))
    three, long, half, four = read(path)
    assert str(long) == f"{path}: line 2: longer than 1 MiB: split it"
    assert [len(record.text) for record in (three, half, four)] == [3, 1 << 19, 4]
    (tmp_path / "long.txt").write_text("x" * ((1 << 20) + 1))
    assert [problem.reason for problem in read(tmp_path / "long.txt")] == ["longer than 1 MiB: split it"]


@pytest.mark.parametrize("name", ["e.jsonl", "e.json", "e.txt"])
def test_an_empty_file_is_a_problem(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert [str(problem) for problem in read(tmp_path / name)] == [f"{tmp_path / name}: the file is empty"]


def test_an_empty_table_is_a_problem_too(tmp_path: Path) -> None:
    pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(tmp_path / "e.parquet")
    assert [problem.reason for problem in read(tmp_path / "e.parquet")] == ["the file is empty"]


def test_a_text_file_that_is_not_utf8_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    assert [problem.reason for problem in read(tmp_path / "latin.txt")] == ["not UTF-8"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", b'[{"text": "a"}', r"x\.json: not JSON \(.*line 1.*or write one object a line"),
        ("x.json", b'{"text": "a"}', r"x\.json: holds no list"),
        ("x.json", b'["\xff"]', r"x\.json: not UTF-8 \(byte 3\)"),
        ("x.parquet", b"PAR1 and no more", r"x\.parquet: not a whole Parquet file"),
    ],
)
def test_a_file_damaged_whole_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_paths_without_anything_to_read_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere: no such file or folder"):
        find_files([tmp_path / "nowhere"], SUFFIXES)
    with pytest.raises(ConfigError, match=r"an empty folder"):
        find_files([tmp_path], SUFFIXES)
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=r"its 1 files end in none of \.jsonl, \.json, \.parquet, \.txt"):
        find_files([tmp_path], SUFFIXES)
    with pytest.raises(ConfigError, match=r"x\.csv: cannot be read: convert it to one of"):
        find_files([tmp_path / "x.csv"], SUFFIXES)


@pytest.mark.parametrize(
    "record", [{"prompt": "q", "response": "a"}, {"input": "q", "output": "a"}, {"messages": [USER, ANSWER]}]
)
def test_a_conversation_has_three_spellings(tmp_path: Path, record: dict[str, Any]) -> None:
    assert read_lines(tmp_path, "conversations", record) == [Conversation((USER, ANSWER))]


def test_messages_keep_what_the_template_may_want(tmp_path: Path) -> None:
    named = USER | {"name": "Ann", "weight": None}
    assert read_lines(tmp_path, "conversations", {"messages": [named, ANSWER]}) == [
        Conversation((USER | {"name": "Ann"}, ANSWER))
    ]


def test_conversations_in_parquet_lose_the_nulls_of_their_columns(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ANSWER]}, {"messages": [USER | {"name": "Ann"}, ANSWER]}]
    pl.DataFrame(rows, infer_schema_length=None, schema_overrides=None).write_parquet(tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet", "conversations")[0] == Conversation((USER, ANSWER))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q"}, "has no 'response'"),
        ({"output": "a"}, "has no 'input'"),
        ({"text": "q"}, "has neither 'messages' nor 'prompt' and 'response' nor 'input' and 'output'"),
        ({"instruction": "do", "input": "", "output": "a"}, "has 'instruction', which is not read: join it with"),
        ({"input": "", "output": "a"}, "'input' is empty"),
        ({"prompt": "q", "response": "\n"}, "'response' is empty"),
        ({"prompt": "q", "response": 4}, "'response' is not text"),
        ({"messages": []}, "'messages' is not a list of messages"),
        ({"messages": "q"}, "'messages' is not a list of messages"),
        ({"messages": [{"content": "q"}]}, "'messages' holds a message without a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "the content of a message is not text"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "the content of an assistant's message is empty"),
        ({"messages": [USER]}, "'messages' has no turn of the assistant"),
        ({"messages": [ANSWER, USER]}, "'messages' begins with the assistant"),
        ({"messages": [USER, ANSWER], "tools": ["f"]}, "'tools' is not a list of objects"),
    ],
)
def test_bad_conversations(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    assert reason(tmp_path, "conversations", record).startswith(expected)


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, (USER,)),
        ({"prompt": [SYSTEM, USER], "chosen": [ANSWER], "rejected": [OTHER]}, (SYSTEM, USER)),
        ({"prompt": "q", "chosen": [ANSWER], "rejected": [OTHER]}, (USER,)),
        ({"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}, (SYSTEM, USER)),
        ({"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, (USER,)),
    ],
)
def test_a_preference_has_the_spellings_of_trl(tmp_path: Path, record: dict[str, Any], prompt: tuple[Any, ...]) -> None:
    assert read_lines(tmp_path, "preferences", record) == [Preference(prompt, (ANSWER,), (OTHER,))]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "q", "chosen": "a"}, "has no 'rejected'"),
        ({"chosen": "qa", "rejected": "qb"}, "has no 'prompt'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "'chosen' and 'rejected' are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": [OTHER]}, "'chosen' and 'rejected' are not both"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "'rejected' is empty"),
        ({"prompt": 5, "chosen": "a", "rejected": "b"}, "'prompt' is not text"),
        ({"chosen": [ANSWER], "rejected": [OTHER]}, "'chosen' and 'rejected' begin with nothing in common"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "'rejected' has no turn of the assistant"),
        ({"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [OTHER]}, "'chosen' has no turn"),
    ],
)
def test_bad_preferences(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    assert reason(tmp_path, "preferences", record).startswith(expected)


SAID = "only what the assistant says is learned"


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ({"weight": 0}, {"weight": 0}),
        ({"weight": 0.0}, {"weight": 0}),
        ({"train": False}, {"weight": 0}),
        ({"training": False, "weight": 0}, {"weight": 0}),
        ({"weight": 1}, {}),
        ({"train": True, "weight": None}, {}),
    ],
)
def test_a_message_says_whether_it_is_learned(tmp_path: Path, weights: dict[str, Any], kept: dict[str, Any]) -> None:
    (found,) = read_lines(tmp_path, "conversations", {"messages": [USER, ANSWER | weights, USER, OTHER]})
    assert found == Conversation((USER, ANSWER | kept, USER, OTHER))
    assert found.notes == ()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, "'weight' of a message is neither 0 nor 1"),
        ({"messages": [USER | {"train": "no"}, ANSWER]}, "'train' of a message is neither 0 nor 1"),
        ({"messages": [USER, ANSWER | {"weight": 1, "train": False}]}, "'weight' and 'train' of a message contradict"),
        ({"messages": [USER, ANSWER | {"weight": 0}]}, "'messages' has weight 0 at every turn of the assistant"),
        (
            {"messages": [SYSTEM, USER, ANSWER], "system": "t"},
            "'system' is another text than that of the system's turn",
        ),
        ({"prompt": "q", "response": "a", "system": 5}, "'system' is not text"),
        ({"prompt": "q", "response": "a", "history": [["q"]]}, "'history' is neither a list of messages nor of pairs"),
        ({"prompt": "q", "response": "a", "history": "q"}, "'history' is neither a list of messages nor of pairs"),
        ({"prompt": "q", "response": "a", "history": [["q", ""]]}, "'history' is empty"),
        ({"prompt": "q", "response": "a", "tools": "[{"}, "'tools' is text that is not JSON"),
        ({"prompt": "q", "response": "a", "tools": {"name": "f"}}, "'tools' is not a list of objects"),
    ],
)
def test_weights_and_columns_that_cannot_be(tmp_path: Path, record: dict[str, Any], expected: str) -> None:
    assert reason(tmp_path, "conversations", record).startswith(expected)


def test_a_weight_of_what_is_never_learned_is_named(tmp_path: Path) -> None:
    record = {"messages": [SYSTEM | {"weight": 0}, USER | {"weight": 1}, ANSWER]}
    (found,) = read_lines(tmp_path, "conversations", record)
    assert found == Conversation((SYSTEM, USER, ANSWER))
    assert found.notes == (f"'weight' of a message of role 'user' is not used: {SAID}",)
    pair = {"prompt": "q", "chosen": [ANSWER | {"weight": 0}], "rejected": [OTHER]}
    assert reason(tmp_path, "preferences", pair).startswith("'chosen' has weight 0 at every turn of the assistant")


@pytest.mark.parametrize(
    ("columns", "before"),
    [
        ({"system": "s"}, (SYSTEM,)),
        ({"system": " \n", "history": [], "tools": []}, ()),
        ({"system": None}, ()),
        ({"history": [["q", "b"]]}, (USER, OTHER)),
        ({"system": "s", "history": [["q", "b"], ["q", "a"]]}, (SYSTEM, USER, OTHER, USER, ANSWER)),
        ({"history": [USER, OTHER]}, (USER, OTHER)),
    ],
)
def test_system_and_history_are_the_turns_before(
    tmp_path: Path, columns: dict[str, Any], before: tuple[Any, ...]
) -> None:
    for record in ({"prompt": "q", "response": "a"}, {"input": "q", "output": "a"}, {"messages": [USER, ANSWER]}):
        (found,) = read_lines(tmp_path, "conversations", record | columns)
        assert found == Conversation((*before, USER, ANSWER))
        assert found.notes == ()
    (found,) = read_lines(tmp_path, "preferences", {"prompt": "q", "chosen": "a", "rejected": "b"} | columns)
    assert found == Preference((*before, USER), (ANSWER,), (OTHER,))
    first = {"messages": [SYSTEM, USER, ANSWER], "system": "s", "history": [["q", "b"]]}
    assert read_lines(tmp_path, "conversations", first) == [Conversation((SYSTEM, USER, OTHER, USER, ANSWER))]


def test_tools_are_a_list_or_its_json(tmp_path: Path) -> None:
    tools = [{"name": "f"}]
    for given in (tools, json.dumps(tools)):
        (found,) = read_lines(tmp_path, "conversations", {"messages": [USER, ANSWER], "tools": given})
        assert found == Conversation((USER, ANSWER), tools=({"name": "f"},))


def test_fields_that_nothing_reads_are_named(tmp_path: Path) -> None:
    unused = {"weight": 0, "documents": ["d"], "empty": "", "none": None, "n" * 99: False}
    named = tuple(f"the field {name!r} is not used" for name in ("weight", "documents", "n" * 40))
    for kind, record in {
        "text": {"text": "t"},
        "conversations": {"messages": [USER, ANSWER]},
        "preferences": {"prompt": "q", "chosen": "a", "rejected": "b"},
    }.items():
        (found,) = read_lines(tmp_path, kind, record | unused)  # type: ignore[arg-type]
        assert found.notes == named
    (found,) = read_lines(tmp_path, "conversations", {"prompt": "p", "response": "r", "messages": [USER, ANSWER]})
    assert found.notes == ("the field 'prompt' is not used", "the field 'response' is not used")
    for prompt, notes in (("q", ()), ("other", ("the field 'prompt' is not used",))):
        pair = {"prompt": prompt, "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
        (found,) = read_lines(tmp_path, "preferences", pair)
        assert found.notes == notes
