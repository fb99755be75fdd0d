"""All metadata of the package. `pip install -e .` uses the repository in place; a wheel also carries `configs/` as `engine/_configs/`."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent


class BuildWithConfigs(build_py):
    """Adds configs/ (settings, bundled weights, the demo's files) to a wheel; `engine.paths.config_root` finds them there."""

    def _configs(self):
        root = HERE / "configs"
        for source in sorted(root.rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                yield source, Path(self.build_lib, "engine", "_configs", source.relative_to(root))

    def run(self):
        super().run()
        if not self.editable_mode:
            for source, target in self._configs():
                self.mkpath(str(target.parent))
                self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode=True):
        configs = [] if self.editable_mode else [str(target) for _, target in self._configs()]
        return super().get_outputs(include_bytecode) + configs


setup(
    name="dreamix",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "engine/__init__.py").read_text(encoding="utf-8"), re.MULTILINE)[1],
    description="Text-driven video editing with a cascade of pixel-space video diffusion models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.15",
    packages=find_namespace_packages(include=["engine", "engine.*"], exclude=["*__pycache__*"]) + ["dreamix_kernels"],
    package_dir={"dreamix_kernels": "kernels/dreamix_kernels"},
    cmdclass={"build_py": BuildWithConfigs},
    package_data={"dreamix_kernels": ["*.cpp"]},
    include_package_data=False,
    install_requires=[
        "torch>=2.11,<2.14",         # capped: an open range fetches the newest CUDA for several GB even where a CPU build is at hand
        'triton>=3.6,<3.10; platform_system=="Linux"',
        'xformers>=0.0.35,<0.1; platform_system=="Linux" and platform_machine=="x86_64"',
        "bitsandbytes>=0.49,<0.51",
        "deepspeed>=0.18,<0.20",
        "transformers>=5.0,<6",
        "numpy>=1.26,<3",
        "safetensors>=0.5",
        "av>=15,<20",
        "pydantic>=2.7,<3",
        "PyYAML>=6",
        "tqdm>=4.66",
        "pillow>=10",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout", "pytest-benchmark>=5", "hypothesis"],
        "ui": ["gradio"],
        "provenance": ["c2pa-python>=0.38"],
        "report": ["tensorboard"],
        "bench": ["diffusers>=0.35", "imagen-pytorch>=2", "einops"],       # rivals in the benchmarks
    },
    entry_points={"console_scripts": ["dreamix=engine.infer:main"]},
)
