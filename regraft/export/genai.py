"""An ONNX folder measured by onnxruntime-genai, which will serve it: token ids, distributions and greedy answers.

Distributions and answers are those of its own generator with its own key-value cache, and an answer ends where
`genai_config.json` says: what a user of the folder gets, not what its graph would give to another program.
"""

import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.errors import DamagedArtifact, MissingInput

if TYPE_CHECKING:
    import torch

    from regraft.evaluate.answers import Answer
    from regraft.evaluate.holdout import HeldOutRow
    from regraft.evaluate.params import EvaluateParams

MODEL = "model.onnx"
CONFIG = "genai_config.json"
PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxruntime-genai")
_FIX = "leave the onnx forms out of export.forms"
_IGNORED = -100
_NEUTRAL = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0}


def runtime() -> Any:
    """Import onnxruntime-genai, its telemetry switched off: else it writes a device's id at home and reports what it loads.

    The variable is read when the library's first object is made, in onnxruntime as well.

    Raises:
        MissingInput: it, or another package of the extra `onnx`, is not installed.
    """
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    for name in ("onnx", "onnx_ir", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise _missing(name)
    try:
        return importlib.import_module("onnxruntime_genai")
    except ImportError as error:
        raise _missing("onnxruntime-genai") from error


class Genai:
    """One ONNX folder, loaded by onnxruntime-genai on the CPU."""

    def __init__(self, folder: Path, params: "EvaluateParams") -> None:
        self._genai = runtime()
        config = self._genai.Config(str(folder))
        if params.threads is not None:
            session = {"intra_op_num_threads": params.threads}
            config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = self._genai.Model(config)
        self._tokenizer = self._genai.Tokenizer(self._model)

    def log_probabilities(
        self, rows: "Sequence[HeldOutRow]", params: "EvaluateParams"
    ) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
        """Like `regraft.export.parity.log_probabilities`, in the same order."""
        import torch

        from regraft.export.parity import batches

        for batch in batches(rows, params):
            for row in batch:
                if places := _places(row):
                    scores = self._scores(row.input_ids)[places]
                    yield torch.log_softmax(scores, dim=-1), torch.tensor([row.labels[at + 1] for at in places])

    def answers(self, rows: "Sequence[HeldOutRow]", tokenizer: Any, params: "EvaluateParams") -> "list[Answer]":
        """Greedy answers, graded as the evaluation grades; losses are those of the answers' tokens."""
        import torch

        from regraft.evaluate.answers import graded

        found = []
        for row in rows:
            loss, places = 0.0, _places(row)
            if places:
                chances = torch.log_softmax(self._scores(row.input_ids)[places], dim=-1)
                targets = torch.tensor([row.labels[at + 1] for at in places])
                loss = -float(chances.gather(1, targets[:, None]).double().sum())
            ids, stopped = self._generate(row.prompt_ids, params.max_new_tokens)
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            found.append(
                graded(row, text, loss=loss, tokens=len(places), stopped=stopped, json_answers=params.json_answers)
            )
        return found

    def check_tokens(self, rows: "Sequence[HeldOutRow]", tokenizer: Any) -> int:
        """Split every rendered prompt with onnxruntime-genai and return how many were compared.

        A prompt whose own text does not give its ids back (text that looks like a special token) is left out, and so is
        one with a NUL, at which onnxruntime-genai ends a text.

        Raises:
            DamagedArtifact: a prompt is split otherwise, or none could be compared.
        """
        from regraft.export.tokens import texts_of

        compared, wrong = 0, []
        for row in rows:
            ids = list(row.prompt_ids)
            texts = [text for text in texts_of(tokenizer, ids) if "\0" not in text]
            compared += bool(texts)
            if texts and ids not in [self._tokenizer.encode(text).tolist() for text in texts]:
                wrong.append(row.row_id)
        if wrong or not compared:
            raise DamagedArtifact(
                f"onnxruntime-genai splits {len(wrong)} of {compared} prompts otherwise, first {wrong[:1]}"
            )
        return compared

    def _generator(self, ids: Sequence[int], more: int) -> Any:
        import numpy as np

        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(**_NEUTRAL, max_length=len(ids) + more)
        generator = self._genai.Generator(self._model, settings)
        generator.append_tokens(np.array([ids], dtype=np.int32))
        return generator

    def _scores(self, ids: Sequence[int]) -> "torch.Tensor":
        """Return the logits behind each token (`tokens x vocabulary`, float32)."""
        import numpy as np
        import torch

        found = np.array(self._generator(ids, 1).get_output("logits"), dtype=np.float32)
        if found.shape[:2] != (1, len(ids)):
            raise DamagedArtifact(f"{MODEL} gives logits of shape {found.shape} for {len(ids)} tokens")
        return torch.from_numpy(found[0])

    def _generate(self, prompt: Sequence[int], most: int) -> tuple[list[int], bool]:
        """Return the answer's tokens, and whether the generator ended it by a stop token, which is left out."""
        stop = set(map(int, self._tokenizer.eos_token_ids))
        generator = self._generator(prompt, most)
        ids: list[int] = []
        while len(ids) < most:
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in stop and generator.is_done():
                return ids, True
            ids.append(token)
        return ids, False


def splitting(folder: Path) -> tuple[Callable[[str], list[int]], Callable[[str], str]]:
    """Return a function that splits text by a folder's tokenizer, and one that renders what a user says; no weights are loaded.

    Raises:
        DamagedArtifact: onnxruntime-genai cannot read the tokenizer; later, that it cannot render the template.
    """
    try:
        tokenizer: Any = runtime().Tokenizer(str(folder))
    except RuntimeError as error:
        raise DamagedArtifact(f"onnxruntime-genai cannot read the tokenizer: {error}", fix=_FIX) from error

    def render(content: str) -> str:
        talk = json.dumps([{"role": "user", "content": content}])
        try:
            return str(tokenizer.apply_chat_template(talk, add_generation_prompt=True))
        except RuntimeError as error:
            raise DamagedArtifact(f"onnxruntime-genai cannot render the chat template: {error}", fix=_FIX) from error

    return lambda text: tokenizer.encode(text).tolist(), render


def _places(row: "HeldOutRow") -> list[int]:
    """Positions that predict a trained token."""
    return [at for at in range(len(row.input_ids) - 1) if row.labels[at + 1] != _IGNORED]


def _missing(package: str) -> MissingInput:
    return MissingInput(
        f"the package {package} is not installed",
        fix=f"pip install 'regraft[onnx]', or {_FIX}",
    )
