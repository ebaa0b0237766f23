"""What pyproject.toml cannot say: two files beside the packages, by which mmcv finds its kernels.

The wheel holds ``mmdet3d_serve_autoload.py``, a copy of serve/ops/autoload.py, and a ``.pth`` file that registers it at
interpreter start. `install_data` writes them, because both an ordinary and an editable wheel are made with it.
"""

from pathlib import Path

from setuptools import Distribution, setup

NAME = "mmdet3d_serve_autoload"
SOURCE = Path(__file__).parent / "serve" / "ops" / "autoload.py"


class install_data(Distribution().get_command_class("install_data")):  # type: ignore[misc]
    """Installs the data files, and the finder of the kernels beside the packages."""

    def run(self) -> None:
        """Copy and write all files."""
        super().run()
        packages = Path(self.get_finalized_command("install").install_lib)
        packages.mkdir(parents=True, exist_ok=True)
        for suffix, text in (("py", SOURCE.read_text()), ("pth", f"import {NAME}; {NAME}.register()\n")):
            target = packages / f"{NAME}.{suffix}"
            target.write_text(text)
            self.outfiles.append(str(target))


setup(cmdclass={"install_data": install_data})
