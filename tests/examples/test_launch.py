"""examples/slurm and examples/kubernetes: the commands they lead to, and a run on two 'nodes'.

Slurm is a stand-in here: ``srun`` starts its command once for each node, all on this machine.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from checkpoint_tools.prune_depth import evenly_spaced_layers, prune_depth
from tests.helpers.pairs import save_pair
from tests.helpers.ranks import ROOT

SLURM = ROOT / "examples/slurm"
SMOLLM2 = ROOT / ".cache/smollm2/SmolLM2-135M-Instruct"
SBATCH = sorted(path.name for path in SLURM.glob("*.sbatch"))
JOBSET: dict[str, Any] = yaml.safe_load((ROOT / "examples/kubernetes/train.yaml").read_text())

# Starts the command after its own options once for each node, as Slurm does, and leaves its process
# id, by which the test finds all of the step's processes.
SRUN = """#!/usr/bin/env bash
nodes=1
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#*=}; shift; done
echo $$ > "$PIDS"
pids=()
for node in $(seq 0 $((nodes - 1))); do
    SLURM_NODEID=$node ${IN_NETWORK:+ip netns exec $IN_NETWORK$node} "$@" & pids+=($!)
done
trap '' USR1
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
    "show hostnames"*) echo "${FIRST_NODE:-localhost}" ;;
    "show job $SLURM_JOB_ID") echo "PreemptEligibleTime=x PreemptTime=${PREEMPTED:-None}" ;;
    requeue*) echo "$@" >> "$REQUEUED" ;;
    *) echo "scontrol: unexpected $*" >&2; exit 1 ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on two nodes of one GPU."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PIDS": str(tmp_path / "pids"),
        "REQUEUED": str(tmp_path / "requeued"),
        "LOGS": str(tmp_path / "logs"),
        "VENV": sys.prefix,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "1",
    }


def command(name: str, environment: dict[str, str], *arguments: str, **settings: str) -> list[str]:
    """The words of the srun command that ``name`` leads to."""
    done = subprocess.run(
        ["bash", SLURM / name, *arguments],
        env={**environment, "DRY_RUN": "1", **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


@pytest.mark.parametrize("name", [*SBATCH, "launch.sh"])
def test_bash_reads_it(name: str) -> None:
    subprocess.run(["bash", "-n", SLURM / name], check=True)


def test_train_on_two_nodes(cluster: dict[str, str]) -> None:
    words = command("train.sbatch", cluster, "run.yaml", "optimizer.lr=1e-5", SLURM_JOB_ID="45678")
    assert words[: words.index("bash")] == [
        *("srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"),
        *("--kill-on-bad-exit=0", "--wait=60", "--label"),
    ]
    torchrun = words[words.index("bash") + 3 :]
    assert torchrun == [
        f"{cluster['LOGS']}/45678.0",
        *("--nnodes", "2", "--nproc-per-node", "1"),
        *("--master-addr", "localhost", "--master-port", "25678"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        *("--shutdown-timeout", "900", "--tee", "3", "--local-ranks-filter", "0"),
        *("-m", "megatron_oprd.train", "--config", "run.yaml", "optimizer.lr=1e-5"),
    ]


def test_in_a_container(cluster: dict[str, str]) -> None:
    """The environment is the image's; the project's folder is seen under its own name."""
    settings = {"CONTAINER": "oprd.sqsh", "MOUNTS": "/models,/data", "VENV": "/nowhere"}
    words = command("build_bridge.sbatch", cluster, "bridge.yaml", **settings)
    options = words[: words.index("bash")]
    assert "--container-image=oprd.sqsh" in options
    assert f"--container-mounts={ROOT}:{ROOT},/models,/data" in options
    assert f"--container-workdir={ROOT}" in options
    assert words[-4:] == ["-m", "megatron_oprd.build_bridge", "--config", "bridge.yaml"]


def test_convert_and_evaluate_take_one_node(cluster: dict[str, str]) -> None:
    tool = ("hf_to_megatron", "--hf", "a", "--out", "b")
    words = command(
        "convert.sbatch", cluster, *tool, SLURM_JOB_NUM_NODES="1", SLURM_GPUS_ON_NODE=""
    )
    assert words[words.index("--nproc-per-node") + 1] == "8"
    assert words[-6:] == ["-m", "checkpoint_tools.hf_to_megatron", "--hf", "a", "--out", "b"]
    words = command("evaluate.sbatch", cluster, "--model", "student=a")
    assert "--nodes=1" in words
    assert words[words.index("python") :] == [
        *("python", "-m", "megatron_oprd.evaluate", "--engine", "vllm", "--model", "student=a"),
    ]


def test_a_missing_environment_is_named(cluster: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", SLURM / "train.sbatch", "run.yaml"],
        env={**cluster, "VENV": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: VENV=/nowhere has no bin/python")


@pytest.mark.parametrize("name", SBATCH)
def test_what_saves_is_requeued_and_nothing_else(name: str) -> None:
    text = (SLURM / name).read_text()
    restarts = "#SBATCH --requeue" in text
    assert restarts == (name in ("train.sbatch", "evaluate.sbatch"))
    assert ("#SBATCH --signal=USR1@900" in text) == (name == "train.sbatch")


SAVED = "stopped after step 4, on SIGTERM: the newest checkpoint is of step 5, from which the ..."
UNSAVED = (
    "stopped after step 4, on SIGUSR1: checkpoint.save_interval is None, so that there is no ..."
)
PREEMPTED = {"PREEMPTED": "2026-11-29T00:40:04"}


@pytest.mark.parametrize(
    ("line", "settings", "is_requeued", "said"),
    [
        (SAVED, {}, True, "stopped and saved; requeued"),
        (SAVED, PREEMPTED, True, "stopped and saved; requeued"),
        (UNSAVED, PREEMPTED, True, "another job preempted this one; requeued"),
        ("still reading weights", PREEMPTED, True, "another job preempted this one; requeued"),
        (UNSAVED, {}, False, "error: the run was stopped without a checkpoint"),
        ("error: model.student: no such folder", {}, False, ""),
    ],
    ids=["saved", "preempted", "no-checkpoints", "early", "no-checkpoints-in-time", "failed"],
)
def test_which_runs_are_requeued(
    cluster: dict[str, str], line: str, settings: dict[str, str], is_requeued: bool, said: str
) -> None:
    log = Path(cluster["LOGS"]) / f"{cluster['SLURM_JOB_ID']}.0/node0/attempt_0/0/stdout.log"
    log.parent.mkdir(parents=True)
    log.write_text(f"step 4  loss 1.4\n{line}\n")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {SLURM / 'launch.sh'}; requeue_if_stopped"],
        env={**cluster, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (said in done.stdout + done.stderr) if said else (done.stdout + done.stderr == "")
    assert Path(cluster["REQUEUED"]).exists() == is_requeued


@pytest.mark.parametrize("is_preempted", [True, False])
def test_an_evaluation_that_was_preempted_is_requeued(
    tmp_path: Path, cluster: dict[str, str], is_preempted: bool
) -> None:
    """SIGTERM ends it; what it has kept serves the next start."""
    python = tmp_path / "environment/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\nkill -TERM $$\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", SLURM / "evaluate.sbatch", "--model", "student=a"],
        env={
            **cluster,
            **(PREEMPTED if is_preempted else {}),
            "VENV": str(tmp_path / "environment"),
        },
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM
    assert Path(cluster["REQUEUED"]).exists() == is_preempted


def wait_for(condition: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.2)


def steps(out: Path) -> list[int]:
    file = out / "metrics.jsonl"
    if not file.exists():
        return []
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_the_network_between_two_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    """Of two processes each."""
    done = subprocess.run(
        ["bash", SLURM / "fabric.sbatch", "--output", tmp_path / "selftest"],
        env={**cluster, "SLURM_GPUS_ON_NODE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "selftest").glob("*/results.json")
    (result,) = json.loads(file.read_text())["results"]
    assert (result["part"], result["status"], result["num_ranks"]) == ("fabric", "ok", 4)
    speed = r"[\d.]+ GB/s"
    assert re.fullmatch(
        rf"all-reduce {speed}, all-gather {speed}; within a machine all-reduce {speed} "
        r"\(16 MiB\), gloo",
        result["found"],
    )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def networks() -> Iterator[str]:
    """Two network namespaces with nothing in common but a cable; the start of their names."""
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip (iproute2)")
    name = f"oprd{os.getpid()}-"
    try:
        try:
            for node in (0, 1):
                ip("netns", "add", f"{name}{node}")
            end = ("type", "veth", "peer", "name", "cable", "netns", f"{name}1")
            ip("link", "add", "cable", "netns", f"{name}0", *end)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"networks of their own need root's rights: {error.stderr.strip()}")
        for node in (0, 1):
            inside = ("-n", f"{name}{node}")
            ip(*inside, "address", "add", f"10.77.0.{node + 1}/24", "dev", "cable")
            ip(*inside, "link", "set", "lo", "up")
            ip(*inside, "link", "set", "cable", "up")
        yield name
    finally:
        there = subprocess.check_output(["ip", "netns", "list"], text=True).split()
        for node in (0, 1):
            if f"{name}{node}" in there:
                ip("netns", "delete", f"{name}{node}")


def bytes_over(network: str) -> int:
    """Bytes that the node got over its cable."""
    show = ["ip", "-n", network, "-json", "-statistics", "link", "show", "cable"]
    (link,) = json.loads(subprocess.check_output(show))
    return int(link["stats64"]["rx"]["bytes"])


@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="needs the demo's model: make demo or make test")
@pytest.mark.slow
def test_the_demo_on_two_nodes_with_networks_of_their_own(
    tmp_path: Path, cluster: dict[str, str], networks: str
) -> None:
    """Nothing goes over localhost: neither is there a port of the other node, nor its address."""
    student = tmp_path / "student"
    prune_depth(SMOLLM2, student, evenly_spaced_layers(30, 24), force=False)  # as `make demo` does
    metrics = {}
    for name, settings in (
        (
            "apart",
            {"IN_NETWORK": networks, "FIRST_NODE": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"},
        ),
        ("together", {}),
    ):
        before = bytes_over(f"{networks}1")
        out = tmp_path / name
        done = subprocess.run(
            [
                *("bash", str(SLURM / "train.sbatch"), "examples/demo.yaml"),
                *(f"model.student={student}", f"output_dir={out}", "train_iters=2"),
                *("rollout.prompts_per_step=2", "rollout.max_new_tokens=8"),
            ],
            env={**cluster, **settings},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        sent = bytes_over(f"{networks}1") - before
        assert (sent > 1e6) == (name == "apart"), sent
        assert (out / "student/config.json").exists()
        metrics[name] = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [step["step"] for step in metrics["apart"]] == [0, 1]
    for number in ("loss", "output_loss", "grad_norm"):
        apart, together = ([step[number] for step in metrics[name]] for name in metrics)
        assert apart == pytest.approx(together, rel=1e-5), number


@pytest.mark.slow
def test_servers_of_two_nodes_with_networks_of_their_own(
    tmp_path: Path, cluster: dict[str, str], networks: str
) -> None:
    """Stand-ins for vLLM, each of which rank 0 reaches at an address of its node."""
    pair = save_pair(tmp_path / "pair", "llama")
    (tmp_path / "faults").mkdir()
    settings = {
        "IN_NETWORK": networks,
        "FIRST_NODE": "10.77.0.1",
        "GLOO_SOCKET_IFNAME": "cable",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/fakes/vllm_stand_in'}",
        "FAKE_VLLM_FAULTS": str(tmp_path / "faults"),
    }
    done = subprocess.run(
        [
            *("bash", str(SLURM / "train.sbatch"), str(pair / "run.yaml"), "rollout.engine=vllm"),
            *("rollout.vllm.start_servers=2", "rollout.vllm.server_nodes=[0,1]"),
            *(f"output_dir={tmp_path / 'run'}", "train_iters=2"),
        ],
        env={**cluster, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is left out" not in done.stdout + done.stderr
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        # What a stand-in always says; 0 of a server that nobody could ask.
        assert json.loads(line)["rollout_kv_cache_peak_of_engine"] == {"0": 0.25, "1": 0.25}
    logs = sorted(path.name for path in (tmp_path / "run").glob("vllm_server_*.log"))
    assert logs == ["vllm_server_0.log", "vllm_server_1.log"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "are_all_signalled"),
    [((signal.SIGCONT, signal.SIGUSR1), True), ((signal.SIGCONT, signal.SIGTERM), False)],
    ids=["warned", "preempted"],
)
def test_two_nodes_stop_on_a_signal_and_go_on(
    tmp_path: Path, cluster: dict[str, str], numbers: tuple[int, ...], are_all_signalled: bool
) -> None:
    """Slurm signals all processes of the step (ProctrackType linuxproc), or torchrun (cgroup)."""
    pair = save_pair(tmp_path / "pair", "llama")
    out = tmp_path / "out"
    run = ["bash", str(SLURM / "train.sbatch"), str(pair / "run.yaml"), f"output_dir={out}"]
    # What the last checkpoint needs has been started before the signal comes.
    often = ["checkpoint.save_interval=1", "checkpoint.keep=1"]
    first = subprocess.Popen(
        [*run, "train_iters=100000", *often],
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(steps(out)) >= 2 or first.poll() is not None, 240)
        # The step's processes: the children of srun, and theirs. Not srun, and not the script.
        srun = int(Path(cluster["PIDS"]).read_text())
        for number in numbers:
            for pid in descendants(srun) if are_all_signalled else children(srun):
                os.kill(pid, number)
        said, _ = first.communicate(timeout=240)
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    assert first.returncode == 1, said
    done = steps(out)[-1]
    assert f"stopped after step {done}, on {signal.Signals(numbers[-1]).name}" in said
    assert Path(cluster["REQUEUED"]).read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    logs = sorted(Path(cluster["LOGS"]).glob("*.0/node*/*/attempt_0/0/std*.log"))
    assert {re.sub(r".*/(node\d)/.*", r"\1", str(path)) for path in logs} == {"node0", "node1"}

    second = subprocess.run(
        [*run, f"train_iters={done + 3}", *often],
        env={**cluster, "SLURM_RESTART_COUNT": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert steps(out) == list(range(done + 3))
    assert (out / "student/config.json").exists()
    assert len(Path(cluster["REQUEUED"]).read_text().splitlines()) == 1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def descendants(pid: int) -> list[int]:
    return [one for child in children(pid) for one in (child, *descendants(child))]


# --- Kubernetes ---

JOB = JOBSET["spec"]["replicatedJobs"][0]
POD = JOB["template"]["spec"]["template"]["spec"]
CONTAINER = POD["containers"][0]


def torchrun_option(option: str) -> str:
    words = shlex.split(CONTAINER["args"][0])
    return words[words.index(option) + 1]


def test_fields_of_the_jobset() -> None:
    """The fields that JobSet's v1alpha2 has, as far as the file uses them."""
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = JOBSET["spec"]
    assert set(spec) == {"failurePolicy", "network", "replicatedJobs"}
    assert set(spec["failurePolicy"]) == {"maxRestarts"}
    assert set(spec["network"]) == {"enableDNSHostnames", "publishNotReadyAddresses"}
    assert set(JOB) == {"name", "replicas", "template"}


def test_all_pods_meet() -> None:
    job = JOB["template"]["spec"]
    assert job["completionMode"] == "Indexed"  # without it there is no JOB_COMPLETION_INDEX
    assert torchrun_option("--node-rank") == "$JOB_COMPLETION_INDEX"
    assert int(torchrun_option("--nnodes")) == job["parallelism"] == job["completions"]
    name = JOBSET["metadata"]["name"]
    assert torchrun_option("--master-addr") == f"{name}-{JOB['name']}-0-0.{name}"
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert int(torchrun_option("--nproc-per-node")) == gpus


def test_a_pod_has_time_to_save() -> None:
    """torchrun kills its workers before Kubernetes kills torchrun."""
    assert int(torchrun_option("--shutdown-timeout")) < POD["terminationGracePeriodSeconds"]


def test_volumes_are_mounted() -> None:
    mounts = {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert mounts == {volume["name"] for volume in POD["volumes"]}
    assert "/dev/shm" in {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}


def test_bash_reads_the_command() -> None:
    subprocess.run(["bash", "-n", "-c", CONTAINER["args"][0]], check=True)
