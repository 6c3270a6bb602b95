"""Writes the shipped data: two monthly batches of conversations, a list of their flaws, and the stand-in's corpus.

Run as `python data/shipped/make.py`. The same code and YAML files give the same bytes: the seed is fixed, and neither the
clock nor the machine is asked. `data/README.md` describes the files.
"""

import copy
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).resolve().parent
DATA = HERE.parent
SEED = 20260901

REGISTERS = {"casual": 9, "neutral": 7, "formal": 4}
# How often customers ask for what; the new action makes up half of the later batch.
WEIGHTS = {
    "track_order": 13,
    "return_item": 11,
    "product_availability": 12,
    "cancel_order": 10,
    "change_delivery": 12,
    "exchange_item": 10,
    "refund_status": 10,
    "report_damage": 10,
    "opening_hours": 12,
}
UNSEEN_SHARE = 0.09
TYPO_SHARE = 0.05
SHORT, MEDIUM = 11, 19  # words at most; what has more is long

BATCHES = {
    "raw/2026-09.jsonl": {"rows": 6000, "month": "2026-09", "first_id": 1, "new_share": 0.0},
    "later/2026-10.jsonl": {"rows": 1200, "month": "2026-10", "first_id": 10001, "new_share": 0.5},
}
# Rows of each batch that carry a flaw for `validate` (or, for duplicates, `preprocess`) to find: (first batch, second batch).
FLAWS = {
    "exact_duplicate": (35, 6),  # the same messages again under another id
    "empty_user": (19, 3),  # nothing, or only blanks, in the customer's turn
    "broken_json": (29, 6),  # the answer was cut off
    "unknown_action": (19, 5),  # a label that the shop does not have
    "missing_assistant": (16, 3),  # the conversation ends after the customer's turn
    "wrong_role": (13, 3),  # "customer" and "bot" in place of "user" and "assistant"
    "email_address": (16, 3),  # an address at a domain that is reserved for examples
    "card_number": (10, 3),  # a test number that passes the Luhn check
    "control_characters": (10, 2),  # NUL, BEL, ESC and the like in the text
    "mojibake": (10, 2),  # UTF-8 that was read as Windows-1252
    "over_long": (6, 2),  # a whole mail thread pasted in, thousands of characters
}
UNKNOWN_ACTIONS = ["trak_order", "cancel", "unknown", "escalate_to_human", "refund"]
CARDS = ["4111 1111 1111 1111", "5555 5555 5555 4444", "4012888888881881"]
# Documents of the corpus by kind, before repeated ones and those that contain a prompt are dropped.
CORPUS = {
    "pages": 1200,
    "requests": 2000,
    "answers": 600,
    "records": 14000,
    "slips": 800,
    "talk": 700,
    "acknowledged": 500,
}

Row = dict[str, Any]


def normalise(text: str) -> str:
    """Return the text in NFC, case-folded, with each run of white space as one blank."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def load(name: str) -> Any:
    """Return one of the YAML files beside this one."""
    return YAML(typ="safe", pure=True).load((HERE / name).read_text(encoding="utf-8"))


def slots_of(template: str, spec: Any) -> list[str]:
    """Return the answer's slots that a template shows, in the order of the template."""
    names = [name for name in re.findall(r"\{(\w+)\}", template) if name not in spec["wordings"]]
    return [spec["forms"][name]["slot"] if name in spec["forms"] else name for name in names]


def check_templates(spec: Any) -> None:
    """Raise `ValueError` where a template does not show exactly its action's slots, or is listed twice."""
    found: Counter[str] = Counter()
    for action, of_action in {**spec["actions"], **spec["later_actions"]}.items():
        for templates in (*(of_action[r] for r in REGISTERS), *(of_action["unseen"][r] for r in REGISTERS)):
            for template in templates:
                found[normalise(template)] += 1
                if sorted(slots_of(template, spec)) != sorted(of_action["slots"]):
                    raise ValueError(f"{action}: {template!r} must show the slots {of_action['slots']}")
    if twice := [template for template, count in found.items() if count > 1]:
        raise ValueError(f"listed twice: {twice}")


def draw_values(rng: random.Random, spec: Any) -> dict[str, str]:
    """Return a value of the answer for every slot."""
    return {slot: rng.choice(list(values)) for slot, values in spec["slots"].items()}


def fill(rng: random.Random, template: str, values: dict[str, str], spec: Any, register: str = "neutral") -> str:
    """Return the template with the slots' values as people write them, in the register's spelling."""

    def surface(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in spec["wordings"]:
            return rng.choice(spec["wordings"][name][register])
        form = spec["forms"].get(name)
        slot = form["slot"] if form else name
        return rng.choice((form["surfaces"] if form else spec["slots"][slot])[values[slot]])

    text = re.sub(r"\{(\w+)\}", surface, template)
    if register == "casual":
        return text.lower() if rng.random() < 0.9 else text
    # A sentence that begins with a slot still begins with a capital letter.
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match.group(1) + match.group(2).upper(), text)


def mistype(rng: random.Random, template: str) -> str:
    """Return the template with two neighbouring letters of one longer word swapped; slots are never touched."""
    words = template.split(" ")
    places = [at for at, word in enumerate(words) if len(word) >= 5 and word.isalpha()]
    if not places:
        return template
    at = rng.choice(places)
    cut = rng.randrange(1, len(words[at]) - 2)
    word = words[at]
    words[at] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
    return " ".join(words)


def request(rng: random.Random, spec: Any, action: Any, register: str, unseen: bool, values: dict[str, str]) -> str:
    """Return one customer's message: a template, what people put around it, and their typing."""
    template = rng.choice((action["unseen"] if unseen else action)[register])
    if register == "casual" and not unseen and rng.random() < TYPO_SHARE:
        template = mistype(rng, template)
    core = fill(rng, template, values, spec, register)

    talkative = rng.random()
    parts = [rng.choice(spec["openings"][register])] if rng.random() < 0.45 else []
    if talkative > 0.72:
        parts.append(rng.choice(spec["contexts"][register]))
    parts.append(core)
    if talkative > 0.9:
        parts.append(rng.choice(spec["contexts"][register]))
    if rng.random() < 0.4:
        # People do not say the same thing before and after.
        if core[-1].isalnum():
            parts[-1] += rng.choice([".", ",", "", "!"]) if register == "casual" else "."
        parts.append(rng.choice(spec["closings"][register]))
    return " ".join(dict.fromkeys(parts))


def clean_rows(rng: random.Random, spec: Any, batch: Any, taken: set[str]) -> Iterator[Row]:
    """Yield a batch's rows, without id and date, each with a prompt that no row had before."""
    actions = {**spec["actions"], **spec["later_actions"]}
    while True:
        new = rng.random() < batch["new_share"]
        name = rng.choice(list(spec["later_actions"])) if new else rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        register = rng.choices(list(REGISTERS), list(REGISTERS.values()))[0]
        unseen = rng.random() < UNSEEN_SHARE
        values = draw_values(rng, spec)
        text = request(rng, spec, actions[name], register, unseen, values)
        if normalise(text) in taken:
            continue
        taken.add(normalise(text))
        answer = {"action": name} | {slot: values[slot] for slot in actions[name]["slots"]}
        words = len(text.split())
        yield {
            "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": json.dumps(answer)}],
            "action": name,
            "register": register,
            "length": "short" if words <= SHORT else "medium" if words <= MEDIUM else "long",
            "phrasing": "unseen" if unseen else "seen",
        }


def spoil(rng: random.Random, row: Row, kind: str) -> None:
    """Give a clean row the flaw of that kind, in place."""
    user, assistant = row["messages"]
    text, answer = user["content"], assistant["content"]
    match kind:
        case "empty_user":
            user["content"] = rng.choice(["", " ", "\n", "   "])
        case "broken_json":
            assistant["content"] = answer[: rng.randrange(len(answer) // 2, len(answer) - 1)]
        case "unknown_action":
            row["action"] = rng.choice(UNKNOWN_ACTIONS)
            assistant["content"] = json.dumps(json.loads(answer) | {"action": row["action"]})
        case "missing_assistant":
            row["messages"].pop()
        case "wrong_role":
            user["role"], assistant["role"] = "customer", "bot"
        case "email_address":
            address = f"{rng.choice(['shopper', 'home', 'orders', 'post'])}{rng.randrange(10, 99)}@example.{rng.choice(['com', 'org'])}"
            user["content"] = f"{text} {rng.choice(['my mail is', 'You can reach me at', 'write to'])} {address}"
        case "card_number":
            user["content"] = (
                f"{text} {rng.choice(['I paid with card', 'card no', 'The card was'])} {rng.choice(CARDS)}"
            )
        case "control_characters":
            at = rng.randrange(1, len(text))
            user["content"] = text[:at] + rng.choice(["\x00", "\x07", "\x1b[31m", "\x08\x08"]) + text[at:]
        case "mojibake":
            broken = rng.choice(["caf\u00e9 table", "it\u2019s urgent", "20 \u20ac paid", "na\u00efve question"])
            user["content"] = f"{text} {broken.encode().decode('cp1252')}"
        case "over_long":
            user["content"] = " ".join(f"> {text}" for _ in range(6000 // len(text)))
        case _:
            raise ValueError(f"no such flaw: {kind}")


def make_batch(
    rng: random.Random, spec: Any, batch: Any, which: int, taken: set[str]
) -> tuple[list[Row], dict[str, str]]:
    """Return a batch's rows in the order of their arrival, and the kind of flaw of each spoiled one by its id."""
    counts = {kind: numbers[which] for kind, numbers in FLAWS.items()}
    duplicates = counts.pop("exact_duplicate")
    source = clean_rows(rng, spec, batch, taken)
    rows = [next(source) for _ in range(batch["rows"] - duplicates)]

    # A duplicate comes after its original, which stays free of other flaws.
    kinds = [kind for kind, count in counts.items() for _ in range(count)]
    chosen = rng.sample(range(len(rows)), len(kinds) + duplicates)
    flaw_at = dict(zip(chosen, kinds, strict=False))
    again = sorted(chosen[len(kinds) :])
    for at, kind in flaw_at.items():
        spoil(rng, rows[at], kind)
    marked: list[tuple[Row, str | None]] = [(row, flaw_at.get(at)) for at, row in enumerate(rows)]
    for shift, at in enumerate(again):
        place = rng.randrange(at + shift + 1, len(marked) + 1)
        original = next(position for position, (row, _) in enumerate(marked) if row is rows[at])
        marked.insert(max(place, original + 1), (copy.deepcopy(rows[at]), "exact_duplicate"))

    out, flaws = [], {}
    for at, (row, kind) in enumerate(marked):
        id = f"r-{batch['first_id'] + at:05d}"
        out.append({"id": id, **row, "at": f"{batch['month']}-{1 + at * 30 // len(marked):02d}"})
        if kind:
            flaws[id] = kind
    return out, flaws


def chat(*turns: str) -> str:
    """Return turns of user and assistant in ChatML, as the stand-in's template renders them."""
    roles = ["user", "assistant"] * len(turns)
    return "\n".join(f"<|im_start|>{role}\n{turn}<|im_end|>" for role, turn in zip(roles, turns, strict=False))


def corpus_documents(rng: random.Random, spec: Any, domain: Any) -> Iterator[str]:
    """Yield documents for the stand-in: never a request with its action, never a template marked unseen."""
    actions = {**spec["actions"], **spec["later_actions"]}

    def message(values: dict[str, str]) -> tuple[str, list[str]]:
        action = actions[rng.choice(list(actions))]
        register = rng.choice(list(REGISTERS))
        return request(rng, spec, action, register, False, values), action["slots"]

    for _ in range(CORPUS["pages"]):
        values = draw_values(rng, spec)
        sentences = rng.sample(domain["help"][rng.choice(list(domain["help"]))], rng.randrange(2, 5))
        yield " ".join(fill(rng, sentence, values, spec) for sentence in sentences)
    for _ in range(CORPUS["requests"]):
        yield message(draw_values(rng, spec))[0]
    for _ in range(CORPUS["answers"]):
        name, values = rng.choice(list(actions)), draw_values(rng, spec)
        yield json.dumps({"action": name} | {slot: values[slot] for slot in actions[name]["slots"]})
    for _ in range(CORPUS["records"]):
        template, values = rng.choice(domain["records"]), draw_values(rng, spec)
        line = fill(rng, template, values, spec, rng.choice(["casual", "neutral"]))
        yield line + " " + json.dumps({slot: values[slot] for slot in slots_of(template, spec)})
    for _ in range(CORPUS["slips"]):
        things = []
        for _ in range(rng.randrange(2, 6)):
            form = rng.choice(
                ["{colour} {item}", "{item}", "{item} for {store}", "{store} on {day}", "{damage} {item}"]
            )
            things.append(fill(rng, form, draw_values(rng, spec), spec, "casual"))
        first, second = rng.choice(domain["slips"])
        yield f"{first}: {', '.join(things)}. {second}: {', '.join(things)}."
    for _ in range(CORPUS["talk"]):
        values = draw_values(rng, spec)
        yield chat(*(fill(rng, turn, values, spec) for turn in rng.choice(domain["talk"])))
    for _ in range(CORPUS["acknowledged"]):
        # The answer repeats words of the message but does not say what the customer wants.
        values = draw_values(rng, spec)
        text, slots = message(values)
        said = domain["acknowledge"]
        noted = " ".join(fill(rng, rng.choice(said["notes"][slot]), values, spec) for slot in slots)
        yield chat(text, f"{rng.choice(said['openings'])} {noted} {rng.choice(said['closings'])}")


def make_corpus(rng: random.Random, spec: Any, domain: Any, prompts: Iterable[str]) -> str:
    """Return the corpus, documents parted by an empty line, with every document left out that contains a prompt."""
    by_start: dict[tuple[str, ...], list[str]] = {}
    for prompt in prompts:
        by_start.setdefault(tuple(re.findall(r"\w+", prompt)[:3]), []).append(prompt)

    def contains_prompt(document: str) -> bool:
        text = normalise(document)
        words = re.findall(r"\w+", text)
        starts = {tuple(words[at : at + 3]) for at in range(len(words))}
        return any(prompt in text for start in starts for prompt in by_start.get(start, ()))

    documents = [d for d in dict.fromkeys(corpus_documents(rng, spec, domain)) if not contains_prompt(d)]
    rng.shuffle(documents)
    return "\n\n".join(documents) + "\n"


def assert_unseen(corpus: str, prompts: Iterable[str]) -> None:
    """Raise `AssertionError` if any prompt occurs in any document of the corpus, compared as normalised text."""
    text = "\0".join(normalise(document) for document in corpus.split("\n\n"))
    found = [prompt for prompt in prompts if prompt in text]
    assert not found, f"{len(found)} prompts of the data are in the corpus, the first: {found[0]!r}"


def generate() -> dict[str, bytes]:
    """Return the content of every file that this script writes, by its path under `data/`."""
    spec, domain = load("phrasings.yaml"), load("domain.yaml")
    check_templates(spec)
    files: dict[str, bytes] = {}
    flaws: dict[str, str] = {}
    taken: set[str] = set()
    prompts: set[str] = set()
    for which, (path, batch) in enumerate(BATCHES.items()):
        rows, of_batch = make_batch(random.Random(SEED + which), spec, batch, which, taken)
        flaws |= of_batch
        prompts |= {normalise(row["messages"][0]["content"]) for row in rows}
        files[path] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()

    prompts = (prompts | taken) - {""}
    corpus = make_corpus(random.Random(SEED + 100), spec, domain, prompts)
    assert_unseen(corpus, prompts)
    files["shipped/corpus.txt"] = corpus.encode()
    files["shipped/flaws.json"] = (json.dumps(flaws, indent=1) + "\n").encode()
    return files


def main() -> None:
    """Write every file, replacing what is there."""
    for path, content in generate().items():
        target = DATA / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        print(f"data/{path}: {len(content.splitlines())} lines, {len(content):,} bytes")


if __name__ == "__main__":
    main()
