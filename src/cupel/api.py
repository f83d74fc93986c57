"""What `import cupel` offers."""

from cupel.attack import (
    ATTACKS,
    CTRL,
    DRUPE,
    INACTIVE,
    NLB,
    BadEncoder,
    BadNets,
    Blended,
    CorruptEncoder,
    LatentBackdoor,
    NeuBA,
    SSLBackdoor,
    TransferBackdoor,
    TrojanNNModel,
)
from cupel.checkpoint import inspect_file
from cupel.data import load
from cupel.encoders import ENCODERS, Fast, ImageEncoder, ResNet18, ResNet50
from cupel.encoders.storage import load_encoder, save_encoder
from cupel.errors import CupelError
from cupel.experiment import Experiment, cells, read_experiment, run_cells
from cupel.pretrain import OBJECTIVES, SimCLR, Supervised, pretrain_encoder
from cupel.probe import PROBES
from cupel.purify import CBD, PURIFIERS, Cupellation
from cupel.records import Record
from cupel.report import write_report
from cupel.scan import FILTERS, SCANNERS, Decree, PScan
from cupel.seeds import Seed
from cupel.triggers import TRIGGERS, Blend, Patch
from cupel.types import Dataset, Goal, Knowledge
from cupel.vet import default_chain, purify_encoder, scan_encoder

__all__ = [
    "ATTACKS",
    "CBD",
    "CTRL",
    "DRUPE",
    "ENCODERS",
    "FILTERS",
    "INACTIVE",
    "NLB",
    "OBJECTIVES",
    "PROBES",
    "PURIFIERS",
    "SCANNERS",
    "TRIGGERS",
    "BadEncoder",
    "BadNets",
    "Blend",
    "Blended",
    "CorruptEncoder",
    "CupelError",
    "Cupellation",
    "Dataset",
    "Decree",
    "Experiment",
    "Fast",
    "Goal",
    "ImageEncoder",
    "Knowledge",
    "LatentBackdoor",
    "NeuBA",
    "PScan",
    "Patch",
    "Record",
    "ResNet18",
    "ResNet50",
    "SSLBackdoor",
    "Seed",
    "SimCLR",
    "Supervised",
    "TransferBackdoor",
    "TrojanNNModel",
    "cells",
    "default_chain",
    "inspect_file",
    "load",
    "load_encoder",
    "pretrain_encoder",
    "purify_encoder",
    "read_experiment",
    "run_cells",
    "save_encoder",
    "scan_encoder",
    "write_report",
]
