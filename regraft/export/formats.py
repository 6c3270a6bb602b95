"""Other forms of a merged model: bitsandbytes checkpoints, GGUF, and the bare adapter in PEFT's own layout.

Each is a folder beside the merged weights, made from them, and measured like them after it was loaded from disk in a
fresh process. Weights in few bits can lose what the adapter learnt: the survival of the change is measured against the
base in the same bits.
"""

import logging
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.artifacts import commit_dir, read_json, verify_dir, write_json
from regraft.errors import RegraftError
from regraft.export.lora import CONFIG, WEIGHTS
from regraft.export.merge import change
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


def make_form(form: Form, merged: Path, plan: Plan, folder: Path) -> list[Survived]:
    """Make one form of a merged model as `folder`, unless it is there already; return what survived of the change.

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
            layers = requantized(plan, merged, _BITS[form])
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


def requantized(plan: Plan, merged: Path, quantization: Quantization) -> list[Survived]:
    """Measure what is left of each change once the merged weights were quantised again.

    The change that such weights really make is their difference from the base's own weights in the same bits: that is
    what the model would answer with, had it not been fine-tuned.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    modules = set(quantized_modules(plan, quantization))
    survival = Survival()
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(adapter.weights)) for adapter in plan.adapters]
        for step in plan.steps:
            if not step.terms or step.target.name.removesuffix(".weight") not in modules:
                continue
            with Reader(plan.base / step.file) as before, Reader(merged / step.file) as after:
                weight, sum_ = before.whole(step.source), after.whole(step.target.name)
            survival.begin(step)
            wanted = change(step, weight, readers)
            plain = _again(weight.to(sum_.dtype), quantization, plan.conv1d)
            survival.compare(wanted, _again(sum_, quantization, plan.conv1d).sub_(plain), weight.float())
    return survival.layers


def _again(weight: "torch.Tensor", quantization: Quantization, in_by_out: bool) -> "torch.Tensor":
    restored = round_trip(weight.t().contiguous() if in_by_out else weight, quantization).float()
    return restored.t().contiguous() if in_by_out else restored
