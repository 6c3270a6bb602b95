"""Flows: the order of tasks, where they run, what triggers them, and their commands for the CLI."""
