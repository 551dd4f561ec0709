"""With this folder on PYTHONPATH every process, a child's too, has the pretended devices as soon as it has imported torch."""

import importlib.abc
import importlib.util
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_install(module):
            execute(module)
            import pretended

            pretended.install()

        spec.loader.exec_module = execute_and_install
        return spec


if importlib.util.find_spec("torch") is not None:
    sys.meta_path.insert(0, _AfterTorch())
