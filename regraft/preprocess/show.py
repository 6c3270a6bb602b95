"""The first rows of each file as the stages understand them: layout, verdict, and the text with what is learned in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

from regraft.chat import Chat, Supervise, last_answer
from regraft.errors import DataError
from regraft.messages import TEXT, is_text, words
from regraft.validate.forgotten import FORGET, load
from regraft.validate.layouts import detect
from regraft.validate.look import masker
from regraft.validate.mapping import Row
from regraft.validate.measures import measure
from regraft.validate.params import DataParams, Reason, ValidateParams
from regraft.validate.quarantine import mask_start, masked
from regraft.validate.source import Opened, find_files, read_rows
from regraft.validate.sources import mappings

Learned = Supervise | Literal["all"]
Hide = Callable[[str], str]
_ROLES = ("system", "user", "assistant", "tool", TEXT)
_JSON = ("tool_calls", "tools")


@dataclass(frozen=True)
class Shown:
    """One row."""

    place: str
    layout: str
    reasons: Sequence[str]
    """Why it would be quarantined; empty for one that would be accepted."""
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    """Rendered text, cut where learning begins and ends; True is learned. What
    `validate.pii` knows is masked, and what Presidio finds where `validate.personal` asks for it."""
    tokens: int = 0
    learned: int = 0
    problem: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return asdict(self)


def show_rows(
    data: DataParams, params: ValidateParams, *, root: Path, count: int, chat: Chat | None, supervise: Learned
) -> list[Shown]:
    """Return the first `count` rows of each file; of a pair each answer by itself, its own tokens learned.

    Args:
        data: where rows are and how they are read.
        params: what they must fulfil.
        root: the clone.
        count: rows of each file.
        chat: how the base model renders; None shows the turns as they are, with no tokens.
        supervise: what is learned.

    Raises:
        DataError, ParamsError: as `validate` raises them for files and columns.
        MissingInput: Presidio or its model is asked for and not installed.
    """
    files, _ = find_files(data.raw, root)
    longest = 65_536 + 6 * params.max_bytes
    read_as = mappings(data, params, files, root, longest)
    forgotten = load(root / FORGET, data.forget)
    hide = masker(params)
    found = []
    for file in files:
        batch = list(islice(read_rows(file, longest, Opened()), count))
        mapping = read_as[file.name]
        rows, measured = measure(batch, mapping)
        for i, (raw, row) in enumerate(zip(batch, rows, strict=True)):
            reasons = [
                each.value for each in Reason if each.value in measured.column_names and measured[each.value][i].as_py()
            ]
            if forgotten is not None and row is not None and forgotten.holds(row.messages, row.id, row.rejected):
                found.append(Shown(f"{file.name}:{raw.line}", mapping.data.layout, ["forgotten"]))
                continue
            layout = mapping.data.layout
            if layout == "auto" and raw.record is not None and (told := detect(raw.record, raw.record)) is not None:
                layout = told[0]
            place = f"{file.name}:{raw.line}"
            # Presidio takes no text of any length, and nobody knows what is at a cut.
            cut = params.personal is not None and Reason.OVER_LONG in reasons
            own = partial(mask_start, hide=hide) if cut else hide
            named = f"{layout} (source {mapping.source})" if mapping.source is not None else layout
            if row is None or not row.is_preference:
                found.append(_shown(place, named, reasons, row, chat, supervise, own))
                continue
            kind = "preferred" if row.rejected is not None else "wanted" if row.wanted else "not wanted"
            found.append(_shown(place, f"{named}, {kind}", reasons, row, chat, "last", own))
            if row.rejected is not None:
                answer = {"role": "assistant", "content": row.rejected}
                other = replace(row, messages=[*row.messages[:-1], answer], rejected=None)
                found.append(_shown(place, f"{named}, rejected", reasons, other, chat, "last", own))
    return found


def _shown(
    place: str,
    layout: str,
    reasons: Sequence[str],
    row: Row | None,
    chat: Chat | None,
    supervise: Learned,
    hide: Hide,
) -> Shown:
    if row is None:
        return Shown(place, layout, reasons)
    messages = [_hidden(each, hide) for each in row.messages]
    plain = [(f"{each['role']}: {words(each)}\n", each["role"] in ("assistant", TEXT)) for each in messages]
    if chat is None or (last_answer(messages) is None and not is_text(messages)):
        return Shown(place, layout, reasons, plain)
    try:
        rendered = chat.encode([messages], "assistant" if supervise == "all" else supervise, [place])[0]
    except DataError as error:
        return Shown(place, layout, reasons, plain, problem=error.message)
    all_of_it = supervise == "all" or is_text(messages)
    learned_spans = [(1, rendered.answers[-1][1])] if all_of_it else rendered.answers
    cuts = [0, *(at for span in learned_spans for at in span), len(rendered.input_ids)]
    texts = chat.sealed.decode([rendered.input_ids[low:high] for low, high in pairwise(cuts)])
    pieces = [(chat.sealed.unseal(text), i % 2 == 1) for i, text in enumerate(texts) if text]
    learned = sum(end - start for start, end in learned_spans)
    return Shown(place, layout, reasons, pieces, len(rendered.input_ids), learned)


def _hidden(message: Mapping[str, str], hide: Hide) -> dict[str, str]:
    """Return a message without personal data; what is JSON in it is masked value by value, so that it stays JSON."""
    made = {}
    for name, given in message.items():
        text = given.encode(errors="replace").decode()
        if name in _JSON:
            try:
                made[name] = json.dumps(masked(json.loads(text), hide), ensure_ascii=False)
            except RecursionError:  # nested as deep as the parser goes: not shown
                made[name] = "[]"
        else:
            made[name] = text if name == "role" and text in _ROLES else hide(text)
    return made
