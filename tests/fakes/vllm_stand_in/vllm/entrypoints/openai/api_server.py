"""``vllm serve`` without a model: a `FakeServer` in a process, which fails as `vllm.LLM` does here.

A fault of ``generate`` comes with the CALL-th request. Beside the server a child runs, as vLLM's
engine does; both ids are in the folder of the PROCESS, in a file ``pids``.
"""

import itertools
import os
import subprocess
import sys
import threading
from typing import Any

from transformers import AutoConfig

from megatron_oprd.rollout.vllm.messages import EMBEDDING, EXTENSION, HEAD
from megatron_oprd.rollout.vllm.transfers import TCP
from tests.fakes.vllm_server import FakeServer
from vllm import LLM, SamplingParams


class Server(FakeServer):
    """A server of the folder that the command line names."""

    def __init__(self, arguments: list[str]) -> None:
        options = dict(itertools.pairwise(arguments))
        self._one_at_a_time = threading.Lock()
        self._llm = LLM(
            options["--model"],
            worker_extension_cls=EXTENSION,
            tensor_parallel_size=1,
            weight_transfer_config={"backend": TCP},
        )
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        pids = f"{os.getpid()} {child.pid}"
        (self._llm.folder / "pids").write_text(pids)
        config = AutoConfig.from_pretrained(options["--model"])
        super().__init__(config.to_dict(), address=(options["--host"], int(options["--port"])))
        self.described |= {
            "dtype": options["--dtype"],
            "max_model_len": int(options["--max-model-len"]),
        }

    def start(self) -> None:
        super().start()
        self._llm.start_weight_update()

    def load(self, weights: dict[str, Any]) -> None:
        head = {HEAD: weights[EMBEDDING]} if self.tied and EMBEDDING in weights else {}
        self._llm.take((weights | head).items())

    def tokens(self, body: dict[str, Any]) -> list[int]:
        params = SamplingParams(**body["sampling_params"])
        prompt = {"prompt_token_ids": body["token_ids"]}
        with self._one_at_a_time:
            (output,) = self._llm.generate([prompt], [params], use_tqdm=False)
        return output.outputs[0].token_ids


if __name__ == "__main__":
    server = Server(sys.argv[1:])
    threading.Event().wait()
