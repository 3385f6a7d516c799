"""The command `env`."""

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any


PACKAGES = ("torchvision", "transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "huggingface_hub")
EXTRAS = {
    "server": ("aiohttp",),
    "judge": ("qwen-vl-utils",),
    "annotate": ("gradio",),
    "ray": ("ray",),
    "quantization": ("bitsandbytes", "torchao"),
}


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _env(args: argparse.Namespace) -> None:
    import torch

    from ..version import __version__

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not devices and torch.accelerator.is_available():
        devices = [str(torch.accelerator.current_accelerator())]
    lines = {
        "hp-edit-trl": __version__,
        "Python": platform.python_version(),
        "Platform": platform.platform(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
        "Devices": ", ".join(devices) or "CPU only",
        **{package: _installed(package) for package in PACKAGES},
        **{
            f"Extra `{extra}`": ", ".join(f"{package} {_installed(package)}" for package in packages)
            for extra, packages in EXTRAS.items()
        },
    }
    try:
        import torchvision  # noqa: F401  # transformers hides this error behind another
    except (ImportError, RuntimeError, OSError) as error:
        lines["torchvision"] += f", which does not fit torch ({error}): install both from one index"
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))


def register(commands: Any) -> None:
    """Adds the command of this family to a parser's subcommands."""
    command = commands.add_parser("env", help="print versions, devices and installed extras, for bug reports")
    command.set_defaults(run=_env)
