"""launch/gke: what render.py writes is what Kubernetes and JobSet take, and what a slice needs."""

import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from xomni_jax.sharding.slices import TOPOLOGIES, Slice, parse

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.33"
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}


def closed(**properties):
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [k for k in properties if not k.endswith("_")],
        "properties": {k.rstrip("_"): v for k, v in properties.items()},
    }


# The parts of jobset.x-k8s.io/v1alpha2 that we use; what is inside a Job is checked with Kubernetes' own schemas.
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob", "RestartJobAndIgnoreMaxRestarts"]
REASONS = ["BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"]
RULE = closed(
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ACTIONS},
    onJobFailureReasons={"type": "array", "items": {"enum": REASONS}},
)
JOBSET = closed(
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata={"type": "object"},
    spec=closed(
        failurePolicy=closed(maxRestarts={"type": "integer", "minimum": 0}, rules={"type": "array", "maxItems": 20, "items": RULE}),
        replicatedJobs={
            "type": "array",
            "minItems": 1,
            "items": closed(name=NAME, replicas={"type": "integer", "minimum": 1}, template=closed(spec={"type": "object"})),
        },
    ),
)


def render(line):
    return subprocess.run([sys.executable, "-S", "launch/gke/render.py", *line.split()], cwd=ROOT, capture_output=True, text=True)


def manifests(line):
    done = render(line)
    assert done.returncode == 0, done.stderr
    assert "$" not in done.stdout
    return list(yaml.safe_load_all(done.stdout))


def validate_jobset(jobset):
    """-> the Job and Pod specifications inside."""
    jsonschema.validate(jobset, JOBSET)
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": jobset["metadata"], "spec": job}
    kubernetes_validate.validate(as_job, KUBERNETES, strict=True)
    return job, job["template"]["spec"]


TRAIN = "train sft --image registry/xomni:1 --bucket gs://pail"
COMMAND = "-- xomni train --distributed --config=configs/tiny/sft.py --config.run_dir=/bucket/runs/sft"


@pytest.mark.parametrize(
    "name, label, topology, hosts, chips",
    [
        ("v6e-64", "tpu-v6e-slice", "8x8", 16, 4),
        ("v5p-64", "tpu-v5p-slice", "2x4x4", 8, 4),
        ("v5litepod-256", "tpu-v5-lite-podslice", "16x16", 64, 4),
        ("v6e-8", "tpu-v6e-slice", "2x4", 1, 8),
        ("v4-8", "tpu-v4-podslice", "2x2x1", 1, 4),
        ("tpu7x-128", "tpu7x", "4x4x4", 16, 4),
    ],
)
def test_one_slice(name, label, topology, hosts, chips):
    (jobset,) = manifests(f"{TRAIN} --slice {name} {COMMAND}")
    job, pod = validate_jobset(jobset)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (hosts, hosts, "Indexed", 0)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": topology}
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": chips}, "limits": {"google.com/tpu": chips}}
    assert container["command"] == COMMAND.split()[1:]  # no shell: process 1 is the trainer
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 120
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_two_spot_slices_with_secrets():
    (jobset,) = manifests(f"{TRAIN} --slice v6e-16 --slices 2 --spot --secret keys --config-map urls --restarts 7 {COMMAND}")
    _, pod = validate_jobset(jobset)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2 and jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true" and pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    (container,) = pod["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "keys"}}, {"configMapRef": {"name": "urls"}}]
    env = {e["name"]: e["value"] for e in container["env"]}
    assert "--megascale_abort_on_hangs=true" in env["LIBTPU_INIT_ARGS"] and env["XOMNI_STOPPED_CODE"] == "75"
    annotations = jobset["metadata"]["annotations"]
    assert annotations == {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}


def test_a_mistake_fails_the_run_and_a_lost_host_restarts_it():
    (jobset,) = manifests(f"{TRAIN} --slice v6e-16 {COMMAND}")
    job, pod = validate_jobset(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [2]}}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


@pytest.mark.parametrize("gpu", [None, "nvidia-l4"])
def test_service(gpu):
    options = f"--gpu {gpu} --gpus 2" if gpu else "--cpus 8"
    deployment, service, policy = manifests(
        f"service ocr --image registry/reward:1 --replicas 3 --secret judge --clients 10.1.0.0/16 {options} -- "
        "xomni serve-reward ocr --host 0.0.0.0 --port 8000"
    )
    for manifest in (deployment, service, policy):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    pod = deployment["spec"]["template"]
    assert deployment["spec"]["replicas"] == 3
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    (container,) = pod["spec"]["containers"]
    assert (
        container["ports"][0] == {"name": service["spec"]["ports"][0]["targetPort"], "containerPort": 8000}
        and service["spec"]["ports"][0]["port"] == 8000
    )
    assert [container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")] == [
        "/ready",
        "/ready",
        "/health",
    ]
    assert policy["spec"]["podSelector"] == deployment["spec"]["selector"] and policy["spec"]["policyTypes"] == ["Ingress"]
    assert policy["spec"]["ingress"][0]["from"] == [{"podSelector": {}}, {"ipBlock": {"cidr": "10.1.0.0/16"}}]
    assert pod["spec"]["securityContext"]["runAsNonRoot"] and container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    limits = container["resources"]["limits"]
    if gpu:
        assert pod["spec"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": gpu} and limits["nvidia.com/gpu"] == 2
    else:
        assert pod["spec"]["nodeSelector"] == {} and "nvidia.com/gpu" not in limits and container["resources"]["requests"]["cpu"] == "8"


def test_a_service_on_a_slice():
    line = "service draw --slice v6e-8 --memory 64Gi --image i -- xomni serve --host 0.0.0.0 --port 8000 --mesh data=8"
    deployment, *others = manifests(line)
    for manifest in (deployment, *others):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    pod = deployment["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x4"
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "64Gi", "google.com/tpu": 8} and resources["requests"]["google.com/tpu"] == 8


def test_values_cannot_break_out_of_their_place():
    done = subprocess.run(
        [sys.executable, "launch/gke/render.py", *TRAIN.split(), "--slice", "v6e-16", "--", "echo", 'a"\nb: ${HOME} $x ü😀'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    _, pod = validate_jobset(yaml.safe_load(done.stdout))
    assert pod["containers"][0]["command"] == ["echo", 'a"\nb: ${HOME} $x ü😀']


@pytest.mark.parametrize(
    "line, sentence",
    [
        (f"{TRAIN} --slice v6e-100 {COMMAND}", "no slice of v6e; there are v6e-1, v6e-4, v6e-8, v6e-16"),
        (f"{TRAIN} --slice a100-8 {COMMAND}", "is no TPU slice"),
        (f"{TRAIN} --slice v6e-8 --slices 2 {COMMAND}", "slices of one host"),
        (f"{TRAIN} --slice v6e-16 --slices 0 {COMMAND}", "--slices 0 must be at least 1"),
        (f"{TRAIN} --slice v6e-16", "the command is missing; write it after --"),
        (f"{TRAIN.replace('sft', 'Sft', 1)} --slice v6e-16 {COMMAND}", "'Sft': names are at most 40 lower-case"),
        (f"service ocr --image i --secret KEY=v {COMMAND}", "'KEY=v': names are"),
        (f"service draw --image i --slice v6e-16 {COMMAND}", "has 4 hosts, a service runs on one"),
        (f"service draw --image i --slice v6e-8 --gpu nvidia-l4 {COMMAND}", "a pod has one kind of accelerator"),
        (f"service ocr --image i --clients anywhere {COMMAND}", "--clients anywhere is no network"),
    ],
)
def test_bad_input_is_one_sentence(line, sentence):
    done = render(line)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1 and done.stdout == ""


def test_slices():
    # From the cloud's own documentation: name, topology, hosts.
    for name, topology, hosts in [
        ("v5litepod-16", (4, 4), 4),
        ("v6e-256", (16, 16), 64),
        ("v4-32", (2, 2, 4), 4),
        ("v5p-8", (2, 2, 1), 1),
        ("v5p-128", (4, 4, 4), 16),
        ("v6e-1", (1, 1), 1),
    ]:
        tpu = parse(name)
        assert (tpu.topology, tpu.hosts, tpu.name) == (topology, hosts, name)
    assert parse("v5e-16") == parse("v5litepod-16")
    assert all(parse(Slice(chip, t).name) == Slice(chip, t) for chip in TOPOLOGIES for t in TOPOLOGIES[chip])
