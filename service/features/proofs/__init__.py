"""Proofs: a signed Merkle tree over the log, from which an outsider verifies a timeline offline.

``follower`` adds each event to the tree after its commit, ``signer`` signs it, and ``bundles`` makes the proofs
that ``verify.py`` and ``verify.html`` verify without the service. Start with ``docs/proof.md``, then read
``entries`` and ``follower``.
"""

from typing import Final

from service.feature import Command, Feature, Option

FEATURE: Final = Feature(
    name="proofs",
    run="service.features.proofs.run:run",
    # It costs ingest a few percent, and needs two files that must be kept.
    is_default=False,
    settings="service.features.proofs.settings:ProofsSettings",
    commands=(
        Command(
            "proof",
            "Print the proof of an order's timeline, which 'verify' verifies.",
            "service.features.proofs.commands:proof",
        ),
        Command(
            "verify",
            "Verify the proof of an order's timeline, offline.",
            "service.features.proofs.commands:verify",
            works_always=True,
        ),
        Command(
            "history",
            "Print the history's key and checkpoint, and restart it after a loss.",
            "service.features.proofs.commands:history",
        ),
    ),
    options=(
        Option(
            "check", "history", "Compare every event with the history, not only the newest and some others."
        ),
        Option("restore", "new_history", "Begin a new history with a new key, and leave the signed one out."),
    ),
    problems="service.features.proofs.problems:HistoryProblem",
    use="SELECT 'there is a history' FROM public.history_trees LIMIT 1",
    while_off="nothing is added to it until the feature is on again, which then catches up",
    check="service.features.proofs.findings:check",
    restore="service.features.proofs.findings:find_part",
    files="service.features.proofs.findings:find_files",
)
