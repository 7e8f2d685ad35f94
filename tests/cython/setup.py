"""Build of the outside module: what a project needs that cimports the engine."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import engine

extension = Extension("outside", ["outside.pyx"], include_dirs=[engine.get_include()])
setup(
    name="outside",
    ext_modules=cythonize([extension], compiler_directives={"language_level": 3}),
)
