"""The order of the tasks, where they run and what triggers them; `flows.cli` holds their commands."""
