"""From accepted rows to token blocks for training and a holdout for evaluation: `preprocess.preprocess`."""
