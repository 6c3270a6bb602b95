"""All sections of `params.yaml` together, for commands and flows (a stage reads only its own)."""

from pydantic import ConfigDict, Field

from regraft.evaluate.params import EvaluateParams
from regraft.export.params import ExportParams
from regraft.gates.params import GatesParams
from regraft.layout import Layout
from regraft.model.params import ModelParams
from regraft.params import Section, load_sections
from regraft.preprocess.params import PreprocessParams
from regraft.register.params import PromoteParams, RegisterParams
from regraft.retrain_params import RetrainParams
from regraft.train.params import TrainParams
from regraft.validate.params import ClonedDataParams, ValidateParams


class Settings(Section):
    """Every section of `params.yaml`; an unknown one is a mistake."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_by_name=True)

    data: ClonedDataParams
    model: ModelParams
    validate_: ValidateParams = Field(alias="validate")
    preprocess: PreprocessParams
    train: TrainParams
    evaluate: EvaluateParams
    gates: GatesParams
    register_: RegisterParams = Field(alias="register")
    promote: PromoteParams
    export: ExportParams
    retrain: RetrainParams


def load(layout: Layout) -> Settings:
    """Read `params.yaml`.

    Raises:
        ParamsError: with every mistake in the file.
    """
    return load_sections(layout.params, Settings, only=False)
