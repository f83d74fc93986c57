"""The commands of the command line, one function each; they give the exit code."""

from cupel.commands.purifying import purify
from cupel.commands.running import demo, run
from cupel.commands.scanning import scan

__all__ = ["demo", "purify", "run", "scan"]
