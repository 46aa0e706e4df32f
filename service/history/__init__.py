"""The provable history: a Merkle tree over the log, signed, from which an outsider verifies a timeline offline.

``follower`` adds each event to the tree after its commit, ``signer`` signs it, and ``bundles`` makes the proofs
that ``verify.py`` and ``verify.html`` verify without the service. It may import the packages below
``service.api``. Start with ``docs/proof.md``, then read ``entries`` and ``follower``.
"""
