"""Purifiers: remove a backdoor from a copy of an encoder."""

from collections.abc import Mapping

from cupel.purify.abl import ABL
from cupel.purify.anp import ANP
from cupel.purify.bcu import BCU
from cupel.purify.cbd import CBD
from cupel.purify.clp import CLP
from cupel.purify.cupellation import Cupellation
from cupel.purify.fine_pruning import FinePruning
from cupel.purify.ft_sam import FTSAM
from cupel.purify.ibau import IBAU
from cupel.purify.mimic import MIMIC
from cupel.purify.nad import NAD
from cupel.purify.neural_cleanse_prune import NeuralCleansePrune
from cupel.purify.neural_cleanse_unlearn import NeuralCleanseUnlearn
from cupel.purify.scu import SCU
from cupel.purify.tsc import TSC
from cupel.purify.tuning import FST, FT, LP, FETuning, FTInit
from cupel.settings import registry

__all__ = [
    "ABL",
    "ANP",
    "BCU",
    "CBD",
    "CLP",
    "FST",
    "FT",
    "FTSAM",
    "IBAU",
    "LP",
    "MIMIC",
    "NAD",
    "PURIFIERS",
    "SCU",
    "TSC",
    "Cupellation",
    "FETuning",
    "FTInit",
    "FinePruning",
    "NeuralCleansePrune",
    "NeuralCleanseUnlearn",
    "label_free",
]

# without labels first, then the reference lines that need them
PURIFIERS: Mapping[str, type] = registry(
    "purifiers",
    {
        "cupellation": Cupellation,
        "cbd": CBD,
        "scu": SCU,
        "bcu": BCU,
        "mimic": MIMIC,
        "tsc": TSC,
        "clp": CLP,
        "ft": FT,
        "lp": LP,
        "fe_tuning": FETuning,
        "ft_init": FTInit,
        "fst": FST,
        "ft_sam": FTSAM,
        "nad": NAD,
        "anp": ANP,
        "ibau": IBAU,
        "fine_pruning": FinePruning,
        "abl": ABL,
        "neural_cleanse_unlearn": NeuralCleanseUnlearn,
        "neural_cleanse_prune": NeuralCleansePrune,
    },
)


def label_free() -> list[str]:
    """Names of the purifiers that need no labels, as their settings stand by default.

    Example:
        >>> label_free()
        ['cupellation', 'cbd', 'scu', 'bcu', 'mimic', 'tsc', 'clp']
    """
    return [name for name, cls in PURIFIERS.items() if "labels" not in cls().needs]
