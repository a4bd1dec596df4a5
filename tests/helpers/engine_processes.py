"""The vLLM engines' processes that this process has started."""

import psutil


def engine_processes() -> list[psutil.Process]:
    """Those that run, in the order in which they were started."""
    found = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
        and any(word.endswith("rollout.vllm.engine_main") for word in process.cmdline())
    ]
    return sorted(found, key=lambda process: process.create_time())
