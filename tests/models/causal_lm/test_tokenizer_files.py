"""A store's tokenizer is the given one, file by file, and what is beside a run's weights gives the same tokens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.models.causal_lm.families import tiny_config
from tests.models.causal_lm.test_prepare import write_lines
from tests.models.causal_lm.toy_language import toy_config
from trunkline.engine.data.store import fingerprint
from trunkline.engine.errors import ConfigError
from trunkline.engine.ranks.distributed import start
from trunkline.engine.trainer import Trainer
from trunkline.models.causal_lm.prepare import _summary, prepare
from trunkline.models.causal_lm.store import Store
from trunkline.models.registry import make_task
from trunkline.models.text.skipped import remarks
from trunkline.models.text.tokenizer import load_tokenizer
from trunkline.models.text.tokenizer_files import same_tokens

TEXTS = [f"A cat sat  on the mat </s> number {i}.\n\n It was a naïve café; x={i}" for i in range(40)]
TALKS = [{"prompt": f"What  is {i}?", "response": f" A number, {i}\n"} for i in range(40)]


def llama_2(folder: Path, **settings: Any) -> Path:
    """A folder like Llama 2's: byte fallback, and spaces that its class writes as `legacy` says."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    for name in special:
        tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "unk_token": "<unk>", "bos_token": "<s>"}
    config |= {"eos_token": "</s>", "add_bos_token": True, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


def qwen_2(folder: Path, **settings: Any) -> Path:
    """Bytes, and a class of its own."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "add_prefix_space": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    return folder


def of_transformers(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


FOLDERS = [
    pytest.param(llama_2, {"legacy": True}, id="llama legacy"),
    pytest.param(llama_2, {"legacy": False}, id="llama"),
    pytest.param(llama_2, {"add_prefix_space": False}, id="llama without a prefix"),
    pytest.param(llama_2, {"tokenizer_class": "PreTrainedTokenizerFast"}, id="tokenizer.json alone"),
    pytest.param(qwen_2, {}, id="qwen"),
]


@pytest.mark.parametrize(("folder_of", "settings"), FOLDERS)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_store_has_the_tokens_of_the_given_folder(
    folder_of: Any, settings: dict[str, Any], workers: int, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "given", **settings)
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    store, _ = prepare(
        [source], tmp_path / "store", kind="text", tokenizer=folder, val_fraction=0.0, workers=workers,
    )  # fmt: skip
    for path in folder.iterdir():
        assert (tmp_path / "store/tokenizer" / path.name).read_bytes() == path.read_bytes()
    theirs = of_transformers(folder)
    lead = [theirs.bos_token_id] if theirs("a")["input_ids"][:1] == [theirs.bos_token_id] else []
    sequences = store.split("train")
    assert len(sequences) == len(TEXTS)
    for place, text in enumerate(TEXTS):
        wanted = [*lead, *theirs(text, add_special_tokens=False)["input_ids"], theirs.eos_token_id]
        assert sequences.tokens(place).tolist() == wanted


def test_a_class_that_overrides_tokenizer_json_is_named(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    for name, settings, named in (
        ("overridden", {}, True),
        ("alone", {"tokenizer_class": "PreTrainedTokenizerFast"}, False),
    ):
        folder = llama_2(tmp_path / name, **settings)
        store, _ = prepare([source], tmp_path / f"{name}-store", kind="text", tokenizer=folder, val_fraction=0.0)
        assert ("overridden by transformers' LlamaTokenizer, for which" in _summary(store)) is named
        said = "\n".join(remarks(store.index))
        assert (f"other tokens by {folder}/tokenizer.json alone" in said) is named


def test_a_template_given_beside_replaces_the_folder_s_own(tmp_path: Path) -> None:
    folder = llama_2(tmp_path / "given")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("tools")
    (folder / "chat_template.jinja").write_text("default")
    source = write_lines(tmp_path / "talks.jsonl", *TALKS)
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}></s>{% endfor %}")
    store, _ = prepare(
        [source], tmp_path / "store", kind="conversations", tokenizer=folder, val_fraction=0.0, chat_template=template
    )
    assert store.tokenizer().chat_template == template.read_text()
    assert json.loads((tmp_path / "store/tokenizer/tokenizer_config.json").read_text())["legacy"] is True


def test_tokens_of_an_unfaithful_copy_are_an_error(tmp_path: Path) -> None:
    given, other = llama_2(tmp_path / "given"), llama_2(tmp_path / "other", legacy=False)
    with pytest.raises(ConfigError, match=r"given: a copy of its tokenizer's files gives other tokens for \d+ of 40"):
        same_tokens(load_tokenizer(given), load_tokenizer(other), TEXTS, given)
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    prepare([source], tmp_path / "store", kind="text", tokenizer=given, val_fraction=0.0)
    _as_an_earlier_version_left_it(tmp_path / "store", load_tokenizer(given))
    with pytest.raises(ConfigError, match=r"store: its tokens are not those of .*given.*remove that folder"):
        prepare([source], tmp_path / "store", kind="text", tokenizer=given, val_fraction=0.0)


def _as_an_earlier_version_left_it(root: Path, tokenizer: Any) -> None:
    """With the tokenizer that save_pretrained writes."""
    tokenizer.save_pretrained(root / "tokenizer")
    index = json.loads((root / "store.json").read_text())
    files = sorted((root / "tokenizer").iterdir())
    index["files"] = {f"tokenizer/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    index["fingerprint"] = fingerprint(index)
    (root / "store.json").write_text(json.dumps(index))
    Store.open(root)


@pytest.mark.parametrize(
    ("folder_of", "settings"), [*FOLDERS[:1], pytest.param(qwen_2, {"tokenizer_class": None}, id="none")]
)
def test_beside_a_run_s_weights_is_the_same_tokenizer(folder_of: Any, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "given", **settings)
    if settings.get("tokenizer_class", "") is None:  # then the model's type would decide
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config["tokenizer_class"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    prepare([source], tmp_path / "text", kind="text", tokenizer=folder, val_fraction=0.2)
    config = toy_config(tmp_path, tmp_path, training={"steps": 1, "eval_every": 1, "save_every": 1})
    Trainer(make_task(config), config, start(), tmp_path / "run").run()
    given, written = of_transformers(folder), of_transformers(tmp_path / "run/final")
    assert [given(text)["input_ids"] for text in TEXTS] == [written(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    ("folder_of", "model_type", "settings"),
    [
        pytest.param(qwen_2, "mistral", {}, id="qwen of a mistral"),
        pytest.param(llama_2, "qwen2", {"eos_token": "</s>"}, id="llama of a qwen"),
        pytest.param(qwen_2, "gpt2", None, id="no settings at all"),
    ],
)
def test_assets_of_another_type_of_model_give_the_tokens_of_the_store(
    folder_of: Any, model_type: str, settings: dict[str, Any] | None, tmp_path: Path
) -> None:
    """transformers lets the model_type in config.json decide about a tokenizer's class."""
    folder = folder_of(tmp_path / "given", **(settings or {}))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if settings is None:
        (folder / "tokenizer_config.json").unlink()
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    store, _ = prepare([source], tmp_path / "text", kind="text", tokenizer=folder, val_fraction=0.2)
    config = make_task(toy_config(tmp_path, tmp_path)).save_assets(tmp_path / "out")
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    ours, written = store.tokenizer(), of_transformers(tmp_path / "out")
    assert [ours(text)["input_ids"] for text in TEXTS] == [written(text)["input_ids"] for text in TEXTS]
    assert written.eos_token_id == ours.eos_token_id


def test_a_type_of_model_beside_which_no_copy_keeps_its_tokens_is_named(tmp_path: Path) -> None:
    folder = llama_2(tmp_path / "given")
    source = write_lines(tmp_path / "texts.jsonl", *({"text": text} for text in TEXTS))
    prepare([source], tmp_path / "text", kind="text", tokenizer=folder, val_fraction=0.2)
    task: Any = make_task(toy_config(tmp_path, tmp_path))
    task.hf_config = tiny_config("qwen2", eos_token_id=None)  # transformers gives it Qwen2Tokenizer, whatever is asked
    with pytest.raises(ConfigError, match=r"data\.store: .*text: .*beside a model of type 'qwen2': prepare"):
        task.save_assets(tmp_path / "out")
