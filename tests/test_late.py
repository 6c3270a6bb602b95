"""A parameter that was added later changes no digest of what was made before it."""

from regraft.model.params import ModelParams, Quantization
from regraft.train.params import TrainParams


def test_a_late_parameter_is_dumped_only_where_it_was_changed() -> None:
    assert "logits_chunk" not in TrainParams(max_steps=1).model_dump(mode="json")
    assert TrainParams(max_steps=1, logits_chunk=64).model_dump(mode="json")["logits_chunk"] == 64
    assert "unquantized" not in ModelParams().model_dump(mode="json")["quantization"]
    changed = ModelParams(quantization=Quantization(unquantized="fp32"))
    assert changed.model_dump(mode="json")["quantization"]["unquantized"] == "fp32"
    assert ModelParams.model_validate(changed.model_dump()) == changed


def test_the_parameters_that_were_there_first_are_dumped_always() -> None:
    assert set(TrainParams.model_fields) - set(TrainParams(max_steps=1).model_dump()) == TrainParams.LATE
    assert set(Quantization.model_fields) - set(Quantization().model_dump()) == Quantization.LATE
