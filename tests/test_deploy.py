"""The files that take a run to a cluster: valid where they can be checked without one, and agreeing with each other."""

import copy
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)


def google() -> dict[str, Any]:
    """The cluster that the documentation describes."""
    (block,) = re.findall(r"```yaml\n(cluster_name.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    return yaml.safe_load(block)


def clusters() -> dict[str, dict[str, Any]]:
    return {"aws": yaml.safe_load((ROOT / "cluster.yaml").read_text()), "gcp": google()}


def ray_takes(config: dict[str, Any]) -> None:
    """Ray's own validation of a file for `ray up`, with the defaults of its provider filled in."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))


@pytest.fixture(params=["aws", "gcp"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    return clusters()[request.param]


class TestRayUp:
    def test_ray_takes_it(self, cluster: dict[str, Any]):
        ray_takes(cluster)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("idle_timeout_minuts", 5, "'idle_timeout_minuts' was unexpected"),
            ("max_workers", "16", "not of type 'integer'"),
            ("head_node_type", "haed", "must be one of `available_node_types`"),
            ("provider", {"type": "awss"}, "Unsupported node provider"),
        ],
    )
    def test_a_mistake_is_refused(self, cluster: dict[str, Any], key: str, value: object, message: str):
        with pytest.raises(Exception, match=message):
            ray_takes({**cluster, key: value})

    def test_a_mistake_in_a_machine_is_refused(self, cluster: dict[str, Any]):
        for change in ({"min_worker": 0}, {"min_workers": 17}):
            spoilt = copy.deepcopy(cluster)
            spoilt["available_node_types"]["gpu"] |= change
            with pytest.raises(Exception, match=r"min_worker"):
                ray_takes(spoilt)

    def test_workers_grow_from_zero_within_bounds_and_the_head_takes_no_task(self, cluster: dict[str, Any]):
        machines = cluster["available_node_types"]
        head = machines.pop(cluster["head_node_type"])
        assert head["resources"]["CPU"] == 0 and "--num-cpus=0" in " ".join(cluster["head_start_ray_commands"])
        assert {"gpu", "cpu"} == machines.keys()
        for machine in machines.values():
            assert machine["min_workers"] == 0 < machine["max_workers"] <= cluster["max_workers"]
            assert "spot" in json.dumps(machine["node_config"]).lower()
        assert "spot" not in json.dumps(head["node_config"]).lower()

    def test_nothing_listens_to_the_world_and_everything_wants_the_token(self, cluster: dict[str, Any]):
        text = json.dumps(cluster)
        assert "0.0.0.0" not in text and "--dashboard-host=127.0.0.1" in text
        assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
        assert "/home/ray/.ray/auth_token" in cluster["file_mounts"]

    def test_the_versions_and_extras_are_ours(self, cluster: dict[str, Any]):
        assert f":{PINS['ray']}-py311" in cluster["docker"]["image"]
        assert extras(" ".join(cluster["setup_commands"])) <= PROJECT["optional-dependencies"].keys()

    def test_it_gives_idle_machines_back_soon(self, cluster: dict[str, Any]):
        assert 0 < cluster["idle_timeout_minutes"] <= 15


def extras(command: str) -> set[str]:
    """The extras of our package that an installing command asks for."""
    found = re.findall(r"hdistill\[([\w,]+)\]", command)
    assert found, "it does not install the package"
    return {name for group in found for name in group.split(",")}


# The image


def instructions() -> list[list[str]]:
    """The instructions of the Dockerfile as words, comments left out and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line.split() for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def of(name: str) -> list[list[str]]:
    return [rest for instruction, *rest in instructions() if instruction == name]


class TestDockerfile:
    def test_it_knows_its_instructions(self):
        known = {"FROM", "ARG", "RUN", "USER", "WORKDIR", "ENV", "COPY", "CMD"}
        assert {instruction for instruction, *_ in instructions()} <= known

    def test_every_source_exists_and_is_sent_to_the_builder(self):
        sources = [word for words in of("COPY") for word in words[:-1] if not word.startswith("--")]
        ignored, *_, cache, compiled = (ROOT / ".dockerignore").read_text().splitlines()[1:]
        sent = (ROOT / ".dockerignore").read_text().splitlines()
        assert ignored == "*" and cache == "**/__pycache__" and compiled == "**/*.py[co]"
        assert sources and all((ROOT / source).exists() for source in sources)
        assert {f"!{source}" for source in sources} == {line for line in sent if line.startswith("!")}

    def test_it_holds_what_the_package_is_built_from(self):
        sources = {word for words in of("COPY") for word in words}
        packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
        needed = {"pyproject.toml", "constraints.txt", PROJECT["readme"], *PROJECT["license-files"]}
        assert needed | {name.rstrip("*") for name in packages["include"]} <= sources

    def test_python_is_one_that_the_package_takes(self):
        ((base,),) = of("FROM")
        version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", base)
        assert version and (int(version[1]), int(version[2])) >= (3, 11)

    def test_whoever_runs_it_has_no_rights_and_every_install_is_pinned(self):
        order = [instruction for instruction, *_ in instructions()]
        after = order.index("USER")
        assert of("USER") == [["ray"]] and "RUN" in order[after:]
        installs = re.findall(r"pip install.*?(?=;;|&&|$)", " \n ".join(" ".join(words) for words in of("RUN")), re.M)
        assert len(installs) == 3 and all("-c hdistill/constraints.txt" in command for command in installs)

    def test_the_build_tries_the_command_and_knows_our_extras(self):
        last = " ".join(of("RUN")[-1])
        assert "hdistill --version" in last
        assert extras(last) <= PROJECT["optional-dependencies"].keys()

    def test_torch_is_a_choice_of_two_and_the_index_is_that_of_the_makefile(self):
        arguments = dict(" ".join(words).split("=", 1) for words in of("ARG"))
        assert arguments["TORCH"] == "cpu"
        assert f"TORCH_INDEX ?= {arguments['TORCH_INDEX']}\n" in (ROOT / "Makefile").read_text()


# Kubernetes: the part of the resources' schemas that the manifests use, strictly. The whole is 1.4 MB in KubeRay's own
# repository, against which they were checked once.


def only(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with these keys and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
SECRET = only(("name",), name=TEXT, optional=FLAG)
KEY = only(("name", "key"), name=TEXT, key=TEXT)
VARIABLE = only(("name",), name=TEXT, value=TEXT, valueFrom=only(("secretKeyRef",), secretKeyRef=KEY))
CONTAINER = only(
    ("name", "image", "resources"),
    name=TEXT,
    image=TEXT,
    ports=many(only(("containerPort",), containerPort=COUNT, name=TEXT)),
    env=many(VARIABLE),
    envFrom=many(only(("secretRef",), secretRef=SECRET)),
    resources=only(("requests", "limits"), requests=TEXTS, limits=TEXTS),
    volumeMounts=many(only(("name", "mountPath"), name=TEXT, mountPath=TEXT)),
)
VOLUME = only(
    ("name",),
    name=TEXT,
    persistentVolumeClaim=only(("claimName",), claimName=TEXT),
    emptyDir=only(medium={"enum": ["Memory"]}, sizeLimit=TEXT),
)
TOLERATION = only(key=TEXT, operator={"enum": ["Exists", "Equal"]}, value=TEXT, effect={"enum": ["NoSchedule"]})
USER = only(("runAsNonRoot",), runAsNonRoot={"const": True}, runAsUser=COUNT, runAsGroup=COUNT, fsGroup=COUNT)
POD = only(
    ("securityContext", "containers"),
    securityContext=USER,
    nodeSelector=TEXTS,
    tolerations=many(TOLERATION),
    terminationGracePeriodSeconds=COUNT,
    containers=many(CONTAINER),
    volumes=many(VOLUME),
)
TEMPLATE = only(("spec",), spec=POD)
HEAD = only(("template",), serviceType={"const": "ClusterIP"}, rayStartParams=TEXTS, template=TEMPLATE)
WORKERS = only(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=TEXTS,
    template=TEMPLATE,
)
CLUSTER = only(
    ("rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"),
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=only(idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}),
    authOptions=only(("mode", "secretName"), mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    headGroupSpec=HEAD,
    workerGroupSpecs=many(WORKERS),
)
JOB = only(
    ("submissionMode", "entrypoint", "rayClusterSpec"),
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    backoffLimit=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    activeDeadlineSeconds=COUNT,
    rayClusterSpec=CLUSTER,
)


def resource(kind: str, spec: dict[str, Any]) -> Draft202012Validator:
    about = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": only(("name",), name=TEXT)}
    return Draft202012Validator(only(("apiVersion", "kind", "metadata", "spec"), **about, spec=spec))


SCHEMAS = {"cluster.yaml": resource("RayCluster", CLUSTER), "job.yaml": resource("RayJob", JOB)}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "deploy" / "kuberay" / name).read_text())


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["spec"].get("rayClusterSpec", document["spec"])


class TestKubeRay:
    def test_every_manifest_is_checked(self):
        assert {path.name for path in (ROOT / "deploy").rglob("*") if path.is_file()} == SCHEMAS.keys()

    @pytest.mark.parametrize("name", SCHEMAS)
    def test_it_fits_the_schema(self, name: str):
        errors = SCHEMAS[name].iter_errors(manifest(name))
        assert [f"{error.json_path}: {error.message:.200}" for error in errors] == []

    @pytest.mark.parametrize("name", SCHEMAS)
    @pytest.mark.parametrize(
        "change",
        [{"enableInTreeAutoscalling": True}, {"rayVersion": 2.6}, {"workerGroupSpecs": []}, {"authOptions": {}}],
        ids=str,
    )
    def test_a_mistake_does_not(self, name: str, change: dict[str, Any]):
        spoilt = manifest(name)
        cluster_of(spoilt).update(change)
        assert not SCHEMAS[name].is_valid(spoilt)

    def test_both_describe_the_same_cluster(self):
        assert cluster_of(manifest("job.yaml")) == cluster_of(manifest("cluster.yaml"))

    def test_ray_is_that_of_the_constraints_and_wants_the_token(self):
        cluster = cluster_of(manifest("cluster.yaml"))
        assert cluster["rayVersion"] == PINS["ray"]
        assert cluster["authOptions"] == {"mode": "token", "secretName": "hdistill-token"}

    def test_workers_grow_from_zero_on_spot_machines_and_one_group_has_gpus(self):
        groups = cluster_of(manifest("cluster.yaml"))["workerGroupSpecs"]
        assert all(0 == group["replicas"] == group["minReplicas"] < group["maxReplicas"] for group in groups)
        for group in groups:
            pod = group["template"]["spec"]
            assert any("spot" in toleration["key"] for toleration in pod["tolerations"])
            assert pod["terminationGracePeriodSeconds"] < 30
        limits = [group["template"]["spec"]["containers"][0]["resources"]["limits"] for group in groups]
        assert [limit.get("nvidia.com/gpu") for limit in limits] == ["1", None]

    def test_what_ray_counts_is_what_kubernetes_gives(self):
        cluster = cluster_of(manifest("cluster.yaml"))
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            (container,) = group["template"]["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]

    def test_every_mount_has_its_volume(self):
        cluster = cluster_of(manifest("cluster.yaml"))
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}

    def test_the_command_is_one_of_ours_and_its_variable_is_set(self):
        job = manifest("job.yaml")
        command, recipe, option, run_dir = job["spec"]["entrypoint"].removeprefix("hdistill ").split()
        variables = {entry["name"] for entry in head_of(job)["env"]}
        assert (command, option) == ("run", "--run-dir") and run_dir.strip('"$') in variables
        assert (ROOT / "pipelines" / "recipes" / f"{recipe}.yaml").exists()
        assert yaml.safe_load(job["spec"]["runtimeEnvYAML"]).keys() == {"env_vars"}

    def test_no_secret_is_written_down(self):
        for path in ROOT.glob("deploy/kuberay/*.yaml"):
            for line in path.read_text().splitlines():
                assert not re.search(r"(TOKEN|KEY|PASSWORD)\s*:\s*\S", line.split("#")[0]), line


def head_of(document: dict[str, Any]) -> dict[str, Any]:
    return cluster_of(document)["headGroupSpec"]["template"]["spec"]["containers"][0]


# docs/scaling.md


def test_the_page_on_scaling_holds_what_the_script_computes():
    from benchmarks.scaling import document

    page = (ROOT / "docs" / "scaling.md").read_text()
    tables = document().strip().split("\n\n")
    assert len(tables) == 5 and all(table in page for table in tables)


@pytest.mark.parametrize("name", ["sketch", "refine"])
def test_more_gpus_are_never_slower_by_much_and_never_more_workers_than_rows(name: str):
    from benchmarks.scaling import HD, training

    few, some, many = (training(HD, name, gpus) for gpus in (1, 8, 512))
    assert some.hours < few.hours / 4 and many.hours < 1.2 * some.hours
    assert few.losses["averaging gradients"] == 0 and many.losses["GPUs without a row"] > 0
    assert all(0 < phase.busy < 1 and phase.gpu_hours == phase.hours * phase.gpus for phase in (few, some, many))
