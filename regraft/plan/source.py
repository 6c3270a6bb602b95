"""Where a plan's inputs lie: the model's shapes, the length of a block, the share of trained tokens."""

from pathlib import Path

from regraft.artifacts import read_json
from regraft.errors import DamagedArtifact, MissingInput, RegraftError
from regraft.layout import Layout
from regraft.model.params import STANDIN, ModelParams
from regraft.model.pin import WEIGHTS, hub_folder
from regraft.plan.architecture import Architecture, architecture, read_architecture


def shapes_of(model: ModelParams, layout: Layout) -> Architecture:
    """Return the shapes of the clone's base model, whether or not the stage `model` has run.

    Raises:
        MissingInput: neither the stage's output nor the model's folder is there.
        ParamsError: its family is not known to the plan.
    """
    if model.base == STANDIN:
        p = model.standin
        return architecture(
            {
                "model_type": "llama",
                "vocab_size": p.vocabulary,
                "hidden_size": p.hidden_size,
                "intermediate_size": p.intermediate_size,
                "num_hidden_layers": p.layers,
                "num_attention_heads": p.heads,
                "num_key_value_heads": p.kv_heads,
                "tie_word_embeddings": True,
                "max_position_embeddings": p.context_length,
            }
        )
    folder = Path(model.base)
    if (layout.stage("model") / WEIGHTS / "config.json").is_file():
        folder = layout.stage("model") / WEIGHTS
    elif not folder.is_dir():
        try:
            folder = hub_folder(model.base, model.revision, offline=True)
        except RegraftError as error:
            raise MissingInput(
                f"the shapes of {model.base} are not here: {error.message}",
                fix="name its config.json with --model, or run `regraft model` first",
            ) from error
    return read_architecture(folder)


def blocks_of(layout: Layout, max_length: int, block_length: int | None) -> tuple[int, float]:
    """Return the tokens of a packed block and the share of them that is trained.

    From what `preprocess` made, where it has run with the same lengths; else from the parameters, with all trained.
    """
    asked, made = block_length or max_length, made_blocks(layout)
    return made if made is not None and made[0] <= asked <= 2 * made[0] else (asked, 1.0)


def made_blocks(layout: Layout) -> tuple[int, float] | None:
    """Return the longest block that `preprocess` made and the share of tokens that is trained; None before it ran."""
    try:
        report = read_json(layout.stage("preprocess") / "report.json")
        supervision = report["supervision"]
        return int(report["longest_block"]), min(1.0, supervision["trained_tokens"] / max(1, supervision["tokens"]))
    except (MissingInput, DamagedArtifact, KeyError, TypeError):
        return None
