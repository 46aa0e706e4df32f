"""UUIDs never occur twice, even in a process that was forked."""

import subprocess
import sys
from uuid import UUID

from service.uuids import UUIDS_PER_READ, make_uuid
from tests.support.folders import ROOT

# Not in this process, whose threads a fork would not copy.
FORKED = """
import os
from service.uuids import make_uuid
make_uuid()
child = os.fork()
for _ in range(100):
    os.write(1, make_uuid().encode() + b"\\n")
if child:
    os.waitpid(child, 0)
"""


def test_each_is_a_new_uuid() -> None:
    """Each is a UUID of version 4 in its usual form, over several reads of randomness."""
    ids = [make_uuid() for _ in range(3 * UUIDS_PER_READ)]
    assert len(set(ids)) == len(ids)
    for one in ids:
        uuid = UUID(one)
        assert str(uuid) == one
        assert (uuid.version, uuid.variant) == (4, "specified in RFC 4122")


def test_a_forked_process_makes_other_uuids() -> None:
    """A process that is forked with randomness in memory does not use it."""
    ran = subprocess.run([sys.executable, "-c", FORKED], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(set(ran.stdout.split())) == 200
