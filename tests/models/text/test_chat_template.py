from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trunkline.models.causal_lm.tokenizer import MIN_VOCAB_SIZE, train_tokenizer
from trunkline.models.text import chat_template
from trunkline.models.text.chat_template import Asked, render, render_marked
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.template_process import write

MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q\u2028 ", "name": None},
    {"role": "assistant", "content": "a\ud83d", "more": {"deep": [1, None, True]}},
]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ m.more | tojson if m.more }}{{ 'name' in m }}\n{% endfor %}"
    "{{ tools }}{{ eos_token }}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def tokenizer() -> Any:
    tokenizer = train_tokenizer([], MIN_VOCAB_SIZE)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_texts_are_those_of_transformers(tokenizer: Any) -> None:
    tools = [{"name": "f"}]
    # a key without a value is left out here whatever the version, and by transformers itself from 5.23 at the latest
    told = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]
    asked = [Asked(), Asked(2, True), Asked(others=MESSAGES[1:]), Asked(None, True, tools=False), Asked(0)]
    *texts, empty = render(tokenizer, MESSAGES, asked, tools)
    assert texts == [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, tools=given)
        for messages, prompt, given in [
            (told, False, tools),
            (told[:2], True, tools),
            (told[1:], False, tools),
            (told, True, None),
        ]
    ]
    assert isinstance(empty, str)


def test_marked_parts_are_found_in_the_text(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<{% generation %}{{ m.role }}{% endgeneration %}>{% endfor %}"
        "{% if messages | length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    )
    text, spans = render_marked(tokenizer, MESSAGES)
    assert [text[start:end] for start, end in spans] == ["system", "user", "assistant"]
    with pytest.raises(BadRecord, match=r"^the chat template fails: too long$"):
        render_marked(tokenizer, MESSAGES * 2)


def test_a_child_that_is_killed_is_started_again_and_signals_to_its_group_do_not_end_it(tokenizer: Any) -> None:
    before = render(tokenizer, MESSAGES, [Asked()])
    child = chat_template._child
    assert child is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(child._process.pid, number)
    assert render(tokenizer, MESSAGES, [Asked()]) == before
    assert chat_template._child is child
    os.kill(child._process.pid, signal.SIGKILL)
    child._process.wait()
    assert render(tokenizer, MESSAGES, [Asked()]) == before


def test_an_interrupted_call_gives_its_reply_to_no_other(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Any) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(chat_template, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            render(tokenizer, MESSAGES, [Asked()])
    assert render(tokenizer, MESSAGES[:1], [Asked()]) == ["system:sFalse\nNone<|endoftext|>"]


def test_the_child_imports_nothing_from_the_working_directory_and_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the working directory')")
    program = (
        f"import sys; sys.path[0] = {str(Path(__file__).parents[3])!r}\n"
        "from trunkline.models.text import chat_template\n"
        "from trunkline.models.causal_lm.tokenizer import train_tokenizer\n"
        "tokenizer = train_tokenizer([], 260)\n"
        "print(chat_template.render(tokenizer, [{'role': 'user', 'content': 'q'}], [chat_template.Asked()]))\n"
        "print(chat_template._child._process.pid)\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    text, pid = ran.stdout.splitlines()
    assert text == "['<|im_start|>user\\nq<|im_end|>\\n']"
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_a_child_whose_parent_is_killed_before_its_reply_says_nothing() -> None:
    call = {"template": "{{ messages[0]['content'] }}", "tokens": {}, "messages": [{"role": "user", "content": "q"}],
            "tools": None, "asked": [(None, False, None, False)], "cpu_seconds": 60.0}  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", "from trunkline.models.text.template_process import serve; serve()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None  # noqa: PT018
    child.stdout.close()
    write(child.stdin, pickle.dumps(call))
    said = child.stderr.read()
    assert (child.wait(), said) == (0, b"")
