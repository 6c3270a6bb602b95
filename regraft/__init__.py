"""Regraft keeps fine-tuned language models fresh.

Each stage is one plain function from parameters and paths to a report: `regraft.validate`, `regraft.preprocess`,
`regraft.train`, `regraft.evaluate`, `regraft.register`, `regraft.export`. Importing this package does nothing.
"""
