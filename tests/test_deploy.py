"""What deploys a run: Slurm's script, Kubernetes' manifest, the image. Linters are used where they are installed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from sppo.recipe.config import keys

ROOT = Path(__file__).parents[1]
SLURM, MANIFEST, DOCKERFILE = ROOT / "deploy/slurm.sh", ROOT / "deploy/kuberay.yaml", ROOT / "docker/Dockerfile"


def lint(program, *args):
    """Run a linter; what it says is the failure."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed (pip install {program}-py, or {program}-bin)")
    done = subprocess.run([path, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def options(text):
    """The options of `sppo train` that a text gives."""
    return set(re.findall(r"--([a-z]+\.[a-z_]+)", text))


@pytest.mark.parametrize("path", [SLURM, MANIFEST, DOCKERFILE], ids=lambda path: path.name)
def test_options_are_keys_of_the_recipe(path):
    assert options(path.read_text()) <= {name for name, *_ in keys()}


# -- Slurm -------------------------------------------------------------------------------------------------------------


def test_the_slurm_script_is_sound():
    subprocess.run(["bash", "-n", SLURM], check=True)
    assert os.access(SLURM, os.X_OK)
    lint("shellcheck", SLURM)


def test_what_slurm_is_asked_for_stands_before_the_first_command():
    lines = SLURM.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    asked = [line for line in lines if line.startswith("#SBATCH")]
    assert asked == [line for line in lines[:first] if line.startswith("#SBATCH")]
    (warned,) = (line for line in asked if "--signal" in line)
    seconds = int(re.fullmatch(r"#SBATCH --signal=B:USR1@(\d+)", warned)[1])
    grace = next(default for name, default, *_ in keys() if name == "cluster.grace")
    assert seconds > float(grace)
    assert "#SBATCH --requeue" in asked


STANDINS = {
    "scontrol": 'echo "scontrol $*" >> "$NOTES"; [ "$1" = show ] && printf "n1\\nn2\\n" || true',
    "srun": 'echo "srun $*" >> "$NOTES"; trap "exit 0" TERM; sleep 60 & wait; kill $!',
    "python": 'until [ "$(grep -c ^srun "$NOTES")" = "$2" ]; do sleep 0.02; done',  # that asks Ray how many nodes there are
    "sppo": 'echo "sppo $*" >> "$NOTES"; trap "exit ${ON_TERM:-130}" TERM; touch "$NOTES.up"; sleep ${FOR:-0} & wait $!; exit ${EXITS:-0}',
}
"""Slurm, Ray and the run, which write down how they are called. (The script was also run by Slurm 22.05 with Ray 2.60.)"""


@pytest.fixture
def job(tmp_path):
    """Starts the script as Slurm would, on two nodes; returns the process and where its stand-ins take notes."""
    folder, notes = tmp_path / "venv" / "bin", tmp_path / "notes"
    folder.mkdir(parents=True)
    for name, body in STANDINS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    env = {
        "PATH": os.environ["PATH"], "VENV": str(folder.parent), "NOTES": str(notes), "RECIPE": "mine.toml", "RUN": str(tmp_path / "run"),
        "SLURM_JOB_ID": "70001", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8", "HEAD_IP": "10.0.0.1",
    }  # fmt: skip
    begun = []

    def start(*args, **more):
        begun.append(subprocess.Popen([SLURM, *args], env=env | more, start_new_session=True))
        return begun[-1], notes

    yield start
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def up(notes):
    """Wait until the run has begun."""
    until = time.monotonic() + 60
    while not Path(f"{notes}.up").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_script_starts_ray_on_every_node_and_trains(job, tmp_path):
    process, notes = job("--cluster.learners", "4")
    assert process.wait(60) == 0
    said = notes.read_text().splitlines()
    starts = {line for line in said if line.startswith("srun")}
    (head,) = (line for line in starts if "--head" in line)
    assert "--nodelist=n1" in head
    assert "--port=20001 " in head
    (rest,) = starts - {head}
    assert "--nodes=1 --ntasks=1" in rest
    assert "--exclude=n1 ray start --address=10.0.0.1:20001" in rest
    assert all("--num-gpus 8" in line for line in starts)
    assert f"sppo train mine.toml --run.out {tmp_path}/run --cluster.address auto --cluster.learners 4" in said
    assert not any("requeue" in line for line in said)


def test_a_run_that_is_there_goes_on(job, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    process, notes = job()
    assert process.wait(60) == 0
    assert f"sppo train --resume {tmp_path}/run --cluster.address auto" in notes.read_text().splitlines()


@pytest.mark.parametrize(
    ("sent", "exits", "requeued"),
    [
        (signal.SIGUSR1, 130, True),  # the end of the job's time
        (signal.SIGUSR1, 143, True),  # the same, before the run had begun to listen
        (signal.SIGTERM, 130, False),  # scancel; after a pre-emption Slurm itself queues the job again
        (signal.SIGUSR1, 1, False),  # a run that failed fails again
        (signal.SIGUSR1, 0, False),  # it was the last step
    ],
)
def test_only_a_run_that_was_saved_before_the_end_of_its_time_queues_again(job, sent, exits, requeued):
    process, notes = job(FOR="30", ON_TERM=str(exits))
    up(notes)
    process.send_signal(sent)
    assert process.wait(60) == exits
    assert ("scontrol requeue 70001" in notes.read_text()) is requeued


@pytest.mark.parametrize("exits", [1, 2, 130])
def test_the_run_decides_how_the_job_ends(job, exits):
    process, notes = job(EXITS=str(exits))
    assert process.wait(60) == exits
    assert "requeue" not in notes.read_text()


def test_a_job_without_a_recipe_says_so(job):
    process, notes = job(RECIPE="")
    assert process.wait(60) != 0
    assert not notes.exists()


# -- Kubernetes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents():
    """The manifest's objects by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(MANIFEST.read_text())}


def pods(documents):
    """All pods' specs by what they are for."""
    cluster = documents["RayJob"]["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    found = {"head": cluster["headGroupSpec"], "workers": workers, "judge": documents["Deployment"]["spec"]}
    return {name: x["template"]["spec"] for name, x in found.items()}


def test_pods_run_one_image_as_an_ordinary_user_without_privileges(documents):
    images = set()
    for name, pod in pods(documents).items():
        assert pod["securityContext"]["runAsNonRoot"], name
        assert pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        images.add(container["image"])
    (image,) = images
    assert re.fullmatch(r".+:\d+\.\d+\.\d+", image)


def test_only_the_judge_gets_what_jails_need_and_it_sees_no_shared_files(documents):
    judge = pods(documents)["judge"]
    needed = {
        "procMount": "Unmasked",
        "seccompProfile": {"type": "Unconfined"},
        "appArmorProfile": {"type": "Unconfined"},
    }
    assert judge["hostUsers"] is False
    assert needed.items() <= judge["containers"][0]["securityContext"].items()
    assert "volumes" not in judge
    for name in ("head", "workers"):
        pod = pods(documents)[name]
        assert "hostUsers" not in pod
        assert not needed.keys() & pod["containers"][0]["securityContext"].keys()


def test_volumes_that_are_mounted_exist_and_the_run_is_on_the_shared_one(documents):
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for name in ("head", "workers"):
        pod = pods(documents)[name]
        volumes = {v["name"]: v for v in pod["volumes"]}
        mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
        assert mounts == {"shared": "/shared", "shm": "/dev/shm"}
        assert volumes.keys() == mounts.keys()
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_there_are_as_many_gpus_as_learners_and_workers_ask_for(documents):
    entry = documents["RayJob"]["spec"]["entrypoint"]
    asked = sum(int(re.search(rf"--cluster\.{who} (\d+)", entry)[1]) for who in ("learners", "rollouts"))
    (group,) = documents["RayJob"]["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    gpus = int(pods(documents)["workers"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
    assert asked == gpus * group["replicas"]


def test_the_manifest_takes_a_recipe_that_is_in_the_image_and_the_judges_address(documents):
    env = {x["name"]: x.get("value") for x in pods(documents)["head"]["containers"][0]["env"]}
    assert (ROOT / env["RECIPE"].removeprefix("/home/sppo/")).exists()
    assert "COPY recipes /home/sppo/recipes" in DOCKERFILE.read_text()
    assert env["RUN"].startswith("/shared/")
    service, judge = documents["Service"], documents["Deployment"]
    assert service["spec"]["selector"] == judge["spec"]["template"]["metadata"]["labels"]
    port = service["spec"]["ports"][0]["port"]
    assert f"url=http://{service['metadata']['name']}:{port}" in MANIFEST.read_text()
    assert str(port) in pods(documents)["judge"]["containers"][0]["args"]


@pytest.mark.parametrize("there", [False, True])
def test_the_manifests_command_begins_a_run_or_goes_on_with_it(documents, tmp_path, there):
    (tmp_path / "sppo").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "sppo").chmod(0o755)
    if there:
        (tmp_path / "recipe.toml").touch()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": str(tmp_path), "RECIPE": "mine.toml"}
    command = ["sh", "-c", documents["RayJob"]["spec"]["entrypoint"]]  # as Ray's jobs run it
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    begun = f"train --resume {tmp_path}" if there else f"train mine.toml --run.out {tmp_path}"
    assert said == f"{begun} --cluster.address auto --cluster.learners 8 --cluster.rollouts 8\n"


def strict(schema):
    """A CRD's schema that also refuses what it does not name, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [strict(x) for x in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    closed = "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields")
    more = {"additionalProperties": False} if closed and schema.get("type") == "object" else {}
    return more | {key: strict(value) for key, value in schema.items()}


def test_the_job_fits_kuberays_own_schema(documents):
    path = os.environ.get("KUBERAY_CRD")
    if path is None:
        pytest.skip("KUBERAY_CRD names no ray.io_rayjobs.yaml (ray-operator/config/crd/bases of kuberay)")
    validator = pytest.importorskip("jsonschema").Draft7Validator
    versions = yaml.safe_load(Path(path).read_text())["spec"]["versions"]
    schema = strict(next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"))
    schema["properties"]["metadata"] = {"type": "object"}
    found = [
        f"{list(error.absolute_path)}: {error.message}" for error in validator(schema).iter_errors(documents["RayJob"])
    ]
    assert not found, "\n".join(found)


# -- the image ---------------------------------------------------------------------------------------------------------


def instructions():
    """The Dockerfile's instructions, each on one line, without comments."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE)
    return [line.split(maxsplit=1) for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]


def test_the_dockerfile_passes_its_linter():
    lint("hadolint", DOCKERFILE)


def test_the_image_begins_from_a_pinned_python():
    found = instructions()
    assert found[0] == ["ARG", found[0][1]]
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-[a-z]+", found[0][1])
    assert {rest.split()[0] for name, rest in found if name == "FROM"} == {"python:${PYTHON}"}
    assert "latest" not in DOCKERFILE.read_text()


def test_the_image_runs_as_an_ordinary_user():
    users = [rest for name, rest in instructions() if name == "USER"]
    assert users == ["1000"]
    (made,) = (rest for name, rest in instructions() if "useradd" in rest)
    assert "--uid 1000 sppo" in made


def test_debians_lists_do_not_stay_in_a_layer():
    layers = [rest for name, rest in instructions() if name == "RUN" and "apt-get" in rest]
    assert len(layers) == 1
    assert "--no-install-recommends" in layers[0]
    assert (
        layers[0].index("apt-get update")
        < layers[0].index("apt-get install")
        < layers[0].index("rm -rf /var/lib/apt/lists/*")
    )
    assert {"bubblewrap", "gcc", "wget"} <= set(layers[0].split())


def test_extras_of_the_image_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for asked in re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE.read_text()):
        assert set(asked.split(",")) <= extras.keys()


def test_the_image_takes_only_what_is_copied_and_no_model():
    allowed = {
        line[1:] for line in (ROOT / "docker/Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    copied = set()
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            copied |= set(rest.split()[:-1])
    assert copied == allowed
    assert all((ROOT / path).exists() for path in copied)
