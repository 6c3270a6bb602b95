"""The data contract: raw files in, accepted rows and quarantined rows out, judged by a Great Expectations suite."""
