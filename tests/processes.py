"""
Scripts in processes of their own, as a user starts them. They are forked from a server that has imported the libraries
already, because imports take eight seconds of each process.
"""

import gc
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "hp_edit_trl.miniature.tiny",
        "hp_edit_trl.scripts.grpo",
        "hp_edit_trl.scripts.dpo",
        "hp_edit_trl.data.builder",
        "hp_edit_trl.bench",
        "hp_edit_trl.calibration.page",
        "tests.helpers",
    ]
)


def _read_hub_settings() -> None:
    """
    huggingface_hub and datasets read the environment when they are imported, and other modules copy what they have
    read. Here they read it again.
    """
    import datasets.config
    import huggingface_hub.constants

    for settings in (huggingface_hub.constants, datasets.config):
        before = {name: value for name, value in vars(settings).items() if isinstance(value, str | bool | Path)}
        now = vars(importlib.reload(settings))
        changed = {name: (old, now[name]) for name, old in before.items() if now[name] != old}
        for module in list(sys.modules.values()):
            for name, (old, new) in changed.items():
                if vars(module).get(name) == old:
                    setattr(module, name, new)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT


def _run(command: list[str], cwd: str, environment: dict[str, str], output: str) -> None:
    gc.freeze()  # a collection would copy the server's memory
    os.environ.update(environment)
    os.chdir(cwd)
    os.setsid()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    if any(name.startswith("HF_") for name in environment):
        _read_hub_settings()
    what, *arguments = command
    sys.argv[:] = [what, *arguments]
    sys.path[:0] = [cwd if what in ("-c", "-m") else str(Path(what).parent), str(ROOT)]
    try:
        if what == "-c":
            sys.argv[:] = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        elif what == "-m":
            del sys.argv[0]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(what, run_name="__main__")
    except Exception:  # multiprocessing would not ask the hook
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Script:
    """
    A script that runs.

    Args:
        *command (`str` or `Path`):
            What would stand behind `python`: a file, `"-c"` and code, or `"-m"` and a module; then the arguments.
        cwd (`str` or `Path`, *optional*):
            Its working directory. By default the repository.
        environment (`dict[str, str]`, *optional*):
            Further environment variables. What a library reads when it is imported comes too late, except for the
            addresses and folders of the Hub.
        processes (`int`, *optional*, defaults to 1):
            Number of its processes, ranks of one run as `torchrun` starts them.
    """

    def __init__(self, *command, cwd=ROOT, environment=None, processes=1):
        self.folder = tempfile.TemporaryDirectory()
        variables = [dict(environment or {}) for _ in range(processes)]
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            for rank, of_rank in enumerate(variables):
                of_rank |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
                of_rank |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": port}
        command = list(map(str, command))
        self.ranks = [
            _context.Process(target=_run, args=(command, str(cwd), of_rank, self.folder.name)) for of_rank in variables
        ]
        for rank in self.ranks:
            rank.start()

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to all processes."""
        for rank in self.ranks:
            os.kill(rank.pid, number)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Waits for all processes and returns the first exit code that is not 0, and what was printed."""
        end = time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(max(0.0, end - time.monotonic()))
            if rank.exitcode is None:
                self.kill()
                raise TimeoutError(f"The script has not ended in {timeout} s:\n{self.printed('stderr')[-4000:]}")
        code = next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)
        return subprocess.CompletedProcess("", code, self.printed("stdout"), self.printed("stderr"))

    def printed(self, name: str) -> str:
        file = Path(self.folder.name) / name
        return file.read_text() if file.exists() else ""
