"""Prefect tasks: one a stage, with its retries, timeout, tags and artifacts; no logic of a stage."""
