"""Attacks on the training data and on trained encoders."""

from collections.abc import Mapping

from cupel.attack.badencoder import BadEncoder
from cupel.attack.badencoder_evasive import EvasiveBadEncoder
from cupel.attack.badnets import BadNets
from cupel.attack.blended import Blended
from cupel.attack.corrupt_encoder import CorruptEncoder
from cupel.attack.ctrl import CTRL
from cupel.attack.drupe import DRUPE
from cupel.attack.inactive import INACTIVE
from cupel.attack.latent_backdoor import LatentBackdoor
from cupel.attack.neuba import NeuBA
from cupel.attack.nlb import NLB
from cupel.attack.sig import SIG
from cupel.attack.ssl_backdoor import SSLBackdoor
from cupel.attack.trojannn_model import TrojanNNModel
from cupel.attack.trojannn_poison import TrojanNNPoison
from cupel.attack.wang2020 import TransferBackdoor
from cupel.settings import registry

__all__ = [
    "ATTACKS",
    "CTRL",
    "DRUPE",
    "INACTIVE",
    "NLB",
    "SIG",
    "BadEncoder",
    "BadNets",
    "Blended",
    "CorruptEncoder",
    "EvasiveBadEncoder",
    "LatentBackdoor",
    "NeuBA",
    "SSLBackdoor",
    "TransferBackdoor",
    "TrojanNNModel",
    "TrojanNNPoison",
]

ATTACKS: Mapping[str, type] = registry(
    "attacks",
    {
        "badencoder": BadEncoder,
        "badencoder_evasive": EvasiveBadEncoder,
        "drupe": DRUPE,
        "inactive": INACTIVE,
        "neuba": NeuBA,
        "latent_backdoor": LatentBackdoor,
        "trojannn_model": TrojanNNModel,
        "transfer_backdoor": TransferBackdoor,
        "ssl_backdoor": SSLBackdoor,
        "nlb": NLB,
        "ctrl": CTRL,
        "corrupt_encoder": CorruptEncoder,
        "badnets": BadNets,
        "blended": Blended,
        "trojannn_poison": TrojanNNPoison,
        "sig": SIG,
    },
)
