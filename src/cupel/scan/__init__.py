"""Scanners: is there a backdoor in this encoder? Filters: which images of a training set are poisoned?"""

from collections.abc import Mapping

from cupel.scan.decree import Decree
from cupel.scan.forensics import Forensics
from cupel.scan.indicators import Indicators
from cupel.scan.mntd import MNTD
from cupel.scan.mntd_encoder import MNTDEncoder
from cupel.scan.mntd_reference import MetaReference, read_meta_reference
from cupel.scan.neural_cleanse import NeuralCleanse
from cupel.scan.patchsearch import PatchSearch
from cupel.scan.pscan import PScan
from cupel.scan.reference import read_reference, shipped_reference
from cupel.scan.ssl_cleanse import SSLCleanse
from cupel.settings import registry

__all__ = [
    "FILTERS",
    "MNTD",
    "SCANNERS",
    "Decree",
    "Forensics",
    "Indicators",
    "MNTDEncoder",
    "MetaReference",
    "NeuralCleanse",
    "PScan",
    "PatchSearch",
    "SSLCleanse",
    "read_meta_reference",
    "read_reference",
    "shipped_reference",
]

SCANNERS: Mapping[str, type] = registry(
    "scanners",
    {
        "decree": Decree,
        "pscan": PScan,
        "ssl_cleanse": SSLCleanse,
        "indicators": Indicators,
        "forensics": Forensics,
        "neural_cleanse": NeuralCleanse,
        "mntd": MNTD,
        "mntd_encoder": MNTDEncoder,
    },
)

FILTERS: Mapping[str, type] = registry("filters", {"patchsearch": PatchSearch})
