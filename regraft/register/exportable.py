"""Whether a version may be given to others: it was judged, and learnt nothing that is to be forgotten."""

from regraft.errors import GateRefused
from regraft.layout import Layout
from regraft.register import lookup
from regraft.register.clean import taint
from regraft.register.params import RegisterParams
from regraft.register.promote import judged
from regraft.register.version import Version, was_champion


def check_exportable(params: RegisterParams, layout: Layout, version: Version, *, remembering: bool = False) -> None:
    """Check that a version may be given to others: the ledger has it as a champion, or its last verdict passed.

    Args:
        params: the section `register`.
        layout: the clone.
        version: what is to be exported or published.
        remembering: somebody said that it may be given away although it was trained on rows that are to be forgotten.

    Raises:
        GateRefused: neither; the message says what the verdict has against it. Or it was trained on what is to be forgotten.
        ServiceUnavailable: MLflow does not answer.
    """
    if not remembering:
        why = taint(version, lookup.versions(params, layout), layout, by_list=False)
        if why is not None:
            raise GateRefused(
                f"{version.label()} cannot be exported: it {why}",
                fix="`regraft retrain` makes a version without them; --remembering gives this one away all the same",
            )
    if was_champion(lookup.ledger(params, layout), version):
        return
    _, problems = judged(version)
    if problems:
        raise GateRefused(
            f"{version.label()} cannot be exported: it never was the champion, and " + "; ".join(problems),
            fix="`regraft retrain` judges the challenger again; `regraft export` exports the champion",
        )


def check_publishable(params: RegisterParams, layout: Layout, identity: str, *, remembering: bool = False) -> None:
    """Check that no version of an identity in this clone's registry was trained on rows that are to be forgotten.

    An export of a version that the registry does not have is not judged.

    Raises:
        GateRefused: one was, and nobody said that it may be given away.
        ServiceUnavailable: MLflow does not answer.
    """
    known = [] if remembering else lookup.versions(params, layout)
    for version in known:
        why = taint(version, known, layout, by_list=False) if version.identity == identity else None
        if why is not None:
            raise GateRefused(
                f"the export is of {version.label()}, which {why}",
                fix="`regraft retrain` makes a version without them; --remembering publishes this one all the same",
            )
