"""What pyproject.toml cannot say: two files beside the packages, by which mmcv finds its kernels.

Wheels, editable ones too, hold ``mmdet3d_serve_autoload.py``, a copy of serve/ops/autoload.py, and a ``.pth`` file that
registers it at interpreter start.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

NAME = "mmdet3d_serve_autoload"
SOURCE = Path(__file__).parent / "serve" / "ops" / "autoload.py"


class BuildWithAutoload(build_py):
    """Builds the packages and the two files."""

    def run(self) -> None:
        """Build everything; an editable wheel takes nothing from the build folder, so write into the wheel itself."""
        super().run()
        install = self.get_finalized_command("install")
        folder = Path(install.install_lib if self.editable_mode else self.build_lib)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.py").write_text(SOURCE.read_text())
        (folder / f"{NAME}.pth").write_text(f"import {NAME}; {NAME}.register()\n")


setup(cmdclass={"build_py": BuildWithAutoload})
