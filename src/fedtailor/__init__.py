"""fedtailor: pretrained models customized to data that never leaves its owners."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fedtailor")
except PackageNotFoundError:  # used from a source tree that is not installed
    __version__ = "0+unknown"
