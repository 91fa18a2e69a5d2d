"""The commands of the README and the pages as a reader would type them, one after another, on one machine.

Each stands here as on its page. What is added makes it small, and what takes the place of ``…`` or of a placeholder is
what the page means. What a page takes for granted (a data set, a bucket, a cluster) is got ready in between.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

README, CLUSTER, PAPER = "README.md", "running_on_your_cluster.md", "reproducing_the_paper.md"
WATCHING, OWN_MODEL, WRONG = "watching.md", "your_own_model.md", "when_something_goes_wrong.md"

# Blocks of commands that are run whole by tests of their own, by page.
WHOLE_BLOCKS = {
    "your_own_data.md": "tests/docs/test_examples.py::test_your_own_data",
    PAPER: "tests/docs/test_examples.py::test_reproducing_the_paper",
    "from_scores_to_submission.md": "tests/docs/test_from_scores.py::test_every_command",
}


@dataclass(frozen=True)
class Step:
    """One command of a page, or without a page what it takes for granted."""

    page: str
    command: str
    """as it stands there, without its comment"""
    small: str = ""
    """words added: less of the same"""
    means: Mapping[str, str] = field(default_factory=dict)
    """what is typed for a placeholder"""
    says: str = ""
    """a part of what it prints"""
    leaves: str = ""
    """a pattern of files, one of which it writes"""
    previews: bool = False
    """as it stands, with --dry-run, it is accepted too"""
    stays: str = ""
    """it does not end by itself: it is left running, and the walk goes on once this shell command succeeds"""
    timeout_s: float = 240
    in_small: bool = False
    """in the small walk, too"""

    @property
    def typed(self) -> str:
        """Less of what the page says, never what it leaves out."""
        assert not re.search(r"--(data|storage|name)\b", self.small), self.small
        return self._meant(f"{self.command} {self.small}".strip())

    @property
    def preview(self) -> str:
        return self._meant(f"{self.command} --dry-run")

    def _meant(self, command: str) -> str:
        for placeholder, words in self.means.items():
            assert placeholder in command, placeholder
            command = command.replace(placeholder, words)
        return command


def ready(command: str, **options: Any) -> Step:
    return Step("", command, **options)


# -- less of the same -------------------------------------------------------------------------------------------------

_FIELDS = {
    "model.depth": "18",
    "input.crop_px": "32",
    "input.scale_min_px": "36",
    "input.scale_max_px": "68",
    "input.test_shorter_side_px": "36",
    "batch.global_batch_size": "24",
    "batch.bn_group_size": "8",
    "schedule.max_steps": "2",
    "rhythm.validation_batch_size": "30",
}
SMALL = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in _FIELDS.items())
# The members' checkpoints are of ResNet-18: a second or two each.
SMALL_SIX = " ".join(
    [*(f"--change {name}={value}" for name, value in _FIELDS.items()), "--evaluation.precise-bn-images 16"]
)
SMALL_CIFAR = "--model.depth 8 --schedule.max-steps 3 --rhythm.validation-batch-size 50"
TWO_NODES = "--slurm.nodes 2 --slurm.gpus-per-node 0 --slurm.cpus-per-node 2"
DATA, RUNS = "--data /data/ilsvrc2012", "--storage /runs"
SIX = f"{DATA} {RUNS} --name six"


def finished(folder: str, within_s: int = 200) -> Step:
    """Until a run, or a campaign's submission, is there."""
    return ready(f"for i in $(seq {within_s}); do test ! -e {folder} || exit 0; sleep 1; done; exit 1", timeout_s=220)


# -- the walk ---------------------------------------------------------------------------------------------------------

_ON_ONE_MACHINE = (
    ready("python -m data_prep.demo --out /data/archives --num-classes 6 --train-per-class 40 --val-per-class 5 --test-images 10", in_small=True),
    ready("python -m tests.docs.reader photos /data/archives /data/photos; python -m tests.docs.reader cifar10 /data", in_small=True),
    Step(README, "python -m data_prep.ilsvrc /data/archives --out /data/ilsvrc2012", says="train 240 images", leaves="/data/ilsvrc2012/manifest.json", in_small=True),
    Step(README, "python -m data_prep.image_folder /data/photos --out /data/photos-set", says="6 classes", leaves="/data/photos-set/manifest.json", in_small=True),
    Step(README, "python -m data_prep.cifar10 /data/cifar-10-binary.tar.gz --out /data/cifar10", "--validation 10", leaves="/data/cifar10/manifest.json", in_small=True),
    Step(README, "python -m data_prep.verify /data/ilsvrc2012", says="0 problems", in_small=True),
    Step(README, f"python jobs/imagenet.py resnet50 {DATA} {RUNS} --name r50-a --dry-run", says="DRY RUN of r50-a", in_small=True),
    Step(README, "python jobs/imagenet.py resnet50 … --dry-run-on 8x64x8", means={"…": f"{DATA} {RUNS} --name r50-a"}, says="64 GPU", in_small=True),
    Step(README, "python jobs/imagenet.py --help", says="resnet50", in_small=True),
    Step(README, f"python jobs/contact_sheet.py resnet50 {DATA} --out sheet.png", leaves="sheet.png", in_small=True),
    Step(README, f"python jobs/imagenet.py resnet50 {DATA} {RUNS} --name r50-a", SMALL, says="2 steps done", leaves="/runs/r50-a/finished.json"),
    Step(README, f"python jobs/cifar10.py resnet20 --data /data/cifar10 {RUNS} --name r20", SMALL_CIFAR, says="3 steps done", leaves="/runs/r20/finished.json"),
    Step(README, f"python jobs/evaluate.py {RUNS} --name r50-a --evaluation.protocols ten_crop multi_scale --evaluation.splits val test", leaves="/runs/r50-a/scores/test-multi_scale-*.arrow"),
    Step(README, f"python jobs/campaign.py ilsvrc2015 {SIX}", SMALL_SIX, leaves="/runs/six/submission/*.txt", timeout_s=600),
    Step(README, f"python jobs/campaign.py status {RUNS} --name six", says="6 of 6 members done"),
    ready(f"python jobs/imagenet.py resnet50 {DATA} {RUNS} --name r50-b {SMALL} --seed 1 --evaluation.protocols ten_crop --evaluation.splits val test"),
    Step(README, "python jobs/ensemble.py --scores /runs/*/scores/{val,test}-ten_crop-*.arrow --out /submissions/mine", says="r50-b", leaves="/submissions/mine/ensemble.json"),
    Step(README, "python jobs/submission.py write /submissions/mine/scores/test-*.arrow --out submission.txt", says="no problems", leaves="submission.txt"),
    ready(f"python jobs/cifar10.py resnet56 --data /data/cifar10 {RUNS} --name r56 {SMALL_CIFAR}"),
    ready(f"python jobs/cifar10.py plain56 --data /data/cifar10 {RUNS} --name p56 {SMALL_CIFAR}"),
    Step(README, f"python jobs/layers.py {RUNS} --name r56 p56 --out layers.png", "--num-images 10", leaves="layers.png"),
    Step(README, f"python jobs/report.py {RUNS} --out /runs/report", says="index.html", leaves="/runs/report/index.html"),
    Step(README, "torchrun --nproc-per-node 8 jobs/imagenet.py resnet50 …", means={"8": "2", "…": f"{DATA} {RUNS} --name torch {SMALL}"}, says="2 steps done"),
    Step(README, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --backend-store-uri sqlite:///$PWD/mlflow.db", stays="python -m tests.docs.reader answers http://127.0.0.1:5000/health"),
    Step(README, "python jobs/rehearse.py --storage /runs/rehearsal", "--faults worker-kill", leaves="rehearsal/rehearsal.md", timeout_s=400),
    Step(README, "python jobs/rehearse.py --storage URL --soak-s 900 --mean-time-between-faults-s 150", "--soak-s 20 --mean-time-between-faults-s 10", means={"URL": "/runs/soak"}, leaves="rehearsal/rehearsal.md", timeout_s=400),
    Step(PAPER, "python -m data_prep.ilsvrc /data/archives --out /data/ilsvrc2012"),
    Step(PAPER, f"python jobs/imagenet.py plain34 {DATA} {RUNS} --evaluation.protocols ten_crop multi_scale", SMALL, leaves="/runs/plain34/scores/val-multi_scale-*.arrow"),
    ready("rm -rf /runs/six/members/r34 /runs/six/ensemble /runs/six/submission"),
    Step(PAPER, f"python jobs/campaign.py ilsvrc2015 {SIX}", SMALL_SIX, leaves="/runs/six/submission/*.txt"),
    Step(PAPER, "python jobs/campaign.py ilsvrc2015", SMALL_SIX, means={"ilsvrc2015": f"ilsvrc2015 {SIX}"}, says="6 of 6 members done"),
    ready("python -m tests.docs.reader my_job my_job.py; cp -r /data/photos-set /data/prepared"),
    Step(OWN_MODEL, f"python my_job.py --data /data/prepared {RUNS} --name small-a", "--schedule.max-epochs 1 --batch.global-batch-size 24 --batch.bn-group-size 8", leaves="/runs/small-a/finished.json"),
    ready("rm -rf /runs/r50-a"),
    Step(WATCHING, "prometheus --config.file cluster/monitoring/prometheus.yml", stays="python -m tests.docs.reader answers http://127.0.0.1:9090/-/ready"),
    Step(WATCHING, f"python jobs/imagenet.py resnet50 {DATA} {RUNS} --name r50-a --tracking.metrics-port 9400", f"{SMALL} --schedule.max-steps 200", stays="python -m tests.docs.reader scraped http://127.0.0.1:9090 resnet_step"),
    finished("/runs/r50-a/finished.json"),
)  # fmt: skip

_ON_A_CLUSTER = (
    ready("exec > /dev/null; tail -f /dev/null | nohup python -m tests.s3_server 9000 & python -m tests.docs.reader answers http://127.0.0.1:9000"),
    ready("export AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ACCESS_KEY_ID=test-access-key AWS_SECRET_ACCESS_KEY=test-secret-that-must-not-be-seen AWS_DEFAULT_REGION=us-east-1"),
    ready("python -m tests.docs.reader put /data/ilsvrc2012 s3://bucket/ilsvrc2012"),
    Step(README, "(umask 077; mkdir -p ~/.ray; openssl rand -hex 32 > ~/.ray/token)"),
    Step(README, "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/token"),
    Step(README, "ray start --head --port 6379 --dashboard-host 127.0.0.1", says="10.0.0.1"),
    Step(README, "python -m cluster.doctor --ray-address 127.0.0.1:6379 --storage s3://bucket/runs", says="a campaign can start"),
    Step(README, "python -m cluster.doctor --ray-address HEAD:6379 --storage s3://bucket/runs", says="a campaign can start"),
    Step(CLUSTER, f"python -m cluster.doctor --ray-address 10.0.0.1:6379 {RUNS} {DATA} --tracking-uri http://127.0.0.1:5000", says="a campaign can start"),
    Step(README, "export IMAGENET_DATA=s3://bucket/ilsvrc2012 IMAGENET_STORAGE=s3://bucket/runs MLFLOW_TRACKING_URI=http://127.0.0.1:5000"),
    Step(README, 'ray job submit --working-dir . --runtime-env-json "{\\"env_vars\\": {\\"IMAGENET_DATA\\": \\"$IMAGENET_DATA\\", \\"IMAGENET_STORAGE\\": \\"$IMAGENET_STORAGE\\", \\"MLFLOW_TRACKING_URI\\": \\"$MLFLOW_TRACKING_URI\\"}}" -- python jobs/imagenet.py', SMALL, says="2 steps done", timeout_s=400),
    ready("python -m tests.docs.reader recorded http://127.0.0.1:5000 resnet50"),
    Step(CLUSTER, "python jobs/imagenet.py resnet50 --data s3://bucket/ilsvrc2012 --storage s3://bucket/runs --name r50-a --on ray --ray.dashboard http://127.0.0.1:8265", SMALL),
    ready("until python -m cluster status r50-a | grep -q finished; do sleep 1; done; python -m cluster log r50-a", says="2 steps done"),
    ready("python jobs/report.py --storage s3://bucket/runs --out s3://bucket/report", says="finished), ensembles: 0"),
    Step(README, "python jobs/imagenet.py … --on ray", means={"…": f"resnet50 {DATA} {RUNS} --name on-ray {SMALL}"}),
    finished("/runs/on-ray/finished.json"),
    ready("rm -rf /runs/r50-a"),
    Step(CLUSTER, f"python jobs/imagenet.py resnet50 {DATA} {RUNS} --name r50-a --on local", SMALL),
    finished("/runs/r50-a/finished.json"),
    Step(WATCHING, "python -m cluster log NAME --follow", means={"NAME": "r50-a"}, says="2 steps done"),
    Step(CLUSTER, """python -c "import ray, ray.autoscaler.sdk as sdk; ray.init('auto'); sdk.request_resources(bundles=[{'GPU': 1, 'CPU': 8}] * 48)\""""),
    ready("ray status", says="48"),
    Step(CLUSTER, "python -m cluster.doctor --ray-address HEAD:6379 …", means={"…": RUNS}, says="a campaign can start"),
    ready("rm -rf /runs/six"),
    Step(CLUSTER, "python jobs/campaign.py ilsvrc2015 … --placement.ray-address HEAD:6379", SMALL_SIX, means={"…": SIX}, leaves="/runs/six/submission/*.txt", timeout_s=600),
    Step(CLUSTER, """python -c "import ray, ray.autoscaler.sdk as sdk; ray.init('auto'); sdk.request_resources(bundles=[])\""""),
    Step(CLUSTER, "python jobs/campaign.py member r34 ilsvrc2015 …", SMALL_SIX, means={"…": f"{DATA} {RUNS} --name by-hand"}, leaves="/runs/by-hand/members/r34/finished.json"),
)  # fmt: skip

_ON_SLURM = (
    ready("nohup python -m tests.cluster.slurm_cluster /slurm > /slurm.log 2>&1 & for i in $(seq 60); do test ! -e /slurm || exit 0; sleep 1; done; cat /slurm.log; exit 1"),
    ready("rm -rf /runs launches/six || true; export SLURM_CONF=$(cat /slurm)"),
    Step(CLUSTER, "python jobs/campaign.py … --on slurm … --dry-run", means={"…": "", "--dry-run": f"ilsvrc2015 {SIX} {SMALL_SIX} {TWO_NODES} --dry-run"}, says="#SBATCH"),
    Step(CLUSTER, f"python jobs/campaign.py ilsvrc2015 {SIX} --on slurm --slurm.nodes 8 --slurm.gpus-per-node 8 --slurm.cpus-per-node 64", f"{SMALL_SIX} {TWO_NODES} --change schedule.max_steps=400", previews=True),
    Step(CLUSTER, "python -m cluster list", says="six"),
    ready("for i in $(seq 200); do ls /runs/six/members/*/checkpoints/*.json && exit 0; sleep 1; done; python -m cluster log six; exit 1"),
    Step(CLUSTER, "python -m cluster status six", says="running"),
    Step(README, "python -m cluster status six", says="running"),
    Step(CLUSTER, "python -m cluster log six --follow", stays="sleep 3; grep -q r152-a /stays.log"),
    Step(CLUSTER, "python -m cluster stop six"),
    ready("until python -m cluster status six | grep -q stopped; do sleep 1; done"),
    ready("rm -rf /runs/six"),
    Step(README, "python jobs/campaign.py ilsvrc2015 … --on slurm --slurm.nodes 8 --slurm.gpus-per-node 8 --slurm.cpus-per-node 64", f"{SMALL_SIX} {TWO_NODES}", means={"…": SIX}, previews=True),
    ready("for i in $(seq 400); do ls /runs/six/submission/*.txt && exit 0; sleep 1; done; python -m cluster log six; exit 1", timeout_s=420),
    ready("until python -m cluster status six | grep -q finished; do sleep 1; done; rm -rf /runs/six/members/r34 /runs/six/ensemble /runs/six/submission"),
    Step(CLUSTER, f"python jobs/campaign.py ilsvrc2015 {SIX} --on slurm --slurm.array --slurm.nodes 2 --slurm.gpus-per-node 8 --slurm.cpus-per-node 64", f"{SMALL_SIX} {TWO_NODES} --slurm.nodes 1", previews=True),
    Step(CLUSTER, "python -m cluster log six --member r34 --follow", says="2 steps done", timeout_s=600),
    ready("for i in $(seq 400); do ls /runs/six/submission/*.txt && exit 0; sleep 1; done; python -m cluster log six; exit 1", timeout_s=420),
    Step(CLUSTER, f"python jobs/campaign.py status {RUNS} --name six", says="6 of 6 members done"),
    ready("until python -m cluster status six | grep -q finished; do sleep 1; done; rm -rf /runs/six/members/r50 /runs/six/ensemble /runs/six/submission"),
    Step(README, "python jobs/campaign.py ilsvrc2015 … --on slurm --slurm.array --slurm.gpus-per-node 8 --slurm.cpus-per-node 64", f"{SMALL_SIX} {TWO_NODES} --slurm.nodes 1", means={"…": SIX}, previews=True),
    ready("for i in $(seq 400); do ls /runs/six/submission/*.txt && exit 0; sleep 1; done; python -m cluster log six; exit 1", timeout_s=420),
)  # fmt: skip

_URL = {"URL": "/data/ilsvrc2012"}
_MEASURED = (
    Step(README, "python -m benchmarks.scale", says="4,096"),
    Step(README, "python -m benchmarks.order", "--quick"),
    Step(README, "python -m benchmarks.start", "--quick"),
    Step(README, "python -m benchmarks.preparation", "--quick"),
    Step(README, "python -m benchmarks.thousand_nodes", "--quick"),
    Step(README, "python -m benchmarks.memory", "--quick"),
    Step(README, "python -m benchmarks.memory --what loop", "--quick"),
    Step(README, "python -m benchmarks.overhead --data URL", "--quick", means=_URL),
    Step(README, "python -m benchmarks.numerics --data URL", "--quick --recipe resnet18_64px --global-batch-size 8 --bn-group-size 4 --ways serial eager", means=_URL),
    Step(README, "python -m benchmarks.step --data URL", "--quick --recipes resnet18_64px --global-batch-size 8 --bn-group-size 4 --ways eager --precisions fp32", means=_URL),
    Step(README, "python -m benchmarks.input --photos FOLDER", "--quick", means={"FOLDER": "/data/photos"}),
    Step(README, "python -m benchmarks.evaluation --data URL", "--quick --recipe resnet18_64px", means=_URL),
    Step(README, "python -m benchmarks.recovery checkpoints --data URL", "--quick", means=_URL),
    Step(README, "python -m benchmarks.recovery resume --data URL", "--quick", means=_URL),
    Step(README, "python -m benchmarks.recovery restart --data URL", "--quick", means=_URL),
    Step(README, "python -m tests.golden --write", leaves="tests/golden*.json"),
    Step(README, "python jobs/imagenet.py resnet18_64px …", "--schedule.max-steps 1", means={"…": f"{DATA} {RUNS} --name mini"}),
    Step(README, "python jobs/cifar10.py short --data URL --storage URL", SMALL_CIFAR, means={"--data URL": "--data /data/cifar10", "--storage URL": RUNS}, leaves="/runs/short/finished.json"),
    Step(README, "python jobs/campaign.py small …", SMALL_SIX, means={"…": f"{DATA} {RUNS} --name three"}, leaves="/runs/three/submission/*.txt"),
    Step(README, "python jobs/campaign.py cifar10_degradation …", "--change model.depth=8 --change schedule.max_steps=3 --change schedule.drop_steps=[2] --change rhythm.validation_batch_size=50", means={"…": f"--data /data/cifar10 {RUNS} --name seeds"}, says="±", timeout_s=600),
    Step(README, "python jobs/ensemble.py --scores FILES --out URL", means={"FILES": "/runs/six/members/*/scores/{val,test}-ten_crop-*.arrow", "URL": "/submissions/again"}, leaves="/submissions/again/ensemble.json"),
    Step(WRONG, "python jobs/imagenet.py … --dry-run", means={"…": f"resnet18_64px {DATA} {RUNS} --name mini"} | {"--dry-run": "--schedule.max-steps 1 --dry-run"}, says="DRY RUN of mini"),
    Step(WRONG, "python jobs/imagenet.py …", means={"…": f"resnet18_64px {DATA} {RUNS} --name mini --schedule.max-steps 1"}, says="1 steps done"),
    Step(WRONG, "python -m data_prep.verify DATA", means={"DATA": "/data/ilsvrc2012"}, says="0 problems"),
    Step(WRONG, "python jobs/submission.py check FILE", means={"FILE": "submission.txt"}, says="no problems"),
    Step(WRONG, "python jobs/campaign.py status --storage URL --name NAME", means={"URL": "/runs", "NAME": "six"}, says="6 of 6 members done"),
    Step(WRONG, "python jobs/imagenet.py --help"),
    Step(WRONG, "python jobs/campaign.py --help"),
    Step(WRONG, "python -m cluster list"),
    Step(WRONG, "python jobs/rehearse.py --storage URL", "--faults worker-stop", means={"URL": "/runs/rehearsal"}, timeout_s=400),
    Step(OWN_MODEL, "python jobs/imagenet.py --help"),
    Step("your_own_data.md", "python -m benchmarks.order", "--quick"),
)  # fmt: skip

WALKS = {"one machine": _ON_ONE_MACHINE, "what is measured": _MEASURED, "a cluster": _ON_A_CLUSTER, "SLURM": _ON_SLURM}
