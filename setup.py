"""The build: CMake (see CMakeLists.txt), driven by scikit-build-core's plug-in for setuptools."""

from setuptools import setup

setup(cmake_source_dir=".")
