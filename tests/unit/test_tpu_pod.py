"""The TPU launcher against a gcloud that records its words and runs what is sent."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "tpu_pod.sh"
PLACE = ("my-pod", "--zone=us-west4-a")
SHAPE = ("--accelerator=v5litepod-64", "--poll=0")
FLAGS = ("--config=configs/realm/base.py", "--workdir=/data/realm")
BASH = shutil.which("bash")
NASTY = [
    "two words",
    "it's",
    'say "hi"',
    "$HOME `id` $(id)",
    "a;b && c | d > e",
    "new\nline",
    "back\\slash",
    "*",
    "",
    "~ ! # {a,b} é",
]


class Cloud:
    """The folder of a fake gcloud, and the launcher run against it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        program = folder / "bin" / "gcloud"
        program.parent.mkdir()
        shutil.copy(pathlib.Path(__file__).with_name("fake_gcloud.sh"), program)
        self.environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "HOME": str(folder),
            "XDG_CACHE_HOME": str(folder.parent / "cache"),
        }

    def bash(self, *words, script=None):
        return subprocess.run(
            [BASH, *words],
            input=script,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def launch(self, command, *words, status=0):
        done = self.bash(str(SCRIPT), command, *words)
        assert done.returncode == status, done.stdout + done.stderr
        return done

    def write(self, name, *lines):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))

    def calls(self):
        """The words of each call, without those that all have."""
        paths = sorted((self.folder / "calls").glob("*"))
        found = [path.read_text().split("\0")[:-1] for path in paths]
        assert all(words[:2] == ["compute", "tpus"] for words in found)
        return [words[2:] for words in found]

    def verbs(self):
        """Verb and name of the calls that change something, in order."""
        kept = ("create", "delete", "scp", "ssh")
        return [f"{w[1]} {w[2]}" for w in self.calls() if w[1] in kept]

    def programs(self):
        """Words and environment of each program that was started on a host."""
        found = []
        for path in (self.folder / "started").glob("*.env"):
            pairs = (item.split("=", 1) for item in path.read_text().split("\0")[:-1])
            words = path.with_suffix("").read_text().split("\0")[:-1]
            found.append((int(path.stem), words, dict(pairs)))
        return [entry[1:] for entry in sorted(found, key=lambda entry: entry[0])]

    def host(self, name="my-pod"):
        return self.folder / "host" / name / "realm_retro"


@pytest.fixture
def make_cloud(tmp_path):
    made = []

    def make(name):
        made.append(Cloud(tmp_path / name))
        return made[-1]

    yield make
    for cloud in made:
        for pid in cloud.folder.glob("host/*/realm_retro/jobs/*/pid"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.fixture
def cloud(make_cloud):
    return make_cloud("a cloud")


def test_create_asks_for_each_slice(cloud):
    cloud.launch("create", *PLACE, *SHAPE, "--spot", "--workers=2", "--project=p-1")
    created = [words for words in cloud.calls() if words[1] == "create"]
    assert created == [
        [
            "queued-resources",
            "create",
            name,
            f"--node-id={name}",
            f"--accelerator-type={kind}",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--zone=us-west4-a",
            "--project=p-1",
            "--spot",
            "--quiet",
        ]
        for name, kind in [
            ("my-pod", "v5litepod-64"),
            ("my-pod-worker-0", "v5litepod-8"),
            ("my-pod-worker-1", "v5litepod-8"),
        ]
    ]


def test_create_again_makes_what_is_missing(cloud):
    cloud.write("fail", "create my-pod-worker-0")
    failed = cloud.launch("create", *PLACE, *SHAPE, "--workers=1", status=2)
    assert "it is broken" in failed.stderr
    assert "my-pod-worker-0: not created" in failed.stderr
    done = cloud.launch("create", *PLACE, *SHAPE, "--workers=1")
    assert "my-pod: exists and is ACTIVE" in done.stdout
    assert cloud.verbs()[-1] == "create my-pod-worker-0"


def test_setup_waits_and_copies_the_repository(cloud):
    cloud.write("born", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    cloud.launch("create", *PLACE, *SHAPE)
    old = cloud.host() / "realm_retro" / "old.py"
    old.parent.mkdir()
    old.touch()
    command = 'echo "it\'s $((1 + 1))" > said; cd /'
    done = cloud.launch("setup", *PLACE, "--poll=0", f"--setup-command={command}")
    assert "my-pod: WAITING_FOR_RESOURCES" in done.stdout
    assert "my-pod: PROVISIONING" in done.stdout
    host = cloud.host()
    assert (host / "said").read_text() == "it's 2\n"
    assert (host / ".ready").exists()
    for name in ("setup.cfg", "launch/job.sh", "configs/realm/base.py"):
        assert (host / name).read_bytes() == (ROOT / name).read_bytes()
    assert (host / "realm_retro" / "cli" / "train.py").exists()
    assert not old.exists()
    assert not list(host.rglob("__pycache__"))


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", None])
def test_setup_refuses_what_will_never_be_there(cloud, state):
    if state:
        cloud.write("queue/my-pod", state)
    done = cloud.launch("setup", *PLACE, status=2)
    assert f"my-pod: is {state or 'ABSENT'}; delete my-pod" in done.stderr


def test_run_goes_from_nothing_to_the_end(cloud):
    cloud.write("exits", "0", "stay")
    done = cloud.launch(
        "run", *PLACE, *SHAPE, "--workers=1", "--spot", "--poll=1", "--", *FLAGS
    )
    assert "my-pod: the training has finished" in done.stdout
    (train, _), (refresh, _) = cloud.programs()
    module = ["-m", "realm_retro.cli.train", "--distributed"]
    assert train == [*module, *FLAGS]
    assert refresh == ["-m", "realm_retro.cli.refresh_index", *FLAGS]
    log = (cloud.host() / "jobs" / "train" / "log").read_text()
    assert "program 0: 0\n" in log


def test_words_arrive_as_they_were_given(cloud):
    flags = [f"--config.corpus.path={value}" for value in NASTY]
    cloud.launch(
        "run",
        *PLACE,
        *SHAPE,
        *(f"--env=VALUE_{i}={value}" for i, value in enumerate(NASTY)),
        f"--setup-command=printf %s, {' '.join(map(shell_quoted, NASTY))} > said",
        "--",
        *FLAGS,
        *flags,
        *NASTY,
    )
    ((words, variables),) = cloud.programs()
    assert words[3:] == [*FLAGS, *flags, *NASTY]
    assert [variables[f"VALUE_{i}"] for i in range(len(NASTY))] == NASTY
    assert (cloud.host() / "said").read_text() == "".join(f"{v}," for v in NASTY)


def shell_quoted(value):
    return "'" + value.replace("'", "'\\''") + "'"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("create", ["--workers=2", "--spot", "--create-flag=--network=my net"]),
        ("run", ["--workers=1", "--env=A=it's $x;\n", "--poll=1", "--", *FLAGS, "a b"]),
        ("setup", ["--setup-command=echo 'a b' >/dev/null"]),
        ("status", ["--connect-flag=--internal-ip"]),
        ("logs", ["--lines=7", "--host=3"]),
        ("stop", ["--grace=9"]),
        ("delete", ["--project=p-1"]),
    ],
)
def test_a_dry_run_prints_what_is_run(cloud, make_cloud, command, words):
    words = [*PLACE, *SHAPE[:1], *words]
    dry = cloud.launch(command, *words[:2], "--dry-run", *words[2:])
    assert not (cloud.folder / "calls").exists()
    worlds = make_cloud("done"), make_cloud("typed")
    for world in worlds:
        world.write("exits", "0", "stay")
        if command not in ("create", "run"):
            world.launch("create", *PLACE, *SHAPE)
        shutil.rmtree(world.folder / "calls", ignore_errors=True)
    worlds[0].bash(str(SCRIPT), command, *words)
    worlds[1].bash(script=dry.stdout)
    assert worlds[1].calls() == worlds[0].calls() != []


def test_a_preempted_worker_comes_back_while_training_goes_on(cloud):
    cloud.write("exits", "stay", "stay", "stay")
    words = [*PLACE, *SHAPE, "--spot", "--workers=1", "--no-watch", "--", *FLAGS]
    cloud.launch("run", *words)
    wait_for(lambda: len(cloud.programs()) == 2)
    cloud.write("queue/my-pod-worker-0", "SUSPENDING", "SUSPENDED")
    assert "my-pod-worker-0: SUSPENDING" in cloud.launch("run", *words).stdout
    assert "my-pod-worker-0: preempted" in cloud.launch("run", *words).stdout
    cloud.launch("run", *words)
    wait_for(lambda: len(cloud.programs()) == 3)
    first, second = (
        words for words in cloud.calls() if words[1:3] == ["create", "my-pod-worker-0"]
    )
    assert first == second
    assert "--spot" in first
    programs = [words for words, _ in cloud.programs()]
    assert programs[1] == programs[2] != programs[0]


def test_preemption_in_the_middle_resumes(cloud):
    """The machine vanishes while the program runs; the same words start again."""
    cloud.write("exits", "stay", "0")
    launcher = subprocess.Popen(
        ["bash", str(SCRIPT), "run", *PLACE, *SHAPE, "--spot", "--", *FLAGS],
        env=cloud.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(cloud.programs()) == 1 and (cloud.host() / "jobs").exists())
    cloud.write("queue/my-pod", "SUSPENDED")
    output = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 0, output
    assert "my-pod: preempted" in output
    assert "failure" not in output
    (first, _), (second, _) = cloud.programs()
    assert first == second
    verbs = cloud.verbs()
    assert verbs.count("create my-pod") == 2
    assert verbs.count("delete my-pod") == 1


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_sigterm_is_no_failure_and_a_crash_is_one(cloud):
    cloud.write("exits", "143", "1", "143", "0")
    output = cloud.launch("run", *PLACE, *SHAPE, "--", *FLAGS).stdout
    assert output.count("my-pod: train was asked to end and did") == 2
    assert output.count("its job ended: exited 1 (failure 1, --max-failures=10)") == 1
    assert len(cloud.programs()) == 4


def test_failures_come_to_an_end(cloud):
    cloud.write("exits", *["1"] * 9)
    words = ["--max-failures=3", "--", *FLAGS]
    done = cloud.launch("run", *PLACE, *SHAPE, *words, status=2)
    assert len(cloud.programs()) == 3
    assert done.stderr.endswith(
        "its job ended: exited 1; that was failure 3, and --max-failures=3:"
        " look at logs my-pod --zone=us-west4-a, then run again\n"
    )


def test_a_failed_resource_is_asked_for_again(cloud):
    cloud.write("queue/my-pod", "FAILED")
    output = cloud.launch("run", *PLACE, *SHAPE, "--", *FLAGS).stdout
    assert "its queued resource is FAILED (failure 1" in output
    assert cloud.verbs()[:2] == ["delete my-pod", "create my-pod"]


def test_a_refused_input_is_not_tried_again(cloud):
    cloud.write("exits", "2")
    done = cloud.launch("run", *PLACE, *SHAPE, "--", *FLAGS, status=2)
    assert "program 0: 2" in done.stdout
    assert "the training refused its input" in done.stderr
    assert len(cloud.programs()) == 1


def test_gcloud_may_fail_for_a_while(cloud):
    cloud.write("fail", "create my-pod", "ssh my-pod")
    output = cloud.launch("run", *PLACE, *SHAPE, "--", *FLAGS).stdout
    assert "my-pod: gcloud did not create it (failure 1" in output
    assert "my-pod: gcloud could not tell its state: ERROR" in output
    cloud.write("fail", *["describe my-pod"] * 10)
    done = cloud.launch("run", *PLACE, *SHAPE, "--", *FLAGS, status=2)
    assert "10 times in a row" in done.stderr
    assert "it is broken" in done.stderr


def test_stop_ends_the_job_and_whoever_watches(cloud):
    words = [*PLACE, *SHAPE]
    cloud.write("exits", "stay", "stay")
    cloud.launch("run", *words, "--workers=1", "--no-watch", "--", *FLAGS)
    wait_for(lambda: len(cloud.programs()) == 2)
    status = cloud.launch("status", *PLACE).stdout
    assert re.search(r"my-pod: ACTIVE\n  train: running \(on ", status)
    assert re.search(r"my-pod-worker-0: ACTIVE\n  refresh: running", status)
    again = cloud.launch("setup", *PLACE, status=2)
    assert "train is running" in again.stderr
    watching = subprocess.Popen(
        ["bash", str(SCRIPT), "run", *words, "--", *FLAGS],
        env=cloud.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert "with the flags that it was started with" in watching.stdout.readline()
    # Without --workers it still finds them.
    output = cloud.launch("stop", *PLACE).stdout
    assert "job train: stopped 143" in output
    assert "job refresh: stopped 143" in output
    said = watching.communicate(timeout=60)[0]
    assert watching.returncode == 143
    assert said == "my-pod: stopped; run goes on from the checkpoint\n"
    assert len(cloud.programs()) == 2
    cloud.launch("run", *words, "--", *FLAGS)
    assert len(cloud.programs()) == 3


def test_delete_gives_back_what_the_options_forget(cloud):
    cloud.launch("create", *PLACE, *SHAPE, "--workers=2")
    cloud.launch("create", "my-pod-2", *PLACE[1:], *SHAPE)
    cloud.write("fail", "delete my-pod-worker-0")
    done = cloud.launch("delete", *PLACE, status=2)
    assert "my-pod-worker-0: not deleted, see above, and may still cost" in done.stderr
    cloud.launch("delete", *PLACE)
    assert [path.name for path in (cloud.folder / "queue").iterdir()] == ["my-pod-2"]
    assert "--force" in cloud.calls()[-1]
    none = cloud.launch("delete", *PLACE, status=2)
    assert "my-pod: no queued resource of that name in --zone=us-west4-a" in none.stderr


def test_logs_name_host_and_job(cloud):
    cloud.launch("run", *PLACE, *SHAPE, "--no-watch", "--", *FLAGS)
    wait_for(lambda: "exit" in (cloud.host() / "jobs" / "train" / "log").read_text())
    output = cloud.launch("logs", *PLACE, "--lines=1", "--host=0").stdout
    assert output.endswith("exit status 0\n")
    assert output.count("\n") == 1
    assert "--worker=0" in cloud.calls()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command; use create, setup,"),
        (["destroy"], "destroy: no command; use create,"),
        (["create", "--zone=us-west4-a"], "create: no name;"),
        (["create", "My_Pod", "--zone=us-west4-a"], "My_Pod: not a name"),
        (["create", "a;b", "--zone=us-west4-a"], "a;b: not a name"),
        (["create", "--", *PLACE], "create: no name;"),
        (["create", "my-pod"], "create: no --zone;"),
        (["create", "my-pod", "--zone"], "--zone: has no value; write --zone=VALUE"),
        (["create", "my-pod", "--zone=us"], "--zone=us: not a zone; give one as in"),
        (["create", *PLACE, "--project=A B"], "--project=A B: not a project's ID;"),
        (["create", *PLACE], "create: no --accelerator;"),
        (["create", *PLACE, "--accelerator=8"], "--accelerator=8: not a TPU type;"),
        (["create", *PLACE, "--accelerator=v9-8"], "v9-8: no known image"),
        (
            ["create", *PLACE, *SHAPE, "--worker-accelerator=v5litepod-16"],
            "--worker-accelerator=v5litepod-16: a slice of several hosts;",
        ),
        (["create", *PLACE, *SHAPE, "--workers=two"], "--workers=two: give a whole"),
        (["create", *PLACE, *SHAPE, "--workers="], "--workers=: give a whole"),
        (["run", *PLACE, "--max-failures=0"], "--max-failures=0: give a whole number"),
        (["create", *PLACE, "--bogus"], "--bogus: no such option;"),
        (["create", *PLACE, "--env=A B=1"], "--env=A B=1: give --env=NAME=VALUE"),
        (["create", *PLACE, "--create-flag=x"], "--create-flag=x: give a flag of"),
        (["logs", *PLACE, "--job=worker"], "--job=worker: give train, worker-0,"),
        (["status", *PLACE, "other"], "other: a second name, after my-pod;"),
        (["create", *PLACE, *SHAPE, "--", "x"], "x: create takes no flags of the"),
        (["run", *PLACE, *SHAPE], "run: no --config=FILE and --workdir=/FOLDER"),
        (["run", *PLACE, *SHAPE, "--config=c.py"], "--config=c.py: a flag of the"),
        (
            ["run", *PLACE, *SHAPE, "--", FLAGS[0], "--workdir=gs://bucket/x"],
            "--workdir=gs://bucket/x: not a folder that all hosts have;",
        ),
        (
            ["run", *PLACE, *SHAPE, "--", *FLAGS, "--distributed"],
            "--distributed: run adds it",
        ),
    ],
)
def test_bad_input_is_one_line_and_asks_nothing(cloud, words, message):
    done = cloud.bash(str(SCRIPT), *words)
    assert done.returncode == 2
    assert one_line(done).startswith(message)
    assert not (cloud.folder / "calls").exists()


def one_line(done):
    """The error without the script's name."""
    assert done.stderr.count("\n") == 1
    prefix = "tpu_pod.sh: error: "
    assert done.stderr.startswith(prefix)
    return done.stderr.removeprefix(prefix).rstrip("\n")


def test_no_gcloud_is_one_line(cloud):
    # Nothing else may be found either: there could be a real one.
    only = cloud.folder / "only"
    only.mkdir()
    for program in ("bash", "dirname"):
        (only / program).symlink_to(shutil.which(program))
    cloud.environment["PATH"] = str(only)
    done = cloud.launch("status", *PLACE, status=2)
    assert one_line(done).startswith("no gcloud here; install it")


def test_help_names_every_command_and_option(cloud):
    text = cloud.launch("--help").stdout
    assert "set -euo" not in text
    source = (ROOT / "launch" / "tpu_pod" / "flags.sh").read_text()
    options = set(re.findall(r"^    (--[a-z-]+)(?:=\*)?\)", source, re.MULTILINE))
    assert len(options) > 15
    for word in [*options, "create", "setup", "status", "logs", "stop", "delete"]:
        assert word in text


@pytest.mark.parametrize("name", ["flags", "slices", "watch"])
def test_the_parts_parse(name):
    path = ROOT / "launch" / "tpu_pod" / f"{name}.sh"
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0


class TestJob:
    """One background job of a host."""

    @pytest.fixture
    def job(self, tmp_path):
        shutil.copytree(ROOT / "launch", tmp_path / "a host" / "launch")
        script = tmp_path / "a host" / "launch" / "job.sh"

        def run(*words):
            return subprocess.run(
                [str(script), *words],
                capture_output=True,
                text=True,
                check=False,
                timeout=60,
            )

        return run

    def test_its_life(self, job):
        assert job("state", "train").stdout.startswith("job train: none (on ")
        assert job("start", "train", "sleep", "60").returncode == 0
        assert ": running (" in job("state", "train").stdout
        twice = job("start", "train", "true")
        assert twice.returncode == 2
        assert "is running already" in twice.stderr
        assert job("idle").returncode == 2
        assert "job train: stopped 143 (" in job("stop", "train", "30").stdout
        assert job("idle").returncode == 0
        job("start", "train", "no-such-program")
        wait_for(lambda: "exited 127" in job("state", "train").stdout)
        assert "no-such-program" in job("logs", "train", "5").stdout

    def test_one_that_does_not_end_is_killed_with_its_children(self, job):
        job("start", "x", "bash", "-c", "trap '' TERM; sleep 61 & sleep 60; wait")
        output = job("stop", "x", "0").stdout
        assert "killed, it had not ended within 0 s" in output
        assert "job x: stopped 137 (" in output

    def test_a_killed_supervisor_is_seen(self, job, tmp_path):
        job("start", "x", "sleep", "60")
        pid = int((tmp_path / "a host" / "jobs" / "x" / "pid").read_text())
        status = pathlib.Path(f"/proc/{pid}/status").read_text()
        os.kill(int(re.search(r"PPid:\s+(\d+)", status)[1]), signal.SIGKILL)
        assert ": running (" in job("state", "x").stdout  # it lives on
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: ": lost (" in job("state", "x").stdout)

    @pytest.mark.parametrize("words", [[], ["run"], ["state"], ["state", "../x"]])
    def test_bad_input_is_one_line(self, job, words):
        done = job(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("job.sh: error: ")
        assert done.stderr.count("\n") == 1
