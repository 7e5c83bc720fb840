from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trunkline.models.causal_lm.records import Conversation, Message, Preference, Text
from trunkline.models.causal_lm.rendering import Rendered, Renderer
from trunkline.models.causal_lm.tokenizer import END_OF_TEXT, MIN_VOCAB_SIZE, stop_ids, train_tokenizer
from trunkline.models.text import chat_template
from trunkline.models.text.sources import BadRecord
from trunkline.models.text.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that what is learned can be read off letter by letter."""
    return train_tokenizer([], MIN_VOCAB_SIZE)


def message(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


def talk(*contents: str) -> tuple[Message, ...]:
    return tuple(message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents))


def learned_text(tokenizer: PreTrainedTokenizerFast, rendered: Rendered) -> list[str]:
    """The runs of learned tokens, as text."""
    ids, learned = rendered
    assert ids.dtype == np.int64
    assert learned.dtype == bool
    edges = np.flatnonzero(np.diff(np.concatenate([[0], learned.astype(int), [0]])))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


def one(tokenizer: PreTrainedTokenizerFast, messages: tuple[Message, ...]) -> Rendered:
    (rendered,) = Renderer(tokenizer).render(Conversation(messages))
    return rendered


def test_a_text_is_learned_whole_and_ends_with_eos(tokenizer: PreTrainedTokenizerFast) -> None:
    (rendered,) = Renderer(tokenizer).render(Text("naïve\n"))
    assert tokenizer.decode(rendered.ids) == "naïve\n" + END_OF_TEXT
    assert rendered.learned.all()
    assert len(rendered.ids) == len("naïve\n".encode()) + 1


def test_a_document_of_a_megabyte_is_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    (rendered,) = Renderer(tokenizer).render(Text("ab " * 350_000))
    assert len(rendered.ids) == 1_050_001


def test_without_a_template_prompt_and_response_are_tokenized_apart() -> None:
    tokenizer = train_tokenizer(["abab abab abab"] * 9, MIN_VOCAB_SIZE + 3)
    tokenizer.chat_template = None
    ids, learned = one(tokenizer, talk("ab", "ab"))
    ab = tokenizer.convert_tokens_to_ids("ab")
    assert tokenizer.backend_tokenizer.encode("abab").ids != [ab, ab], "joined they must be another token here"
    assert ids.tolist() == [ab, ab, tokenizer.eos_token_id]
    assert learned.tolist() == [False, True, True]


def test_without_a_template_only_a_prompt_and_a_response_can_be_rendered(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    with pytest.raises(BadRecord, match="the tokenizer has no chat template"):
        one(tokenizer, talk("a", "b", "c", "d"))


def test_bos_leads_and_is_not_learned_of_a_conversation(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.bos_token, tokenizer.chat_template = "<|im_start|>", None
    ids, learned = one(tokenizer, talk("a", "b"))
    assert ids[0] == start
    assert learned.tolist() == [False, False, True, True]
    assert Renderer(tokenizer).render(Text("a"))[0].ids[0] == start


def test_each_answer_is_learned_with_the_mark_that_ends_it(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = (message("system", "be kind"), *talk("hé", "yo  ", "and?", "ok\n🤗"))
    rendered = one(tokenizer, messages)
    assert tokenizer.decode(rendered.ids) == tokenizer.apply_chat_template(list(messages), tokenize=False)
    assert learned_text(tokenizer, rendered) == ["yo  <|im_end|>", "ok\n🤗<|im_end|>"]


def test_the_learned_tokens_go_on_from_the_prompt_of_generation(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, learned = one(tokenizer, talk("what?", "that"))
    prompt = tokenizer.apply_chat_template([*talk("what?")], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)].tolist() == prompt
    assert np.flatnonzero(learned)[0] == len(prompt)
    assert ids[np.flatnonzero(learned)[-1]] in stop_ids(tokenizer)


LLAMA_LIKE = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)
WITHOUT_END = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_eos_ends_the_turn_in_templates_that_write_it(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = LLAMA_LIKE
    assert learned_text(tokenizer, one(tokenizer, talk("a", "b", "c", "d"))) == [" b<|endoftext|>", " d<|endoftext|>"]
    assert stop_ids(tokenizer) == [tokenizer.eos_token_id]


def test_eos_is_appended_where_the_template_ends_a_conversation_with_nothing(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = WITHOUT_END
    assert learned_text(tokenizer, one(tokenizer, talk("a", "b"))) == ["b\n<|endoftext|>"]


def test_a_failing_template_is_the_records_problem_in_its_own_words(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.role }}{{ m.content }}{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    with pytest.raises(BadRecord, match=r"^the chat template fails: System role not supported$"):
        renderer.render(Conversation((message("system", "s"), *talk("a", "b"))))
    assert renderer.render(Conversation(talk("a", "b")))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content"
    with pytest.raises(BadRecord, match=r"^the chat template fails: "):
        one(tokenizer, talk("a", "b"))


FORGETS_THOUGHTS = (  # as reasoning models do: what an answer was thought of is dropped once others follow
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% if loop.last %}<think>{% endif %}"
    "{{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = FORGETS_THOUGHTS.replace(
    "{{ m.content }}{% else %}", "{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
)


def test_a_template_that_rewrites_earlier_turns_must_mark_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = FORGETS_THOUGHTS
    assert learned_text(tokenizer, one(tokenizer, talk("a", "b"))) == ["<think>b<|im_end|>"]
    with pytest.raises(BadRecord, match=r"marks no answer with \{% generation %\}: give a template that does"):
        one(tokenizer, talk("a", "b", "c", "d"))
    tokenizer.chat_template = MARKED
    rendered = one(tokenizer, talk("a", "b", "c", "d"))
    assert learned_text(tokenizer, rendered) == ["b<|im_end|>", "d<|im_end|>"]
    assert tokenizer.decode(rendered.ids) == tokenizer.apply_chat_template([*talk("a", "b", "c", "d")], tokenize=False)


@pytest.mark.parametrize("template", [None, MARKED])
def test_the_two_sides_of_a_preference_begin_with_the_same_unlearned_prompt(
    tokenizer: PreTrainedTokenizerFast, template: str | None
) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt = talk("a", "earlier", "c")
    record = Preference(prompt, (message("assistant", "good"),), (message("assistant", "worse"),))
    chosen, rejected = Renderer(tokenizer).render(record)
    assert [learned_text(tokenizer, side)[-1].removeprefix("<think>") for side in (chosen, rejected)] == [
        "good<|im_end|>",
        "worse<|im_end|>",
    ]
    assert "earlier" in tokenizer.decode(chosen.ids)
    first = int(np.flatnonzero(chosen.learned)[0])
    assert first == int(np.flatnonzero(rejected.learned)[0])
    assert chosen.ids[:first].tolist() == rejected.ids[:first].tolist()


def test_eos_after_all_turns_hides_no_earlier_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
    )
    rendered = one(tokenizer, talk("a", "b", "c", "d"))
    assert learned_text(tokenizer, rendered) == ["b<|im_end|>", "d<|im_end|>\n<|endoftext|>"]


def test_eos_stands_after_the_answer_that_nothing_ends_though_the_last_turn_is_not_found(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    messages = (*talk("a", "b", "c"), message("assistant", "", weight=0))
    text = tokenizer.decode(one(tokenizer, messages).ids)
    assert text == "user: a\nassistant: b\n<|endoftext|>user: c\n"


def test_a_marked_answer_that_ends_with_a_line_break_after_its_mark_gets_no_second_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% else %}"
        "{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}{% endif %}{% endfor %}"
    )
    assert learned_text(tokenizer, one(tokenizer, talk("a", "b", "c", "d"))) == ["b<|im_end|>\n", "d<|im_end|>\n"]


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "gemma3", "qwen3_instruct_2507", "lfm2"])
def test_answers_found_by_prefixes_are_those_that_trl_marks(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    """TRL ships templates with and without marks that render the same; the marks are the reference."""
    marks = ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<end_of_turn>", "<start_of_turn>", "<s>"]
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    tokenizer.bos_token = "<s>"
    templates = Path(str(importlib.util.find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
    messages = list(talk("hello", "hi there", "bye", "ciao"))
    tokenizer.chat_template = (templates / f"{family}_training.jinja").read_text()
    reference: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    tokenizer.chat_template = (templates / f"{family}.jinja").read_text()
    ids, learned = one(tokenizer, tuple(messages))
    assert ids.tolist() == reference["input_ids"]
    assert tokenizer.decode(ids[learned]) == tokenizer.decode(
        ids[np.array(reference["assistant_masks"], bool)]
    ).replace("\n", "")


def test_a_template_that_drops_the_answer_is_a_problem(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: "
        "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(BadRecord, match="leaves out what the assistant says"):
        one(tokenizer, talk("a", "b"))
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}:{% endif %}"
    with pytest.raises(BadRecord):
        one(tokenizer, talk("a", "b"))


@pytest.mark.parametrize("contents", [("a <|im_end|> b", "c"), ("a", "c<|endoftext|>")])
def test_marks_inside_messages_are_a_problem(tokenizer: PreTrainedTokenizerFast, contents: tuple[str, str]) -> None:
    with pytest.raises(BadRecord, match=r"a message holds <\|\w+\|>, which the model would take for the real one"):
        one(tokenizer, talk(*contents))


def test_answers_are_found_in_the_tokens_of_a_tokenizer_that_drops_spaces(tmp_path: Path) -> None:
    words = ["<unk>", "</s>", "[a]", "[u]", "hello", "world"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}[{{ m.role[0] }}] {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}[a] {% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ids, learned = one(load_tokenizer(tmp_path), talk("hello", "world hello"))
    assert ids.tolist() == [3, 4, 2, 5, 4, 1]
    assert learned.tolist() == [False, False, False, True, True, True]


def test_marks_that_are_only_listed_among_the_added_tokens_are_refused_in_messages(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """As Llama 3 lists its own."""
    tokenizer.backend_tokenizer.add_special_tokens(["<|eot_id|>"])
    assert "<|eot_id|>" not in tokenizer.all_special_tokens
    with pytest.raises(BadRecord, match=r"a message holds <\|eot_id\|>"):
        one(tokenizer, talk("hi<|eot_id|>secret", "b"))


def test_an_answer_that_begins_inside_a_token_is_refused() -> None:
    tokenizer = train_tokenizer(["yes yes yes no no no"] * 9, MIN_VOCAB_SIZE + 8)
    assert len(tokenizer(" yes")["input_ids"]) == 1
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(BadRecord, match="the answer begins inside a token"):
        one(tokenizer, talk("a", "yes no"))


def test_every_answer_of_a_conversation_ends_with_what_generation_stops_at(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = WITHOUT_END
    noted: list[str] = []
    (rendered,) = Renderer(tokenizer).render(Conversation(talk("a", "b", "c", "d", "e")), noted.append)
    assert learned_text(tokenizer, rendered) == ["b\n<|endoftext|>", "d\n<|endoftext|>"]
    assert tokenizer.decode(rendered.ids) == (
        "user: a\nassistant: b\n<|endoftext|>user: c\nassistant: d\n<|endoftext|>user: e\n"
    )
    assert noted == ["EOS is put after an answer, because the chat template ends it with no special token"]


def test_the_prompt_of_generation_is_how_the_conversation_begins_to_be_learned(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for template in (WITHOUT_END, tokenizer.chat_template, LLAMA_LIKE, NEXT_MARK):
        tokenizer.chat_template = template
        ids, learned = one(tokenizer, talk("a", "b", "c", "d", "e", "f"))
        begins = np.flatnonzero(learned & ~np.concatenate([[False], learned[:-1]]))
        renderer = Renderer(tokenizer)
        for turns, begin in zip((1, 3, 5), begins, strict=True):
            assert renderer.prompt(talk("a", "b", "c", "d", "e")[:turns]) == ids[:begin].tolist()


NEXT_MARK = (
    "{% for m in messages %}{{ {'user': '<|im_start|>', 'assistant': '<|im_end|>', 'tool': '<|pad|>'}[m.role] }}\n"
    "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|im_end|>\n{% endif %}"
)


def test_an_answer_that_the_next_turns_mark_ends_is_learned_with_that_mark(tokenizer: PreTrainedTokenizerFast) -> None:
    """As in GLM 4."""
    tokenizer.chat_template = NEXT_MARK
    messages = (*talk("a", "b"), message("tool", "c"), *talk("d", "e")[1:], *talk("f", "g"))
    assert learned_text(tokenizer, one(tokenizer, messages)) == [
        *("b\n<|pad|>", "e\n<|im_start|>", "g\n<|endoftext|>"),
    ]
    stops = ["<|endoftext|>", "<|im_start|>", "<|pad|>"]
    assert stop_ids(tokenizer) == sorted(tokenizer.convert_tokens_to_ids(stops))


def test_glm_learns_the_mark_of_the_next_turn_as_trl_does(tokenizer: PreTrainedTokenizerFast) -> None:
    marks = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"]
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    templates = Path(str(importlib.util.find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
    messages = list(talk("hello", "hi there", "bye", "ciao"))
    tokenizer.chat_template = (templates / "glm4moe_training.jinja").read_text()
    reference: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert any(reference["assistant_masks"])
    tokenizer.chat_template = (templates / "glm4moe.jinja").read_text()
    rendered = one(tokenizer, tuple(messages))
    assert reference["input_ids"][-1] == tokenizer.convert_tokens_to_ids("<|user|>"), "TRL's end of the last answer"
    assert rendered.ids.tolist() == [*reference["input_ids"][:-1], tokenizer.eos_token_id]
    assert rendered.learned.tolist() == [mark == 1 for mark in reference["assistant_masks"]]


def test_only_special_tokens_end_a_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    """Gemma 3's tokenizer has added tokens of line breaks and of HTML, which are ordinary text."""
    tokenizer.backend_tokenizer.add_tokens([AddedToken("\n", special=False), AddedToken("</b>", special=False)])
    assert {"\n", "</b>"} <= {str(token) for token in tokenizer.added_tokens_decoder.values()}
    for template in (WITHOUT_END, WITHOUT_END.replace("}}\n", "}}</b>\n")):
        tokenizer.chat_template = template
        assert stop_ids(tokenizer) == [tokenizer.eos_token_id]
        runs = learned_text(tokenizer, one(tokenizer, talk("a", "b", "c", "d")))
        assert [run.endswith("<|endoftext|>") for run in runs] == [True, True]


def test_a_turn_of_weight_0_is_context_and_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = talk("a", "b", "c", "d", "e", "f")
    for template in (MARKED, WITHOUT_END, NEXT_MARK, tokenizer.chat_template):
        tokenizer.chat_template = template
        all_learned = one(tokenizer, turns)
        for silent in ({1}, {3}, {5}, {1, 5}):
            weighted = tuple({**turn, "weight": 0} if i in silent else turn for i, turn in enumerate(turns))
            rendered = one(tokenizer, weighted)
            length = len(rendered.ids)
            assert all_learned.ids[:length].tolist() == rendered.ids.tolist()
            runs = [run for i, run in zip((1, 3, 5), learned_text(tokenizer, all_learned)) if i not in silent]
            assert learned_text(tokenizer, rendered) == runs
    record = Preference(turns[:1], ({**turns[1], "weight": 0}, *turns[2:4]), turns[3:4])
    chosen, rejected = Renderer(tokenizer).render(record)
    assert [learned_text(tokenizer, side) for side in (chosen, rejected)] == [["d<|im_end|>"], ["d<|im_end|>"]]


def test_marks_that_do_not_tell_the_answers_apart_cannot_leave_one_out(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = MARKED.replace("{% generation %}", "{% generation %}.{% endgeneration %}{% generation %}")
    assert learned_text(tokenizer, one(tokenizer, talk("a", "b", "c", "d"))) == [".b<|im_end|>", ".d<|im_end|>"]
    with pytest.raises(BadRecord, match="does not mark one part of each answer"):
        one(tokenizer, (*talk("a", "b", "c"), message("assistant", "d", weight=0), *talk("e", "f")))


def notes_of(
    tokenizer: PreTrainedTokenizerFast, *messages: Message, tools: tuple[dict[str, Any], ...] = ()
) -> list[str]:
    noted: list[str] = []
    Renderer(tokenizer).render(Conversation(messages, tools), noted.append)
    return noted


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def test_text_that_a_template_drops_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    """Short texts stand in the rendering by chance: "3" is said by the tool and by the assistant."""
    thinking = message("assistant", "3", reasoning_content="one and two", tool_calls=[CALL], name="s")
    messages = (message("system", "s"), *talk("a"), thinking, message("tool", "3", name="3", tool_call_id="a"))
    answer = message("assistant", "3")
    gone = " is left out or changed by the chat template"
    assert notes_of(tokenizer, *messages, answer) == [
        *(f"{key!r} of a message of role 'assistant'{gone}" for key in ("reasoning_content", "name")),
        *(f"{key!r} of a message of role 'tool'{gone}" for key in ("name", "tool_call_id")),
        f"'tool_calls' of a message of role 'assistant'{gone}",
    ]
    tokenizer.chat_template = (
        "{% for m in messages if m.role != 'tool' and m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{{ m.name }}{{ m.content }}{{ m.reasoning_content }}{{ (m.tool_calls or [0])[0] | tojson }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert notes_of(tokenizer, *messages, answer) == [
        f"the content of a message of role 'system'{gone}",
        *(f"{what} of a message of role 'tool'{gone}" for what in ("the content", "'name'", "'tool_call_id'")),
    ]
    two = message("assistant", "3", tool_calls=[CALL, {**CALL, "id": "b"}])
    assert notes_of(tokenizer, *talk("a"), two) == [f"'tool_calls' of a message of role 'assistant'{gone}"]


def test_a_part_of_a_text_that_a_template_drops_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] +", "message['content'].split('|')[-1] +"
    )
    assert notes_of(tokenizer, *talk("a", "b")) == []
    assert notes_of(tokenizer, *talk("a", "thought | b")) == [
        "the content of a message of role 'assistant' is left out or changed by the chat template"
    ]


def test_tools_reach_the_template_or_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert notes_of(tokenizer, *talk("a", "b"), tools=(tool,)) == ["'tools' is left out by the chat template"]
    tokenizer.chat_template = "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}" + tokenizer.chat_template
    (rendered,) = Renderer(tokenizer).render(Conversation(talk("a", "b"), (tool,)))
    assert tokenizer.decode(rendered.ids).startswith("add;<|im_start|>user\na")
    assert notes_of(tokenizer, *talk("a", "b"), tools=(tool,)) == []
    with pytest.raises(BadRecord, match=r"a message holds <\|im_end\|>"):
        notes_of(tokenizer, *talk("a", "b"), tools=({"name": "<|im_end|>"},))


def test_without_a_template_fields_of_messages_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = None
    named = message("user", "a", name="Ann")
    assert notes_of(tokenizer, named, message("assistant", "b"), tools=({"name": "f"},)) == [
        "'name' of a message of role 'user' is left out, because the tokenizer has no chat template",
        "'tools' is left out, because the tokenizer has no chat template",
    ]


def test_pairs_that_the_template_makes_equal_are_a_problem(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] +", "message['content'].strip() +")
    record = Preference(talk("a"), (message("assistant", "b"),), (message("assistant", " b\n"),))
    with pytest.raises(BadRecord, match="'chosen' and 'rejected' become the same tokens"):
        Renderer(tokenizer).render(record)


@pytest.mark.parametrize(
    ("bomb", "limit"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.2 s"),
        ("{{ (9 ** (9 ** (messages | length + 5))) % 2 }}", "takes more than 0.2 s"),
        ("{{ 'x'.center(3000000000) }}", "needs more than 1 GiB of memory"),
        ("{{ 'x' * 1000000 }}", "writes a text far longer than what it is given"),
    ],
)
def test_a_template_without_an_end_is_stopped_and_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, bomb: str, limit: str
) -> None:
    """Only at the third turn, so that nothing tells it before the record."""
    monkeypatch.setattr(chat_template, "CPU_SECONDS", 0.2)
    tokenizer.chat_template = f"{{% if messages[2] and messages[2].content == 'c' %}}{bomb}{{% endif %}}" + WITHOUT_END
    renderer = Renderer(tokenizer, "the chat template of FOLDER")
    assert renderer.render(Conversation(talk("a", "b")))
    with pytest.raises(BadRecord, match=f"^the chat template of FOLDER {limit} for one record: mend the template"):
        renderer.render(Conversation(talk("a", "b", "c", "d")))
    assert renderer.render(Conversation(talk("a", "b"))), "the others go on"


def test_a_template_that_was_stopped_three_times_in_a_row_is_not_tried_again(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{% if messages | length > 2 %}{{ 'x'.center(3000000000) }}{% endif %}" + WITHOUT_END
    renderer, short, long = Renderer(tokenizer), Conversation(talk("a", "b")), Conversation(talk("a", "b", "c", "d"))
    results: list[list[str]] = []
    for record in (long, long, short, long, long, long, short):
        reasons = []
        try:
            renderer.render(record)
        except BadRecord as bad:
            reasons.append(str(bad))
        results.append(reasons)
    assert [bool(reasons) for reasons in results] == [True, True, False, True, True, True, True]
    assert results[-1] == results[-2]


def test_a_mark_of_another_kind_ends_a_turn_within_a_conversation_but_not_the_last(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """As Llama 3.1 ends a turn that calls a tool."""
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "'<|im_end|>'", "('<|pad|>' if message['tool_calls'] else '<|im_end|>')"
    )
    called = (*talk("a"), message("assistant", "b", tool_calls=[CALL]))
    assert learned_text(tokenizer, one(tokenizer, (*called, message("tool", "c"), message("assistant", "d")))) == [
        *("b<|pad|>", "d<|im_end|>"),
    ]
    assert learned_text(tokenizer, one(tokenizer, called)) == ["b<|pad|>", "<|endoftext|>"]
