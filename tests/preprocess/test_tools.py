"""Conversations that call tools, and plain texts, from the raw file to blocks and holdout."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny

from regraft.artifacts import commit_dir, digest_json
from regraft.errors import DataError
from regraft.model.pin import TOKENIZER_FILES, digest_files
from regraft.model.report import BaseReport
from regraft.preprocess.params import PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.report import PreprocessReport
from regraft.preprocess.show import show_rows
from regraft.validate.params import DataParams, ValidateParams
from regraft.validate.validate import validate

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}<|im_start|>user\n[{{ message.content }}]<|im_end|>\n"
    "{% else %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "stock", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base")
    weights = root / "weights"
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(weights)
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").write_bytes(b"")
    digest = digest_json(digest_files(weights, TOKENIZER_FILES))
    with commit_dir(root / "model") as folder:
        BaseReport(
            source="folder", base=str(weights), name="tiny", revision=None, path=str(weights), digest="0" * 64,
            tokenizer_digest=digest, files={}, parameters=0, dtype="float32", architecture="LlamaForCausalLM",
        ).save(folder / "report.json")  # fmt: skip
    return root / "model"


def row(number: int, *, answered: bool) -> dict[str, Any]:
    call = {
        "id": f"c{number}",
        "type": "function",
        "function": {"name": "stock", "arguments": json.dumps({"z": f"lamp {number}", "a": number})},
    }
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": f"is lamp {number} there"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    if answered:
        turns += [{"role": "tool", "content": f"{number} left", "tool_call_id": f"c{number}"}]
        turns += [{"role": "assistant", "content": f"there are {number}"}]
    return {"messages": turns, "tools": TOOLS, "kind": "answer" if answered else "call"}


DATA: dict[str, Any] = {
    "tools": "tools",
    "slices": ["kind"],
    "sources": {"notes": {"path": "data/raw/notes.jsonl", "layout": "text", "slices": {}}},
}


def write(root: Path, rows: list[dict[str, Any]], notes: list[str]) -> Path:
    (root / "data/raw").mkdir(parents=True)
    (root / "data/raw/chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (root / "data/raw/notes.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in notes))
    params = ValidateParams.model_validate({"expectations": {"quarantined": {"share": 1.0}}})
    validate(params, DataParams.model_validate(DATA), raw_root=root, out=root / "validate", docs=root / "docs")
    return root / "validate"


def run(root: Path, base: Path, **params: Any) -> PreprocessReport:
    settings = PreprocessParams.model_validate({"max_length": 400, "holdout": {"share": 0.2}} | params)
    return preprocess(settings, base=base, rows=root / "validate", out=root / "out")


def stream(path: Path) -> list[dict[str, Any]]:
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
        return list(reader.read_all().to_pylist())


def test_calls_are_trained_held_out_and_audited_like_any_answer(base: Path, tmp_path: Path) -> None:
    write(tmp_path, [row(i, answered=i % 2 == 0) for i in range(60)], ["the lamp is green"])
    report = run(tmp_path, base)
    assert report.counts.train + report.counts.holdout == 61
    audit = report.supervision
    assert (audit.answers_recovered, audit.answers_exact, audit.round_trip) == (1.0, 1.0, 1.0)
    assert (audit.rows_learning_to_stop, audit.control_leaked) == (1.0, 0)
    tokenizer = tiny.make_tokenizer()
    held = stream(tmp_path / "out/holdout-00000.arrow")
    assert {dict(each["slices"])["kind"] for each in held} == {"call", "answer"}
    for each in held:
        learned = [token for token, label in zip(each["input_ids"], each["labels"], strict=True) if label != -100]
        assert tokenizer.decode(learned[:-1]) == each["answer"]
        number = json.loads(each["prompt"])[0]["content"].split()[2]
        wanted = f'<call>{{"name": "stock", "arguments": {{"z": "lamp {number}", "a": {number}}}}}</call>'
        assert each["answer"] == (wanted if dict(each["slices"])["kind"] == "call" else f"there are {number}")
        assert '"name": "stock"' in tokenizer.decode(each["prompt_ids"])


def test_tools_that_nobody_calls_are_in_the_prompt_all_the_same(base: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi {}"}, {"role": "assistant", "content": "ho"}]
    rows = [
        {
            "messages": [{**turns[0], "content": f"hi {i}"}, turns[1]],
            "tools": TOOLS if i % 2 else None,
            "kind": str(i % 2),
        }
        for i in range(60)
    ]
    write(tmp_path, rows, ["a note"])
    run(tmp_path, base)
    tokenizer = tiny.make_tokenizer()
    for each in stream(tmp_path / "out/holdout-00000.arrow"):
        assert ('"name": "stock"' in tokenizer.decode(each["prompt_ids"])) == (dict(each["slices"])["kind"] == "1")


def test_a_plain_text_is_always_trained_whole_and_never_held_out(base: Path, tmp_path: Path) -> None:
    notes = [f"note {i}: the lamp of day {i} is <|im_end|> green" for i in range(50)]
    write(tmp_path, [row(i, answered=True) for i in range(40)], [*notes, notes[0]])
    report = run(tmp_path, base)
    assert report.holdout_slices["source"] == {"other": report.counts.holdout}
    assert report.train_slices["source"]["notes"] == 50
    assert report.counts.deduplicated == 1
    tokenizer = tiny.make_tokenizer()
    found = []
    for block in stream(tmp_path / "out/train-00000.arrow"):
        starts = [i for i, position in enumerate(block["position_ids"]) if position == 0]
        for a, b in zip(starts, [*starts[1:], None], strict=True):
            ids, labels = block["input_ids"][a:b], block["labels"][a:b]
            if labels[1:] == ids[1:]:
                found.append(tokenizer.decode(ids[:-1]))
                assert ids[-1] == tokenizer.eos_token_id
                assert labels[0] == -100
    assert sorted(found) == sorted(notes)


def test_a_note_that_is_a_held_out_prompt_or_must_be_held_out_is_not_trained_on(base: Path, tmp_path: Path) -> None:
    rows = [row(i, answered=True) for i in range(40)]
    write(tmp_path, rows, ["something else"])
    report = run(tmp_path, base, holdout={"share": 0.2, "always": {"source": "notes"}}, max_dropped_share=1)
    assert report.counts.nothing_to_train == 1


def test_plain_texts_alone_prove_nothing_and_are_refused(base: Path, tmp_path: Path) -> None:

    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/notes.jsonl").write_text("".join(json.dumps({"text": f"note {i}"}) + "\n" for i in range(30)))
    data = DataParams(layout="text")
    validate(ValidateParams(), data, raw_root=tmp_path, out=tmp_path / "validate", docs=tmp_path / "docs")
    with pytest.raises(DataError, match="in the holdout, so nothing could be proved"):
        run(tmp_path, base)


def test_rows_that_differ_in_a_call_or_a_tool_are_different_rows(base: Path, tmp_path: Path) -> None:
    one, two, three = (row(1, answered=False) for _ in range(3))
    two["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"z": "sofa"}'
    three["tools"] = [*TOOLS, {"type": "function", "function": {"name": "price"}}]
    write(tmp_path, [one, two, three, row(1, answered=False), *(row(i, answered=True) for i in range(2, 30))], ["x y"])
    counts = run(tmp_path, base).counts
    assert (counts.rows_in, counts.deduplicated) == (33, 1)


def test_show_renders_calls_and_texts_with_what_is_learned(base: Path, tmp_path: Path) -> None:
    from regraft.chat import open_chat
    from regraft.model.load import load_tokenizer, open_base

    write(tmp_path, [row(1, answered=False)], ["call 4111 1111 1111 1111 now"])
    chat = open_chat(load_tokenizer(open_base(base, weights=False)))
    shown = show_rows(
        DataParams.model_validate(DATA), ValidateParams(), root=tmp_path, count=3, chat=chat, supervise="assistant"
    )
    assert [each.layout for each in shown] == ["messages (source other)", "text (source notes)"]
    learned = ["".join(text for text, is_learned in each.pieces if is_learned) for each in shown]
    assert learned[0] == '<call>{"name": "stock", "arguments": {"z": "lamp 1", "a": 1}}</call><|im_end|>'
    assert "[card_number] now" in learned[1]
    assert shown[1].learned == shown[1].tokens - 1
    assert shown[1].reasons == ["card_number"]
