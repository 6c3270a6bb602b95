"""Names, addresses and whatever else Presidio finds (extra `presidio`), in texts that stay on this machine.

Microsoft Presidio finds what a pattern can say (`US_SSN`, `MEDICAL_LICENSE`, ...) by itself, and names and places (`PERSON`,
`LOCATION`) by a spaCy model. Models are never fetched from here: one that is named and not installed is an error. Presidio's
recognizer of e-mail addresses, which asks the network for a list of suffixes, is left out: `validate.pii` finds them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from regraft.errors import MissingInput, ParamsError
from regraft.validate.text_params import Personal


@dataclass(frozen=True)
class Analyst:
    """Presidio with a spaCy model or without one."""

    engine: Any
    language: str
    entities: tuple[str, ...]
    score: float

    def finds(self, text: str) -> bool:
        """Say whether personal data is in a text."""
        return bool(self._spans(text))

    def mask(self, text: str) -> str:
        """Return a text with all that is found replaced by its kind."""
        end = len(text) + 1
        for start, stop, kind in sorted(self._spans(text), key=lambda span: (-span[1], span[0])):
            if stop <= end:
                text, end = f"{text[:start]}[{kind.lower()}]{text[stop:]}", start
            elif start < end:  # it overlaps one that was replaced: what is left of it goes, too
                text, end = f"{text[:start]}[{kind.lower()}]{text[end:]}", start
        return text

    def _spans(self, text: str) -> list[tuple[int, int, str]]:
        found = self.engine.analyze(
            text, language=self.language, entities=list(self.entities), score_threshold=self.score
        )
        return [(each.start, each.end, each.entity_type) for each in found]


def analyst(params: Personal) -> Analyst:
    """Return Presidio as section `validate.personal` asks for it; it is loaded once in a process.

    Raises:
        MissingInput: Presidio or the spaCy model is not installed.
        ParamsError: a kind is asked for that nothing here finds.
    """
    return _analyst(params.model, params.language, tuple(sorted(params.entities)), params.score)


@lru_cache(maxsize=1)
def _analyst(model: str | None, language: str, entities: tuple[str, ...], score: float) -> Analyst:
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ImportError as error:
        raise MissingInput(
            f"validate.personal needs the packages presidio-analyzer and spacy: {error}",
            fix="pip install 'regraft[presidio]'",
        ) from error
    for name in ("presidio-analyzer", "presidio_analyzer"):
        logging.getLogger(name).setLevel(logging.ERROR)  # a warning for each kind that nobody asked for

    pipeline = _pipeline(spacy, model, language)
    names = NerModelConfiguration()
    engine = SpacyNlpEngine([{"lang_code": language, "model_name": model or "blank"}], names)
    engine.nlp = {language: pipeline}  # its own `load` would fetch a model
    registry = RecognizerRegistry(supported_languages=[language])
    registry.load_predefined_recognizers(languages=[language], nlp_engine=engine)
    registry.remove_recognizer("EmailRecognizer", language)
    told = {kind for each in registry.recognizers for kind in each.supported_entities if each.name != "SpacyRecognizer"}
    mapped = names.model_to_presidio_entity_mapping
    by_model = {mapped[label] for labels in pipeline.pipe_labels.values() for label in labels if label in mapped}
    _check(entities, told, by_model, set(mapped.values()), model)
    if not by_model.intersection(entities):
        registry.remove_recognizer("SpacyRecognizer", language)
    return Analyst(
        AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=[language]), language, entities, score
    )


def _pipeline(spacy: Any, model: str | None, language: str) -> Any:
    if model is None:
        try:
            return spacy.blank(language)
        except ImportError as error:
            raise ParamsError(
                f"validate.personal.language is {language!r}; expected a language of spaCy's, such as en or de",
                fix="edit params.yaml",
            ) from error
    if not spacy.util.is_package(model):  # a folder may hold anything; what is installed was chosen
        raise MissingInput(
            f"validate.personal.model names the spaCy model {model}, which is not installed",
            fix=f"python -m spacy download {model}",
        )
    pipeline = spacy.load(model)
    if pipeline.lang != language:
        raise ParamsError(
            f"validate.personal.model {model} is for {pipeline.lang!r}, validate.personal.language is {language!r}: "
            "expected the same",
            fix="edit params.yaml",
        )
    return pipeline


def _check(wanted: Sequence[str], told: set[str], by_model: set[str], models: set[str], model: str | None) -> None:
    lacking = [kind for kind in wanted if kind not in told | by_model]
    named = ", ".join(lacking)
    if lacking and model is None and models.issuperset(lacking):
        raise ParamsError(
            f"validate.personal.entities has {named}, which take a spaCy model, and validate.personal.model is null",
            fix="python -m spacy download en_core_web_lg, and set `model: en_core_web_lg` (or another of spaCy's models)",
        )
    if lacking:
        raise ParamsError(
            f"validate.personal.entities has {named}, which nothing here finds; expected some of "
            f"{', '.join(sorted(told | by_model))} (e-mail addresses: validate.pii)",
            fix="edit params.yaml, or name another spaCy model at validate.personal.model",
        )
