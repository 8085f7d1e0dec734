"""The config files for a Slurm cluster of three nodes on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

NODES = ("n1", "n2", "n3")
CPUS, MEMORY_MB, GPUS = 4, 8000, 2
"""Of each node, whatever the machine really has."""

GRACE_SECONDS = 30
"""Between the signal of a preemption and the end of the job."""

DATABASE_PASSWORD = "testbed"
"""Not a secret: the database listens only on the loopback device, and holds nothing."""


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports on the loopback device, free when the test bed was created."""

    controller: int
    accounting: int
    database: int
    nodes: tuple[int, ...]


def slurm_conf(folder: Path, host: str, ports: Ports, accounting: bool) -> str:
    """`slurm.conf`: partitions `normal`, `short` (ten minutes at most), and `urgent`, which preempts jobs of both."""
    nodes = ",".join(NODES)
    storage = (
        f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={ports.accounting}
AccountingStoragePass={folder}/run/munge.socket"""
        if accounting
        else "AccountingStorageType=accounting_storage/none"
    )
    lines = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS} RealMemory={MEMORY_MB} "
        f"Gres=gpu:{GPUS} State=UNKNOWN"
        for name, port in zip(NODES, ports.nodes, strict=True)
    )
    return f"""ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports.controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# cred_expire: seconds before a requeued job may start again; Slurm's default is 120
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
SlurmdLogFile={folder}/log/slurmd-%n.log
# several nodes on one host, with more processors than it has
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=5
SlurmdTimeout=10
MessageTimeout=10
MinJobAge=600
JobRequeue=1
# a job that no partition would ever start is refused at once
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{storage}
{lines}
PartitionName=normal Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime={GRACE_SECONDS}
PartitionName=short Nodes={nodes} MaxTime=10 PriorityTier=1 GraceTime={GRACE_SECONDS}
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF
"""


def gres_conf(folder: Path) -> str:
    """`gres.conf`: the GPUs are empty files, since Slurm wants a file for each one."""
    return f"NodeName={','.join(NODES)} Name=gpu File={folder}/gpu/[0-{GPUS - 1}]\n"


def slurmdbd_conf(folder: Path, ports: Ports) -> str:
    """`slurmdbd.conf`, which must be readable by its user alone."""
    return f"""AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={ports.accounting}
SlurmUser=root
LogFile={folder}/log/slurmdbd.log
PidFile={folder}/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={ports.database}
StorageUser=slurm
StoragePass={DATABASE_PASSWORD}
StorageLoc=slurm_acct_db
"""


def database_init() -> str:
    """SQL that gives slurmdbd its user."""
    return (
        f"CREATE USER IF NOT EXISTS 'slurm'@'localhost' IDENTIFIED BY '{DATABASE_PASSWORD}';\n"
        f"CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{DATABASE_PASSWORD}';\n"
        "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'localhost';\n"
        "GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';\n"
    )
