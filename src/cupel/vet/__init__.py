"""The chains behind `cupel scan` and `cupel purify`."""

from cupel.vet.chain import (
    Vetted,
    default_chain,
    evidence_arrays,
    purify_encoder,
    reference_for,
    scan_encoder,
    scan_evidence,
    scanner_label,
    together,
)
from cupel.vet.gates import junit, sarif
from cupel.vet.spoken import spoken

__all__ = [
    "Vetted",
    "default_chain",
    "evidence_arrays",
    "junit",
    "purify_encoder",
    "reference_for",
    "sarif",
    "scan_encoder",
    "scan_evidence",
    "scanner_label",
    "spoken",
    "together",
]
