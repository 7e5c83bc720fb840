"""Generation from a trained run: greedy, sampled, streamed, as a chat; and what is said to mistakes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from trunkline.engine.errors import ConfigError
from trunkline.launchers.predict import main
from trunkline.models.causal_lm.predict import continue_text, reply
from trunkline.models.causal_lm.tokenizer import stop_ids
from trunkline.models.causal_lm.trained import Trained, load_trained

GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def trained(pretrained: Path) -> Trained:
    return load_trained(pretrained, torch.device("cpu"))


def by_hand(trained: Trained, ids: list[int], count: int) -> list[int]:
    """The likeliest token again and again, from the logits of the whole text each time."""
    made: list[int] = []
    for _ in range(count):
        logits = trained.lm(input_ids=torch.tensor([ids + made]), use_cache=False).logits[0, -1]
        made.append(int(logits.argmax()))
        if made[-1] in stop_ids(trained.tokenizer):
            break
    return made


def test_greedy_text_is_the_likeliest_token_each_time(trained: Trained) -> None:
    ids = trained.tokenizer("The following")["input_ids"]
    expected = trained.tokenizer.decode(by_hand(trained, ids, 8), skip_special_tokens=True).strip("\n")
    assert continue_text(trained, "The following", **GREEDY) == expected


def test_a_reply_continues_the_rendered_conversation(trained: Trained) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    text = trained.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "<|im_start|>" in text
    ids = trained.tokenizer(text)["input_ids"]
    expected = trained.tokenizer.decode(by_hand(trained, ids, 8), skip_special_tokens=True).strip("\n")
    assert reply(trained, messages, **GREEDY) == expected


def test_what_is_streamed_is_what_is_generated(pretrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--run", str(pretrained), "--max-new-tokens", "8"]
    assert main([*run, "--prompt", "The following"]) == 0
    trained = load_trained(pretrained, torch.device("cpu"))
    assert "The following" + continue_text(trained, "The following", **GREEDY) in capsys.readouterr().out


def test_prompts_of_a_file_are_answered_in_order_and_sampling_repeats_with_its_seed(
    pretrained: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("A list\n\nAn object\n")
    flags = ["--run", str(pretrained), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "12",
             "--temperature", "1.2", "--top-k", "50", "--top-p", "0.9"]  # fmt: skip
    rows: list[list[dict[str, Any]]] = []
    for seed in ("1", "1", "2"):
        assert main([*flags, "--seed", seed, "--out", str(tmp_path / "out.jsonl")]) == 0
        rows.append([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    assert [row["prompt"] for row in rows[0]] == ["A list", "An object"]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]


def test_a_prompt_of_a_file_ends_only_where_its_line_does(pretrained: Path, tmp_path: Path) -> None:
    """What Unicode calls a line break, and str.splitlines takes for one, may stand within a prompt."""
    within = "A\u2028list\x85of\x0bobjects\x0c\x1c\u2029here"
    (tmp_path / "prompts.txt").write_bytes(f"\ufeff{within}\r\nAn\robject\n\n \u2028\nA list".encode())
    flags = ["--run", str(pretrained), "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "2"]
    assert main([*flags, "--out", str(tmp_path / "out.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().split(b"\n") if line]
    assert [row["prompt"] for row in rows] == [within, "An\robject", "A list"]


def test_a_template_that_drops_the_system_message_is_named(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept = trained.tokenizer.chat_template
    monkeypatch.setattr(trained.tokenizer, "chat_template", kept.replace("in messages %}", "in messages[1:] %}"))
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a list?"}]
    with pytest.raises(ConfigError, match="--system: the content of a message of role 'system' is left out"):
        reply(trained, messages, **GREEDY)


def test_a_conversation_remembers_what_was_said(
    pretrained: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\nWhat is a list?\n\nnever read\n"))
    assert main(["--run", str(pretrained), "--chat", "--max-new-tokens", "8"]) == 0
    first = [{"role": "user", "content": "Hello"}]
    answer = reply(trained, first, **GREEDY)
    second = [*first, {"role": "assistant", "content": answer}, {"role": "user", "content": "What is a list?"}]
    said = capsys.readouterr().out
    assert answer in said
    assert reply(trained, second, **GREEDY) in said


def test_a_long_conversation_forgets_its_oldest_turns_and_goes_on(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a list?\n" * 5))
    assert main(["--run", str(pretrained), "--chat", "--max-new-tokens", "8", "--system", "Be brief."]) == 0
    said = capsys.readouterr().out
    assert "the oldest turn is forgotten" in said
    assert said.count("> ") == 6


def test_a_narrower_dtype_leaves_rotary_positions_where_they_are(pretrained: Path, trained: Trained) -> None:
    narrow = load_trained(pretrained, torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in narrow.lm.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.lm.model.rotary_emb.inv_freq, trained.lm.model.rotary_emb.inv_freq)
    assert narrow.lm.get_output_embeddings().weight is narrow.lm.get_input_embeddings().weight
    ids = torch.arange(64)[None]
    torch.testing.assert_close(narrow.lm(ids).logits.float(), trained.lm(ids).logits, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --prompt TEXT, --prompts FILE, or --chat to talk"),
        (["--prompt", "a", "--top-k", "5"], "--top-k: has no effect without --temperature"),
        (["--prompt", "a", "--seed", "5"], "--seed: has no effect without --temperature"),
        (["--prompt", "a", "--system", "be nice"], "--system: has no effect without --chat"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature nan: use a value above 0"),
        (["--prompt", "a", "--temperature", "1e-320"], "--temperature 1e-320: use a value above 0"),
        (["--prompt", "a", "--temperature", "0"], "--temperature 0.0: use a value above 0"),
        (["--prompt", "a", "--temperature", "1", "--top-p", "1.5"], "--top-p 1.5: use a value above 0 and at most 1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens 0: use 1 or more"),
        (["--prompt", "a", "--max-new-tokens", "999"], "are more than the 64 positions that this model knows"),
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "a\udce9"], "--prompt: not UTF-8 text: set a UTF-8 locale, or use --prompts FILE"),
        (["--prompt", "a", "--chat", "--system", "\udce9"], "--system: not UTF-8 text"),
        (["--prompts", "{tmp}/absent"], "cannot be read as UTF-8 text"),
        (["--chat", "--out", "{tmp}/x"], "--out: a conversation on the terminal is not written"),
        (["--prompt", "a", "--device", "abacus"], "--device abacus: not usable here"),
        (["--prompt", "a" * 200], "positions that this model knows: shorten either"),
        (["--prompt", "a", "--max-new-tokens", "2", "--out", "{tmp}"], "cannot be written"),
        (["--prompts", "{tmp}/asked.txt", "--out", "{tmp}/linked.txt"], "is the file of --prompts"),
    ],
)
def test_mistakes_are_named(
    pretrained: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "asked.txt").write_text("a\n")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "asked.txt")
    assert main(["--run", str(pretrained), *[flag.format(tmp=tmp_path) for flag in flags]]) == 2
    assert (tmp_path / "asked.txt").read_text() == "a\n"
    assert message in capsys.readouterr().err


def test_what_a_model_s_files_say_of_generation_does_not_count_but_for_its_stops(
    pretrained: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is Infinity in its config.json, which transformers writes for some families, an error."""
    best = Path(shutil.copytree(pretrained / "best", tmp_path / "best"))
    (best / "digests.json").unlink()  # its files are changed
    asked = {"num_beams": 3, "num_return_sequences": 2, "stop_strings": ["a"], "return_dict_in_generate": True}
    (best / "generation_config.json").write_text(json.dumps(asked | {"eos_token_id": [7], "do_sample": True}))
    config = json.loads((best / "config.json").read_text())
    (best / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, float("inf")]}))
    for flags in ([], ["--temperature", "0.5"]):
        assert main(["--run", str(best), "--prompt", "The following", "--max-new-tokens", "8", *flags]) == 0
    assert "The following" + continue_text(trained, "The following", **GREEDY) in capsys.readouterr().out
    assert 7 in load_trained(best, torch.device("cpu")).stops
    (best / "config.json").write_text("[]")
    assert main(["--run", str(best), "--prompt", "a"]) == 2
    assert "config.json: cannot be read (it does not hold an object {...})" in capsys.readouterr().err


def test_a_line_that_is_not_utf_8_ends_a_conversation_with_one_error(
    pretrained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for errors in ("strict", "surrogateescape"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
        assert main(["--run", str(pretrained), "--chat"]) == 2
        assert "error: standard input: not UTF-8 text: set a UTF-8 locale" in capsys.readouterr().err
