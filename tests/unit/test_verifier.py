"""The verifier is one file for an old Python, and its Ed25519 is that of the standard."""

import ast
import json
import sys
from pathlib import Path

import pytest

from service.features.proofs import verify
from service.features.proofs.api import VERIFY_PY
from tests.support.folders import ROOT

# The verifier may have so many lines.
LINES_MAX = 300
# Public key, message, signature, and whether it is valid: C2SP Wycheproof, testvectors_v1/ed25519_test.json.
VECTORS = json.loads((ROOT / "tests/support/ed25519_vectors.json").read_text("utf-8"))


def test_it_is_one_short_file_for_python_3_9() -> None:
    """It imports the standard library alone, and its syntax is that of Python 3.9."""
    text = VERIFY_PY.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES_MAX
    tree = ast.parse(text, feature_version=(3, 9))
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {str(name).partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_the_vectors_of_wycheproof() -> None:
    """It accepts every valid signature of the test vectors, and no other."""
    assert len(VECTORS) == 151
    for public, message, signature, is_valid in VECTORS:
        values = [bytes.fromhex(one) for one in (public, message, signature)]
        if is_valid:
            verify.require_signed(*values)
        else:
            with pytest.raises(ValueError, match="signature"):
                verify.require_signed(*values)


def test_it_is_called_wrongly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A missing file or a wrong key is wrong usage, not an invalid proof."""
    bundle = tmp_path / "bundle"
    bundle.write_text("{}", encoding="utf-8")
    key = ("--key", "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    for option in (("--since", str(tmp_path / "absent")), ("--against", str(tmp_path / "absent"))):
        assert verify.main([str(bundle), *key, *option]) == verify.USAGE
    assert "cannot verify" in capsys.readouterr().err
    for text in ("log+1+2", "no key", "", key[1][:-4], str(bundle)):
        with pytest.raises(SystemExit) as info:
            verify.main([str(bundle), "--key", text])
        assert info.value.code == verify.USAGE
        assert "is not a public key like NAME+ID+KEY" in capsys.readouterr().err
    with pytest.raises(SystemExit) as info:
        verify.main([str(bundle)])
    assert info.value.code == verify.USAGE
