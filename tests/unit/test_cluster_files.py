"""The Slurm script, with a srun that records its words, and the JobSet's fields."""

import os
import pathlib
import re
import shutil
import string
import subprocess

import pytest
import yaml

from realm_retro.parallel import hosts

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ["--config=configs/retro/quickstart.py", "--workdir=/shared/a b", "--x=it's $y"]


@pytest.fixture
def submit(tmp_path):
    """Runs the script as Slurm would: a copy of it, in the clone it was sent from."""
    clone = tmp_path / "a clone"
    shutil.copytree(ROOT / "launch", clone / "launch")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    copy = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "slurm_script")
    programs = {
        clone / ".venv" / "bin" / "python": "[ $1 = - ] && echo stamp",
        binaries / "srun": 'printf "%s\\n" "$@" >"$OUT/srun"; exit "$SRUN"',
        binaries / "squeue": 'echo "$STATE"',
        binaries / "scontrol": 'echo "$@" >"$OUT/scontrol"',
    }
    for path, text in programs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    (clone / ".venv" / "installed-cuda").write_text("stamp\n")

    def run(*words, status=0, state="RUNNING", folder=clone):
        done = subprocess.run(
            ["bash", copy, *words],
            env={
                **os.environ,
                "PATH": f"{binaries}:{os.environ['PATH']}",
                "SLURM_SUBMIT_DIR": str(folder),
                "SLURM_JOB_ID": "77",
                "OUT": str(tmp_path),
                "SRUN": str(status),
                "STATE": state,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        read = {
            name: (tmp_path / name).read_text()
            for name in ("srun", "scontrol")
            if (tmp_path / name).exists()
        }
        return done, read

    run.python = str(clone / ".venv" / "bin" / "python")
    return run


def test_slurm_starts_one_program_of_all_processes(submit):
    done, read = submit(*FLAGS)
    assert done.returncode == 0, done.stderr
    words = read["srun"].splitlines()
    at = words.index(submit.python)
    module = ["-m", "realm_retro.cli.train", "--distributed"]
    assert words[at:] == [submit.python, *module, *FLAGS]
    # A process that ends first must not cost the others their checkpoint.
    assert {"--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=300"} <= set(words[:at])
    assert "scontrol" not in read


def test_slurm_starts_workers_each_on_its_gpu(submit):
    _, read = submit("refresh_index", *FLAGS)
    words = read["srun"].splitlines()
    assert "--wait=0" in words
    command = words[words.index("bash") :]
    done = subprocess.run(
        [*command[:4], "sh", "-c", 'echo "$CUDA_VISIBLE_DEVICES" "$@"', "-", *FLAGS],
        env={**os.environ, "SLURM_LOCALID": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"3 {' '.join(FLAGS)}\n"
    assert command[4:] == [
        submit.python,
        "-m",
        "realm_retro.cli.refresh_index",
        *FLAGS,
    ]


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        (143, "RUNNING", True),
        (143, "COMPLETING", False),  # cancelled, or requeued by Slurm itself
        (0, "RUNNING", False),
        (2, "RUNNING", False),
        (134, "RUNNING", False),
    ],
)
def test_slurm_requeues_what_sigterm_ended(submit, status, state, requeued):
    done, read = submit(*FLAGS, status=status, state=state)
    assert done.returncode == status
    assert read.get("scontrol") == ("requeue 77\n" if requeued else None)


def test_slurm_refuses_in_one_line(submit, tmp_path):
    done, _ = submit(*FLAGS, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.endswith("is no clone of the repository; run sbatch there\n")
    done, read = submit()
    assert done.returncode == 2
    assert "no flags; give at least --config=FILE" in done.stderr
    assert read == {}


def test_slurm_parses_and_asks_for_a_warning():
    path = ROOT / "launch" / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    options = re.findall(r"^#SBATCH (\S+)", text, re.MULTILINE)
    assert {"--requeue", "--signal=TERM@300", "--open-mode=append"} <= set(options)
    # Slurm reads no options behind the first command.
    assert text.rindex("#SBATCH") < text.index("\nset -euo pipefail\n")


VALUES = {
    "NAME": "my-run",
    "IMAGE": "registry/realm_retro:1",
    "CLAIM": "shared",
    "CONFIG": "configs/realm/base.py",
    "WORKDIR": "/data/realm",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "8x8",
    "HOSTS": "16",
    "CHIPS": "4",
    "WORKERS": "2",
    "WORKER_TOPOLOGY": "2x2",
    "WORKER_CHIPS": "4",
}


@pytest.fixture(scope="module")
def jobset():
    template = string.Template((ROOT / "launch" / "gke_jobset.yaml").read_text())
    assert set(template.get_identifiers()) == set(VALUES)
    return yaml.safe_load(template.safe_substitute(VALUES))


def job(jobset, name):
    (found,) = (j for j in jobset["spec"]["replicatedJobs"] if j["name"] == name)
    spec = found["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    return found, spec, container


def test_the_example_in_the_template_sets_every_value():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    exported = re.findall(r"^#   export (.*)$", text, re.MULTILINE)
    names = [pair.split("=")[0] for line in exported for pair in line.split()]
    assert sorted(names) == sorted(VALUES)


def test_the_jobset_is_one(jobset):
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert jobset["kind"] == "JobSet"
    spec = jobset["spec"]
    assert set(spec) <= {
        "network",
        "coordinator",
        "successPolicy",
        "failurePolicy",
        "replicatedJobs",
    }
    names = [j["name"] for j in spec["replicatedJobs"]]
    assert names == ["train", "workers"]
    assert spec["successPolicy"]["targetReplicatedJobs"] == ["train"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert rule["action"] == "FailJobSet"
    assert set(rule["targetReplicatedJobs"]) <= set(names)
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    for name in names:
        _, job_spec, container = job(jobset, name)
        pod = job_spec["template"]["spec"]
        assert pod["restartPolicy"] == "Never"
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["volumes"]}


def test_the_jobset_tells_processes_what_they_read(jobset):
    found, spec, container = job(jobset, "train")
    network, coordinator = jobset["spec"]["network"], jobset["spec"]["coordinator"]
    assert network["enableDNSHostnames"] is True
    assert found["replicas"] == 1
    variables = {v["name"]: v for v in container["env"]}
    place = "-".join(
        str(coordinator[k]) for k in ("replicatedJob", "jobIndex", "podIndex")
    )
    (port,) = container["ports"]
    assert variables[hosts.COORDINATOR]["value"] == (
        f"my-run-{place}.{network['subdomain']}:{port['containerPort']}"
    )
    count = variables[hosts.NUM_PROCESSES]["value"]
    assert count == "16"  # a string: Kubernetes takes nothing else
    assert int(count) == spec["completions"] == spec["parallelism"]
    assert spec["completionMode"] == "Indexed"
    source = variables[hosts.PROCESS_ID]["valueFrom"]["fieldRef"]["fieldPath"]
    assert source == (
        "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    )
    assert spec["backoffLimit"] == 0


def test_the_jobset_starts_commands_that_exist(jobset):
    for name, command in (("train", "train"), ("workers", "refresh_index")):
        words = job(jobset, name)[2]["command"]
        assert words[:3] == ["python", "-m", f"realm_retro.cli.{command}"]
        assert words[3:5] == [
            f"--config={VALUES['CONFIG']}",
            f"--workdir={VALUES['WORKDIR']}",
        ]
        assert (ROOT / "realm_retro" / "cli" / f"{command}.py").exists()
    assert job(jobset, "workers")[0]["replicas"] == 2
