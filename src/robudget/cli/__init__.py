"""The command line: thin over the public API, one function a verb. Nothing heavy is imported before it is needed."""

# The order of these imports is the order of the verbs in --help.
# isort: off
from robudget.cli import running
from robudget.cli import beyond
from robudget.cli import images
from robudget.cli import sweeps
from robudget.cli import reading
from robudget.cli import studies
from robudget.cli import laws
from robudget.cli.app import app, main

__all__ = ["app", "beyond", "images", "laws", "main", "reading", "running", "studies", "sweeps"]
