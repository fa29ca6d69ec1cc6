"""The version, in one place: read by the build, by CMake and by `sla2.env`."""

__version__ = "0.1.0"
