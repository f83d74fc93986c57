"""What encoder attacks share: the step with a frozen teacher, checks of their goals, and the manifest."""

from cupel.implanting.manifest import (
    file_content,
    goal_json,
    implanted,
    inherited,
    manifest_of,
    shortened,
    trigger_sha256,
)
from cupel.implanting.step import Aim, ImplantLearner, Seen, Targets, aims_of, check_goals, freeze_norms

__all__ = [
    "Aim",
    "ImplantLearner",
    "Seen",
    "Targets",
    "aims_of",
    "check_goals",
    "file_content",
    "freeze_norms",
    "goal_json",
    "implanted",
    "inherited",
    "manifest_of",
    "shortened",
    "trigger_sha256",
]
