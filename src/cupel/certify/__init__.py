"""Certifiers: classifiers on an encoder that answer the same whatever one patch shows."""

from collections.abc import Mapping

from cupel.certify.certificate import Certificate, MaskedClassifier, certified_accuracy, measure
from cupel.certify.mask_ds import MaskDS
from cupel.certify.patchguard import PatchGuard
from cupel.settings import registry

__all__ = ["CERTIFIERS", "Certificate", "MaskDS", "MaskedClassifier", "PatchGuard", "certified_accuracy", "measure"]

CERTIFIERS: Mapping[str, type] = registry("certifiers", {"patchguard": PatchGuard, "mask_ds": MaskDS})
