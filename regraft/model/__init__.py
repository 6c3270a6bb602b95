"""The base model: pinned by digest, opened and loaded in one way by every stage, and the adapters that go on it."""
