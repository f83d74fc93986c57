"""The chains behind `cupel scan` and `cupel purify`."""

from cupel.vet.chain import Vetted, purify_encoder, reference_for, scan_encoder, scan_evidence

__all__ = ["Vetted", "purify_encoder", "reference_for", "scan_encoder", "scan_evidence"]
