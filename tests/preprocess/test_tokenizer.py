"""The tokenizer that is kept does what transformers' does, and spares a second run its import."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from regraft.model.load import open_base
from regraft.preprocess import tokenizer as kept
from regraft.preprocess.params import HoldoutParams, PreprocessParams
from regraft.preprocess.preprocess import preprocess
from regraft.preprocess.shards import Cache
from regraft.preprocess.template import compiled
from regraft.preprocess.tokenizer import KeptTokenizer, keep_tokenizer, open_tokenizer

ROOT = Path(__file__).parents[2]
PARAMS = PreprocessParams(max_length=128, holdout=HoldoutParams(share=0.1))
EVERYTHING = (
    "{%- set ns = namespace(n=0, seen=dict(a=1)) -%}\n"
    "{% for message in messages %}\n    {% if loop.index > 40 %}{% break %}{% endif %}\n"
    "{%- set ns.n = ns.n + 1 %}{{ bos_token or '' }}<|im_start|>{{ message.role }}\n"
    "{% generation %}{{ message['content'] | tojson if ns.n == 2 else message['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {{ ns.seen.a }}{{ tools is none }}\n{% endif %}"
)

THOUGHTS = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1] | trim")
WORDS = [
    "where is my lamp",
    " leading",
    "trailing\n",
    "a <|im_end|> typed",
    "\u6f22 e\u0301",
    "ok</think>\n\nyes",
    "{{ 1 }}",
]


def talks(count: int) -> list[list[dict[str, str]]]:
    dice = random.Random(3)
    made = []
    for _ in range(count):
        roles = ["system"] * dice.randrange(2) + ["user", "assistant"] * dice.randint(1, 3)
        made.append([{"role": role, "content": dice.choice(WORDS)} for role in roles])
    return made


def as_kept(tokenizer: Any) -> KeptTokenizer:
    content = kept._content(tokenizer)
    assert content is not None
    return KeptTokenizer(json.loads(json.dumps(content)), lambda: pytest.fail("the real one was loaded"))


@pytest.mark.parametrize("template", [tiny.CHATML, THOUGHTS, EVERYTHING])
@pytest.mark.parametrize("generation", [False, True])
def test_it_renders_as_transformers_does(template: str, generation: bool) -> None:
    real = tiny.make_tokenizer()
    real.chat_template = template
    given = {"chat_template": template, "tokenize": False, "add_generation_prompt": generation}
    some = talks(80)
    assert as_kept(real).apply_chat_template(some, **given) == real.apply_chat_template(some, **given)


def test_it_encodes_as_transformers_does_and_knows_the_same_names() -> None:
    real = tiny.make_tokenizer()
    own = as_kept(real)
    texts = [each["content"] for messages in talks(80) for each in messages]
    assert own(texts, add_special_tokens=False)["input_ids"] == real(texts, add_special_tokens=False)["input_ids"]
    for name in ("eos_token", "eos_token_id", "special_tokens_map", "model_max_length"):
        assert getattr(own, name) == getattr(real, name)
    assert {i: (each.content, each.special) for i, each in own.added_tokens_decoder.items()} == {
        i: (each.content, each.special) for i, each in real.added_tokens_decoder.items()
    }


def test_what_it_cannot_do_the_real_one_does() -> None:
    real = tiny.make_tokenizer()
    content = kept._content(real)
    assert content is not None
    own = KeptTokenizer(content, lambda: real)
    assert own.decode([5, 6]) == real.decode([5, 6])
    assert own("x")["input_ids"] == real("x")["input_ids"]
    call = [[{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "b"}]]
    given = {"chat_template": tiny.CHATML, "tokenize": False, "add_generation_prompt": False}
    assert own.apply_chat_template(call, **given) == real.apply_chat_template(call, **given)


@pytest.mark.parametrize(
    "template",
    ["{% set n = namespace(__class__=1) %}", "{% set n = namespace() %}{% set n._x = 1 %}", "{{ ''.__class__.mro() }}"],
)
def test_a_template_reaches_nothing_of_python(template: str) -> None:
    from jinja2.exceptions import SecurityError

    with pytest.raises(SecurityError):
        compiled(template + "{{ n }}").render(messages=[])


def test_a_tokenizer_of_its_own_ways_is_not_kept(tokenizer_base: Path, tmp_path: Path) -> None:
    class Shouting:
        def __init__(self) -> None:
            self.real = tiny.make_tokenizer()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def __call__(self, *args: Any, **given: Any) -> Any:
            return self.real(*args, **given)

        def apply_chat_template(self, *args: Any, **given: Any) -> list[str]:
            return [text.upper() for text in self.real.apply_chat_template(*args, **given)]

    store, base = Cache(tmp_path / "cache"), open_base(tokenizer_base, weights=False)
    real, entry = open_tokenizer(base, store)
    keep_tokenizer(Shouting(), store, entry)
    assert store.find(entry) is None
    keep_tokenizer(real, store, entry)
    assert store.find(entry) is not None


def test_a_damaged_one_is_found_by_its_digest_and_loaded_anew(tokenizer_base: Path, tmp_path: Path) -> None:
    store, base = Cache(tmp_path / "cache"), open_base(tokenizer_base, weights=False)
    real, entry = open_tokenizer(base, store)
    keep_tokenizer(real, store, entry)
    assert isinstance(open_tokenizer(base, store)[0], KeptTokenizer)
    path = store.folder(entry) / "tokenizer.json"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not isinstance(open_tokenizer(base, store)[0], KeptTokenizer)


def test_an_increment_imports_neither_transformers_nor_pandas(
    tokenizer_base: Path, write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"where is {i}?"},
                {"role": "assistant", "content": "here \u00fc" if i % 3 else "here"},
            ],
            "slices": {"kind": str(i % 2)},
        }
        for i in range(220)
    ]
    first, more, cache = write_rows(rows[:200], "first"), write_rows(rows, "more"), tmp_path / "cache"
    preprocess(PARAMS, base=tokenizer_base, rows=first, out=tmp_path / "before", cache=cache)
    script = (
        "import sys\nfrom pathlib import Path\nfrom regraft.preprocess.params import PreprocessParams\n"
        "from regraft.preprocess.preprocess import preprocess\n"
        f"params = PreprocessParams.model_validate_json({PARAMS.model_dump_json()!r})\n"
        f"preprocess(params, base=Path({str(tokenizer_base)!r}), rows=Path({str(more)!r}), "
        f"out=Path({str(tmp_path / 'out')!r}), cache=Path({str(cache)!r}))\n"
        "print(sorted({'transformers', 'torch', 'pandas', 'jinja2'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "['jinja2']\n"), done.stderr
    preprocess(PARAMS, base=tokenizer_base, rows=more, out=tmp_path / "anew")
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "anew/manifest.json").read_bytes()
