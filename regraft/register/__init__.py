"""The model registry: `register` an adapter with its evidence, `promote` it, `roll back`, look versions up.

    from regraft.register.registry import register      one version for equal content, alias `challenger`
    from regraft.register.promote import promote, rollback    moves the alias `champion`, keeps the ledger
    from regraft.register.lookup import champion, version      milliseconds on a SQLite store, no mlflow import
    from regraft.register.fetch import fetch             adapter and reports, verified by digest

Importing the package loads nothing; mlflow is imported by the first call that needs it.
"""
