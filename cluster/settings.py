"""What a person says of where a job is to run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RaySettings:
    """A running Ray cluster."""

    dashboard: str = ""
    """address of its dashboard, as http://127.0.0.1:8265; empty: RAY_API_SERVER_ADDRESS, then this"""
    working_dir: str = "."
    """folder that is uploaded for the job to run in; empty: nothing, the project is installed in the cluster's image"""


@dataclass(frozen=True)
class SlurmSettings:
    """What is asked of SLURM. Empty or 0: SLURM's own default."""

    nodes: int = 1
    cpus_per_node: int = 1
    gpus_per_node: int = 0
    mem_gb: int = 0
    """per node; 0: all of it"""
    time_min: int = 1440
    """of one start: at its end the job makes a checkpoint and is queued again"""
    warning_s: int = 300
    """how long before the end of a start SLURM warns: enough for a step and a checkpoint"""
    join_timeout_s: float = 600.0
    """how long the first node waits for the others"""
    partition: str = ""
    account: str = ""
    qos: str = ""
    interface: str = ""
    """network interface for Ray, NCCL and gloo; empty: the one on the way to the other nodes"""
    extra: tuple[str, ...] = ()
    """other options of sbatch, as constraint=h200"""
    array: bool = False
    """of a campaign: each member on nodes of its own, as a job array; a job behind them averages their scores"""
