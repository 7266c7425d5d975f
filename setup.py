"""Maps the folders of the repository onto the import names `tandem.engine` and `tandem.kernels`."""

from setuptools import find_namespace_packages, setup

packages = [
    f"tandem.{room}{'.' + name if name else ''}"
    for room in ("engine", "kernels")
    for name in ["", *find_namespace_packages(where=room, exclude=["__pycache__", "*.__pycache__"])]
]
setup(packages=packages, package_dir={"tandem.engine": "engine", "tandem.kernels": "kernels"})
