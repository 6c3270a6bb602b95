"""Planning memory before a GPU is taken: from a model's `config.json` and the parameters, without weights or torch."""
