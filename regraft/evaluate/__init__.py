"""Scoring adapters on the holdout: loss and greedy answers of the base and of each adapter, every answer kept."""
