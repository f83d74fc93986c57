"""Experiments: YAML → plan → content-addressed store → records."""

from cupel.experiment.plan import Step, plan
from cupel.experiment.reading import packaged, read_experiment
from cupel.experiment.run import run_cell, run_cells
from cupel.experiment.spec import Experiment, cells
from cupel.experiment.store import Store

__all__ = ["Experiment", "Step", "Store", "cells", "packaged", "plan", "read_experiment", "run_cell", "run_cells"]
