"""Python runs this in every process of an SGLang server on a CPU: the folder is on that server's PYTHONPATH, and on no other.

torchvision's wheel on PyPI is a CUDA build. Beside a CPU build of torch its library does not load, and its Python part then fails on two
operators that the library would have declared. SGLang computes with neither; declaring them lets the import pass.
"""

import importlib.abc
import sys
from importlib.machinery import ModuleSpec


class TorchvisionOperators(importlib.abc.MetaPathFinder):
    """Declares the operators right before torchvision is imported, when torch is a build without CUDA."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                for name in ("nms", "qnms"):
                    self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.modules[__name__].library = self.library  # pyright: ignore[reportAttributeAccessIssue]  # the schemas go when it does
        return None


sys.meta_path.insert(0, TorchvisionOperators())
