"""A GGUF file measured by llama.cpp, which will serve it: token ids, distributions and greedy answers.

Only llama.cpp itself can say whether it reads a file as it was meant: a file that another reader understands can still
be gibberish to it. So without `llama-cpp-python` a GGUF form is refused.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regraft.errors import DamagedArtifact, MissingInput
from regraft.evaluate.answers import Answer, graded
from regraft.evaluate.holdout import HeldOutRow
from regraft.evaluate.params import EvaluateParams
from regraft.export.gguf import MODEL
from regraft.export.parity import batches
from regraft.export.sentencepiece import TEMPLATE_SPACE
from regraft.export.tokens import texts_of

_IGNORED = -100


class LlamaCpp:
    """One GGUF file, loaded by llama.cpp on the CPU."""

    def __init__(self, folder: Path, rows: Sequence[HeldOutRow], params: EvaluateParams) -> None:
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise MissingInput(
                "llama-cpp-python is not installed, so nothing can say how llama.cpp reads a GGUF file",
                fix="make llama-cpp (it compiles for minutes), or leave the gguf forms out",
            ) from error
        longest = max(max(len(row.input_ids), len(row.prompt_ids) + params.max_new_tokens) for row in rows)
        self._model: Any = Llama(
            str(folder / MODEL),
            n_ctx=longest + 1,
            n_batch=512,
            logits_all=True,
            n_gpu_layers=0,
            type_k=0,  # float32 (GGML_TYPE_F32): the file is judged, not the rounding of a key-value cache
            type_v=0,
            n_threads=params.threads,
            seed=0,
            verbose=False,
        )

    def log_probabilities(
        self, rows: Sequence[HeldOutRow], params: EvaluateParams
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Like `regraft.export.parity.log_probabilities`, in the same order."""
        for batch in batches(rows, params):
            for row in batch:
                places = [at for at in range(len(row.input_ids) - 1) if row.labels[at + 1] != _IGNORED]
                scores = torch.from_numpy(np.array(self._scores(row.input_ids)[places], dtype=np.float32))
                targets = torch.tensor([row.labels[at + 1] for at in places])
                if places:
                    yield torch.log_softmax(scores, dim=-1), targets

    def answers(
        self, rows: Sequence[HeldOutRow], tokenizer: Any, stop: frozenset[int], params: EvaluateParams
    ) -> list[Answer]:
        """Greedy answers, graded as the evaluation grades; losses are those of the answers' tokens."""
        found = []
        for row in rows:
            places = [at for at in range(len(row.input_ids) - 1) if row.labels[at + 1] != _IGNORED]
            chances = torch.log_softmax(torch.from_numpy(np.array(self._scores(row.input_ids)[places])), dim=-1)
            targets = torch.tensor([row.labels[at + 1] for at in places], dtype=torch.long)
            loss = -float(chances.gather(1, targets[:, None]).double().sum()) if places else 0.0
            ids, stopped = self._generate(row.prompt_ids, stop, params.max_new_tokens)
            text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            found.append(
                graded(row, text, loss=loss, tokens=len(places), stopped=stopped, json_answers=params.json_answers)
            )
        return found

    def check_tokens(self, rows: Sequence[HeldOutRow], tokenizer: Any) -> int:
        """Tokenise every rendered prompt with llama.cpp and return how many were compared.

        A prompt whose own text does not give its ids back (text that looks like a special token) is left out. Where the
        file's template writes a space before every conversation (`regraft.export.sentencepiece`), so is one written here.

        Raises:
            DamagedArtifact: llama.cpp splits a prompt otherwise.
        """
        compared, wrong = 0, []
        template = self._model.metadata.get("tokenizer.chat_template", "")
        lead = " " if template.startswith(TEMPLATE_SPACE) else ""
        for row in rows:
            ids = list(row.prompt_ids)
            texts = texts_of(tokenizer, ids)
            compared += bool(texts)
            found = [self._model.tokenize((lead + text).encode(), add_bos=False, special=True) for text in texts]
            if texts and ids not in found:
                wrong.append(row.row_id)
        if wrong or not compared:
            raise DamagedArtifact(
                f"llama.cpp tokenises {len(wrong)} of {compared} prompts otherwise, first {wrong[:1]}"
            )
        return compared

    def _scores(self, ids: Sequence[int]) -> Any:
        self._model.reset()
        self._model.eval(list(ids))
        return self._model.scores[: len(ids)]

    def _generate(self, prompt: Sequence[int], stop: frozenset[int], most: int) -> tuple[list[int], bool]:
        scores = self._scores(prompt)[-1]
        ids: list[int] = []
        for _ in range(most):
            token = int(scores.argmax())
            if token in stop:
                return ids, True
            ids.append(token)
            self._model.eval([token])
            scores = self._model.scores[self._model.n_tokens - 1]
        return ids, False


@contextmanager
def splitting(file: Path) -> Iterator[Callable[[str], list[int]]]:
    """Give a function that splits text into ids by a GGUF file's tokenizer, special tokens included; no weights are loaded."""
    from llama_cpp import Llama

    with redirect_stderr(io.StringIO()):  # it warns of a context that is longer than nothing
        model: Any = Llama(str(file), vocab_only=True, verbose=False)
    with closing(model):
        yield lambda text: list(model.tokenize(text.encode(), add_bos=False, special=True))
