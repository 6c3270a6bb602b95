"""Other forms of a merged model: bitsandbytes checkpoints, GGUF, ONNX, and the bare adapter in PEFT's own layout.

Each is a folder beside the merged weights, made from them, and measured like them after it was loaded from disk in a
fresh process. Weights in few bits can lose what the adapter learnt: the survival of the change is measured against the
base in the same bits.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import commit_dir, read_json, verify_dir, write_json
from regraft.errors import RegraftError
from regraft.export.lora import CONFIG, WEIGHTS
from regraft.export.merge import Weights, change
from regraft.export.params import Form
from regraft.export.plan import Plan
from regraft.export.sources import quantized_modules, round_trip
from regraft.export.survival import Survival, Survived
from regraft.export.tensors import Reader
from regraft.failpoints import failpoint
from regraft.model.check import TOKENIZER
from regraft.model.params import Quantization
from regraft.model.pin import TOKENIZER_FILES

if TYPE_CHECKING:
    import torch

_BITS: dict[str, Quantization] = {"nf4": Quantization(bits=4), "int8": Quantization(bits=8)}


def check_forms(forms: Sequence[Form], base: Path, tokenizer: Path) -> None:
    """Refuse forms that a base cannot have, before it is merged; those that are not looked at here, `make_form` refuses.

    Args:
        forms: what is asked for.
        base: the base model's folder.
        tokenizer: folder of the tokenizer that the merged model gets.

    Raises:
        ParamsError: its architecture or tokenizer has no such form.
        DamagedArtifact: what will serve the form reads the tokenizer otherwise than transformers.
        MissingInput: a package of an extra is not installed.
    """
    if any(form.startswith("onnx") for form in forms):
        from regraft.export.onnx import check_onnx

        check_onnx(base, tokenizer)


def make_form(
    form: Form, merged: Path, plan: Plan, folder: Path, *, weights: Weights = Reader.blocks
) -> list[Survived]:
    """Make one form of a merged model as `folder`, unless it is there already; return what survived of the change.

    Args:
        form: which.
        merged: folder of the merged weights.
        plan: how they were merged.
        folder: is made; what survived lies beside it.
        weights: the base's weights that they were merged into.

    Raises:
        ParamsError: this architecture or tokenizer has no such form.
        MissingInput: a package of an extra is not installed.
    """
    beside = folder.with_name(f"{folder.name}.survival.json")
    try:
        verify_dir(folder)
        return [Survived.model_validate(each) for each in read_json(beside)]
    except RegraftError:
        pass
    layers: list[Survived] = []
    with commit_dir(folder) as temporary:
        if form == "adapter":
            own = plan.adapters[0].folder
            for name in (CONFIG, WEIGHTS):
                shutil.copyfile(own / name, temporary / name)
            if (own / TOKENIZER[0]).is_file():  # tokens that the base lacks
                for name in TOKENIZER:
                    if (merged / name).is_file():
                        shutil.copyfile(merged / name, temporary / name)
        elif form in _BITS:
            _bitsandbytes(_BITS[form], merged, temporary)
            layers = requantized(plan, merged, _BITS[form], weights=weights)
        elif form.startswith("onnx"):
            from regraft.export.onnx import write_onnx

            write_onnx(merged, temporary, form)
            layers = _in_blocks(plan, merged, form, weights)
        else:
            from regraft.export.gguf import write_gguf

            write_gguf(merged, temporary, form)
        write_json(beside, [each.model_dump() for each in layers])
    failpoint("export.form")
    return layers


def _bitsandbytes(quantization: Quantization, merged: Path, out: Path) -> None:
    """Write a checkpoint that `from_pretrained` loads as it is. The model is in memory whole, once."""
    import torch

    from regraft.model.load import device, quiet_libraries

    quiet_libraries()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings: dict[str, Any] = {"load_in_8bit": True}
    if quantization.bits == 4:
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": quantization.type}
        settings |= {"bnb_4bit_use_double_quant": quantization.double_quant, "bnb_4bit_compute_dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(
        merged,
        dtype="auto",
        quantization_config=BitsAndBytesConfig(**settings),
        device_map={"": device()},
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    model.save_pretrained(out)
    for path in sorted({path for pattern in TOKENIZER_FILES for path in merged.glob(pattern)}):
        target = out / path.relative_to(merged)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def requantized(
    plan: Plan, merged: Path, quantization: Quantization, *, weights: Weights = Reader.blocks
) -> list[Survived]:
    """Measure what is left of each change once the merged weights were quantised again.

    The change that such weights really make is their difference from the base's weights in the same bits: that is what
    the model would answer with, had it not been fine-tuned. They are those that were merged into: the original ones are
    ten changes of 1 % away from those that came back from 4 bits, and the difference would be no change's.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    modules = set(quantized_modules(plan, quantization))
    return _survival(plan, merged, modules, weights, lambda weight: _again(weight, quantization, plan.conv1d))


def _in_blocks(plan: Plan, merged: Path, form: Form, weights: Weights) -> list[Survived]:
    """Measure the same for an ONNX form of few bits; none is lost in float32."""
    from regraft.export.onnx import BITS, quantized_linears, round_trip

    if BITS[form] == 32:
        return []
    return _survival(plan, merged, quantized_linears(plan), weights, lambda weight: round_trip(weight, BITS[form]))


def _survival(
    plan: Plan,
    merged: Path,
    modules: set[str],
    weights: Weights,
    again: "Callable[[torch.Tensor], torch.Tensor]",
) -> list[Survived]:
    import torch

    survival = Survival()
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(adapter.weights)) for adapter in plan.adapters]
        for step in plan.steps:
            if not step.terms or step.target.name.removesuffix(".weight") not in modules:
                continue
            with Reader(plan.base / step.file) as before, Reader(merged / step.file) as after:
                weight = torch.cat([block.clone() for _, block in weights(before, step.source)])
                sum_ = after.whole(step.target.name)
            survival.begin(step)
            wanted = change(step, weight, readers)
            survival.compare(wanted, again(sum_).sub_(again(weight.to(sum_.dtype))), weight.float())
    return survival.layers


def _again(weight: "torch.Tensor", quantization: Quantization, in_by_out: bool) -> "torch.Tensor":
    restored = round_trip(weight.t().contiguous() if in_by_out else weight, quantization).float()
    return restored.t().contiguous() if in_by_out else restored
