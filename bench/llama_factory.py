"""LLaMA-Factory's preparation, for `bench/data.py --llamafactory PYTHON`; runs in an environment of its own.

    PYTHON bench/llama_factory.py TOKENIZER ROWS OUT      ROWS is a JSON Lines file of {"messages": [...]}

What its trainer does before the first step: load, render by its ChatML template, tokenise, mask and pack
(`neat_packing`, so that documents do not see each other), on two processes, and save (`tokenized_path`).
"""

import json
import os
import sys
import time
from pathlib import Path

SETTINGS = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "rows",
    "template": "chatml",
    "cutoff_len": 512,
    "packing": True,
    "neat_packing": True,
    "preprocessing_num_workers": 2,
    "preprocessing_batch_size": 2_000,
    "overwrite_cache": True,
    "report_to": "none",
}
COLUMNS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def main() -> None:
    """Prepare, and print the seconds that it took without its imports."""
    tokenizer, rows, out = (Path(each).absolute() for each in sys.argv[1:])
    os.environ |= {
        "DISABLE_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(out.with_name("llamafactory-home")),
    }
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from transformers import AutoTokenizer

    described = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": COLUMNS}
    (rows.parent / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": rows.name, **described}}))
    began = time.monotonic()
    settings = {"model_name_or_path": str(tokenizer), "dataset_dir": str(rows.parent), "output_dir": str(out / "model")}
    model, data, training, _, _ = get_train_args({**SETTINGS, **settings, "tokenized_path": str(out / "tokenized")})
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    template = get_template_and_fix_tokenizer(loaded, data)
    found = get_dataset(template, model, data, training, stage="sft", tokenizer=loaded)
    print("own", time.monotonic() - began)
    print(len(found["train_dataset"]), "blocks")


if __name__ == "__main__":
    main()
